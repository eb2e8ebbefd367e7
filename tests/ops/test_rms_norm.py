"""rms_norm's derivative in narrow dtypes: sums over many rows are made in float32, and rounded once."""
from __future__ import annotations

import pytest
import torch

from shardlib.ops.rms_norm import RMS_NORM_VJP, rms_norm_vjp
from shardlib.program import Step
from shardlib.reference import refer
from shardlib.spec import parse_signature


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_a_derivative_is_within_one_rounding_of_float64(dtype: torch.dtype) -> None:
    r = torch.Generator().manual_seed(0)
    x, g = (torch.randn(64, 32, 24, generator=r).to(dtype) for _ in range(2))
    w = (1 + torch.randn(24, generator=r) / 4).to(dtype)
    ins, outs = parse_signature("B T D, D, B T D -> B T D, D")
    step = Step(RMS_NORM_VJP, ins, outs, ("x", "w", "g"), ("dx", "dw"), (("eps", 1e-6),))
    for found, want in zip(rms_norm_vjp(x, w, g, 1e-6),
                           refer(step, dict(B=64, T=32, D=24), [x.double(), w.double(), g.double()]),
                           strict=True):
        rounding = torch.finfo(dtype).eps / 2 * want.abs() + torch.finfo(torch.float32).eps * want.abs().max()
        assert found.dtype == dtype and bool(((found.double() - want).abs() <= rounding).all())
