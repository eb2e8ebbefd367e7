"""Prompts on GPUs: ms until the first tokens of published Llama shapes, beside the same written by hand,
and the share of it that the matmuls' floor is.

    torchrun --nproc-per-node 2 benchmarks/prefill.py --mesh tp=2
    python benchmarks/prefill.py --shapes llama3-8b,llama3-70b:8

bf16. Each row of results/prefill.json: `ours` is the device's time of the program for the beginning of
prompts, as `generate` runs it (captured for few tokens, op by op for many), `peers` the hand-written program
(`plain_prefill.py`) in the same run; `floor` the matmuls alone, of the same sizes, by the library, one after
another; `share` what part of ours that is. `in one call`, `two halves` (of the rows, or of the tokens, where
sums are long), `two halves, split` (and each rank its own rows, or tokens, between sums): ms of each, and how
far what the last layer keeps is `apart` from that of one call. `first_ms`: the time to the first token as a
user of `generate` sees it. A shape followed by ":8" is of 8 layers. profiles/prefill.json: µs by kernel, of
one run.
"""
from __future__ import annotations

import argparse
import datetime
import gc
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from decode import merge
from plain_prefill import PlainPrefill
from record import RESULTS, commit, hardware, versions
from replayed import by_name, kernels_of
from torch import Tensor

from shardlib import Mesh
from shardlib.distributed.runtime import Runtime, connect
from shardlib.models import random_weights, ways
from shardlib.models.bench_generate import ms_of
from shardlib.models.decoder import CAPTURED_TOKENS, answered
from shardlib.models.decoding import Model
from shardlib.models.layouts import named_layout
from shardlib.run.captured import Graph

CASES = ((1, 4096), (8, 4096), (128, 128))
"""(rows, tokens of each)."""
ROUNDS, PROFILED = 5, (8, 4096)
HALVES = dict.fromkeys(("rows", "tokens"), {"cuda": 8 << 20})
WAYS = {"in one call": (dict.fromkeys(HALVES, {}), {}), "two halves": (HALVES, {}),
        "two halves, split": (HALVES, {"cuda": "BT"})}
"""As `shardlib.models.ways` has them, whatever it chooses."""


def model_of(shape: str, mesh: Mesh, runtime: Runtime) -> Model:
    """Of a shape's name, or of its first layers: "llama3-70b:8"."""
    name, _, layers = shape.partition(":")
    if layers:
        config = replace(random_weights.shape_of(name), num_layers=int(layers))
        random_weights.SHAPES[shape] = config
    return Model.random(shape, named_layout("tp", mesh), runtime).pack()


def matmul_ms(model: Model, tokens: int, rows: int) -> float:
    """Of a layer's matmuls, the library's, times the layers; and of the head for each row."""
    parts, device = dict(zip(model.weights.parts, model.weights.flat)), model.runtime.device
    names = ("wq|w.layers.wk|w.layers.wv", "wo", "gate|w.layers.up", "down")
    weights = [parts[f"w.layers.{name}"] for name in names]
    x = {w[0].shape[0]: torch.randn(tokens, w[0].shape[0], dtype=model.dtype, device=device) for w in weights}

    def multiply() -> None:
        for layers in weights:
            for w in layers:
                torch.mm(x[len(w)], w)
    head, last = parts.get("w.head", parts["w.embed"]), x[model.config.d_model][:rows]
    return median_ms(multiply, device) + median_ms(lambda: last @ head.mT, device)


def median_ms(call: Callable[[], object], device: torch.device) -> float:
    times = [ms_of(call, 1, device) for _ in range(ROUNDS + 2)][2:]
    return sorted(times)[ROUNDS // 2]


def prompts_of(model: Model, rows: int, length: int) -> list[list[int]]:
    return [[(7 * row + 3 * at + 1) % model.config.vocab_size for at in range(length)] for row in range(rows)]


def ours(model: Model, rows: int, length: int) -> tuple[dict[str, float], float, list[int], Callable]:
    """(ms by each way, that of `generate` as "ours"; ms to its first token; the first tokens; a call as it
    makes it)."""
    prompts, firsts, made = prompts_of(model, rows, length), [], None
    for _ in range(3):
        came, began = [], time.perf_counter()
        made = model.generate(prompts, 2, on_tokens=lambda _: came.append(time.perf_counter()))
        firsts.append((came[0] - began) * 1e3)
    decoder = model.decoder()
    with torch.inference_mode():
        ids = torch.tensor(prompts, device=model.runtime.device)
        last, start = ids.new_full((rows,), length - 1), ids.new_zeros(rows)
        slots = decoder.begin(prompts, 2, [])

        def call() -> None:
            answered(decoder._run(0, slots.size, decoder.capacity, ids, start, last))

        def replay() -> Callable[[], None]:
            """Captured, where `generate` does so."""
            few = ids.numel() <= CAPTURED_TOKENS
            return Graph(f"{rows} x {length}", call, model.runtime).replay if few else call
        chosen, times, caches = (ways.BESIDE_BYTES, ways.SPLITS), {}, {}
        try:
            for name, way in {**WAYS, "ours": chosen}.items():
                ways.BESIDE_BYTES, ways.SPLITS = way
                decoder.ways.made.clear()
                run = replay()
                run()
                caches[name] = [x.clone() for x in decoder._views(slots.size, decoder.capacity).values()]
                times[name] = round(median_ms(run, model.runtime.device), 3)
                times[f"{name}, apart"] = max(map(apart, caches[name], caches["in one call"]))
        finally:
            ways.BESIDE_BYTES, ways.SPLITS = chosen
    return times, min(firsts), [t[length] for t in made.tokens], run


def apart(x: Tensor, y: Tensor) -> float:
    """Of the last layer."""
    return float(f"{((x[-1].float() - y[-1].float()).norm() / y[-1].float().norm()).item():.2e}")


def run(runtime: Runtime, shape: str, mesh: Mesh, cases: list[tuple[int, int]],
        alone: bool = False) -> tuple[list[dict], dict]:
    model, device = model_of(shape, mesh, runtime), runtime.device
    nccl = mesh.world_size > 1 and not alone
    group = dist.new_group(list(range(mesh.world_size)), backend="nccl") if nccl else None
    rows_, profiles = [], {}
    for rows, length in cases:
        title = f"{shape}, tp={mesh.world_size}, {rows} x {length}"
        times, first, tokens, call = ours(model, rows, length)
        ours_ms = times.pop("ours")
        with torch.inference_mode():
            if (rows, length) == PROFILED or len(cases) == 1:
                profiles[title] = {"us_launches_own": by_name(kernels_of(call, 2))}
            floor = matmul_ms(model, rows * length, rows)
            peers, more = {}, {}
            if not alone:
                plain = PlainPrefill(model, rows, length, group)
                plain.prompts.copy_(torch.tensor(prompts_of(model, rows, length)))
                more = {"same_tokens": sum(a == b for a, b in zip(tokens, plain.run().tolist()))}
                peers = {"by hand": round(median_ms(plain.run, device), 3)}
                del plain
        rows_.append({"case": title, "unit": "ms", "ours": ours_ms, "peers": peers,
                      "floor": round(floor, 3), "share": round(floor / ours_ms, 3), **times,
                      "first_ms": round(first, 2), "rows": rows, **more})
        if runtime.rank == 0:
            print(json.dumps(rows_[-1]), flush=True)
        torch.cuda.empty_cache()
    return rows_, profiles


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--mesh", default="")
    parser.add_argument("--shapes", default="llama3-8b")
    parser.add_argument("--cases", default=",".join(f"{rows}x{length}" for rows, length in CASES))
    parser.add_argument("--alone", action="store_true", help="without the hand-written program")
    parser.add_argument("--out", type=Path, default=RESULTS.parent, help="where results/ and profiles/ are")
    options = parser.parse_args()
    mesh = Mesh.parse(options.mesh)
    cases = [tuple(map(int, text.split("x"))) for text in options.cases.split(",")]
    with connect(mesh, "cuda") as runtime:
        facts = {"hardware": hardware(mesh.world_size), "versions": versions(),
                 "commit": commit(), "date": datetime.date.today().isoformat()}
        for shape in options.shapes.split(","):
            rows, profiles = run(runtime, shape, mesh, cases, options.alone)
            if runtime.rank == 0:
                merge(options.out / "results" / "prefill.json", [{**r, **facts} for r in rows])
                merge(options.out / "profiles" / "prefill.json",
                      [{"case": case, **facts, **found} for case, found in profiles.items()])
            gc.collect()
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
