"""Experts over a mesh: the dense sum over experts, in every placement, whatever was chosen."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from launching import ranks
from simulated import run
from torch import Tensor

from shardlib import (
    EXPLICIT,
    Layout,
    Mesh,
    SpecError,
    all_reduce,
    einsum,
    lower,
    prove,
    shard,
    sharded,
    simulate,
    value_and_grad,
)
from shardlib.functions import exp, mean, silu, sum
from shardlib.ops import combine, dispatch, grouped_einsum
from shardlib.spec import parse

pytestmark = pytest.mark.usefixtures("one_thread")
LOAD = torch.zeros(3)       # an argument that says how many experts there are
WRT = ("x", "weights", "up", "down")


@sharded("N D, N J, N J, E D F, E F D -> N D")
def experts(x, chosen, weights, up, down):
    rows, at = dispatch("N D, N J -> (E N)~J D, (E N)~J", x, chosen)
    h = silu(grouped_einsum("(E N)~J D, (E N)~J, E D F -> (E N)~J F", rows, at, up))
    y = grouped_einsum("(E N)~J F, (E N)~J, E F D -> (E N)~J D", h, at, down)
    return combine("(E N)~J D, (E N)~J, N J -> N D", y, at, weights)


@sharded("N D, N J, N J, E D F, E F D, N D -> ()")
def loss(x, chosen, weights, up, down, g):
    return sum("N D -> ()", g * experts(x, chosen, weights, up, down))


def dense(x: Tensor, chosen: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Every token through every expert; of these, the chosen."""
    h = torch.nn.functional.silu(torch.einsum("nd,edf->nef", x, up))
    y = torch.einsum("nef,efd->ned", h, down)
    return (y.gather(1, chosen[..., None].expand(-1, -1, x.shape[1])) * weights[..., None]).sum(1)


def drawn(n: int, d: int, f: int, e: int, j: int, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    x, weights, up, down = (torch.randn(*shape, generator=g, dtype=torch.float64)
                            for shape in ((n, d), (n, j), (e, d, f), (e, f, d)))
    return [x, torch.rand(n, e, generator=g).argsort(-1)[:, :j], weights, up, down]


def check(layout: Layout, mesh: Mesh, args: list[Tensor]) -> None:
    """Value and all gradients are those of the dense sum."""
    g = torch.randn(args[0].shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    given = [a.clone().requires_grad_(a.is_floating_point()) for a in args]
    wanted = (dense(*given) * g).sum()
    leaves = [a for a in given if a.requires_grad]
    truth = torch.autograd.grad(wanted, leaves)
    found = simulate(value_and_grad(loss, wrt=WRT), layout, *args, g, mesh=mesh)
    for a, b in zip(found, [wanted.detach(), *truth], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


TWO = [(), ("dp",), ("tp",), ("dp", "tp"), ("tp", "dp")]
PLACEMENTS = [(tokens, own, inner) for tokens in TWO for own in TWO for inner in [(), ("tp",), ("dp",)]
              if not {*inner} & {*own, *tokens}]


def test_all_placements() -> None:
    """Tokens, experts and their width over two axes, in any order: an axis of the experts that splits tokens
    exchanges, any other filters."""
    assert len(PLACEMENTS) == 33
    args = drawn(7, 4, 6, 5, 2)
    for tokens, own, inner in PLACEMENTS:
        check(Layout(N=tokens, E=own, F=inner), Mesh(dp=2, tp=2), args)


@settings(max_examples=settings.default.max_examples // 4)
@given(n=st.integers(0, 6), e=st.integers(1, 6), data=st.data(), seed=st.integers(0, 99))
def test_any_sizes_and_meshes(n: int, e: int, data: st.DataObject, seed: int) -> None:
    """More ranks than tokens or experts, no tokens at all, and as many choices as there are experts."""
    j, f = data.draw(st.integers(1, min(e, 4))), data.draw(st.integers(1, 3))
    ep, tp = data.draw(st.sampled_from(((2, 1), (3, 1), (4, 1), (2, 2), (3, 2))))
    layout = data.draw(st.sampled_from(("E=ep", "E=ep,N=ep", "N=ep,E=ep,F=tp", "E=ep,N=tp", "E=ep/tp,N=tp",
                                        "N=ep,D=tp", "E=tp/ep,F=ep")))
    check(Layout.parse(layout), Mesh(ep=ep, tp=tp), drawn(n, 3, f, e, j, seed))


@pytest.mark.parametrize("chosen", (
    [[0, 1]] * 5, [[4, 3]] * 5, [[0, 4], [4, 0], [0, 4], [4, 0], [0, 4]],
    [[4, 3], [4, 3], [4, 3], [0, 1], [0, 1]]),
    ids=("all to one rank", "all to the last", "two experts", "leaving"))
def test_skewed_routing(chosen: list[list[int]]) -> None:
    x, _, *rest = drawn(5, 4, 3, 5, 2)
    for layout in (Layout(E="ep"), Layout(N="ep", E="ep")):
        check(layout, Mesh(ep=3), [x, torch.tensor(chosen), *rest])


@pytest.mark.parametrize("mesh, layout", (("ep=2", "E=ep"), ("ep=4", "E=ep,N=ep"), ("ep=3", "N=ep,E=ep"),
                                          ("dp=2,ep=2", "E=dp/ep,N=dp")))
def test_where_experts_lie_changes_no_bit(mesh: str, layout: str) -> None:
    """Each expert multiplies the same rows, wherever it is, and the sum of two has no order."""
    x, chosen, *weights = (t.float() if t.is_floating_point() else t for t in drawn(9, 8, 6, 7, 2))
    one = simulate(experts, Layout(), x, chosen, *weights, mesh=Mesh())
    for seed in range(3):
        order = torch.randperm(7, generator=torch.Generator().manual_seed(seed))
        moved = [weights[0], *(w[order] for w in weights[1:])]
        found = simulate(experts, Layout.parse(layout), x, order.argsort()[chosen], *moved,
                         mesh=Mesh.parse(mesh))
        assert torch.equal(found, one)


@sharded("B T D, B T J, B T J, E -> B T D")
def there_and_back(x, chosen, weights, load):
    rows, at = dispatch("B T D, B T J -> (E B T)~J D, (E B T)~J", x, chosen)
    return combine("(E B T)~J D, (E B T)~J, B T J -> B T D", rows, at, weights)


@pytest.mark.parametrize("layout", ("E=ep", "B=ep,E=ep", "B=tp,T=ep,E=ep", "E=ep/tp,T=tp", "T=tp,E=ep,D=tp"))
def test_there_and_back_is_the_identity(layout: str) -> None:
    """Where the weights of a token sum to one; exactly, where they are powers of two."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(3, 5, 4, generator=g)
    chosen = torch.rand(3, 5, 7, generator=g).argsort(-1)[..., :3]
    weights = torch.tensor([0.5, 0.25, 0.25]).expand(3, 5, 3).contiguous()
    assert torch.equal(simulate(there_and_back, Layout.parse(layout), x, chosen, weights, torch.zeros(7),
                                mesh=Mesh(ep=3, tp=2)), x)


def test_what_experts_owe_passes_through_combine() -> None:
    """On the bytes of the tokens, not of all their rows."""
    mesh = Mesh(dp=2, tp=2)
    program = str(lower(experts, Layout(N="dp", F="tp"), mesh=mesh))
    assert program.count("all_reduce") == 1
    assert 'all_reduce("N/dp D +tp -> N/dp D"' in program


def test_all_ranks_agree() -> None:
    sizes = dict(N=7, D=4, J=2, E=5, F=3)
    program = lower(value_and_grad(loss, wrt=WRT), Layout(N="dp", E=("dp", "tp")), mesh=Mesh(dp=2, tp=2))
    assert str(prove(program, Mesh(dp=2, tp=2), sizes)).startswith(
        "on mesh dp=2,tp=2: 4 ranks, 24 collectives, all matched")


# -- room for fewer rows than may come -----------------------------------------------------------------------

ROOM, SIZES = "(E N)~J", dict(N=7, D=4, F=6, E=5, J=2)


def with_room(f: Any, rows: int) -> list[Tensor]:
    """On two ranks, to the first of which ten of the 14 rows come."""
    args = dict(zip(("x", "chosen", "weights", "up", "down"), drawn(7, 4, 6, 5, 2)))
    if f is not experts:
        args["g"] = torch.ones(7, 4, dtype=torch.float64)
    return run(f, Layout(N="ep", E="ep"), Mesh(ep=2), args, {**SIZES, ROOM: rows}).results


def test_room_for_what_comes_is_enough() -> None:
    """Sizes may say how many rows a rank has room for: the same, gradients too, in smaller buffers."""
    both = value_and_grad(loss, wrt=WRT)
    for f in (experts, both):
        for a, b in zip(with_room(f, 10), with_room(f, 14), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    kind, mesh = parse("(E/ep N)~J D"), Mesh(ep=2)
    assert [mesh.local_shape(kind, {**SIZES, ROOM: 10}, c) for c in mesh.coordinates()] == [(10, 4)] * 2
    assert [mesh.local_shape(kind, {**SIZES, ROOM: 99}, c) for c in mesh.coordinates()] == [(14, 4)] * 2


@pytest.mark.parametrize("rows", (9, 1, 0))
def test_rows_for_which_there_is_no_room_are_refused(rows: int) -> None:
    with pytest.raises(SpecError) as caught:
        with_room(experts, rows)
    assert str(caught.value).split("          ")[0] == (
        f"dispatch: 10 rows of (E N)~J come to a rank that has room for {rows}, as sizes say")


RANKS = """
import torch
from shardlib import Layout, Mesh, compile, scan, sharded
from shardlib.distributed.runtime import connect
from shardlib.ops import combine, dispatch

@sharded("N D, N J, E -> N D")
def there_and_back(x, chosen, load):
    rows, at = dispatch("N D, N J -> (E N)~J D, (E N)~J", x, chosen, ignore_index=-1)
    return combine("(E N)~J D, (E N)~J -> N D", rows, at)

@sharded("N D, L N J, E -> N D")
def layers(x, chosen, load):
    return scan(there_and_back, x, chosen, load)

with connect(Mesh(pp=2), "cpu") as runtime:
    f = compile(layers, Layout(L="pp"), runtime=runtime, sizes={"L": 2, "(E N)~J": 3})
    x, few, more = torch.ones(4, 2), torch.tensor([[[0], [1], [-1], [3]]]), torch.tensor([[[3]] * 4])
    assert torch.equal(f(x, few, torch.zeros(4)), x * (few[0] >= 0))
    f(x, more if runtime.rank == 1 else few, torch.zeros(4))
    print("it went on")
"""


def test_every_rank_ends_with_the_rank_that_has_no_room(tmp_path: Path) -> None:
    """The second stage alone runs that layer; the first one, which waits for it, says the same line."""
    (tmp_path / "ranks.py").write_text(RANKS)
    done = ranks(2, [tmp_path / "ranks.py"])
    says = "SpecError: dispatch: 4 rows of (E N)~J come to a rank that has room for 3, as sizes say"
    assert done.returncode != 0 and done.stdout == ""
    assert f"shardlib [rank 0] ends: rank 1 has raised {says}" in done.stderr
    assert f"shardlib.errors.{says}" in done.stderr


# -- what is refused, in whole -------------------------------------------------------------------------------

def refusal(f: Any, *args: Tensor, layout: Layout = Layout(), mesh: Mesh = Mesh(ep=2), **more: Any) -> str:
    with pytest.raises(SpecError) as caught:
        simulate(f, layout, *args, mesh=mesh, **more)
    return str(caught.value).splitlines()[0].split("  ")[0]


ROWS = "(E N)~J has only rows that data chose, and {} would have to know which; ops that take each row by " \
       "itself may have it, grouped_einsum and combine"


def test_rows_are_known_to_few_ops() -> None:
    @sharded("N D, N J, E -> D")
    def total(x, chosen, load):
        rows, _ = dispatch("N D, N J -> (E N)~J D, (E N)~J", x, chosen)
        return sum("(E N)~J D -> D", exp(rows))
    assert refusal(total, *drawn(3, 4, 2, 3, 2)[:2], LOAD) == "sum: " + ROWS.format("sum")


def test_rows_of_two_dispatches_do_not_mix() -> None:
    @sharded("N D, N J, N J, E -> N D")
    def mixed(x, chosen, other, load):
        rows, at = dispatch("N D, N J -> (E N)~J D, (E N)~J", x, chosen)
        more, _ = dispatch("N D, N J -> (E N)~J D, (E N)~J", x, other)
        return combine("(E N)~J D, (E N)~J -> N D", rows * more, at)
    x, chosen = drawn(3, 4, 2, 3, 2)[:2]
    assert refusal(mixed, x, chosen, chosen, LOAD) == (
        "mul: rows and more have the dim (E N)~J of two dispatches; their rows differ")


def test_rows_stay_within_a_program() -> None:
    @sharded("N D, N J, E -> (E N)~J D")
    def out(x, chosen, load):
        return dispatch("N D, N J -> (E N)~J D, (E N)~J", x, chosen)[0]
    assert refusal(out, *drawn(3, 4, 2, 3, 2)[:2], LOAD) == (
        "out: v1 has rows that data chose; they stay within a program")


@pytest.mark.parametrize("chosen, says", (
    ([[0, 1], [2, 3]], "dispatch: chosen holds 3, outside of 0 to 2 (E=3)"),
    ([[0, 1], [2, 2]], "dispatch: chosen holds -1, outside of 0 to 2 (E=3); an expert that a token has twice "
                       "counts as -1")))
@pytest.mark.parametrize("layout", (Layout(), Layout(E="ep"), Layout(N="ep", E="ep")))
def test_an_expert_that_is_none(layout: Layout, chosen: list[list[int]], says: str) -> None:
    x, _, *rest = drawn(2, 4, 2, 3, 2)
    assert refusal(experts, x, torch.tensor(chosen), *rest, layout=layout) == says


def test_experts_that_are_made_otherwise_than_by_route_are_looked_at() -> None:
    @sharded("N D, N J, E -> N D")
    def doubled(x, chosen, load):
        rows, at = dispatch("N D, N J -> (E N)~J D, (E N)~J", x, chosen * 2)
        return combine("(E N)~J D, (E N)~J -> N D", rows, at)
    assert refusal(doubled, torch.ones(1, 2), torch.tensor([[0, 2]]), torch.zeros(3)) == (
        "dispatch: experts holds 4, outside of 0 to 2 (E=3)")


def test_rows_do_not_move() -> None:
    @sharded("N D, N J, E/ep D F -> N F +ep", layout=EXPLICIT)
    def moved(x, chosen, w):
        rows, at = dispatch("N D, N J -> (E N)~J D, (E N)~J", x, chosen)
        h = grouped_einsum("(E/ep N)~J D, (E/ep N)~J, E/ep D F -> (E/ep N)~J F", rows, at, w)
        return combine("(E/ep N)~J F, (E/ep N)~J -> N F +ep", h, at)
    x, chosen, _, up, _ = drawn(3, 4, 2, 3, 2)
    assert refusal(moved, x, chosen, up) == (
        'grouped_einsum: rows has (E N)~J whole; the text takes "(E/ep N)~J D"')


def test_a_whole_shared_expert_is_not_added_to_an_owed_sum() -> None:
    @sharded("N D, N J, N D, E -> N D +ep", layout=EXPLICIT)
    def shared(x, chosen, y, load):
        rows, at = dispatch("N D, N J -> (E/ep N)~J D, (E/ep N)~J", x, chosen)
        return combine("(E/ep N)~J D, (E/ep N)~J -> N D +ep", rows, at) + y
    x, chosen = drawn(3, 4, 2, 3, 2)[:2]
    assert refusal(shared, x, chosen, x, LOAD) == (
        "add: y is whole, combine(...) owes a sum over ep; the sum would count y once for every rank of ep")


def test_a_whole_shared_expert_is_not_reduced() -> None:
    @sharded("N D, N J, N D, E -> N D", layout=EXPLICIT)
    def shared(x, chosen, y, load):
        rows, at = dispatch("N D, N J -> (E/ep N)~J D, (E/ep N)~J", x, chosen)
        routed = combine("(E/ep N)~J D, (E/ep N)~J -> N D +ep", rows, at)
        return all_reduce("N D +ep -> N D", routed) + all_reduce("N D +ep -> N D", y)
    x, chosen = drawn(3, 4, 2, 3, 2)[:2]
    assert refusal(shared, x, chosen, x, LOAD) == (
        "all_reduce: y owes no sum over ep; reducing it would count it once for every rank of ep")


def test_a_shared_expert_that_owes_is_paid_with_the_others() -> None:
    """Where its width is split over the axis of the experts, one sum of both is reduced."""
    @sharded("N D, N J, F D, N F, E -> N D", layout=EXPLICIT)
    def shared(x, chosen, w, h, load):
        rows, at = dispatch("N D, N J -> (E/ep N)~J D, (E/ep N)~J", x, chosen)
        routed = combine("(E/ep N)~J D, (E/ep N)~J -> N D +ep", rows, at)
        h, w = shard("N F -> N F/ep", h), shard("F D -> F/ep D", w)
        return all_reduce("N D +ep -> N D", routed + einsum("N F/ep, F/ep D -> N D +ep", h, w))
    x, chosen, _, up, _ = drawn(3, 4, 2, 3, 2)
    h, w = torch.randn(3, 5, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    torch.testing.assert_close(simulate(shared, Layout(), x, chosen, w, h, LOAD, mesh=Mesh(ep=2)),
                               2 * x + h @ w)


@pytest.mark.parametrize("call, text", (
    (dispatch, "N D, N J -> (E N)~K D, (E N)~K"), (dispatch, "N D, N J -> (E N) D, (E N)~J"),
    (dispatch, "N D, N J -> (E N)~J D"), (grouped_einsum, "(E N)~J D, (E N)~J, E D F -> (E N)~J D"),
    (grouped_einsum, "(E N)~J D, (E N)~J, N D F -> (E N)~J F"), (combine, "(E N)~J D, (E N)~J -> E D"),
    (combine, "(E N)~J D, (E N)~J, N K -> N D")))
def test_a_text_that_is_no_call_says(call: Any, text: str) -> None:
    with pytest.raises(SpecError, match=f"{call.__name__} .*: the specs are those of "):
        call(text, None, None, *[None] * (call is grouped_einsum))


def test_a_mean_of_rows_is_refused_in_backward_too() -> None:
    """A weight that all rows share would be summed over rows that mean nothing."""
    @sharded("N D, N J, D, E -> ()")
    def scaled(x, chosen, w, load):
        rows, at = dispatch("N D, N J -> (E N)~J D, (E N)~J", x, chosen)
        return mean("N D -> ()", combine("(E N)~J D, (E N)~J -> N D", rows * w, at))
    x, chosen = drawn(3, 4, 2, 3, 2)[:2]
    simulate(scaled, Layout(), x, chosen, x[0], LOAD, mesh=Mesh())
    assert refusal(value_and_grad(scaled, wrt=("w",)), x, chosen, x[0], LOAD) == (
        "einsum: " + ROWS.format("einsum"))


