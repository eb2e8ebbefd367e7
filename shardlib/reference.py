"""What a program means: every op once more, as its definition and not as its code.

`Op.reference(d, *xs)` is plain torch on whole tensors, float64 where they are floats. In it every tensor has
one dim for each name of the call, in one order, of size 1 where the tensor lacks the name. So operands meet
by name, `d.sum` takes names, and an einsum is what it says: the sum of a product.

>>> from shardlib.language.einsum import EINSUM
>>> from shardlib.spec import parse_signature
>>> ins, outs = parse_signature("T D, F D -> F T")
>>> step = Step(EINSUM, ins, outs, ("x", "w"), ("y",))
>>> x, w = torch.arange(6.).view(2, 3), torch.ones(1, 3)
>>> refer(step, dict(T=2, D=3, F=1), [x, w])
(tensor([[ 3., 12.]]),)

`meaning` runs a program that way, and so knows nothing of types, ranks, layouts or generated code: what they
make of the program is held against it. A conversion is the identity there, since it keeps what its operand
denotes.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, reduce
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from shardlib.errors import SpecError
from shardlib.program import Op, Program, Scan, Step
from shardlib.spec import Spec

Reference = Callable[..., Any]


@cache
def operands(op: Op) -> tuple[int, float]:
    """How many operands a call has, at least and at most: as many as the reference takes."""
    if op.reference is None:
        return (1, 1) if op.moves else (0, math.inf)
    taken = list(signature(op.reference).parameters.values())[1:]
    named = [p for p in taken if p.kind != p.VAR_POSITIONAL]
    return sum(p.default is p.empty for p in named), len(named) if named == taken else math.inf


def check_operands(op: Op, count: int) -> None:
    """SpecError where a call of `op` has more or fewer operands than it takes."""
    least, most = operands(op)
    if not least <= count <= most:
        takes = f"{least}" if least == most else f"{least} or more" if most > 9 else f"{least} to {most}"
        raise SpecError(f"{op.name}: it takes {takes} operand{'s' * (takes != '1')}; {count} "
                        f"{'was' if count == 1 else 'were'} given")


@dataclass(frozen=True)
class Dims:
    """The dims of one call, by name."""
    step: Step
    sizes: Mapping[str, int]
    names: tuple[str, ...]

    @classmethod
    def of(cls, step: Step, sizes: Mapping[str, int]) -> Dims:
        specs = (*step.ins, *step.outs)
        constants = {str(d.size): d.size for s in specs for d in s.dims if not d.factors}
        return cls(step, {**sizes, **constants}, tuple(dict.fromkeys(n for s in specs for n in _names(s))))

    # -- what references are written with --------------------------------------------------------------------

    @property
    def options(self) -> dict[str, Any]:
        return self.step.options

    @property
    def gone(self) -> tuple[str, ...]:
        """The names that the result lacks."""
        return tuple(n for n in self.names if n not in _names(self.step.outs[0]))

    def count(self, *names: str) -> int:
        return math.prod(self.sizes[n] for n in names)

    def index(self, *names: str) -> Tensor:
        """0, 1, 2 ... along `names`, the last one running fastest."""
        at = torch.zeros([1] * len(self.names), dtype=torch.int64)
        for name in names:
            at = (at * self.sizes[name]
                  + torch.arange(self.sizes[name]).view([-1 if n == name else 1 for n in self.names]))
        return at

    def sum(self, x: Tensor, *names: str) -> Tensor:
        """The sum over `names`: by default, over all that the result lacks."""
        return (x.sum([self.names.index(n) for n in names or self.gone], keepdim=True) if names or self.gone
                else x)

    def fold(self, f: Callable[[Tensor, Tensor], Tensor], first: float, x: Tensor, *names: str) -> Tensor:
        """f(f(f(first, x0), x1), x2) ... over the slices of x along `names`:
        by default, along all that the result lacks."""
        for at in (self.names.index(n) for n in names or self.gone):
            start = x.new_full([1 if i == at else n for i, n in enumerate(x.shape)], first)
            x = reduce(f, (x.narrow(at, i, 1) for i in range(x.shape[at])), start)
        return x

    def vjp(self, f: Reference, xs: Sequence[Tensor], g: Tensor, like: Spec) -> tuple[Tensor, ...]:
        """The cotangents of the floats among `xs`, by autograd of the reference `f`, whose result has the
        dims of `like` and the cotangent g."""
        given = [x.detach().requires_grad_(x.is_floating_point()) for x in xs]
        with torch.enable_grad():
            made = f(replace(self, step=replace(self.step, outs=(like,))), *given).expand(g.shape)
        return torch.autograd.grad(made, [x for x in given if x.requires_grad], g)

    # -- from tensors to dims by name, and back --------------------------------------------------------------

    def open(self, x: Tensor, spec: Spec) -> Tensor:
        """A tensor of `spec` with one dim for each name of the call."""
        own = _names(spec)
        x = x.reshape([self.sizes[n] for n in own]).permute([own.index(n) for n in self.names if n in own])
        return x.reshape([self.sizes[n] if n in own else 1 for n in self.names])

    def close(self, x: Tensor, spec: Spec) -> Tensor:
        """The tensor of `spec` that `open` makes x of; repeated along names that x lacks."""
        own = _names(spec)
        x = x.expand([self.sizes[n] if n in own else 1 for n in self.names])
        x = x.permute([self.names.index(n) for n in (*own, *(n for n in self.names if n not in own))])
        return x.reshape(
            [d.size if not d.factors else self.count(*(f.name for f in d.factors)) for d in spec.dims])


def _names(spec: Spec) -> tuple[str, ...]:
    """Every name, groups opened; a constant size is a name, too, but for 1."""
    return tuple(n for d in spec.dims for n in ([f.name for f in d.factors] or [str(d.size)] * (d.size != 1)))


def refer(step: Step, sizes: Mapping[str, int], xs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The results of one step on whole tensors, by its op's reference."""
    d = Dims.of(step, sizes)
    made = step.op.reference(d, *(d.open(x, s) for x, s in zip(xs, step.ins, strict=True)))
    return tuple(d.close(y, s)
                 for y, s in zip(made if isinstance(made, tuple) else (made,), step.outs, strict=True))


def meaning(program: Program, args: Mapping[str, Tensor], sizes: Mapping[str, int]) -> list[Tensor]:
    """The result leaves of a program on whole tensors, given by path; explicit or not, it means the same."""
    values = dict(args)
    for step in program.steps:
        values.update(zip(step.outputs, _step(step, sizes, [values[i] for i in step.inputs]), strict=True))
    return [values[name] for name, _ in program.result_leaves()]


def _step(step: Step, sizes: Mapping[str, int], xs: list[Tensor]) -> Sequence[Tensor]:
    if step.op.moves:
        return xs
    if step.orelse is not None:
        return _apply(step.body if bool(xs[0]) else step.orelse, sizes, xs[1:])
    if step.body is not None:
        return _apply(step.body, sizes, xs) if step.op.name == "fused" else _scan(step, sizes, xs)
    return refer(step, sizes, xs)


def _apply(body: Program, sizes: Mapping[str, int], xs: Sequence[Tensor]) -> list[Tensor]:
    return meaning(body, dict(zip((path for path, _ in body.arg_leaves()), xs, strict=True)), sizes)


def _scan(step: Step, sizes: Mapping[str, int], xs: list[Tensor]) -> list[Tensor]:
    parts = Scan.of(step)
    order, first, last = (-1 if parts.reverse else 1, len(parts.carries),
                          len(parts.carries) + len(parts.stacked))
    carries, kept = xs[:first], []
    for slices in list(zip(*(x.unbind(0) for x in xs[first:last])))[::order]:
        made = _apply(step.body, sizes, [*carries, *slices, *xs[last:]])
        carries = made[:first]
        kept.append(made[first:])
    stacked = zip(*kept[::order]) if kept else [[]] * len(parts.made)
    return [*carries, *(torch.stack(made) if made else xs[0].new_zeros(_shape(s, sizes))
                        for made, s in zip(stacked, step.outs[first:]))]


def _shape(spec: Spec, sizes: Mapping[str, int]) -> list[int]:
    return [d.size if not d.factors else math.prod(sizes[f.name] for f in d.factors) for d in spec.dims]
