"""How fast pairs turn: theta^(-2i/H) radians a position, or as a `scaling` for longer contexts has it.

| scaling | |
|---|---|
| `("linear", factor)` | all `factor` times slower (Chen et al. 2023) |
| `("dynamic", factor, context)` | theta grows with a row's length beyond `context` (NTK-aware) |
| `("yarn", factor, context, fast, slow, attention)` | by turns in a context: fewer than `slow`, `factor` |
| | times slower; more than `fast`, as they were; the table times `attention` (Peng et al. 2023) |
| `(factor, low, high, context)` | Llama 3: fewer than `low`, `factor` times slower; more than `high` not |
"""
from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from shardlib.program import number

_NUMBERS = {"linear": 1, "dynamic": 2, "yarn": 5}
Scaling = tuple[Any, ...] | None


def is_scaling(value: object) -> bool:
    """Whether it is a scaling: None, four numbers, or a name and its numbers."""
    if value is None:
        return True
    if not isinstance(value, tuple) or not value:
        return False
    name, numbers = (value[0], value[1:]) if isinstance(value[0], str) else ("", value)
    return len(numbers) == ({"": 4} | _NUMBERS).get(name) and all(map(number, numbers))


def named(scaling: Scaling) -> tuple[str, tuple[float, ...]]:
    """Its name, and its numbers."""
    if scaling is None:
        return "", ()
    return (scaling[0], scaling[1:]) if isinstance(scaling[0], str) else ("llama3", scaling)


def amplitude(scaling: Scaling) -> float:
    """What cosines and sines are multiplied by."""
    name, numbers = named(scaling)
    return numbers[4] if name == "yarn" else 1.0


def frequencies(head_dim: int, theta: float, scaling: Scaling) -> Tensor:
    """Radians per position of each pair, float32; of `dynamic` those within its context."""
    inv = 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64, device="cpu").float() / head_dim))
    name, numbers = named(scaling)
    if name == "linear":
        return inv / numbers[0]
    if name == "yarn":
        return _yarn(inv, head_dim, theta, *numbers[:4])
    return _llama3(inv, *numbers) if name == "llama3" else inv


def _llama3(inv: Tensor, factor: float, low: float, high: float, context: float) -> Tensor:
    wavelength = 2 * math.pi / inv
    smooth = (context / wavelength - low) / (high - low)
    blended = (1 - smooth) * inv / factor + smooth * inv
    slow = torch.where(wavelength > context / low, inv / factor, inv)
    middle = ~(wavelength < context / high) & ~(wavelength > context / low)
    return torch.where(middle, blended, slow)


def _yarn(inv: Tensor, head_dim: int, theta: float, factor: float, context: float, fast: float,
          slow: float) -> Tensor:
    """Between the pair that turns `fast` times in a context and the one that turns `slow` times, blended."""
    def pair(turns: float) -> float:
        return head_dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))
    low, high = max(math.floor(pair(fast)), 0), min(math.ceil(pair(slow)), head_dim - 1)
    ramp = ((torch.arange(len(inv), device="cpu").float() - low) / max(high - low, 1e-3)).clamp(0, 1)
    return inv / factor * ramp + inv * (1 - ramp)


def dynamic_frequencies(start: Tensor, length: int, head_dim: int, theta: float, factor: float,
                        context: float) -> Tensor:
    """(b, 1, pairs): radians per position where row b is start[b] + length long."""
    longer = (start + length).clamp(min=int(context)).float() / context
    base = theta * (factor * longer - (factor - 1)) ** (head_dim / max(1, head_dim - 2))
    pair = torch.arange(0, head_dim, 2, device=start.device).float() / head_dim
    return base[:, None, None] ** -pair
