"""What `explain` predicts after `calibrate`, beside what the same calls take:
sizes between those that were calibrated.

    torchrun --nproc-per-node 2 benchmarks/prediction.py            calibrates, then measures;
                                                                    adds its rows to results/prediction.json

`ours` is the measured time of a call of the coordinator, whoever takes it; `predicted` is the table's.
"""
from __future__ import annotations

import datetime
import json
import os
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from record import RESULTS, commit, hardware, of_all, row, versions

from shardlib import Mesh
from shardlib.distributed import GroupCoordinator, connect
from shardlib.distributed.calibrate import calibrate, time_on_cpu, time_on_gpu
from shardlib.distributed.communicators.protocol import Call

KNOWN = tuple(2 ** k for k in range(11, 25, 2))
ASKED = tuple(3 * 2 ** k for k in range(10, 23, 2))


def calls(group: GroupCoordinator, x: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """The collectives of x, whole, as a program calls them."""
    n, piece = group.world_size, x.numel() // group.world_size
    sizes = (piece,) * n
    return {"all_reduce": partial(group.all_reduce, x),
            "reduce_scatter": partial(group.reduce_scatter, x, 0, sizes),
            "all_gather": partial(group.all_gather, x[:piece].clone(), 0, sizes),
            "all_to_all": partial(group.all_to_all, x.split(piece), [(piece,)] * n, True)}


def main() -> None:
    n, on_gpu = (int(os.environ["WORLD_SIZE"]),
                 torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"]))
    dtype, more = (torch.bfloat16, {}) if on_gpu else (torch.float32, {})
    if on_gpu:
        from shardlib.ops.nvlink import nvlink
        more = {"communicators": (nvlink,)}
    rows = []
    with connect(Mesh(tp=n), "cuda" if on_gpu else "cpu", **more) as runtime:
        table = calibrate(runtime, KNOWN)
        group = runtime.group(("tp",))
        group.router.use(table)
        for nbytes in ASKED:
            x = torch.randn(nbytes // dtype.itemsize // n * n, device=group.device).to(dtype)
            for name, call in calls(group, x).items():
                op = "sum" if name in ("all_reduce", "reduce_scatter") else None
                choice = group.router.choice(Call(name, op, dtype, group.device.type, x.nbytes, True, on_gpu))
                us = time_on_gpu(call, group, 20, capturing=True) if on_gpu else time_on_cpu(call, group, 10)
                rows.append(row(f"{name}, {n} {'GPUs' if on_gpu else 'processes'}, {x.nbytes} B, by "
                                f"{choice.communicator}", "µs", us,
                                {"predicted": choice.us})
                            | {"device": group.device.type, "ranks": n, "bytes": x.nbytes,
                                  "readme": nbytes in ASKED[::3] and n == (4 if on_gpu else 2)})
        rank = runtime.rank
    if rank == 0:
        save(rows, on_gpu, n)


def save(rows: list[dict], on_gpu: bool, n: int) -> None:
    file, mine = RESULTS / "prediction.json", {"device": "cuda" if on_gpu else "cpu", "ranks": n}
    old = json.loads(file.read_text())["rows"] if file.exists() else []
    for r in rows:
        r.update(hardware=hardware(), torch=versions()["torch"], commit=commit())
    factors = [max(r["ours"] / r["peers"]["predicted"], r["peers"]["predicted"] / r["ours"]) for r in rows]
    print(f"{len(rows)} calls: off by a factor of {statistics.median(factors):.2f} (median), "
          f"{max(factors):.2f} (most)")
    kept = [r for r in old if any(r[k] != v for k, v in mine.items())]
    rows = kept + rows
    record = {"hardware": of_all(rows, "hardware"), "versions": {"torch": of_all(rows, "torch")},
              "commit": of_all(rows, "commit"), "date": datetime.date.today().isoformat(), "rows": rows}
    file.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
