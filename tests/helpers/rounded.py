"""What Triton's interpreter lacks of a GPU's rounding: bfloat16 that is rounded to nearest and goes through
products as numbers, and multiply and add with one rounding."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter

_BUILDER, _HANDLE = interpreter.InterpreterBuilder, interpreter.TensorHandle


def _is_bf16(x: Any) -> bool:
    return x.dtype.scalar == tl.bfloat16


def _wide(x: Any) -> Any:
    """In float32, where it is bfloat16."""
    if not _is_bf16(x):
        return x
    return _HANDLE((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


@contextmanager
def rounded() -> Iterator[None]:
    dot, cast = _BUILDER.create_dot, _BUILDER.cast_impl

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, _wide(a), _wide(b), *rest)

    def cast_impl(self: Any, x: Any, to: Any) -> Any:
        if to.scalar == tl.bfloat16 and x.dtype.scalar == tl.float32:
            bits = torch.from_numpy(np.array(x.data, dtype=np.float32)).bfloat16().view(torch.int16)
            return _HANDLE(bits.numpy().view(np.uint16), tl.bfloat16)
        return cast(self, x, to)

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        exact = x.data.astype(np.float64) * y.data + z.data
        return _HANDLE(exact.astype(x.data.dtype), z.dtype.scalar)
    with pytest.MonkeyPatch.context() as patch:
        for made in (create_dot, cast_impl, create_fma):
            patch.setattr(_BUILDER, made.__name__, made)
        yield
