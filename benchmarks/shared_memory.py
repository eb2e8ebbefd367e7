"""Collectives and messages between processes of one host:
ours through shared memory beside torch's over gloo, in one run.

µs of the slowest rank, the median over rounds in which both take turns. A message's latency is from before
the put to after the last reader's get, on the clock that processes of a host share.
"""
from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from record import row, write

from shardlib import Mesh
from shardlib.distributed import GroupCoordinator, connect
from shardlib.distributed.message_queue import MessageQueue
from shardlib.errors import bytes_text

PROCESSES = (2, 4)
SIZES = (1 << 10, 4 << 10, 16 << 10, 256 << 10, 4 << 20)
ROUNDS = int(os.environ.get("ROUNDS", "15"))

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

Contestants = Mapping[str, Callable[[], object]]


def collectives(group: GroupCoordinator, nbytes: int) -> dict[str, Contestants]:
    """Each collective of `nbytes` as a whole: ours by way of the coordinator,
    torch's into memory that is there already."""
    n, torch_group = group.world_size, group.device_group
    x, sizes = torch.randn(nbytes // 4), (nbytes // 4 // n,) * n
    piece, whole, share = x[:sizes[0]].clone(), torch.empty_like(x), torch.empty(sizes[0])
    assert {group.route(name, x, "sum").name
            for name in ("all_reduce", "all_gather", "reduce_scatter", "broadcast")} == {"shared memory"}
    return {
        "all_reduce": {"ours": lambda: group.all_reduce(x),
                       "gloo": lambda: dist.all_reduce(whole, group=torch_group)},
        "all_gather": {"ours": lambda: group.all_gather(piece, 0, sizes),
                       "gloo": lambda: _all_gather(whole, piece, torch_group)},
        "reduce_scatter": {"ours": lambda: group.reduce_scatter(x, 0, sizes),
                           "gloo": lambda: _reduce_scatter(share, x, group=torch_group)},
        "broadcast": {"ours": lambda: group.broadcast(x, 0),
                      "gloo": lambda: dist.broadcast(whole, group_src=0, group=torch_group)},
    }


def in_turn(group: GroupCoordinator, contestants: Contestants, calls: Mapping[str, int]) -> dict[str, float]:
    """µs a call of each, of the slowest rank in each round, from a common start."""
    slowest: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(ROUNDS + 1):
        for name, call in contestants.items():
            group.all_reduce(torch.zeros(1))
            begin = time.perf_counter()
            for _ in range(calls[name]):
                call()
            mine = torch.tensor((time.perf_counter() - begin) / calls[name] * 1e6)
            slowest[name].append(group.all_reduce(mine, "max").item())
    return {name: statistics.median(times[1:]) for name, times in slowest.items()}


def messages(group: GroupCoordinator, queue: MessageQueue, nbytes: int) -> Contestants:
    """One message of `nbytes` from member 0; each returns when it was sent, by the sender's clock."""
    text, me = "x" * nbytes, group.rank_in_group

    def ours() -> float:
        return queue.broadcast((time.perf_counter(), text) if me == 0 else None, tuple[float, str])[0]

    def gloo() -> float:
        box = [(time.perf_counter(), text) if me == 0 else None]
        dist.broadcast_object_list(box, group=group.cpu_group, group_src=0)
        return box[0][0]
    return {"ours": ours, "gloo": gloo}


def latency(group: GroupCoordinator, contestants: Contestants) -> dict[str, float]:
    """µs until the last reader has a message."""
    took: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(10 * ROUNDS):
        for name, call in contestants.items():
            group.all_reduce(torch.zeros(1))
            sent = call()
            mine = torch.tensor((time.perf_counter() - sent) * 1e6 if group.rank_in_group else 0.0)
            took[name].append(group.all_reduce(mine, "max").item())
    return {name: statistics.median(times) for name, times in took.items()}


def worker() -> None:
    """One rank: measures, and rank 0 prints the rows."""
    torch.set_num_threads(1)
    n, rows = int(os.environ["WORLD_SIZE"]), []
    with connect(Mesh(tp=n), "cpu") as runtime, torch.inference_mode():
        runtime.create_groups([("tp",)])
        group, queue = runtime.group(("tp",)), runtime.open_queue(("tp",))
        for nbytes in SIZES:
            calls = {"ours": 50, "gloo": 5} if nbytes < 1 << 20 else {"ours": 5, "gloo": 2}
            for name, contestants in collectives(group, nbytes).items():
                found = in_turn(group, contestants, calls)
                rows.append(row(f"{name} of {bytes_text(nbytes)}, {n} processes", "µs", found["ours"],
                                {"gloo": found["gloo"]}) | {
                                    "bytes": nbytes, "readme": nbytes in (4 << 10, 256 << 10)})
        for nbytes in (100, 100_000):
            contestants = messages(group, queue, nbytes)
            late, each = latency(group, contestants), in_turn(group, contestants, {"ours": 200, "gloo": 10})
            for what, found in (("latency", late), ("each of many in a row", each)):
                rows.append(row(f"message of {bytes_text(nbytes)} to {n - 1} readers, {what}", "µs",
                                found["ours"], {"broadcast_object_list": found["gloo"]}))
        if runtime.rank == 0:
            print(json.dumps(rows))


def main() -> None:
    rows = []
    for n in PROCESSES:
        found = subprocess.run([str(Path(sys.executable).with_name("torchrun")), "--standalone",
                                "--nproc-per-node", str(n), __file__, "--worker"],
                               env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
                               timeout=1200)
        if found.returncode:
            raise SystemExit(found.stderr[-3000:])
        rows += json.loads(found.stdout.splitlines()[-1])
    write("shared_memory", rows, rounds=ROUNDS)


if __name__ == "__main__":
    worker() if sys.argv[1:] == ["--worker"] else main()
