"""A model on each rank of a mesh, all in this process: what the ranks of a pipeline ask each other, answered
by the simulator."""
from __future__ import annotations

from collections.abc import Collection, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from shardlib import Layout, Mesh, Params
from shardlib.api import shard_of
from shardlib.models.decoding import Model, Sampling, used_weights, weight_types
from shardlib.models.families import weights_of
from shardlib.params import fill, leaf_values
from shardlib.run.simulate import run_ranks
from shardlib.run.turns import Line, Turns


class Members(tuple):
    """The ranks of a group, as the simulator wants them; no kernel is made with their communicators."""
    communicators = ()


class Rank:
    """What a runtime says of one rank, to code that yields what it asks of others."""
    device = torch.device("cpu")

    def __init__(self, mesh: Mesh, rank: int) -> None:
        self.mesh, self.rank, self.coordinate = mesh, rank, mesh.coordinate(rank)

    def group(self, axes: Sequence[str]) -> Members:
        return Members(self.mesh.group(axes, self.rank))

    def create_groups(self, products: Any) -> None:
        """The simulator has them all."""

    def compare_plans(self, title: str, plan: str) -> None:
        """Ranks that part ways are an error of the simulator."""

    def end_others(self, error: BaseException) -> None:
        """They end with this one."""


def model_at(weights: Params, config: Any, layout: Layout, mesh: Mesh, rank: int) -> Model:
    here, whole = Rank(mesh, rank), dict(leaf_values(weights, ""))
    dtype = next(iter(whole.values())).dtype
    kinds, used = weight_types(config, layout, mesh), used_weights(config, layout, here)

    def leaf(path: str) -> torch.Tensor:
        shard = shard_of(whole[path], kinds[path[1:]], mesh, here.coordinate).contiguous()
        return shard if path[1:] in used else shard.to("meta")
    model = Model(config, fill(weights_of(config), "", leaf), layout, here, dtype)
    line = Line(here.group(("pp",)), mesh.axes["pp"], here.coordinate["pp"],
                mesh.rank({**here.coordinate, "pp": 0}))
    model.__dict__["pipeline"] = SimpleNamespace(line=line)
    return model


def generate(models: Sequence[Model], prompts: Sequence[Sequence[int]], new: int, ends: Collection[int] = (),
             sampling: Sampling = Sampling(), told: Sequence[list] | None = None, graph: bool = False,
             groups: int | None = None) -> tuple[list[list[list[int]]], list[tuple]]:
    """What `generate` gives on each rank, and what went between them. told: what each was told."""
    log: list[tuple] = []
    told, mail = told or [[] for _ in models], {}
    with torch.inference_mode():
        turns = [Turns(model.calls(prompts, new, ends, sampling, said.append, graph, groups),
                       model.pipeline.line).run() for model, said in zip(models, told)]
        found = run_ranks(turns, log, mail=mail)
    assert not mail, "a message that nobody takes"
    return [[row for group in made for row in group] for made in found], log
