"""explain: its bytes are those that one counts by hand, its lines are those of the user's file."""
from __future__ import annotations

import json
from collections.abc import Callable
from math import prod
from pathlib import Path

import pytest
import torch

from shardlib import (
    EXPLICIT,
    Layout,
    Mesh,
    SpecError,
    all_gather,
    all_reduce,
    all_to_all,
    cond,
    einsum,
    lower,
    permute,
    prove,
    rearrange,
    reduce_scatter,
    rename,
    scan,
    sharded,
)
from shardlib.api import value_and_grad
from shardlib.distributed.communicators.protocol import Call
from shardlib.dtypes import value_dtypes
from shardlib.errors import LayoutWarning
from shardlib.functions import cast, greater, square, stack, stop_gradient, where
from shardlib.functions import max as max_over
from shardlib.functions import sum as sum_over
from shardlib.language.moves import (
    ALL_GATHER,
    ALL_REDUCE,
    ALL_TO_ALL,
    PERMUTE,
    REDUCE_SCATTER,
    axes_of,
    changed_dims,
    placed,
    received,
)
from shardlib.lowering.emit import Emitter
from shardlib.models import causal, llama
from shardlib.models.layouts import named_layout
from shardlib.models.llama import LlamaConfig, logits_of, loss, next_token
from shardlib.ops import embedding
from shardlib.params import struct
from shardlib.program import Op, Program, Result, Step
from shardlib.reports.explain import CostModel, Explanation, _call, explain
from shardlib.reports.project import project
from shardlib.spec import Spec, parse

CONFIG = LlamaConfig(vocab_size=11, d_model=18, num_layers=1, num_kv_heads=3, queries_per_kv=2, head_dim=4,
                     d_ff=7, norm_eps=1e-5, rope_theta=1e4, rope_scaling=None, tied=False, max_context=64)
B, T, S, D = 2, 5, 8, CONFIG.d_model
SIZES = dict(CONFIG.sizes, B=B, T=T, S=S)  # of a step; without a cache, keys are the queries' tokens: S is T
TP2, FULL = Mesh(tp=2), dict(L=2, B=3, D=5, V=7)


def line(text: str) -> str:
    """Where the model's file, or that of its programs, has `text`."""
    return next(f"{path.name}:{i}" for path in (Path(llama.__file__), Path(causal.__file__))
                for i, l in enumerate(path.read_text().splitlines(), 1) if text in l)


ATTENTION, DOWN, CHOICE = line("a, w.wo)"), line("* up, w.down)"), line("return argmax(")
SCORED = STEPPED = line('embedding("B T, V D')


def explained(f: object, mesh: str, layout: str, default: str = "float32", **options: object) -> Explanation:
    made = Mesh.parse(mesh)
    return explain(lower(f, named_layout(layout, made), mesh=made, config=CONFIG), made,
                   SIZES if f is next_token else {**SIZES, "S": T}, default=default, **options)


def rows(found: Explanation) -> list[tuple]:
    return [(t.where, t.op, t.before, t.after, t.axes, t.group_size, t.times, t.bytes) for t in found.traffic]


@pytest.mark.parametrize("default, size", [("float32", 4), ("bfloat16", 2), ("float64", 8)])
@pytest.mark.parametrize("k", [2, 3])
def test_a_block_of_tensor_parallel_llama(k: int, default: str, size: int) -> None:
    """Three all_reduces of B T D: in each a rank receives (k-1)/k of it twice, once to add up,
    once of what others added up."""
    reduced = 2 * (k - 1) * B * T * D // k * size
    found = explained(logits_of, f"tp={k}", "tp", default)
    assert rows(found) == [(where, "all_reduce", "B T D +tp", "B T D", ("tp",), k, 1, reduced)
                           for where in (SCORED, ATTENTION, DOWN)]
    assert (found.collectives, found.bytes) == (3, 3 * reduced)


def test_the_step_of_decoding() -> None:
    """The greedy choice takes a number and an index of each row, and no logits."""
    found = explained(next_token, "tp=2", "tp")
    reduced = B * T * D * 4
    assert rows(found) == [(where, "all_reduce", "B T D +tp", "B T D", ("tp",), 2, 1, reduced)
                           for where in (STEPPED, ATTENTION, DOWN)] + [
                               (CHOICE, "all_reduce", "B max:tp", "B", ("tp",), 2, 1, B * size)
                               for size in (4, 8)]
    assert found.bytes == 3 * reduced + B * (4 + 8)


def test_sequence_parallel_counts_the_busiest_rank() -> None:
    """5 rows on 3 ranks are 2, 2 and 1.

    Who has 1 gathers 4; who keeps 2 of a sum receives them from the 2 others. No rank does both.
    """
    found, row = explained(logits_of, "tp=3", "tp+sp"), B * D * 4
    scattered = ("reduce_scatter", "B T D +tp", "B T/tp D", ("tp",), 3, 1, 2 * 2 * row)
    gathered = ("all_gather", "B T/tp D", "B T D", ("tp",), 3, 1, 4 * row)
    assert rows(found) == [(SCORED, *scattered), (line("einsum(\"B T D, D K G H"), *gathered),
                           (ATTENTION, *scattered), (line("gate, up ="), *gathered), (DOWN, *scattered),
                           (line("V D -> ... V"), *gathered)]
    assert [found.traffic[i].received for i in (0, 1)] == [(4 * row, 4 * row, 2 * row),
                                                           (3 * row, 3 * row, 4 * row)]
    assert found.received == (21 * row, 21 * row, 18 * row) and found.bytes == 21 * row


def test_fsdp_gathers_every_weight_once() -> None:
    found = explained(logits_of, "dp=2", "fsdp")
    weights = sum(prod(CONFIG.sizes[n] for n in spec.names) for _, spec in struct(llama.Llama).leaves(""))
    assert {t.op for t in found.traffic} == {"all_gather"} and found.collectives == 12
    assert found.bytes == weights // 2 * 4
    assert sum(found.argument_bytes) == 2 * weights // 2 * 4 + B * T * 8 + B * 8


def test_layers_multiply() -> None:
    config, mesh = LlamaConfig(**{**CONFIG.__dict__, "num_layers": 7}), Mesh(tp=2)
    found = explain(lower(value_and_grad(loss), named_layout("tp", mesh), mesh=mesh, config=config), mesh,
                    {**SIZES, "L": 7, "S": T})
    times = {(t.function, t.times) for t in found.traffic}
    assert times == {("block", 7), ("block_vjp", 7), ("loss_and_grad", 1)}
    assert found.collectives == 7 * 4 + 5
    assert found.bytes == (7 * 4 + 2) * B * T * D * 4 + 3 * B * T * 4


@pytest.mark.parametrize("have, want", [("M/tp N", "M N/tp"), ("M N/dp/tp", "M/tp N/dp"),
                                        ("M/dp/tp N", "M/tp/dp N"), ("(M/dp/tp N)", "(M/tp/dp N)")])
@pytest.mark.parametrize("mesh", ["dp=1,tp=2", "dp=2,tp=2", "dp=3,tp=2", "dp=2,tp=3"])
@pytest.mark.parametrize("m, n", [(12, 6), (7, 5), (6, 9), (1, 6)])
def test_what_an_exchange_brings(have: str, want: str, mesh: str, m: int, n: int) -> None:
    """Rank by rank, element by element: what it lacks of what it shall hold.

    `even` where all members have as much for each other.
    """
    mesh, before, after, sizes = Mesh.parse(mesh), parse(have), parse(want), dict(M=m, N=n)
    op = ALL_TO_ALL if len(changed_dims(before, after)) == 2 else PERMUTE
    step = Step(op, (before,), (after,), ("x",), ("y",))
    shape = (m * n,) if have.startswith("(") else (m, n)

    def held(spec: Spec, rank: int) -> set[int]:
        x = torch.arange(m * n).view(shape)
        for i, dim in enumerate(spec.dims):
            inner = n if "(" in have else 1
            start, size = mesh.extent(x.shape[i] // inner, dim.axes, mesh.coordinate(rank))
            x = x.narrow(i, start * inner, size * inner)
        return set(x.flatten().tolist())
    ranks = range(mesh.world_size)
    assert [received(step, mesh, sizes, r)
            for r in ranks] == [len(held(after, r) - held(before, r)) for r in ranks]
    members = mesh.group(axes_of(step, mesh), 0)
    parts = {len(held(before, a) & held(after, b)) for a in members for b in members}
    assert _call(placed(step, mesh, sizes, mesh.coordinate(0)),
                 "float32") == Call("all_to_all", None, torch.float32, "cpu",
                                    4 * len(held(before, 0)) if len(parts) == 1 else -1, len(parts) == 1)


def test_what_ranks_hold() -> None:
    """3 kv heads on 2 ranks are 2 and 1: the fullest rank holds more than its share."""
    found = explained(logits_of, "tp=2", "tp")
    per_head = D * 4 * (2 + 1 + 1 + 2)      # q of 2 queries, k, v, o
    held = [(6 * D * 2 + per_head * 2 + 3 * 4 * D + 3 * D), (5 * D * 2 + per_head * 1 + 3 * 3 * D + 3 * D)]
    assert found.argument_bytes == tuple(4 * n + B * T * 8 + B * 8 for n in held)
    assert found.imbalance == max(found.argument_bytes) / (sum(found.argument_bytes) / 2) > 1.1


def test_one_rank_says_nothing() -> None:
    for mesh in ("", "tp=1,dp=1"):
        found = explained(logits_of, mesh, "tp")
        assert (found.traffic, found.collectives, found.bytes, found.imbalance) == ((), 0, 0, 1.0)


def test_json() -> None:
    found = explained(next_token, "dp=2,tp=2", "tp+fsdp")
    plain = found.to_json()
    assert json.loads(json.dumps(plain)) == plain
    assert sorted(plain) == ["argument_bytes", "bytes", "collectives", "cost_source", "fusions", "imbalance",
                             "kernels", "mesh", "program", "received", "traffic", "unmet"]
    assert (plain["program"], plain["mesh"]) == ("next_token", "dp=2,tp=2")
    assert plain["bytes"] == found.bytes == max(plain["received"])
    assert plain["received"] == [sum(t["times"] * t["received"][rank] for t in plain["traffic"])
                                 for rank in range(4)]
    assert sum(t["times"] for t in plain["traffic"]) == plain["collectives"] == found.collectives
    assert plain["traffic"][0] | {"predicted_us": 0} == {
        "op": "all_gather", "where": STEPPED, "function": "next_token", "branch": "", "before": "V/tp D/dp",
        "after": "V/tp D", "axes": ["dp"], "group_size": 2, "times": 1, "bytes": 6 * D // 2 * 4,
        "received": [6 * D // 2 * 4, 5 * D // 2 * 4] * 2, "predicted_us": 0, "communicator": "", "choice": "",
        "why": "embedding takes w.embed as V/tp D: B=dp, of ids, comes before D=dp"}


def test_the_table() -> None:
    """A line for each collective, at the user's line; then the sums."""
    found = explained(next_token, "tp=2", "tp",
                      cost=CostModel(latency_us=5, bytes_per_us=100, source="measured today"))
    title, head, *body, total, held, kernels = str(found).rstrip().splitlines()
    assert title.rstrip() == "next_token on mesh tp=2" and (kernels,) == found.kernels
    assert head.split() == ["line", "collective", "before", "after", "ranks", "times", "bytes", "µs", "why"]
    assert [text.split()[0] for text in body] == [STEPPED, ATTENTION, DOWN, CHOICE, CHOICE]
    assert body[1].split()[:12] == [ATTENTION, "all_reduce", "B", "T", "D", "+tp", "B", "T", "D", "tp=2", "1",
                                    "720"]
    assert [t.predicted_us for t in found.traffic] == [5 + 7.2] * 3 + [5 + 0.08, 5 + 0.16]
    assert total == "5 collectives, 2.2 kB received per rank and run; times measured today"
    assert held == (f"arguments: {max(found.argument_bytes) / 1000:.1f} kB on the fullest rank, "
                    f"{found.imbalance:.2f} x the mean")


def test_what_a_layout_could_not_give() -> None:
    """The heads have the axis; where no head is, H has it, and rope needs all of it: that is said."""
    with pytest.warns(LayoutWarning) as said:
        program = lower(logits_of, Layout(K="tp", H="tp"), mesh=Mesh(tp=2), config=CONFIG)
    found = explain(program, Mesh(tp=2), {**SIZES, "S": T})
    assert {w.filename for w in said} == {__file__}
    assert [str(w.message) for w in said] == [
        "layout H=tp: rope needs all of H, so angles is gathered; where another of its dims may have the "
        f"axis, too, it is exchanged          {line('q = rope(')}"]
    lines = [line(text) for text in ("q = rope(", "k = rope(", "v = einsum(", "a, w.wo)")]
    assert found.unmet == (f"H is not split over tp at {', '.join(lines)}: there another dim has it",)
    assert str(found).rstrip().endswith(found.unmet[0])


def test_an_entry_for_a_dim_that_no_value_has_is_said_once() -> None:
    """One that values have in the body of a scan alone is none."""
    @sharded("B T, L T -> B T")
    def layers(x, w):
        return scan(layer, x, w)

    @sharded("B T, T -> B T")
    def layer(x, w):
        return x * rename("S -> T", rename("T -> S", w))
    mesh, layout = Mesh(dp=2, tp=2), Layout(b="dp", S="tp", V=("dp", "tp"))
    with pytest.warns(LayoutWarning, match="^layout b=dp: layers has no dim b; it has B$"):
        found = explain(lower(layers, layout, mesh=mesh), mesh, dict(B=2, T=2, L=3, S=2))
    assert found.unmet == ("b is not split over dp: no value has that dim",
                           "V is not split over dp/tp: no value has that dim")


# -- totals --------------------------------------------------------------------------------------------------

def test_the_total_is_that_of_one_rank() -> None:
    """Of 3 rows rank 1 gathers 2, and rank 0 keeps 2 of the sum: no rank receives both."""
    @sharded("N/tp, N +tp -> N, N/tp", layout=EXPLICIT)
    def f(x, y):
        return all_gather("N/tp -> N", x), reduce_scatter("N +tp -> N/tp", y)
    found = explain(lower(f, mesh=TP2), TP2, dict(N=3))
    assert [t.received for t in found.traffic] == [(4, 8), (8, 4)]
    assert ([t.bytes for t in found.traffic], found.received, found.bytes) == ([8, 8], (12, 12), 12)
    assert ("\n2 collectives, 12 B received per rank and run; times assumed, not measured: 20 µs a "
            "collective, 100 GB/s\n") in str(found)


@pytest.mark.parametrize("n, k, want", [(1, 4, (12, 4, 4, 4)), (2, 4, (16, 16, 8, 8)), (5, 3, (28, 28, 24)),
                                        (0, 2, (0, 0)), (6, 3, (32, 32, 32))])
def test_an_all_reduce_is_its_pieces(n: int, k: int, want: tuple[int, ...]) -> None:
    """Someone adds up each element, from k - 1 others, and gives it to all others:
    12 B for the only float of 4 ranks."""
    @sharded("N +tp -> N", layout=EXPLICIT)
    def f(x):
        return all_reduce("N +tp -> N", x)
    mesh = Mesh(tp=k)
    assert explain(lower(f, mesh=mesh), mesh, dict(N=n)).received == want
    assert sum(want) == 2 * (k - 1) * n * 4


@pytest.mark.parametrize("sizes", [dict(M=7, N=5), dict(M=24, N=12)], ids=str)
def test_classes_of_ranks_receive_what_each_of_their_ranks_does(sizes: dict[str, int]) -> None:
    """Of an all_reduce of 5 the first ranks of the group have larger parts;
    where a rank stands in a permute matters as well."""
    mesh = Mesh(x=3, y=2, z=4)
    program = lower(moved_about, mesh=mesh)
    found = explain(program, mesh, sizes)
    steps = {(s.op.name, str(s.ins[0]), str(s.outs[0])): s for s in program.steps if s.op.wire}
    assert len(steps) == len(found.traffic) == 5
    for t in found.traffic:
        step = steps[t.op, t.before, t.after]
        assert t.received == tuple(4 * received(step, mesh, sizes, rank)
                                   for rank in range(mesh.world_size)), t
    assert len(set(found.received)) > 1


@sharded("M/x/z N, M N +x +y, M N/z, M/y N -> M/z/x N, M N, M/z N, M N/y, M N", layout=EXPLICIT)
def moved_about(a, b, c, d):
    return (permute("M/x/z N -> M/z/x N", a), all_reduce("M N +x +y -> M N", b),
            all_to_all("M N/z -> M/z N", c), all_to_all("M/y N -> M N/y", d), all_gather("M/y N -> M N", d))


def test_many_ranks_are_said_by_classes() -> None:
    """65,536 of them: as tuples whoever asks, as plain data each number once, with the ranks that have it."""
    mesh = Mesh(dp=1024, cp=8, tp=8)
    program = lower(logits_of, named_layout("tp+sp+fsdp+cp", mesh), mesh=mesh, config=CONFIG)
    found = explain(program, mesh, {**SIZES, "B": 1540, "T": 64, "S": 64})
    assert (len(found.received), max(found.received)) == (65536, found.bytes)
    plain = found.to_json()
    assert len(json.dumps(plain)) < 100_000
    assert sum(each["ranks"] for each in plain["argument_bytes"]) == 65536
    assert max(each["bytes"] for each in plain["received"]) == found.bytes
    assert plain["traffic"][0]["received"][0] == {  # who has 2 rows of 11, and none of 18 columns
        "bytes": 2 * 18 * 4, "ranks": 1006 * 8 * 3,
        "where": ["dp=18-515,cp=0-7,tp=0-2", "dp=516-1023,cp=0-7,tp=0-2"]}


@sharded("N/tp, N +tp -> N", layout=EXPLICIT)
def gathers(x, y):
    return all_gather("N/tp -> N", x)


@sharded("N/tp, N +tp -> N", layout=EXPLICIT)
def reduces(x, y):
    return all_reduce("N +tp -> N", y)


@sharded("N/tp, N +tp -> N", layout=EXPLICIT)
def either(x, y):
    return cond(greater(all_reduce("+tp -> ()", sum_over("N/tp -> +tp", x)), than=0.5),
                gathers, reduces, x, y)


@sharded("N, N/tp, N +tp -> N", layout=EXPLICIT)
def layer(c, x, y):
    return c + cond(greater(sum_over("N -> ()", c), than=0.0), either, gathers, x, y)


@sharded("N, L N/tp, N +tp -> N", layout=EXPLICIT)
def layers(c, xs, y):
    return scan(layer, c, xs, y)


def test_a_cond_counts_its_larger_branch() -> None:
    found = explain(lower(either, mesh=TP2), TP2, dict(N=3))
    assert [(t.op, t.function, t.branch, t.received) for t in found.traffic] == [
        ("all_reduce", "either", "", (4, 4)), ("all_gather", "gathers", "gathers if v3", (4, 8)),
        ("all_reduce", "reduces", "reduces if not v3", (12, 12))]
    assert (found.collectives, found.received) == (2, (16, 16))
    title, head, *body, total, _ = str(found).rstrip().splitlines()
    assert head.split() == ["line", "branch", "collective", "before", "after", "ranks", "times", "bytes",
                            "µs", "why"]
    assert (body[1].split()[1:5] == ["gathers", "if", "v3", "all_gather"]
            and body[0].split()[1] == "all_reduce")
    assert total == ("at most 2 collectives, 16 B received per rank and run; times assumed, not measured: 20 "
                     "µs a collective, 100 GB/s")
    assert str(explain(lower(gathers, mesh=TP2), TP2, dict(N=3))).splitlines()[-2].startswith(
        "1 collectives, 8 B received per rank and run; ")


def test_conds_within_a_cond_within_a_scan() -> None:
    program = lower(layers, mesh=TP2)
    found = explain(program, TP2, dict(N=3, L=5))
    assert [(t.op, t.function, t.branch, t.times, t.received) for t in found.traffic] == [
        ("all_reduce", "either", "either if v2", 5, (4, 4)),
        ("all_gather", "gathers", "either if v2, gathers if v3", 5, (4, 8)),
        ("all_reduce", "reduces", "either if v2, reduces if not v3", 5, (12, 12)),
        ("all_gather", "gathers", "gathers if not v2", 5, (4, 8))]
    assert (found.collectives, found.received) == (10, (80, 80))


# -- groups --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("op, have, want, axes", [
    (ALL_REDUCE, "N +dp +tp", "N", ("tp", "dp")), (PERMUTE, "M/dp/tp N", "M/tp/dp N", ("tp", "dp")),
    (ALL_TO_ALL, "M/dp/tp N", "M N/dp/tp", ("tp", "dp")), (ALL_GATHER, "M/dp/tp N", "M N", ("dp", "tp")),
    (REDUCE_SCATTER, "M N +dp +tp", "M/dp/tp N", ("dp", "tp"))])
def test_rows_name_the_groups_that_the_program_calls(op: Op, have: str, want: str,
                                                     axes: tuple[str, ...]) -> None:
    """In the mesh's order where pieces have none; so a runtime makes no groups for explain alone."""
    mesh, before, after = Mesh(tp=2, dp=2), parse(have), parse(want)
    program = Program("f", (("x", before),), (Step(op, (before,), (after,), ("x",), ("y",)),),
                      (Result(after, ("y",)),), True)
    emitter = Emitter(mesh, 0, dict(M=4, N=4))
    emitter.program(program)
    assert {t.axes for t in explain(program, mesh, dict(M=4, N=4)).traffic} == {*emitter.groups} == {axes}
    assert {c.group for c in project(program, mesh, 1, dict(M=4, N=4))} == {mesh.group(axes, 1)}


def test_what_a_rank_calls_of_a_dim_whose_size_follows() -> None:
    f = sharded("B D, B D -> B S D")(lambda x, y: stack("B D, B D -> B S D", x, y))
    program, mesh, sizes = lower(f, Layout(S="x", B="x"), mesh=Mesh(x=2)), Mesh(x=2), dict(B=3, D=4)
    calls = [[str(call) for call in project(program, mesh, rank, sizes)] for rank in range(2)]
    assert calls == [["all_to_all of 16 float32 over ranks 0 1"], ["all_to_all of 8 float32 over ranks 0 1"]]
    assert explain(program, mesh, sizes).received == (16, 32)



# -- dtypes --------------------------------------------------------------------------------------------------

def looked_up(change: Callable) -> Explanation:
    @sharded("B T, V D -> B T D")
    def f(ids, table):
        return rename("B S D -> B T D", embedding("B S, V D -> B S D", change(ids), table))
    return explain(lower(f, Layout(T="tp"), mesh=TP2), TP2, dict(B=2, T=4, S=4, V=5, D=6))


@pytest.mark.parametrize("change", [
    lambda ids: rename("B T -> B S", ids),
    lambda ids: rename("B T -> B S", rearrange("T B -> B T", rearrange("B T -> T B", ids))),
    lambda ids: rename("B T -> B S", stop_gradient(ids)), lambda ids: rename("B T -> B S", ids + ids),
    lambda ids: rename("B T -> B S", where(greater(ids, than=1), ids, ids)),
    lambda ids: cond(greater(max_over("B T -> ()", ids), than=2), renamed, renamed, ids)])
def test_indices_are_int64_through_whatever_keeps_the_dtype(change: Callable) -> None:
    found = looked_up(change)
    assert {(t.op, t.bytes) for t in found.traffic if t.before == "B T/tp"} == {("all_gather", 2 * 2 * 8)}


@sharded("B T -> B S")
def renamed(ids):
    return rename("B T -> B S", ids)


def test_what_is_only_looked_like_is_no_index() -> None:
    """The derivative of a cast asks its operand for its dtype."""
    @sharded("N -> ()")
    def loss(x):
        return sum_over("N -> ()", square(cast(x, "float64")))
    program = lower(value_and_grad(loss, "x"), Layout(N="tp"), mesh=TP2)
    assert "cast_like(" in str(program) and value_dtypes(program, {}, "bfloat16")["x"] == "bfloat16"


# -- what is missing or wrong --------------------------------------------------------------------------------

@sharded("L B D, V D -> B V")
def summed(x, table):
    return einsum("B D, V D -> B V", sum_over("L B D -> B D", x), table)


@pytest.mark.parametrize("call", [explain, prove])
@pytest.mark.parametrize("mesh, sizes, dtypes, says", [
    (TP2, dict(B=2), {}, "summed: no size of L, D, V; sizes has B: sizes=dict(L=..., D=..., V=...)"),
    (TP2, {}, {}, "summed: no size of L, B, D, V; sizes has none: sizes=dict(L=..., B=..., D=..., V=...)"),
    (TP2, dict(B=-2), {}, "sizes: B is -2; a size is an integer of at least 0"),
    (TP2, dict(B=2.0), {}, "sizes: B is 2.0; a size is an integer of at least 0"),
    (Mesh(dp=2), FULL, {}, "summed: unknown axis tp; the mesh has dp"),
    (Mesh(), FULL, {}, "summed: unknown axis tp; the mesh has none"),
    (TP2, FULL, dict(y="bool"), "dtypes: summed has no argument y; it has x, table"),
    (TP2, FULL, dict(x="uint16"), ("dtypes: x is 'uint16'; a dtype is one of float64, int64, float32, int32, "
                                   "bfloat16, float16, int16, bool, uint8, int8"))])
def test_what_is_not_there_is_said(call: Callable, mesh: Mesh, sizes: dict, dtypes: dict, says: str) -> None:
    program = lower(summed, Layout(D="tp"), mesh=TP2)
    with pytest.raises(SpecError) as error:
        call(program, mesh, sizes, dtypes)
    assert str(error.value) == says


def test_a_default_that_is_no_dtype() -> None:
    with pytest.raises(SpecError) as error:
        explain(lower(summed, Layout(D="tp"), mesh=TP2), TP2, FULL, default="uint16")
    assert str(error.value) == ("default is 'uint16'; a dtype is one of float64, int64, float32, int32, "
                                "bfloat16, float16, int16, bool, uint8, int8")


def test_a_scan_needs_the_number_of_its_layers() -> None:
    program = lower(layers, mesh=TP2)
    for call in (explain, prove):
        with pytest.raises(SpecError) as error:
            call(program, TP2, dict(N=3))
        assert str(error.value) == "layers: no size of L; sizes has N: sizes=dict(L=...)"


def test_who_receives_less_of_what_two_axes_do_not_divide() -> None:
    """10 elements over 6 members, the last axis the fastest: the first four members have two of them."""
    mesh = Mesh(x=2, y=3)
    total = lower(sharded("N +x +y -> N")(lambda x: all_reduce("N +x +y -> N", x)), Layout(), mesh=mesh)
    assert explain(total, mesh, dict(N=10)).to_json()["received"] == [72] * 4 + [56] * 2
