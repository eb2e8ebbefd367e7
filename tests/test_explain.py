"""explain: its bytes are those that one counts by hand, its lines are those of the user's file."""
from __future__ import annotations

import json
from math import prod
from pathlib import Path

import pytest
import torch

from shardlib import Layout, Mesh, lower
from shardlib.api import value_and_grad
from shardlib.distributed.communicators.protocol import Call
from shardlib.explain import CostModel, Explanation, _call, explain
from shardlib.models import llama
from shardlib.models.layouts import named_layout
from shardlib.models.llama import LlamaConfig, logits_of, loss, next_token
from shardlib.moves import ALL_TO_ALL, PERMUTE, changed_dims
from shardlib.params import struct
from shardlib.program import Step
from shardlib.project import axes_of, received
from shardlib.spec import Spec, parse

CONFIG = LlamaConfig(vocab_size=11, d_model=18, num_layers=1, num_kv_heads=3, queries_per_kv=2, head_dim=4, d_ff=7, norm_eps=1e-5,
                     rope_theta=1e4, rope_scaling=None, tied=False, max_context=64)
B, T, S, D = 2, 5, 8, CONFIG.d_model
SIZES = dict(CONFIG.sizes, B=B, T=T, S=S)


def line(text: str, function: str = "") -> str:
    """Where the model's file has `text`, in `function`."""
    source = Path(llama.__file__).read_text()
    start = source.index(f"def {function}")
    return f"llama.py:{source[:source.index(text, start)].count(chr(10)) + 1}"


ATTENTION, DOWN, CHOICE = line("a, w.wo)"), line("* up, w.down)"), line("return argmax(")
SCORED, STEPPED = line("x = embedding(", "logits_of"), line("x = embedding(", "next_logits")


def explained(f: object, mesh: str, layout: str, default: str = "float32", **options: object) -> Explanation:
    made = Mesh.parse(mesh)
    return explain(lower(f, named_layout(layout, made), mesh=made, config=CONFIG), made, SIZES, default=default, **options)


def rows(found: Explanation) -> list[tuple]:
    return [(t.where, t.op, t.before, t.after, t.axes, t.group_size, t.times, t.bytes) for t in found.traffic]


@pytest.mark.parametrize("default, size", [("float32", 4), ("bfloat16", 2), ("float64", 8)])
@pytest.mark.parametrize("k", [2, 3])
def test_a_block_of_tensor_parallel_llama(k: int, default: str, size: int) -> None:
    """Three all_reduces of B T D: in each a rank receives (k-1)/k of it twice, once to add up, once of what others added up."""
    reduced = 2 * (k - 1) * B * T * D // k * size
    found = explained(logits_of, f"tp={k}", "tp", default)
    assert rows(found) == [(where, "all_reduce", "B T D +tp", "B T D", ("tp",), k, 1, reduced) for where in (SCORED, ATTENTION, DOWN)]
    assert (found.collectives, found.bytes) == (3, 3 * reduced)


def test_the_step_of_decoding() -> None:
    """The greedy choice takes a number and an index of each row, and no logits."""
    found = explained(next_token, "tp=2", "tp")
    reduced = B * T * D * 4
    assert rows(found) == [(where, "all_reduce", "B T D +tp", "B T D", ("tp",), 2, 1, reduced) for where in (STEPPED, ATTENTION, DOWN)] + [
        (CHOICE, "all_reduce", "B max:tp", "B", ("tp",), 2, 1, B * size) for size in (4, 8)]
    assert found.bytes == 3 * reduced + B * (4 + 8)


def test_sequence_parallel_counts_the_busiest_rank() -> None:
    """5 rows on 3 ranks are 2, 2 and 1. Who has 1 gathers 4; who keeps 2 of a sum receives them from the 2 others."""
    found, row = explained(logits_of, "tp=3", "tp+sp"), B * D * 4
    scattered = ("reduce_scatter", "B T D +tp", "B T/tp D", ("tp",), 3, 1, 2 * 2 * row)
    gathered = ("all_gather", "B T/tp D", "B T D", ("tp",), 3, 1, 4 * row)
    assert rows(found) == [(SCORED, *scattered), (line("einsum(\"B T D, D K G H"), *gathered), (ATTENTION, *scattered),
                           (line("gate, up ="), *gathered), (DOWN, *scattered), (line("return einsum(\"B T D, V D", "logits_of"), *gathered)]
    assert found.bytes == 6 * 4 * row


def test_fsdp_gathers_every_weight_once() -> None:
    found = explained(logits_of, "dp=2", "fsdp")
    weights = sum(prod(CONFIG.sizes[n] for n in spec.names) for _, spec in struct(llama.Llama).leaves(""))
    assert {t.op for t in found.traffic} == {"all_gather"} and found.collectives == 12
    assert found.bytes == weights // 2 * 4
    assert sum(found.argument_bytes) == 2 * weights // 2 * 4 + B * T * 8 + B * 8


def test_layers_multiply() -> None:
    config, mesh = LlamaConfig(**{**CONFIG.__dict__, "num_layers": 7}), Mesh(tp=2)
    found = explain(lower(value_and_grad(loss), named_layout("tp", mesh), mesh=mesh, config=config), mesh, {**SIZES, "L": 7, "S": T})
    times = {(t.function, t.times) for t in found.traffic}
    assert times == {("block", 7), ("block_vjp", 7), ("loss_and_grad", 1)}
    assert found.collectives == 7 * 4 + 5
    assert found.bytes == (7 * 4 + 2) * B * T * D * 4 + 3 * B * T * 4


@pytest.mark.parametrize("have, want", [("M/tp N", "M N/tp"), ("M N/dp/tp", "M/tp N/dp"), ("M/dp/tp N", "M/tp/dp N"), ("(M/dp/tp N)", "(M/tp/dp N)")])
@pytest.mark.parametrize("mesh", ["dp=1,tp=2", "dp=2,tp=2", "dp=3,tp=2", "dp=2,tp=3"])
@pytest.mark.parametrize("m, n", [(12, 6), (7, 5), (6, 9), (1, 6)])
def test_what_an_exchange_brings(have: str, want: str, mesh: str, m: int, n: int) -> None:
    """Rank by rank, element by element: what it lacks of what it shall hold. `even` where all members have as much for each other."""
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
    assert [received(step, mesh, sizes, r) for r in ranks] == [len(held(after, r) - held(before, r)) for r in ranks]
    members = mesh.group(axes_of(step), 0)
    parts = {len(held(before, a) & held(after, b)) for a in members for b in members}
    assert _call(step, mesh, sizes, "float32") == Call("all_to_all", None, torch.float32, "cpu", 4 * len(held(before, 0)) if len(parts) == 1 else -1, len(parts) == 1)


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
    assert sorted(plain) == ["argument_bytes", "bytes", "collectives", "cost_source", "imbalance", "mesh", "program", "traffic", "unmet"]
    assert (plain["program"], plain["mesh"]) == ("next_token", "dp=2,tp=2")
    assert sum(t["times"] * t["bytes"] for t in plain["traffic"]) == plain["bytes"] == found.bytes
    assert sum(t["times"] for t in plain["traffic"]) == plain["collectives"] == found.collectives
    assert plain["traffic"][0] | {"predicted_us": 0} == {
        "op": "all_gather", "where": STEPPED, "function": "next_token", "before": "V/tp D/dp", "after": "V/tp D", "axes": ["dp"], "group_size": 2,
        "times": 1, "bytes": 6 * D // 2 * 4, "predicted_us": 0, "why": "embedding takes V/tp D", "communicator": "", "choice": ""}


def test_the_table() -> None:
    """A line for each collective, at the user's line; then the sums."""
    found = explained(next_token, "tp=2", "tp", cost=CostModel(latency_us=5, bytes_per_us=100, source="measured today"))
    title, head, *body, total, held = str(found).rstrip().splitlines()
    assert title.rstrip() == "next_token on mesh tp=2"
    assert head.split() == ["line", "collective", "before", "after", "ranks", "times", "bytes", "µs", "why"]
    assert [text.split()[0] for text in body] == [STEPPED, ATTENTION, DOWN, CHOICE, CHOICE]
    assert body[1].split()[:12] == [ATTENTION, "all_reduce", "B", "T", "D", "+tp", "B", "T", "D", "tp=2", "1", "720"]
    assert [t.predicted_us for t in found.traffic] == [5 + 7.2] * 3 + [5 + 0.08, 5 + 0.16]
    assert total == "5 collectives, 2.2 kB received per rank and run; times measured today"
    assert held == f"arguments: {max(found.argument_bytes) / 1000:.1f} kB on the fullest rank, {found.imbalance:.2f} x the mean"


def test_what_a_layout_could_not_give() -> None:
    """The heads have the axis; where no head is, H has it."""
    found = explain(lower(logits_of, Layout(K="tp", H="tp"), mesh=Mesh(tp=2), config=CONFIG), Mesh(tp=2), SIZES)
    lines = [line(text, "heads") for text in ("q = rope(", "k = rope(", "v = einsum(", "a, w.wo)")]
    assert found.unmet == (f"H is not split over tp at {', '.join(lines)}: there another dim has it",)
    assert str(found).rstrip().endswith(found.unmet[0])
