"""The proof: it holds for the programs of the models, and for no list of collectives in which one rank does something else."""
from __future__ import annotations

from dataclasses import replace
from functools import cache
from graphlib import CycleError, TopologicalSorter
from math import prod
from typing import Sequence

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from shardlib import Mesh, SpecError, lower
from shardlib.api import value_and_grad
from shardlib.models.layouts import named_layout
from shardlib.models.llama import LlamaConfig, logits_of, loss, next_token
from shardlib.reports.project import Call, project
from shardlib.reports.prove import match, prove

CONFIG = LlamaConfig(vocab_size=11, d_model=18, num_layers=2, num_kv_heads=3, queries_per_kv=2, head_dim=4, d_ff=7, norm_eps=1e-5,
                     rope_theta=1e4, rope_scaling=None, tied=False, max_context=64)
SIZES = dict(CONFIG.sizes, B=3, T=5, S=5)
PLACES = (("tp=2", "tp"), ("tp=3", "tp+sp"), ("dp=2", "fsdp"), ("tk=2,tg=2", "tp"), ("cp=2,tp=2", "tp+cp"), ("dp=2,cp=2,tp=2", "tp+sp+fsdp+cp"))
PROGRAMS = {"next_token": next_token, "logits_of": logits_of, "loss": value_and_grad(loss)}


@cache
def calls(name: str, mesh: str, layout: str) -> tuple[tuple[Call, ...], ...]:
    """Every rank's collectives."""
    made = Mesh.parse(mesh)
    program = lower(PROGRAMS[name], named_layout(layout, made), mesh=made, config=CONFIG)
    return tuple(tuple(project(program, made, rank, SIZES)) for rank in range(made.world_size))


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("mesh, layout", PLACES)
def test_the_programs_of_the_models(name: str, mesh: str, layout: str) -> None:
    made = Mesh.parse(mesh)
    proof = prove(lower(PROGRAMS[name], named_layout(layout, made), mesh=made, config=CONFIG), made, SIZES)
    assert proof.collectives == sum(c.group[0] == rank for rank, made in enumerate(calls(name, mesh, layout)) for c in made)
    assert proof == match(made, calls(name, mesh, layout))
    assert str(proof) == f"on mesh {mesh}: {made.world_size} ranks, {proof.collectives} collectives, all matched; plan {proof.digest[:12]}"


def test_digests_tell_plans_apart() -> None:
    found = {match(Mesh.parse(mesh), calls(name, mesh, layout)).digest for name in PROGRAMS for mesh, layout in PLACES}
    assert len(found) == len(PROGRAMS) * len(PLACES)
    mesh, program = Mesh(tp=2), lower(next_token, named_layout("tp", Mesh(tp=2)), mesh=Mesh(tp=2), config=CONFIG)
    others = (SIZES, {**SIZES, "T": 6, "S": 6}, {**SIZES, "B": 4})
    assert len({prove(program, mesh, sizes, {p: kind for p, _ in program.arg_leaves() if p.startswith(("w.", "cache."))}).digest
                for sizes in others for kind in ("float32", "bfloat16")}) == 6


# -- mutants -----------------------------------------------------------------------------------------------------------

def skipped(draw: st.DrawFn, made: list[Call], i: int, mesh: Mesh) -> list[Call]:
    return made[:i] + made[i + 1:]


def repeated(draw: st.DrawFn, made: list[Call], i: int, mesh: Mesh) -> list[Call]:
    return made[:i + 1] + made[i:]


def resized(draw: st.DrawFn, made: list[Call], i: int, mesh: Mesh) -> list[Call]:
    """This rank brings more or fewer elements; it may know that the others expect the old number, or not."""
    call, more = made[i], draw(st.sampled_from((-1, 1, 7)))
    me = draw(st.sampled_from(range(len(call.group))))
    shapes = list(call.shapes)
    if draw(st.booleans()) and shapes[me]:
        shapes[me] = (*shapes[me][:-1], max(shapes[me][-1] + more, 0))
        return [*made[:i], replace(call, shapes=tuple(shapes)), *made[i + 1:]]
    return [*made[:i], replace(call, numel=call.numel + more), *made[i + 1:]]


def rooted(draw: st.DrawFn, made: list[Call], i: int, mesh: Mesh) -> list[Call]:
    return [*made[:i], replace(made[i], root=draw(st.integers(0, len(made[i].group) - 1))), *made[i + 1:]]


def other_dtype(draw: st.DrawFn, made: list[Call], i: int, mesh: Mesh) -> list[Call]:
    return [*made[:i], replace(made[i], dtype=draw(st.sampled_from(("float32", "bfloat16", "int64")))), *made[i + 1:]]


def other_op(draw: st.DrawFn, made: list[Call], i: int, mesh: Mesh) -> list[Call]:
    return [*made[:i], replace(made[i], op=draw(st.sampled_from(("all_reduce", "all_gather", "reduce_scatter", "all_to_all")))), *made[i + 1:]]


def other_group(draw: st.DrawFn, made: list[Call], i: int, mesh: Mesh) -> list[Call]:
    """Any ranks, in any order, this one perhaps not among them."""
    group = draw(st.lists(st.integers(0, mesh.world_size - 1), min_size=1, unique=True))
    return [*made[:i], replace(made[i], group=tuple(group)), *made[i + 1:]]


def swapped(draw: st.DrawFn, made: list[Call], i: int, mesh: Mesh) -> list[Call]:
    return [*made[:i], *made[i:i + 2][::-1], *made[i + 2:]]


def identity(call: Call) -> tuple:
    """A call without the name of its step."""
    return replace(call, step="", numel=0), call.numel


@st.composite
def mutants(draw: st.DrawFn, how: Sequence) -> tuple[Mesh, list[list[Call]], int]:
    """All ranks' collectives, those of one rank changed, and that rank."""
    name, (mesh, layout) = draw(st.sampled_from(tuple(PROGRAMS))), draw(st.sampled_from(PLACES))
    ranks, made = [list(c) for c in calls(name, mesh, layout)], Mesh.parse(mesh)
    rank = draw(st.integers(0, len(ranks) - 1))
    before = ranks[rank]
    ranks[rank] = draw(st.sampled_from(how))(draw, before, draw(st.integers(0, len(before) - 1)), made)
    assume(list(map(identity, ranks[rank])) != list(map(identity, before)))
    return made, ranks, rank


@given(mutants((skipped, repeated, resized, rooted, other_dtype, other_op, other_group)))
def test_every_mutant_is_rejected(mutant: tuple[Mesh, list[list[Call]], int]) -> None:
    mesh, ranks, rank = mutant
    with pytest.raises(SpecError) as caught:
        match(mesh, ranks)
    assert str(caught.value).startswith(("the ranks part ways: rank 0 ", "ranks ", f"rank {rank} is in "))


def runs_to_the_end(ranks: Sequence[Sequence[Call]]) -> bool:
    """Another way to say it: the k-th calls of a group's members are the same, and no call waits, by way of others, for itself."""
    nth: dict[tuple, dict[int, tuple]] = {}
    graph: dict[tuple, set[tuple]] = {}
    for rank, made in enumerate(ranks):
        before, count = None, dict.fromkeys((c.group for c in made), 0)
        for call in made:
            if call.numel != prod(dict(zip(call.group, call.shapes)).get(rank, (call.numel,))):
                return False
            node = (call.group, count[call.group])
            count[call.group] += 1
            nth.setdefault(node, {})[rank] = identity(replace(call, numel=0))
            graph.setdefault(node, set()).update([before] if before else [])
            before = node
    if any(sorted(said) != sorted(group) or len(set(said.values())) > 1 for (group, _), said in nth.items()):
        return False
    try:
        TopologicalSorter(graph).prepare()
        return True
    except CycleError:
        return False


@given(mutants((swapped,)))
def test_a_swap_is_rejected_unless_every_rank_can_still_end(mutant: tuple[Mesh, list[list[Call]], int]) -> None:
    """Within one group it never can. Calls of two groups may change places on one rank, if nobody waits in a circle then."""
    mesh, ranks, rank = mutant
    try:
        match(mesh, ranks)
        ends = True
    except SpecError:
        ends = False
    assert ends == runs_to_the_end(ranks)
    if len(mesh.axes) == 1:
        assert not ends


@given(mutants((skipped, repeated, rooted, other_dtype, other_op, other_group, swapped)), st.data())
def test_the_proof_is_the_absence_of_circles(mutant: tuple[Mesh, list[list[Call]], int], data: st.DataObject) -> None:
    """Also for several ranks changed alike, which may be right."""
    mesh, ranks, rank = mutant
    name = data.draw(st.sampled_from(range(len(ranks))))
    change = data.draw(st.sampled_from((skipped, repeated, swapped)))
    at = data.draw(st.integers(0, max(len(ranks[name]) - 1, 0)))
    for other in range(len(ranks)):
        if data.draw(st.booleans()):
            ranks[other] = change(data.draw, list(ranks[other]), at, mesh)
    try:
        match(mesh, ranks)
        ends = True
    except SpecError:
        ends = False
    assert ends == runs_to_the_end(ranks)


def test_messages() -> None:
    mesh = Mesh(tp=2)
    one = Call("all_reduce", (0, 1), "float32", 6, ((2, 3), (2, 3)), step="y (model.py:3)")
    two = Call("all_gather", (0, 1), "float32", 6, ((2, 3), (2, 3)), step="z (model.py:4)")

    def said(*ranks: Sequence[Call]) -> str:
        with pytest.raises(SpecError) as caught:
            match(mesh, ranks)
        return str(caught.value)
    assert said([one, two], [two, one]) == (
        "ranks 0 and 1 meet in different collectives: rank 0 is in all_reduce of 6 float32 over ranks 0 1 at y (model.py:3); "
        "rank 1 is in all_gather of 6 float32 over ranks 0 1 at z (model.py:4)")
    assert said([one, two], [one]) == (
        "the ranks part ways: rank 0 is in all_gather of 6 float32 over ranks 0 1 at z (model.py:4); rank 1 has ended")
    assert said([one], [replace(one, numel=4)]) == "rank 1 is in all_reduce of 4 float32 over ranks 0 1 at y (model.py:3); its piece has shape (2, 3)"
    assert said([replace(one, root=0)], [replace(one, root=1, step="")]) == (
        "ranks 0 and 1 meet in different collectives: rank 0 is in all_reduce of 6 float32 over ranks 0 1 at y (model.py:3); "
        "rank 1 is in all_reduce of 6 float32 over ranks 0 1")
