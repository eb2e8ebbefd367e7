"""An index out of range: one SpecError with op, line, argument and value, in every op that takes one,
forward and backward, at once or later."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shardlib import (
    Layout,
    Mesh,
    SpecError,
    compile,
    cond,
    lower,
    scan,
    sharded,
    simulate,
    step,
    value_and_grad,
)
from shardlib.distributed.runtime import Runtime
from shardlib.functions import greater, sum
from shardlib.lowering.emit import Emitter
from shardlib.lowering.index_check import IndexSite
from shardlib.ops import TABLE, cross_entropy, embedding, take, update_cache
from shardlib.ops.cases import CASES
from shardlib.oracle import Case, verdicts
from shardlib.placement import place
from shardlib.program import Program, Result
from shardlib.run.index_flags import _Flag
from shardlib.run.simulate import simulate as run_program

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = dict(B=4, D=2, T=2)
TAKING = [c for c in CASES if c.op.name.removesuffix("_vjp") in (
    "embedding", "take", "scatter_add", "update_cache", "one_hot", "cross_entropy", "cross_entropy_sums",
    "label_sums")]


@sharded("B, V D, B D -> ()")
def looked_up(ids, table, c):
    return sum("B D -> ()", embedding("B, V D -> B D", ids, table) * c)


@sharded("B, B V D, B D -> ()")
def taken(at, x, c):
    return sum("B D -> ()", take("B V D, B -> B D", x, at) * c)


@sharded("B, B V, B -> ()")
def losses(labels, x, c):
    return sum("B -> ()", cross_entropy("B V, B -> B", x, labels) * c)


@sharded("B, B V, B -> ()")
def some_losses(labels, x, c):
    return sum("B -> ()", cross_entropy("B V, B -> B", x, labels, ignore_index=-2) * c)


@sharded("B, B V D, B T D -> B V D")
def cached(begin, cache, rows):
    return update_cache("B V D, B T D, B -> B V D", cache, rows, begin)


CALLS = {"looked_up": (looked_up, "embedding: ids"), "taken": (taken, "take: at"),
         "losses": (losses, "cross_entropy: labels"), "some_losses": (some_losses, "cross_entropy: labels"),
         "cached": (cached, "update_cache: begin")}
PLACES = [(Mesh(), Layout()), (Mesh(tp=3), Layout(V="tp")), (Mesh(tp=3), Layout(B="tp")),
          (Mesh(dp=2, tp=2), Layout(B="dp", V="tp")), (Mesh(dp=2, tp=2), Layout(V=("tp", "dp"))),
          (Mesh(dp=2, tp=2), Layout(D="dp", V="tp"))]


@dataclass(frozen=True)
class Drawn:
    """A call whose index is `bad` in one row, and right in the others."""
    name: str
    size: int
    row: int
    bad: int
    index: Tensor
    place: tuple[Mesh, Layout]

    @property
    def message(self) -> str:
        f, head = CALLS[self.name]
        last, more = (self.size - SIZES["T"], ", T=2") if self.name == "cached" else (self.size - 1, "")
        hint = (f"; ignore_index={self.bad} leaves such rows out" if self.name == "losses" and self.bad < 0
                else "")
        line = f.fn.__code__.co_firstlineno + 2
        return (f"{head} holds {self.bad}, outside of 0 to {last} (V={self.size}{more}){hint}          "
                f"test_index_check.py:{line}")

    def operands(self) -> list[Tensor]:
        """What goes beside the index; the last one weighs the rows of a loss."""
        g, sizes = torch.Generator().manual_seed(0), {**SIZES, "V": self.size}
        return [torch.randn([sizes[n] for n in spec.names], generator=g, dtype=torch.float64)
                for spec in CALLS[self.name][0].ins[1:]]


@st.composite
def calls(draw: st.DrawFn, names: tuple[str, ...] = tuple(CALLS)) -> Drawn:
    name, size, row = (draw(st.sampled_from(names)), draw(st.integers(2, 7)),
                       draw(st.integers(0, SIZES["B"] - 1)))
    last = size - SIZES["T"] if name == "cached" else size - 1
    bad = draw(st.sampled_from((-1, -3, -100, last + 1, last + 2, 2**31 - 1, -2**31, 2**40, -2**62, 2**62)))
    index = torch.tensor(draw(st.lists(st.integers(0, last), min_size=SIZES["B"], max_size=SIZES["B"])))
    index[row] = bad
    if abs(bad) < 2**31 and draw(st.booleans()):
        index = index.int()
    return Drawn(name, size, row, bad, index, draw(st.sampled_from(PLACES)))


@given(calls(), st.booleans())
def test_it_is_refused_at_once(drawn: Drawn, backward: bool) -> None:
    f = CALLS[drawn.name][0]
    f = value_and_grad(f, f.arg_names[1]) if backward and drawn.name != "cached" else f
    with pytest.raises(SpecError) as found:
        simulate(f, drawn.place[1], drawn.index, *drawn.operands(), mesh=drawn.place[0])
    assert str(found.value) == drawn.message


@contextmanager
def read_later() -> Iterator[list[_Flag]]:
    """Programs that are simulated within note indices as they do on a GPU; their notes."""
    flags, simulator = [], run_program.__globals__
    load = simulator["load"]

    def loads(source: str, names: dict, groups: dict, title: str) -> object:
        flags.append(
            _Flag([site for site in names.values() if isinstance(site, IndexSite)], torch.device("cpu")))
        return load(source, names, groups, title)
    with mock.patch.dict(simulator, load=loads):
        yield flags


def refusals(flags: list[_Flag]) -> set[str]:
    """What the ranks' notes say when they are read; nothing the second time."""
    found = set()
    for flag in flags:
        try:
            flag.check()
        except SpecError as error:
            found.add(str(error))
        flag.check()
    return found


@given(calls(("looked_up", "taken", "losses", "some_losses")))
def test_read_later_it_is_the_same_error_and_its_row_counts_for_nothing_until_then(drawn: Drawn) -> None:
    f, (mesh, layout), operands = CALLS[drawn.name][0], drawn.place, drawn.operands()
    f = value_and_grad(f, f.arg_names[1])
    with read_later() as flags:
        got = simulate(f, layout, drawn.index, *operands, mesh=mesh)
    assert refusals(flags) == {drawn.message}
    index, weights = drawn.index.clone(), operands[-1].clone()
    index[drawn.row], weights[drawn.row] = 0, 0
    for a, b in zip(got, simulate(f, layout, index, *operands[:-1], weights, mesh=mesh), strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)


@given(calls(("cached",)))
def test_read_later_a_slot_that_is_not_there_spoils_no_other_row(drawn: Drawn) -> None:
    (mesh, layout), operands, others = (drawn.place, drawn.operands(),
                                        [r for r in range(SIZES["B"]) if r != drawn.row])
    with read_later() as flags:
        got = simulate(cached, layout, drawn.index, *operands, mesh=mesh)
    assert refusals(flags) == {drawn.message}
    index = drawn.index.clone()
    index[drawn.row] = 0
    assert torch.equal(got[others], simulate(cached, layout, index, *operands, mesh=mesh)[others])


@pytest.mark.parametrize("later", (False, True))
@pytest.mark.parametrize("case", TAKING, ids=str)
def test_every_piece_of_code_that_takes_an_index_refuses_it(case: Case, later: bool) -> None:
    """On pieces as its rule accepts them: those of backward, too,
    which never run where forward has refused."""
    at, mesh, sizes = case.op.index[0], Mesh(x=2), dict(B=2, T=5, D=4, K=3, H=4, V=5, S=6)
    shapes = [mesh.local_shape(spec, sizes, {}) for spec in case.ins]
    for bad in (-7, 13):
        for ins, _, outs in (v for v in verdicts(case, ("x",)) if v[2] is not None):
            whole = [torch.ones(shape, dtype=torch.int64 if i == at else torch.float64)
                     for i, shape in enumerate(shapes)]
            whole[at].view(-1)[-1] = bad
            step_ = case.step(ins, outs)
            program = Program("one", tuple(zip(step_.inputs, ins)), (step_,),
                              tuple(Result(s, (n,)) for s, n in zip(outs, step_.outputs)), True)
            placed = [place(x, kind, sizes, mesh) for x, kind in zip(whole, ins)]
            data = [{n: pieces[rank] for n, pieces in zip(step_.inputs, placed)} for rank in range(2)]
            with pytest.raises(SpecError, match=f"^[a-z_]+: (ids|index|labels|start) holds {bad}, outside of "
                               "0 to [0-9]+ "):
                if not later:
                    run_program(program, mesh, data, sizes)
                with read_later() as flags:
                    run_program(program, mesh, data, sizes)
                raise SpecError(refusals(flags).pop())


def test_every_op_that_takes_indices_is_tried() -> None:
    # tables, positions and masks pick no rows; experts are tried in tests/ops/test_expert*, and what dispatch
    # gives is its own
    rows = {name for name in TABLE if name.startswith(("dispatch", "grouped_einsum", "combine", "route",
                                                       "slots_of", "within_capacity"))}
    masks = {"attention", "attention_vjp", "causal_mask", "rope", "rope_vjp", "rope_table", "sample"}
    assert {op.name for op in TABLE.values() if op.index} - masks - rows == {c.op.name for c in TAKING}


# -- one rank: compile, step, and how notes are read ---------------------------------------------------------

TABLE_OF_FIVE = torch.arange(10.0).view(5, 2)
GOOD, BAD = torch.tensor([0, 4]), torch.tensor([0, 5])


@sharded("B, V D -> B D")
def rows(ids, table):
    return embedding("B, V D -> B D", ids, table)


OF_ROWS = ("embedding: ids holds 5, outside of 0 to 4 (V=5)          "
           f"test_index_check.py:{rows.fn.__code__.co_firstlineno + 2}")


def later(f: object, **options: object) -> object:
    """`f` compiled as for a GPU."""
    compiled = compile(f, **options)
    compiled._flags.at_once = False
    return compiled


@pytest.mark.parametrize("run", (compile(rows), step(rows), rows), ids=("compile", "step", "call"))
def test_on_the_cpu_every_way_to_run_refuses_at_once(run: object) -> None:
    for _ in range(2):
        with pytest.raises(SpecError) as found:
            run(BAD, TABLE_OF_FIVE)
        assert str(found.value) == OF_ROWS
    assert torch.equal(run(GOOD, TABLE_OF_FIVE), TABLE_OF_FIVE[GOOD])


@pytest.mark.parametrize("make, made_later", ((compile, False), (step, False), (lambda f: later(f), True)),
                         ids=("compile", "step", "later"))
def test_the_other_ranks_are_told_before_it_is_raised(make: object, made_later: bool) -> None:
    """Where all ranks have the index, none is told of what it sees at once;
    of what it sees later, when only it may know."""
    run, told = make(rows), []
    with (mock.patch.object(Runtime, "end_others", lambda self, error: told.append(str(error))),
          pytest.raises(SpecError)):
        run(BAD, TABLE_OF_FIVE)
        assert told == []
        run.check()
    assert told == ([OF_ROWS] if made_later else [])


def test_pieces_of_an_index_are_told_of() -> None:
    told: list[str] = []
    e = Emitter(Mesh(dp=2), 0, dict(B=4, V=5, D=2), given=dict(ids="int64", table="float32"))
    e.program(lower(rows, Layout(B="dp"), mesh=Mesh(dp=2)))
    (site,) = e.index_sites()
    site.tell = lambda error: told.append(str(error))
    with pytest.raises(SpecError):
        site.look(BAD)
    assert told == [OF_ROWS]


@pytest.mark.parametrize("graph", (False, True))
def test_a_later_error_comes_with_the_next_call_and_once(graph: bool) -> None:
    f = later(rows, graph=graph)
    assert torch.equal(f(GOOD, TABLE_OF_FIVE), TABLE_OF_FIVE[GOOD])
    assert torch.equal(f(BAD, TABLE_OF_FIVE), torch.tensor([[0.0, 1.0], [0.0, 0.0]]))
    with pytest.raises(SpecError) as found:
        f(GOOD, TABLE_OF_FIVE)
    assert str(found.value) == OF_ROWS
    assert torch.equal(f(GOOD, TABLE_OF_FIVE), TABLE_OF_FIVE[GOOD])
    f.check()


def test_a_later_error_comes_with_a_call_of_other_shapes() -> None:
    f = later(rows)
    f(GOOD[:1], TABLE_OF_FIVE)
    f(BAD, TABLE_OF_FIVE)
    with pytest.raises(SpecError, match="holds 5"):
        f(GOOD[:1], TABLE_OF_FIVE)


def test_check_reads_what_calls_have_noted_so_far() -> None:
    f = later(rows)
    f.check()
    f(BAD, TABLE_OF_FIVE)
    with pytest.raises(SpecError) as found:
        f.check()
    assert str(found.value) == OF_ROWS
    f.check()
    f(GOOD, TABLE_OF_FIVE)


def test_notes_are_kept_until_the_device_has_come_to_their_copy() -> None:
    """No call waits, none writes over what an earlier one has noted,
    and a copy that is under way stays alone."""
    f = later(rows)
    f(GOOD, TABLE_OF_FIVE)
    (flag,), sent = f._flags._flags, []
    flag.event = SimpleNamespace(query=lambda: False, record=lambda stream: sent.append(stream))
    with mock.patch("torch.cuda.current_stream", lambda device: "stream"):
        f.check()
        f(BAD, TABLE_OF_FIVE)
        assert sent == ["stream"]
        for _ in range(3):
            f(GOOD, TABLE_OF_FIVE)
        assert sent == ["stream"]
        flag.event.query = lambda: True
        with pytest.raises(SpecError, match="holds 5"):
            f(GOOD, TABLE_OF_FIVE)


def test_each_site_has_a_note_of_its_own() -> None:
    @sharded("B, B, V D -> B D")
    def both(ids, others, table):
        x = embedding("B, V D -> B D", ids, table)
        return x + embedding("B, V D -> B D", others, table)
    f, line = later(both), both.fn.__code__.co_firstlineno
    f(GOOD, BAD, TABLE_OF_FIVE)
    with pytest.raises(SpecError) as found:
        f.check()
    assert str(found.value) == (
        f"embedding: others holds 5, outside of 0 to 4 (V=5)          test_index_check.py:{line + 3}")


def test_a_site_in_a_loop_keeps_what_any_round_has_noted() -> None:
    @sharded("B D, B, V D -> B D")
    def body(x, ids, table):
        return x + embedding("B, V D -> B D", ids, table)

    @sharded("B D, L B, V D -> B D")
    def layers(x, ids, table):
        return scan(body, x, (ids,), table)
    f = later(layers)
    f(torch.zeros(2, 2), torch.stack([GOOD, BAD, GOOD]), TABLE_OF_FIVE)
    with pytest.raises(SpecError, match="ids holds 5, outside of 0 to 4"):
        f.check()


def test_the_name_is_the_users_through_conversions_and_pytrees_of_expressions() -> None:
    @sharded("B, B, V D -> B D")
    def shifted(ids, by, table):
        return embedding("B, V D -> B D", ids + by, table)
    with pytest.raises(SpecError, match="^embedding: ids holds 9, outside of 0 to 4 "):
        simulate(shifted, Layout(B="tp", V="tp"), GOOD, torch.tensor([0, 5]), TABLE_OF_FIVE, mesh=Mesh(tp=2))

    @sharded("B, V D -> B/1 D")
    def converted(which, table):
        return embedding("B/1, V D -> B/1 D", which, table)
    with pytest.raises(SpecError, match="^embedding: which holds 5, outside of 0 to 4 "):
        simulate(converted, Layout(B="tp"), BAD, TABLE_OF_FIVE, mesh=Mesh(tp=2))


def test_rows_that_cannot_fit_and_indices_that_are_none() -> None:
    with pytest.raises(SpecError, match=r"^update_cache: begin holds 0, outside of 0 to -1 \(V=1, T=2\)"):
        cached(torch.zeros(1, dtype=torch.int64), torch.zeros(1, 1, 1), torch.zeros(1, 2, 1))
    with pytest.raises(SpecError, match="^embedding: ids is float32; indices are integers"):
        rows(torch.zeros(2), TABLE_OF_FIVE)
    assert rows(GOOD[:0], TABLE_OF_FIVE[:0]).shape == (0, 2)
    f = later(rows)
    with pytest.raises(SpecError, match=r"^embedding: ids holds 0, outside of 0 to -1 \(V=0\)"):
        f(GOOD[:1], TABLE_OF_FIVE[:0])
    f.check()


def test_a_row_to_ignore_is_no_error_later_either() -> None:
    @sharded("B V, B -> B")
    def some(x, labels):
        return cross_entropy("B V, B -> B", x, labels, ignore_index=-2)
    f = later(some)
    assert f(torch.zeros(3, 1), torch.tensor([-2, 0, -2])).tolist() == [0, 0, 0]
    f.check()


def test_a_row_to_ignore_counts_for_nothing_though_its_index_is_in_range() -> None:
    @sharded("B V, B -> B")
    def some(x, labels):
        return cross_entropy("B V, B -> B", x, labels, ignore_index=0)
    x, labels = torch.zeros(3, 4), torch.tensor([0, 1, 0])
    for f in (some, later(some)):
        torch.testing.assert_close(f(x, labels), torch.tensor([1.0, 4.0, 1.0]).log())


def test_each_loss_of_the_same_labels_ignores_its_own() -> None:
    @sharded("B V, B -> B, B, B")
    def three(x, labels):
        return tuple(cross_entropy("B V, B -> B", x, labels, ignore_index=i) for i in (0, None, 1))
    x, labels = torch.zeros(3, 4), torch.tensor([0, 1, 2])
    for f in (three, later(three)):
        assert [(losses > 0).int().tolist() for losses in f(x, labels)] == [[0, 1, 1], [1, 1, 1], [1, 0, 1]]


@sharded("B S, B T, B -> B S")
def written(cache, rows, begin):
    return update_cache("B S, B T, B -> B S", cache, rows, begin)


@sharded("B S, B T, B -> B S")
def left(cache, rows, begin):
    return cache


def test_code_that_does_not_run_refuses_nothing() -> None:
    """A branch that is not taken, in a loop before which its checks might be done;
    and a loop without rounds, whose were."""
    @sharded("B S, S, B T, B -> B S")
    def body(cache, weight, rows, begin):
        return cond(greater(sum("S -> ()", weight), than=0.0), written, left, cache, rows, begin)

    @sharded("B S, L S, B T, B -> B S")
    def layers(cache, weights, rows, begin):
        return scan(body, cache, weights, rows, begin)
    cache, rows, bad = torch.zeros(1, 3), torch.ones(1, 2), torch.tensor([2])
    for run in (compile(layers), step(layers)):
        assert torch.equal(run(cache, torch.zeros(2, 3), rows, bad), cache)
        with pytest.raises(SpecError, match="^update_cache: begin holds 2, outside of 0 to 1 "):
            run(cache, torch.ones(2, 3), rows, bad)
    assert torch.equal(compile(layers)(cache, torch.zeros(0, 3), rows, bad), cache)

    @sharded("B S, S, B T, B -> B S")
    def rewritten(cache, weight, rows, begin):
        return written(cache, rows, begin)

    @sharded("B S, L S, B T, B -> B S")
    def always(cache, weights, rows, begin):
        return scan(rewritten, cache, weights, rows, begin)
    assert torch.equal(compile(always)(cache, torch.zeros(0, 3), rows, bad), cache)
    with pytest.raises(SpecError, match="^update_cache: begin holds 2, outside of 0 to 1 "):
        compile(always)(cache, torch.zeros(1, 3), rows, bad)


@sharded("B, V D -> B D")
def looked_up(ids, table):
    return embedding("B, V D -> B D", ids, table)


@sharded("B, V D -> B D")
def looked_up_too(ids, table):
    return embedding("B, V D -> B D", ids, table)


def test_the_line_is_that_of_what_ran() -> None:
    """Of two branches the one that is taken; of two calls of equal types, step by step,
    the one that is wrong."""
    @sharded("(), B, V D -> B D")
    def either(which, ids, table):
        return cond(which, looked_up, looked_up_too, ids, table)

    @sharded("B, B, V D -> B D")
    def both(ids, words, table):
        x = embedding("B, V D -> B D", ids, table)
        return x + embedding("B, V D -> B D", words, table)
    for f, args, says, line in (
            (either, (torch.tensor(0.0), BAD), "ids", looked_up_too.fn.__code__.co_firstlineno + 2),
            (both, (GOOD, BAD), "words", both.fn.__code__.co_firstlineno + 3)):
        for run in (compile(f), step(f)):
            with pytest.raises(SpecError) as found:
                run(*args, TABLE_OF_FIVE)
            assert str(found.value) == (
                f"embedding: {says} holds 5, outside of 0 to 4 (V=5)          test_index_check.py:{line}")
