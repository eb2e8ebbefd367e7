"""The rotated scan: the same numbers by as many collectives, each sum beside the addition that follows it."""
from __future__ import annotations

from collections import Counter
from typing import Any

import llama_reference as reference
import pytest
import torch
from simulated import execute, tree
from torch import Tensor

from shardlib import EXPLICIT, Layout, Mesh, all_reduce, einsum, lower, scan, sharded, value_and_grad
from shardlib.compiler.parser import check, parse_program
from shardlib.compiler.passes import DEFAULT
from shardlib.functions import cast, sum, tanh
from shardlib.language.scan import SCAN
from shardlib.models.layouts import named_layout
from shardlib.models.llama import Cache, LlamaConfig, next_logits
from shardlib.ops import TABLE, embedding
from shardlib.params import init, leaf_values
from shardlib.placement import shard_of
from shardlib.program import Program, Scan

ROTATED = (*DEFAULT, "rotate_scan")
PLACES = [("tp=2", "tp"), ("tp=2", "tp+sp"), ("dp=2,tp=2", "tp+fsdp"), ("tk=2,tg=2", "tp"),
          ("tk=2,tg=2", "tp+sp")]


def config(layers: int) -> LlamaConfig:
    return LlamaConfig(vocab_size=11, d_model=18, num_layers=layers, num_kv_heads=3, queries_per_kv=2,
                       head_dim=4, d_ff=7, norm_eps=1e-5, rope_theta=1e4, rope_scaling=None, tied=False,
                       max_context=64)


def decoded(program: Program, mesh: Mesh, of: LlamaConfig) -> list[Tensor]:
    """The logits and the cache after prompts of unequal lengths."""
    weights = reference.random_weights(of, 0)
    if not of.num_layers:
        weights = {path: w[:0] if path.startswith("layers") else w for path, w in weights.items()}
    sizes = dict(of.sizes, B=4, T=5, S=6)
    cache = init(Cache, sizes, path="cache")
    whole: dict[str, Any] = {"ids": torch.arange(20).view(4, 5) % 11,
                             "start": torch.zeros(4, dtype=torch.int64), "last": torch.tensor([4, 0, 2, 3]),
                             **dict(leaf_values(tree(weights, of), "w")), **dict(leaf_values(cache, "cache"))}
    placed = [{path: shard_of(whole[path], spec, mesh, c) for path, spec in program.arg_leaves()}
              for c in mesh.coordinates()]
    return execute(program, mesh, placed, sizes).results


def collectives(program: Program, layers: int) -> Counter[str]:
    """How often each is made in one run."""
    made: Counter[str] = Counter()
    for step in program.steps:
        if step.op.moves and step.op.wire:
            made[step.op.name] += 1
        for body in step.bodies:
            for name, count in collectives(body, layers).items():
                made[name] += layers * count
    return made


@pytest.mark.parametrize("layers", [0, 1, 3])
@pytest.mark.parametrize("mesh, layout", PLACES)
def test_the_llama_decodes_the_same_bits_by_as_many_collectives(mesh: str, layout: str, layers: int) -> None:
    here, of = Mesh.parse(mesh), config(layers)
    straight, rotated = (lower(next_logits, named_layout(layout, here), mesh=here, config=of, passes=passes)
                         for passes in (DEFAULT, ROTATED))
    (scanned,) = (step for step in rotated.steps if step.op is SCAN)
    assert len(Scan.of(scanned).carries) == 2 and rotated != straight
    assert ([s.op.name for s in scanned.body.steps[:2]]
            == [next(s for s in straight.steps if s.op is SCAN).body.steps[-2].op.name, "add"])
    assert collectives(rotated, layers) == collectives(straight, layers)
    assert parse_program(str(rotated), TABLE) == rotated == check(rotated, here)
    for a, b in zip(decoded(straight, here, of), decoded(rotated, here, of), strict=True):
        assert torch.equal(a, b)


# -- where it is left alone ----------------------------------------------------------------------------------

@sharded("B D, D F, F D -> B D")
def layer(x, up, down):
    return x + einsum("B F, F D -> B D", tanh(einsum("B D, D F -> B F", x, up)), down)


@sharded("B, V D, L D F, L F D -> B D")
def plain(ids, table, up, down):
    return scan(layer, embedding("B, V D -> B D", ids, table), (up, down))


@sharded("B, V D, L D F, L F D -> B D")
def used_again(ids, table, up, down):
    x = embedding("B, V D -> B D", ids, table)
    return scan(layer, x, (up, down)) + x


@sharded("B, V D, L D F, L F D -> B D")
def of_another_dtype(ids, table, up, down):
    return scan(narrow, cast(embedding("B, V D -> B D", ids, table), dtype="float32"), (up, down))


@sharded("B D, D F, F D -> B D")
def narrow(x, up, down):
    return x + cast(einsum("B F, F D -> B D", tanh(einsum("B D, D F -> B F", x, up)), down), dtype="bfloat16")


@sharded("B D, D F/tp, F/tp D -> B D", layout=EXPLICIT)
def narrow_sums(x, up, down):
    y = einsum("B F/tp, F/tp D -> B D +tp", tanh(einsum("B D, D F/tp -> B F/tp", x, up)), down)
    return x + all_reduce("B D +tp -> B D", cast(y, dtype="bfloat16"))


@sharded("B, V/tp D, L D F/tp, L F/tp D -> B D", layout=EXPLICIT)
def of_two_owed_dtypes(ids, table, up, down):
    x = cast(embedding("B, V/tp D -> B D +tp", ids, table), dtype="float32")
    return scan(narrow_sums, all_reduce("B D +tp -> B D", x), (up, down))


@sharded("B, V D, L D F, L F D -> ()")
def loss(ids, table, up, down):
    return sum("B D -> ()", scan(layer, embedding("B, V D -> B D", ids, table), (up, down)))


SPLIT = Layout(V="tp", F="tp")


def test_it_rotates_what_the_others_are_like() -> None:
    assert "residual" in str(lower(plain, SPLIT, mesh=Mesh(tp=2), passes=ROTATED))


@pytest.mark.parametrize("f, layout", [(plain, Layout(F="tp")), (plain, Layout(V="tp")), (used_again, SPLIT),
                                       (of_another_dtype, SPLIT), (of_two_owed_dtypes, EXPLICIT),
                                       (value_and_grad(loss, wrt="up"), SPLIT)])
def test_what_it_leaves_alone(f: Any, layout: Layout) -> None:
    """Nothing is owed before the scan, or in it; what goes in is used again; the owed sums have two dtypes;
    a gradient is wanted."""
    assert lower(f, layout, mesh=Mesh(tp=2), passes=ROTATED) == lower(f, layout, mesh=Mesh(tp=2))
