"""local: any function of local tensors, its types asserted at the border.

    y = local("B/dp T D, D -> B/dp T D", my_kernel, x, w)

The specs are exact: a dim without axes is whole, and operands are converted to just that; but dims that "..."
stands for, or that are `rows`, stay split as they are. What the function does is not looked into; what it
returns is: as many tensors as the text names, of this rank's shapes, on the operands' device, each of the
first operand's dtype (or as `dtype` says). It may return what it is given, or views of that, and changes none
of it: it works in place on copies only. Its derivative is its own (torch.autograd on each rank); the
cotangent of an operand that is whole on an axis which something in the call uses is owed there. `check_local`
compares it with the function on whole tensors, with random owed pieces. `f` is a function that can be
imported, so that a printed program can name it.

Refused where it runs, in one line: a result that is something else, and an operand that torch has seen
change. Writes that torch does not see (through `x.data`, `x.numpy()`, or the pointer in a kernel of your own)
are found by `check_local`.
"""
from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from shardlib import placement
from shardlib.dtypes import ITEMSIZE, as_they_come
from shardlib.errors import SpecError
from shardlib.language.calls import what
from shardlib.language.local_code import LocalCode
from shardlib.language.steps import Steps
from shardlib.language.value import Operand, apply
from shardlib.layout import EXPLICIT, Layout
from shardlib.mesh import Mesh
from shardlib.program import Op, Step
from shardlib.rules import Rule
from shardlib.spec import Spec, parse_signature, parse_specs


def local(text: str, f: Callable, *operands: Operand, dtype: str | Sequence[str] | None = None,
          rows: Sequence[str] = ()) -> Any:
    """`f` on each rank's tensors, typed as `text` says. `f` takes and returns tensors, and closes over none.

    rows: dims that `f` takes row by row, however many there are, so that they stay split as the layout has
    them; those that "..." stands for always do.
    dtype: of the results, of each by its own name if there are several; by default the first operand's.

    >>> from shardlib import Layout, lower, sharded, simulate
    >>> def running_max(x):                                             # torch, or a kernel of your own
    ...     return x.cummax(1).values
    >>> f = sharded("B T -> B T")(lambda x: local("B/dp T -> B/dp T", running_max, x))
    >>> simulate(f, Layout(B="dp", T="dp"), torch.tensor([[1.0, 3.0, 2.0], [5.0, 4.0, 6.0]]), mesh=Mesh(dp=2))
    tensor([[1., 3., 3.],
            [5., 5., 6.]])
    >>> check_local("B/dp T -> B/dp T", running_max, dict(B=3, T=5), Mesh(dp=2))
    """
    if not callable(f) or not operands:
        raise SpecError(f"local: {what(f)} is no function" if not callable(f)
                        else f"local: {_short(f)} is given no operand")
    if getattr(f, "__closure__", None):
        raise SpecError(f"local: {_name(f)} closes over {', '.join(f.__code__.co_freevars)}; pass what it "
                        "needs as operands")
    dots = [n for spec, x in zip(parse_signature(text)[0], operands) if spec and spec.ellipsis
            for d in getattr(x, "spec", Spec()).dims[:-len(spec.dims) or None] for n in d.names[:1]]
    more: dict[str, Any] = {"rows": kept} if (kept := tuple(dict.fromkeys((*rows, *dots)))) else {}
    if dtype is None:
        return apply(local_op(f), operands, text, **more)
    kinds = (dtype,) * len(parse_signature(text)[1]) if isinstance(dtype, str) else tuple(dtype)
    if wrong := next((kind for kind in kinds if kind not in ITEMSIZE), None):
        raise SpecError(f"local: dtype is {wrong!r}; it is one of {', '.join(ITEMSIZE)}")
    return apply(local_op(f), operands, text, dtype=kinds, **more)


@cache
def local_op(f: Callable) -> Op:
    """The op that runs `f`. Its types are those of its text: nothing is completed, nothing follows."""
    return Op("local", rule=lambda s: Rule(), asserted=True, function=f,
              vjp=lambda b, s, ct: _vjp(f, b, s, ct), emit=lambda e, s, a: _emit(f, e, s, a),
              keywords={"dtype": _names, "rows": _rows}, reads=as_they_come,
              dtype=lambda d, options: options.get("dtype") or repeat(d[0]))


@cache
def local_vjp_op(f: Callable) -> Op:
    return Op("local_vjp", rule=lambda s: Rule(), asserted=True, function=f,
              emit=lambda e, s, a: f"{e.use(local_vjp)}({e.use(f)}, {len(s.outs)}, {', '.join(a)})",
              reads=as_they_come, dtype=lambda d, o: d)


def _names(dtype: Any) -> bool:
    return (dtype is None or isinstance(dtype, tuple)
            and all(isinstance(kind, str) and kind in ITEMSIZE for kind in dtype))


def _rows(rows: Any) -> bool:
    return rows is None or isinstance(rows, tuple) and all(isinstance(n, str) for n in rows)


def row_axes(step: Step, types: Sequence[Spec], layout: Layout,
             mesh: Mesh) -> dict[str, tuple[str, ...]]:
    """How the dims are split that `f` takes row by row: as the layout has them, by axes that the text gives
    no other dim; in explicit text as the operands, of these types, are."""
    rows = step.op.asserted and step.options.get("rows") or ()
    if layout == EXPLICIT:
        return {f.name: f.axes for t in types for d in t.dims for f in d.factors[:1] if f.name in rows}
    said = [s.resolve(mesh) for s in (*step.ins, *step.outs)]
    pinned = {f.name: f.axes for s in said for d in s.dims for f in d.factors if f.name not in rows}
    return layout.complete(rows, pinned, (o.axis for s in said for o in s.owed))


def _emit(f: Callable, e: LocalCode, step: Step, args: Sequence[str]) -> str:
    shapes, kinds = tuple(map(e.shape, step.outs)), step.options.get("dtype", (None,) * len(step.outs))
    if len(kinds) != len(shapes):
        raise SpecError(f"local: dtype names {len(kinds)}, the text has {len(shapes)} results")
    return f"{e.use(run_local)}({e.use(f)}, {shapes}, {kinds}, {', '.join(args)})"


def run_local(f: Callable, shapes: Sequence[tuple[int, ...]], dtypes: Sequence[str | None],
              *operands: Tensor) -> Any:
    """What `f` returns for `operands`.

    SpecError unless it has these shapes and dtypes (None: the first operand's), and they are as they were.
    """
    if torch.compiler.is_compiling():               # what is traced counts no writes
        return f(*operands)
    with _unchanged(f, operands) as given:
        made = f(*given)
    results = made if isinstance(made, tuple) else (made,)
    if len(results) != len(shapes):
        raise SpecError(f"local: {_short(f)} returns {len(results)}, its text names {len(shapes)} results")
    for i, (result, shape, dtype) in enumerate(zip(results, shapes, dtypes), 1):
        if wrong := _wrong(result, shape, getattr(torch, dtype) if dtype else operands[0].dtype,
                           operands[0].device):
            raise SpecError(f"local: {_short(f)} returns {wrong}" if len(shapes) == 1
                            else f"local: result {i} of {_short(f)} is {wrong}")
    return made


def _wrong(result: Any, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> str | None:
    """What a result is instead of what it is to be."""
    if not isinstance(result, Tensor):
        return f"a {type(result).__name__}, no tensor"
    if result.shape != shape:
        return f"{tuple(result.shape)}, its text says {shape} on this rank"
    if result.dtype != dtype:
        return (f"{_kind(result.dtype)}, not {_kind(dtype)}; where that is meant, say "
                f"dtype={_kind(result.dtype)!r}")
    return f"a tensor on {result.device}, its operands are on {device}" if result.device != device else None


@contextmanager
def _unchanged(f: Callable, operands: Sequence[Tensor]) -> Iterator[Sequence[Tensor]]:
    """The operands, such that torch counts what is written to them.

    SpecError at the end if anything was: others may read them.
    """
    with ExitStack() as around:
        if torch.is_inference_mode_enabled() or any(x.is_inference() for x in operands):
            around.enter_context(torch.inference_mode(False))
            around.enter_context(torch.no_grad())
            operands = [_counting(x) for x in operands]
        before = [x._version for x in operands]
        yield operands
        changed = next((i for i, x in enumerate(operands) if x._version != before[i]), None)
    if changed is not None:
        raise SpecError(f"local: {_short(f)} changes {_argument(f, changed)} in place, which others may "
                        "read; let it work on a copy")


def _counting(x: Tensor) -> Tensor:
    """The same elements as a tensor that counts what is written to it,
    which those of inference mode do not."""
    if not x.is_inference():
        return x
    return torch.empty(0, dtype=x.dtype,
                       device=x.device).set_(x.untyped_storage(), x.storage_offset(), x.size(), x.stride())


def local_vjp(f: Callable, count: int, *args: Tensor) -> Any:
    """The cotangents of the first `count` of `args`, the operands; the rest are the results' cotangents."""
    with _unchanged(f, args) as given, torch.enable_grad():
        xs = [x.detach().requires_grad_(x.is_floating_point()) for x in given[:count]]
        out = f(*xs)
        through = [(y, ct) for y, ct in zip(out if isinstance(out, tuple) else (out,), given[count:])
                   if y.requires_grad]
        if not through:
            raise SpecError(f"local: torch knows no derivative of {_short(f)}; make it a "
                            "torch.autograd.Function, or call stop_gradient")
        ys, cotangents = zip(*through)
        found = iter(
            torch.autograd.grad(ys, [x for x in xs if x.requires_grad], cotangents, allow_unused=True))
    made = tuple(torch.zeros_like(x) if not x.requires_grad or (g := next(found)) is None else g for x in xs)
    return made if len(made) > 1 else made[0]


def _vjp(f: Callable, b: Steps, step: Step, cotangents: Sequence[str]) -> list[str]:
    busy = [a for a in b.mesh.axes
            if any(a in s.split_axes or a in s.owed_axes for s in (*step.ins, *step.outs))]
    kinds = [s.owing(*(a for a in busy if a not in s.split_axes and a not in s.owed_axes)) for s in step.ins]
    return list(b.add(local_vjp_op(f), [*step.inputs, *cotangents], kinds))


def _argument(f: Callable, i: int) -> str:
    """What `f` calls its operand i; a cotangent has no name there."""
    try:
        names = list(inspect.signature(f).parameters)
    except (TypeError, ValueError):
        names = []
    return names[i] if i < len(names) else f"operand {i + 1}"


def _kind(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _short(f: Callable) -> str:
    return getattr(f, "__name__", type(f).__name__)


def _name(f: Callable) -> str:
    return f"{getattr(f, '__module__', '?')}:{getattr(f, '__qualname__', repr(f))}"


def check_local(text: str, f: Callable, sizes: Mapping[str, int], mesh: Mesh, whole: Callable | None = None,
                trials: int = 3) -> None:
    """SpecError unless `f` on every rank's pieces is `whole` (by default `f`) on whole tensors,
    value and derivative.

    Operands are drawn at random, fp64, pieces of owed sums too; `f` may write to none of them, in whatever
    way.
    """
    written = parse_specs(text, f'local "{text}": "*" belongs in the signature of a @sharded function')
    ins, outs = (tuple(s.resolve(mesh) for s in side) for side in written)
    generator = torch.Generator().manual_seed(0)
    for _ in range(trials):
        xs = [torch.randn(mesh.local_shape(s.whole(), sizes, {}), generator=generator, dtype=torch.float64,
                          device="cpu") for s in ins]
        pieces = [placement.place(x, s, sizes, mesh, generator) for x, s in zip(xs, ins)]
        for rank in range(mesh.world_size):
            _check_call(text, f, [p[rank] for p in pieces],
                        [mesh.local_shape(s, sizes, mesh.coordinate(rank)) for s in outs])
        dense = _tuple((whole or f)(*(x.requires_grad_() for x in xs)))
        ranks = [_tuple(f(*(p[r].requires_grad_() for p in pieces))) for r in range(mesh.world_size)]
        for i, (want, kind) in enumerate(zip(dense, outs)):
            _same(f"{_name(f)}: result {i + 1}", text,
                  _join([r[i].detach() for r in ranks], kind, sizes, mesh), want.detach())
        seeds = [torch.randn(d.shape, generator=generator, dtype=torch.float64, device="cpu") for d in dense]
        want = torch.autograd.grad(dense, xs, seeds, allow_unused=True)
        busy = [a for a in mesh.axes if any(a in s.split_axes or a in s.owed_axes for s in (*ins, *outs))]
        placed = [placement.place(s, k.owing(), sizes, mesh) for s, k in zip(seeds, outs)]
        got = [torch.autograd.grad(ranks[r], [p[r] for p in pieces], [c[r] for c in placed],
                                   allow_unused=True) for r in range(mesh.world_size)]
        for i, (x, kind) in enumerate(zip(xs, ins)):
            dual = kind.owing(*(a for a in busy if a not in kind.split_axes and a not in kind.owed_axes))
            local_grads = [g[i] if g[i] is not None else torch.zeros_like(pieces[i][r])
                           for r, g in enumerate(got)]
            _same(f"{_name(f)}: the gradient of operand {i + 1}", text, _join(local_grads, dual, sizes, mesh),
                  want[i] if want[i] is not None else torch.zeros_like(x))


def _check_call(text: str, f: Callable, operands: Sequence[Tensor],
                shapes: Sequence[tuple[int, ...]]) -> None:
    """SpecError unless `f` returns tensors of these shapes, and its operands hold the same bits as before."""
    before = [x.clone() for x in operands]
    with torch.no_grad():
        made = [tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__ for y in _tuple(f(*operands))]
    if made != list(shapes):
        raise SpecError(
            f'{_name(f)} returns {", ".join(map(str, made))}; "{text}" says {", ".join(map(str, shapes))}')
    if changed := [_argument(f, i) for i, (x, y) in enumerate(zip(operands, before))
                   if not torch.equal(x.view(torch.int64), y.view(torch.int64))]:
        raise SpecError(
            f"{_name(f)} changes {', '.join(changed)}, which others may read; let it work on a copy")


def _join(pieces: Sequence[Tensor], kind: Spec, sizes: Mapping[str, int], mesh: Mesh) -> Tensor | None:
    try:
        return placement.join(pieces, kind, sizes, mesh)
    except placement.NotReplicated:
        return None


def _same(who: str, text: str, got: Tensor | None, want: Tensor) -> None:
    if got is None or not torch.allclose(got, want, rtol=1e-9, atol=1e-9):
        parts = "put together, it is not that of the whole"
        why = "its copies differ between ranks" if got is None else parts
        raise SpecError(f'{who} is not of the type that "{text}" asserts: {why}')


def _tuple(x: Any) -> tuple:
    return x if isinstance(x, tuple) else (x,)
