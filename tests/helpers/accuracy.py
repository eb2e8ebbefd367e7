"""How near to float64 a kernel is to be: at most twice as far as torch in its dtype."""
from __future__ import annotations

import math

import torch
from torch import Tensor


def near(got: Tensor, torchs: Tensor, exact: Tensor, n: int = 1, terms: Tensor | None = None) -> bool:
    """Beside twice torch's own error there is what a few numbers of torch's may be spared by chance.

    One rounding of each result, where all offs are alike likely: a quarter of an eps of it. And in one
    result, of n numbers that are added up by halves, half an eps of the sum of their absolute values,
    `terms`, log2(n) times: where there are many results, nothing.
    """
    def error(x: Tensor) -> float:
        return float((x.double() - exact).norm())
    one = math.log2(n) * float((exact if terms is None else terms).abs().max()) if n > 1 else 0.0
    return error(got) <= 2 * error(torchs) + torch.finfo(got.dtype).eps * (float(exact.norm()) / 4 + one / 2)
