"""What may be reduced, and the reduction itself: in rank order, in a wide dtype, rounded once.

>>> pieces = [torch.tensor([v], dtype=torch.bfloat16) for v in (256.0, 1.0, 1.0)]
>>> reduce_pieces(pieces, "sum")            # bf16 step by step would stay at 256
tensor([258.], dtype=torch.bfloat16)
>>> reduce_pieces([torch.tensor([1.0]), torch.tensor([float("nan")])], "max")
tensor([nan])

Integers wrap round at the width of their dtype. A float max carries NaN, which the MAX of gloo and of NCCL
drops. Refused with a `SpecError`, on every rank alike: a sum of bool, a max of complex or of uint64.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shardlib.errors import SpecError

_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)
_BOTH = {**{d: d for d in (*_INTEGERS, torch.float32, torch.float64)}, **{d: torch.float32 for d in _FLOAT8},
         torch.uint16: torch.int32, torch.uint32: torch.int64}
_SUM = {**_BOTH, torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.uint64: torch.int64,
        torch.complex64: torch.complex64, torch.complex128: torch.complex128}
_MAX = {**_BOTH, torch.float16: torch.float16, torch.bfloat16: torch.bfloat16, torch.bool: torch.bool}

WIDE = {"sum": _SUM, "max": _MAX}
"""op -> dtype -> the dtype in which it is reduced."""


def check_reducible(op: str, dtype: torch.dtype) -> None:
    """SpecError unless `op` is "sum" or "max" and means something for `dtype`."""
    if op not in WIDE:
        raise SpecError(f'a reduction is "sum" or "max", not {op!r}')
    if dtype not in WIDE[op]:
        raise SpecError(
            f"{op} of {str(dtype)[6:]} over ranks: not defined; convert it to another dtype first")


def reduce_pieces(pieces: Sequence[Tensor], op: str) -> Tensor:
    """The `op` of equal-shaped pieces, first to last, as a new tensor of their dtype."""
    first, *rest = pieces
    wide = WIDE[op][first.dtype]
    total = first.to(wide, copy=True)
    for piece in rest:
        if op == "sum":
            total += piece.to(wide)
        else:
            torch.maximum(total, piece.to(wide), out=total)
    return total.to(first.dtype)
