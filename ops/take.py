"""Lookups: `embedding` picks rows of a table, `take` entries along a dim; `scatter_add` puts them back, and
`one_hot` says where.

On one axis: all are linear in what they pick from, or put; a split table dim (`V/tp`) is legal, rows outside
of the own range are zero and the result owes, as what is put owes the splits of the dims that are gone. An
index outside of the whole table is an error
(`shardlib.lowering.index_check`); where that comes later, its row is zero until then.
"""
from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from shardlib.dtypes import ITEMSIZE
from shardlib.errors import SpecError
from shardlib.language.constants import typed
from shardlib.language.local_code import LocalCode
from shardlib.language.steps import Steps
from shardlib.language.value import Operand, Value, apply
from shardlib.lowering.index_check import IndexSite
from shardlib.ops.lookups import looked_up, looks_up
from shardlib.program import Op, Step
from shardlib.reference import Dims
from shardlib.rules import Rule
from shardlib.spec import Spec, parse_specs


def local(index: Tensor, start: int, size: int, site: IndexSite) -> tuple[Tensor, Tensor]:
    """Positions in the own range, clamped, and which of them are inside."""
    site.look(index)
    here = index - start if start else index
    near = here.clamp(0, max(size - 1, 0))
    return near, near == here if size else torch.zeros_like(here, dtype=torch.bool)


def rows_of(ids: Tensor, table: Tensor, start: int, site: IndexSite) -> Tensor:
    """Rows ids - start of the own part of a table; zero where they are another rank's."""
    if site.torch_looks(ids, table.shape[0]):
        try:
            return F.embedding(ids, table)
        except IndexError as error:
            raise site.instead_of(error, ids) from None
    if looks_up(site, table, ids, 0):
        return looked_up(site, table, ids, 0, start)
    here, inside = local(ids, start, table.shape[0], site)
    if table.shape[0] == 0:
        return table.new_zeros((*ids.shape, table.shape[1]))
    return torch.where(inside[..., None], F.embedding(here, table), False if table.dtype == torch.bool else 0)


def rows_vjp(ids: Tensor, g: Tensor, start: int, size: int, site: IndexSite) -> Tensor:
    """The cotangent of the table's own rows."""
    out = g.new_zeros((size, g.shape[-1]))
    if site.torch_looks(ids, size):
        try:
            return out.index_add_(0, ids.reshape(-1), g.reshape(ids.numel(), g.shape[-1]))
        except (IndexError, RuntimeError) as error:
            raise site.instead_of(error, ids) from None
    here, inside = local(ids, start, size, site)
    if site.seen is None:
        return out.index_add_(0, here[inside], g[inside])
    return (out.index_add_(0, here.reshape(-1),
                           torch.where(inside[..., None], g, 0).reshape(ids.numel(), g.shape[-1])) if size
            else out)


def pick(x: Tensor, index: Tensor, dim: int, start: int, site: IndexSite) -> Tensor:
    """x at `index` along `dim`; `index` has the dims of x, with 1 at `dim` and where it has none."""
    shape = [1 if i == dim else n for i, n in enumerate(x.shape)]
    if site.torch_looks(index, x.shape[dim]):
        try:
            return x.gather(dim, index.expand(shape)).squeeze(dim)
        except (IndexError, RuntimeError) as error:
            raise site.instead_of(error, index) from None
    if dim > 0 and looks_up(site, x, index, dim):
        return looked_up(site, x, index, dim, start)
    here, inside = local(index, start, x.shape[dim], site)
    if x.shape[dim] == 0:
        return x.new_zeros([n for i, n in enumerate(shape) if i != dim])
    return torch.where(inside, x.gather(dim, here.expand(shape)),
                       False if x.dtype == torch.bool else 0).squeeze(dim)


def add_rows(x: Tensor, index: Tensor, rows: int, size: int, start: int, site: IndexSite) -> Tensor:
    """(rows, size, rest): zeros, and x, (rows, times, rest), added at index - start, (rows, times)."""
    out = x.new_zeros((rows * size, *x.shape[2:]))
    here, inside = local(index, start, size, site)
    here = here + size * torch.arange(rows, device=index.device)[:, None]
    x = torch.where(inside.reshape(*inside.shape, *[1] * (x.ndim - 2)), x, 0)
    if size:
        out.index_add_(0, here.flatten(), x.flatten(0, 1))
    return out.unflatten(0, (rows, size))


def _embed(e: LocalCode, step: Step, args: list[str]) -> str:
    table = step.ins[1]
    site = e.index_site(step, 0, args[0], table.dims[0], "ids")
    return f"{e.use(rows_of)}({args[0]}, {args[1]}, {e.rows(table.dims[0])[0]}, {site})"


def _embed_vjp(b: Steps, step: Step, ct: Sequence[str]) -> list[str | None]:
    return [None, b.call(EMBEDDING_VJP, [step.inputs[0], ct[0]], outs=(step.ins[1].owing(),))]


def _embed_back(e: LocalCode, step: Step, args: list[str]) -> str:
    (out,) = step.outs
    start, size = e.rows(out.dims[0])
    return (f"{e.use(rows_vjp)}({args[0]}, {args[1]}, {start}, {size}, "
            f"{e.index_site(step, 0, args[0], out.dims[0], 'ids', op='embedding')})")


def _gone(x: Spec, out: Spec) -> str:
    return next(n for n in x.labels if n not in out.labels)


def along(arg: str, narrow: Spec, like: Spec) -> str:
    """A variable with the dims of `like`, in its order, 1 where it has none."""
    index = [":" if n in narrow.labels else "None" for n in like.labels]
    arg = permuted(arg, narrow.labels, [n for n in like.labels if n in narrow.labels])
    return f"{arg}[{', '.join(index)}]" if "None" in index else arg


def lacks_one(ins: Sequence[Spec], outs: Sequence[Spec]) -> bool:
    """Whether these are the specs of "B T D, B -> B D": one result, which lacks one dim of the first operand
    and has all of the second one's."""
    if (len(ins), len(outs)) != (2, 1):
        return False
    (x, index), (out,) = ins, outs
    kept = [n for n in x.labels if n in out.labels]
    return (len(x.labels) == len(out.labels) + 1 and kept == list(out.labels)
            and set(index.labels) <= set(out.labels))


def takes_at(ins: Sequence[Spec], outs: Sequence[Spec]) -> bool:
    """Whether these are the specs of "B S D, B T -> B T D": one result, which has the dims of both operands,
    in their order, but for one of the first."""
    if (len(ins), len(outs)) != (2, 1):
        return False
    (x, index), (out,) = ins, outs
    kept = [n for n in x.labels if n in out.labels]
    return (len(kept) == len(x.labels) - 1 and {*out.labels} == {*kept, *index.labels}
            and [n for n in out.labels if n in x.labels] == kept
            and [n for n in out.labels if n in index.labels] == [*index.labels])


def _at(x: Spec, out: Spec) -> Spec:
    """The dims of the result and the one of x that goes, in its place before those of x that follow it."""
    place = x.labels.index(gone := _gone(x, out))
    behind = next((out.labels.index(n) for n in x.labels[place + 1:]), len(out.dims))
    return Spec((*out.dims[:behind], x.dim(gone), *out.dims[behind:]))


def _take(e: LocalCode, step: Step, args: list[str]) -> str:
    (x, index), (out,) = step.ins, step.outs
    dim, like = x.dim(_gone(x, out)), _at(x, out)
    site = e.index_site(step, 1, args[1], dim, "index")
    wide = f".expand({e.shape(like)})" if len(like.dims) > len(x.dims) else ""
    return (f"{e.use(pick)}({along(args[0], x, like)}{wide}, {along(args[1], index, like)}, "
            f"{like.labels.index(dim.label)}, {e.rows(dim)[0]}, {site})")


def _take_vjp(b: Steps, step: Step, ct: Sequence[str]) -> list[str | None]:
    return [b.call(SCATTER_ADD, [ct[0], step.inputs[1]], outs=(step.ins[0].owing(),)), None]


def _scatter(e: LocalCode, step: Step, args: list[str]) -> str:
    """By rows, times (what the result lacks), and what is the same at all of them."""
    (x, index), (out,) = step.ins, step.outs
    dim = out.dim(_gone(out, x))
    rows = [n for n in index.labels if n in out.labels]
    rest = [n for n in x.labels if n not in index.labels]
    start, size = e.rows(dim)
    times = [n for n in index.labels if n not in out.labels]
    site = e.index_site(step, 1, args[1], dim, "index")
    sizes = {**dict(zip(x.labels, e.shape(x))), dim.label: size}
    n, m, wide = prod(sizes[r] for r in rows), prod(sizes[t] for t in times), tuple(sizes[r] for r in rest)
    what = f"{permuted(args[0], x.labels, (*rows, *times, *rest))}.reshape({(n, m, *wide)})"
    where = f"{permuted(args[1], index.labels, (*rows, *times))}.reshape({(n, m)})"
    made = f"{e.use(add_rows)}({what}, {where}, {n}, {size}, {start}, {site})"
    order = (*rows, dim.label, *rest)
    return permuted(f"{made}.view({tuple(sizes[name] for name in order)})", order, out.labels)


def permuted(text: str, have: Sequence[str], want: Sequence[str]) -> str:
    """A tensor's dims in another order."""
    order = tuple(map([*have].index, want))
    return text if order == tuple(range(len(order))) else f"{text}.permute({order})"


def hot(ids: Tensor, dim: int, start: int, size: int, dtype: torch.dtype, site: IndexSite) -> Tensor:
    """1 at ids - start along a new dim of the own size, 0 elsewhere."""
    site.look(ids)
    own = torch.arange(start, start + size, device=ids.device)
    return (ids.unsqueeze(dim) == own.view([-1] + [1] * (ids.ndim - dim))).to(dtype)


def _one_hot(e: LocalCode, step: Step, args: list[str]) -> str:
    (dim,) = (d for d in step.outs[0].dims if d.label not in step.ins[0].labels)
    start, size = e.rows(dim)
    return (f"{e.use(hot)}({args[0]}, {step.outs[0].dims.index(dim)}, {start}, {size}, "
            f"torch.{step.options['dtype']}, {e.index_site(step, 0, args[0], dim, 'ids')})")


def _hot_reference(d: Dims, ids: Tensor) -> Tensor:
    made = [n for n in d.step.outs[0].names if n not in d.step.ins[0].names]
    return typed(d.index(*made) == ids, d)


def _reference(d: Dims, x: Tensor, index: Tensor) -> Tensor:
    """The sum of x where the one dim that goes is at `index`."""
    return d.sum(torch.where(d.index(*d.gone) == index, x, 0))


def _added(d: Dims, x: Tensor, index: Tensor) -> Tensor:
    """The sum of x over what goes, where the one dim that is made is at `index`."""
    made = [n for n in d.step.outs[0].names if all(n not in s.names for s in d.step.ins)]
    return d.sum(torch.where(d.index(*made) == index, x, 0))


EMBEDDING = Op("embedding", rule=lambda s: Rule(linear=((1,),), sums=s.ins[1].dims[0].names), emit=_embed,
               vjp=_embed_vjp, index=(0,), dtype=lambda d, o: [d[1]],
               reference=lambda d, ids, table: _reference(d, table, ids))
EMBEDDING_VJP = Op("embedding_vjp", rule=lambda s: Rule(linear=((1,),), sums=s.ins[0].names),
                   emit=_embed_back, index=(0,), dtype=lambda d, o: [d[1]],
                   reference=lambda d, ids, g: _added(d, g, ids))
TAKE = Op("take", rule=lambda s: Rule(linear=((0,),), sums=s.ins[0].dim(_gone(s.ins[0], s.outs[0])).names),
          emit=_take, vjp=_take_vjp, index=(1,), reference=_reference)
SCATTER_ADD = Op("scatter_add", rule=lambda s: Rule(linear=((0,),), sums=s.ins[0].names), emit=_scatter,
                 index=(1,), reference=_added, takes=("number", "index"),
                 vjp=lambda b, s, ct: [b.call(TAKE, [ct[0], s.inputs[1]], outs=(s.ins[0].owing(),)), None])


ONE_HOT = Op("one_hot", keywords={"dtype": lambda v: v in ITEMSIZE}, rule=lambda s: Rule(), emit=_one_hot,
             index=(0,), constant=True, dtype=lambda d, o: [o["dtype"]], reference=_hot_reference)


def embedding(text: str, ids: Operand, table: Operand) -> Value:
    """Rows of a table, the row of each id.

    Of a split table each rank gives the rows that it has, zeros for the others, and the sum is owed.
    Refused, where it runs: an id outside of the whole table.

    >>> from shardlib import Layout, Mesh, lower, sharded
    >>> f = sharded("B T, V D -> B T D")(lambda ids, table: embedding("B T, V D -> B T D", ids, table))
    >>> lower(f, Layout(B="dp", V="tp", T="tp"), mesh=Mesh(dp=2, tp=4))
    @sharded("B/dp T/tp, V/tp D -> B/dp T/tp D", layout=EXPLICIT)
    def f(ids, table):
        ids2 = all_gather("B/dp T/tp -> B/dp T", ids)
        v1 = embedding("B/dp T, V/tp D -> B/dp T D +tp", ids2, table)
        v = reduce_scatter("B/dp T D +tp -> B/dp T/tp D", v1)
        return v
    """
    meant = f'embedding "{text}": the specs are those of "B T, V D -> B T D"'
    ins, outs = parse_specs(text, meant)
    if (len(ins) != 2 or len(outs) != 1 or len(ins[1].dims) != 2
        or outs[0].labels != (*ins[0].labels, ins[1].labels[1])):
        raise SpecError(meant)
    return apply(EMBEDDING, (ids, table), text)


def take(text: str, x: Operand, index: Operand) -> Value:
    """x at `index` along the one dim that the result lacks; over a split one the sum is owed.

    An index is one of the whole dim; its dims are those of x, or others: "B S D, B T -> B T D" gathers T
    entries of each row. The last token of each row, where rows have padding behind it:

    >>> import torch
    >>> from shardlib import Layout, Mesh, sharded, simulate
    >>> f = sharded("B T D, B -> B D")(lambda x, last: take("B T D, B -> B D", x, last))
    >>> x = torch.tensor([[[1.0], [2.0], [0.0]], [[3.0], [4.0], [5.0]]])
    >>> simulate(f, Layout(T="cp"), x, torch.tensor([1, 2]), mesh=Mesh(cp=2))
    tensor([[2.],
            [5.]])
    """
    meant = (f'take "{text}": the specs are those of "B T D, B -> B D" or "B S D, B T -> B T D": the result '
             'lacks one dim of the first operand, and has those of the index; all keep their order')
    if not takes_at(*parse_specs(text, meant)):
        raise SpecError(meant)
    return apply(TAKE, (x, index), text)


def scatter_add(text: str, x: Operand, index: Operand) -> Value:
    """x put at `index` along the one dim that is new in the result, and 0 elsewhere.

    What comes to one place is added up: it is the transpose of `take`.

    The dims that go are among the index's: over a split one the sum is owed. The new dim may be split: each
    rank puts what is in its range. Its size is said by `sizes=` where no argument has it. Refused, where it
    runs: an index outside of it.

    >>> import torch
    >>> from shardlib import compile, sharded
    >>> @sharded("T D, T -> E D")
    ... def by_expert(x, expert):
    ...     return scatter_add("T D, T -> E D", x, expert)
    >>> compile(by_expert, sizes=dict(E=3))(torch.tensor([[1.0], [2.0], [5.0]]), torch.tensor([2, 0, 2]))
    tensor([[2.],
            [0.],
            [6.]])
    """
    meant = (f'scatter_add "{text}": the specs are those of "B T D, B T -> B S D", the other way round than '
             'those of take "B S D, B T -> B T D"')
    ins, outs = parse_specs(text, meant)
    if (len(ins), len(outs)) != (2, 1) or not takes_at((*outs, ins[1]), ins[:1]):
        raise SpecError(meant)
    return apply(SCATTER_ADD, (x, index), text)


def one_hot(text: str, ids: Operand, *, dtype: str = "float32") -> Value:
    """1 where the dim that is new in the result is at the id, 0 elsewhere; each rank makes its own piece.

    Refused, where it runs: an id outside of that dim, whose size `sizes=` says where no argument has it.

    >>> import torch
    >>> from shardlib import compile, sharded
    >>> f = sharded("B -> B V")(lambda ids: one_hot("B -> B V", ids, dtype="int64"))
    >>> compile(f, sizes=dict(V=3))(torch.tensor([2, 0]))
    tensor([[0, 0, 1],
            [1, 0, 0]])
    """
    meant = f'one_hot "{text}": the specs are those of "B -> B V": the result has one dim more, else the same'
    ins, outs = parse_specs(text, meant)
    if ((len(ins), len(outs)) != (1, 1) or len(outs[0].dims) != len(ins[0].dims) + 1
        or [n for n in outs[0].labels if n in ins[0].labels] != [*ins[0].labels]):
        raise SpecError(meant)
    if dtype not in ITEMSIZE:
        raise SpecError(f"one_hot: dtype is {dtype!r}; it is one of {', '.join(ITEMSIZE)}")
    return apply(ONE_HOT, (ids,), text, dtype=dtype)


TABLE = {op.name: op for op in (EMBEDDING, EMBEDDING_VJP, TAKE, SCATTER_ADD, ONE_HOT)}
