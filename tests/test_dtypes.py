"""The dtype policy: every op, at all dtypes of its operands, gives what the policy says,
and what is said of it before it runs.

The policy is written here once more, as a table in torch's terms, and held against the dtypes that are
computed and against what the generated code gives: on one rank and on pieces, forward and in gradients.
Values are held against
float64, and may be twice as far from it as plain torch's.
"""
from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, bfloat16, float16, float32, float64, int8, int16, int32, int64, uint8

from shardlib import Layout, Mesh, SpecError
from shardlib.compiler.complete import complete
from shardlib.compiler.grad import value_and_grad_program
from shardlib.compiler.parser import parse_program
from shardlib.compiler.passes import rewrite
from shardlib.dtypes import value_dtypes
from shardlib.language.reductions import SUM
from shardlib.lowering.emit import Emitter
from shardlib.lowering.load import load
from shardlib.ops import TABLE
from shardlib.ops.cases import CASES
from shardlib.oracle import Case, normal
from shardlib.placement import join, place, place_rows
from shardlib.program import Program, Result, Step
from shardlib.reference import refer
from shardlib.reports.project import project
from shardlib.run.simulate import perform
from shardlib.run.simulate import simulate as run_ranks
from shardlib.spec import Spec

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = dict(B=3, T=4, D=4, F=2, K=2, G=2, H=4, V=5, S=6, J=2)
FLOATS = (float32, bfloat16, float16, float64)
KINDS = (*FLOATS, int64, int32, int8, torch.bool)
Dtypes = Sequence[torch.dtype]


# -- the policy ----------------------------------------------------------------------------------------------

def widest(*kinds: torch.dtype) -> torch.dtype:
    out = kinds[0]
    for kind in kinds[1:]:
        out = torch.promote_types(out, kind)
    return out


def fraction(*kinds: torch.dtype) -> torch.dtype:
    return kind if (kind := widest(*kinds)).is_floating_point else float32


def total(*kinds: torch.dtype) -> torch.dtype:
    return kind if (kind := widest(*kinds)).is_floating_point else int64


def first(x: torch.dtype, *others: torch.dtype) -> torch.dtype:
    return x


def of_attention(*kinds: torch.dtype) -> tuple[torch.dtype, ...]:
    """Of q, k, v, a bias, what forward gave, its lse, which does not count, and the cotangent."""
    *given, lse, g = kinds
    return (widest(*given, g),) * (4 if len(kinds) > 6 else 3)


COMPARISONS = ("greater", "less", "greater_equal", "less_equal", "equal", "not_equal", "compare")
LOGICAL = ("logical_and", "logical_or", "logical_not")
OF_MASKS, EXTREMES = ("any", "all"), ("max", "min", "max_opposite", "opposite")
CUTS = ("concat", "split", "stack", "unbind", "pad", "slice")
# of the dtypes of all operands; what is missing gives the widest of those that are no index
GIVES: dict[str, Any] = {
    **dict.fromkeys(("div", "mean", "var", "std", "reciprocal", "scale"), fraction),
    "filled": lambda mask, x: fraction(x),
    **dict.fromkeys(("sum", "prod", "cumsum", "einsum"), total), **dict.fromkeys(
        ("rms_norm", "layer_norm", "group_norm", "rope", "rope_vjp", "update_cache", "from_rank", "ones_like",
         "zeros_like", "share"), first),
    **dict.fromkeys((*COMPARISONS, *LOGICAL, *OF_MASKS, "causal_mask"), lambda *kinds: torch.bool),
    "rope_table": lambda start: float32,
    **dict.fromkeys(("argmax", "argmin", "rank_of", "ties", "sample"), lambda *kinds: int64),
    **dict.fromkeys(("sort", "topk"), lambda x: (x, int64)),
    **dict.fromkeys(("sort_vjp", "topk_vjp"), lambda places, g: g),
    "rms_norm_vjp": lambda x, w, g: (x, w), "norm_vjp": lambda *kinds: kinds[:-1],
    "cast_like": lambda x, like: like if like.is_floating_point else x, "widen": lambda x: widest(x, float32),
    "attention_lse": lambda q, k, v: (widest(q, k, v), widest(q, k, v, float32)),
    "attention_vjp": lambda *kinds: of_attention(*(k for k in kinds if k.is_floating_point)),
    "cross_entropy": lambda x, labels: widest(x, float32),
    "cross_entropy_sums": lambda x, labels: (widest(x, float32),) * 3,
    "label_sums": lambda x, labels, top: (widest(x, top, float32),) * 2,
    **dict.fromkeys(("label_sums_vjp", "extreme_vjp", "prod_vjp", "route_vjp", "combine",
                     "combine_vjp"), first),
    "route": lambda x, *bias: (widest(x, float32), int64), "dispatch": lambda x, chosen: (x, int64),
    "within_capacity": lambda chosen: (int64, int64), "slots_of": lambda table, chosen: int64,
    "combine_weights_vjp": lambda rows, at, g: widest(rows, g, float32),
}
TAKES_ANY = {*CUTS, "add", "mul", "div", "scale", "shift", "reciprocal", "einsum", "sum", "prod", "cumsum",
             "mean", "var", "std", *EXTREMES, "spread", "cast", "cast_like", "widen", "where",
             "stop_gradient", "ones_like", "zeros_like", "rearrange", "rename", "take",
             "flip", "roll", "windows", "windows_vjp", "embedding", "embedding_vjp", "update_cache"}
TAKES_NUMBERS = {"topk", "sub", *COMPARISONS, "relu", "square", "abs", "clamp", "maximum", "minimum",
                 "filled", "argmax", "rank_of", "from_rank", "ties", "sort", "argmin", "scatter_add"}
MASKS = {("where", 0), ("masked", 0), ("filled", 0), *((name, i) for name in LOGICAL for i in (0, 1)),
         *((name, 0) for name in OF_MASKS)}
LIKES = {("cast_like", 1), ("ones_like", 0), ("zeros_like", 0)}
TABLES = {("rope", 1), ("rope_vjp", 1), ("route", 1)}


def is_index(case: Case, i: int) -> bool:
    return (i in (*case.op.index, *case.indices) and (case.op.name, i) not in LIKES | TABLES
            and not is_mask(case, i))


def is_mask(case: Case, i: int) -> bool:
    kept = 3 if case.op.name == "attention_vjp" else 0
    if case.op.name in ("attention", "attention_vjp") and 3 <= i < len(case.ins) - kept:
        beside = dict(case.attrs).get("beside", "mask" if len(case.ins[3].dims) == 3 else "start").split()
        return beside[i - 3] == "mask"
    return (case.op.name, i) in MASKS


def gives(case: Case, kinds: Dtypes) -> tuple[torch.dtype, ...] | None:
    """The dtypes of the results, or None where the call is refused."""
    name = case.op.name
    for i, kind in enumerate(kinds):
        if is_mask(case, i):
            legal = kind == torch.bool
        elif is_index(case, i):
            legal = not kind.is_floating_point and kind != torch.bool
        else:
            legal = (name in TAKES_ANY or kind.is_floating_point or name in TAKES_NUMBERS
                     and kind != torch.bool)
        if not legal:
            return None
    if "dtype" in dict(case.attrs):
        return (getattr(torch, dict(case.attrs)["dtype"]),)
    if name in ("scale", "shift"):
        (x,) = kinds
        return (fraction(x) if isinstance(dict(case.attrs)["by"], float) else int64 if x == torch.bool
                else x,)
    if name == "clamp":
        return (fraction(*kinds) if any(isinstance(v, float) for _, v in case.attrs) else kinds[0],)
    if name == "spread":
        return (fraction(*kinds) if dict(case.attrs).get("mean") else kinds[0],)
    made = (GIVES[name](*kinds) if name in GIVES
            else widest(*(k for i, k in enumerate(kinds) if i not in case.op.index)))
    return made if isinstance(made, tuple) else (made,) * len(case.outs)


# -- one call at given dtypes --------------------------------------------------------------------------------

@dataclass(frozen=True)
class Call:
    """A call of an op, its operands drawn and then rounded to `kinds`."""
    case: Case
    kinds: tuple[torch.dtype, ...]

    @property
    def sizes(self) -> dict[str, int]:
        return self.case.fitting(SIZES)

    def operands(self) -> list[Tensor]:
        g, made = torch.Generator().manual_seed(0), []
        for i, (spec, kind) in enumerate(zip(self.case.ins, self.kinds)):
            draw = self.case.draws[i] if i < len(self.case.draws) else normal
            every = Spec(tuple(d._replace(ragged="") for d in spec.dims))
            x = draw(Mesh().local_shape(every, self.sizes, {}), self.sizes, g, made)
            made.append(x.abs() if kind == torch.uint8 else x)
        if any(d.ragged for s in self.case.ins for d in s.dims):
            chosen = made[1]
            made = [place_rows(x, chosen, s, self.sizes, Mesh())[0] if any(d.ragged for d in s.dims) else x
                    for s, x in zip(self.case.ins, made)]
        return [(x > 0 if kind == torch.bool else x if kind.is_floating_point else x.round()).to(kind)
                for x, kind in zip(made, self.kinds)]

    def program(self, layout: Layout = Layout(), mesh: Mesh = Mesh(), reduced: bool = False) -> Program:
        """The call as a program, completed; `reduced`: to the sum of its first
        result in float64, a scalar."""
        case = self.case
        steps = [case.step(case.ins, case.outs)]
        results = [Result(s, (n,)) for s, n in zip(case.outs, steps[0].outputs)]
        if reduced:
            steps.append(Step(SUM, (case.outs[0],), (Spec(),), ("y0",), ("total",)))
            results = [Result(Spec(), ("total",))]
        args = tuple((f"x{i}", s) for i, s in enumerate(case.ins))
        return complete(Program("call", args, tuple(steps), tuple(results)), layout, mesh)


def names(kinds: Dtypes) -> dict[str, str]:
    return {f"x{i}": str(kind)[6:] for i, kind in enumerate(kinds)}


def run(program: Program, mesh: Mesh, sizes: dict[str, int], operands: Sequence[Tensor]) -> list[Tensor]:
    placed = [place(x, kind, sizes, mesh) for x, (_, kind) in zip(operands, program.arg_leaves())]
    outs = run_ranks(program, mesh,
                     [{f"x{i}": p[r] for i, p in enumerate(placed)} for r in range(mesh.world_size)], sizes)
    return [join([o[str(i)] for o in outs], kind, sizes, mesh, 0.1)
            for i, (_, kind) in enumerate(program.result_leaves())]


def roundings(got: Tensor, want: Tensor) -> float:
    """How far `got` is off `want`, in roundings: half an eps of its dtype, of the largest element."""
    finite = torch.isfinite(want)
    assert torch.equal(torch.isfinite(got), finite), "not finite in other places"
    off, most = ((x.double()[finite]).abs().max().item() if finite.any() else 0.0 for x in (got - want, want))
    return off / (most * torch.finfo(got.dtype).eps / 2) if off else 0.0


def added(case: Case, sizes: dict[str, int], by: Spec | None = None) -> int:
    """How many numbers the op adds up for one element of a result;
    of the gradient by an operand of spec `by`."""
    rule, there = case.op.rule(case.step(case.ins, case.outs)), {n for s in case.ins for n in s.names}
    kept = {n for s in case.outs for n in s.names} if by is None else {*by.names}
    return math.prod(sizes[n] for n in there if n not in kept or n in (*rule.whole, *rule.sums))


def allowed(torchs: float, n: int) -> float:
    """Roundings that a result of n numbers may be off: twice what torch's is.

    What torch's is, of a handful of numbers, is chance, and may be none. So it counts for no less than what
    each result goes through at best: n numbers that are added up by halves are rounded log2(n) times on the
    way, and what comes of them once more.
    """
    return 2 * max(torchs, 1 + math.log2(max(n, 1)))


def choices(case: Case) -> Iterator[tuple[torch.dtype, ...]]:
    """All dtypes of two operands; of more, all of one beside others of float32 or bfloat16.

    Masks of derivatives were checked before.
    """
    if len(case.ins) < 3:
        yield from itertools.product(KINDS, repeat=len(case.ins))
        return
    for base in (float32, bfloat16):
        rest = tuple(torch.bool if is_mask(case, i) else int64 if is_index(case, i) else base
                     for i in range(len(case.ins)))
        for i, kind in itertools.product(
                [i for i in range(len(case.ins)) if (case.op.name, i) != ("attention_vjp", 3)], KINDS):
            yield (*rest[:i], kind, *rest[i + 1:])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_an_op_gives_is_what_the_policy_says(case: Case) -> None:
    ran, program = 0, Call(case, ()).program()
    for kinds in choices(case):
        call, want = Call(case, kinds), gives(case, kinds)
        if want is None:
            with pytest.raises(SpecError, match=rf"{case.op.name}: x\d is "):
                value_dtypes(program, names(kinds))
            continue
        said = value_dtypes(program, names(kinds))
        assert [said[n] for n, _ in program.result_leaves()] == [str(k)[6:] for k in want], kinds
        e = Emitter(Mesh(), 0, call.sizes, given=names(kinds))
        main = load(e.program(program), {**e.helpers, **e.constants}, {}, "call")
        made = main(*call.operands())
        assert [y.dtype for y in made] == [*want], kinds
        ran += 1
    assert ran


def in_(kind: torch.dtype, xs: Sequence[Tensor]) -> list[Tensor]:
    """The floats among them in a dtype."""
    return [x.to(kind) if x.is_floating_point() else x for x in xs]


STATISTICS = ("prod", "prod_vjp", "cumsum", "mean", "var", "std", "softmax", "softmax_vjp", "logsumexp",
              "exp_minus", "share", "sum_exp", "log_plus", "rms_norm", "rms_norm_vjp", "layer_norm",
              "group_norm", "norm_vjp", "label_sums_vjp", "extreme_vjp")
EXACT = ("topk", "sample", "argmax", "argmin", "sort", "rank_of", "from_rank", "ties", *COMPARISONS,
         *LOGICAL, *OF_MASKS, "causal_mask", "zeros", "ones", "full", "arange", "tril", "one_hot", "finite",
         "within_capacity", "slots_of")


# with rows that data chose: tests/ops/test_experts.py
WITH_ROWS = ("dispatch", "grouped_einsum", "grouped_einsum_vjp", "combine", "combine_vjp",
             "combine_weights_vjp")


@pytest.mark.parametrize("case", [c for c in CASES if c.op.name not in (*EXACT, *WITH_ROWS)], ids=str)
def test_an_op_computes_in_the_dtype_that_it_gives(case: Case) -> None:
    """Of operands of two float dtypes: the narrow ones alone are rounded, before.

    The result is as near to float64's as plain torch's.

    Statistics of 16 bits are nearer: they are rounded once, and float32 adds less than a hundredth of that.
    """
    step, program, off = case.step(case.ins, case.outs), Call(case, ()).program(), {}
    for one, other in itertools.product(FLOATS, repeat=2):
        kinds = tuple(torch.bool if is_mask(case, i) else int64 if is_index(case, i) else (one, other)[i % 2]
                      for i in range(len(case.ins)))
        call = Call(case, kinds)
        xs, sizes = call.operands(), call.sizes
        made, want = (run(program, Mesh(), sizes, ys) for ys in (xs, in_(float64, xs)))
        for i, (a, b) in enumerate(zip(made, want)):
            wide = widest(a.dtype, *(x.dtype for x in xs if x.is_floating_point()))
            # no complex numbers are so narrow
            wide = float32 if wide.itemsize == 2 and case.op.name in ("rope", "rope_vjp") else wide
            plain, exact = (refer(step, sizes, in_(kind, xs))[i] for kind in (wide, float64))
            off.setdefault((i, a.dtype), []).append((roundings(a, b), roundings(plain.to(a.dtype), exact)))
    for of, found in off.items():
        mine, torchs = map(max, zip(*found))
        once = case.op.name in STATISTICS and of[1].itemsize == 2
        assert mine <= (1.01 if once else allowed(torchs, added(case, SIZES))), of


# -- forward and gradient, on one rank and on pieces ---------------------------------------------------------

@st.composite
def calls(draw: st.DrawFn, differentiable: bool = False) -> tuple[Call, Layout]:
    case = draw(st.sampled_from(
        [c for c in CASES if c.op.name not in WITH_ROWS
         and (not differentiable or c.differentiable and len(c.outs) == 1)]))
    index, others = (st.sampled_from((int64, int32, int16, uint8)),
                     st.sampled_from(FLOATS if differentiable else KINDS))
    kinds = tuple(torch.bool if is_mask(case, i) else draw(index if is_index(case, i) else others)
                  for i in range(len(case.ins)))
    assume(gives(case, kinds))
    dims = [n for s in case.ins for n in s.names]
    return Call(case, kinds), Layout(**{draw(st.sampled_from(dims)): "tp"} if dims else {})


@given(calls())
def test_dtypes_are_those_of_the_policy_on_pieces(drawn: tuple[Call, Layout]) -> None:
    """And what is sent has the dtype that `prove`, `explain` and routing read."""
    call, layout = drawn
    program, sent = call.program(layout, Mesh(tp=2)), []

    def watched(requests: Sequence[tuple], *wires: Any) -> list[Any]:
        operand = requests[0][2]
        sent.append(str((operand[0] if isinstance(operand, tuple) else operand).dtype)[6:])
        return perform(requests, *wires)
    xs = call.operands()
    with mock.patch("shardlib.run.simulate.perform", watched):
        made = run(program, Mesh(tp=2), call.sizes, xs)
    assert tuple(y.dtype for y in made) == gives(call.case, call.kinds), program
    assert sent == [c.dtype for c in project(program, Mesh(tp=2), 0, call.sizes, names(call.kinds))], program
    if call.case.op.name not in ("sample", "argmax", "argmin", "rank_of", "sort", "topk"):
        want = run(call.program(), Mesh(), call.sizes, xs)
        exact = run(call.program(), Mesh(), call.sizes, in_(float64, xs))
        for a, b, c in zip(made, want, exact):
            if a.is_floating_point():
                assert roundings(a, c) <= allowed(roundings(b, c), added(call.case, call.sizes)), program
            else:
                assert torch.equal(a, b), program


@given(calls(differentiable=True))
def test_gradients_have_the_dtypes_of_their_values(drawn: tuple[Call, Layout]) -> None:
    call, layout = drawn
    wrt, xs, made = [f"x{i}" for i in call.case.differentiable], call.operands(), []
    for mesh, forward in ((Mesh(tp=2), call.program(layout, Mesh(tp=2), reduced=True)),
                          (Mesh(), call.program(reduced=True))):
        program = rewrite(value_and_grad_program(forward, wrt, mesh, dtypes=names(call.kinds)), mesh)
        said = value_dtypes(program, names(call.kinds))
        made.append(run(program, mesh, call.sizes, xs))
        assert [g.dtype for g in made[-1][1:]] == [call.kinds[i] for i in call.case.differentiable], program
        assert [str(y.dtype)[6:] for y in made[-1]] == [said[n] for n, _ in program.result_leaves()], program
        assert parse_program(str(program), TABLE) == program
    exact = run(program, Mesh(), call.sizes, in_(float64, xs))
    for i, a, b, c in zip(call.case.differentiable, *(grads[1:] for grads in (*made, exact))):
        assert roundings(a, c) <= allowed(roundings(b, c),
                                          added(call.case, call.sizes, call.case.ins[i])), program
