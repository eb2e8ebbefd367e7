"""One rank of test_fused: logits by kernels beside those of the bodies and of float32, token by token;
and the bits of the same kernels in a graph, where each starts before the one before it has ended.

    torchrun --nproc-per-node 2 tests/gpu/fused_worker.py tp=2 bfloat16

All three read the same tokens, so that one that is chosen otherwise changes nothing after it.
"""
from __future__ import annotations

import os
import sys
from typing import Any

import torch
from torch import Tensor

from shardlib import Mesh, compile
from shardlib.compiler.passes import DEFAULT
from shardlib.distributed.runtime import Runtime, connect
from shardlib.models.causal import Cache, KeyValue
from shardlib.models.decoding import PASSES, weight_types, weights_of
from shardlib.models.layouts import named_layout
from shardlib.models.llama import LlamaConfig, next_logits
from shardlib.models.random_weights import random_weights

CONFIG = LlamaConfig(vocab_size=1536, d_model=1536, num_layers=4, num_kv_heads=12, queries_per_kv=2,
                     head_dim=64, d_ff=3072, norm_eps=1e-5, rope_theta=1e4, rope_scaling=None, tied=False,
                     max_context=512)
SLOTS, STEPS = 320, 12
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"       # cpu: a rehearsal
STARTS = [0, 1, 255, 257, SLOTS - STEPS, 100, 31, 64]


def logits(runtime: Runtime, drawn: dict[str, Tensor], dtype: torch.dtype, passes: Any,
           rows: int, graph: bool = False) -> tuple[Tensor, list[str]]:
    """(STEPS, rows, V) in float32, and what was said of kernels. graph: replayed."""
    mesh, layout = runtime.mesh, named_layout("tp", runtime.mesh)
    step = compile(next_logits, layout, runtime=runtime, donate=("cache",), passes=passes, config=CONFIG,
                   sizes={**CONFIG.sizes, "S": SLOTS}, graph=graph)
    step.lower(None, weights_of(CONFIG))
    leaves = {f"w{path}" if path.startswith(".") else f"w.{path}": w.to(dtype) for path, w in drawn.items()}
    weights = step.prepare("w", leaves, weights_of(CONFIG))
    shape = (CONFIG.num_layers, rows, SLOTS, CONFIG.num_kv_heads // mesh.size(("tp",)), CONFIG.head_dim)
    g = torch.Generator(runtime.device).manual_seed(runtime.rank)
    k, v = (torch.randn(shape, generator=g, device=runtime.device).bfloat16().to(dtype) for _ in range(2))
    cache = step.prepare("cache", Cache(layers=KeyValue(k=k, v=v)))
    start = torch.tensor([STARTS[row % len(STARTS)] for row in range(rows)], device=runtime.device)
    ids = torch.arange(STEPS * rows, device=runtime.device).view(STEPS, rows, 1) * 7 % CONFIG.vocab_size
    made = []
    with torch.inference_mode():
        for i in range(STEPS):
            out, cache = step(ids[i], weights, cache, start + i, torch.zeros_like(start))
            made.append(out.float())
    step.check()
    return torch.stack(made), step.kernels.answers


def main(mesh: str, dtype: str) -> None:
    kind, at = getattr(torch, dtype), Mesh.parse(mesh)
    with connect(at, DEVICE) as runtime:
        drawn = random_weights(CONFIG, weight_types(CONFIG, named_layout("tp", at), at), at,
                               runtime.coordinate, kind, runtime.device)
        for rows in (1, 3, 8, 32, 40):
            wide, _ = logits(runtime, drawn, torch.float32, DEFAULT, rows)
            os.environ["SHARDLIB_REFERENCE"] = "1"
            bodies, _ = logits(runtime, drawn, kind, PASSES, rows)
            os.environ["SHARDLIB_REFERENCE"] = "0"
            fused, answers = logits(runtime, drawn, kind, PASSES, rows)
            replayed, _ = logits(runtime, drawn, kind, PASSES, rows, graph=DEVICE == "cuda")
            assert torch.equal(replayed, fused), (rows, (replayed - fused).abs().max())
            theirs, ours = ((x - wide).abs().amax((0, 2)) for x in (bodies, fused))
            assert torch.isfinite(fused).all() and (ours <= 2 * theirs.max()).all(), (rows, ours, theirs)
            best = wide.topk(2, -1)
            clear = best.values[..., 0] - best.values[..., 1] > 2 * (ours.max() + theirs.max())
            assert (fused.argmax(-1) == best.indices[..., 0])[clear].all() and clear.any(), rows
            by = sorted({a.partition(" at ")[0].partition(":")[0] for a in answers if "by a kernel" in a})
            if runtime.rank == 0:
                part = float(ours.max() / theirs.max())
                print(f"logits {mesh} {dtype} {rows} rows: {part:.2f} of the bodies' error; "
                      f"by kernels {'; '.join(by)}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
