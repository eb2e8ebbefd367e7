"""Random weights of published shapes, drawn where they lie, so that anyone can measure without a download.

>>> shape_of("llama3-8b").d_ff
14336
>>> shape_of("llama4")
Traceback (most recent call last):
    ...
shardlib.errors.SpecError: no shape llama4; there are llama3-1b, llama3-8b, llama3-70b, mixtral-8x7b

Each rank draws what it holds with its device's own generator, seeded by the leaf and by where its piece
begins: replicas are equal, and seconds suffice. They are other numbers on other meshes and devices;
`shardlib.init` draws the same everywhere, slowly.
"""
from __future__ import annotations

import zlib
from collections.abc import Mapping

import torch
from torch import Tensor

from shardlib.errors import SpecError
from shardlib.mesh import Mesh
from shardlib.models.llama import LlamaConfig, RopeScaling
from shardlib.models.mixtral import MixtralConfig
from shardlib.spec import Spec


def _shape(d_model: int, num_layers: int, queries_per_kv: int, head_dim: int, d_ff: int,
           scaling: RopeScaling | None, tied: bool, context: int) -> LlamaConfig:
    return LlamaConfig(vocab_size=128256, d_model=d_model, num_layers=num_layers, num_kv_heads=8,
                       queries_per_kv=queries_per_kv, head_dim=head_dim, d_ff=d_ff, norm_eps=1e-5,
                       rope_theta=5e5, rope_scaling=scaling, tied=tied, max_context=context)


SHAPES = {
    "llama3-1b": _shape(2048, 16, 4, 64, 8192, RopeScaling(32.0, 1.0, 4.0, 8192), True, 131072),  # Llama 3.2
    "llama3-8b": _shape(4096, 32, 4, 128, 14336, None, False, 8192),
    "llama3-70b": _shape(8192, 80, 8, 128, 28672, None, False, 8192),
    "mixtral-8x7b": MixtralConfig(vocab_size=32000, d_model=4096, num_layers=32, num_kv_heads=8,
                                  queries_per_kv=4, head_dim=128, d_ff=14336, norm_eps=1e-5, rope_theta=1e6,
                                  rope_scaling=None, tied=False, max_context=32768, num_experts=8, top_k=2),
}


def shape_of(name: str) -> LlamaConfig:
    """The config of a published model, with or without "random:" before its name."""
    found = SHAPES.get(name.removeprefix("random:"))
    if found is None:
        raise SpecError(f"no shape {name.removeprefix('random:')}; there are {', '.join(SHAPES)}")
    return found


def random_weights(config: LlamaConfig, types: Mapping[str, Spec], mesh: Mesh, coordinate: Mapping[str, int],
                   dtype: torch.dtype, device: torch.device, seed: int = 0) -> dict[str, Tensor]:
    """What `coordinate` holds of each leaf of `types`: norms of 1,
    else normal numbers that keep an activation's size."""
    made = {}
    for path, kind in types.items():
        shape, labels = mesh.local_shape(kind, config.sizes, coordinate), kind.labels
        leaf = made[path] = torch.empty(shape, dtype=dtype, device=device)
        if labels in (("D",), ("L", "D")):
            leaf.fill_(1)
            continue
        inner = [n for n in labels if n not in ("L", "E")] if labels[-1] != "X" else ["D"]
        summed = ("D",) if labels[0] == "V" or inner[0] == "D" else inner[:-1]
        fan = torch.Size(config.sizes[n] for n in summed).numel()
        begins = [mesh.rows(dim, config.sizes, coordinate)[0] for dim in kind.dims]
        generator = torch.Generator(device).manual_seed(zlib.crc32(f"{seed} {path} {begins}".encode()))
        leaf.normal_(0, fan ** -0.5, generator=generator)
    return made
