"""einsum: the multilinear op. Dims by name, any number of operands, contraction order by opt-einsum.

>>> [str(s) for s in pairwise("B T D, D F, F D -> B T D", dict(B=1, T=8, D=64, F=256))[0]]
['D F', 'F D', 'D']

On one axis: a split dim that is kept stays split, a split dim that is contracted leaves a sum owed, one
operand may owe a sum if no other does. Refused: a dim split in one operand only, two operands that owe over
one axis.
"""
from __future__ import annotations

import math
import string
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

from shardlib.dtypes import counted, reading
from shardlib.errors import SpecError
from shardlib.language.local_code import LocalCode
from shardlib.language.steps import Steps
from shardlib.language.value import Operand, Value, apply
from shardlib.program import Op, Step
from shardlib.rules import Rule
from shardlib.spec import Spec, parse_specs


def einsum(text: str, *operands: Operand) -> Value:
    """The product of `operands`, which meet at equal names, summed over every name that the result lacks.

    Of "B T F, F D -> B T D" that is F: out[b, t, d] = sum over f of x[b, t, f] w[f, d]. A name may stand in
    one operand alone (then that operand is summed over it, or the others are repeated along it); none
    stands in the result alone.

    >>> import torch
    >>> from shardlib import Layout, Mesh, lower, sharded
    >>> f = sharded("B F, F D -> B D")(lambda x, w: einsum("B F, F D -> B D", x, w))
    >>> f(torch.tensor([[1.0, 10.0]]), torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]))
    tensor([[41., 52., 63.]])

    A split name that is kept stays split; over one that is summed, each rank has a term, and the sum is
    owed until it is paid:

    >>> lower(f, Layout(B="dp", F="tp"), mesh=Mesh(dp=2, tp=4))
    @sharded("B/dp F/tp, F/tp D -> B/dp D", layout=EXPLICIT)
    def f(x, w):
        v1 = einsum("B/dp F/tp, F/tp D -> B/dp D +tp", x, w)
        v = all_reduce("B/dp D +tp -> B/dp D", v1)
        return v

    Refused: a name split in one operand and whole in another (where nothing may be converted), two operands
    that owe over one axis.
    """
    check(text)
    return apply(EINSUM, operands, text)


@lru_cache(maxsize=4096)
def check(text: str) -> None:
    """SpecError for a text that is no einsum."""
    ins, outs = _specs(text)
    known = {label for s in ins for label in s.labels}
    for label in outs[0].labels:
        if label not in known and not (outs[0].ellipsis and not label):
            raise SpecError(
                f'einsum "{text}": {label} is in the result and in no operand; einsum makes no dims')
    opened = {f.name for s in (*ins, outs[0]) for d in s.dims if len(d.factors) > 1 for f in d.factors}
    if loose := next((n for n in opened if n in known), None):
        raise SpecError(
            f'einsum "{text}": {loose} stands alone and in a group; a group matches only the same group')


def _specs(text: str) -> tuple[tuple[Spec, ...], tuple[Spec, ...]]:
    meant = f'einsum "{text}": specs of the operands, "->", and the spec of one result'
    ins, outs = parse_specs(text, meant)
    if len(outs) != 1:
        raise SpecError(meant)
    return ins, outs


def _rule(step: Step) -> Rule:
    kept = step.outs[0].names
    return Rule(linear=tuple((i,) for i in range(len(step.ins))),
                sums=tuple(dict.fromkeys(n for s in step.ins for n in s.names if n not in kept)))


def _vjp(b: Steps, step: Step, cotangents: Sequence[str]) -> list[str]:
    return [b.einsum_to(step.ins[i], [cotangents[0], *(x for j, x in enumerate(step.inputs) if j != i)])
            for i in range(len(step.ins))]


def _emit(e: LocalCode, step: Step, args: list[str]) -> str:
    shapes = {label: n for s in step.ins for label, n in zip(s.labels, e.shape(s))}
    return contraction([list(s.labels) for s in step.ins], list(step.outs[0].labels), args, shapes,
                       lambda x, w, sizes: e.product(x, w, sizes, e.dtypes[step.outputs[0]]))


EINSUM = Op("einsum", rule=_rule, emit=_emit, vjp=_vjp, reads=reading(counted),
            reference=lambda d, *xs: d.sum(math.prod(xs)))


Asked = Callable[[str, str, tuple[int, int, int]], str | None]


def contraction(ins: list[list[str]], out: list[str], args: list[str], size: Mapping[str, int],
                product: Asked = lambda x, w, sizes: None) -> str:
    """The fastest expression of an einsum of local tensors: one matmul where the dims allow it.

    product: asked for a kernel's matmul by a second operand that lies by columns, of two in all: see
    `LocalCode.product`.
    """
    if len(ins) == 2:
        for (a, b), (x, y) in (((ins[0], ins[1]), (args[0], args[1])),
                               ((ins[1], ins[0]), (args[1], args[0]))):
            if text := _matmul(a, b, out, x, y, size, product):
                return text
    letter = dict(zip(dict.fromkeys(n for s in ins for n in s), string.ascii_letters))
    equation = ",".join("".join(letter[n] for n in s) for s in ins) + "->" + "".join(letter[n] for n in out)
    if len(ins) < 3:
        return f"torch.einsum({equation!r}, {', '.join(args)})"
    return _chain(ins, out, args, size)


def _matmul(a: list[str], b: list[str], out: list[str], x: str, y: str, size: Mapping[str, int],
            product: Asked) -> str | None:
    """`x @ y` when x is (left.., inner..), y is (inner.., right..) or (right.., inner..),
    and the result (left.., right..)."""
    inner = [n for n in a if n in b]
    left, right = [n for n in a if n not in b], [n for n in b if n not in a]
    if not inner or a != left + inner or out != left + right or set(inner) & set(out):
        return None
    flat = math.prod(size[n] for n in inner)
    wide = math.prod(size[n] for n in right)
    x2 = x if len(inner) == 1 else f"{x}.reshape({_args([size[n] for n in left] + [flat])})"
    if b == inner + right:
        y2 = y if len(inner) == len(right) == 1 else f"{y}.reshape({flat}, {wide})"
        text = f"torch.matmul({x2}, {y2})"
    elif b == right + inner:
        y2 = y if len(b) == 2 else f"{y}.reshape({wide}, {flat})"
        sizes = math.prod(size[n] for n in left), flat, wide
        if kernel := product(x, f"{y2}.contiguous().mT", sizes):
            return f"{kernel}.view({_args([size[n] for n in out])})"
        text = f"F.linear({x2}, {y2})"
    else:
        return None
    return text if len(right) == 1 else f"{text}.reshape({_args([size[n] for n in out])})"


def _args(shape: Sequence[int]) -> str:
    return ", ".join(map(str, shape)) if shape else "()"


def pairwise(text: str, size: Mapping[str, int]) -> list[tuple[Spec, ...]]:
    """The contractions, two operands at a time, that opt-einsum finds cheapest:
    (left, right, result) specs."""
    ins, outs = _specs(text)
    found = _path([list(s.labels) for s in ins], list(outs[0].labels), size)
    by = {d.label: d for s in ins for d in s.dims}
    return [tuple(Spec(tuple(by[n] for n in part)) for part in step[2:]) for step in found]


def _path(ins: list[list[str]], out: list[str], size: Mapping[str, int]) -> list[tuple]:
    """Per contraction: (index, index, left labels, right labels, result labels),
    operands shifting as they are consumed."""
    import opt_einsum
    letter = dict(zip(dict.fromkeys(n for s in ins for n in s), string.ascii_letters))
    equation = ",".join("".join(letter[n] for n in s) for s in ins) + "->" + "".join(letter[n] for n in out)
    path, _ = opt_einsum.contract_path(equation, *[tuple(size[n] for n in s) for s in ins], shapes=True)
    work, steps = [list(s) for s in ins], []
    for pick in path:
        i, j = sorted(pick) if len(pick) == 2 else (pick[0], None)
        if j is None:
            continue
        b, a = work.pop(j), work.pop(i)
        needed = set(out).union(*work)
        rest = [n for n in dict.fromkeys(a + b) if n in needed] if work else out
        steps.append((i, j, a, b, rest))
        work.append(rest)
    return steps


def _chain(ins: list[list[str]], out: list[str], args: list[str], size: Mapping[str, int]) -> str:
    work = list(args)
    for i, j, a, b, rest in _path(ins, out, size):
        y, x = work.pop(j), work.pop(i)
        work.append(contraction([a, b], rest, [x, y], size))
    return work[0]
