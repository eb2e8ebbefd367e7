"""Attention whose keys are split: pieces merged, and a ring. Each is attention on one rank, forward and
backward, with pieces that are uneven or empty, and rows that see nothing; and what a step that is no move
exchanges is what its ranks ask for."""
from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from launching import forked_torchrun
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from shardlib import Layout, Mesh, explain, lower, prove, scan, sharded, simulate, value_and_grad
from shardlib.functions import sum
from shardlib.ops import TABLE, attention, update_cache
from shardlib.ops.attend_lse import Scores
from shardlib.ops.attend_ring import attend_ring, attend_ring_vjp
from shardlib.ops.ring import Ring
from shardlib.ops.seen import Seen
from shardlib.oracle import same
from shardlib.parser import parse_program
from shardlib.reports.project import project
from shardlib.run.simulate import run_ranks

pytestmark = pytest.mark.usefixtures("one_thread")
BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "ring_attention.py"
QKV = "B T K G H, B S K H, B S K V"
RING, PIECES = Layout(T="cp", S="cp"), Layout(S="cp")
OPTIONS: dict[str, tuple] = dict(window=(1, 3), softcap=(0.7,), causal=(False,))
WRT = ("q", "k", "v", "sinks")


def program(beside: tuple[str, ...] = (), **options: Any) -> Any:
    text = ", ".join([QKV, *("K G" if n == "sinks" else "B" for n in beside)])

    @sharded(f"{QKV}, B, B, K G, B T K G V -> ()")
    def f(q, k, v, start, lengths, sinks, weight):
        every = dict(start=start, lengths=lengths, sinks=sinks)
        of = {n: every[n] for n in beside}
        a = attention(f"{text} -> B T K G V", q, k, v, of.pop("start", None), **of, **options)
        return sum("B T K G V -> ()", a * weight)
    return f


def inputs(t: int, s: int, seed: int = 0) -> list[torch.Tensor]:
    r = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=r, dtype=torch.float64)
    return [normal(2, t, 2, 2, 3), normal(2, s, 2, 3), normal(2, s, 2, 4),
            torch.randint(-t, s + 1, (2,), generator=r), torch.randint(s + 2, (2,), generator=r),
            normal(2, 2), normal(2, t, 2, 2, 4)]


@settings(max_examples=25)
@given(st.data())
def test_it_is_attention_on_one_rank(data: st.DataObject) -> None:
    beside = tuple(n for n in ("start", "lengths", "sinks") if data.draw(st.booleans(), n))
    options = {n: value for n, values in OPTIONS.items()
               if (value := data.draw(st.sampled_from((None, *values)), n)) is not None}
    t, s = data.draw(st.sampled_from(((5, 5), (4, 7), (1, 2), (7, 3), (2, 0))))
    f = value_and_grad(program(beside, **options), WRT if "sinks" in beside else WRT[:3])
    args, layout = inputs(t, s, data.draw(st.integers(0, 99))), data.draw(st.sampled_from((RING, PIECES)))
    found = simulate(f, layout, *args, mesh=Mesh(cp=data.draw(st.sampled_from((2, 3, 4)))))
    wanted = simulate(f, Layout(), *args, mesh=Mesh(cp=1))
    assert all(same(a, b, 1e-12) for a, b in zip(found, wanted, strict=True)), (beside, options)


@pytest.mark.parametrize("layout, t, asked", (
    (RING, 4, ["all_to_all"] * 2 + ["all_reduce"] + ["all_to_all"] * 2),
    (RING, 7, ["all_to_all"] * 2 + ["all_reduce"] + ["all_to_all"] * 2),
    (PIECES, 4, ["all_gather", "all_reduce"])))
def test_what_is_said_is_what_is_asked(layout: Layout, t: int, asked: list[str]) -> None:
    """By the proof, by explain and by the ranks, uneven as the pieces are; no keys are gathered."""
    mesh, f, log = Mesh(cp=3), value_and_grad(program(), WRT[:3]), []
    explicit, args = lower(f, layout, mesh=mesh), inputs(t, 7)
    sizes = dict(B=2, T=t, S=7, K=2, G=2, H=3, V=4)
    dtypes = {n: "float64" for n in (*WRT, "weight")}
    simulate(f, layout, *args, mesh=mesh, log=log)
    assert [name for _, name, _ in log] == asked
    calls = [project(explicit, mesh, rank, sizes, dtypes) for rank in range(3)]
    assert [(name, n) for _, name, n in log] == [(of[0].op, max(c.numel for c in of)) for of in zip(*calls)]
    assert prove(explicit, mesh, sizes, dtypes).collectives == len(log)
    report = explain(explicit, mesh, sizes, dtypes)
    assert [row.op for row in report.traffic] == [name for _, name, _ in log]
    assert parse_program(str(explicit), TABLE) == explicit
    if layout is RING and t == 4:
        # a query of rank 2 to rank 0's keys; three keys to rank 1's query, one to rank 2's
        assert report.traffic[0].received == tuple(2 * 2 * 8 * n for n in (2 * 3, 3 * 7, 1 * 7))
        assert str(report.traffic[0].before) == "B S/cp K H"


def test_two_axes_and_what_a_scan_runs() -> None:
    """Keys over a product of axes; the ring beside rows over another axis."""
    @sharded("B T K G H, B S K H -> B T K G H")
    def layer(x, k):
        return x + attention("B T K G H, B S K H, B S K H -> B T K G H", x, k, k)

    @sharded("B T K G H, L B S K H -> B T K G H")
    def layers(x, ks):
        return scan(layer, x, ks)
    q, k, *_ = inputs(5, 5)
    args = q, torch.stack([k, -k, k.flip(1)])
    wanted = simulate(layers, Layout(), *args, mesh=Mesh())
    for layout in ("S=x/y", "B=x,S=y", "T=x/y,S=x/y", "B=x,T=y,S=y", "T=x,S=y"):
        found = simulate(layers, Layout.parse(layout), *args, mesh=Mesh(x=2, y=2))
        assert same(found, wanted, 1e-12), layout
        assert "all_gather" not in str(lower(layers, Layout.parse(layout), mesh=Mesh(x=2, y=2)))


def test_a_mask_has_no_ring() -> None:
    """It may have both dims: the keys are gathered for it, or split over what the queries are not."""
    @sharded(f"{QKV}, T S -> B T K G V")
    def masked(q, k, v, mask):
        return attention(f"{QKV}, T S -> B T K G V", q, k, v, mask=mask)
    q, k, v, *_ = inputs(4, 6)
    mask = torch.rand(4, 6, generator=torch.Generator().manual_seed(0)) < 0.5
    wanted = simulate(masked, Layout(), q, k, v, mask, mesh=Mesh(cp=1))
    for layout, gathers in ((RING, True), (PIECES, False)):
        assert same(simulate(masked, layout, q, k, v, mask, mesh=Mesh(cp=3)), wanted, 1e-12)
        assert ("all_gather" in str(lower(masked, layout, mesh=Mesh(cp=3)))) == gathers


class Largest(TorchDispatchMode):
    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for x in tree_leaves(made):
            if isinstance(x, torch.Tensor) and x.untyped_storage().nbytes():
                self.most = max(self.most, x.untyped_storage().nbytes() // x.itemsize)
        return made


@pytest.mark.parametrize("causal", (False, True))
def test_a_ring_holds_pieces_of_two_ranks(causal: bool) -> None:
    """Beside what a rank has of the queries: neither scores nor the keys of all."""
    n, ranks = 64, 4
    q, k, *_ = inputs(n, n)
    pieces = tuple((n * i, n) for i in range(ranks))
    of = [(tuple(range(ranks)), Ring(pieces, pieces, causal), me, q, k, k, Seen(n * me, n, n * me, n, causal),
           Scores(0.5)) for me in range(ranks)]
    with Largest() as largest:
        made = run_ranks([attend_ring(*args) for args in of])
        run_ranks([attend_ring_vjp(*args, out, lse, out) for args, (out, lse) in zip(of, made)])
    # what travels for backward is of q, the result, its cotangent and the lse
    assert largest.most <= 4 * q.numel() < ranks * 4 * k.numel()


@pytest.mark.parametrize("window", (None, 1, 3, 6))
@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("t, s, ranks", ((16, 16, 4), (12, 12, 2), (13, 13, 3), (10, 10, 5), (3, 3, 4),
                                         (5, 9, 3), (9, 4, 2), (0, 2, 2)))
def test_each_pair_is_seen_once(t: int, s: int, ranks: int, causal: bool, window: int | None) -> None:
    """At one of the two ranks that have a part of it, at most one thing in a round; nothing travels that is
    not seen, and of what is causal alone all have as much to do."""
    mesh = Mesh(x=ranks)
    queries, keys = (tuple(mesh.extent(n, ("x",), dict(x=i)) for i in range(ranks)) for n in (t, s))
    ring, times, pairs = Ring(queries, keys, causal, window), torch.zeros(t, s), [0] * ranks

    def add(at: int, shown: Seen) -> None:
        seen = shown.block(0, shown.t, 0, shown.s)
        block = torch.ones(shown.t, shown.s) if seen is None else seen[0, 0, 0].float()
        times[shown.offset:shown.offset + shown.t, shown.first:shown.first + shown.s] += block
        pairs[at] += int(block.sum())
    for i in range(ranks):
        add(i, Seen(queries[i][0], queries[i][1], *keys[i], causal, window))
    for works in ring.rounds:
        assert len({w.at for w in works}) == len(works)
        for w in works:
            assert w.at in (w.queries, w.keys) and w.other in (w.queries, w.keys) and w.at != w.other
            shown = ring.shown(w, Seen(0, 0, 0, 0, causal, window))
            add(w.at, shown)
            block = shown.block(0, shown.t, 0, shown.s)
            assert block is None or bool(block.any(3).all()) and bool(block.any(4).all())
    every = Seen(0, t, 0, s, causal, window).block(0, t, 0, s)
    assert torch.equal(times, torch.ones(t, s) if every is None else every[0, 0, 0].float())
    if t == s and t % (2 * ranks) == 0 and window is None:
        assert len({*pairs}) == 1 and len(ring.rounds) == (ranks // 2 if causal else ranks - 1)


def test_between_processes() -> None:
    """By gloo, as the benchmark has it: the ring's gradients are those with gathered keys."""
    done = forked_torchrun(2, [BENCHMARK, "--times", "12,30"])
    assert done.returncode == 0, done.stderr[-3000:]
    found = [float(off) for off in re.findall(r"'off': ([^}]*)}", done.stdout)]
    assert len(found) == 2 and max(found) < 1e-5, done.stdout


@pytest.mark.parametrize("t, s", ((1, 5), (2, 7), (4, 5), (3, 2)))
@pytest.mark.parametrize("ranks", (2, 3, 4))
def test_each_rank_writes_what_falls_to_it(t: int, s: int, ranks: int) -> None:
    """Rows across the borders of pieces, more rows than a piece has slots, empty pieces."""
    @sharded("B S K, B T K, B -> B S K")
    def write(cache, k, start):
        return update_cache("B S K, B T K, B -> B S K", cache, k, start)
    t = min(t, s)
    r = torch.Generator().manual_seed(t)
    cache, rows = torch.randn(s - t + 1, s, 2, generator=r), torch.randn(s - t + 1, t, 2, generator=r)
    start = torch.arange(s - t + 1)
    wanted = simulate(write, Layout(), cache, rows, start, mesh=Mesh(cp=1))
    assert torch.equal(simulate(write, PIECES, cache, rows, start, mesh=Mesh(cp=ranks)), wanted)
    assert "all_" not in str(lower(write, PIECES, mesh=Mesh(cp=ranks)))
