"""Lower, prove and explain the gradient of a 32-layer Llama for more and more ranks:
seconds of one process, on one core.

    python benchmarks/scale.py          measures, writes results/scale.json, and draws results/scale.svg of it
    python benchmarks/scale.py draw     draws it again

Each mesh has a process of its own, and each figure is its first call: nothing is cached. The batch does not
divide over dp. The peer is the proof that matches rank by rank (`tests/helpers/rank_by_rank.py`), as far as
it ends within minutes.
"""
from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from record import RESULTS, row, write

MESHES = ("dp=2,cp=2,tp=2", "dp=4,cp=4,tp=4", "dp=2,cp=8,tp=8", "dp=16,cp=8,tp=8", "dp=128,cp=8,tp=8",
          "dp=1024,cp=8,tp=8", "dp=16384,cp=8,tp=8")
BY_RANK = 128           # the most ranks that are also matched rank by rank
BOUND_S = 2.0           # of 65,536 ranks
STEPS = ("lower", "prove", "explain")


def timed(f: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.perf_counter()
    made = f()
    return time.perf_counter() - begin, made


def measure(text: str) -> dict[str, float]:
    """Seconds of each step on one mesh."""
    import torch

    from shardlib import Mesh, explain, lower, prove, value_and_grad
    from shardlib.models.layouts import named_layout
    from shardlib.models.llama import LlamaConfig, loss
    from shardlib.reports.project import project
    torch.set_num_threads(1)
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))
    from rank_by_rank import match
    config = LlamaConfig(vocab_size=128256, d_model=4096, num_layers=32, num_kv_heads=8, queries_per_kv=4,
                         head_dim=128, d_ff=14336, norm_eps=1e-5, rope_theta=500000.0, rope_scaling=None,
                         tied=False, max_context=8192)
    mesh = Mesh.parse(text)
    sizes = dict(config.sizes, B=mesh.axes["dp"] * 3 // 2 + 1, T=8192, S=8192)
    found: dict[str, float] = {}
    found["lower"], program = timed(
        lambda: lower(value_and_grad(loss), named_layout("tp+sp+fsdp+cp", mesh), mesh=mesh, config=config))
    found["prove"], proof = timed(lambda: prove(program, mesh, sizes))
    found["explain"], _ = timed(lambda: explain(program, mesh, sizes))
    if mesh.world_size <= BY_RANK:
        found["by rank"], count = timed(
            lambda: match([project(program, mesh, rank, sizes) for rank in range(mesh.world_size)]))
        assert count == proof.collectives
    return found | {"ranks": mesh.world_size, "collectives": proof.collectives}


def draw() -> None:
    """Seconds over ranks."""
    import matplotlib
    matplotlib.use("svg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"svg.hashsalt": "shardlib", "svg.fonttype": "none"})
    rows = [r for r in json.loads((RESULTS / "scale.json").read_text())["rows"] if "ranks" in r]
    figure, axes = plt.subplots(figsize=(6.4, 4.2))
    lines = {"all three": ("ours", "C3", 2.2), **{step: (step, f"C{i}", 1.2) for i, step in enumerate(STEPS)},
             "proof rank by rank": ("by rank", "0.5", 1.2)}
    for label, (key, color, width) in lines.items():
        points = [(r["ranks"], r[key]) for r in rows if key in r]
        axes.loglog(*zip(*points), color=color, linewidth=width, label=label, marker="o", markersize=3)
    axes.set_xlabel("ranks")
    axes.set_ylabel("seconds")
    axes.legend()
    figure.tight_layout()
    figure.savefig(RESULTS / "scale.svg", metadata={"Date": None})


def main() -> None:
    rows = []
    for mesh in MESHES:
        out = subprocess.run([sys.executable, __file__, mesh], capture_output=True, text=True, check=True)
        found = json.loads(out.stdout)
        total = sum(found[step] for step in STEPS)
        peers = {"proof rank by rank": found["by rank"]} if "by rank" in found else {}
        bound = {"bound": BOUND_S} if found["ranks"] == 65536 else {}
        case = f"lower + prove + explain, {found['ranks']:,} ranks ({mesh})"
        rows.append(row(case, "s", total, {**peers, **bound}) | found)
    write("scale", rows)
    draw()


if __name__ == "__main__":
    match sys.argv[1:]:
        case []:
            main()
        case ["draw"]:
            draw()
        case [mesh]:
            print(json.dumps(measure(mesh)))
