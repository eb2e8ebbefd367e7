"""The dtype policy: every op, at all dtypes of its operands, gives what the policy says, and what is said of it before it runs.

The policy is written here once more, as a table in torch's terms, and held against the dtypes that are computed and against what the
generated code gives: on one rank and on pieces, forward and in gradients. Values are held against the op in float64.
"""
from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, Iterator, Sequence
from unittest import mock

import pytest
import torch
from hypothesis import assume, given, strategies as st
from torch import Tensor, float16, float32, float64, bfloat16, int8, int16, int32, int64, uint8

from shardlib import Layout, Mesh, Params, SpecError, compile, einsum, explain, lower, param, scan, sharded, simulate, stacked, step, value_and_grad
from shardlib.complete import complete
from shardlib.dtypes import value_dtypes
from shardlib.emit import Emitter, load
from shardlib.functions import cast, greater, logsumexp, mean, softmax, sum, where
from shardlib.grad import value_and_grad_program
from shardlib.ops import TABLE, attention, rms_norm, rope, rope_table
from shardlib.ops.cases import CASES
from shardlib.oracle import Case, normal
from shardlib.parser import parse_program
from shardlib.passes import rewrite
from shardlib.program import Program, Result, Step
from shardlib.project import project
from shardlib.reductions import SUM
from shardlib.simulate import perform, simulate as run_ranks
from shardlib.spec import Spec
from shardlib.testing import join, place

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = dict(B=3, T=4, D=4, F=2, K=2, G=2, H=4, V=5, S=6)
FLOATS = (float32, bfloat16, float16, float64)
KINDS = (*FLOATS, int64, int32, int8, torch.bool)
Dtypes = Sequence[torch.dtype]


# -- the policy --------------------------------------------------------------------------------------------------------

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


GIVES: dict[str, Any] = {           # of the dtypes of all operands; what is missing gives the widest of those that are no index
    **dict.fromkeys(("div", "mean", "reciprocal", "scale"), fraction), **dict.fromkeys(("sum", "einsum"), total),
    **dict.fromkeys(("rms_norm", "rope", "rope_vjp", "update_cache", "from_rank", "ones_like", "zeros_like"), first),
    **dict.fromkeys(("greater", "less", "causal_mask"), lambda *kinds: torch.bool), "rope_table": lambda start: float32,
    **dict.fromkeys(("argmax", "rank_of", "sample"), lambda *kinds: int64), "rms_norm_vjp": lambda x, w, g: (x, w),
    "cast": lambda x: float64, "cast_like": lambda x, like: like if like.is_floating_point else x, "widen": lambda x: widest(x, float32),
    "attention_vjp": lambda q, k, v, *rest: (widest(q, k, v, rest[-1]),) * 3,
    "cross_entropy": lambda x, labels: widest(x, float32), "label_sums": lambda x, labels, top: (widest(x, top, float32),) * 2,
    **dict.fromkeys(("cross_entropy_vjp", "label_sums_vjp"), first),
}
TAKES_ANY = {"add", "mul", "div", "scale", "shift", "reciprocal", "einsum", "sum", "mean", "max", "spread", "cast", "cast_like", "widen", "where",
             "stop_gradient", "ones_like", "zeros_like", "rearrange", "rename", "take", "take_vjp", "embedding", "embedding_vjp", "update_cache"}
TAKES_NUMBERS = {"sub", "greater", "less", "relu", "square", "argmax", "rank_of", "from_rank"}
MASKS = {("where", 0), ("attention", 3)}
LIKES = {("cast_like", 1), ("ones_like", 0), ("zeros_like", 0)}


def is_index(case: Case, i: int) -> bool:
    return i in case.op.index and (case.op.name, i) not in MASKS | LIKES and not case.op.name.startswith("rope")


def is_mask(case: Case, i: int) -> bool:
    return (case.op.name, i) in MASKS or i in case.indices and case.op.name == "attention_vjp"


def gives(case: Case, kinds: Dtypes) -> tuple[torch.dtype, ...] | None:
    """The dtypes of the results, or None where the call is refused."""
    name = case.op.name
    for i, kind in enumerate(kinds):
        if is_mask(case, i):
            legal = kind == torch.bool
        elif is_index(case, i) or case.op.name == "rope_table":
            legal = not kind.is_floating_point and kind != torch.bool
        else:
            legal = name in TAKES_ANY or kind.is_floating_point or name in TAKES_NUMBERS and kind != torch.bool
        if not legal:
            return None
    if name in ("scale", "shift"):
        return (fraction(*kinds),) if isinstance(dict(case.attrs)["by"], float) else (widest(*kinds, int64) if kinds[0] == torch.bool else kinds[0],)
    if name == "spread":
        return (fraction(*kinds) if dict(case.attrs).get("mean") else kinds[0],)
    made = GIVES[name](*kinds) if name in GIVES else widest(*(k for i, k in enumerate(kinds) if i not in case.op.index))
    return made if isinstance(made, tuple) else (made,) * len(case.outs)


# -- one call at given dtypes ------------------------------------------------------------------------------------------

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
            x = draw(Mesh().local_shape(spec, self.sizes, {}), self.sizes, g, made)
            made.append(x)
        return [x.to(kind) if x.dtype in (torch.bool, int64) or kind.is_floating_point else (x > 0 if kind == torch.bool else x.round()).to(kind)
                for x, kind in zip(made, self.kinds)]

    def program(self, layout: Layout = Layout(), mesh: Mesh = Mesh(), reduced: bool = False) -> Program:
        """The call as a program, completed; `reduced`: to the sum of its first result in float64, a scalar."""
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
    outs = run_ranks(program, mesh, [{f"x{i}": p[r] for i, p in enumerate(placed)} for r in range(mesh.world_size)], sizes)
    return [join([o[str(i)] for o in outs], kind, sizes, mesh, 0.1) for i, (_, kind) in enumerate(program.result_leaves())]


def far(got: Tensor, want: Tensor, roundings: float = 8) -> float:
    """How far `got` is off `want`, relative to what so many roundings of its dtype may do."""
    eps = torch.finfo(got.dtype).eps if got.is_floating_point() else 1e-9
    finite = torch.isfinite(want)
    assert torch.equal(torch.isfinite(got), finite), "not finite in other places"
    got, want = got.double()[finite], want.double()[finite]
    return float((got - want).abs().max() / (roundings * eps * max(1.0, float(want.abs().max())))) if want.numel() else 0.0


def choices(case: Case) -> Iterator[tuple[torch.dtype, ...]]:
    """All dtypes of two operands; of more, all of one beside others of float32 or bfloat16. Masks of derivatives were checked before."""
    if len(case.ins) < 3:
        yield from itertools.product(KINDS, repeat=len(case.ins))
        return
    for base in (float32, bfloat16):
        rest = tuple(torch.bool if is_mask(case, i) else int64 if is_index(case, i) else base for i in range(len(case.ins)))
        for i, kind in itertools.product([i for i in range(len(case.ins)) if (case.op.name, i) != ("attention_vjp", 3)], KINDS):
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


EXACT = ("sample", "argmax", "rank_of", "from_rank", "greater", "less", "causal_mask", "finite")


@pytest.mark.parametrize("case", [c for c in CASES if c.op.name not in EXACT], ids=str)
def test_an_op_computes_in_the_dtype_that_it_gives(case: Case) -> None:
    """Of operands of two float dtypes: the narrow ones alone are rounded, before; the result is that of float64 up to its own roundings."""
    for one, other in itertools.permutations(FLOATS, 2):
        kinds = tuple(torch.bool if is_mask(case, i) else int64 if is_index(case, i) or case.op.name == "rope_table" else (one, other)[i % 2]
                      for i in range(len(case.ins)))
        call = Call(case, kinds)
        xs = call.operands()
        exact = Call(case, tuple(float64 if k.is_floating_point else k for k in kinds))
        want = run(exact.program(), Mesh(), call.sizes, [x.double() if x.is_floating_point() else x for x in xs])
        made = run(call.program(), Mesh(), call.sizes, xs)
        assert all(far(a, b) < 1 for a, b in zip(made, want)), kinds


# -- forward and gradient, on one rank and on pieces -------------------------------------------------------------------

@st.composite
def calls(draw: st.DrawFn, differentiable: bool = False) -> tuple[Call, Layout]:
    case = draw(st.sampled_from([c for c in CASES if not differentiable or c.differentiable and len(c.outs) == 1]))
    index, others = st.sampled_from((int64, int32, int16, uint8)), st.sampled_from(FLOATS if differentiable else KINDS)
    kinds = tuple(torch.bool if is_mask(case, i) else draw(index if is_index(case, i) or case.op.name == "rope_table" else others)
                  for i in range(len(case.ins)))
    assume(gives(case, kinds))
    dims = [n for s in case.ins for n in s.names]
    return Call(case, kinds), Layout(**{draw(st.sampled_from(dims)): "tp"} if dims else {})


def in_pieces(call: Call, layout: Layout, reduced: bool = False) -> Program:
    """The call's program where the layout has it: an example that types on whole operands alone is none."""
    try:
        return call.program(layout, Mesh(tp=2), reduced)
    except SpecError:
        assume(False)
        raise


@given(calls())
def test_dtypes_are_those_of_the_policy_on_pieces(drawn: tuple[Call, Layout]) -> None:
    """And what is sent has the dtype that `prove`, `explain` and routing read."""
    call, layout = drawn
    program, sent = in_pieces(call, layout), []

    def watched(requests: Sequence[tuple]) -> list[Any]:
        operand = requests[0][2]
        sent.append(str((operand[0] if isinstance(operand, tuple) else operand).dtype)[6:])
        return perform(requests)
    xs = call.operands()
    with mock.patch("shardlib.simulate.perform", watched):
        made = run(program, Mesh(tp=2), call.sizes, xs)
    assert tuple(y.dtype for y in made) == gives(call.case, call.kinds), program
    assert sent == [c.dtype for c in project(program, Mesh(tp=2), 0, call.sizes, names(call.kinds))], program
    if call.case.op.name not in ("sample", "argmax", "rank_of"):
        want = run(call.program(), Mesh(), call.sizes, xs)
        assert all(far(a, b) < 1 if a.is_floating_point() else torch.equal(a, b) for a, b in zip(made, want)), program


@given(calls(differentiable=True))
def test_gradients_have_the_dtypes_of_their_values(drawn: tuple[Call, Layout]) -> None:
    call, layout = drawn
    wrt, xs, made = [f"x{i}" for i in call.case.differentiable], call.operands(), []
    for mesh, forward in ((Mesh(tp=2), in_pieces(call, layout, reduced=True)), (Mesh(), call.program(reduced=True))):
        program = rewrite(value_and_grad_program(forward, wrt, mesh, dtypes=names(call.kinds)), mesh)
        said = value_dtypes(program, names(call.kinds))
        made.append(run(program, mesh, call.sizes, xs))
        assert [g.dtype for g in made[-1][1:]] == [call.kinds[i] for i in call.case.differentiable], program
        assert [str(y.dtype)[6:] for y in made[-1]] == [said[n] for n, _ in program.result_leaves()], program
        assert parse_program(str(program), TABLE) == program
    assert all(far(a, b, 16) < 1 for a, b in zip(*(m[1:] for m in made))), program


# -- by hand -----------------------------------------------------------------------------------------------------------

ONE, TWO = Mesh(tp=1), Mesh(tp=2)


@sharded("B T -> ()")
def average(x):
    return mean("B T -> ()", x)


@sharded("B V -> B")
def normaliser(x):
    return logsumexp("B V -> B", x)


def test_a_statistic_over_a_split_dim_is_printed_as_widened_settled_and_rounded() -> None:
    assert str(lower(average, Layout(T="tp"), mesh=TWO)) == (
        '@sharded("B T/tp -> ()", layout=EXPLICIT)\n'
        'def average(x):\n'
        '    v2 = widen(x)\n'
        '    v1 = mean("B T/tp -> +tp", v2)\n'
        '    v = all_reduce("+tp -> ()", v1)\n'
        '    v3 = cast_like(v, x)\n'
        '    return v3\n')
    assert str(lower(normaliser, Layout(V="tp"), mesh=TWO)) == (
        '@sharded("B V/tp -> B", layout=EXPLICIT)\n'
        'def normaliser(x):\n'
        '    v2 = max("B V/tp -> B max:tp", x)\n'
        '    v = all_reduce("B max:tp -> B", v2)\n'
        '    v3 = finite(v)\n'
        '    v4 = widen(x)\n'
        '    v5 = sum_exp("B V/tp, B -> B +tp", v4, v3)\n'
        '    v6 = all_reduce("B +tp -> B", v5)\n'
        '    v7 = log_plus(v6, v3)\n'
        '    v8 = cast_like(v7, x)\n'
        '    return v8\n')


@pytest.mark.parametrize("layout", (Layout(), Layout(T="tp", V="tp")), ids=str)
@pytest.mark.parametrize("kind", (float16, bfloat16))
def test_statistics_are_rounded_once(layout: Layout, kind: torch.dtype) -> None:
    """To the number that float64 is rounded to; a mean does not overflow where its sum does."""
    x = torch.randn(50, 300, generator=torch.Generator().manual_seed(0)).to(kind) * 3 + 5
    assert simulate(average, layout, torch.full((4, 4096), 8.0, dtype=float16), mesh=TWO).item() == 8.0
    assert torch.equal(simulate(average, layout, x, mesh=TWO), x.double().mean().to(kind))
    assert torch.equal(simulate(normaliser, layout, x, mesh=TWO), x.double().logsumexp(1).to(kind))


@pytest.mark.parametrize("f", (average, normaliser))
def test_statistics_of_integers_and_masks(f: Any) -> None:
    x = torch.arange(12).view(3, 4)
    if f is normaliser:
        with pytest.raises(SpecError) as error:
            simulate(f, Layout(), x, mesh=ONE)
        assert str(error.value).splitlines()[0].startswith('logsumexp: x is int64; it takes floats, as cast(x, "float32") makes them')
        return
    for mesh in (ONE, TWO):
        assert simulate(f, Layout(T="tp"), x, mesh=mesh).item() == 5.5 and simulate(f, Layout(T="tp"), x, mesh=mesh).dtype == float32
        assert simulate(f, Layout(T="tp"), x > 2, mesh=mesh).item() == 0.75


def torchs(kind: torch.dtype, f: Any, *xs: Tensor) -> list[Tensor]:
    """The gradients of the sum of f by torch at `kind`, of operands that bfloat16 holds."""
    given = [x.to(kind).requires_grad_() for x in xs]
    return list(torch.autograd.grad(f(*given).sum(), given))


def test_the_derivative_of_softmax_is_as_exact_as_torchs() -> None:
    @sharded("B V, B V -> ()")
    def f(x, w):
        return sum("B V -> ()", softmax(x, "V") * w)
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randn(40, 500, generator=g).bfloat16() * 3 for _ in range(2))
    ours = simulate(value_and_grad(f, "x"), Layout(), x, w, mesh=ONE)[1]
    plain = lambda x: x.softmax(1) * w.to(x.dtype)      # noqa: E731
    (exact,), (theirs,) = torchs(float64, plain, x), torchs(bfloat16, plain, x)
    assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max() and (ours - exact).norm() <= 1.1 * (theirs - exact).norm()


def test_the_derivative_of_attention_is_as_exact_as_torchs() -> None:
    """Of torch's own attention in bfloat16, against float64, where scores are large."""
    @sharded("B T K G H, B S K H, B S K H, B T K G H -> ()")
    def f(q, k, v, w):
        return sum("B T K G H -> ()", attention("B T K G H, B S K H, B S K H -> B T K G H", q, k, v) * w)

    def plain(q, k, v):
        rows = torch.nn.functional.scaled_dot_product_attention(q[:, :, :, 0].transpose(1, 2), *(x.transpose(1, 2) for x in (k, v)), is_causal=True)
        return rows.transpose(1, 2)[:, :, :, None] * w.to(q.dtype)
    g = torch.Generator().manual_seed(0)
    q, k, v, w = ((3 * torch.randn(shape, generator=g)).bfloat16() for shape in ((2, 48, 2, 1, 16), (2, 48, 2, 16), (2, 48, 2, 16), (2, 48, 2, 1, 16)))
    ours = simulate(value_and_grad(f, ("q", "k", "v")), Layout(), q, k, v, w, mesh=ONE)[1:]
    for mine, exact, theirs in zip(ours, torchs(float64, plain, q, k, v), torchs(bfloat16, plain, q, k, v)):
        assert mine.dtype == bfloat16 and (mine - exact).norm() <= 2 * (theirs - exact).norm()


@sharded("B T, () -> B T")
def scaled(x, s):
    return x * s + where(greater(x, than=0.0), x, x - s)


def test_a_scalar_counts_like_any_other() -> None:
    """Where torch lets a tensor without dims count less."""
    x, s = torch.tensor([[1.0, -3.0]]).bfloat16(), torch.tensor(1 / 3)
    want = x.float() * s + torch.where(x > 0, x, x.float() - s)
    for made in (simulate(scaled, Layout(), x, s, mesh=TWO), compile(scaled)(x, s), step(scaled)(x, s)):
        assert made.dtype == float32 and torch.equal(made, want)


def test_integers_stay_integers() -> None:
    @sharded("B -> B, B, B, B")
    def f(n):
        return -n, 7 - n, n * 3 - 1, n * 0.5
    n = torch.tensor([2**24 + 1, -5])
    for made in (simulate(f, Layout(), n, mesh=ONE), compile(f)(n), step(f)(n)):
        assert [y.tolist() for y in made[:3]] == [(-n).tolist(), (7 - n).tolist(), (n * 3 - 1).tolist()]
        assert [y.dtype for y in made] == [int64, int64, int64, float32]


def test_torchs_default_dtype_has_no_say() -> None:
    @sharded("B, B -> B, B, B, ()")
    def f(n, m):
        return n / m, 1 / n, n * 0.5, mean("B -> ()", n)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(bfloat16)
        made = compile(f)(torch.tensor([1, 2]), torch.tensor([3, 4]))
    finally:
        torch.set_default_dtype(before)
    assert [y.dtype for y in made] == [float32] * 4 and torch.equal(made[0], torch.tensor([1 / 3, 0.5]))


def test_no_other_argument_has_a_say() -> None:
    @sharded("B, B T H, B -> B T H")
    def turned(unused, x, start):
        return rope("B T H, B T H -> B T H", x, rope_table("B -> B T/1 H", start, theta=1e4))
    x, start, made = torch.rand(2, 6, 8), torch.tensor([1000, 3000]), []
    for other in (torch.ones(2, dtype=kind) for kind in FLOATS):
        made.append(simulate(turned, Layout(), other, x, start, mesh=ONE))
        assert torch.equal(made[0], made[-1]) and torch.equal(made[0], compile(turned)(other, x, start))


def test_the_gradients_of_a_product_of_two_dtypes() -> None:
    """The casts are written where the dtypes are known; the program of one dtype has none."""
    @sharded("B D, D -> ()")
    def product(x, w):
        return sum("B D -> ()", x * w)
    x, w = torch.rand(4, 6).bfloat16(), torch.rand(6)
    for made in (simulate(value_and_grad(product, ("x", "w")), Layout(B="tp"), x, w, mesh=TWO), compile(value_and_grad(product, ("x", "w")))(x, w)):
        assert [y.dtype for y in made] == [float32, bfloat16, float32]
        assert torch.equal(made[1], w.bfloat16().expand(4, 6)) and torch.allclose(made[2], x.float().sum(0))
    kinds = dict(x="bfloat16", w="float32")
    program = lower(value_and_grad(product, ("x", "w")), Layout(), mesh=ONE, dtypes=kinds)
    assert str(program).count("cast") == str(program).count(", dtype='bfloat16')") == 1 and parse_program(str(program)) == program
    assert "cast" not in str(lower(value_and_grad(product, ("x", "w")), Layout(), mesh=ONE))
    assert "cast" not in str(lower(value_and_grad(product, ("x", "w")), Layout(), mesh=ONE, dtypes=dict(x="float16", w="float16")))


class Layer(Params):
    norm: Tensor = param("D")
    up: Tensor = param("D F")
    down: Tensor = param("F D")


class Net(Params):
    layers: Layer = stacked("L", Layer)


@sharded("B D, * -> B D")
def keeps(x, w: Layer):
    return x + cast(einsum("B F, F D -> B D", einsum("B D, D F -> B F", rms_norm(x, w.norm), w.up), w.down), "bfloat16")


@sharded("B D, * -> B D")
def widens(x, w: Layer):
    return x + einsum("B F, F D -> B D", einsum("B D, D F -> B F", x, w.up), w.down)


def scanning(body: Any) -> Any:
    @sharded("B D, * -> ()")
    def f(x, w: Net):
        return mean("B D -> ()", scan(body, x, w.layers))
    return f


def net() -> Net:
    g = torch.Generator().manual_seed(0)
    return Net(layers=Layer(norm=torch.rand(3, 6, generator=g, dtype=float64), up=torch.randn(3, 6, 5, generator=g), down=torch.randn(3, 5, 6, generator=g).half()))


@pytest.mark.parametrize("layout", (Layout(), Layout(B="tp"), Layout(F="tp"), Layout(B="tp", D="tp")), ids=str)
def test_gradients_through_a_scan_of_several_dtypes(layout: Layout) -> None:
    x, w = torch.randn(4, 6, generator=torch.Generator().manual_seed(1)).bfloat16(), net()
    value, dx, dw = simulate(value_and_grad(scanning(keeps), ("x", "w")), layout, x, w, mesh=TWO)
    assert [y.dtype for y in (value, dx, dw.layers.norm, dw.layers.up, dw.layers.down)] == [bfloat16, bfloat16, float64, float32, float16]
    exact = [y.double().requires_grad_() for y in (x, w.layers.norm, w.layers.up, w.layers.down)]
    h = exact[0]
    for norm, up, down in zip(*exact[1:]):
        h = h + torch.nn.functional.rms_norm(h, (6,), norm, 1e-6) @ up @ down
    for got, want in zip((dx, dw.layers.norm, dw.layers.up, dw.layers.down), torch.autograd.grad(h.mean(), exact)):
        assert (got - want).norm() < 0.02 * want.norm()


CHANGED = "scan: the carry is bfloat16, widens returns it as float32; a carry keeps its dtype: cast one of them"


@pytest.mark.parametrize("call", (lambda f, x, w: simulate(f, Layout(), x, w, mesh=TWO), lambda f, x, w: compile(f)(x, w), lambda f, x, w: step(f)(x, w),
                                  lambda f, x, w: explain(lower(f, mesh=TWO), TWO, dict(B=4, D=6, F=5, L=3), {"x": "bfloat16"})), ids=("simulate", "compile", "step", "explain"))
def test_a_carry_that_changes_its_dtype_is_refused(call: Any) -> None:
    with pytest.raises(SpecError) as error:
        call(scanning(widens), torch.rand(4, 6).bfloat16(), net())
    assert str(error.value).splitlines()[0].split("          ")[0] == CHANGED


@pytest.mark.parametrize("kind", (torch.uint16, torch.complex64, torch.float8_e4m3fn), ids=str)
@pytest.mark.parametrize("call", (lambda f, x: simulate(f, Layout(), x, mesh=TWO), lambda f, x: compile(f)(x), lambda f, x: step(f)(x)),
                         ids=("simulate", "compile", "step"))
def test_a_dtype_that_is_not_known_is_one_error(call: Any, kind: torch.dtype) -> None:
    with pytest.raises(SpecError) as error:
        call(average, torch.zeros(2, 3).to(kind))
    assert str(error.value).splitlines()[0].split("          ")[0] == (
        f"average: x is {str(kind)[6:]}; a dtype is one of float64, int64, float32, int32, bfloat16, float16, int16, bool, uint8, int8")


@pytest.mark.parametrize("call", (lambda f, *x: simulate(f, Layout(), *x, mesh=TWO), lambda f, *x: compile(f)(*x), lambda f, *x: step(f)(*x)),
                         ids=("simulate", "compile", "step"))
def test_what_an_op_does_not_take_is_refused_before_it_runs(call: Any) -> None:
    @sharded("B T, B T -> B T")
    def less_masks(left, right):
        return left - right
    with pytest.raises(SpecError) as error:
        call(less_masks, torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool))
    first_line, where = str(error.value).splitlines()[0].split("          ")
    assert first_line == "sub: right is bool; it takes integers and floats" and where.startswith("test_dtypes.py:")


def test_prepared_weights_of_several_dtypes_are_packed_by_dtype() -> None:
    @sharded("B D, * -> B D")
    def body(x, w: Three):
        p, q, r = (einsum("B D, D F -> B F", x, u) for u in (w.p, w.q, w.r))
        return x + cast(mean("B F -> B", p + q + r), "bfloat16") * x

    @sharded("B D, * -> B D")
    def f(x, w: Threes):
        return scan(body, x, w.layers)
    g = torch.Generator().manual_seed(0)
    p, q, r = (torch.randn(2, 6, 5, generator=g).to(kind) for kind in (bfloat16, float32, bfloat16))
    x, w, made = torch.randn(3, 6, generator=g).bfloat16(), Threes(layers=Three(p=p, q=q, r=r)), compile(f)
    prepared = made.prepare("w", w)
    assert prepared.parts == ("w.layers.p|w.layers.r", "w.layers.q")
    assert made(x, prepared).dtype == bfloat16 and far(made(x, prepared), compile(f)(x, w).double(), 2) < 1


class Three(Params):
    p: Tensor = param("D F")
    q: Tensor = param("D F")
    r: Tensor = param("D F")


class Threes(Params):
    layers: Three = stacked("L", Three)


def test_a_function_called_at_other_dtypes_is_written_anew() -> None:
    """Where only the second of a pytree's leaves differs, too."""
    @sharded("B D, * -> B F")
    def f(x, w: Layer):
        return einsum("B D, D F -> B F", rms_norm(x, w.norm), w.up)
    called, stepped, x = compile(f), step(f), torch.rand(2, 6)
    for kind in (float32, float64, bfloat16):
        w = Layer(norm=torch.rand(6), up=torch.rand(6, 5).to(kind), down=torch.rand(5, 6))
        assert called(x, w).dtype == stepped(x, w).dtype == widest(float32, kind)
