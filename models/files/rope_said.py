"""What a config says of its rotary embedding: the base, and the scaling for longer contexts as `rope_table`
has it.

>>> said = {"rope_theta": 5e5, "rope_type": "linear", "factor": 4.0}
>>> rope_of(Said({"rope_parameters": said}, "config.json"))
(500000.0, ('linear', 4.0))

Other kinds, as longrope, are refused.

`rope_scaling` and `rope_theta` are of transformers 4, `rope_parameters` of 5.
"""
from __future__ import annotations

import math
from typing import Any

from shardlib.models.files.said import Said

Scaling = tuple[Any, ...] | None


def rope_of(said: Said, partial: bool = False) -> tuple[float, Scaling]:
    """Base and scaling. partial: a model that may turn some elements of a head alone, see `turned`."""
    rope = set_of(said)
    rope.only("rope_type", "default", "linear", "dynamic", "yarn", "llama3")
    if not partial:
        rope.only("partial_rotary_factor", 1, default=1)
    return rope.number("rope_theta"), _scaling(rope)


def turned(said: Said, head_dim: int) -> int:
    """How many elements of a head are turned, the first ones."""
    rope = set_of(said)
    factor = rope.number("partial_rotary_factor", default=1.0)
    part = int(head_dim * factor)
    if factor > 1 or not part or part % 2:
        raise rope.error(f"partial_rotary_factor is {factor}, {part} of {head_dim} elements of a head; "
                         "some are turned, in pairs, or all")
    return part


def set_of(said: Said) -> Said:
    """The fields of a rotary embedding that is one for all layers."""
    found = said.fields.get("rope_scaling") or said.fields.get("rope_parameters") or {}
    if not isinstance(found, dict) or any(isinstance(value, dict) for value in found.values()):
        raise said.error(
            "its rotary embedding is not one set of numbers for all layers, which is not implemented")
    length, context = (said.fields.get(n) for n in ("original_max_position_embeddings",
                                                    "max_position_embeddings"))
    before = {"rope_theta": said.fields.get("rope_theta", 10000.0), "rope_type": found.get("type", "default"),
              "partial_rotary_factor": said.fields.get("partial_rotary_factor"),
              "original_max_position_embeddings": context}
    after = {"max_position_embeddings": context}
    after |= {} if length is None else {"original_max_position_embeddings": length}
    return Said({**before, **found, **after}, said.where)


def _scaling(rope: Said) -> Scaling:
    kind = rope.fields["rope_type"]
    if kind == "default":
        return None
    if kind == "linear":
        return kind, rope.number("factor")
    if kind == "dynamic":
        return kind, rope.number("factor"), rope.size("max_position_embeddings")
    context = rope.size("original_max_position_embeddings")
    if kind == "llama3":
        return (*(rope.number(n) for n in ("factor", "low_freq_factor", "high_freq_factor")), context)
    rope.only("truncate", True, default=True)
    if rope.number("rope_theta") == 1:
        raise rope.error("rope_theta is 1, of which yarn has no logarithm to divide by")
    fast, slow = rope.number("beta_fast", default=32.0), rope.number("beta_slow", default=1.0)
    return kind, yarn_factor(rope), context, fast, slow, _yarn_attention(rope)


def yarn_factor(rope: Said) -> float:
    return rope.number("factor", default=None) or (
        rope.size("max_position_embeddings") / rope.size("original_max_position_embeddings"))


def yarn_mscale(factor: float, weight: float = 1.0) -> float:
    """How much larger what is turned becomes for a context `factor` times as long (Peng et al. 2023)."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _yarn_attention(rope: Said) -> float:
    said, factor = rope.number("attention_factor", default=None), yarn_factor(rope)
    if said is not None:
        return said
    above, below = (rope.fields.get(n) and rope.number(n) for n in ("mscale", "mscale_all_dim"))
    return yarn_mscale(factor, above) / yarn_mscale(factor, below) if above and below else yarn_mscale(factor)
