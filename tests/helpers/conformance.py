"""What every communicator must do, as data: cases, their inputs, and an oracle in one process.

A `Case` is plain data. Every rank draws the inputs of all members from the case's seed, computes what it
should receive, and compares: moved data, integers and maxima bit for bit, sums within twice torch's own
error (of more than four members, within that of the worst order), and bit for bit where the communicator
calls itself deterministic. Arguments must be left alone, and
results must alias nothing.

    failures = check(case, coordinator)         on every member of the group, with the same case; [] is a pass
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import permutations

import torch
from torch import Tensor

from shardlib.distributed import GroupCoordinator
from shardlib.errors import SpecError

FLOATS = ("float64", "float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")
INTEGERS = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")
DTYPES = (*FLOATS, *INTEGERS, "bool", "complex64")
LAYOUTS = ("contiguous", "transposed", "sliced", "offset", "expanded", "overlapping", "grad")
COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "gather", "send")
REFUSED = {("sum", "bool"), ("max", "complex64"), ("max", "uint64")}


@dataclass(frozen=True)
class Case:
    """One call.

    `sizes` along `dim` for all_gather, reduce_scatter, gather; `rows[i][j]` from i to j for all_to_all.
    """
    collective: str
    axes: tuple[str, ...]
    dtype: str
    shape: tuple[int, ...]
    dim: int = 0
    sizes: tuple[int, ...] = ()
    op: str = "sum"
    layout: str = "contiguous"
    special: bool = False
    root: int = 0
    rows: tuple[tuple[int, ...], ...] = ()
    seed: int = 0


# -- inputs --------------------------------------------------------------------------------------------------

def draw(shape: Sequence[int], case: Case, key: int) -> Tensor:
    """A tensor of the case's dtype, layout and kind of values; the same on every rank for the same key."""
    generator = torch.Generator().manual_seed(case.seed * 1_000_003 + key)
    return arrange(_values(tuple(shape), case, generator), case.layout)


def _values(shape: tuple[int, ...], case: Case, generator: torch.Generator) -> Tensor:
    dtype = getattr(torch, case.dtype)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    if case.dtype in INTEGERS:
        return torch.randint(0, 256, (*shape, dtype.itemsize), generator=generator,
                             dtype=torch.uint8).view(dtype).view(shape)
    x = torch.randn(shape, generator=generator, dtype=torch.complex64 if dtype.is_complex else torch.float64)
    if case.special and not dtype.is_complex:
        odd = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0], dtype=x.dtype)
        picks = torch.randint(0, 12, shape, generator=generator)
        x = torch.where(picks < 4, odd[picks.clamp(max=3)], x)
    return x.to(dtype)


def arrange(x: Tensor, layout: str) -> Tensor:
    """The same values with other strides; "expanded" repeats the first index of the first dim, "overlapping"
    gives all elements whose indices add up to the same number one place in memory."""
    if layout == "transposed":
        backwards = tuple(reversed(range(x.ndim)))
        return x.permute(backwards).contiguous().permute(backwards)
    if layout == "sliced" and x.ndim:
        room = torch.cat([x, x], -1)
        room[..., ::2].copy_(x)
        return room[..., ::2]
    if layout == "offset" and x.ndim:
        return torch.cat([x[:1], x])[x[:1].shape[0]:]
    if layout == "expanded" and x.numel():
        return x[:1].expand(x.shape) if x.ndim else x
    if layout == "overlapping" and x.ndim and x.numel():
        path = [x[(-1,) * d + (slice(d > 0, None),) + (0,) * (x.ndim - d - 1)] for d in range(x.ndim)]
        return torch.cat(path).as_strided(x.shape, (1,) * x.ndim)
    return (x.requires_grad_() if layout == "grad" and x.dtype.is_floating_point and x.dtype.itemsize > 1
            else x)


def with_size(shape: Sequence[int], dim: int, size: int) -> tuple[int, ...]:
    dim %= len(shape)
    return (*shape[:dim], size, *shape[dim + 1:])


def inputs(case: Case, member: int, ranks: Sequence[int]) -> list[Tensor]:
    """What `member` passes: one tensor, or for all_to_all one for each member."""
    key = (min(ranks) * 64 + member) * 64
    if case.collective == "all_to_all":
        return [draw(with_size(case.shape, case.dim, n), case, key + to)
                for to, n in enumerate(case.rows[member])]
    if case.collective in ("all_gather", "gather"):
        return [draw(with_size(case.shape, case.dim, case.sizes[member]), case, key)]
    if case.collective == "reduce_scatter":
        return [draw(with_size(case.shape, case.dim, sum(case.sizes)), case, key)]
    return [draw(case.shape, case, key)]


# -- the calls -----------------------------------------------------------------------------------------------

def call(case: Case, group: GroupCoordinator, given: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The results on this member, as a tuple; () where it receives nothing."""
    x, me, n = given[0], group.rank_in_group, group.world_size
    if case.collective == "all_reduce":
        return (group.all_reduce(x, case.op),)
    if case.collective == "all_gather":
        return (group.all_gather(x, case.dim, case.sizes),)
    if case.collective == "reduce_scatter":
        return (group.reduce_scatter(x, case.dim, case.sizes, case.op),)
    if case.collective == "all_to_all":
        even = len({count for row in case.rows for count in row}) == 1
        return group.all_to_all(given, [with_size(case.shape, case.dim, row[me]) for row in case.rows], even)
    if case.collective == "broadcast":
        return (group.broadcast(x, case.root),)
    if case.collective == "gather":
        got = group.gather(x, case.root, case.dim, case.sizes)
        return () if got is None else (got,)
    if n > 1 and me == case.root:
        group.send(x, (case.root + 1) % n)
    if n > 1 and me == (case.root + 1) % n:
        return (group.recv(x.shape, x.dtype, case.root),)
    return ()


def wanted(case: Case, group: GroupCoordinator) -> tuple[Tensor, ...]:
    """The oracle for moves: what this member should hold, from everybody's inputs."""
    me, n = group.rank_in_group, group.world_size
    given = [inputs(case, member, group.ranks) for member in range(n)]
    if case.collective == "all_to_all":
        return tuple(pieces[me] for pieces in given)
    if case.collective == "all_gather" or case.collective == "gather" and me == case.root:
        return (torch.cat([x for x, in given], case.dim),)
    if case.collective == "broadcast":
        return (given[case.root][0],)
    return (given[case.root][0],) if case.collective == "send" and n > 1 and me == (case.root + 1) % n else ()


# -- the oracle of reductions --------------------------------------------------------------------------------

def exact(pieces: Sequence[Tensor], op: str) -> Tensor:
    """The reduction in the widest dtype there is: integers as their dtype wraps, floats in float64."""
    dtype = pieces[0].dtype
    wide = dtype if dtype.is_complex else torch.float64 if dtype.is_floating_point else torch.int64
    stack = torch.stack([p.detach().to(wide) for p in pieces])
    total = stack.amax(0) if op == "max" else stack.to(torch.complex128 if dtype.is_complex else wide).sum(0)
    return total if dtype.is_floating_point or dtype.is_complex else total.to(dtype)


def in_rank_order(pieces: Sequence[Tensor]) -> Tensor:
    """The sum first to last in at least float32, rounded once."""
    dtype = pieces[0].dtype
    wide = torch.float32 if dtype.itemsize < 4 else dtype
    return reduce(lambda a, b: a + b, [p.detach().to(wide) for p in pieces]).to(dtype)


def in_any_order(pieces: Sequence[Tensor]) -> Iterator[Tensor]:
    """Sums of up to four as torch rounds them, after every step, in all orders, and in halves."""
    dtype = pieces[0].dtype

    def add(a: Tensor, b: Tensor) -> Tensor:
        return ((a.detach().float() + b.detach().float()).to(dtype) if dtype.itemsize < 4
                else a.detach() + b.detach())
    for order in permutations(pieces):
        yield reduce(add, order)
        if len(order) == 4:
            yield add(add(order[0], order[1]), add(order[2], order[3]))


def reduction_failures(case: Case, got: Tensor, pieces: Sequence[Tensor],
                       deterministic: bool) -> Iterator[str]:
    reference = exact(pieces, case.op)
    if case.op == "max" or not (got.dtype.is_floating_point or got.dtype.is_complex):
        yield from _differ("the exact result", got, reference.to(got.dtype), _same_values)
    elif deterministic:
        yield from _differ("the sum in rank order", got, in_rank_order(pieces), _same_values)
    elif len(pieces) <= 4:
        limit = 2 * max(_error(s, reference) for s in in_any_order(pieces))
        if not (error := _error(got, reference)) <= limit:
            yield f"error {error:.3g}, twice torch's own is {limit:.3g}"
    elif (most := _error_in_bounds(got, reference, pieces)) > 1:
        yield f"error {most:.3g} times what {len(pieces)} terms can have in the worst order"


def _error_in_bounds(got: Tensor, reference: Tensor, pieces: Sequence[Tensor]) -> float:
    """The largest error as a share of ((1 + u)^(n-1) - 1) * sum(|terms|), u half an eps, which no order of
    n - 1 additions exceeds (Higham, Accuracy and Stability of Numerical Algorithms, 4.2): that of `got` and
    that of the reference, which is a sum too."""
    if _error(got, reference) == float("inf"):
        return float("inf")
    worst = sum(math.expm1((len(pieces) - 1) * math.log1p(torch.finfo(dtype).eps / 2))
                for dtype in (got.dtype, reference.dtype))
    bound = worst * torch.stack([p.detach().to(reference.dtype).abs() for p in pieces]).sum(0)
    off, finite = (got.detach().to(reference.dtype) - reference).abs(), reference.isfinite()
    return float((off / bound)[finite & (off > 0)].max()) if (finite & (off > 0)).any() else 0.0


def _error(x: Tensor, reference: Tensor) -> float:
    """The largest error; infinite where NaN and infinities do not agree."""
    x = x.detach().to(reference.dtype)
    odd = ~reference.isfinite()
    if not torch.equal(x[odd].nan_to_num(nan=7.0), reference[odd].nan_to_num(nan=7.0)):
        return float("inf")
    return (x[~odd] - reference[~odd]).abs().max().item() if (~odd).any() else 0.0


# -- the check -----------------------------------------------------------------------------------------------

def only(name: str, group: GroupCoordinator) -> GroupCoordinator:
    """The group with its communicator `name` alone: what that does not support is refused."""
    able = [c for c in group.communicators if c.name == name]
    assert able, (f"{group} has {[c.name for c in group.communicators]}, not {name}; "
                  f"declined: {group.router.declined}")
    return GroupCoordinator(group.name, group.ranks, group.rank, group.local_rank, group.device, able[:1],
                            able[0])


def check(case: Case, group: GroupCoordinator) -> list[str]:
    """Runs the case on this member of the group; what is wrong with the outcome, in words."""
    given = [x.to(group.device) for x in inputs(case, group.rank_in_group, group.ranks)]
    if case.layout != "grad" and group.device.type != "cpu":
        given = [arrange(x.contiguous(), case.layout) for x in given]
    before = [x.detach().clone() for x in given]
    if case.collective in ("all_reduce", "reduce_scatter") and (case.op, case.dtype) in REFUSED:
        text = f"{case.op} of {case.dtype} over ranks: not defined; convert it to another dtype first"
        return list(_refusal_failures(lambda: call(case, group, given), text))
    got = call(case, group, given)
    return [*_outcome_failures(case, group, given[0], [x.cpu() for x in got]),
            *_aliasing_failures(given, before, got)]


def _outcome_failures(case: Case, group: GroupCoordinator, x: Tensor, got: Sequence[Tensor]) -> Iterator[str]:
    if case.collective in ("all_reduce", "reduce_scatter"):
        pieces = [inputs(case, member, group.ranks)[0] for member in range(group.world_size)]
        if case.collective == "reduce_scatter":
            pieces = [p.split(list(case.sizes), case.dim)[group.rank_in_group] for p in pieces]
        if got[0].shape != pieces[0].shape or got[0].dtype != pieces[0].dtype:
            yield f"{got[0].dtype} of shape {tuple(got[0].shape)}, expected {tuple(pieces[0].shape)}"
            return
        yield from reduction_failures(case, got[0], pieces, group.route(
            case.collective, x, case.op, even=len(set(case.sizes)) < 2).deterministic)
        return
    want = wanted(case, group)
    if len(got) != len(want):
        yield f"{len(got)} results, expected {len(want)}"
    for i, (g, w) in enumerate(zip(got, want)):
        yield from _differ(f"result {i}", g, w)


def _differ(what: str, got: Tensor, want: Tensor,
            same: Callable[[Tensor, Tensor], bool] | None = None) -> Iterator[str]:
    got, want = got.detach(), want.detach()
    if got.shape != want.shape or got.dtype != want.dtype:
        yield f"{what}: {got.dtype} {tuple(got.shape)}, expected {want.dtype} {tuple(want.shape)}"
    elif not (same or _same_bits)(got, want):
        yield f"{what}: {_short(got)}, expected {_short(want)}"


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(
        *(x.clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8) for x in (a, b)))


def _same_values(a: Tensor, b: Tensor) -> bool:
    """Equal, where one NaN is as good as another, and -0 as 0."""
    if not a.dtype.is_floating_point:
        return _same_bits(a, b)
    return torch.equal(
        *(x.double().nan_to_num(nan=1e300, posinf=torch.inf, neginf=-torch.inf) for x in (a, b)))


def _short(x: Tensor) -> str:
    return str(x.flatten()[:8].tolist())


def _aliasing_failures(given: Sequence[Tensor], before: Sequence[Tensor],
                       got: Sequence[Tensor]) -> Iterator[str]:
    for x, was in zip(given, before):
        yield from _differ("the argument was changed", x.cpu(), was.cpu())
    if any(g.requires_grad for g in got):
        yield "a result asks for a gradient"
    held = {x.untyped_storage().data_ptr() for x in given if x.numel()}
    if any(g.numel() and g.untyped_storage().data_ptr() in held for g in got):
        yield "a result shares the memory of an argument"
    spans = sorted((g.data_ptr(), g.data_ptr() + g.nbytes) for g in got if g.numel())
    if any(end > start for (_, end), (start, _) in zip(spans, spans[1:])):
        yield "two results share memory"
    if not all(g.is_contiguous() for g in got):
        yield "a result is not contiguous"


def _refusal_failures(run: Callable[[], object], text: str) -> Iterator[str]:
    try:
        run()
    except SpecError as error:
        if str(error) != text:
            yield f"refused with {error}, expected {text}"
    else:
        yield f"not refused; expected {text}"


def moved_failures(given: Tensor, got: Tensor) -> list[str]:
    """What is wrong with `got`, which is what another member received as `given`,
    or this one as a copy of it."""
    return [*_differ("the tensor", got, given), *_aliasing_failures([given], [given.detach().clone()], [got])]


# -- the list ------------------------------------------------------------------------------------------------

def fixed_cases(axes: tuple[str, ...], n: int) -> list[Case]:
    """The cases that every group of n members runs: each dtype, each layout, each dim,
    and what broke others."""
    uneven = tuple(range(n))[::-1]
    lone = (3, *(0,) * (n - 1))
    rows = tuple(tuple((i + 2 * j) % 4 for j in range(n)) for i in range(n))
    cases = [case for dtype in DTYPES for case in (
        Case("all_reduce", axes, dtype, (5, 3)),
        Case("all_reduce", axes, dtype, (7,), op="max", special=True),
        Case("reduce_scatter", axes, dtype, (0, 3), sizes=(2,) * n),
        Case("reduce_scatter", axes, dtype, (2, 0), dim=1, sizes=uneven, op="max", special=True),
        Case("all_gather", axes, dtype, (0, 3), sizes=(2,) * n),
        Case("all_gather", axes, dtype, (2, 0), dim=1, sizes=uneven),
        Case("all_to_all", axes, dtype, (0, 2), rows=rows),
        Case("broadcast", axes, dtype, (3, 2), root=n - 1),
        Case("gather", axes, dtype, (2, 0), dim=-1, sizes=uneven, root=n // 2),
        Case("send", axes, dtype, (3,), root=n - 1))]
    cases += [case for layout in LAYOUTS for case in (
        Case("all_reduce", axes, "float32", (4, 4), layout=layout),                      # a strided view
        Case("reduce_scatter", axes, "float32", (4, 3 * n, 8), dim=1, sizes=(3,) * n, layout=layout),
        Case("all_gather", axes, "bfloat16", (2, 1, 4), dim=2, sizes=(4,) * n, layout=layout),
        Case("all_to_all", axes, "int32", (2, 3), dim=1, rows=rows, layout=layout),
        Case("broadcast", axes, "float32", (2, 3), layout=layout),
        Case("gather", axes, "float32", (2, 3), sizes=(2,) * n, layout=layout),
        Case("send", axes, "float32", (2, 3), layout=layout))]
    # dim >= 2 was wrong elsewhere
    cases += [Case("reduce_scatter", axes, "float32", (4, 6, 8, 2), dim=dim, sizes=sizes)
              for dim in (0, 1, 2, 3, -1) for sizes in ((2,) * n, uneven, lone)]
    cases += [Case("all_gather", axes, "float32", (4, 6, 8, 2), dim=dim, sizes=sizes)
              for dim in (0, 1, 2, 3, -1) for sizes in ((2,) * n, uneven, lone)]
    cases += [Case(c, axes, "float32", shape, sizes=(0,) * n, rows=((0,) * n,) * n)
              for c in COLLECTIVES for shape in ((0,), (0, 3), (3, 0))]
    cases += [Case(c, axes, "float32", ()) for c in ("all_reduce", "broadcast", "send")]
    cases += [Case(c, axes, "int16", (1,), sizes=(1,) * n, rows=((1,) * n,) * n, layout="sliced")
              for c in COLLECTIVES]
    cases += [Case("all_reduce", axes, dtype, (300_007,), op=op)  # beyond the gathering size
              for dtype, op in (("float32", "sum"), ("bfloat16", "sum"), ("float32", "max"),
                                ("int16", "sum"))]
    return cases


def quad_cases(axes: tuple[str, ...], n: int) -> list[Case]:
    """Even pieces of multiples of 16 bytes: what communicators between GPUs take."""
    even = ((4,) * n,) * n
    cases = [case for dtype in DTYPES for shape in ((8,), (4, 16), (3, 16 * n, 2), (1, 5, 48)) for case in (
        Case("all_reduce", axes, dtype, shape, special=dtype in FLOATS),
        *(Case("all_gather", axes, dtype, shape, dim=dim, sizes=(16,) * n) for dim in range(len(shape))),
        *(Case("reduce_scatter", axes, dtype, shape, dim=dim, sizes=(16,) * n) for dim in range(len(shape))),
        Case("all_to_all", axes, dtype, (0, *shape), rows=even))]
    cases += [Case("all_reduce", axes, dtype, (count,), seed=count)
              for dtype in ("float32", "bfloat16", "float16")
              for count in (16, 1000, 4096, 100_000, 1_000_008)]
    cases += [Case(c, axes, "bfloat16", (2, 64, 3, 40), dim=dim, sizes=(24,) * n, layout=layout)
              for c in ("all_gather", "reduce_scatter")
              for dim in range(4) for layout in LAYOUTS]
    return cases
