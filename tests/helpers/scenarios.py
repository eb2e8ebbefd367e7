"""What the tests ask of real ranks beside conformance cases. Each runs on every rank and returns plain data.

A test names one: `world.run("places", ["tp"])` is a list of what each rank returned.
"""
from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from conformance import COLLECTIVES, Case, check, draw, fixed_cases, moved_failures
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from shardlib.distributed import GroupCoordinator, Runtime, connect
from shardlib.distributed.communicators.protocol import Call
from shardlib.distributed.communicators.torch_distributed import TorchDistributed
from shardlib.errors import SpecError


@dataclass(frozen=True)
class Plan:
    step: int
    axes: tuple[str, ...]


def places(runtime: Runtime, axes: list[str]) -> dict[str, Any]:
    """Everything a coordinator says of where it stands."""
    group = runtime.group(axes)
    names = ("name", "rank", "ranks", "world_size", "local_rank", "rank_in_group", "first_rank", "last_rank",
             "is_first_rank", "is_last_rank", "next_rank", "prev_rank")
    return {name: getattr(group, name) for name in names}


def shared_groups(runtime: Runtime) -> list[bool]:
    """Whether (dp, tp) and (tp, dp) share process groups, and data and control do not."""
    one, other = runtime.group(("dp", "tp")), runtime.group(("tp", "dp"))
    return [one.device_group is other.device_group, one.cpu_group is other.cpu_group,
            one.device_group is one.cpu_group]


def taken(runtime: Runtime, axes: list[str], communicator: str) -> list[str]:
    """The collectives that the communicator of that name takes."""
    found = next(c for c in runtime.group(axes).communicators if c.name == communicator)
    return [name for name in COLLECTIVES if found.supports(
        Call(name, "sum" if "reduce" in name else None, torch.float32, "cpu", 1024)) is None]


def any_order(runtime: Runtime, order: list[int]) -> list[str]:
    """Failures of the fixed cases on a group in this order of ranks, which need not be that of any mesh."""
    whole = runtime.group(tuple(runtime.mesh.axes))
    data = TorchDistributed(whole.device_group, order, runtime.rank)
    group = GroupCoordinator("any", order, runtime.rank, runtime.local_rank, runtime.device, (data,), data)
    return [f"{case}: {text}" for root in range(len(order)) for case in fixed_cases(("any",), len(order))
            for text in check(replace(case, root=root), group)]


def messages(runtime: Runtime, axes: list[str]) -> list[Any]:
    """Small, large, typed and empty messages, from the last member."""
    group = runtime.group(axes)
    root = group.world_size - 1

    def tell(message: Any, **how: Any) -> Any:
        return group.broadcast_message(message if group.rank_in_group == root else None, root, **how)
    got = tell(Plan(3, ("dp", "tp")), as_type=Plan)
    return [tell({"step": 3, "names": ["a", "b"], "x": [1.5, None, True]}), len(tell("x" * 100_000)),
            # 1 byte beyond the first block, and just in it
            tell("y" * 1013) + tell("z" * 1012) == "y" * 1013 + "z" * 1012,
            isinstance(got, Plan) and got.axes, tell(None), refusal(lambda: tell({"f": int})), tell((1, 2))]


def queued_messages(runtime: Runtime, axes: list[str]) -> list[Any]:
    """Messages from the first member, which has a queue, and from the second, which has none."""
    group, queue = runtime.group(axes), runtime.open_queue(axes)
    of_second = "y" if group.rank_in_group == 1 else "none of the others' messages"
    return [queue is group.queue is runtime.open_queue(axes), group.broadcast_message(("a", 1), 0),
            group.broadcast_message(of_second, 1), group.broadcast_message("x" * 3_000_000, 0),
            refusal(lambda: group.broadcast_message({"f": int}, 0)), queue.declined is None]


def own_groups(runtime: Runtime, products: list[list[str]]) -> list[list[Any]]:
    """What each group's last member tells its group, by message and by tensors, and the sum of ranks there;
    groups take turns."""
    answers: list[list[Any]] = []
    for axes in (*products, *products[::-1]):
        group = runtime.group(axes)
        told = group.rank if group.is_last_rank else None
        x = torch.tensor(runtime.rank)
        answers.append([group.broadcast_message(told, group.world_size - 1),
                        group.broadcast_tensors(None if told is None else {"rank": x},
                                                group.world_size - 1)["rank"].item(),
                        group.all_reduce(x).item(), group.broadcast(x, group.world_size - 1).item()])
    return answers


def tensor_dict(runtime: Runtime, axes: list[str], rows: list[list[Any]], source: int,
                to: int | None) -> list[str]:
    """What is wrong with a dict from one member to another, or to all.

    rows: name, dtype, shape, layout and spec of each tensor.
    """
    group = runtime.group(axes)
    kept = {name: draw(shape, Case("send", tuple(axes), dtype, tuple(shape), layout=layout, special=True),
                       64 * min(group.ranks) + i)
            for i, (name, dtype, shape, layout, _) in enumerate(rows)}
    given = {name: kept[name] if spec is None else (kept[name], spec) for name, *_, spec in rows}
    if to is None:
        got = group.broadcast_tensors(given if group.rank_in_group == source else None, source)
    elif group.rank_in_group == source:
        group.send_tensors(given, to)
        return []
    elif group.rank_in_group != to:
        return []
    else:
        got = group.recv_tensors(source)
    failures = [] if list(got) == list(given) else [f"names {list(got)}, expected {list(given)}"]
    for name, *_, spec in rows:
        x = got[name] if spec is None else got[name][0]
        if spec is not None and got[name][1:] != (spec,):
            failures.append(f"{name!r}: the spec {got[name][1:]}, expected {spec}")
        failures += [f"{name!r}: {text}" for text in moved_failures(kept[name], x)]
    return failures


def tensor_dict_misuse(runtime: Runtime, axes: list[str]) -> list[Any]:
    """With what text dicts that mean nothing are refused, by each member;
    and whether the group is of use afterwards."""
    group, x = runtime.group(axes), torch.ones(2, 3)
    bad: list[Any] = [
        {"x": x, "cache": {"k": x}}, [x], {3: x}, {"x": [x]}, {"x": (x, "B T", "B T")}, {"x": x.to_sparse()},
        {"x": x.to("meta")}, {"x": torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)}, {"x": (x, "B B")},
        {"x": (x, "B T D")}, {"x": (x, "... B T D")}, {"x": (x, 3)},
        {"x": torch.nested.nested_tensor([x, x[:1]], layout=torch.jagged)},
        {"x": (torch.nested.nested_tensor([x, x[:1]]), "B T")}, {"x": FakeTensorMode().from_tensor(x)},
        {"\ud800": x}]

    def attempt(given: Any) -> str:
        if group.rank_in_group == 0:
            return refusal(lambda: group.send_tensors(given, 1))
        return refusal(lambda: group.recv_tensors(0))
    sent = [attempt(given) for given in bad]
    told = [refusal(lambda given=given: group.broadcast_tensors(given if group.rank_in_group == 1 else None,
                                                                1)) for given in bad[:2]]
    rest = [refusal(call)
            for call in (lambda: group.send_tensors({}, 2), lambda: group.recv_tensors(group.rank_in_group),
                         lambda: group.broadcast_tensors({}, -1), lambda: group.send(x, group.rank_in_group))]
    return [sent, told, rest, tensor_dict(runtime, axes, [["x", "float32", [2], "contiguous", None]], 1, 0)]


def tensor_dict_checked(runtime: Runtime, axes: list[str]) -> list[str]:
    """In debug mode, members that broadcast from different roots, and then from one."""
    whole = runtime.group(axes)
    group = GroupCoordinator(whole.name, whole.ranks, whole.rank, whole.local_rank, whole.device,
                             whole.communicators, whole.communicators[-1], watchdog=runtime._watchdog,
                             check=runtime._places[tuple(axes)])
    return [refusal(lambda: group.broadcast_tensors({"x": torch.ones(1)}, group.rank_in_group)),
            list(group.broadcast_tensors({"x": torch.ones(1)}, 1))]


class Within:
    """A group whose collectives are called within a context."""

    def __init__(self, group: GroupCoordinator, context: Any) -> None:
        self.group, self.context = group, context

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.group, name)

        def within(*args: Any, **options: Any) -> Any:
            with self.context():
                return found(*args, **options)
        return within if name in (*COLLECTIVES, "recv") else found


@contextmanager
def defaults(dtype: torch.dtype, device: str) -> Iterator[None]:
    """Tensors that say nothing else are made of this dtype on this device."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


CONTEXTS = {"inference": torch.inference_mode, "no grad": torch.no_grad,
            "autocast": lambda: torch.autocast(
                "cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16),
            "meta": lambda: defaults(torch.float16, "meta"), "plain": nullcontext}


def surroundings(runtime: Runtime, axes: list[str], made: str) -> list[str]:
    """Failures of cases in each context after each other, in a group that is made in one."""

    def mode(place: Any) -> str:
        return f"inference mode {torch.is_inference_mode_enabled()}"
    runtime._factories = (*runtime._factories, mode)
    with CONTEXTS[made]():
        runtime.create_groups([axes])
    group = runtime.group(axes)
    n, found = (group.world_size, [] if group.router.declined["mode"] == "inference mode False"
                else ["the group is made in inference mode"])
    for first, second in permutations(CONTEXTS, 2):
        for name in COLLECTIVES:
            shape = (3 * n if name == "reduce_scatter" else 3, 1 + len(found))
            case = Case(name, tuple(axes), "float32", shape, sizes=(3,) * n, rows=((3,) * n,) * n)
            for context in (first, second):
                try:
                    found += [f"{context} {case}: {text}"
                              for text in check(case, Within(group, CONTEXTS[context]))]
                except Exception as e:
                    found += [f"{context} {case}: {e}"]
    return found


def barrier(runtime: Runtime, axes: list[str]) -> bool:
    """Whether nobody leaves a barrier before the last, who is late, has come."""
    group = runtime.group(axes)
    if group.is_last_rank:
        time.sleep(0.2)
    arrived = time.monotonic()
    group.barrier()
    left = time.monotonic()
    latest = group.all_reduce(torch.tensor(arrived, dtype=torch.float64), "max").item()
    return left >= latest


def misuse(runtime: Runtime, axes: list[str]) -> list[str]:
    """The texts with which calls that mean nothing are refused, before anything is sent."""
    group, x = runtime.group(axes), torch.ones(3, 2)
    return [refusal(call) for call in (
        lambda: group.all_reduce(x, "mean"),
        lambda: group.all_reduce(x.bool()),
        lambda: group.all_gather(x, 0, (3,)),
        lambda: group.all_gather(x, 0, (4, 4)),
        lambda: group.all_gather(x, 2, (3, 3)),
        lambda: group.reduce_scatter(x, 0, (1, 1)),
        lambda: group.all_to_all((x,), ((3, 2), (3, 2))),
        lambda: group.all_to_all((x, x.int()), ((3, 2), (3, 2))),
        lambda: group.broadcast(x, 2),
        lambda: group.all_reduce(x.to("meta")),
        lambda: group.reduce_scatter(x, 0, (4, -1)),
        lambda: group.all_gather(x, 0, (3.0, 3.0)),
        lambda: group.gather(x, 0, 1.0, (3, 3)),
        lambda: group.all_to_all((x, x), ((-3, -2), (3, 2))),
        lambda: group.all_to_all((x, x), ((3, 2.0), (3, 2))),
        lambda: group.all_to_all((x, x), ((5,), (5,))),
        lambda: group.recv((-1,), torch.float32, 1 - group.rank_in_group),
        lambda: group.broadcast(x, 1.0),
        lambda: group.all_reduce(x.to_sparse()),
        lambda: group.broadcast(x.to_sparse_csr(), 0),
        lambda: group.all_reduce(torch.nested.nested_tensor([x, x[:1]], layout=torch.jagged)),
        lambda: group.all_to_all((torch.nested.nested_tensor([x, x[:1]]), x), ((3, 2), (3, 2))),
        lambda: group.all_gather(torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), 0, (3, 3)))]


def numpy_sizes(runtime: Runtime, axes: list[str]) -> list[Any]:
    """What calls give whose sizes are numpy's integers, and then Python's."""
    group, x = runtime.group(axes), torch.arange(4.0) + runtime.rank

    def all_of_them(number: Any) -> list[Any]:
        two = (number(2), number(2))
        return [group.all_gather(x[:2], number(0), two).tolist(),
                group.reduce_scatter(x, number(0), two).tolist(),
                [y.tolist() for y in group.all_to_all(x.split(2), [(two[0],), (two[0],)])],
                group.broadcast(x, number(1)).tolist()]
    return [all_of_them(number) for number in (np.int64, int, np.int32)]


MOVES = {"all_reduce": lambda g, x: g.all_reduce(x), "all_reduce max": lambda g, x: g.all_reduce(x, "max"),
         "large all_reduce": lambda g, x: g.all_reduce(x.repeat(30_000))[:4],
         "broadcast": lambda g, x: g.broadcast(x, 0),
         "all_gather": lambda g, x: g.all_gather(x.view(2, 2), 1, (2, 2)),
         "reduce_scatter": lambda g, x: g.reduce_scatter(x.view(2, 2), 1, (1, 1)),
         "all_to_all": lambda g, x: g.all_to_all([x, x * 2], [x.shape, x.shape])[0],
         "gather": lambda g, x: g.gather(x, 0, 0, (4, 4)),
         "send": lambda g, x: g.send(x, 1) if g.is_first_rank else g.recv(x.shape, x.dtype, 0),
         "tensors": lambda g, x: g.broadcast_tensors({"x": x, "y": (x, "D")} if g.is_first_rank else None,
                                                     0)["x"],
         "message": lambda g, x: torch.tensor(float(g.broadcast_message(3, 0))),
         "barrier": lambda g, x: g.barrier()}
"""Calls on a group of two, of a tensor of four elements."""


def transformed(runtime: Runtime, axes: list[str]) -> list[str]:
    """What is wrong with calls within torch.func and forward-mode AD: values are those of a plain call,
    nothing flows through, and the group lives on."""
    runtime.create_groups([axes])
    group, x, found = runtime.group(axes), torch.arange(1.0, 5) + runtime.rank, []

    def other(y: Any) -> Any:
        return torch.ones(()) if y is None else y

    def sure(name: str, got: Any, want: Any) -> None:
        if not torch.equal(got, want):
            found.append(f"{name}: {got.tolist()}, expected {want.tolist()}")

    def tangent(call: Any) -> Any:
        with forward_ad.dual_level():
            y = call(group, forward_ad.make_dual(x, x * 10))
            return None if y is None else forward_ad.unpack_dual(y).tangent
    for turn in range(2):
        for name, call in MOVES.items():
            if turn:  # first of all within the transforms: they make what later calls find
                want = other(call(group, x))
            else:
                torch.func.grad(lambda x: (other(call(group, x)) * x.sum()).sum())(x)
                want = other(call(group, x))
            sure(f"grad, {name}", torch.func.grad(lambda x: (other(call(group, x)) * x.sum()).sum())(x),
                 want.sum().expand(4))
            sure(f"grad of another, {name}",
                 torch.func.grad(lambda v: (other(call(group, x)) * v).sum())(torch.ones(())), want.sum())
            sure(f"jvp, {name}", torch.func.jvp(lambda x: other(call(group, x)) * x.sum(), (x,),
                                                (torch.ones(4),))[1], want * 4)
            sure(f"jacfwd, {name}", torch.func.jacfwd(lambda x: other(call(group, x)) * x.sum())(x),
                 want.unsqueeze(-1).expand(*want.shape, 4))
            sure(f"vmap of others, {name}", torch.vmap(lambda v: v * other(call(group, x)))(torch.ones(3)),
                 want.expand(3, *want.shape))
            found += [f"{name}: a tangent"] if tangent(call) is not None else []
            sure(f"afterwards, {name}", other(call(group, x)), want)
    refused = [refusal(lambda: torch.vmap(lambda x: MOVES[name](group, x))(torch.ones(3, 4)))
               for name in ("all_reduce", "all_gather", "all_to_all")]
    told = refusal(lambda: torch.vmap(
        lambda x: group.broadcast_tensors({"x": x} if group.is_first_rank else None, 0))(torch.ones(3, 4)))
    traced = refusal(lambda: make_fx(lambda x: group.all_reduce(x) + 1)(x))
    sure("functionalize", torch.func.functionalize(lambda x: group.all_reduce(x.clone().add_(1)) + 1)(x),
         torch.tensor([6.0, 8, 10, 12]))
    sure("after all", group.all_reduce(torch.ones(4)), torch.full((4,), 2.0))
    return [*found, *refused, told, traced]


def compiled(runtime: Runtime, axes: list[str]) -> list[str]:
    """What is wrong with calls from compiled code, of several shapes, static and dynamic;
    and what fullgraph=True says."""
    group, found = runtime.group(axes), []
    for name, call in MOVES.items():
        for dynamic in (None, True, False):
            torch.compiler.reset()
            step = torch.compile(lambda x: (x * 2, call(group, x + 1), x - 1), backend="eager",
                                 dynamic=dynamic)
            for shift in range(3):
                x = torch.arange(4.0) + shift + runtime.rank
                (before, got, after), want = step(x), call(group, x + 1)
                good = got is None if want is None else torch.equal(got, want)
                found += ([] if good and torch.equal(before, x * 2) and torch.equal(after, x - 1)
                          else [f"{name}: {got}, expected {want}"])
    for dynamic in (None, True):
        torch.compiler.reset()
        steps = [torch.compile(call, backend="eager", dynamic=dynamic) for call in (
            lambda x: group.all_reduce(x * 2) + 1, lambda x: group.all_gather(x * 2, 0, (x.shape[0],) * 2)
            + 1, lambda x: group.reduce_scatter(x * 2, 0, (x.shape[0] - 1, 1)) + 1,
            lambda x: group.all_to_all([x, x], [x.shape, x.shape])[0] + 1)]
        for n in (4, 7, 9, 20_000, 3):
            got = [step(torch.full((n,), 1.0)) for step in steps]
            want = [torch.full((n,), 5.0), torch.full((2 * n,), 3.0),
                    torch.full(((n - 1, 1)[group.rank_in_group],), 5.0), torch.full((n,), 2.0)]
            found += [f"{n} elements, dynamic {dynamic}: result {i}"
                      for i, (g, w) in enumerate(zip(got, want)) if not torch.equal(g, w)]
    try:
        torch.compile(lambda x: group.all_reduce(x), backend="eager", fullgraph=True)(torch.ones(4))
    except Exception as error:
        found.append("a collective is not traced" if "reason: a collective is not traced" in str(error)
                     else str(error))
    return found


def faked(runtime: Runtime, axes: list[str]) -> list[str]:
    """What fake tensors are told, and that neither they nor the mode leave anything behind."""
    runtime.create_groups([axes])
    group, mode, texts = runtime.group(axes), FakeTensorMode(), []
    with mode:
        fake = torch.ones(4)

    def inside(call: Any) -> Any:
        with mode:
            return call()
    for around in (lambda call: call(), inside):
        texts += [refusal(lambda: around(lambda: MOVES[name](group, fake)))
                  for name in ("all_reduce", "all_gather", "broadcast", "all_to_all")]
        given = {"x": fake} if group.is_first_rank else None
        texts.append(refusal(lambda: around(lambda: group.broadcast_tensors(given, 0))))
    for name in ("all_reduce", "all_reduce max", "broadcast", "gather", "send", "tensors", "barrier"):
        call, x = MOVES[name], torch.arange(4.0) + runtime.rank
        got, want = inside(lambda: call(group, x)), call(group, x)
        if not (got is None if want is None else type(got) is torch.Tensor and torch.equal(got, want)):
            texts.append(f"{name} in the mode: {got}, expected {want}")
    return texts


UNCOPIED = ("float4_e2m1fn_x2", *(f"{u}int{n}" for u in ("", "u") for n in range(1, 8)))


def uncopied_dtypes(runtime: Runtime, axes: list[str]) -> list[str]:
    """What is wrong with moves of dtypes that torch does not copy:
    their bytes must come as those of uint8 do."""
    group, found = runtime.group(axes), []
    me, n = group.rank_in_group, group.world_size
    calls = {
        "all_gather 0": lambda x: group.all_gather(x, 0, (4,) * n),
        "all_gather 1": lambda x: group.all_gather(x, 1, (4,) * n),
        "all_gather of uneven ones": lambda x: group.all_gather(x[:, me:], -1,
                                                                tuple(4 - m for m in range(n))),
        "all_gather of a transposed one": lambda x: group.all_gather(x.t(), 1, (4,) * n),
        "gather": lambda x: group.gather(x, 0, 1, (4,) * n), "broadcast": lambda x: group.broadcast(x, 0),
        "broadcast of one": lambda x: group.broadcast(x[1:2, 1:2], 0),
        "all_to_all": lambda x: torch.stack(
            [y.view(torch.uint8) for y in group.all_to_all([x.t()] * n, [(4, 4)] * n)]),
        "tensors": lambda x: group.broadcast_tensors({"x": x.t()} if me == 0 else None, 0)["x"],
        "send": lambda x: None if n == 1 else group.send(x.t(), 1) if me == 0
        else group.recv((4, 4), x.dtype, 0) if me == 1 else None}
    for dtype in UNCOPIED:
        for name, call in calls.items():
            x = torch.arange(16, dtype=torch.uint8).view(4, 4) + 16 * me
            got, want = call(x.view(getattr(torch, dtype))), call(x)
            if not (got is None if want is None else torch.equal(got.view(torch.uint8), want)
                    and str(got.dtype) in (f"torch.{dtype}", "torch.uint8")):
                found.append(f"{name} of {dtype}: {got}, expected {want}")
    return [*found, refusal(lambda: group.all_reduce(torch.ones(2, dtype=torch.uint8).view(torch.uint1)))]


def life(runtime: Runtime) -> list[str]:
    """Refusals in the life of a runtime: a group not made, an unknown axis, a group destroyed."""
    runtime.create_groups([("dp",)])
    group = runtime.group(("dp",))
    texts = [refusal(lambda: runtime.group(("dp", "pp"))), refusal(lambda: runtime.group(("xp",))),
             refusal(lambda: runtime.group(("dp", "dp")))]
    group.destroy()
    return [*texts, refusal(lambda: group.all_reduce(torch.ones(1))), refusal(group.barrier)]


def forked(runtime: Runtime, axes: list[str]) -> list[Any]:
    """A child that calls, closes the queue and the runtime, and ends; what is left of them here."""
    group, queue = runtime.group(axes), runtime.open_queue(axes)
    if (child := os.fork()) == 0:
        found = refusal(lambda: group.all_reduce(torch.ones(1)))
        queue.close()
        runtime.close()
        os._exit(0 if found == f"all_reduce over {group.name}: the group was destroyed" else 1)
    status = os.waitpid(child, 0)[1]
    return [status, group.all_reduce(torch.ones(1)).item(), group.broadcast_message("still there", 0),
            runtime._watchdog._threads[0].is_alive()]


def queue_again(runtime: Runtime, axes: list[str]) -> list[Any]:
    """Messages after a queue was closed, and in the next one; after `destroy` there is none."""
    group = runtime.group(axes)
    with runtime.open_queue(axes):
        got = [group.broadcast_message("first", 0)]
    got += [group.broadcast_message("without", 0), runtime.open_queue(axes).closed,
            group.broadcast_message("again", 0)]
    group.destroy()
    return [*got, refusal(lambda: runtime.open_queue(axes)), refusal(lambda: group.broadcast_message("x", 0))]


def two_runtimes(runtime: Runtime, axes: list[str]) -> list[Any]:
    """Another runtime of this process, which goes on when the first is closed;
    the last one ends torch.distributed."""
    other = connect(runtime.mesh, "cpu")
    other.create_groups([axes])
    runtime.close()
    got = [other.group(axes).all_reduce(torch.ones(1)).item(), dist.is_initialized()]
    other.close()
    return [*got, dist.is_initialized()]


def groups_in_turn(runtime: Runtime, orders: list[list[list[str]]]) -> list[float]:
    """This rank's sum of ranks over each group, made one after another in an order of its own."""
    sums = []
    for axes in orders[runtime.rank]:
        runtime.create_groups([axes])
        sums.append(runtime.group(axes).all_reduce(torch.tensor([float(runtime.rank)])).item())
    return sums


def groups_again(runtime: Runtime, orders: list[list[list[str]]]) -> list[Any]:
    """The same in runtimes that come and go: beside this one, and where torch.distributed ends with each."""
    sums = [groups_in_turn(runtime, orders)]
    for again in range(4):
        if again == 2:
            runtime.close()
        with connect(runtime.mesh, "cpu", 20.0) as other:
            sums.append(groups_in_turn(other, orders))
    return [*sums, dist.is_initialized(), "TORCH_GLOO_LAZY_INIT" in os.environ]


def hang(runtime: Runtime) -> None:
    """Never answers in time."""
    time.sleep(3600)


def refusal(call: Any) -> str:
    try:
        call()
    except SpecError as error:
        return str(error)
    return "not refused"


def explained(runtime: Runtime) -> list[Any]:
    """Who takes the collectives of a program, by a table that knows some of them."""
    from shardlib import Layout, einsum, lower, sharded
    from shardlib.distributed.routing import Curve, Table
    from shardlib.reports.explain import explain

    @sharded("T D, D F, F E -> T E")
    def mlp(x: Any, up: Any, down: Any) -> Any:
        return einsum("T F, F E -> T E", einsum("T D, D F -> T F", x, up), down)
    group = runtime.group(("tp",))
    group.router.use(table := Table("a machine", {"date": "2026-01-01"}, (
        Curve("all_reduce", 2, "float32", False, "shared memory", ((1, 7.0),)),)))
    runtime.table = table
    found = explain(lower(mlp, Layout(F="tp"), mesh=runtime.mesh), runtime.mesh, dict(T=2, D=3, F=4, E=5),
                    runtime=runtime)
    return [[(t.op, t.communicator, t.predicted_us, t.choice) for t in found.traffic], found.cost_source]


def calibrated(runtime: Runtime) -> dict[str, Any]:
    """What calibrate measures of two sizes, without its µs; and whether the table routes by them."""
    from shardlib.distributed.calibrate import calibrate
    table = calibrate(runtime, (2048, 8192))
    group = runtime.group(tuple(runtime.mesh.axes))
    group.router.use(table)
    call = Call("all_gather", None, torch.float32, "cpu", 8192)
    choice = group.router.choice(call)
    fastest = min((c for c in table.curves if (c.name, c.size) == ("all_gather", group.world_size)),
                  key=lambda c: c.us(8192))
    return {"curves": sorted((c.name, c.size, c.dtype, c.capturing, c.communicator, [n for n, _ in c.points])
                             for c in table.curves),
            "positive": all(us > 0 for c in table.curves for _, us in c.points),
            "fastest": choice.communicator == fastest.communicator,
            "predicted": choice.us == fastest.us(8192),
            "same": group.broadcast_message(table.curves[0].points[0][1], 0) == table.curves[0].points[0][1]}


def passed_on(runtime: Runtime, axes: list[str]) -> list[Any]:
    """Messages that go round the ring, each member's to the next:
    small, large, typed, and one that cannot be written."""
    group = runtime.group(axes)
    me, n = group.rank_in_group, group.world_size

    def turn(message: Any, **how: Any) -> Any:
        """Even members send first; with an odd number of members the last hears from the one
        before it before it speaks."""
        if me % 2 == 0 and me != n - 1 or n == 1:
            group.send_message(message, (me + 1) % n)
            return group.recv_message((me - 1) % n, **how)
        got = group.recv_message((me - 1) % n, **how)
        group.send_message(message, (me + 1) % n)
        return got
    plan = turn(Plan(me, ("dp",)), as_type=Plan)
    wrong = (refusal(lambda: group.send_message({"f": int}, 1)) if me == 0
             else refusal(lambda: group.recv_message(0)) if me == 1 else "")
    other = (refusal(lambda: group.recv_message(0, as_type=Plan)) if me == 1
             else group.send_message([1], 1) if me == 0 else None)
    return [turn({"from": me}), len(turn("x" * 50_000)), plan.step, wrong, other,
            refusal(lambda: group.send_message(1, me)), refusal(lambda: group.recv_message(n))]
