"""Ranks as processes, whose kernels are interpreted over memory that they share; exit status 1 where anything is wrong.

    TRITON_INTERPRET=1 python interpreted_worker.py FOLDER 2 3        with two ranks, then with three

Each process maps the arenas, files in FOLDER, by itself: a rank's memory has another address in every process, as on GPUs.
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

from shardlib.triton_kernels.lamport import EMPTY
from shardlib.triton_kernels.workspace import MAX_BLOCKS, Workspace
from trials import DTYPES, FAMILIES, Call, data, random_calls, state, wrong

SEED = 5
FLAGS = MAX_BLOCKS * 8 * 2
"""Words of flags, for up to eight ranks."""


def calls_of(family: str) -> list[Call]:
    """Each kernel twice, with chunks of several blocks; sums with each dtype."""
    calls = random_calls(family, random.Random(SEED), 2 * len(FAMILIES[family]))
    return [replace(call, kernel=FAMILIES[family][i % len(FAMILIES[family])], dtype=DTYPES[i % 3], blocks=1 + i % 2) for i, call in enumerate(calls)]


def arena_words(family: str, world: int) -> int:
    slot_bytes = max(call.slot_bytes(family, world) for call in calls_of(family))
    return 3 * slot_bytes // 4 if family == "sums" else FLAGS + 2 * slot_bytes // 4


def arena(folder: Path, family: str, world: int, rank: int) -> Tensor:
    return torch.from_file(str(folder / f"{family}-{world}-{rank}"), shared=True, size=arena_words(family, world), dtype=torch.int32)


def prepare(folder: Path, world: int) -> None:
    """The arenas of all ranks, filled as a workspace is."""
    for family in FAMILIES:
        for rank in range(world):
            content = torch.full((arena_words(family, world),), EMPTY.value if family == "sums" else 0, dtype=torch.int32)
            (folder / f"{family}-{world}-{rank}").write_bytes(content.numpy().tobytes())


def run(folder: Path, world: int, rank: int) -> list[str]:
    """What went wrong on this rank, which makes all calls of all families."""
    failures = []
    for family in FAMILIES:
        calls = calls_of(family)
        xs, flags = data(calls, world, SEED), 0 if family == "sums" else FLAGS
        arenas = [arena(folder, family, world, r) for r in range(world)]
        addresses = torch.tensor([a.data_ptr() for a in arenas])
        slot_bytes = max(call.slot_bytes(family, world) for call in calls)
        workspace = Workspace(rank, world, addresses + 4 * flags, arenas[rank], state(family), slot_bytes, addresses)
        got = [call.run(family, x[rank], workspace) for call, x in zip(calls, xs)]
        failures.append(wrong(family, calls, xs, [got], first_rank=rank))
    return [failure for failure in failures if failure]


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
                    failures = run(folder, world, rank)
                    for failure in failures:
                        print(failure, file=sys.stderr, flush=True)
                    status = int(bool(failures))
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(status)
            children.append(child)
        failed += sum(os.waitpid(child, 0)[1] != 0 for child in children)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *map(int, sys.argv[2:])))
