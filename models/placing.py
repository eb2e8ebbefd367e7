"""Experts' weights in slots: from where they lie into the slots of a placement, and from one placement into
another while a model generates.

    model = model.place([rebalance(load, ranks, slots) for load in loads])     # a placement for each layer
    ...
    model.place(others)         # between two steps, on all ranks: what changed travels, buffers stay

A rank sends and receives the experts of slots that change, and no others. All that comes to a layer is read
before any of it is written, so that slots may swap. All ranks go through one list, in which each is sender,
receiver, both or none: none waits for one that waits for it.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import torch
from torch import Tensor

from shardlib import Layout, Params, SpecError
from shardlib.api import Prepared
from shardlib.distributed.runtime import Runtime
from shardlib.mesh import Mesh
from shardlib.models.expert_placement import Move, Placement, moves
from shardlib.models.families import weights_of
from shardlib.models.mixtral import MixtralConfig
from shardlib.params import fill, leaf_values
from shardlib.spec import Dim, Factor, parse

EXPERTS = ("w.layers.gate", "w.layers.up", "w.layers.down")
TABLE = "w.layers.slots"


def axes_of(layout: Layout, mesh: Mesh) -> tuple[str, ...]:
    """Over which experts' weights are split at rest."""
    return layout.on(mesh).complete_alone(parse("E D F")).resolve(mesh).dims[0].axes


def at_rest(config: MixtralConfig, layout: Layout, mesh: Mesh) -> Placement:
    """Where the experts of each layer lie that are in no slots: each once, in order."""
    axes = axes_of(layout, mesh)
    dim, sizes = Dim((Factor("E", axes),)), {"E": config.num_experts}
    begins = (mesh.rows(dim, sizes, {**dict.fromkeys(mesh.axes, 0), **dict(zip(axes, at))})
              for at in product(*(range(mesh.axes[a]) for a in axes)))
    return Placement(tuple(tuple(range(begin, begin + size)) for begin, size in begins))


def check(placements: Sequence[Placement], config: MixtralConfig, layout: Layout, mesh: Mesh) -> None:
    """SpecError unless there is a placement for each layer, of all experts, alike slots on all ranks."""
    ranks = mesh.size(axes_of(layout, mesh))
    shapes = {tuple(map(len, p.slots)) for p in placements}
    if "L" in layout.entries:
        raise SpecError("place: experts of a pipeline's stages are not placed")
    if len(placements) != config.num_layers:
        raise SpecError(f"place: {len(placements)} placements, of {config.num_layers} layers")
    if len(shapes) != 1 or len(slots := next(iter(shapes))) != ranks or len({*slots}) != 1:
        raise SpecError(f"place: each of the {ranks} ranks has as many slots as the others, in every layer")
    if config.num_slots and config.num_slots != sum(slots):
        raise SpecError(f"place: there are {config.num_slots} slots, and no other number any more")
    if wrong := [i for i, p in enumerate(placements)
                 if {e for rank in p.slots for e in rank} != {*range(config.num_experts)}]:
        raise SpecError(f"place: layer {wrong[0]} does not have each of {config.num_experts} experts")


def tables(placements: Sequence[Placement], width: int) -> Tensor:
    """The slots of each expert, by layer: (L, X, R)."""
    return torch.tensor([p.table(width) for p in placements])


def placed(config: MixtralConfig, weights: Params, placements: Sequence[Placement], layout: Layout,
           runtime: Runtime) -> tuple[MixtralConfig, Params]:
    """The same model with its experts in slots; `weights`, this rank's shards, lie at rest."""
    check(placements, config, layout, runtime.mesh)
    after = replace(config, num_slots=sum(map(len, placements[0].slots)))
    leaves, each = dict(leaf_values(weights, "w")), len(placements[0].slots[0])
    before = [at_rest(config, layout, runtime.mesh)] * config.num_layers
    old = [leaves[path] for path in EXPERTS]
    new = [x.new_empty((len(x), each, *x.shape[2:])) for x in old]
    rank = _rank(axes_of(layout, runtime.mesh), runtime)
    for layer, (was, now) in enumerate(zip(before, placements)):
        for slot, (a, b) in enumerate(zip(was.slots[rank], now.slots[rank])):
            if a == b:
                for x, y in zip(old, new):
                    y[layer, slot] = x[layer, slot]
    move([[x[layer] for x in old] for layer in range(config.num_layers)],
         [[x[layer] for x in new] for layer in range(config.num_layers)], before, placements, layout, runtime)
    leaves.update(zip(EXPERTS, new))
    leaves[TABLE] = tables(placements, after.sizes["R"]).to(old[0].device)
    return after, fill(weights_of(after), "w", lambda path: leaves[path])


def place_anew(weights: Params | Prepared, before: Sequence[Placement], after: Sequence[Placement],
               layout: Layout, runtime: Runtime) -> None:
    """From one placement to another, in the buffers that there are; weights as they are or prepared."""
    held = (dict(zip(weights.parts, weights.flat)) if isinstance(weights, Prepared)
            else dict(leaf_values(weights, "w")))
    layers = [[held[path][i] for path in EXPERTS] for i in range(len(before))]
    move(layers, layers, before, after, layout, runtime)
    for i, table in enumerate(tables(after, held[TABLE][0].shape[-1])):
        held[TABLE][i].copy_(table)


def move(old: Sequence[Sequence[Tensor]], new: Sequence[Sequence[Tensor]], before: Sequence[Placement],
         after: Sequence[Placement], layout: Layout, runtime: Runtime) -> int:
    """Carries out what `moves` says, layer by layer: of each, its leaves by slot. How many experts came."""
    axes = axes_of(layout, runtime.mesh)
    rank, came = _rank(axes, runtime), 0
    for layer, (was, now) in enumerate(zip(before, after)):
        staged = [(each.target[1], x) for each in moves(was, now)
                  if (x := _passed(each, old[layer], rank, axes, runtime)) is not None]
        for slot, matrices in staged:
            for leaf, x in zip(new[layer], matrices):
                leaf[slot].copy_(x)
        came += len(staged)
    return came


def _rank(axes: tuple[str, ...], runtime: Runtime) -> int:
    if runtime.mesh.size(axes) == 1:
        return 0
    runtime.create_groups([axes])
    return runtime.group(axes).rank_in_group


def _passed(each: Move, leaves: Sequence[Tensor], rank: int, axes: tuple[str, ...],
            runtime: Runtime) -> list[Tensor] | None:
    """This rank's part in a move: what comes to it."""
    (source, slot), (target, _) = each.source, each.target
    if source == target == rank:
        return [leaf[slot].clone() for leaf in leaves]
    if rank == source:
        for leaf in leaves:
            runtime.group(axes).send(leaf[slot].contiguous(), target)
    if rank == target:
        return [runtime.group(axes).recv(leaf.shape[1:], leaf.dtype, source) for leaf in leaves]
    return None
