"""Pointwise functions of one tensor: none is linear, so all are refused of a sum that is still owed."""
from __future__ import annotations

from typing import Any

from shardlib.errors import SpecError
from shardlib.language.unary import OPS, TABLE, power
from shardlib.language.value import Operand, Value, apply
from shardlib.program import number


def silu(x: Operand) -> Value:
    """x sigmoid(x), of every element. Refused of a sum that is still owed.

    >>> import torch
    >>> from shardlib import sharded
    >>> sharded("D -> D")(silu)(torch.tensor([-1.0, 0.0, 1.0]))
    tensor([-0.2689,  0.0000,  0.7311])
    """
    return apply(OPS["silu"], (x,))


def gelu(x: Operand, *, approximate: str = "none") -> Value:
    """x times the cumulative normal distribution at x (Hendrycks and Gimpel 2016), exactly, or
    by the tanh that GPT-2 has for it: approximate="tanh".

    Refused of a sum that is still owed.

    >>> import torch
    >>> from shardlib import sharded
    >>> x = torch.tensor([-1.0, 0.0, 1.0])
    >>> sharded("D -> D")(gelu)(x), sharded("D -> D")(lambda x: gelu(x, approximate="tanh"))(x)
    (tensor([-0.1587,  0.0000,  0.8413]), tensor([-0.1588,  0.0000,  0.8412]))
    """
    if approximate not in ("none", "tanh"):
        raise SpecError(f"gelu: approximate is {approximate!r}; it is 'none' or 'tanh'")
    return apply(OPS["gelu" if approximate == "none" else "gelu_tanh"], (x,))


def relu(x: Operand) -> Value:
    """max(x, 0), of floats and of integers. Refused of a sum that is still owed: its terms have any sign.

    >>> from shardlib import EXPLICIT, Mesh, einsum, lower, sharded
    >>> @sharded("F/tp, F/tp D -> D +tp", layout=EXPLICIT)
    ... def f(x, w):
    ...     return relu(einsum("F/tp, F/tp D -> D +tp", x, w))
    >>> lower(f, mesh=Mesh(tp=2))                                       # doctest: +ELLIPSIS
    Traceback (most recent call last):
    shardlib.errors.SpecError: relu: einsum(...) owes a sum over tp, and relu of a sum is not the sum ...
    """
    return apply(OPS["relu"], (x,))


def tanh(x: Operand) -> Value:
    """The hyperbolic tangent, between -1 and 1. Refused of a sum that is still owed.

    To cap logits at 30 without a corner, whatever V is split over:

    >>> import torch
    >>> from shardlib import Layout, Mesh, sharded, simulate
    >>> capped = sharded("V -> V")(lambda logits: 30 * tanh(logits / 30))
    >>> simulate(capped, Layout(V="tp"), torch.tensor([-1.0, 10.0, 1000.0]), mesh=Mesh(tp=2))
    tensor([-0.9996,  9.6454, 30.0000])
    """
    return apply(OPS["tanh"], (x,))


def sigmoid(x: Operand) -> Value:
    """1 / (1 + exp(-x)): a probability from its log odds. Refused of a sum that is still owed.

    >>> import torch
    >>> from shardlib import sharded
    >>> log_odds = torch.tensor([1 / 4, 1.0, 3.0]).log()
    >>> sharded("E -> E")(sigmoid)(log_odds)
    tensor([0.2000, 0.5000, 0.7500])
    """
    return apply(OPS["sigmoid"], (x,))


def exp(x: Operand) -> Value:
    """e to the power of every element. Refused of a sum that is still owed. See also `logsumexp`.

    >>> import torch
    >>> from shardlib import sharded
    >>> sharded("D -> D")(exp)(torch.tensor([0.0, 1.0]))
    tensor([1.0000, 2.7183])
    """
    return apply(OPS["exp"], (x,))


def log(x: Operand) -> Value:
    """The natural logarithm, -inf of 0, NaN of what is negative. Refused of a sum that is still owed.

    Perplexity per token, from how likely each was:

    >>> import torch
    >>> from shardlib import Layout, Mesh, sharded, simulate
    >>> from shardlib.functions import mean
    >>> perplexity = sharded("T -> ()")(lambda p: exp(-mean("T -> ()", log(p))))
    >>> simulate(perplexity, Layout(T="cp"), torch.tensor([0.5, 0.5, 0.25, 0.25]), mesh=Mesh(cp=2))
    tensor(2.8284)
    """
    return apply(OPS["log"], (x,))


def rsqrt(x: Operand) -> Value:
    """1 / sqrt(x). Refused of a sum that is still owed.

    A norm, as one might write it oneself; where D is split, one number of each row is sent.

    >>> import torch
    >>> from shardlib import Layout, Mesh, sharded, simulate
    >>> from shardlib.functions import mean
    >>> norm = sharded("B D -> B D")(lambda x: x * rsqrt(mean("B D -> B", square(x))))
    >>> simulate(norm, Layout(D="tp"), torch.tensor([[3.0, 4.0, 0.0, 0.0]]), mesh=Mesh(tp=2))
    tensor([[1.2000, 1.6000, 0.0000, 0.0000]])
    """
    return apply(OPS["rsqrt"], (x,))


def square(x: Operand) -> Value:
    """x * x, of floats and of integers; so is `x ** 2`. Refused of a sum that is still owed.

    >>> import torch
    >>> from shardlib import sharded
    >>> sharded("D -> D")(square)(torch.tensor([-3, 2]))
    tensor([9, 4])
    """
    return apply(OPS["square"], (x,))


def abs(x: Operand) -> Value:
    """The absolute value, of floats and of integers; its slope at 0 is 0.

    Refused of a sum that is still owed.

    The largest entry of a piece, as a scale for a narrow dtype:

    >>> import torch
    >>> from shardlib import Layout, Mesh, sharded, simulate
    >>> from shardlib.functions import max
    >>> top = sharded("B D -> B")(lambda x: max("B D -> B", abs(x)))
    >>> simulate(top, Layout(D="tp"), torch.tensor([[1.0, -3.0, 2.0]]), mesh=Mesh(tp=2))
    tensor([3.])
    """
    return apply(OPS["abs"], (x,))


def sqrt(x: Operand) -> Value:
    """The square root, NaN of what is negative; `x ** 0.5` too. Refused of a sum that is still owed.

    >>> import torch
    >>> from shardlib import sharded
    >>> sharded("D -> D")(sqrt)(torch.tensor([4.0, 9.0]))
    tensor([2., 3.])
    """
    return apply(OPS["sqrt"], (x,))


def pow(x: Operand, by: float) -> Value:
    """x to the power of a number, of floats; `x ** by` too. Refused of a sum that is still owed.

    >>> import torch
    >>> from shardlib import sharded, value_and_grad
    >>> f = sharded("() -> ()")(lambda x: pow(x, 3))
    >>> value_and_grad(f, wrt="x")(torch.tensor(2.0))
    (tensor(8.), tensor(12.))
    """
    op, attrs = power(by)
    return apply(op, (x,), **attrs)


def clamp(x: Operand, min: float | None = None, max: float | None = None) -> Value:
    """x, no less than `min` and no more than `max`; the gradient passes where x is within, bounds included.

    Integers stay integers between whole numbers. Refused of a sum that is still owed.

    >>> import torch
    >>> from shardlib import sharded
    >>> sharded("D -> D")(lambda x: clamp(x, min=0, max=1))(torch.tensor([-1.0, 0.5, 2.0]))
    tensor([0.0000, 0.5000, 1.0000])
    """
    for name, bound in (("min", min), ("max", max)):
        if bound is not None and not number(bound):
            raise SpecError(f"clamp: {name} is {bound!r}; it is a finite number")
    bounds: dict[str, Any] = {"min": min, "max": max}
    return apply(TABLE["clamp"], (x,), **{name: bound for name, bound in bounds.items() if bound is not None})


def sin(x: Operand) -> Value:
    """The sine, of radians. Refused of a sum that is still owed.

    >>> import torch
    >>> from shardlib import sharded
    >>> sharded("D -> D")(sin)(torch.tensor([0.0, torch.pi / 2]))
    tensor([0., 1.])
    """
    return apply(OPS["sin"], (x,))


def cos(x: Operand) -> Value:
    """The cosine, of radians. Refused of a sum that is still owed.

    >>> import torch
    >>> from shardlib import sharded
    >>> sharded("D -> D")(cos)(torch.tensor([0.0, torch.pi]))
    tensor([ 1., -1.])
    """
    return apply(OPS["cos"], (x,))


def erf(x: Operand) -> Value:
    """The error function. Refused of a sum that is still owed.

    >>> import torch
    >>> from shardlib import sharded
    >>> sharded("D -> D")(erf)(torch.tensor([0.0, 1.0]))
    tensor([0.0000, 0.8427])
    """
    return apply(OPS["erf"], (x,))


def log1p(x: Operand) -> Value:
    """log(1 + x), right where x is small. Refused of a sum that is still owed.

    >>> import torch
    >>> from shardlib import sharded
    >>> sharded("D -> D")(log1p)(torch.tensor([0.0, 1e-9]))
    tensor([0.0000e+00, 1.0000e-09])
    """
    return apply(OPS["log1p"], (x,))


def expm1(x: Operand) -> Value:
    """exp(x) - 1, right where x is small. Refused of a sum that is still owed.

    >>> import torch
    >>> from shardlib import sharded
    >>> sharded("D -> D")(expm1)(torch.tensor([0.0, 1e-9]))
    tensor([0.0000e+00, 1.0000e-09])
    """
    return apply(OPS["expm1"], (x,))


def softplus(x: Operand) -> Value:
    """log(1 + exp(x)), and x itself above 20, as torch has it. Refused of a sum that is still owed.

    >>> import torch
    >>> from shardlib import sharded
    >>> sharded("D -> D")(softplus)(torch.tensor([-1.0, 0.0, 100.0]))
    tensor([  0.3133,   0.6931, 100.0000])
    """
    return apply(OPS["softplus"], (x,))


def log_sigmoid(x: Operand) -> Value:
    """log(sigmoid(x)), finite where sigmoid rounds to 0. Refused of a sum that is still owed.

    How a preference is scored (DPO), from the difference of two log odds:

    >>> import torch
    >>> from shardlib import sharded
    >>> sharded("B -> B")(lambda margin: -log_sigmoid(margin))(torch.tensor([-200.0, 0.0]))
    tensor([200.0000,   0.6931])
    """
    return apply(OPS["log_sigmoid"], (x,))
