"""Values in another floating-point dtype, and values as constants: linear, so a sum may be owed.

`cast_like` and `widen` are what the compiler writes: back to the dtype of a value, and to float32 at least,
where statistics are taken.
"""
from __future__ import annotations

from collections.abc import Sequence

from shardlib.dtypes import FLOATS, as_they_come, widest
from shardlib.errors import SpecError
from shardlib.language.arithmetic import same
from shardlib.language.local_code import LocalCode
from shardlib.language.steps import Steps
from shardlib.language.value import Operand, Value, apply
from shardlib.program import Op, Step
from shardlib.rules import Rule


def _cast_vjp(b: Steps, step: Step, ct: Sequence[str]) -> list[str | None]:
    return [b.like(ct[0], step.inputs[0]), *[None] * (len(step.inputs) - 1)]


def _to(e: LocalCode, step: Step, args: list[str]) -> str:
    """The first operand in the dtype of the result."""
    have, want = e.dtypes[step.inputs[0]], e.dtypes[step.outputs[0]]
    return args[0] if have == want else f"{args[0]}.to(torch.{want})"


CAST = Op("cast", keywords={"dtype": lambda v: v in FLOATS}, rule=lambda s: Rule(linear=((0,),)),
          infer=same, vjp=_cast_vjp, emit=lambda e, s, a: f"{a[0]}.to(torch.{s.options['dtype']})",
          dtype=lambda d, o: [o["dtype"]], reference=lambda d, x: x)
CAST_LIKE = Op("cast_like", rule=lambda s: Rule(linear=((0,),), uses=((0,),)), infer=same, vjp=_cast_vjp,
               index=(1,), emit=_to, takes=("any",), reads=as_they_come,
               dtype=lambda d, o: [d[1] if d[1] in FLOATS else d[1] and d[0]], reference=lambda d, x, like: x)
WIDEN = Op("widen", rule=lambda s: Rule(linear=((0,),)), infer=same, vjp=_cast_vjp, emit=_to,
           reads=as_they_come, dtype=lambda d, o: [widest(d[0], "float32")], reference=lambda d, x: x)


def cast(x: Operand, dtype: str) -> Value:
    """`x` in another floating-point dtype: "float32", "bfloat16", "float16" or "float64". A sum may be owed.

    >>> import torch
    >>> from shardlib import sharded
    >>> half = sharded("D -> D")(lambda x: cast(x, "bfloat16"))
    >>> half(torch.tensor([1.0, 1.01]))
    tensor([1.0000, 1.0078], dtype=torch.bfloat16)
    """
    if dtype not in FLOATS:
        raise SpecError(f"cast: {dtype!r} is not one of {', '.join(FLOATS)}")
    return apply(CAST, (x,), dtype=dtype)


STOP_GRADIENT = Op("stop_gradient", rule=lambda s: Rule(linear=((0,),)), infer=same,
                   emit=lambda e, s, a: f"{a[0]}.detach()", constant=True, reference=lambda d, x: x.detach())


def stop_gradient(x: Operand) -> Value:
    """`x`, as a constant to `value_and_grad`. A sum may be owed.

    >>> import torch
    >>> from shardlib import sharded, value_and_grad
    >>> f = sharded("() -> ()")(lambda x: x * x + stop_gradient(x * x * x))
    >>> value_and_grad(f, wrt="x")(torch.tensor(3.0))                   # the slope of x * x alone
    (tensor(36.), tensor(6.))
    """
    return apply(STOP_GRADIENT, (x,))


TABLE = {"cast": CAST, "cast_like": CAST_LIKE, "widen": WIDEN, "stop_gradient": STOP_GRADIENT}
