"""Generation as a pipeline on GPUs: ms a token of rows in groups, beside tensor parallel on as many GPUs.

    torchrun --nproc-per-node 4 benchmarks/row_groups.py --mesh tp=4 --shape llama3-8b --batch 8,32,128
    torchrun --nproc-per-node 4 benchmarks/row_groups.py --mesh pp=4 --shape llama3-8b --batch 8,32,128

128-token prompts, 128 new tokens, bf16, captured. Each row of results/row_groups.json: `ours` is ms between
two tokens of every row, all groups of a batch; `peers` the same of the tensor parallel row of this shape,
batch and card, where there is one; `tokens_per_second` of all rows; `first_ms` to the first token of all
rows; `floor` the weights of the fullest stage, read once for each group, and its live cache, over the
measured read rate.
"""
from __future__ import annotations

import argparse
import datetime
import json
import statistics
import time
from pathlib import Path

import torch
from decode import merge
from record import RESULTS, commit, hardware, versions

from shardlib import Mesh
from shardlib.distributed.runtime import Runtime, connect
from shardlib.models.bench_generate import read_rate, step_bytes
from shardlib.models.decoding import Model
from shardlib.models.layouts import named_layout

ROUNDS, WARM = 2, 5


def measured(model: Model, rows: int, groups: int, prompt: int, new: int) -> tuple[float, float]:
    """ms between tokens, and to the first one: medians of ROUNDS calls, after one that makes the programs."""
    prompts = [[(7 * row + 3 * at + 1) % model.config.vocab_size for at in range(prompt)]
               for row in range(rows)]
    calls = []
    for _ in range(ROUNDS + 1):
        came: list[float] = []
        began = time.perf_counter()
        model.generate(prompts, new, on_tokens=lambda _: came.append(time.perf_counter()), graph=True,
                       groups=groups)
        calls.append(((came[-1] - came[WARM]) / (new - 1 - WARM), came[0] - began))
    between, first = (statistics.median(column) * 1e3 for column in zip(*calls[1:]))
    return between, first


def floor_ms(model: Model, runtime: Runtime, rows: int, groups: int, length: int, rate: float) -> float:
    held = model.decoder().cache_bytes(rows, length)
    mine = torch.tensor([(groups * step_bytes(model, rows) + held) / rate * 1e3], device=runtime.device)
    axes = tuple(runtime.mesh.axes)
    runtime.create_groups([axes])
    return float(runtime.group(axes).all_reduce(mine, "max"))


def run(runtime: Runtime, shape: str, layout: str, batches: list[int], prompt: int, new: int) -> list[dict]:
    """Rows of a shape: each batch as one group, as many as stages, and twice as many."""
    model, rate = Model.random(shape, named_layout(layout, runtime.mesh), runtime).pack(), read_rate(
        runtime.device)
    stages, rows = runtime.mesh.axes.get("pp", 1), []
    for batch in batches:
        for groups in sorted({1, min(stages, batch), min(2 * stages, batch) if stages > 1 else 1}):
            ms, first = measured(model, batch, groups, prompt, new)
            rows.append({"case": f"{shape}, {runtime.mesh}, batch {batch}, groups {groups}",
                         "unit": "ms/token", "ours": round(ms, 3), "peers": {},
                         "floor": round(floor_ms(model, runtime, batch, groups, prompt + new // 2, rate), 3),
                         "tokens_per_second": round(batch / ms * 1e3, 1), "first_ms": round(first, 2),
                         "bytes_per_second": round(rate / 1e12, 3)})
            if runtime.rank == 0:
                print(json.dumps(rows[-1]), flush=True)
    return rows


def with_peers(path: Path, rows: list[dict], mesh: Mesh) -> list[dict]:
    """The rows, beside tensor parallel on as many GPUs."""
    there = json.loads(path.read_text())["rows"] if path.exists() else []
    name = f"tp={mesh.world_size}"
    peer = {(r["case"], r["hardware"]): r["ours"] for r in there}
    for row in rows:
        shape, _, rest = row["case"].partition(f", {mesh}, batch ")
        case = f"{shape}, {name}, batch {rest.partition(',')[0]}, groups 1"
        if (case, row["hardware"]) in peer and str(mesh) != name:
            row["peers"] = {name: peer[case, row["hardware"]]}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--mesh", default="pp=4")
    parser.add_argument("--layout", help="by default L=pp, and K, F and V over tp")
    parser.add_argument("--shape", default="llama3-8b")
    parser.add_argument("--batch", default="8,32,128")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--device", default="cuda", help="cpu: a rehearsal")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where row_groups.json is")
    options = parser.parse_args()
    mesh = Mesh.parse(options.mesh)
    layout = options.layout or ",".join(
        (["L=pp"] if "pp" in mesh.axes else []) + (["K=tp,F=tp,V=tp"] if "tp" in mesh.axes else []))
    with connect(mesh, options.device) as runtime:
        rows = run(runtime, options.shape, layout, [int(b) for b in options.batch.split(",")], options.prompt,
                   options.new)
        facts = {"hardware": hardware(mesh.world_size), "versions": versions(), "commit": commit(),
                 "date": datetime.date.today().isoformat()}
        if runtime.rank == 0:
            path = options.out / "row_groups.json"
            merge(path, with_peers(path, [{**r, **facts} for r in rows], mesh))


if __name__ == "__main__":
    main()
