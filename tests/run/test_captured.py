"""Captured steps: what they return and keep on the CPU, where a replay is the call itself;
and what CUDA is told, on a stand-in for it."""
from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_cuda import Cuda
from torch import Tensor

from shardlib import (
    Layout,
    Mesh,
    Params,
    SpecError,
    compile,
    cond,
    einsum,
    param,
    scan,
    sharded,
    value_and_grad,
)
from shardlib.distributed.graph_capture import _CHAINED, new_graph
from shardlib.distributed.runtime import connect
from shardlib.distributed.watch import Moment, Watch
from shardlib.functions import silu, sum
from shardlib.models.causal import Cache
from shardlib.models.decoding import weights_of
from shardlib.models.llama import LlamaConfig, next_token
from shardlib.ops import update_cache
from shardlib.params import init
from shardlib.run.captured import Graph


class Weights(Params):
    up: Tensor = param("D F")


class Rows(Params):
    x: Tensor = param("B S H", initial="zeros")


@sharded("B D, * -> B F, B F")
def layer(x, w: Weights):
    y = einsum("B D, D F -> B F", x, w.up)
    return silu(y), y


@sharded("B S H, B T H, B -> B S H")
def write(cache, rows, start):
    return update_cache("B S H, B T H, B -> B S H", cache, rows, start)


@sharded("*, B T H, B -> *, B T H")
def write_tree(cache: Rows, rows, start):
    return Rows(x=update_cache("B S H, B T H, B -> B S H", cache.x, rows, start)), rows


def test_a_replay_gives_what_an_eager_call_gives() -> None:
    eager, step = compile(layer), compile(layer, graph=True)
    weights = [Weights(up=torch.randn(3, 4)) for _ in range(2)]
    kept = []
    for rows in (2, 1, 2, 0, 2):                # other shapes and weights, and back: eager calls between
        for w in weights:
            x = torch.randn(rows, 3)
            kept.append((step(x, w), eager(x, w)))
            x.zero_()                           # what was passed is the caller's again
    for made, wanted in kept:                   # results are the caller's, whatever was called since
        assert all(torch.equal(a, b) for a, b in zip(made, wanted))
        made[0].fill_(7)
    x = torch.randn(2, 3)
    assert all(torch.equal(a, b) for a, b in zip(step(x, weights[0]), eager(x, weights[0])))
    weights[0].up.mul_(2)                       # weights are read where they lie
    assert all(torch.equal(a, b) for a, b in zip(step(x, weights[0]), eager(x, weights[0])))
    assert len(step._captures._steps) == 6


def test_it_runs_once_for_each_call() -> None:
    """What is updated in place is updated once by the first call too, which also records."""
    rows, start = torch.ones(2, 1, 3), torch.tensor([0, 1])
    step = compile(write_tree, donate=("cache",), graph=True)
    cache = Rows(x=torch.zeros(2, 4, 3))
    for i in range(4):
        at = torch.tensor([i, 3 - i])
        made, same = step(cache, rows * (i + 1), at)
        assert (made.x is cache.x and torch.equal(same, rows * (i + 1))
                and same.data_ptr() not in [v.data_ptr() for v in step._captures._steps.popitem()[1].values])
        step._captures._steps.clear()
    assert (torch.equal(cache.x[0, :, 0], torch.tensor([1.0, 2, 3, 4]))
            and torch.equal(cache.x[1, :, 0], torch.tensor([4.0, 3, 2, 1])))
    plain, given = compile(write, graph=True), torch.zeros(2, 4, 3)
    first = plain(given, rows, start)
    assert torch.equal(plain(given, rows, start), first) and not given.any() and first.sum() == 6


def test_modes_of_autograd() -> None:
    """Results are ordinary tensors, in whatever mode the graph was recorded;
    arguments that want gradients are refused."""
    step, w, x = compile(layer, graph=True), Weights(up=torch.randn(3, 4)), torch.randn(2, 3)
    with torch.inference_mode():
        step(x, w)
    made = step(x, w)[0]
    assert not made.is_inference() and not made.requires_grad
    (made * torch.ones((), requires_grad=True)).sum().backward()
    wanting = Weights(up=w.up.clone().requires_grad_())
    with torch.no_grad():
        step(x, wanting)
    with pytest.raises(SpecError) as refused:
        step(x, wanting)
    assert str(refused.value) == ("layer: an argument wants a gradient, and a replay makes none; compile "
                                  "value_and_grad of it, or call it in torch.no_grad()")


@sharded("B D, * -> ()")
def total(x, w: Weights):
    return sum("B F -> ()", silu(einsum("B D, D F -> B F", x, w.up)))


def test_gradients_are_captured_as_any_program() -> None:
    x, w = torch.randn(2, 3), Weights(up=torch.randn(3, 4))
    step, eager = compile(value_and_grad(total), graph=True), compile(value_and_grad(total))
    for _ in range(2):
        assert torch.equal(step(x, w)[1].up, eager(x, w)[1].up)


@sharded("B -> B")
def double(x):
    return x + x


@sharded("B, () -> B")
def added(x, y):
    return x + y


@sharded("B, L, () -> B")
def branching(x, steps, go):
    """A body that has no branch stands before the one that has."""
    return cond(go, double, double, scan(added, x, steps))


def test_a_branch_on_data_cannot_be_captured() -> None:
    x = torch.ones(3)
    with pytest.raises(SpecError) as refused:
        compile(branching, graph=True)(x, torch.ones(2), torch.tensor(True))
    first, _, where = str(refused.value).partition("          ")
    assert first == ('cond: a graph is recorded once and cannot branch on data; compile branching with '
                     'graph="auto", which runs it eagerly')
    assert where.startswith("test_captured.py:")
    step = compile(branching, graph="auto")
    found = step(x, torch.ones(2), torch.tensor(True))
    assert found.tolist() == [6.0] * 3 and step._captures is None
    with pytest.raises(SpecError) as refused:
        compile(double, graph="always")
    assert str(refused.value) == "compile: graph is 'always'; it is True, False or \"auto\""


# -- everything a step needs is on its device ----------------------------------------------------------------

class Elsewhere:
    """One rank on a device where nothing is but what a step is given:
    what it makes on the CPU cannot be used there."""
    mesh, rank, coordinate, device = Mesh(), 0, {}, torch.device("meta")

    def create_groups(self, products: Any) -> None: ...
    def compare_plans(self, title: str, plan: str) -> None: ...


def test_a_step_makes_nothing_on_the_host() -> None:
    config = LlamaConfig(vocab_size=11, d_model=12, num_layers=2, num_kv_heads=3, queries_per_kv=2,
                         head_dim=4, d_ff=5, norm_eps=1e-5, rope_theta=1e4, rope_scaling=None, tied=True,
                         max_context=16)
    sizes = dict(config.sizes, B=2, S=8)
    with torch.device("meta"):
        weights, cache = (init(weights_of(config), sizes, device="meta"),
                          init(Cache, sizes, path="cache", device="meta"))
        for t in (1, 3):
            args = (torch.zeros(2, t, dtype=torch.int64), weights, cache, torch.zeros(2, dtype=torch.int64),
                    torch.zeros(2, dtype=torch.int64))
            assert compile(next_token, runtime=Elsewhere(), sizes=sizes, donate=("cache",),
                           config=config)(*args)[0].is_meta


# -- what CUDA is told ---------------------------------------------------------------------------------------

class Rank:
    """A rank on a GPU that is not there, with a watch."""
    device = torch.device("cuda", 0)

    def __init__(self) -> None:
        self.watch, self.compared = Watch(), []

    def compare_plans(self, title: str, plan: str) -> None:
        self.compared.append((title, plan))

    def replays(self, title: str, graph: Any) -> Any:
        seat = self.watch.replays(title, (0, 1))
        return lambda passed: self.watch.launch(seat, passed)


def test_a_graph_runs_is_recorded_and_is_watched(cuda: Cuda) -> None:
    rank = Rank()
    def call() -> None:
        assert _CHAINED.get()                               # its kernels may start early, here alone
        cuda.log.append(f"call on {cuda.now.name}")
    graph = Graph("next_token, 8 rows", call, rank)
    assert rank.compared == [("the graph of next_token, 8 rows", "next_token, 8 rows")]
    assert not _CHAINED.get()
    side = "side 1 of cuda:0"
    assert cuda.log == [f"{side} waits for main", f"call on {side}",
                        f"capture on {side} in pool 1, thread_local", f"call on {side}", "captured",
                        f"main waits for {side}"] and rank.watch.now is None
    for _ in range(3):
        graph.replay()
    assert cuda.log[6:] == ["replay on main"] * 3
    for number, event in enumerate(cuda.events, 1):         # the oldest that the device has not come past
        assert str(Moment.of(rank.watch.now)) == f"replay {number} of next_token, 8 rows (ranks 0 1)"
        event.done = True
    assert rank.watch.now is None
    graph.replay()
    assert (Moment.of(rank.watch.last).number == 3 and Moment.of(rank.watch.now).number == 4
            and len(rank.watch.launched) == 1)


def test_a_replay_that_is_being_launched_has_not_ended(cuda: Cuda) -> None:
    """A launch may wait for room: until there is an event, none has passed."""
    rank = Rank()
    graph = Graph("f", lambda: None, rank)
    seen: list[Any] = []
    graph._graph = SimpleNamespace(replay=lambda: seen.append(Moment.of(rank.watch.now)))
    graph.replay()
    assert [m.number for m in seen] == [1]


def test_graphs_share_a_pool_as_long_as_one_lives(cuda: Cuda) -> None:
    device = torch.device("cuda", 0)
    (one, first), (two, second) = new_graph(device), new_graph(device)
    assert first == second == (1, 0)
    del one, two
    three, third = new_graph(device)
    assert third == (2, 0) and new_graph(torch.device("cuda", 1))[1] == (3, 0)


def test_what_cannot_be_captured(cuda: Cuda) -> None:
    calls: list[int] = []

    def call() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
    with pytest.raises(SpecError) as refused:
        Graph("f of 3", call, Rank())
    assert str(refused.value) == ("f of 3 cannot be captured: operation not permitted when stream is "
                                  "capturing; compile it without graph=True")


def test_a_graph_ends_with_its_runtime(cuda: Cuda) -> None:
    """Before the groups do: NCCL waits for graphs that hold its calls.

    One that nobody holds is gone already.
    """
    with connect(Mesh(), "cpu") as runtime:
        runtime.device = torch.device("cuda", 0)
        graph, _ = Graph("f", lambda: None, runtime), Graph("g", lambda: None, runtime)
        del _
        runtime.device = torch.device("cpu")
        assert "reset" not in cuda.log
    assert cuda.log.count("reset") == 1
    with pytest.raises(SpecError) as refused:
        graph.replay()
    assert str(refused.value) == "f: the runtime is closed; connect again"


def test_one_rank_of_the_runtime() -> None:
    with connect(Mesh(), "cpu") as runtime:
        assert compile(double, Layout(), runtime=runtime, graph=True)(torch.ones(2)).tolist() == [2, 2]


class Matrix(Params):
    w: Tensor = param("D F")


@sharded("B D, * -> B F")
def product(x, w: Matrix):
    return einsum("B D, D F -> B F", x, w.w)


def test_a_pytree_that_lies_otherwise_is_another_graph() -> None:
    """A transpose begins where its matrix does."""
    step, w = compile(product, graph=True), torch.arange(4.0).view(2, 2)
    for _ in range(2):
        assert (torch.equal(step(torch.eye(2), Matrix(w=w)), w)
                and torch.equal(step(torch.eye(2), Matrix(w=w.T)), w.T))


def test_pytrees_that_change_with_every_call_are_refused_in_time() -> None:
    step = compile(product, graph=True)
    kept = [Matrix(w=torch.ones(2, 2)) for _ in range(17)]
    for w in kept[:16] * 2:
        step(torch.eye(2), w)
    with pytest.raises(SpecError) as refused:
        step(torch.eye(2), kept[16])
    assert str(refused.value).split("          ")[0] == (
        "product: 16 graphs of one shape, each of other pytrees, which a graph reads where they lie; donate "
        "those that it returns, "
        "or compile it without graph=True")
