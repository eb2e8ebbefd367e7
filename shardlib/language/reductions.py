"""Ops along dims: sum, mean and prod; and what all such ops share.

Their spec string says the dims that remain: `mean("B T -> ()", x)`. A split dim that is summed leaves a sum
owed. Of bfloat16 and float16, what is summed up inside of an op is summed in float32, and rounded once.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shardlib.dtypes import as_they_come, counted, fractional, narrow, reading
from shardlib.errors import SpecError
from shardlib.language.local_code import LocalCode
from shardlib.language.steps import Steps
from shardlib.language.value import Operand, Value, apply
from shardlib.program import Op, Step
from shardlib.reference import Dims
from shardlib.rules import Rule
from shardlib.spec import Spec, parse_specs


def names_gone(step: Step) -> tuple[str, ...]:
    """The names that the result lacks, those in groups too."""
    return tuple(n for n in step.ins[0].names if n not in step.outs[0].names)


def dims_gone(step: Step) -> tuple[int, ...]:
    """The places of the dims that the result lacks."""
    return tuple(i for i, label in enumerate(step.ins[0].labels) if label not in step.outs[0].labels)


def _sum(e: LocalCode, step: Step, args: list[str]) -> str:
    return f"{args[0]}.sum({dims_gone(step)})" if dims_gone(step) else f"{args[0]}.clone()"


def rounding(e: LocalCode, step: Step) -> str:
    """The end of an expression in float32: its rounding to the step's dtype;
    nothing where that is not narrow."""
    kind = e.dtypes[step.outputs[0]]
    return f".to(torch.{kind})" if narrow(kind) else ""


def widened(e: LocalCode, step: Step, arg: str) -> str:
    """An operand in float32, where it is narrow."""
    return f"{arg}.to(torch.float32)" if rounding(e, step) else arg


def beside(arg: str, narrow: Spec, wide: Spec) -> str:
    """`arg`, of dims `narrow`, indexed so that it stands beside dims `wide`."""
    return f"{arg}[{', '.join(':' if n in narrow.labels else 'None' for n in wide.labels)}]"


def _mean(e: LocalCode, step: Step, args: list[str]) -> str:
    if (end := rounding(e, step)) and dims_gone(step) and count_gone(e, step):
        return f"({args[0]}.sum({dims_gone(step)}, dtype=torch.float32) / {count_gone(e, step)}){end}"
    return (f"{_sum(e, step, args)} / {count_gone(e, step)}" if count_gone(e, step)
            else f"{_sum(e, step, args)} * float('nan')")


def _made(step: Step) -> tuple[str, ...]:
    return tuple(n for n in step.outs[0].names if n not in step.ins[0].names)


def count_gone(e: LocalCode, step: Step) -> int:
    """How many, over all ranks, come to one of the result."""
    n = 1
    for name in names_gone(step):
        n *= e.sizes[name]
    return n


def _mean_vjp(b: Steps, step: Step, ct: Sequence[str]) -> list[str]:
    return [b.spread(ct[0], step.ins[0], mean=True)]


def _spread(e: LocalCode, step: Step, args: list[str]) -> str:
    (have,), (want,) = step.ins, step.outs
    index = ", ".join(":" if n in have.labels else "None" for n in want.labels)
    text = f"{args[0]}[{index}].expand({e.shape(want)})" if len(have.labels) < len(want.labels) else args[0]
    if not step.options.get("mean"):
        return text
    count = 1
    for name in want.names:
        count *= 1 if name in have.names else e.sizes[name]
    return f"{text} / {count or 1}"


def _spread_vjp(b: Steps, step: Step, ct: Sequence[str]) -> list[str]:
    """Summed over what was made; it owes there. Shares of a mean are what backward writes."""
    if step.options.get("mean"):
        raise SpecError("value_and_grad: spread of a mean has no derivative")
    return [b.call(SUM, ct, outs=(step.ins[0].owing(),))]


def _others(step: Step) -> tuple[str, ...]:
    """The names of the first operand that the second one lacks."""
    return tuple(n for n in step.ins[0].names if n not in step.ins[1].names)


def _lacked(step: Step) -> tuple[int, ...]:
    return tuple(i for i, label in enumerate(step.ins[0].labels) if label not in step.ins[1].labels)


def _prod(e: LocalCode, step: Step, args: list[str]) -> str:
    return f"{e.use(product)}({args[0]}, {dims_gone(step)})"


def product(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The product over `dims`, of narrow floats in float32, rounded once."""
    wide = torch.promote_types(x.dtype, torch.float32) if x.is_floating_point() else torch.int64
    made = x.to(wide)
    for dim in reversed(dims):
        made = made.prod(dim)
    return made.to(x.dtype) if x.is_floating_point() else made


def product_vjp(x: Tensor, g: Tensor, dims: tuple[int, ...]) -> Tensor:
    """g times the product of all others: of those before and those behind, so that none divides by 0."""
    wide = torch.promote_types(torch.promote_types(x.dtype, g.dtype), torch.float32)
    kept = [i for i in range(x.ndim) if i not in dims]
    rows = x.to(wide).permute(*kept, *dims)
    flat = rows.flatten(len(kept)) if dims else rows[..., None]
    one = torch.ones_like(flat[..., :1])
    before = torch.cat((one, flat[..., :-1]), -1).cumprod(-1)
    behind = torch.cat((one, flat.flip(-1)[..., :-1]), -1).cumprod(-1).flip(-1)
    made = (before * behind * g.to(wide)[..., None]).reshape(rows.shape)
    return made.permute([(*kept, *dims).index(i) for i in range(x.ndim)]).to(x.dtype)


def _times(d: Dims, x: Tensor) -> Tensor:
    return d.fold(torch.mul, 1, x if x.is_floating_point() else x.long())


PROD_VJP = Op("prod_vjp", rule=lambda s: Rule(linear=((1,),), whole=_others(s)), takes=("float",),
              emit=lambda e, s, a: f"{e.use(product_vjp)}({a[0]}, {a[1]}, {_lacked(s)})",
              reads=as_they_come, dtype=lambda d, o: d[:1],
              infer=lambda ins, attrs: ins[:1],
              reference=lambda d, x, g: d.vjp(_times, (x,), g, d.step.ins[1]))
PROD = Op("prod", rule=lambda s: Rule(whole=names_gone(s)), emit=_prod, reads=reading(counted),
          reference=_times, vjp=lambda b, s, ct: [b.call(PROD_VJP, [s.inputs[0], ct[0]])])
SUM = Op("sum", rule=lambda s: Rule(linear=((0,),), sums=names_gone(s)), emit=_sum,
         vjp=lambda b, s, ct: [b.spread(ct[0], s.ins[0])], reads=reading(counted),
         reference=lambda d, x: d.sum(x))
MEAN = Op("mean", rule=lambda s: Rule(linear=((0,),), sums=names_gone(s)), emit=_mean, vjp=_mean_vjp,
          reads=reading(fractional), statistic=True, reference=lambda d, x: d.sum(x) / d.count(*d.gone))
SPREAD = Op("spread", keywords={"mean": lambda v: v in (None, True)}, rule=lambda s: Rule(linear=((0,),)),
            emit=_spread, vjp=_spread_vjp, reads=lambda d, o: [fractional(d[0]) if o.get("mean") else d[0]],
            reference=lambda d, x: x / d.count(*_made(d.step)) if d.options.get("mean") else x)


def reduce_call(op: Op, text: str, x: Operand, lost: int | None = None, **attrs: Any) -> Value:
    """A call of an op along dims; `lost`: over how many it runs, where that is fixed."""
    meant = f'{op.name} "{text}": one spec on each side, the right one with some of the dims of the left one'
    ins, outs = parse_specs(text, meant)
    if len(ins) != 1 or len(outs) != 1 or any(n not in ins[0].labels for n in outs[0].labels):
        raise SpecError(meant)
    if lost is not None and len(ins[0].labels) - len(outs[0].labels) != lost:
        raise SpecError(f'{op.name} "{text}": it runs over {lost} dim, the spec drops '
                        f'{len(ins[0].labels) - len(outs[0].labels)}')
    if [n for n in ins[0].labels if n in outs[0].labels] != list(outs[0].labels):
        raise SpecError(f'{op.name} "{text}": the dims that remain keep their order')
    return apply(op, (x,), text, **attrs)


def sum(text: str, x: Operand) -> Value:
    """The sum over the dims that the result lacks; int64 of integers and masks.

    Over a split dim it is owed; a sum may be owed before.

    >>> from shardlib import Layout, Mesh, lower, sharded
    >>> f = sharded("B T D -> D")(lambda x: sum("B T D -> D", x))
    >>> lower(f, Layout(B="dp"), mesh=Mesh(dp=4))
    @sharded("B/dp T D -> D", layout=EXPLICIT)
    def f(x):
        v1 = sum("B/dp T D -> D +dp", x)
        v = all_reduce("D +dp -> D", v1)
        return v
    """
    return reduce_call(SUM, text, x)


def mean(text: str, x: Operand) -> Value:
    """The mean over the dims that the result lacks, by their global sizes.

    What is split may be uneven, and a sum may be owed.

    >>> import torch
    >>> from shardlib import Layout, Mesh, sharded, simulate
    >>> f = sharded("B -> ()")(lambda x: mean("B -> ()", x))
    >>> x = torch.tensor([0.0, 0.0, 6.0])                               # ranks have 0 0 and 6
    >>> simulate(f, Layout(B="dp"), x, mesh=Mesh(dp=2))
    tensor(2.)
    """
    return reduce_call(MEAN, text, x)


def prod(text: str, x: Operand) -> Value:
    """The product over the dims that the result lacks, which are whole; int64 of integers and masks.

    The gradient of each is the product of the others, where one of them is 0, too. Refused of a sum that is
    still owed.

    >>> import torch
    >>> from shardlib import sharded, value_and_grad
    >>> f = sharded("D -> ()")(lambda x: prod("D -> ()", x))
    >>> value_and_grad(f, wrt="x")(torch.tensor([2.0, 0.0, 3.0]))
    (tensor(0.), tensor([0., 6., 0.]))
    """
    return reduce_call(PROD, text, x)


TABLE = {op.name: op for op in (SUM, MEAN, SPREAD, PROD, PROD_VJP)}
