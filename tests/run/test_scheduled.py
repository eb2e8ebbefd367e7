"""Programs under a schedule: the loss and the gradients of the whole batch, whatever the order; what ranks
send and keep; and what no order of microbatches can give."""
from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shardlib import (
    Layout,
    Mesh,
    Params,
    SpecError,
    compile,
    einsum,
    init,
    lower,
    param,
    prove,
    rename,
    scan,
    sharded,
    simulate,
    stacked,
    value_and_grad,
)
from shardlib.compiler.microbatches import cut
from shardlib.functions import cast, exp, greater, mean, silu, sum
from shardlib.ops import attention, cross_entropy, embedding
from shardlib.params import leaf_values
from shardlib.reports.scheduled import Letter, asked_by, channels, match_ranks
from shardlib.run.scheduled import _groups
from shardlib.schedules.folding import Fold
from shardlib.schedules.generators import gpipe, interleaved, one_f_one_b, zbv, zero_bubble
from shardlib.schedules.schedule import Schedule

pytestmark = pytest.mark.usefixtures("one_thread")


class Layer(Params):
    up: Tensor = param("D F")
    down: Tensor = param("F D")


class Net(Params):
    embed: Tensor = param("V D")
    layers: Layer = stacked("L", Layer)
    scale: Tensor = param("D")
    head: Tensor = param("V D")                     # absent where the table is tied


@sharded("B D, *, D -> B D")
def layer(x, w: Layer, scale):
    h = silu(einsum("B D, D F -> B F", x * scale, w.up))
    return x + einsum("B F, F D -> B D", h, w.down)


@sharded("B, * -> B V")
def logits(ids, w: Net):
    x = scan(layer, embedding("B, V D -> B D", ids, w.embed), w.layers, w.scale)
    return einsum("B D, V D -> B V", x, w.embed if w.head is None else w.head)


@sharded("B, B, * -> ()")
def loss(ids, labels, w: Net):
    """A mean over the rows that have a label: its count is a sum over all microbatches."""
    losses = cross_entropy("B V, B -> B", logits(ids, w), labels, ignore_index=-1)
    return sum("B -> ()", losses) / sum("B -> ()", cast(greater(labels, -1), "float64"))


def arguments(layers: int, rows: int, tied: bool) -> tuple[Tensor, Tensor, Net]:
    w = init(Net, dict(L=layers, D=4, F=5, V=7), dtype=torch.float64)
    draw = torch.Generator().manual_seed(rows)
    ids, labels = torch.randint(0, 7, (2, rows), generator=draw)
    labels[1::3] = -1
    return ids, labels, Net(embed=w.embed, layers=w.layers, scale=w.scale, head=None if tied else w.head)


def assert_equal(found: Any, whole: Any) -> None:
    for a, b in zip(found, whole, strict=True):
        for (_, x), (_, y) in zip(*([*leaf_values(v, "")] if isinstance(v, Params) else [("", v)]
                                    for v in (a, b))):
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)


def own_list(ranks: int, microbatches: int) -> Schedule:
    """Somebody's own: the last microbatch first."""
    return Schedule.parse("\n".join(" ".join(
        f"{p}{kind}{m}" for kind in "FB" for m in range(microbatches)[::-1]) for p in range(ranks)))


SCHEDULES = (gpipe, one_f_one_b, zero_bubble, zbv, own_list, lambda p, m: interleaved(p, p * m, 2))


@settings(max_examples=6)
@given(st.integers(0, 5), st.integers(2, 4), st.integers(1, 4), st.sampled_from(SCHEDULES), st.booleans(),
       st.integers(1, 8), st.sampled_from((dict(), dict(), dict(tp=2), dict(dp=2))), st.data())
def test_it_is_the_whole_batch_on_one_rank(layers, ranks, microbatches, make, tied, rows, more, data) -> None:
    """Layers and rows that do not divide, stages without layers, microbatches without rows; layers that are
    cut anywhere."""
    mesh, schedule = Mesh(dict(pp=ranks if not more else 2, **more)), make(2 if more else ranks, microbatches)
    if layers and data.draw(st.booleans()):
        of_each = data.draw(st.lists(st.integers(0, schedule.stages - 1), min_size=layers, max_size=layers))
        schedule = schedule.cut(*(of_each.count(s) for s in range(schedule.stages)))
    layout = Layout({"L": "pp", "B": ("dp", "mb") if "dp" in more else "mb",
                     **({"F": "tp", "V": "tp"} if "tp" in more else {})})
    args, f, log = arguments(layers, rows, tied), value_and_grad(loss), []
    assert_equal(simulate(f, layout, *args, mesh=mesh, schedule=schedule, log=log),
                 simulate(f, Layout(), *args, mesh=Mesh()))
    program = lower(f, layout, *args, mesh=mesh, schedule=schedule)
    proof = prove(program, mesh, dict(L=layers, B=rows, D=4, F=5, V=7), schedule=schedule)
    sent = [one for one in log if one[1] == "send"]
    assert (proof.collectives, proof.messages) == (len(log) - len(sent), len(sent))


def test_a_mesh_cuts_layers_without_a_schedule() -> None:
    """One microbatch: each stage holds the layers that the mesh says."""
    args, f = arguments(5, 6, False), value_and_grad(loss)
    for mesh, layout in ((Mesh(pp=(4, 1)), Layout(L="pp")),
                         (Mesh(dp=2, pp=(0, 3, 2)), Layout(L="pp", B="dp"))):
        assert_equal(simulate(f, layout, *args, mesh=mesh), simulate(f, Layout(), *args, mesh=Mesh()))
        prove(lower(f, layout, *args, mesh=mesh), mesh, dict(L=5, B=6, D=4, F=5, V=7))
    for mesh, layout, schedule in ((Mesh(pp=(4, 2)), Layout(L="pp"), None),
                                   (Mesh(pp=2), Layout(L="pp", B="mb"), one_f_one_b(2, 3).cut(4, 2))):
        with pytest.raises(SpecError) as refused:
            simulate(f, layout, *args, mesh=mesh, schedule=schedule)
        assert "5 rows are split over pp, which cuts 6" in str(refused.value)
    with pytest.raises(SpecError) as refused:
        simulate(f, Layout(L="pp", B="mb"), *args, mesh=Mesh(pp=(4, 1)), schedule=one_f_one_b(2, 3))
    assert str(refused.value) == ("schedule: the mesh pp=4+1 cuts pp; under a schedule that says it: "
                                  "schedule.cut(4, 1)")


def test_weights_split_at_rest_and_a_gradient_by_rows() -> None:
    """FSDP beside stages; and what has a piece in each microbatch is put together."""
    @sharded("B D, B, * -> ()")
    def from_rows(x, labels, w: Net):
        y = einsum("B D, V D -> B V", scan(layer, x, w.layers, w.scale), w.head)
        return mean("B -> ()", cross_entropy("B V, B -> B", y, labels, ignore_index=-1))
    _, labels, w = arguments(3, 7, False)
    x, f = torch.randn(7, 4, dtype=torch.float64), value_and_grad(from_rows, wrt=["w", "x"])
    whole = simulate(f, Layout(), x, labels, w, mesh=Mesh())
    for mesh, ranks in ((Mesh(dp=2, pp=2), 2), (Mesh(dp=2), 1)):    # one rank: gradients are accumulated
        layout = Layout({**({"L": "pp"} if ranks > 1 else {}), "B": ("dp", "mb"), "D": "dp"})
        assert_equal(simulate(f, layout, x, labels, w, mesh=mesh, schedule=one_f_one_b(ranks, 3)), whole)


def test_sums_over_microbatches_are_float32() -> None:
    """Added up in bfloat16, 256 and seven times 1 are 256."""
    @sharded("B D, D -> ()")
    def total(x, w):
        return sum("B D -> ()", x * w)
    x, w = torch.tensor([[256.0]] + [[1.0]] * 7).bfloat16(), torch.ones(1).bfloat16()
    value, grad = simulate(value_and_grad(total, wrt="w"), Layout(B="mb"), x, w, mesh=Mesh(),
                           schedule=gpipe(1, 8))
    assert (value.item(), grad.item(), grad.dtype) == (264.0, 264.0, torch.bfloat16)


def test_beside_a_loss_and_with_layers_that_run_again() -> None:
    @sharded("B, B, * -> (), ()")
    def counted(ids, labels, w: Net):
        return loss(ids, labels, w), sum("B -> ()", cast(greater(labels, -1), "float64"))
    args, f = arguments(3, 7, True), value_and_grad(counted, has_aux=True, remat=["layer"])
    assert_equal(simulate(f, Layout(L="pp", B="mb"), *args, mesh=Mesh(pp=2), schedule=zbv(2, 2)),
                 simulate(f, Layout(), *args, mesh=Mesh()))


class Attending(Params):
    wq: Tensor = param("D K G H")
    wk: Tensor = param("D K H")


@sharded("B T D, * -> B T D")
def attending(x, w: Attending):
    q, k = einsum("B T D, D K G H -> B T K G H", x, w.wq), einsum("B T D, D K H -> B T K H", x, w.wk)
    k = rename("B T K H -> B S K H", k)
    y = attention("B T K G H, B S K H, B S K H -> B T K G H", q, k, k, causal=True)
    return x + einsum("B T K G H, D K G H -> B T D", y, w.wq)


class Attendings(Params):
    layers: Attending = stacked("L", Attending)


@sharded("B T D, * -> ()")
def attended(x, w: Attendings):
    return mean("B T D -> ()", silu(scan(attending, x, w.layers)))


def test_attention_over_pieces_in_each_layer() -> None:
    """A ring, and pieces that are merged, among the ranks of each stage; over time there can be none."""
    w = init(Attendings, sizes := dict(L=3, D=4, K=2, G=1, H=2), dtype=torch.float64)
    x, f, mesh = torch.randn(3, 5, 4, dtype=torch.float64), value_and_grad(attended), Mesh(pp=2, cp=2)
    schedule = one_f_one_b(2, 2)
    whole = simulate(f, Layout(), x, w, mesh=Mesh())
    for layout in (Layout(L="pp", B="mb", T="cp", S="cp"), Layout(L="pp", B="mb", S="cp")):
        assert_equal(simulate(f, layout, x, w, mesh=mesh, schedule=schedule, log=(log := [])), whole)
        program, fold = lower(f, layout, x, w, mesh=mesh, schedule=schedule), Fold(schedule, mesh)
        proof = prove(program, mesh, dict(B=3, T=5, S=5, **sizes), schedule=schedule)
        assert proof.collectives == len([one for one in log if one[1] != "send"])
        parts = cut(program, fold.whole, {}, "FB")
        nothing = replace(parts.before, steps=())
        assert ("cp",) in _groups(replace(parts, before=nothing, units=parts.units[:1], after=nothing), fold)
    with pytest.raises(SpecError, match="^schedule: attending has a sum over all microbatches in each layer"):
        simulate(f, Layout(L="pp", T="mb", S="mb"), x, w, mesh=Mesh(pp=2), schedule=schedule)


def test_forward_alone() -> None:
    ids, _, w = arguments(3, 5, True)
    schedule = Schedule.parse("0F0 0F1 0F2\n1F0 1F1 1F2")
    assert_equal([simulate(logits, Layout(L="pp", B="mb"), ids, w, mesh=Mesh(pp=2), schedule=schedule)],
                 [simulate(logits, Layout(), ids, w, mesh=Mesh())])


def test_where_a_program_is_cut() -> None:
    """The count of the mask comes first, once; at the end, once, what follows from sums over microbatches."""
    mesh = Fold(one_f_one_b(2, 2), Mesh(pp=2)).whole
    program = lower(value_and_grad(loss), Layout(L="pp", B="mb"), mesh=Mesh(pp=2), schedule=one_f_one_b(2, 2))
    parts = cut(program, mesh, {}, "FB")
    told = {part.name.removeprefix("loss_and_grad_"): [s.op.name for s in part.steps]
            for part in (parts.before, *parts.units, parts.after)}
    assert told == {
        "before": ["hold", "greater", "cast", "sum", "full", "hold", "div"],
        "forward": ["embedding", "scan"],
        "backward": ["einsum", "cross_entropy_sums", "sum", "spread", "div", "scale", "label_sums_vjp",
                     "einsum", "einsum", "scan", "sum", "embedding_vjp"],
        "after": ["div", "broadcast", "all_reduce"]}
    assert ["/mb" in str(part)
            for part in (parts.before, *parts.units, parts.after)] == [False, True, True, False]


def test_a_layer_s_sum_is_not_in_the_layer() -> None:
    """Gradients are summed over ranks once, not in each layer of each microbatch."""
    program = lower(value_and_grad(loss), Layout(L="pp", B=("dp", "mb")), mesh=Mesh(dp=2, pp=2),
                    schedule=one_f_one_b(2, 2))
    assert [s.op.name for body in program.bodies() for s in body.steps if s.op.wire] == []


# -- what cannot be ------------------------------------------------------------------------------------------

def refused(f: Any, layout: Layout, mesh: Mesh, schedule: Schedule = gpipe(2, 2)) -> str:
    with pytest.raises(SpecError) as error:
        simulate(value_and_grad(f), layout, *arguments(2, 4, False), mesh=mesh, schedule=schedule)
    return str(error.value).partition("          ")[0]


def test_what_waits_for_all_microbatches_is_refused() -> None:
    @sharded("B, B, * -> ()")
    def perplexity(ids, labels, w: Net):
        return exp(loss(ids, labels, w))

    @sharded("B D, *, D -> B D")
    def normed(x, w: Layer, scale):
        y = layer(x, w, scale)
        return y - mean("B D -> D", y)

    @sharded("B, B, * -> ()")
    def over_rows(ids, labels, w: Net):
        return mean("B D -> ()", scan(normed, embedding("B, V D -> B D", ids, w.embed), w.layers, w.scale))

    @sharded("B, B, * -> ()")
    def contrasted(ids, labels, w: Net):
        x = scan(layer, embedding("B, V D -> B D", ids, w.embed), w.layers, w.scale)
        return mean("B C -> ()", silu(einsum("B D, C D -> B C", x, rename("B D -> C D", x))))

    @sharded("B, B, * -> ()")
    def twice(ids, labels, w: Net):
        x = scan(layer, embedding("B, V D -> B D", ids, w.embed), w.layers, w.scale)
        return mean("B D -> ()", scan(layer, x, w.layers, w.scale))
    layout, mesh = Layout(L="pp", B="mb"), Mesh(pp=2)
    assert refused(perplexity, layout, mesh) == (
        'schedule: the pipeline of layer_vjp waits for all_reduce("+mb @pp:1 -> @pp:1"), which all '
        "microbatches have to come to first")
    assert refused(over_rows, layout, mesh) == (
        "schedule: normed has a sum over all microbatches in each layer; there is none before all have come "
        "to it")
    assert refused(contrasted, layout, mesh) == (
        'schedule: the pipeline of layer_vjp waits for all_gather("B/mb D @pp:1 -> B D @pp:1"), which all '
        "microbatches have to come to first")
    assert refused(twice, layout, mesh) == (
        "schedule: twice_and_grad has 4 pipelines, layer, layer, layer_vjp, layer_vjp; under a schedule "
        "there is one, and its gradient")


def test_what_a_schedule_is_on() -> None:
    layout = Layout(L="pp", B="mb")
    assert refused(loss, Layout(L="pp", B=("mb", "dp")), Mesh(pp=2, dp=2)) == (
        'schedule: a value is B/mb/dp; microbatches are cut last: B=(.., "mb")')
    assert refused(loss, Layout(L="pp"), Mesh(pp=2)) == (
        "schedule: no argument of loss_and_grad is split over mb; the layout says what microbatches are "
        'pieces of, as in B="mb"')
    assert refused(loss, layout, Mesh(pp=3)) == (
        "schedule: it has 2 ranks, and the axis pp of the mesh pp=3 has 3")
    assert refused(loss, layout, Mesh(pp=2, mb=2)) == (
        "schedule: mb is its axis of time, and the mesh pp=2,mb=2 has one of that name")
    with pytest.raises(SpecError, match="^schedule: it is a str; it is a Schedule, as "):
        simulate(loss, layout, *arguments(2, 4, False), mesh=Mesh(pp=2), schedule="1f1b")


def test_lists_that_do_not_fit_are_refused_by_the_proof() -> None:
    schedule, mesh = one_f_one_b(2, 3), Mesh(pp=2)
    program = lower(value_and_grad(loss), Layout(L="pp", B="mb"), mesh=mesh, schedule=schedule)
    sizes = dict(L=3, B=7, D=4, F=5, V=7)
    swapped = Schedule.parse("0F0 0B0 0F1 0F2 0B1 0B2\n1F1 1F0 1B0 1B1 1F2 1B2")
    with pytest.raises(SpecError, match="^schedule: its ranks wait for each other: "):
        prove(program, mesh, sizes, schedule=swapped)
    fold = Fold(schedule, mesh)
    parts = cut(program, fold.whole, {}, "FB")
    asked = [list(asked_by(fold, parts, sizes, c)) for c in mesh.coordinates()]
    assert match_ranks(asked) == (2, 6)

    def without(rank: int, posts: bool) -> list[list]:
        at = next(i for i, a in enumerate(asked[rank]) if isinstance(a, Letter) and a.posts == posts)
        return [mine[:at] + mine[at + 1:] if r == rank else mine for r, mine in enumerate(asked)]
    with pytest.raises(SpecError, match="^nobody takes send of 12 float32 in F0, stage 0 to 1$"):
        match_ranks(without(1, posts=False))
    with pytest.raises(SpecError, match="^the ranks part ways: rank 0 waits for send of 12 float32 in B0, "
                                        "stage 1 to 0; rank 1 waits for send of 12 float32 in F0, stage 0 to "
                                        "1$"):
        match_ranks(without(0, posts=True))
    with pytest.raises(SpecError, match=r"^rank 1 takes send of 12 float32 in F1, stage 0 to 1, of "
                                        r"\(3, 4\); it is posted as \(2, 4\)$"):
        match_ranks([asked[0], [asked[1][i] if not (isinstance(a, Letter) and a.part == "F0") else
                                Letter(a.line, "F1", a.ends, a.number, a.posts, a.call) for i, a in
                                enumerate(asked[1])]])


def test_both_ends_of_a_channel_have_one_order() -> None:
    """That in which messages are posted, though the other end takes them in another."""
    schedule = Schedule.parse("0F0 0F1 0F2 0B2 0B0 0B1\n1F2 1F0 1F1 1B1 1B0 1B2")
    mesh, sizes = Mesh(pp=2), dict(L=2, B=5, D=4, F=5, V=7)
    program = lower(value_and_grad(loss), Layout(L="pp", B="mb"), mesh=mesh, schedule=schedule)
    fold = Fold(schedule, mesh)
    parts = cut(program, fold.whole, {}, schedule.kinds)
    first, second = (channels(fold, parts, sizes, dict(pp=p)) for p in range(2))
    assert {edge: [(a.part, a.call.shapes) for a in letters] for edge, letters in first.items()} == {
        edge: [(a.part, a.call.shapes) for a in letters] for edge, letters in second.items()}
    assert {edge: [a.part for a in letters] for edge, letters in first.items()} == {
        (0, 1): ["F0", "F1", "F2"], (1, 0): ["B1", "B0", "B2"]}
    assert [a.call.shapes[0] for a in first[0, 1]] == [(2, 4), (2, 4), (1, 4)]


def test_a_run_says_when_each_action_was() -> None:
    """One stage on one rank: all that there is, in the order of its list, none before the one before it."""
    schedule = one_f_one_b(1, 3)
    run = compile(value_and_grad(loss), Layout(B="mb"), mesh=Mesh(), schedule=schedule)
    made = run.timeline(*arguments(2, 5, True))
    assert [span.action for span in made.spans] == list(schedule.ranks[0])
    ends = [0.0, *(span.end for span in made.spans)]
    assert all(end <= span.start <= span.end for end, span in zip(ends, made.spans))
    assert made.spans[0].start == 0 and made.kept == (1,) and 0 <= made.idle < 1
