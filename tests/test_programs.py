"""Random well-typed programs: run on every rank they are what they mean in float64; printed they read back;
their mutants are refused.

What a program means is said by the references of its ops (`shardlib.reference.meaning`), its gradients by
autograd of these.

`helpers/program_writer.py` draws a declarative program from the ops themselves, a step at a time. A failure
shrinks to a program that a person can read; the assertion prints it.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest
import rank_by_rank
import torch
from hypothesis import assume, event, given, reject, settings
from hypothesis import strategies as st
from pasting import numbered, pasted
from program_writer import BATCH, CALLS, FLOATS, KINDS, SIZES, Writer, update_cache, write

import shardlib
from shardlib import (
    EXPLICIT,
    Params,
    all_gather,
    all_reduce,
    functions,
    lower,
    ops,
    param,
    reduce_scatter,
    sharded,
    value_and_grad,
)
from shardlib import cond as choose
from shardlib import rename as relabel
from shardlib import scan as scan_over
from shardlib.compiler.complete import complete
from shardlib.compiler.grad import value_and_grad_program
from shardlib.compiler.parser import CORE, check, parse_program
from shardlib.compiler.passes import PASSES
from shardlib.compiler.passes.fuse import fuse
from shardlib.errors import SpecError
from shardlib.functions import argmax as best_of
from shardlib.functions import greater, logsumexp
from shardlib.functions import sum as total
from shardlib.language.arithmetic import ADD
from shardlib.language.einsum import EINSUM
from shardlib.language.moves import TABLE as MOVES
from shardlib.language.scan import SCAN
from shardlib.layout import Layout
from shardlib.lowering.emit import Emitter
from shardlib.mesh import Mesh
from shardlib.models.layouts import named_layout
from shardlib.models.llama import LlamaConfig, loss, next_token
from shardlib.ops import TABLE, lowered
from shardlib.ops import embedding as look_up
from shardlib.ops.cases import CASES
from shardlib.ops.fusions import FUSIONS
from shardlib.oracle import Draw, same, types
from shardlib.placement import join, place
from shardlib.program import Program, Result, Step, leaves
from shardlib.reference import meaning
from shardlib.reports.classes import classes_of
from shardlib.reports.explain import explain
from shardlib.reports.project import project, project_classes, sent, stage_classes, unrolled
from shardlib.reports.prove import match
from shardlib.run.simulate import perform, simulate
from shardlib.spec import Spec, parse

pytestmark = pytest.mark.usefixtures("one_thread")
TOLERANCE = 1e-6  # of the largest element: programs subtract, divide and normalise what they rounded


# -- programs ------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Drawn:
    """A declarative program, where it runs, and what its arguments hold."""
    program: Program
    mesh: Mesh
    layout: Layout
    sizes: Mapping[str, int]
    holds: Mapping[str, str | Draw]
    floats: tuple[str, ...]

    def __str__(self) -> str:
        return (f"{self.program}\nlayout {self.layout}\nmesh {self.mesh}\nsizes {dict(self.sizes)}\n\n"
                f"{self.explicit()}")

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(str(self))

    def explicit(self) -> Program:
        return complete(self.program, self.layout, self.mesh)


@st.composite
def layouts(draw: st.DrawFn, mesh: Mesh, dims: Sequence[str]) -> Layout:
    entries = draw(st.permutations(dims))[:draw(st.integers(1, len(dims)))]
    return Layout({d: axes for d in entries
                   if (axes := tuple(draw(st.permutations(list(mesh.axes)))[:draw(st.integers(1, 2))]))})


@st.composite
def programs(draw: st.DrawFn, kinds: Sequence[Callable[[Writer], None]] = KINDS) -> Drawn:
    mesh = Mesh({a: draw(st.sampled_from((2, 3, 1, 4))) for a in "xyz"[:draw(st.integers(1, 3))]})
    if mesh.world_size > 12:
        mesh = Mesh(x=2, y=3)
    sizes = ({n: draw(st.sampled_from(SIZES[::-1])) for n in (*BATCH, "G")}
             | dict(H=draw(st.sampled_from((4, 2))), V=draw(st.sampled_from((5, 3, 1)))))
    sizes |= dict(S=sizes["T"] + draw(st.integers(0, 2)), L=draw(st.integers(0, 3)), J=2)
    layout = draw(layouts(mesh, (*BATCH, "G", "V", "S", "P", "H", "Q")))
    w = Writer(draw, sizes, mesh, lambda p: types_under(p, layout, mesh))
    write(w, 12, kinds)
    used = {i for s in w.steps for i in s.inputs}
    made = [o for s in w.steps for o, spec in zip(s.outputs, s.outs) if not any(d.ragged for d in spec.dims)]
    results = [o for o in made if o not in used or w.draw(st.integers(0, 4)) == 0] or [w.float_().name]
    floats = tuple(v.name for v in w.values if v.holds in FLOATS)
    return Drawn(w.program("f", results), mesh, layout, dict(w.sizes), dict(w.holds), floats)


def types_under(program: Program, layout: Layout, mesh: Mesh) -> bool:
    try:
        complete(program, layout, mesh)
    except SpecError:
        return False
    return True


def whole_args(drawn: Drawn) -> dict[str, torch.Tensor]:
    """Random arguments; the same for every program with them."""
    g, sizes = torch.Generator().manual_seed(3), drawn.sizes
    out = {}
    for name, holds in drawn.holds.items():
        kind = dict(drawn.program.arg_leaves()).get(name)
        if kind is None:
            continue
        shape = drawn.mesh.local_shape(kind.whole(), sizes, {})
        if callable(holds):
            out[name] = holds(shape, sizes, g, [])
        elif holds in ("any", "bounded"):
            out[name] = torch.randn(shape, generator=g, dtype=torch.float64)
        elif holds == "positive":
            out[name] = torch.rand(shape, generator=g, dtype=torch.float64) + 0.5
        else:
            below = {"mask": 2, "start": sizes["S"] - sizes["T"] + 1}.get(holds) or sizes[holds]
            out[name] = torch.randint(below, shape,
                                      generator=g).to(torch.bool if holds == "mask" else torch.int64)
    return out


def run(program: Program, mesh: Mesh, sizes: Mapping[str, int],
        args: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """The results of an explicit program, put together."""
    pieces = {path: place(args[path], kind, sizes, mesh) for path, kind in program.arg_leaves()}
    ran = simulate(program, mesh,
                   [{p: x[rank] for p, x in pieces.items()} for rank in range(mesh.world_size)], sizes)
    return [join([r[str(i)] for r in ran], kind, sizes, mesh, TOLERANCE)
            for i, (_, kind) in enumerate(program.result_leaves())]


def dense(program: Program, drawn: Drawn) -> list[torch.Tensor]:
    return meaning(program, whole_args(drawn), drawn.sizes)


def check_equal(drawn: Drawn, program: Program, got: Sequence[torch.Tensor],
                want: Sequence[torch.Tensor]) -> None:
    for (name, _), a, b in zip(program.result_leaves(), got, want, strict=True):
        assert same(a, b, TOLERANCE), f"result {name} is {a}\nand should be {b}\n{drawn}\n{program}"


def test_programs_are_drawn_from_all_ops_that_one_calls() -> None:
    """As their cases call them; those that ask for sizes of their own by a function each of the writer's."""
    public = {case.op.name for case in CASES if not case.op.name.endswith("_vjp")
              and any(hasattr(m, case.op.name) for m in (functions, ops, shardlib))}
    assert sorted(public - {*CALLS}) == [
        "cast", "combine", "concat", "dispatch", "einsum", "grouped_einsum", "pad", "rearrange", "rename",
        "rope", "rope_table", "route", "slice", "split", "stack", "topk", "unbind", "update_cache", "windows"]


# -- what holds for each -------------------------------------------------------------------------------------

@given(programs())
def test_on_every_mesh_and_layout_a_program_is_what_it_means(drawn: Drawn) -> None:
    explicit = drawn.explicit()
    check_equal(drawn, explicit, run(explicit, drawn.mesh, drawn.sizes, whole_args(drawn)),
                dense(drawn.program, drawn))
    assert ([s.labels for _, s in explicit.result_leaves()]
            == [s.labels for _, s in drawn.program.result_leaves()])


@given(programs())
def test_a_printed_program_reads_back_and_types_again(drawn: Drawn) -> None:
    explicit = drawn.explicit()
    assert parse_program(str(drawn.program), TABLE) == drawn.program, str(drawn)
    assert parse_program(str(explicit), TABLE) == explicit, str(drawn)
    assert check(explicit, drawn.mesh) == explicit, str(drawn)
    assert drawn.explicit() == explicit


@given(programs())
def test_passes_keep_types_and_results(drawn: Drawn) -> None:
    program = drawn.explicit()
    want = dense(drawn.program, drawn)
    for each in (*PASSES.values(), *fuse(FUSIONS)):
        rewritten = each.run(program, drawn.mesh)
        assert check(rewritten, drawn.mesh) == rewritten, f"{each.name}\n{drawn}\n{rewritten}"
        assert ([s for _, s in rewritten.result_leaves()] == [s for _, s in program.result_leaves()]
                and rewritten.args == program.args)
        check_equal(drawn, rewritten, run(rewritten, drawn.mesh, drawn.sizes, whole_args(drawn)), want)
        program = rewritten
    event(f"fused: {str(program).count(' = fused(')}")
    assert parse_program(str(program), TABLE) == program, str(drawn)


def moved(program: Program, mesh: Mesh, sizes: Mapping[str, int],
          args: Mapping[str, torch.Tensor]) -> tuple[list[int], int]:
    """Bytes that each rank received when the program ran, counted at the collectives themselves;
    and how many rank 0 made."""
    got, count = [0] * mesh.world_size, 0

    def counted(requests: Sequence[tuple], *wires: Any) -> list[Any]:
        nonlocal count
        made, k, count = perform(requests, *wires), len(requests), count + (0 in requests[0][0])
        for at, (rank, (_, method, x, *_), y) in enumerate(zip(requests[0][0], requests, made)):
            if method == "all_to_all":
                got[rank] += sum(piece.nbytes for j, piece in enumerate(y) if j != at)
            elif method == "all_gather":
                got[rank] += y.nbytes - x.nbytes
            elif method == "reduce_scatter":
                got[rank] += (k - 1) * y.nbytes
            else:
                piece = len(torch.arange(x.numel()).tensor_split(k)[at])
                got[rank] += ((k - 1) * piece + x.numel() - piece) * x.itemsize
        return made
    with mock.patch("shardlib.run.simulate.perform", counted):
        run(program, mesh, sizes, args)
    return got, count


@settings(max_examples=3 * settings.default.max_examples)
@given(programs())
def test_a_proof_by_classes_is_one_rank_by_rank(drawn: Drawn) -> None:
    """The ranks of a class make the same calls, each with its own group:
    none of them, made by itself, is another."""
    program, mesh = drawn.explicit(), drawn.mesh
    classes = stage_classes(classes_of(mesh, sent(program), drawn.sizes), program)
    of_class, kind = (project_classes(program, classes, drawn.sizes, default="float64"),
                      classes.by_rank(range(len(classes))))
    ranks = [project(program, mesh, rank, drawn.sizes, default="float64") for rank in range(mesh.world_size)]
    for rank, (c, calls) in enumerate(zip(kind, ranks)):
        for own, other in zip(calls, unrolled(of_class[c]), strict=True):
            shapes = dict(zip(classes.peers(c, other.group), other.shapes))
            assert own == replace(other, group=mesh.group(other.group, rank),
                                  shapes=tuple(shapes[kind[r]] for r in own.group)), drawn
    assert match(classes, of_class).collectives == rank_by_rank.match(ranks), drawn


@given(programs())
def test_explain_says_what_moves(drawn: Drawn) -> None:
    """Rank by rank; and the groups are those that are called. Branches of a drawn cond send nothing."""
    program, args = drawn.explicit(), whole_args(drawn)
    told = {p: str(t.dtype).removeprefix("torch.") for p, t in args.items() if not t.is_floating_point()}
    found = explain(program, drawn.mesh, drawn.sizes, told, default="float64")
    received, count = moved(program, drawn.mesh, drawn.sizes, args)
    assert (found.received, found.collectives,
            found.bytes) == (tuple(received), count, max(received)), str(drawn)
    emitter = Emitter(drawn.mesh, 0, drawn.sizes)
    emitter.program(program)
    assert {t.axes for t in found.traffic} == {*emitter.groups}, str(drawn)


@sharded("N/x, N +y -> N", layout=EXPLICIT)
def gathers(a, b):
    return all_gather("N/x -> N", a)


@sharded("N/x, N +y -> N", layout=EXPLICIT)
def reduces(a, b):
    return all_gather("N/y -> N", reduce_scatter("N +y -> N/y", b))


@sharded("N/x, N +y -> N", layout=EXPLICIT)
def either(a, b):
    return choose(greater(all_reduce("+x -> ()", total("N/x -> +x", a)), than=0.0), gathers, reduces, a, b)


@sharded("N, N/x, N +y -> N", layout=EXPLICIT)
def layer(c, a, b):
    return choose(greater(total("N -> ()", c), than=0.0), either, gathers, a, b) + c * -2.0


@sharded("N, L N/x, N +y -> N", layout=EXPLICIT)
def layers(c, a, b):
    return scan_over(layer, c, a, b)


@given(st.integers(0, 9), st.sampled_from(("x=2,y=3", "x=3,y=2", "y=4,x=2", "x=1,y=3")))
def test_of_a_cond_explain_says_the_larger_branch(n: int, text: str) -> None:
    mesh, sizes = Mesh.parse(text), dict(N=n, L=3)
    program = lower(either, mesh=mesh)
    found, ran = explain(program, mesh, sizes, default="float64"), []
    for sign in (1.0, -1.0):
        ran.append(
            moved(program, mesh, sizes, {name: torch.full((n,), sign, dtype=torch.float64) for name in "ab"}))
    assert (found.received == tuple(max(got) for got in zip(*(got for got, _ in ran)))
            and found.collectives == max(count for _, count in ran) or n == 0)


@given(st.lists(st.lists(st.integers(-3, 3), min_size=4, max_size=4), min_size=5, max_size=5),
       st.sampled_from(("x=2,y=3", "x=3,y=2", "y=4,x=2", "x=1,y=3")))
def test_of_conds_in_a_scan_explain_says_at_most_what_moves(rows: list[list[int]], text: str) -> None:
    mesh, sizes = Mesh.parse(text), dict(N=4, L=3)
    program, (c, *a, b) = lower(layers, mesh=mesh), torch.tensor(rows, dtype=torch.float64)
    found = explain(program, mesh, sizes, default="float64")
    got, count = moved(program, mesh, sizes, dict(c=c, a=torch.stack(a), b=b))
    assert (all(have <= most for have, most in zip(got, found.received)) and count <= found.collectives
            and max(got) <= found.bytes)


# -- a printed program is Python -----------------------------------------------------------------------------

@sharded("B V, V D -> B, B, B D")
def choices(x, table):
    best = best_of("B V -> B", x)
    return (best, logsumexp("B V -> B", x),
            choose(greater(total("B V -> ()", x), than=0.0), looked_up, looked_up, best, table) * 2.0 + 1.0)


@sharded("B, V D -> B D")
def looked_up(ids, table):
    return relabel("B E -> B D", look_up("B, V E -> B E", ids, relabel("V D -> V E", table)))


CONFIG = LlamaConfig(vocab_size=11, d_model=18, num_layers=2, num_kv_heads=3, queries_per_kv=2, head_dim=4,
                     d_ff=7, norm_eps=1e-5, rope_theta=1e4, rope_scaling=None, tied=False, max_context=64)


@pytest.mark.parametrize("mesh, layout",
                         [("tp=2", "tp"), ("dp=2,tp=2", "tp+sp+fsdp"), ("cp=2,tp=2", "tp+cp")])
@pytest.mark.parametrize("f", [next_token, value_and_grad(loss)], ids=["next_token", "loss_and_grad"])
def test_the_printed_programs_of_a_model_are_python(f: Any, mesh: str, layout: str) -> None:
    made = Mesh.parse(mesh)
    program = lower(f, named_layout(layout, made), mesh=made, config=CONFIG)
    assert "rank_of(" in str(program) or "silu_vjp(" in str(program) and "reverse=True" in str(program)
    assert numbered(pasted(program, made)) == numbered(program)


@pytest.mark.parametrize("layout", [Layout(V="x"), Layout(B="x"), Layout(V="x", B="y", D="x"), Layout()])
def test_what_is_printed_of_argmax_logsumexp_and_cond_is_python(layout: Layout) -> None:
    mesh = Mesh(x=2, y=2)
    program = lower(choices, layout, mesh=mesh)
    assert numbered(pasted(program, mesh)) == numbered(program)


class Both(Params):
    up: torch.Tensor = param("D F")
    down: torch.Tensor = param("D F")


@sharded("*, D F -> *")
def with_another(w: Both, y):
    return Both(up=w.up, down=y)


def test_what_is_returned_is_an_argument_only_where_all_its_leaves_are() -> None:
    program = lower(with_another, mesh=Mesh())
    assert "    return Both(up=w.up, down=y)" in str(program), str(program)
    assert parse_program(str(program), TABLE) == program


def test_every_verb_of_the_language_is_in_shardlib() -> None:
    import shardlib
    assert ([verb for verb in MOVES if getattr(shardlib, verb, None) is None or verb not in shardlib.__all__]
            == [])
    assert all(name in lowered.__all__ and callable(getattr(lowered, name)) for name in (*CORE, *TABLE))

    @sharded("M/x/y N -> M/y/x N", layout=EXPLICIT)
    def f(a):
        return shardlib.permute("M/x/y N -> M/y/x N", a)
    assert [s.op.name for s in lower(f, mesh=Mesh(x=2, y=2)).steps] == ["permute"]


def test_a_scalar_that_owes_is_written_without_parentheses() -> None:
    for owed in ("+tp", "+dp +tp", "max:tp"):
        with pytest.raises(SpecError) as error:
            parse(f"() {owed}")
        assert str(error.value) == (
            f"spec '() {owed}': () is the scalar and stands alone; a scalar that owes is written \"{owed}\"")
        assert str(parse(owed)) == owed


# -- gradients -----------------------------------------------------------------------------------------------

def with_loss(drawn: Drawn) -> Program:
    """The program with one result: the sum of the squares of its float results."""
    kinds, steps, total = drawn.program.types(), list(drawn.program.steps), None
    for i, name in enumerate(n for n, _ in drawn.program.result_leaves() if n in drawn.floats):
        spec = kinds[name].whole()
        steps.append(Step(EINSUM, (spec, spec), (Spec(),), (name, name), (f"square{i}",)))
        if total:
            steps.append(Step(ADD, (Spec(), Spec()), (Spec(),), (total, f"square{i}"), (f"sum{i}",)))
        total = steps[-1].outputs[0]
    assume(total)
    return replace(drawn.program, steps=tuple(steps), results=(Result(Spec(), (total,)),))


def autograd(program: Program, drawn: Drawn, wrt: Sequence[str]) -> list[torch.Tensor]:
    """The gradients of what the program means by the leaves `wrt`, by torch.autograd."""
    args = {n: x.requires_grad_(n in wrt) for n, x in whole_args(drawn).items()}
    (loss,) = meaning(program, args, drawn.sizes)
    found = (torch.autograd.grad(loss, [args[n] for n in wrt], allow_unused=True) if loss.requires_grad
             else [None] * len(wrt))
    return [torch.zeros_like(args[n]) if g is None else g for n, g in zip(wrt, found)]


@given(programs([k for k in KINDS if k is not update_cache]),
       st.sampled_from(("all", "weights", "nothing")), st.booleans())
def test_gradients_are_those_of_autograd_each_in_the_type_of_its_argument(drawn: Drawn,
                                                                          regather: str, fused: bool) -> None:
    program = with_loss(drawn)
    leaves_of = {n: [path for path, _ in leaves(n, tree)] for n, tree in program.args}
    wrt = [n for n, paths in leaves_of.items() if drawn.holds[paths[0]] in ("bounded", "positive")]
    explicit = complete(program, drawn.layout, drawn.mesh)
    explicit = fuse(FUSIONS)[0].run(explicit, drawn.mesh) if fused else explicit
    try:
        made = value_and_grad_program(explicit, wrt, drawn.mesh, regather)
    except SpecError as error:
        assert "has no derivative" in str(error), f"{error}\n{drawn}"
        event("no derivative")
        reject()
    paths = [p for n in wrt for p in leaves_of[n]]
    want = autograd(program, drawn, paths)
    got = run(made, drawn.mesh, drawn.sizes, whole_args(drawn))[1:]
    for path, a, b in zip(paths, got, want, strict=True):
        assert same(a, b, TOLERANCE), f"the gradient of {path} is {a}\nand should be {b}\n{drawn}\n{made}"
    kinds = dict(explicit.arg_leaves())
    assert [s for _, s in made.result_leaves()[1:]] == [kinds[p] for p in paths]
    assert check(made, drawn.mesh) == made and parse_program(str(made), TABLE) == made, str(made)


# -- mutants -------------------------------------------------------------------------------------------------

def mutants(program: Program, mesh: Mesh) -> Iterator[tuple[str, Program]]:
    """The program with one thing changed: what a slip of the hand, or of a pass, would make of it."""
    for at, step in enumerate(program.steps):
        def with_step(*steps: Step) -> Program:
            return replace(program, steps=(*program.steps[:at], *steps, *program.steps[at + 1:]))
        if step.op.moves:
            yield f"without {step.op.name}", renamed(with_step(), step.outputs[0], step.inputs[0])
            again = replace(step, inputs=step.outputs, outputs=("again",))
            yield f"{step.op.name} twice", renamed(with_step(step, replace(again, outputs=("again_",))),
                                                   step.outputs[0], "again_", at + 2)
        for j, spec in enumerate(step.outs):
            for other in types(spec, tuple(mesh.axes)[:2], ("+", "max"))[:12]:
                if other != spec:
                    yield (f"{step.outputs[j]} as {other}",
                           with_step(replace(step, outs=(*step.outs[:j], other, *step.outs[j + 1:]))))
        for j, spec in enumerate(step.ins):
            if spec.owed:
                yield (f"operand {j} of {step.outputs[0]} owes nothing",
                       with_step(replace(step, ins=(*step.ins[:j], spec.owing(), *step.ins[j + 1:]))))
        if len(mesh.axes) > 1:
            a, b = tuple(mesh.axes)[:2]
            yield (f"{a} and {b} swapped in {step.outputs[0]}",
                   with_step(replace(step, ins=tuple(swap(s, a, b) for s in step.ins),
                                     outs=tuple(swap(s, a, b) for s in step.outs))))
        if (len(step.inputs) > 1 and not {0, 1} & {*step.op.index} and step.op is not SCAN
            and step.ins[0] != step.ins[1]):
            yield (f"operands of {step.outputs[0]} swapped",
                   with_step(replace(step, inputs=(step.inputs[1], step.inputs[0], *step.inputs[2:]),
                                     ins=step.ins if step.op.takes_text else
                                     (step.ins[1], step.ins[0], *step.ins[2:]))))
    for at, (name, tree) in enumerate(program.args):
        for other in types(tree, tuple(mesh.axes)[:2], ("+",)) if isinstance(tree, Spec) else ():
            if other != tree:
                yield (f"{name} as {other}",
                       replace(program, args=(*program.args[:at], (name, other), *program.args[at + 1:])))


def renamed(program: Program, old: str, new: str, start: int = 0) -> Program:
    def name(i: str) -> str:
        return new if i == old else i
    steps = tuple(s if at < start else replace(s, inputs=tuple(map(name, s.inputs)))
                  for at, s in enumerate(program.steps))
    return replace(program, steps=steps,
                   results=tuple(replace(r, values=tuple(map(name, r.values))) for r in program.results))


def swap(spec: Spec, a: str, b: str) -> Spec:
    to = {a: b, b: a}
    return Spec(tuple(d.split(tuple(to.get(x, x) for x in d.axes)) for d in spec.dims),
                tuple(o._replace(axis=to.get(o.axis, o.axis)) for o in spec.owed))


@given(programs(), st.data())
def test_a_mutant_is_refused_or_means_what_it_does(drawn: Drawn, data: st.DataObject) -> None:
    explicit = drawn.explicit()
    every = list(mutants(explicit, drawn.mesh))
    for at in (data.draw(st.lists(st.integers(0, max(0, len(every) - 1)), max_size=12, unique=True)) if every
               else ()):
        what, mutant = every[at]
        try:
            typed = check(mutant, drawn.mesh)
        except SpecError:
            event("refused")
            continue
        event("accepted")
        args = whole_args(drawn)
        if any(not args[n].is_floating_point() and s.owed for n, s in typed.arg_leaves()):
            continue
        got, want = run(typed, drawn.mesh, drawn.sizes, args), dense(mutant, drawn)
        check_equal(drawn, mutant, got, want)
