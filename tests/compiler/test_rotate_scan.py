"""The rotated scan: the same numbers by as many collectives, each sum beside the addition that follows it."""
from __future__ import annotations

from typing import Any

import pytest
import torch
from decoded import collectives, config, decoded

from shardlib import EXPLICIT, Layout, Mesh, all_reduce, einsum, lower, scan, sharded, value_and_grad
from shardlib.compiler.parser import check, parse_program
from shardlib.compiler.passes import DEFAULT
from shardlib.functions import cast, sum, tanh
from shardlib.language.scan import SCAN
from shardlib.models.layouts import named_layout
from shardlib.models.llama import next_logits
from shardlib.ops import TABLE, embedding
from shardlib.program import Scan

ROTATED = (*DEFAULT, "rotate_scan")
PLACES = [("tp=2", "tp"), ("tp=2", "tp+sp"), ("dp=2,tp=2", "tp+fsdp"), ("tk=2,tg=2", "tp"),
          ("tk=2,tg=2", "tp+sp")]


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


@pytest.mark.parametrize("layers", [0, 1, 3])
@pytest.mark.parametrize("mesh, layout", [("", "tp"), ("dp=2", "dp")])
def test_where_nothing_is_owed_the_addition_moves(mesh: str, layout: str, layers: int) -> None:
    here, of = Mesh.parse(mesh), config(layers)
    layout = Layout(B="dp") if layout == "dp" else Layout()
    straight, rotated = (lower(next_logits, layout, mesh=here, config=of, passes=passes)
                         for passes in (DEFAULT, ROTATED))
    (scanned,) = (step for step in rotated.steps if step.op is SCAN)
    assert len(Scan.of(scanned).carries) == 2 and scanned.body.steps[0].op.name == "add"
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


@sharded("B D, D E, E -> B D")
def biased(x, up, of):
    """What is added has fewer dims than the residual."""
    return tanh(x) + einsum("B D, D E, E -> D", x, up, of)


@sharded("B, V D, L D E, L E -> B D")
def broadcasts(ids, table, up, of):
    return scan(biased, embedding("B, V D -> B D", ids, table), (up, of))


@sharded("B D, B D E, E -> B D")
def aside(x, up, of):
    """What is added does not read the residual: its dtype may be another."""
    return tanh(x) + einsum("B D E, E -> B D", up, of)


@sharded("B, V D, L B D E, L E -> B D")
def adds_what_is_given(ids, table, up, of):
    return scan(aside, embedding("B, V D -> B D", ids, table), (up, of))


SPLIT = Layout(V="tp", F="tp")


def test_it_rotates_what_the_others_are_like() -> None:
    assert "residual" in str(lower(plain, SPLIT, mesh=Mesh(tp=2), passes=ROTATED))


@pytest.mark.parametrize("f, layout", [(plain, Layout(F="tp")), (plain, Layout(V="tp")), (used_again, SPLIT),
                                       (broadcasts, Layout()), (adds_what_is_given, Layout()),
                                       (of_another_dtype, SPLIT), (of_two_owed_dtypes, EXPLICIT),
                                       (value_and_grad(loss, wrt="up"), SPLIT)])
def test_what_it_leaves_alone(f: Any, layout: Layout) -> None:
    """Nothing is owed before the scan, or in it; what goes in is used again; what is added has other dims
    than the residual, or perhaps another dtype; the owed sums have two dtypes; a gradient is wanted."""
    assert lower(f, layout, mesh=Mesh(tp=2), passes=ROTATED) == lower(f, layout, mesh=Mesh(tp=2))
