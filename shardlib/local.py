"""local: any function of local tensors, its types asserted at the border.

    y = local("B/dp T D, D -> B/dp T D", my_kernel, x, w)

The specs are exact: a dim without axes is whole, and operands are converted to just that. What the function does is not
looked into. Its derivative is its own (torch.autograd on each rank); the cotangent of an operand that is whole on an axis
which something in the call uses is owed there. `check_local` compares it with the function on whole tensors, with random
owed pieces. `f` is a function that can be imported, so that a printed program can name it.
"""
from __future__ import annotations

from functools import lru_cache
from typing import Any, Callable, Mapping, Sequence

import torch
from torch import Tensor

from shardlib import testing
from shardlib.dtypes import as_they_come
from shardlib.errors import SpecError
from shardlib.mesh import Mesh
from shardlib.program import Op, Step
from shardlib.rules import Rule
from shardlib.spec import Spec, parse_signature
from shardlib.trace import apply


def local(text: str, f: Callable, *operands: Any) -> Any:
    """`f` on each rank's tensors, typed as `text` says. `f` takes and returns tensors, and closes over none."""
    if getattr(f, "__closure__", None):
        raise SpecError(f"local: {_name(f)} closes over {', '.join(f.__code__.co_freevars)}; pass what it needs as operands")
    return apply(local_op(f), operands, text)


@lru_cache(maxsize=None)
def local_op(f: Callable) -> Op:
    """The op that runs `f`. Its types are those of its text: nothing is completed, nothing follows."""
    return Op("local", rule=lambda s: Rule(), asserted=True, function=f, vjp=_vjp, reads=as_they_come,
              emit=lambda e, s, a: f"{e.use(f)}({', '.join(a)})")


@lru_cache(maxsize=None)
def local_vjp_op(f: Callable) -> Op:
    return Op("local_vjp", rule=lambda s: Rule(), asserted=True, function=f,
              emit=lambda e, s, a: f"{e.use(local_vjp)}({e.use(f)}, {len(s.outs)}, {', '.join(a)})", reads=as_they_come, dtype=lambda d, o: d)


def local_vjp(f: Callable, count: int, *args: Tensor) -> Any:
    """The cotangents of the first `count` of `args`, the operands; the rest are the results' cotangents."""
    xs = [x.detach().requires_grad_(x.is_floating_point()) for x in args[:count]]
    with torch.enable_grad():
        out = f(*xs)
    outs = out if isinstance(out, tuple) else (out,)
    grads = torch.autograd.grad(outs, [x for x in xs if x.requires_grad], args[count:], allow_unused=True)
    found = iter(grads)
    made = tuple(torch.zeros_like(x) if not x.requires_grad or (g := next(found)) is None else g for x in xs)
    return made if len(made) > 1 else made[0]


def _vjp(b: Any, step: Step, cotangents: Sequence[str]) -> list[str]:
    f = step.op.function
    busy = [a for a in b.mesh.axes if any(a in s.split_axes or a in s.owed_axes for s in (*step.ins, *step.outs))]
    kinds = [s.owing(*(a for a in busy if a not in s.split_axes and a not in s.owed_axes)) for s in step.ins]
    return list(b.add(local_vjp_op(f), [*step.inputs, *cotangents], kinds))


def _name(f: Callable) -> str:
    return f"{getattr(f, '__module__', '?')}:{getattr(f, '__qualname__', repr(f))}"


def check_local(text: str, f: Callable, sizes: Mapping[str, int], mesh: Mesh, whole: Callable | None = None, trials: int = 3) -> None:
    """SpecError unless `f` on every rank's pieces is `whole` (by default `f`) on whole tensors, value and derivative.

    Operands are drawn at random, fp64, pieces of owed sums too.
    """
    ins, outs = (tuple(s.resolve(mesh) for s in side) for side in parse_signature(text))
    generator = torch.Generator().manual_seed(0)
    for _ in range(trials):
        xs = [torch.randn(mesh.local_shape(s.whole(), sizes, {}), generator=generator, dtype=torch.float64, device="cpu") for s in ins]
        pieces = [testing.place(x, s, sizes, mesh, generator) for x, s in zip(xs, ins)]
        dense = _tuple((whole or f)(*(x.requires_grad_() for x in xs)))
        ranks = [_tuple(f(*(p[r].requires_grad_() for p in pieces))) for r in range(mesh.world_size)]
        for i, (want, kind) in enumerate(zip(dense, outs)):
            _same(f"{_name(f)}: result {i + 1}", text, _join([r[i].detach() for r in ranks], kind, sizes, mesh), want.detach())
        seeds = [torch.randn(d.shape, generator=generator, dtype=torch.float64, device="cpu") for d in dense]
        want = torch.autograd.grad(dense, xs, seeds, allow_unused=True)
        busy = [a for a in mesh.axes if any(a in s.split_axes or a in s.owed_axes for s in (*ins, *outs))]
        placed = [testing.place(s, k.owing(), sizes, mesh) for s, k in zip(seeds, outs)]
        got = [torch.autograd.grad(ranks[r], [p[r] for p in pieces], [c[r] for c in placed], allow_unused=True) for r in range(mesh.world_size)]
        for i, (x, kind) in enumerate(zip(xs, ins)):
            dual = kind.owing(*(a for a in busy if a not in kind.split_axes and a not in kind.owed_axes))
            local_grads = [g[i] if g[i] is not None else torch.zeros_like(pieces[i][r]) for r, g in enumerate(got)]
            _same(f"{_name(f)}: the gradient of operand {i + 1}", text, _join(local_grads, dual, sizes, mesh),
                  want[i] if want[i] is not None else torch.zeros_like(x))


def _join(pieces: Sequence[Tensor], kind: Spec, sizes: Mapping[str, int], mesh: Mesh) -> Tensor | None:
    try:
        return testing.join(pieces, kind, sizes, mesh)
    except testing.NotReplicated:
        return None


def _same(who: str, text: str, got: Tensor | None, want: Tensor) -> None:
    if got is None or not torch.allclose(got, want, rtol=1e-9, atol=1e-9):
        raise SpecError(f'{who} is not of the type that "{text}" asserts: '
                        f'{"its copies differ between ranks" if got is None else "put together, it is not that of the whole"}')


def _tuple(x: Any) -> tuple:
    return x if isinstance(x, tuple) else (x,)
