"""Ranks as processes, whose kernels are interpreted over memory that they share;
exit status 1 where anything is wrong.

    TRITON_INTERPRET=1 python interpreted_worker.py FOLDER 2 3        with two ranks, then with three

Each process maps the arenas, files in FOLDER, by itself: a rank's memory has another address in every
process, as on GPUs.
"""
from __future__ import annotations

import os
import random
import sys
import traceback
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from trials import DTYPES, FAMILIES, Call, data, random_calls, wrong

from shardlib.triton_kernels.lamport import EMPTY, SLOTS, STATE_WORDS
from shardlib.triton_kernels.workspace import Workspace

SEED = 5
KERNELS = FAMILIES["all"]
CALLS: list[Call] = [
    replace(call, kernel=KERNELS[i % len(KERNELS)], dtype=DTYPES[i % 3], blocks=1 + i % 2, split=1)
    for i, call in enumerate(random_calls("all", random.Random(SEED), 2 * len(KERNELS)))]
"""Each kernel twice, with chunks of several blocks, and each dtype. Blocks run one after another here,
so that none waits for another's part of a row."""


def slot_bytes(world: int) -> int:
    return max(call.slot_bytes(world) for call in CALLS)


def arena(folder: Path, world: int, rank: int) -> Tensor:
    return torch.from_file(str(folder / f"{world}-{rank}"), shared=True,
                           size=SLOTS.value * slot_bytes(world) // 4, dtype=torch.int32)


def prepare(folder: Path, world: int) -> None:
    """The arenas of all ranks, filled as a workspace is."""
    for rank in range(world):
        content = torch.full((SLOTS.value * slot_bytes(world) // 4,), EMPTY.value, dtype=torch.int32)
        (folder / f"{world}-{rank}").write_bytes(content.numpy().tobytes())


def run(folder: Path, world: int, rank: int) -> str | None:
    """What went wrong on this rank, which makes all calls."""
    xs, arenas = data(CALLS, world, SEED), [arena(folder, world, r) for r in range(world)]
    addresses = torch.tensor([a.data_ptr() for a in arenas])
    workspace = Workspace(rank, world, addresses, arenas[rank], torch.zeros(STATE_WORDS, dtype=torch.int32),
                          slot_bytes(world))
    return wrong(CALLS, xs, [[call.run(x[rank], workspace) for call, x in zip(CALLS, xs)]], first_rank=rank)


def main(folder: Path, *worlds: int) -> int:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", RuntimeWarning)         # of numpy, at sums of infinities
    failed = 0
    for world in worlds:
        prepare(folder, world)
        children = []
        for rank in range(world):
            if (child := os.fork()) == 0:
                status = 1
                try:
                    failure = run(folder, world, rank)
                    if failure:
                        print(failure, file=sys.stderr, flush=True)
                    status = int(failure is not None)
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(status)
            children.append(child)
        failed += sum(os.waitpid(child, 0)[1] != 0 for child in children)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *map(int, sys.argv[2:])))
