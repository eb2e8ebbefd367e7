"""Mixtral checkpoints: what Hugging Face folders call each weight, and how they store it.

Experts are either stored apart, each matrix of each expert a tensor of its own, or fused, all experts of a
layer in one, with gate and up side by side. Either way a rank reads the bytes of its own experts.
"""
from __future__ import annotations

from collections.abc import Collection

from shardlib.models.files.weights import Weight
from shardlib.models.llama_weights import LLAMA
from shardlib.models.mixtral import MixtralConfig

APART, FUSED = "model.layers.{L}.block_sparse_moe.", "model.layers.{L}.mlp."
EXPERT = APART + "experts.{E}."


def weights_of(config: MixtralConfig, names: Collection[str]) -> tuple[Weight, ...]:
    """The table of weights of a folder that has tensors of these `names`."""
    table = [Weight(row.path, row.spec, row.huggingface, row.stored) for row in LLAMA
             if row.path not in ("layers.gate", "layers.up", "layers.down")]
    if config.tied:
        head, embed = (next(w for w in table if w.path == path) for path in ("head", "embed"))
        table[table.index(head)] = Weight("head", head.spec, embed.name, head.stored)
    return (*table, *(_fused() if FUSED.format(L=0) + "gate.weight" in names else _apart()))


def _apart() -> list[Weight]:
    return [Weight("layers.router", "L D X",   APART + "gate.weight", "X D"),
            Weight("layers.gate",   "L E D F", EXPERT + "w1.weight", "F D"),
            Weight("layers.up",     "L E D F", EXPERT + "w3.weight", "F D"),
            Weight("layers.down",   "L E F D", EXPERT + "w2.weight", "D F")]


def _fused() -> list[Weight]:
    both = FUSED + "experts.gate_up_proj"
    return [Weight("layers.router", "L D X",   FUSED + "gate.weight", "X D"),
            Weight("layers.gate",   "L E D F", both, "E (two F) D", at=("two", 0, 2)),
            Weight("layers.up",     "L E D F", both, "E (two F) D", at=("two", 1, 2)),
            Weight("layers.down",   "L E F D", FUSED + "experts.down_proj", "E D F")]
