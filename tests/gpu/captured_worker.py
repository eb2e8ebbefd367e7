"""One rank of test_captured: what is replayed equals what runs eagerly,
bit for bit where the kernels are the same.

    torchrun --nproc-per-node 2 tests/gpu/captured_worker.py tokens tp=2 bfloat16
    # or: calls tp=2, stragglers tp=2, silent tp=2
"""
from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from shardlib import Layout, Mesh, Params, compile, einsum, param, sharded, value_and_grad
from shardlib.distributed.runtime import Runtime, connect
from shardlib.functions import silu, sum
from shardlib.models import decoder, row_groups
from shardlib.models.decoding import Model, Sampling
from shardlib.models.layouts import named_layout
from shardlib.models.llama import LlamaConfig
from shardlib.models.mixtral import MixtralConfig
from shardlib.models.random_weights import SHAPES

SHAPES["small"] = LlamaConfig(vocab_size=384, d_model=128, num_layers=3, num_kv_heads=4, queries_per_kv=2,
                              head_dim=32, d_ff=256, norm_eps=1e-5, rope_theta=1e4, rope_scaling=None,
                              tied=False, max_context=128)
SHAPES["experts"] = MixtralConfig(vocab_size=384, d_model=128, num_layers=3, num_kv_heads=4, queries_per_kv=2,
                                  head_dim=32, d_ff=256, norm_eps=1e-5, rope_theta=1e4, rope_scaling=None,
                                  tied=False, max_context=128, num_experts=8, top_k=2)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"       # cpu: a rehearsal
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11], [12] * 20, [13, 14]]
ENDS = (7, 100, 200, 300, 350)
row_groups.WORTH_MOVING = row_groups.WORTH_CAPTURING = 2


class Eager:
    """In place of `Graph`: a replay is the call itself, on the same buffers, by the same kernels."""

    def __init__(self, title: str, call: Callable[[], None], runtime: Runtime) -> None:
        self.replay = call
        call()


def tokens(runtime: Runtime, layout: Layout, dtype: torch.dtype, shape: str = "small") -> None:
    model, captured = Model.random(shape, layout, runtime, dtype).pack(), decoder.Graph
    twin = Model(model.config, model.weights, layout, runtime, dtype)
    for sampling in (Sampling(), Sampling(0.9, 0.95, 5)):
        for ends in ((), ENDS):
            for prompts in (PROMPTS, PROMPTS[:1], PROMPTS[:3], PROMPTS * 7):
                # captures, then only replays
                made = [model.generate(prompts, 40, ends, sampling, graph=True).tokens for _ in range(2)]
                decoder.Graph = Eager
                wanted = twin.generate(prompts, 40, ends, sampling, graph=True).tokens
                decoder.Graph = captured
                assert made == [wanted] * 2, (sampling, ends, len(prompts))
                if dtype == torch.float32:
                    assert twin.generate(prompts, 40, ends, sampling, graph=False).tokens == wanted, (
                        sampling, ends, len(prompts))


def experts(runtime: Runtime, layout: Layout, dtype: torch.dtype) -> None:
    """The same of a Mixtral; experts by their width, and one by one."""
    for name in ("tp", "tp+ep"):
        tokens(runtime, named_layout(name, runtime.mesh), dtype, "experts")


class Weights(Params):
    up: Tensor = param("D F")
    down: Tensor = param("F D")


@sharded("B D, * -> B D")
def layer(x, w: Weights):
    return x + einsum("B F, F D -> B D", silu(einsum("B D, D F -> B F", x, w.up)), w.down)


@sharded("B D, * -> ()")
def total(x, w: Weights):
    return sum("B D -> ()", layer(x, w))


def calls(runtime: Runtime, layout: Layout, dtype: torch.dtype) -> None:
    """Replays of several graphs and eager calls in a random order,
    their results looked at afterwards; gradients too."""
    draw, n = random.Random(3), runtime.mesh.world_size
    weights = [Weights(up=torch.randn(64, 256 // n, device=runtime.device, dtype=dtype),
                       down=torch.randn(256 // n, 64, device=runtime.device, dtype=dtype))
               for _ in range(2)]
    for function in (layer, value_and_grad(total)):
        step, eager = (compile(function, layout, runtime=runtime, sizes=dict(F=256), graph=graph)
                       for graph in (True, False))
        kept: list[tuple[Any, Any]] = []
        for _ in range(300):
            x, w = torch.full((draw.choice((1, 8, 32)), 64), draw.random(), device=runtime.device,
                              dtype=dtype), draw.choice(weights)
            pair = [step(x, w), eager(x, w)] if draw.random() < 0.5 else [eager(x, w), step(x, w)][::-1]
            x.zero_()
            kept.append(tuple(pair))
        for made, wanted in kept:
            made, wanted = ([v] if isinstance(v, Tensor) else [v[0], v[1].up, v[1].down]
                            for v in (made, wanted))
            assert all(torch.equal(a, b) for a, b in zip(made, wanted)), function.__name__


def stragglers(runtime: Runtime, layout: Layout, dtype: torch.dtype) -> None:
    """Ranks that are late, each at its own times, on the host and on the device."""
    model, draw = Model.random("small", layout, runtime, dtype).pack(), random.Random(runtime.rank)
    wanted = model.generate(PROMPTS, 100, graph=True).tokens

    def late(_: object) -> None:
        if draw.random() < 0.05:
            time.sleep(draw.random() / 100)
        elif draw.random() < 0.1:
            torch.cuda._sleep(draw.randrange(10_000_000))
    for _ in range(10):
        assert model.generate(PROMPTS, 100, on_tokens=late, graph=True).tokens == wanted


def silent(runtime: Runtime, layout: Layout, dtype: torch.dtype) -> None:
    """The last rank stops in the middle of a generation."""
    model = Model.random("small", layout, runtime, dtype).pack()
    model.generate(PROMPTS, 40)
    seen: list[int] = []
    model.generate(PROMPTS, 40, on_tokens=lambda _: (
        seen.append(1), time.sleep(3600 if len(seen) == 5 and runtime.rank == 1 else 0)))


if __name__ == "__main__":
    what, mesh = sys.argv[1], Mesh.parse(sys.argv[2])
    chosen = getattr(torch, sys.argv[3]) if len(sys.argv) > 3 else torch.float32
    with connect(mesh, DEVICE, timeout_s=10.0 if what == "silent" else None) as runtime:
        torch.backends.cuda.matmul.allow_tf32 = False
        {"tokens": tokens, "experts": experts, "calls": calls, "stragglers": stragglers,
         "silent": silent}[what](runtime, named_layout("tp", mesh), chosen)
        if runtime.rank == 0:
            print(f"{' '.join(sys.argv[1:])}: equal", flush=True)
