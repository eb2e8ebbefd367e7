"""Generation on GPUs: ms a decode step of published Llama shapes, beside the same step written by hand,
and where its time goes.

    torchrun --nproc-per-node 4 benchmarks/decode.py --mesh tp=4 --shapes llama3-8b,llama3-70b
    torchrun --nproc-per-node 4 benchmarks/decode.py --mesh tp=4 --shapes mixtral-8x7b --layouts tp,tp+ep
    python benchmarks/decode.py --shapes llama3-8b
    python benchmarks/decode.py --draw                      results/decode.svg of what is there

128-token prompts, 128 new tokens, bf16. Each row of results/decode.json: `ours` is the device's time of a
step, one replay after another; `peers` the hand-written program (`plain_decode.py`) with each way of adding
up, in the same run; `floor` the bytes of weights and live cache over the measured read rate; with ms between
tokens of `generate`, of the whole call over its tokens, and to the first token. Rows of other cards and
meshes stay. profiles/decode.json: µs by kernel of one replay, and of one layer (`replayed.py`).
"""
from __future__ import annotations

import argparse
import datetime
import gc
import json
from collections import defaultdict
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist
from plain_decode import SUMS, PlainDecode
from record import RESULTS, commit, hardware, of_all, versions
from replayed import by_name, kernels_of, layer

from shardlib import Mesh
from shardlib.distributed.runtime import Runtime, connect
from shardlib.models.bench_generate import Measured, measure, ms_of, read_rate
from shardlib.models.decoding import Model
from shardlib.models.layouts import named_layout
from shardlib.models.random_weights import SHAPES

PROMPT, NEW, STEPS = 128, 128, 64
UNCOUNTED = ("gate_up", "splitKreduce", "expert_", "route")     # kernels whose bytes nobody counts


def by_hand(model: Model, rows: int, sums: str, group: dist.ProcessGroup | None) -> tuple[float, list[int]]:
    """ms a step of the hand-written program, and tokens that it chooses after token 1 in every row."""
    plain = PlainDecode(model, rows, 256, sums, group)
    with torch.inference_mode():
        plain.ids.copy_(torch.arange(rows) * 7 + 1)             # each row its own experts
        graph = plain.capture()
        times = []
        for _ in range(3):
            plain.position.fill_(PROMPT)
            times.append(ms_of(graph.replay, STEPS, model.runtime.device))
        times.sort()
        plain.ids.fill_(1)
        plain.position.zero_()
        chosen = []
        for _ in range(8):
            graph.replay()
            chosen.append(int(plain.ids[0]))
    return times[1], chosen


def profiled(model: Model, rows: int, rate: float) -> dict:
    """Of a replay: µs by kernel, and a layer's kernels in order, each with the floor of the bytes it reads.

    Ranks have met by then.
    """
    decoder = model.decoder()
    with torch.inference_mode():
        prompts = [[7 * row + 3 * at + 1 for at in range(PROMPT)] for row in range(rows)]
        slots = decoder.begin(prompts, NEW, [])
        decoder.advance(slots)
        found = kernels_of(lambda: decoder.advance(slots))
    parts = dict(zip(model.weights.parts, model.weights.flat))
    cache = decoder.cache_bytes(rows, PROMPT) / model.config.num_layers
    ffn = ("router",) if "w.layers.router" in parts else ("gate|w.layers.up", "down")
    matmuls = iter([parts[f"w.layers.{name}"][0].nbytes for name in
                    ("wo", *ffn, "wq|w.layers.wk|w.layers.wv")])
    state = rows * model.config.d_model * model.dtype.itemsize
    rows_ = [(name, us, cache if "attention" in name else 4 * state if "norm" in name
              else 0 if any(word in name for word in UNCOUNTED) else next(matmuls, 0))
             for name, us in layer(found, "cached_attention")]
    return {"us": round(sum(k.from_end_to_end for k in found), 1),
            "layer": [[name, us, round(nbytes / rate * 1e6, 2)] for name, us, nbytes in rows_],
            "us_launches_own": by_name(found)}


def run(runtime: Runtime, shape: str, layout: str, mesh: Mesh, batches: list[int], sums: list[str],
        rate: float) -> tuple[list[dict], dict]:
    """Rows of one shape, and its kernels."""
    model = Model.random(shape, named_layout(layout, mesh), runtime).pack()
    group, where = None, f"{layout}={mesh.world_size}"
    if mesh.world_size > 1:
        group = dist.new_group(list(range(mesh.world_size)), backend="nccl")
    rows, profiles = [], {}
    for batch in batches:
        m: Measured = measure(model, batch, PROMPT, NEW, rate)
        peers, tokens = {}, {}
        for how in sums if group else ["nccl"]:
            try:
                peers[f"by hand, {how}" if group
                      else "by hand"], tokens[how] = by_hand(model, batch, how, group)
            except RuntimeError as error:
                print(f"by hand, {how}: {str(error).splitlines()[0]}", flush=True)
        ours = model.generate([[1]] * batch, 8).tokens[0][1:]
        rows.append({"case": f"{shape}, {where}, batch {batch}", "unit": "ms/step",
                     "ours": round(m.step_ms, 4), "peers": {k: round(v, 4) for k, v in peers.items()},
                     "floor": round(m.floor_ms, 4), "token_ms": round(m.token_ms, 4),
                     "call_ms": round(m.call_ms, 4), "first_ms": round(m.first_ms, 2),
                     "bytes_per_second": round(rate / 1e12, 3),
                     "same_tokens": {how: sum(a == b for a, b in zip(ours, t)) for how, t in tokens.items()}})
        if runtime.rank == 0:
            print(json.dumps(rows[-1]), flush=True)
        if batch in (1, 128):
            profiles[f"{shape}, {where}, batch {batch}"] = profiled(model, batch, rate)
    return rows, profiles


def merge(path: Path, new: list[dict]) -> None:
    """The rows of a file, those of one case and card that were measured again replaced;
    above them, what all rows say of themselves."""
    old = json.loads(path.read_text())["rows"] if path.exists() else []
    keys = {(r["case"], r["hardware"]) for r in new}
    rows = [r for r in old if (r["case"], r["hardware"]) not in keys] + new
    path.parent.mkdir(parents=True, exist_ok=True)
    said = {key: of_all(rows, key) for key in ("hardware", "commit", "date")}
    path.write_text(json.dumps({**said, "versions": new[0]["versions"], "rows": rows}, indent=1) + "\n")


def draw() -> None:
    """ms a step over rows: a picture for each shape, mesh and card."""
    import matplotlib
    matplotlib.use("svg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"svg.hashsalt": "shardlib", "svg.fonttype": "none"})
    pictures: dict[str, list[dict]] = defaultdict(list)
    for r in json.loads((RESULTS / "decode.json").read_text())["rows"]:
        pictures[f"{r['case'].rpartition(', ')[0]}\n{r['hardware']}, {r['commit']}"].append(r)
    lines = -(-len(pictures) // 4)
    figure, axes = plt.subplots(lines, 4, figsize=(17.6, 4 * lines), squeeze=False)
    for picture in axes.flat[len(pictures):]:
        picture.axis("off")
    for picture, (title, rows) in zip(axes.flat, pictures.items()):
        names = [r["case"].rpartition(" ")[2] for r in rows]
        series = {"by hand, the fastest": [min(r["peers"].values()) for r in rows],
                  "shardlib": [r["ours"] for r in rows], "floor": [r["floor"] for r in rows]}
        for i, (color, (who, ms)) in enumerate(zip(("C0", "C3", "0.7"), series.items())):
            picture.bar([x + 0.27 * (i - 1) for x in range(len(rows))], ms, 0.25, color=color, label=who)
        picture.set_xticks(range(len(rows)), names)
        picture.set_title(title)
        picture.set_xlabel("rows")
    axes[0][0].set_ylabel("ms a step")
    axes[0][0].margins(y=0.4)
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(RESULTS / "decode.svg", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--draw", action="store_true", help="draw what is there, and end")
    parser.add_argument("--mesh", default="")
    parser.add_argument("--shapes", default="llama3-8b")
    parser.add_argument("--layouts", default="tp", help="tp, and of experts tp+ep: one by one, not by width")
    parser.add_argument("--layers", type=int, help="so many of each shape, where one GPU holds no more")
    parser.add_argument("--batch", default="1,8,32,128")
    parser.add_argument("--sums", default=",".join(SUMS))
    parser.add_argument("--out", type=Path, default=RESULTS.parent, help="where results/ and profiles/ are")
    options = parser.parse_args()
    if options.draw:
        draw()
        return
    mesh = Mesh.parse(options.mesh)
    with connect(mesh, "cuda") as runtime:
        rate = read_rate(runtime.device)
        facts = {"hardware": hardware(mesh.world_size), "versions": versions(),
                 "commit": commit(), "date": datetime.date.today().isoformat()}
        for shape, layout in product(options.shapes.split(","), options.layouts.split(",")):
            if options.layers:
                whole, shape = shape, f"{shape} of {options.layers} layers"
                SHAPES[shape] = replace(SHAPES[whole], num_layers=options.layers)
            rows, profiles = run(runtime, shape, layout, mesh, [int(b) for b in options.batch.split(",")],
                                 options.sums.split(","), rate)
            if runtime.rank == 0:
                merge(options.out / "results" / "decode.json", [{**r, **facts} for r in rows])
                merge(options.out / "profiles" / "decode.json",
                      [{"case": case, **facts, **found} for case, found in profiles.items()])
            gc.collect()
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
