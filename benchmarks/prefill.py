"""Prompts on GPUs: ms until the first tokens of published Llama shapes, beside the same written by hand,
and the share of it that the matmuls' floor is.

    torchrun --nproc-per-node 2 benchmarks/prefill.py --mesh tp=2
    python benchmarks/prefill.py --shapes llama3-8b,llama3-70b:8

bf16. Each row of results/prefill.json: `ours` is the device's time of the program for the beginning of
prompts, as `generate` runs it (captured for few tokens, op by op for many), `peers` the hand-written program
(`plain_prefill.py`) in the same run; `floor` the matmuls alone, of the same sizes, by the library, one after
another; `share` what part of ours that is; `in one call` ours where rows that run as two halves, the sums
of one beside the other's work, are not halved; `first_ms` the time to the first token as a user of `generate`
sees it. A shape followed by ":8" is of 8 layers. profiles/prefill.json: µs by kernel, of one run.
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

from shardlib import Mesh
from shardlib.distributed.runtime import Runtime, connect
from shardlib.models import decoder as decoders
from shardlib.models import random_weights
from shardlib.models.bench_generate import ms_of
from shardlib.models.decoder import CAPTURED_TOKENS
from shardlib.models.decoding import Model
from shardlib.models.layouts import named_layout
from shardlib.run.captured import Graph

CASES = ((1, 4096), (8, 4096), (128, 128))
"""(rows, tokens of each)."""
ROUNDS, PROFILED = 5, (8, 4096)


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


def ours(model: Model, rows: int, length: int) -> tuple[str, dict[str, float], float, list[int], Callable]:
    """(the way of `generate`, ms by each way, ms to its first token, the first tokens, a call op by op)."""
    prompts, firsts, made = prompts_of(model, rows, length), [], None
    for _ in range(4):
        came, began = [], time.perf_counter()
        made = model.generate(prompts, 2, on_tokens=lambda _: came.append(time.perf_counter()))
        firsts.append((came[0] - began) * 1e3)
    decoder = model.decoder()
    with torch.inference_mode():
        ids = torch.tensor(prompts, device=model.runtime.device)
        last, start = ids.new_full((rows,), length - 1), ids.new_zeros(rows)
        slots = decoder.begin(prompts, 2, [])

        def call() -> None:
            decoder._run(True, slots.size, decoder.capacity, ids, start, last)
        ways = {"op by op": call, "captured": Graph(f"{rows} x {length}", call, model.runtime).replay}
        times = {name: round(median_ms(way, model.runtime.device), 3) for name, way in ways.items()}
        if decoder._parts(True, slots.size, decoder.capacity, length) > 1:
            times["in one call"] = round(in_one_call(call, model.runtime.device), 3)
    chosen = "captured" if ids.numel() <= CAPTURED_TOKENS else "op by op"
    return chosen, times, sorted(firsts[1:])[1], [tokens[length] for tokens in made.tokens], call


def in_one_call(call: Callable[[], object], device: torch.device) -> float:
    """Its ms where the rows are not halved."""
    worth = decoders.BESIDE_BYTES.pop(device.type)
    try:
        return median_ms(call, device)
    finally:
        decoders.BESIDE_BYTES[device.type] = worth


def run(runtime: Runtime, shape: str, mesh: Mesh, cases: list[tuple[int, int]]) -> tuple[list[dict], dict]:
    model, device = model_of(shape, mesh, runtime), runtime.device
    group = dist.new_group(list(range(mesh.world_size)), backend="nccl") if mesh.world_size > 1 else None
    rows_, profiles = [], {}
    for rows, length in cases:
        title = f"{shape}, tp={mesh.world_size}, {rows} x {length}"
        way, times, first, tokens, call = ours(model, rows, length)
        with torch.inference_mode():
            if (rows, length) == PROFILED or len(cases) == 1:
                profiles[title] = {"us_launches_own": by_name(kernels_of(call, 2))}
            plain = PlainPrefill(model, rows, length, group)
            plain.prompts.copy_(torch.tensor(prompts_of(model, rows, length)))
            theirs = plain.run().tolist()
            by_hand = median_ms(plain.run, device)
            del plain
            floor = matmul_ms(model, rows * length, rows)
        rows_.append({"case": title, "unit": "ms", "ours": times[way],
                      "peers": {"by hand": round(by_hand, 3)}, "floor": round(floor, 3),
                      "share": round(floor / times[way], 3), **times, "first_ms": round(first, 2),
                      "rows": rows, "same_tokens": sum(a == b for a, b in zip(tokens, theirs))})
        if runtime.rank == 0:
            print(json.dumps(rows_[-1]), flush=True)
        torch.cuda.empty_cache()
    return rows_, profiles


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--mesh", default="")
    parser.add_argument("--shapes", default="llama3-8b")
    parser.add_argument("--cases", default=",".join(f"{rows}x{length}" for rows, length in CASES))
    parser.add_argument("--out", type=Path, default=RESULTS.parent, help="where results/ and profiles/ are")
    options = parser.parse_args()
    mesh = Mesh.parse(options.mesh)
    cases = [tuple(map(int, text.split("x"))) for text in options.cases.split(",")]
    with connect(mesh, "cuda") as runtime:
        facts = {"hardware": hardware(mesh.world_size), "versions": versions(),
                 "commit": commit(), "date": datetime.date.today().isoformat()}
        for shape in options.shapes.split(","):
            rows, profiles = run(runtime, shape, mesh, cases)
            if runtime.rank == 0:
                merge(options.out / "results" / "prefill.json", [{**r, **facts} for r in rows])
                merge(options.out / "profiles" / "prefill.json",
                      [{"case": case, **facts, **found} for case, found in profiles.items()])
            gc.collect()
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
