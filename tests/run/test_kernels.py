"""Kernels of fused steps: a communicator that has one is called in place of the body, where it should be.

Two ranks run in threads of this process, over a communicator that adds up what they bring.
"""
from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Barrier
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from shardlib import (
    EXPLICIT,
    Layout,
    Mesh,
    Params,
    SpecError,
    all_reduce,
    compile,
    einsum,
    lower,
    param,
    reduce_scatter,
    scan,
    sharded,
    stacked,
)
from shardlib.compiler.fusion import Fusion, Site
from shardlib.compiler.passes import DEFAULT, Pass
from shardlib.compiler.passes.fuse import fuse
from shardlib.distributed.communicators.alone import Alone
from shardlib.distributed.group_coordinator import GroupCoordinator
from shardlib.distributed.watch import Moment, Watch
from shardlib.functions import silu
from shardlib.ops import rms_norm
from shardlib.ops.fusions import FUSIONS, by_communicator
from shardlib.params import fill, leaf_values
from shardlib.placement import shard_of
from shardlib.run.compiled import Compiled
from shardlib.run.kernels import Kernels

B, D, F, V, L = 3, 4, 6, 5, 2
MESH, LAYOUT = Mesh(tp=2), Layout(F="tp", V="tp")


class Board:
    """Where two members meet: each brings a tensor, and sees both."""

    def __init__(self) -> None:
        self.barrier, self.brought = Barrier(2, timeout=60), [torch.empty(0)] * 2

    def meet(self, member: int, x: Tensor) -> list[Tensor]:
        self.brought[member] = x
        self.barrier.wait()
        both = list(self.brought)
        self.barrier.wait()
        return both


class Honest(Alone):
    """The communicator of one of two members. calls: what it was asked to do, and where in the program."""
    name, deterministic = "honest", True

    def __init__(self, board: Board, me: int) -> None:
        self.board, self.me = board, me
        self.calls: list[tuple[str, str]] = []
        self.watch: Watch | None = None

    def note(self, name: str) -> None:
        moment = Moment.of(self.watch.mine) if self.watch else None
        assert moment is None or moment.call == f"{name} sum of 12 float32"
        self.calls.append((name, moment.step.partition(",")[0] if moment else ""))

    def all_reduce(self, x: Tensor, op: str) -> Tensor:
        self.note("all_reduce")
        first, second = self.board.meet(self.me, x)
        return first + second


class Adds(Honest):
    """One that does not promise an order."""
    name, deterministic = "adds", False


class Fuses(Adds):
    """One that also takes a norm with the sum; of rows that are not `refused`. off: what its residuals are
    wrong by, so that a test sees who made them."""

    def __init__(self, board: Board, me: int, refused: int = 0, off: float = 0.0) -> None:
        super().__init__(board, me)
        self.refused, self.off = refused, off

    def fused(self, name: str, operands: Sequence[Tensor], static: Mapping[str, float]) -> Callable | str:
        assert all(x.is_meta for x in operands)
        if name != "all_reduce_add_rms_norm":
            return f"no {name}"
        if operands[0].shape[0] == self.refused:
            return f"no {self.refused} rows"

        def kernel(y: Tensor, residual: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
            self.note(name)
            assert [x.shape for x in (y, residual, w)] == [x.shape for x in operands]
            first, second = self.board.meet(self.me, y)
            x = residual + (first + second)
            return x + self.off, torch.nn.functional.rms_norm(x, w.shape, w, static["eps"])
        return kernel


class Thread:
    """What `Compiled` asks of a runtime, for one of two ranks."""
    mesh, device, end_others = MESH, torch.device("cpu"), None

    def __init__(self, rank: int, plans: list[str], communicator: Adds, deterministic: bool) -> None:
        self.rank, self.coordinate, self.plans, self.made = rank, MESH.coordinate(rank), plans, []
        communicator.watch = Watch()
        self.coordinator = GroupCoordinator(
            "tp", (0, 1), rank, rank, self.device, (communicator, Honest(communicator.board, rank)), Alone(),
            watchdog=SimpleNamespace(watch=communicator.watch), deterministic=deterministic)

    def compare_plans(self, title: str, plan: str) -> None:
        self.plans.append(plan)

    def create_groups(self, products: Sequence[Sequence[str]]) -> None:
        self.made += products

    def group(self, axes: Sequence[str]) -> GroupCoordinator:
        assert tuple(axes) == ("tp",) and ("tp",) in self.made
        return self.coordinator


class Layer(Params):
    norm: Tensor = param("D")
    gate: Tensor = param("D F")
    up: Tensor = param("D F")
    down: Tensor = param("F D")


class Net(Params):
    embed: Tensor = param("V D")
    layers: Layer = stacked("L", Layer)
    norm: Tensor = param("D")


@sharded("B D, * -> B D")
def layer(x, w: Layer):
    h = rms_norm(x, w.norm, 1e-5)
    a = silu(einsum("B D, D F -> B F", h, w.gate)) * einsum("B D, D F -> B F", h, w.up)
    return x + einsum("B F, F D -> B D", a, w.down)


@sharded("B V, * -> B D")
def net(x, w: Net):
    return rms_norm(scan(layer, einsum("B V, V D -> B D", x, w.embed), w.layers), w.norm, 0.25)


def weights() -> Net:
    torch.manual_seed(0)
    r = torch.randn
    layers = Layer(norm=r(L, D), gate=r(L, D, F), up=r(L, D, F), down=r(L, F, D))
    return Net(embed=r(V, D), layers=layers, norm=r(D))


PLAIN = (*DEFAULT, "rotate_scan")
FUSING = (*PLAIN, *fuse(FUSIONS))
FUSED = "all_reduce_add_rms_norm"
ROUNDS = ["step 1 of layer", "step 1 of layer", "step 2 of net"]


class Ran:
    """`net` on two ranks: what rank 0 gave, what its communicator was asked, code, answers and plan."""

    def __init__(self, passes: Sequence[Any], make: Callable[[Board, int], Adds] = Fuses,
                 deterministic: bool = False, graph: bool = False) -> None:
        board, w, plans = Board(), weights(), []
        x = torch.randn(B, V)
        made = [make(board, rank) for rank in range(2)]
        steps = [Compiled(net, LAYOUT, Thread(rank, plans, made[rank], deterministic), dict(V=V, F=F), (), {},
                          graph, passes) for rank in range(2)]

        def run(rank: int) -> Tensor:
            program, at = steps[rank].lower(x, w), MESH.coordinate(rank)
            kinds, whole = dict(program.arg_leaves()), dict(leaf_values(w, "w"))
            return steps[rank](shard_of(x, kinds["x"], MESH, at),
                               fill(w, "w", lambda path: shard_of(whole[path], kinds[path], MESH, at)))
        with ThreadPoolExecutor(2) as threads:
            given = list(threads.map(run, range(2)))
        assert torch.equal(*given) and made[0].calls == made[1].calls
        assert {*Counter(plans).values()} == {2}
        self.given, self.calls, self.plan = given[0], made[0].calls, plans[0]
        (self.code,) = steps[0].sources.values()
        self.answers = [line.partition(" at ")[0] + ": " + line.rpartition(": ")[2]
                        for line in steps[0].kernels.answers]


def test_a_communicator_that_has_the_kernel_runs_it_in_every_round() -> None:
    plain, made = Ran(PLAIN), Ran(FUSING)
    assert plain.calls == [("all_reduce", at) for at in ROUNDS]
    assert made.calls == [(FUSED, at) for at in ROUNDS]
    assert torch.equal(plain.given, made.given)
    assert made.answers == [f"{FUSED}: by a kernel", "gate_up: no kernel gates on cpu",
                            f"{FUSED}: by a kernel"]
    assert [line.strip() for line in made.code.splitlines() if " k" in line] == [
        "v9, v10 = k0(v4, v3, v5, at=s1)", "v1, v2 = k1(v4, v3, a6, at=s2)"]


def test_a_captured_step_calls_it() -> None:
    """On the CPU a replay is the call; on GPUs what the call launches is recorded."""
    assert torch.equal(Ran(FUSING, graph=True).given, Ran(PLAIN).given)
    assert Ran(FUSING, graph=True).calls == [(FUSED, at) for at in ROUNDS]


def test_a_kernel_that_is_wrong_is_seen() -> None:
    """So it is the kernel that runs, and its results that are used."""
    assert not torch.equal(Ran(FUSING).given, Ran(FUSING, partial(Fuses, off=1.0)).given)


@pytest.mark.parametrize("make, reason", [
    (Adds, "no communicator has one"), (partial(Fuses, refused=B), f"no {B} rows")])
def test_where_none_has_it_the_body_runs(make: Any, reason: str) -> None:
    plain, made = Ran(PLAIN), Ran(FUSING, make)
    assert " k0(" not in made.code and made.calls == plain.calls and torch.equal(made.given, plain.given)
    assert [a for a in made.answers if FUSED in a] == [f"{FUSED}: {reason}"] * 2


def test_what_no_kernel_takes_whole_smaller_ones_take_in_part() -> None:
    """A sum by the group's own all_reduce, then the addition and the norm in the kernel that the table has
    behind it for these."""
    def norm(y: Tensor, residual: Tensor, w: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return residual + y, torch.nn.functional.rms_norm(residual + y, w.shape, w, eps)

    def asked(site: Site) -> Any:
        assert not site.communicators and site.ranks == 1
        return lambda *operands: norm(*operands, site.static["eps"])
    table = [Fusion(f.function, kernel=asked if f.name == "add_rms_norm" else f.kernel) for f in FUSIONS]
    plain, made = Ran(PLAIN), Ran((*PLAIN, *fuse(table)), partial(Fuses, refused=B))
    assert made.calls == plain.calls and torch.equal(made.given, plain.given)
    assert [a for a in made.answers if "norm" in a] == [f"{FUSED}: no {B} rows",
                                                        "add_rms_norm: by a kernel"] * 2


def test_where_sums_are_to_be_in_rank_order_those_that_promise_it_are_asked() -> None:
    made = Ran(FUSING, deterministic=True)
    assert made.calls == [] and torch.equal(made.given, Ran(PLAIN).given)
    assert f"{FUSED}: no communicator has one" in made.answers


def test_the_environment_may_ask_for_bodies_on_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels, plan = Ran(FUSING), "bodies of fused steps\n"
    monkeypatch.setenv("SHARDLIB_REFERENCE", "1")
    made = Ran(FUSING)
    assert made.calls == [("all_reduce", at) for at in ROUNDS] and torch.equal(made.given, kernels.given)
    assert made.plan == kernels.plan + plan and not kernels.plan.endswith(plan)
    assert f"{FUSED}: SHARDLIB_REFERENCE is set" in made.answers
    monkeypatch.setenv("SHARDLIB_REFERENCE", "0")
    assert Ran(FUSING).calls == kernels.calls


@sharded("T D +x, T D, D -> T D, T D", layout=EXPLICIT)
def other(y, residual, w, *, eps):
    x = residual - all_reduce("T D +x -> T D", y)
    return x, rms_norm(x, w, eps)


other.__name__ = FUSED


def test_a_body_that_means_something_else_runs() -> None:
    made = Ran((*PLAIN, *fuse(FUSIONS), Pass("other", lambda program, mesh: program,
                                            fusions=(Fusion(other, kernel=by_communicator),))))
    assert made.calls == [("all_reduce", at) for at in ROUNDS]
    assert [a for a in made.answers if FUSED in a] == [f"{FUSED}: its body is not what the fusion means"] * 2


def test_a_communicator_is_asked_for_the_function_of_the_table_alone() -> None:
    """It knows functions by name, and would compute another one of that name otherwise."""
    assert by_communicator(Site(other, "cpu", (), {"eps": 0.5})) == (
        f"{FUSED} is another function than that of ops.fusions")


@sharded("F, F -> F", layout=EXPLICIT)
def gated(gate, up):
    return silu(gate) * up


@pytest.mark.parametrize("kernel, said", [
    (lambda gate, up: torch.nn.functional.silu(gate) * up, None),
    (lambda gate, up: (gate * up,), "a tuple"), (lambda gate, up: (gate, up), "a tuple")])
def test_a_kernel_gives_what_the_step_does(kernel: Any, said: str | None) -> None:
    @sharded("B F, B F -> B F")
    def f(gate, up):
        return silu(gate) * up
    fast = compile(f, mesh=Mesh(), passes=(*DEFAULT, *fuse((Fusion(gated, kernel=lambda site: kernel),))))
    gate, up = torch.randn(2, 3), torch.randn(2, 3)
    if said is None:
        assert torch.equal(fast(gate, up), torch.nn.functional.silu(gate) * up)
    else:
        with pytest.raises(SpecError, match=f"gated: its kernel gives {said}, not one tensor"):
            fast(gate, up)


def asked(f: Any, mesh: Mesh, **sizes: int) -> list[str]:
    """What is said of the fused steps of `f`."""
    runtime = SimpleNamespace(mesh=mesh, rank=0, coordinate=mesh.coordinate(0), device=torch.device("cpu"),
                              group=lambda axes: SimpleNamespace(communicators=(), router=SimpleNamespace(
                                  deterministic=False), name="tp"))
    program, kernels = lower(f, mesh=mesh, passes=fuse(FUSIONS)), Kernels(runtime, fuse(FUSIONS), sizes)
    for step in program.steps:
        like = [torch.empty(mesh.local_shape(s, sizes, mesh.coordinate(0)), device="meta") for s in step.ins]
        assert step.op.name == "fused" and kernels(step, like) is None
    return [line.rpartition(": ")[2] for line in kernels.answers]


@sharded("B T D +tp, B T/tp D, D -> B T/tp D, B T/tp D", layout=EXPLICIT)
def scattered(y, r, w):
    x = r + reduce_scatter("B T D +tp -> B T/tp D", y)
    return x, rms_norm(x, w, 0.5)


def test_nobody_is_asked_where_pieces_are_not_even_or_there_is_one() -> None:
    """Members would be asked of other sizes, and might answer otherwise."""
    assert asked(scattered, MESH, B=2, T=4, D=4) == ["no communicator has one"]
    assert asked(scattered, MESH, B=2, T=5, D=4) == ["its pieces are not even"]
    assert asked(scattered, Mesh(tp=1), B=2, T=5, D=4) == ["no kernel norms on cpu"]

