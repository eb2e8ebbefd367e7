"""The proof: it holds for the programs of the models, and for no ranks of which one does something else.

It goes by classes of ranks. What it says is what matching rank by rank says (`helpers/rank_by_rank.py`), and
that is held against the absence of circles.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache
from graphlib import CycleError, TopologicalSorter
from math import prod

import pytest
import rank_by_rank
from hypothesis import assume, given
from hypothesis import strategies as st

from shardlib import Layout, Mesh, SpecError, all_reduce, lower, sharded
from shardlib.api import value_and_grad
from shardlib.models.layouts import named_layout
from shardlib.models.llama import LlamaConfig, logits_of, loss, next_token
from shardlib.program import Program
from shardlib.reports.classes import Classes, classes_of
from shardlib.reports.project import Call, Calls, Repeat, project, project_classes, sent, unrolled
from shardlib.reports.prove import match, prove

CONFIG = LlamaConfig(vocab_size=11, d_model=18, num_layers=2, num_kv_heads=3, queries_per_kv=2, head_dim=4,
                     d_ff=7, norm_eps=1e-5, rope_theta=1e4, rope_scaling=None, tied=False, max_context=64)
SIZES = dict(CONFIG.sizes, B=3, T=5, S=5)
PLACES = (("tp=2", "tp"), ("tp=3", "tp+sp"), ("dp=2", "fsdp"), ("tk=2,tg=2", "tp"), ("cp=2,tp=2", "tp+cp"),
          ("dp=2,cp=2,tp=2", "tp+sp+fsdp+cp"))
PROGRAMS = {"next_token": next_token, "logits_of": logits_of, "loss": value_and_grad(loss)}


@cache
def lowered(name: str, mesh: str, layout: str) -> Program:
    return lower(PROGRAMS[name], named_layout(layout, Mesh.parse(mesh)), mesh=Mesh.parse(mesh), config=CONFIG)


@cache
def calls(name: str, mesh: str, layout: str) -> tuple[tuple[Call, ...], ...]:
    """Every rank's collectives."""
    made = Mesh.parse(mesh)
    program = lowered(name, mesh, layout)
    return tuple(tuple(project(program, made, rank, SIZES)) for rank in range(made.world_size))


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("mesh, layout", PLACES)
def test_the_programs_of_the_models(name: str, mesh: str, layout: str) -> None:
    made = Mesh.parse(mesh)
    proof = prove(lowered(name, mesh, layout), made, SIZES)
    assert proof.collectives == sum(c.group[0] == rank for rank, made in enumerate(calls(name, mesh, layout))
                                    for c in made)
    assert proof.collectives == rank_by_rank.match(calls(name, mesh, layout))
    assert str(proof) == (f"on mesh {mesh}: {made.world_size} ranks, {proof.collectives} collectives, all "
                          f"matched; plan {proof.digest[:12]}")


def test_digests_tell_plans_apart() -> None:
    found = {prove(lowered(name, *place), Mesh.parse(place[0]), SIZES).digest
             for name in PROGRAMS for place in PLACES}
    assert len(found) == len(PROGRAMS) * len(PLACES)
    mesh, program = (Mesh(tp=2),
                     lower(next_token, named_layout("tp", Mesh(tp=2)), mesh=Mesh(tp=2), config=CONFIG))
    others = (SIZES, {**SIZES, "T": 6, "S": 6}, {**SIZES, "B": 4})
    assert len({prove(program, mesh, sizes,
                      {p: kind for p, _ in program.arg_leaves() if p.startswith(("w.", "cache."))}).digest
                for sizes in others for kind in ("float32", "bfloat16")}) == 6


def test_a_digest_says_the_dtype_of_what_is_sent() -> None:
    """Where nothing else differs."""
    mesh = Mesh(tp=2)
    total = lower(sharded("T D +tp -> T D")(lambda x: all_reduce("T D +tp -> T D", x)), Layout(), mesh=mesh)
    assert len({prove(total, mesh, dict(T=2, D=3), dict(x=kind)).digest
                for kind in ("float32", "int32", "bfloat16", "float16")}) == 4


# -- mutants -------------------------------------------------------------------------------------------------

def skipped(draw: st.DrawFn, made: list[Call], i: int, mesh: Mesh) -> list[Call]:
    return made[:i] + made[i + 1:]


def repeated(draw: st.DrawFn, made: list[Call], i: int, mesh: Mesh) -> list[Call]:
    return made[:i + 1] + made[i:]


def resized(draw: st.DrawFn, made: list[Call], i: int, mesh: Mesh) -> list[Call]:
    """This rank brings more or fewer elements; it may know that the others expect the old number, or not."""
    call, more = made[i], draw(st.sampled_from((-1, 1, 7)))
    me = draw(st.sampled_from(range(len(call.shapes))))
    shapes = list(call.shapes)
    if draw(st.booleans()) and shapes[me]:
        shapes[me] = (*shapes[me][:-1], max(shapes[me][-1] + more, 0))
        return [*made[:i], replace(call, shapes=tuple(shapes)), *made[i + 1:]]
    return [*made[:i], replace(call, numel=call.numel + more), *made[i + 1:]]


def rooted(draw: st.DrawFn, made: list[Call], i: int, mesh: Mesh) -> list[Call]:
    return [*made[:i], replace(made[i], root=draw(st.integers(0, len(made[i].shapes) - 1))), *made[i + 1:]]


def other_dtype(draw: st.DrawFn, made: list[Call], i: int, mesh: Mesh) -> list[Call]:
    return [*made[:i], replace(made[i], dtype=draw(st.sampled_from(("float32", "bfloat16", "int64")))),
            *made[i + 1:]]


def other_op(draw: st.DrawFn, made: list[Call], i: int, mesh: Mesh) -> list[Call]:
    return [*made[:i], replace(made[i], op=draw(
        st.sampled_from(("all_reduce", "all_gather", "reduce_scatter", "all_to_all")))), *made[i + 1:]]


def other_group(draw: st.DrawFn, made: list[Call], i: int, mesh: Mesh) -> list[Call]:
    """Any ranks, in any order, this one perhaps not among them."""
    group = draw(st.lists(st.integers(0, mesh.world_size - 1), min_size=1, unique=True))
    return [*made[:i], replace(made[i], group=tuple(group)), *made[i + 1:]]


def other_axes(draw: st.DrawFn, made: list[Call], i: int, mesh: Mesh) -> list[Call]:
    """Any axes, in any order."""
    group = draw(st.lists(st.sampled_from([*mesh.axes]), unique=True))
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
        rank_by_rank.match(ranks)
    assert str(caught.value).startswith(("the ranks part ways: rank 0 ", "ranks ", f"rank {rank} is in "))


def runs_to_the_end(ranks: Sequence[Sequence[Call]]) -> bool:
    """Another way to say it: the k-th calls of a group's members are the same, and no call waits,
    by way of others, for itself."""
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
def test_a_swap_is_rejected_unless_every_rank_can_still_end(
        mutant: tuple[Mesh, list[list[Call]], int]) -> None:
    """Within one group it never can.

    Calls of two groups may change places on one rank, if nobody waits in a circle then.
    """
    mesh, ranks, rank = mutant
    try:
        rank_by_rank.match(ranks)
        ends = True
    except SpecError:
        ends = False
    assert ends == runs_to_the_end(ranks)
    if len(mesh.axes) == 1:
        assert not ends


@given(mutants((skipped, repeated, rooted, other_dtype, other_op, other_group, swapped)), st.data())
def test_the_proof_is_the_absence_of_circles(mutant: tuple[Mesh, list[list[Call]], int],
                                             data: st.DataObject) -> None:
    """Also for several ranks changed alike, which may be right."""
    mesh, ranks, rank = mutant
    name = data.draw(st.sampled_from(range(len(ranks))))
    change = data.draw(st.sampled_from((skipped, repeated, swapped)))
    at = data.draw(st.integers(0, max(len(ranks[name]) - 1, 0)))
    for other in range(len(ranks)):
        if data.draw(st.booleans()):
            ranks[other] = change(data.draw, list(ranks[other]), at, mesh)
    try:
        rank_by_rank.match(ranks)
        ends = True
    except SpecError:
        ends = False
    assert ends == runs_to_the_end(ranks)


# -- by classes ----------------------------------------------------------------------------------------------

def same_calls(call: Call, classes: Classes, c: int, rank: int) -> Call:
    """A call of class `c` as `rank`, one of its ranks, makes it."""
    of = dict(zip(classes.peers(c, call.group), call.shapes))
    ranks, kind = classes.mesh.group(call.group, rank), classes.by_rank(range(len(classes)))
    return replace(call, group=ranks, shapes=tuple(of.get(kind[r], ()) for r in ranks))


def every_rank(classes: Classes, calls: Sequence[Calls]) -> list[list[Call]]:
    return [[same_calls(call, classes, c, rank) for call in unrolled(calls[c])]
            for rank, c in enumerate(classes.by_rank(range(len(classes))))]


def verdict(match: Callable, *of: object) -> object:
    """How many collectives there are, or nothing where there is no proof."""
    try:
        found = match(*of)
    except SpecError:
        return None
    return found if isinstance(found, int) else found.collectives


@st.composite
def finer(draw: st.DrawFn, classes: Classes) -> Classes:
    """Some rank is a class of its own; and further cuts, that no size needs."""
    rank = classes.mesh.coordinate(draw(st.integers(0, classes.mesh.world_size - 1)))
    return classes.cut({axis: {i, i + 1, *draw(st.lists(st.integers(0, classes.mesh.axes[axis]), max_size=1))}
                        for axis, i in rank.items()})


@st.composite
def projected(draw: st.DrawFn) -> tuple[Classes, list[Calls]]:
    name, (mesh, layout) = draw(st.sampled_from(tuple(PROGRAMS))), draw(st.sampled_from(PLACES))
    program = lowered(name, mesh, layout)
    classes = draw(finer(classes_of(Mesh.parse(mesh), sent(program), SIZES)))
    return classes, project_classes(program, classes, SIZES)


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("mesh, layout", PLACES)
def test_a_class_makes_the_calls_of_each_of_its_ranks(name: str, mesh: str, layout: str) -> None:
    program = lowered(name, mesh, layout)
    classes = classes_of(Mesh.parse(mesh), sent(program), SIZES)
    of_class = project_classes(program, classes, SIZES)
    assert every_rank(classes, of_class) == list(map(list, calls(name, mesh, layout)))


@given(projected())
def test_further_cuts_prove_the_same(made: tuple[Classes, list[Calls]]) -> None:
    classes, of_class = made
    assert match(*made).collectives == rank_by_rank.match(every_rank(classes, of_class))


HOW = (skipped, repeated, resized, rooted, other_dtype, other_op, other_axes)


@given(projected(), st.sampled_from(HOW), st.data())
def test_one_rank_that_does_otherwise_is_rejected(made: tuple, how: Callable, data: st.DataObject) -> None:
    """Whatever it is that it does."""
    classes, of_class = made
    c = data.draw(st.sampled_from([c for c in range(len(classes)) if classes.count(c) == 1]))
    before = list(unrolled(of_class[c]))
    of_class[c] = tuple(how(data.draw, before, data.draw(st.integers(0, len(before) - 1)), classes.mesh))
    assume(list(map(identity, of_class[c])) != list(map(identity, before)))
    with pytest.raises(SpecError, match="^(the ranks part ways: rank 0 |ranks |rank [0-9]+ is in )"):
        match(classes, of_class)
    assert verdict(rank_by_rank.match, every_rank(classes, of_class)) is None


@given(projected(), st.data())
def test_changed_classes_are_judged_as_their_ranks_are(made: tuple, data: st.DataObject) -> None:
    """They may be right: all may leave out the same collective, one may swap two that nobody waits for."""
    classes, of_class = made
    how, at = data.draw(st.sampled_from((skipped, repeated, swapped))), data.draw(st.integers(0, 60))
    inside = data.draw(st.booleans())                               # of the body of a scan, each time
    some = st.lists(st.sampled_from(range(len(classes))), min_size=1, unique=True)
    for c in data.draw(st.one_of(st.just(range(len(classes))), some)):
        of_class[c] = tuple(changed(of_class[c], how, at, classes.mesh, data.draw, inside))
    assert verdict(match, classes, of_class) == verdict(rank_by_rank.match, every_rank(classes, of_class))


def changed(calls: Calls, how: Callable, at: int, mesh: Mesh, draw: Callable,
            inside: bool) -> Iterable[Call | Repeat]:
    if inside and (scans := [i for i, call in enumerate(calls) if isinstance(call, Repeat) and call.calls]):
        i = scans[at % len(scans)]
        body = tuple(changed(calls[i].calls, how, at, mesh, draw, False))
        return [*calls[:i], replace(calls[i], calls=body), *calls[i + 1:]]
    return how(draw, list(calls), at % len(calls), mesh)


def test_a_scan_that_classes_do_not_leave_together() -> None:
    """One enters late and leaves early: what it calls before the scan, the other calls in it; all meet."""
    classes = Classes(Mesh(tp=2), {"tp": (0, 1)})
    one = Call("all_reduce", ("tp",), "float32", 1, ((1,), (1,)))
    two = replace(one, op="all_gather")
    late = one, Repeat("f", 2, (two, one)), two
    assert match(classes, [late, (Repeat("g", 3, (one, two)),)]).collectives == 6
    assert match(classes, [(Repeat("f", 0, (one,)),), (Repeat("g", 0, (two,)),)]).collectives == 0
    assert match(classes, [(Repeat("f", 3, (one,)),), (Repeat("g", 2, (one,)), one)]).collectives == 3
    with pytest.raises(SpecError, match="rank 1 has ended$"):
        match(classes, [(Repeat("f", 3, (one,)),), (Repeat("g", 2, (one,)),)])
    with pytest.raises(SpecError, match=r"rank 1 is in all_gather of 1 float32 over ranks 0 1 at g\[1\]\.z$"):
        late = Repeat("g", 2, (replace(two, step="z"),))
        match(classes, [(one, Repeat("f", 2, (one, two))), (one, one, late)])


def test_a_proof_of_many_ranks_takes_no_longer() -> None:
    """65,536 ranks are few classes. Rank by rank, a proof of 128 takes half a minute."""
    mesh = Mesh(dp=1024, cp=8, tp=8)
    program = lower(PROGRAMS["loss"], named_layout("tp+sp+fsdp+cp", mesh), mesh=mesh, config=CONFIG)
    sizes = {**SIZES, "B": 1543, "T": 128, "S": 128}
    proof = prove(program, mesh, sizes)
    assert str(proof).startswith(
        f"on mesh {mesh}: 65536 ranks, {proof.collectives} collectives, all matched; ")
    assert len(classes_of(mesh, sent(program), sizes)) < 65


def test_messages() -> None:
    classes = Classes(Mesh(tp=2), {"tp": (0, 1)})
    one = Call("all_reduce", ("tp",), "float32", 6, ((2, 3), (2, 3)), step="y (model.py:3)")
    two = Call("all_gather", ("tp",), "float32", 6, ((2, 3), (2, 3)), step="z (model.py:4)")

    def said(*ranks: Sequence[Call]) -> str:
        with pytest.raises(SpecError) as caught:
            match(classes, ranks)
        return str(caught.value)
    assert said([one, two], [two, one]) == (
        "ranks 0 and 1 meet in different collectives: rank 0 is in all_reduce of 6 float32 over ranks 0 1 at "
        "y (model.py:3); "
        "rank 1 is in all_gather of 6 float32 over ranks 0 1 at z (model.py:4)")
    assert said([one, two], [one]) == (
        "the ranks part ways: rank 0 is in all_gather of 6 float32 over ranks 0 1 at z (model.py:4); rank 1 "
        "has ended")
    assert said([one], [replace(one, numel=4)]) == (
        "rank 1 is in all_reduce of 4 float32 over ranks 0 1 at y (model.py:3); its piece has shape (2, 3)")
    assert said([replace(one, root=0)], [replace(one, root=1, step="")]) == (
        "ranks 0 and 1 meet in different collectives: rank 0 is in all_reduce of 6 float32 over ranks 0 1 at "
        "y (model.py:3); "
        "rank 1 is in all_reduce of 6 float32 over ranks 0 1")
