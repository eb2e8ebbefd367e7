"""The cache of keys and values: a value that is returned.

The compiler updates it in place where the caller gave it up.

`update_cache("B S K H, B T K H, B -> B S K H", cache, k, start)` writes row t of k to slot start[b] + t.
`causal_mask("B -> B T/1 S/1", start)` is true where slot s <= start[b] + t.
"""
from __future__ import annotations

import torch
from torch import Tensor

from shardlib.errors import SpecError
from shardlib.language.local_code import LocalCode
from shardlib.language.value import Operand, Value, apply
from shardlib.lowering.index_check import IndexSite
from shardlib.ops.lookups import look
from shardlib.ops.rope import positions
from shardlib.program import Op, Step
from shardlib.reference import Dims
from shardlib.rules import Rule
from shardlib.spec import parse_specs


def slots(start: Tensor, shape: tuple[int, ...], site: IndexSite) -> Tensor:
    """start[b] + t, of `shape`. A slot that is not there is the nearest one, where the error comes later."""
    now = positions(start, 0, shape[1])
    if shape[1]:
        look(site, start)
    if site.seen is not None:
        now = now.clamp(0, site.size - 1)
    return now.view(now.shape + (1,) * (len(shape) - 2)).expand(shape)


def write_piece(cache: Tensor, where: Tensor, rows: Tensor, first: int) -> Tensor:
    """`cache`, the slots from `first` on of a longer one, with those rows that fall to it.

    The slots `where` follow each other. Any other row writes what is there already, to a slot to which no
    row falls; of more rows than slots, each slot takes its own.
    """
    n, t = cache.shape[1], rows.shape[1]
    if not n or not t:
        return cache
    if t <= n:
        here = where - first
        at = here % n
        return cache.scatter_(1, at, torch.where(here == at, rows, cache.gather(1, at)))
    slot = torch.arange(first, first + n, device=where.device).view(n, *[1] * (where.ndim - 2))
    row = slot - where[:, :1]
    at = row.clamp(0, t - 1)
    return cache.copy_(torch.where(row == at, rows.gather(1, at), cache))


def slots_seen(start: Tensor, offset: int, t: int, first: int, s: int) -> Tensor:
    """(b, t, s): whether slot first + s is at most start[b] + offset + t."""
    return torch.arange(first, first + s, device=start.device) <= positions(start, offset, t)[..., None]


def _site(e: LocalCode, step: Step, args: list[str]) -> str:
    return e.index_site(step, 2, args[2], step.ins[0].dims[1], "start", rows=step.ins[1].dims[1])


def _look(e: LocalCode, step: Step, args: list[str]) -> str:
    if not e.shape(step.ins[1])[1]:
        return "None"
    return e.hoist(args[2], f"{e.use(look)}({_site(e, step, args)}, {{x}})")


def _write(e: LocalCode, step: Step, args: list[str]) -> str:
    cache = args[0] if step.inputs[0] in e.in_place else f"{args[0]}.clone()"
    where = e.hoist(args[2], f"{e.use(slots)}({{x}}, {e.shape(step.ins[1])}, {_site(e, step, args)})")
    if e.mesh.size(step.ins[0].dims[1].axes) > 1:
        return f"{e.use(write_piece)}({cache}, {where}, {args[1]}, {e.rows(step.ins[0].dims[1])[0]})"
    return f"{cache}.scatter_(1, {where}, {args[1]})"


def _mask(e: LocalCode, step: Step, args: list[str]) -> str:
    (out,) = step.outs
    (offset, t), (first, s) = map(e.rows, out.dims[1:])
    return f"{e.use(slots_seen)}({args[0]}, {offset}, {t}, {first}, {s})"


def _update_reference(d: Dims, cache: Tensor, rows: Tensor, start: Tensor) -> Tensor:
    slot, time = d.step.ins[0].names[1], d.step.ins[1].names[1]
    written = d.index(slot) == start + d.index(time)
    return torch.where(d.sum(written, time) > 0, d.sum(rows * written, time), cache)


def _mask_reference(d: Dims, start: Tensor) -> Tensor:
    _, time, slot = d.step.outs[0].names
    return start + d.index(time) - d.index(slot) >= 0


UPDATE_CACHE = Op("update_cache",
                  rule=lambda s: Rule(linear=((0, 1),), whole=(s.ins[1].names[1],), met=(s.ins[0].names[1],)),
                  emit=_write, looks=_look, index=(2,), updates=0, reads=lambda d, o: [d[0], d[0], "int64"],
                  reference=_update_reference)
CAUSAL_MASK = Op("causal_mask", rule=lambda s: Rule(), emit=_mask, index=(0,), dtype=lambda d, o: ["bool"],
                 reference=_mask_reference)


def update_cache(text: str, cache: Operand, rows: Operand, start: Operand) -> Value:
    """`cache` with new rows written from slot start[b] on: row t to slot start[b] + t. T is whole; of a
    cache whose S is split, each rank writes what falls to it.

    It keeps the dtype of the cache. Refused: a slot that is not there. The buffer is reused where `compile`
    is told `donate=("cache",)`.

    >>> import torch
    >>> from shardlib import Layout, Mesh, sharded, simulate
    >>> @sharded("B S K, B T K, B -> B S K")
    ... def write(cache, k, start):
    ...     return update_cache("B S K, B T K, B -> B S K", cache, k, start)
    >>> cache, k = torch.zeros(2, 4, 1), torch.tensor([[1.0, 2.0], [3.0, 4.0]]).unsqueeze(-1)
    >>> simulate(write, Layout(B="dp"), cache, k, torch.tensor([0, 2]), mesh=Mesh(dp=2)).squeeze(-1)
    tensor([[1., 2., 0., 0.],
            [0., 0., 3., 4.]])
    """
    meant = f'update_cache "{text}": the specs are those of "B S K H, B T K H, B -> B S K H"'
    ins, outs = parse_specs(text, meant)
    if (len(ins) != 3 or len(outs) != 1 or ins[0].labels != outs[0].labels
        or len(ins[1].dims) != len(ins[0].dims) or len(ins[2].dims) != 1):
        raise SpecError(meant)
    return apply(UPDATE_CACHE, (cache, rows, start), text)


def causal_mask(text: str, start: Operand) -> Value:
    """Which slots of a cache each query sees: true where slot s <= start[b] + t, as `attention` has it of
    `start` itself; to join with other masks.

    Where no argument has T or S, `sizes` says how long they are.

    >>> import torch
    >>> from shardlib import compile, sharded
    >>> seen = sharded("B -> B T S")(lambda start: causal_mask("B -> B T S", start))
    >>> compile(seen, sizes=dict(T=2, S=4))(torch.tensor([1])).int()    # queries at positions 1 and 2
    tensor([[[1, 1, 0, 0],
             [1, 1, 1, 0]]], dtype=torch.int32)
    """
    meant = f'causal_mask "{text}": the specs are those of "B -> B T/1 S/1"'
    ins, outs = parse_specs(text, meant)
    if len(ins) != 1 or len(outs) != 1 or len(ins[0].dims) != 1 or len(outs[0].dims) != 3:
        raise SpecError(meant)
    return apply(CAUSAL_MASK, (start,), text)


TABLE = {op.name: op for op in (UPDATE_CACHE, CAUSAL_MASK)}
