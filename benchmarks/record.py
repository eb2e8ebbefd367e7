"""What every benchmark writes: benchmarks/results/NAME.json, with hardware, versions,
commit and date beside the rows.

A row: {case, unit, ours, peers: {name: value}, floor}; lower is better; floor is null where there is none. A
row with "readme" false is left out of the README's table.
"""
from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def row(case: str, unit: str, ours: float, peers: Mapping[str, float], floor: float | None = None) -> dict:
    return {"case": case, "unit": unit, "ours": _short(ours),
            "peers": {k: _short(v) for k, v in peers.items()},
            "floor": None if floor is None else _short(floor)}


def _short(x: float) -> float:
    return float(f"{x:.4g}")


def write(name: str, rows: Sequence[dict], **notes: object) -> None:
    """Write the rows of benchmark `name`, and print them."""
    RESULTS.mkdir(exist_ok=True)
    record = {"hardware": hardware(), "versions": versions(), "commit": commit(),
              "date": datetime.date.today().isoformat(), **notes, "rows": list(rows)}
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    for r in rows:
        peers = "  ".join(f"{k} {v:g} (ours/peer {r['ours'] / v:.3f})" for k, v in r["peers"].items() if v)
        print(f"{r['case']}: {r['ours']:g} {r['unit']}  {peers}  floor {r['floor']}", flush=True)


def hardware(gpus: int | None = None) -> str:
    """The card and how many of them took part, all if not said; or the processor."""
    if torch.cuda.is_available():
        return f"{gpus or torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    names = ([line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
              if line.startswith("model name")]
             if Path("/proc/cpuinfo").exists() else [platform.processor()])
    return f"{os.cpu_count()} cores of {names[0] if names else platform.machine()}"


def of_all(rows: Sequence[dict], key: str) -> str:
    """What rows of several runs say of themselves: each value once."""
    return "; ".join(sorted({r[key] for r in rows}))


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": torch.__version__}


def commit() -> str:
    """The commit, with + where the tree differs from it; where there is no repository, what COMMIT says."""
    if said := os.environ.get("COMMIT"):
        return said

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], capture_output=True, text=True,
                              cwd=Path(__file__).parent).stdout.strip()
    changed = git("status", "--porcelain", "--untracked-files=no", "--", "..", ":!results")
    return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")


def paired(contestants: Mapping[str, Callable[[], object]], rounds: int, calls: int = 1,
           warmup: int = 3) -> dict[str, list[float]]:
    """Seconds a call of each contestant, taken in turn in every round,
    so that whatever slows the machine slows all."""
    for f in contestants.values():
        for _ in range(warmup):
            f()
    times: dict[str, list[float]] = {name: [] for name in contestants}
    order = list(contestants.items())
    for i in range(rounds):
        for name, f in order if i % 2 else reversed(order):
            begin = time.perf_counter()
            for _ in range(calls):
                f()
            times[name].append((time.perf_counter() - begin) / calls)
    return times


def medians(times: Mapping[str, Sequence[float]], scale: float = 1.0) -> dict[str, float]:
    return {name: statistics.median(values) * scale for name, values in times.items()}


def ratio(times: Mapping[str, Sequence[float]], a: str, b: str) -> float:
    """The median over rounds of a's time over b's: paired."""
    return statistics.median(x / y for x, y in zip(times[a], times[b]))
