"""A small Llama that decodes: what it gives, and by which collectives."""
from __future__ import annotations

from collections import Counter
from typing import Any

import llama_reference as reference
import torch
from simulated import execute, tree
from torch import Tensor

from shardlib import Mesh
from shardlib.language.scan import SCAN
from shardlib.models.causal import Cache
from shardlib.models.llama import LlamaConfig
from shardlib.params import init, leaf_values
from shardlib.placement import shard_of
from shardlib.program import Program


def config(layers: int) -> LlamaConfig:
    return LlamaConfig(vocab_size=11, d_model=18, num_layers=layers, num_kv_heads=3, queries_per_kv=2,
                       head_dim=4, d_ff=7, norm_eps=1e-5, rope_theta=1e4, rope_scaling=None, tied=False,
                       max_context=64)


def decoded(program: Program, mesh: Mesh, of: LlamaConfig) -> list[Tensor]:
    """The logits and the cache after prompts of unequal lengths."""
    weights = reference.random_weights(of, 0)
    if not of.num_layers:
        weights = {path: w[:0] if path.startswith("layers") else w for path, w in weights.items()}
    sizes = dict(of.sizes, B=4, T=5, S=6)
    cache = init(Cache, sizes, path="cache")
    whole: dict[str, Any] = {"ids": torch.arange(20).view(4, 5) % 11,
                             "start": torch.zeros(4, dtype=torch.int64), "last": torch.tensor([4, 0, 2, 3]),
                             **dict(leaf_values(tree(weights, of), "w")), **dict(leaf_values(cache, "cache"))}
    placed = [{path: shard_of(whole[path], spec, mesh, c) for path, spec in program.arg_leaves()}
              for c in mesh.coordinates()]
    return execute(program, mesh, placed, sizes).results


def collectives(program: Program, layers: int) -> Counter[str]:
    """How often each is made in one run."""
    made: Counter[str] = Counter()
    for step in program.steps:
        if step.op.moves and step.op.wire:
            made[step.op.name] += 1
        for body in step.bodies:
            for name, count in collectives(body, layers).items():
                made[name] += (layers if step.op is SCAN else 1) * count
    return made
