"""Experts: rows of tokens go to those that were chosen, through their weights, and home again.

    weights, experts = route("B T E -> B T J, B T J", logits, top_k=2)
    rows, at = dispatch("B T D, B T J -> (E B T)~J D, (E B T)~J", x, experts)
    h = grouped_einsum("(E B T)~J D, (E B T)~J, E D F -> (E B T)~J F", rows, at, w)
    y = combine("(E B T)~J F, (E B T)~J, B T J -> B T F", h, at, weights)

The dim `(E B T)~J` is ragged: of all pairs of an expert and a token only those are there that were chosen, at
most J for each token. Rows of one expert lie together, in an order of their own, and behind them lie rows
that mean nothing; `at` says which is which. Ops that take each row by itself, as `silu` and `*`, may have
such a dim, and the ops here. Rows of two dispatches do not mix.

On one axis all that is einsum, with E, B and T as labels. Tokens that are whole where E is split are
filtered, and combine owes their sum; tokens that are split over another axis stay so. An axis of E that
splits tokens, too, is E's: tokens are gathered over it, filtered, and come home by a reduce_scatter. dispatch
is linear in the tokens, grouped_einsum and combine in rows and in weights, so what experts owe passes
through. J is whole.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from shardlib.dtypes import Dtypes, widest
from shardlib.errors import SpecError
from shardlib.language.local_code import LocalCode
from shardlib.language.steps import Steps
from shardlib.language.value import Operand, Value, apply
from shardlib.ops.expert_rows import (
    chosen_rows,
    combined,
    each_once,
    grouped_outer,
    grouped_product,
    slot_products,
    token_rows,
)
from shardlib.ops.route import ROUTE
from shardlib.program import Op, Step
from shardlib.reference import Dims
from shardlib.rules import Rule
from shardlib.spec import Dim, Spec, parse_specs


def _ragged(step: Step) -> Dim:
    return next(d for s in (*step.ins, *step.outs) for d in s.dims if d.ragged)


def _code(e: LocalCode, step: Step, helper: Callable, args: Sequence[str], *more: object) -> str:
    """A call of a helper that is told how many experts, tokens and choices of each this rank has."""
    dim = _ragged(step)
    experts, *tokens = (e.rows(Dim((f,)))[1] for f in dim.factors)
    given = [*args, experts, prod(tokens), e.sizes[dim.ragged], *more]
    return f"{e.use(helper)}({', '.join(map(str, given))})"


def _indexed(dtypes: Dtypes, attrs: Mapping[str, Any]) -> Dtypes:
    """Each as it comes; what says which row is which, in the integers that torch indexes by."""
    return [dtypes[0], dtypes[1] and "int64", *dtypes[2:]]


def _there(d: Dims, at: Tensor) -> Tensor:
    """Which pairs there are: `at` has their choice, or as many as there are choices."""
    return at < d.sizes[_ragged(d.step).ragged]


def _linear(step: Step, *sums: str) -> Rule:
    """In the first operand, and in the one behind `at`."""
    groups = tuple((i,) for i in range(len(step.ins)) if i != 1)
    return Rule(linear=groups, sums=sums, ragged=True)


# -- to the experts ------------------------------------------------------------------------------------------

def _dispatch(e: LocalCode, step: Step, args: list[str]) -> str:
    dim = _ragged(step)
    site, room = _site(e, step, args), e.room_site(step, dim)
    looks = [f"{name}.look" if name else "None" for name in (site, room)]
    return _code(e, step, chosen_rows, args, e.rows(Dim(dim.factors[:1]))[0], e.rows(dim)[1], *looks,
                 step.options.get("ignore_index"))


def _site(e: LocalCode, step: Step, args: list[str]) -> str | None:
    """Where experts are looked at; nowhere where `route` has chosen them."""
    expert, maker = Dim(_ragged(step).factors[:1]), e.maker(step.inputs[1])
    if maker is not None and maker.op is ROUTE and e.count(maker.ins[0].dims[-1]) <= e.count(expert):
        return None
    none = step.options.get("ignore_index")
    return e.index_site(step, 1, args[1], expert, "experts", ignored=none,
                        hint=f"; an expert that a token has twice counts as {none - 1 if none else -1}")


def _look(e: LocalCode, step: Step, args: list[str]) -> str:
    """A kernel has room for all rows."""
    site = _site(e, step, args)
    return (f"{site}.look({e.use(each_once)}({args[1]}, {step.options.get('ignore_index')}))" if site
            else "None")


def _dispatch_reference(d: Dims, x: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
    dim = _ragged(d.step)
    chosen, least = d.index(dim.names[0]) == experts, 0 if d.options.get("ignore_index") is None else -1
    wrong = (d.sum(chosen.long(), dim.ragged) > 1).any() | (experts >= d.count(dim.names[0])).any()
    if bool(wrong | (experts < least).any()):
        raise ValueError("an expert twice, or none of them")
    places = torch.where(chosen, d.index(dim.ragged), d.count(dim.ragged))
    return d.sum(chosen * x, dim.ragged), d.fold(torch.minimum, d.count(dim.ragged), places, dim.ragged)


def _dispatch_vjp(b: Steps, step: Step, ct: Sequence[str]) -> list[str | None]:
    return [b.call(COMBINE, [ct[0], step.outputs[1]], outs=(step.ins[0].owing(),)), None]


DISPATCH = Op("dispatch", index=(1,), takes=("float", "index"), emit=_dispatch, looks=_look,
              vjp=_dispatch_vjp,
              rule=lambda s: Rule(linear=((0,),), whole=s.ins[1].names[-1:], uses=((0, 1), (1,)),
                                  ragged=True),
              keywords={"ignore_index": lambda n: n is None or (isinstance(n, int) and n < 0)},
              reads=_indexed, dtype=lambda d, o: [d[0], "int64"],
              reference=_dispatch_reference)


# -- through their weights -----------------------------------------------------------------------------------

def _product(e: LocalCode, step: Step, args: list[str]) -> str:
    """The weights with their dims in the order (experts, in, out)."""
    w, made = step.ins[2], [step.ins[0].labels[1], step.outs[0].labels[1]]
    order = [w.labels.index(n) for n in w.labels if n not in made] + [w.labels.index(n) for n in made]
    turned = args[2] if order == [0, 1, 2] else f"{args[2]}.permute({', '.join(map(str, order))})"
    return _code(e, step, grouped_product, [*args[:2], turned])


def _outer(e: LocalCode, step: Step, args: list[str]) -> str:
    made, out = [_ragged(step).names[0], step.ins[0].labels[1], step.ins[2].labels[1]], step.outs[0].labels
    text = _code(e, step, grouped_outer, [args[0], args[1], args[2]])
    order = [made.index(n) for n in out]
    return text if order == [0, 1, 2] else f"{text}.permute({', '.join(map(str, order))})"


def _grouped_vjp(b: Steps, step: Step, ct: Sequence[str]) -> list[str | None]:
    rows, at, w = step.inputs
    return [b.call(GROUPED_EINSUM, [ct[0], at, w], outs=(step.ins[0].owing(),)), None,
            b.call(GROUPED_EINSUM_VJP, [rows, at, ct[0]], outs=(step.ins[2].owing(),))]


def _computed(dtypes: Dtypes, attrs: Mapping[str, Any]) -> Dtypes:
    kind = widest(dtypes[0], dtypes[2])
    return [kind, dtypes[1] and "int64", kind]


GROUPED_EINSUM = Op("grouped_einsum", index=(1,), takes=("float", "index", "float"), emit=_product,
                    vjp=_grouped_vjp, reads=_computed, dtype=lambda d, o: [widest(d[0], d[2])],
                    rule=lambda s: _linear(s, *s.ins[0].names[-1:]),
                    reference=lambda d, rows, at, w: _there(d, at) * d.sum(rows * w, d.step.ins[0].names[-1]))
GROUPED_EINSUM_VJP = Op("grouped_einsum_vjp", index=(1,), takes=("float", "index", "float"), emit=_outer,
                        reads=_computed, dtype=lambda d, o: [widest(d[0], d[2])],
                        rule=lambda s: _linear(s, *_ragged(s).names[1:]),
                        reference=lambda d, rows, at, g: d.sum(_there(d, at) * rows * g))


# -- and home ------------------------------------------------------------------------------------------------

def _weighted(d: Dims, rows: Tensor, at: Tensor, weights: Tensor | None = None) -> Tensor:
    """By pair, and by choice of a token where there are weights."""
    if weights is None:
        return _there(d, at) * rows
    return (d.index(_ragged(d.step).ragged) == at) * rows * weights


def _spread(d: Dims, x: Tensor, at: Tensor, *weights: Tensor) -> Tensor:
    found = _weighted(d, x, at, *weights)
    return d.sum(found, _ragged(d.step).ragged) if weights else found


def _combine_vjp(b: Steps, step: Step, ct: Sequence[str]) -> list[str | None]:
    rows, at, *weights = step.inputs
    made: list[str | None] = [b.call(COMBINE_VJP, [ct[0], at, *weights], outs=(step.ins[0].owing(),)), None]
    if weights:
        made.append(b.call(COMBINE_WEIGHTS_VJP, [rows, at, ct[0]], outs=(step.ins[2].owing(),)))
    return made


def _home(helper: Callable, after: int) -> Callable[[LocalCode, Step, list[str]], str]:
    """Code of a helper that is told the result's shape; operands from `after` on come last."""
    return lambda e, step, args: _code(e, step, helper, args[:after], e.shape(step.outs[0]), *args[after:])


COMBINE = Op("combine", index=(1,), takes=("float", "index", "float"), emit=_home(combined, 2),
             vjp=_combine_vjp, reads=_indexed, dtype=lambda d, o: d[:1],
             rule=lambda s: _linear(s, _ragged(s).names[0]),
             reference=lambda d, *xs: d.sum(_weighted(d, *xs)))
COMBINE_VJP = Op("combine_vjp", index=(1,), takes=("float", "index", "float"), reads=_indexed,
                 dtype=lambda d, o: d[:1], rule=_linear, reference=_spread,
                 emit=lambda e, s, a: _code(e, s, token_rows, a[:2], *a[2:]))
COMBINE_WEIGHTS_VJP = Op(
    "combine_weights_vjp", index=(1,), takes=("float", "index", "float"), reads=_indexed,
    dtype=lambda d, o: [widest(d[0], d[2], "float32")], emit=_home(slot_products, 3),
    rule=lambda s: Rule(linear=((0,), (2,)), whole=s.outs[0].names[-1:], ragged=True,
                        sums=(_ragged(s).names[0], s.ins[0].names[-1])),
    reference=lambda d, rows, at, g: d.sum((d.index(_ragged(d.step).ragged) == at) * rows * g))


# -- what one calls ------------------------------------------------------------------------------------------

def _meant(op: str, text: str, means: Callable[..., bool], *like: str) -> None:
    """SpecError unless the specs of a text are those of `like`."""
    said = f'{op} "{text}": the specs are those of ' + ", or of ".join(f'"{each}"' for each in like)
    ins, outs = parse_specs(text, said)
    try:
        if means(ins, outs):
            return
    except (IndexError, ValueError):
        pass
    raise SpecError(said)


def _tokens(spec: Spec) -> tuple[str, ...]:
    """The names of the tokens of a ragged dim, which is the first of `spec`."""
    if not spec.dims or not spec.dims[0].ragged:
        raise ValueError
    return spec.dims[0].names[1:]


def dispatch(text: str, x: Operand, experts: Operand, *,
             ignore_index: int | None = None) -> tuple[Value, Value]:
    """(rows, at): a row of x for each expert that a token chose, and which row is which.

    ignore_index: a number below 0 that is no expert, as of padding, or of what `within_capacity` drops.
    Refused, where it runs: an expert outside of E, and one that a token has twice.

    >>> from shardlib import Layout, Mesh, lower, sharded
    >>> @sharded("T D, T J -> T D")
    ... def there_and_back(x, experts):
    ...     rows, at = dispatch("T D, T J -> (E T)~J D, (E T)~J", x, experts)
    ...     return combine("(E T)~J D, (E T)~J -> T D", rows, at)
    >>> lower(there_and_back, Layout(E="ep"), mesh=Mesh(ep=2))
    @sharded("T D, T J -> T D", layout=EXPLICIT)
    def there_and_back(x, experts):
        rows, at = dispatch("T D, T J -> (E/ep T)~J D, (E/ep T)~J", x, experts)
        v1 = combine("(E/ep T)~J D, (E/ep T)~J -> T D +ep", rows, at)
        v = all_reduce("T D +ep -> T D", v1)
        return v
    """
    def means(ins: Sequence[Spec], outs: Sequence[Spec]) -> bool:
        (x, chosen), (rows, at) = ins, outs
        tokens = _tokens(rows)
        return (x.labels == (*tokens, rows.labels[1]) and chosen.labels == (*tokens, rows.dims[0].ragged)
                and at.labels == rows.labels[:1] and len(rows.dims) == 2)
    _meant("dispatch", text, means, "B T D, B T J -> (E B T)~J D, (E B T)~J")
    if ignore_index is None:
        return apply(DISPATCH, (x, experts), text)
    return apply(DISPATCH, (x, experts), text, ignore_index=ignore_index)


def grouped_einsum(text: str, rows: Operand, at: Operand, w: Operand) -> Value:
    """Each row times the matrix of its expert.

    >>> import torch
    >>> from shardlib import Layout, Mesh, sharded, simulate
    >>> @sharded("T D, T J, E D F -> T F")
    ... def experts(x, chosen, w):
    ...     rows, at = dispatch("T D, T J -> (E T)~J D, (E T)~J", x, chosen)
    ...     h = grouped_einsum("(E T)~J D, (E T)~J, E D F -> (E T)~J F", rows, at, w)
    ...     return combine("(E T)~J F, (E T)~J -> T F", h, at)
    >>> x, w = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[[1.0]], [[10.0]], [[100.0]]])
    >>> simulate(experts, Layout(E="ep"), x, torch.tensor([[0, 1], [2, 0], [1, 2]]), w, mesh=Mesh(ep=2))
    tensor([[ 11.],
            [202.],
            [330.]])
    """
    def means(ins: Sequence[Spec], outs: Sequence[Spec]) -> bool:
        (rows, at, w), (out,) = ins, outs
        _tokens(rows)
        dim, contracted = rows.labels
        return (at.labels == (dim,) and out.labels[:1] == (dim,) and len(out.dims) == 2
                and out.labels[1] != contracted
                and sorted(w.labels) == sorted((rows.dims[0].names[0], contracted, out.labels[1])))
    _meant("grouped_einsum", text, means, "(E B T)~J D, (E B T)~J, E D F -> (E B T)~J F")
    return apply(GROUPED_EINSUM, (rows, at, w), text)


def combine(text: str, rows: Operand, at: Operand, weights: Operand | None = None) -> Value:
    """The sum of each token's rows, times the weights of its choices; without weights, the sum.

    Over a split E the sum is owed, beside what the rows owe already.

    >>> import torch
    >>> from shardlib import compile, sharded
    >>> @sharded("T D, T J, T J -> T D")
    ... def mixed(x, experts, weights):
    ...     rows, at = dispatch("T D, T J -> (E T)~J D, (E T)~J", x, experts)
    ...     return combine("(E T)~J D, (E T)~J, T J -> T D", rows, at, weights)
    >>> weights = torch.tensor([[0.5, 0.25]])
    >>> compile(mixed, sizes=dict(E=4))(torch.tensor([[2.0]]), torch.tensor([[3, 1]]), weights)
    tensor([[1.5000]])
    """
    def means(ins: Sequence[Spec], outs: Sequence[Spec]) -> bool:
        (rows, at, *w), (out,) = ins, outs
        tokens, chosen = _tokens(rows), rows.dims[0].ragged
        return (at.labels == rows.labels[:1] and len(rows.dims) == 2 and len(w) < 2
                and out.labels == (*tokens, rows.labels[1])
                and all(s.labels == (*tokens, chosen) for s in w))
    _meant("combine", text, means, "(E B T)~J D, (E B T)~J, B T J -> B T D",
           "(E B T)~J D, (E B T)~J -> B T D")
    return apply(COMBINE, (rows, at) if weights is None else (rows, at, weights), text)


TABLE = {op.name: op for op in (DISPATCH, GROUPED_EINSUM, GROUPED_EINSUM_VJP, COMBINE, COMBINE_VJP,
                                COMBINE_WEIGHTS_VJP)}
