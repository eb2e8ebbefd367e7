"""GroupCoordinator: the collectives of one group of ranks, routed to the communicator that takes each call.

>>> from shardlib.distributed import connect
>>> from shardlib.mesh import Mesh
>>> with connect(Mesh(tp=1), device="cpu") as runtime:
...     tp = runtime.group(("tp",))
...     tp.ranks, tp.all_gather(torch.ones(2, 3), dim=1, sizes=(3,)).shape
((0,), torch.Size([2, 3]))

Every collective is out of place and aliases nothing: the result is new memory at world size 1 too, and the
argument may be reused at once. Any dim, any strides, uneven and empty pieces, every dtype. Members, `root`,
`to` and `source` are counted in the group (`rank_in_group`); `first_rank` and its like are ranks of the mesh.
All members call the same collectives in the same order. No gradient flows through: a backward pass issues its
own. torch.compile, torch.func and fake tensors stay outside (`eager`).

Refused with a `SpecError`, before anything is sent: a reduction its dtype does not have (`reduction`), sizes
that do not fit, a tensor that is not dense in memory (sparse, nested, quantized, fake, batched by vmap), a
device that no communicator takes, any call after `destroy`. In debug mode (`connect(..., check=True)`) the
members compare each collective before it runs, and what differs is one `SpecError` on all of them.

`at` says where the program has a collective; reports of the watchdog repeat it.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from threading import get_ident
from time import monotonic
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shardlib.distributed import agreement, frames, messages
from shardlib.distributed.aside import Begins
from shardlib.distributed.communicators.protocol import Call, Communicator, Place
from shardlib.distributed.eager import eager
from shardlib.distributed.flat import pack, plain
from shardlib.distributed.graph_capture import on_capture_stream
from shardlib.distributed.group import Group
from shardlib.distributed.message_queue import MessageQueue
from shardlib.distributed.reduction import check_reducible
from shardlib.distributed.router import Router
from shardlib.distributed.routing import UNMEASURED, Table
from shardlib.distributed.streams import current_stream
from shardlib.distributed.tensor_dicts import Label, Value, labelled
from shardlib.distributed.watchdog import Watchdog
from shardlib.errors import SpecError


class GroupCoordinator(Group, Begins):
    """The group `name` of `ranks`, in that order, seen from `rank`.

    `control` carries messages and barriers, on the CPU.

    watchdog: told of each collective.  check: where members compare each collective before it runs; None
    where they do not.
    """

    def __init__(self, name: str, ranks: Sequence[int], rank: int, local_rank: int, device: torch.device,
                 communicators: Sequence[Communicator], control: Communicator,
                 device_group: dist.ProcessGroup | None = None, cpu_group: dist.ProcessGroup | None = None, *,
                 table: Table = UNMEASURED, deterministic: bool = False,
                 declined: Mapping[str, str] | None = None, watchdog: Watchdog | None = None,
                 check: Place | None = None) -> None:
        super().__init__(name, ranks, rank, local_rank)
        self.device, self.device_group, self.cpu_group = device, device_group, cpu_group
        self.communicators, self._control = tuple(communicators), control
        self.router = Router(name, self.world_size, communicators, table, deterministic, declined)
        self.queue: MessageQueue | None = None
        self._watchdog, self._check = watchdog, check
        self._on_gpu = device.type == "cuda"
        self._seat = watchdog.watch.seat(name, self.ranks) if watchdog else None
        if self._seat:
            self._seat.communicators = self.communicators

    def __repr__(self) -> str:
        return f"GroupCoordinator({self.name}, ranks {self.ranks}, rank {self.rank})"

    # -- collectives -----------------------------------------------------------------------------------------

    @eager
    def all_reduce(self, x: Tensor, op: str = "sum", *, at: object = None) -> Tensor:
        """The `op` ("sum" or "max") of every member's x, on every member. All x have one shape."""
        x = self._dense("all_reduce", x)
        check_reducible(op, x.dtype)
        x = plain(x)
        call = self.route("all_reduce", x, op).all_reduce
        return self.watched(at, "all_reduce", op, x, x.numel(), (x.shape,), call, x, op)

    @eager
    def all_gather(self, x: Tensor, dim: int, sizes: Sequence[int], *, at: object = None) -> Tensor:
        """Every member's x, concatenated along `dim` in their order; sizes[i] is member i's size there."""
        x = self._dense("all_gather", x)
        cut = self._cut_of_pieces("all_gather", x, dim, sizes)
        count = sum(cut.counts)
        communicator = self.route("all_gather", x, None, count, cut.even)
        if communicator.strided and not cut.in_memory_order:
            return self.watched(at, "all_gather", None, x, count, (cut.whole, cut.dim, cut.sizes),
                             communicator.all_gather_cut, plain(x), cut)
        flat = self.watched(at, "all_gather", None, x, count, (cut.whole, cut.dim, cut.sizes),
                         communicator.all_gather, plain(x).flatten(), cut.counts)
        return cut.join(flat)

    @eager
    def reduce_scatter(self, x: Tensor, dim: int, sizes: Sequence[int], op: str = "sum", *,
                       at: object = None) -> Tensor:
        """This member's piece of the `op` of every member's x, cut along `dim` into `sizes`."""
        x = self._dense("reduce_scatter", x)
        check_reducible(op, x.dtype)
        cut = self._cut("reduce_scatter", x, dim, sizes)
        if x.shape != cut.whole:
            raise SpecError(f"reduce_scatter over {self.name}: sizes {cut.sizes} add up to {sum(cut.sizes)}; "
                            f"dim {dim} has {x.shape[dim]}")
        communicator = self.route("reduce_scatter", x, op, None, cut.even)
        if communicator.strided and not cut.in_memory_order:
            return self.watched(at, "reduce_scatter", op, x, x.numel(), (cut.whole, cut.dim, cut.sizes),
                             communicator.reduce_scatter_cut, plain(x), cut, op)
        call = communicator.reduce_scatter
        flat = self.watched(at, "reduce_scatter", op, x, x.numel(), (cut.whole, cut.dim, cut.sizes), call,
                         cut.split(x), cut.counts, op)
        return flat.view(cut.shapes[self.rank_in_group]) if x.ndim != 1 else flat

    @eager
    def all_to_all(self, pieces: Sequence[Tensor], shapes: Sequence[Sequence[int]], even: bool = False, *,
                   at: object = None) -> tuple[Tensor, ...]:
        """pieces[i] goes to member i; shapes[i] is the shape of what member i sends here.

        All pieces of all members have one dtype. The results lie one after another in one new buffer. even:
        every piece of every member has the same number of elements, which no member can see alone; more
        communicators then take the call.
        """
        self._check_count("all_to_all", "pieces", pieces)
        self._check_count("all_to_all", "shapes", shapes)
        if len({p.dtype for p in pieces}) > 1:
            raise SpecError(f"all_to_all over {self.name}: pieces of several dtypes; convert them to one")
        send = [self._dense("all_to_all", p).numel() for p in pieces]
        recv, me = [self._count("all_to_all", shape) for shape in shapes], self.rank_in_group
        if send[me] != recv[me]:
            raise SpecError(f"all_to_all over {self.name}: member {me} keeps its piece of {send[me]} "
                            f"elements; shape {tuple(shapes[me])} has {recv[me]}")
        if even and len({*send, *recv}) > 1:
            raise SpecError(
                f"all_to_all over {self.name}: pieces of {send} elements and {recv} coming are not even")
        call = self.route("all_to_all", pieces[0], None, sum(send) if even else -1, even).all_to_all
        got = self.watched(at, "all_to_all", None, pieces[0], sum(send) if even else -1, (even,), call,
                        pack(pieces), send, recv)
        return tuple([p.view(tuple(shape)) for p, shape in zip(got.split_with_sizes(recv), shapes)])

    @eager
    def broadcast(self, x: Tensor, root: int, *, at: object = None) -> Tensor:
        """Member root's x, on every member; the others pass any tensor of its shape and dtype."""
        self._check_member("broadcast", root)
        x = plain(self._dense("broadcast", x))
        call = self.route("broadcast", x).broadcast
        return self.watched(at, "broadcast", None, x, x.numel(), (x.shape, root), call, x, root)

    @eager
    def gather(self, x: Tensor, root: int, dim: int, sizes: Sequence[int], *,
               at: object = None) -> Tensor | None:
        """As all_gather, on member root alone; None elsewhere."""
        self._check_member("gather", root)
        x = self._dense("gather", x)
        cut = self._cut_of_pieces("gather", x, dim, sizes)
        count = sum(cut.counts)
        call = self.route("gather", x, None, count, cut.even).gather
        flat = self.watched(at, "gather", None, x, count, (cut.whole, cut.dim, cut.sizes, root), call,
                         plain(x).flatten(), root, cut.counts)
        return None if flat is None else cut.join(flat)

    @eager
    def send(self, x: Tensor, to: int) -> None:
        """Hands x to member `to`, which calls `recv`."""
        self._check_peer("send", to)
        x = plain(self._dense("send", x))
        self.passed("send", to, x.dtype, x.numel(), self.route("send", x).send, x, to)

    @eager
    def recv(self, shape: Sequence[int], dtype: torch.dtype, source: int) -> Tensor:
        """What member `source` sends here: a tensor of this shape and dtype, on this rank's device."""
        return self._recv(shape, dtype, self.device, source)

    def _recv(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device, source: int) -> Tensor:
        self._check_peer("recv", source)
        count = self._count("recv", shape)
        call = self.router.route(Call("send", None, dtype, device.type, count * dtype.itemsize)).recv
        got = self.passed("recv", source, dtype, count, call, count, dtype, device, source)
        return got.view(tuple(shape))

    # -- tensors by name: see `tensor_dicts` -----------------------------------------------------------------

    @eager
    def send_tensors(self, tensors: Mapping[str, Value], to: int) -> None:
        """Hands tensors, by name, to member `to`, which calls `recv_tensors`: of any dtypes, shapes and
        strides, on the CPU or the device.

        A pair of a tensor and its spec arrives as that pair: {"x": (x, "B T D @pp:1")}. What cannot be sent
        is a SpecError here and there. One message over the CPU group says what comes; then each tensor,
        whole, takes its own route.
        """
        self._check_peer("send_tensors", to)
        frame, given = labelled(f"send_tensors over {self.name}", tensors, self.device)
        self.passed("send_tensors", to, None, -1, frames.send, self._live_control(), frame, to)
        messages.read(frame)  # what the receiver refuses, this member does, too
        for x in given:
            if x.numel():
                self.send(x, to)

    @eager
    def recv_tensors(self, source: int) -> dict[str, Value]:
        """What member `source` sends here with `send_tensors`, in its order;
        tensors that it has on its device are on this rank's."""
        self._check_peer("recv_tensors", source)
        frame = self.passed("recv_tensors", source, None, -1, frames.recv, self._live_control(), source)
        got = {}
        for each in messages.read(frame, list[Label]):
            x = each.room(self.device)
            got[each.name] = each.value(self._recv(x.shape, x.dtype, x.device, source) if x.numel() else x)
        return got

    @eager
    def broadcast_tensors(self, tensors: Mapping[str, Value] | None, root: int) -> dict[str, Value]:
        """Member root's tensors, by name, on every member, root's own as copies.

        The others pass None. Else as `send_tensors`.
        """
        self._check_member("broadcast_tensors", root)
        mine = self.rank_in_group == root
        where = f"broadcast_tensors over {self.name}"
        frame, given = labelled(where, tensors, self.device) if mine else (b"", [])
        frame = self.watched(None, "broadcast_tensors", None, None, -1, (root,), frames.broadcast,
                          self._live_control(), frame, root, mine)
        labels = messages.read(frame, list[Label])
        rooms = [each.room(self.device) for each in labels]
        return {each.name: each.value(self.broadcast(x, root) if x.numel() else room)
                for each, x, room in zip(labels, given if mine else rooms, rooms)}

    # -- CUDA graphs -----------------------------------------------------------------------------------------

    def graph_capture(self) -> AbstractContextManager[torch.cuda.Stream]:
        """The stream to capture CUDA graphs on, as the current one: warm up on it, then capture on it.

            with tp.graph_capture() as stream:
                step(x)                             # compiles; gives the stream its workspaces
                with torch.cuda.graph(graph, stream=stream):
                    y = step(x)
            graph.replay()                                          # on any stream

        It is the same in every group of this process, so that one graph may call several. All members capture
        the same calls in the same order, and replay together. Graphs that were captured on it run one after
        another: communicators keep memory for each stream, and these graphs share it. Let them go before the
        group is destroyed.
        """
        if self.device.type != "cuda":
            raise SpecError(f"graph_capture over {self.name}: CUDA graphs are of calls on cuda; this group "
                            f"is on {self.device.type}")
        return on_capture_stream(self.device)

    # -- what is around each of them -------------------------------------------------------------------------

    def watched(self, at: object, name: str, op: str | None, x: Tensor | None, count: int, facts: tuple,
             call: Callable, *args: Any) -> Any:
        """`call(*args)`, known to the watchdog.

        `facts`: what must be equal on all members, beside the op and the dtype.
        """
        if self._on_gpu and torch._C._cuda_getDevice() != self.device.index:
            # a new thread's is GPU 0, and kernels and NCCL run on the current one
            with torch.cuda.device(self.device):
                return self.watched(at, name, op, x, count, facts, call, *args)
        if self._watchdog is None:
            return call(*args)
        watch, seat, thread = self._watchdog.watch, self._seat, get_ident()
        seat.count = number = seat.count + 1
        # as Watch.begin has it
        watch.calls[thread] = (seat, number, name, op, None if x is None else x.dtype, count, at, None,
                               monotonic())
        if self._on_gpu:
            seat.streams.add(current_stream(self.device))
        try:
            if self._check is not None:
                self._compare(at, name, op, x, facts, args)
            return call(*args)
        except RuntimeError as error:
            raise self._watchdog.failed(error) from error
        finally:
            watch.last = watch.calls.pop(thread)

    def passed(self, name: str, member: int, dtype: torch.dtype | None, count: int, call: Callable,
               *args: Any, at: object = None) -> Any:
        """The same for a send or a recv, of which only two members know."""
        if self._on_gpu and torch._C._cuda_getDevice() != self.device.index:
            with torch.cuda.device(self.device):
                return self.passed(name, member, dtype, count, call, *args, at=at)
        if self._watchdog is None:
            return call(*args)
        self._watchdog.watch.begin(self._seat, name, None, dtype, count, at, self.ranks[member])
        if self._on_gpu:
            self._seat.streams.add(current_stream(self.device))
        try:
            return call(*args)
        except RuntimeError as error:
            raise self._watchdog.failed(error) from error
        finally:
            self._watchdog.watch.end()

    def _compare(self, at: object, name: str, op: str | None, x: Tensor | None, facts: tuple,
                 args: tuple) -> None:
        """SpecError on every member unless all of them call this collective alike."""
        send, recv = args[1:] if name == "all_to_all" else ((), ())
        text = agreement.said(name, op, None if x is None else x.dtype, facts)
        mine = agreement.Call(text, "" if at is None else str(at), tuple(send), tuple(recv))
        agreement.same_call(f"collective {self._seat.count} of {self._seat}", self.ranks, mine,
                            self._check.share)

    # -- control ---------------------------------------------------------------------------------------------

    @eager
    def broadcast_message(self, message: Any, root: int, as_type: Any = Any) -> Any:
        """Member root's message, on every member, decoded as `as_type`:
        numbers, strings, bytes, lists, dicts, dataclasses.

        It travels as msgpack, through the group's queue where there is one from root, else over the CPU
        group; a tuple arrives as a list unless `as_type` says otherwise, root's own too.
        """
        self._check_member("broadcast_message", root)
        by_queue = self.queue and self.queue.writer == root and not self.queue.closed
        way = ((self.queue.broadcast, message, as_type) if by_queue
               else (self._broadcast_message, message, root, as_type))
        return self.watched(None, "broadcast_message", None, None, -1, (root,), *way)

    def _broadcast_message(self, message: Any, root: int, as_type: Any) -> Any:
        frame = messages.frame(message) if self.rank_in_group == root else b""
        return messages.read(frames.broadcast(self._live_control(), frame, root, self.rank_in_group == root),
                             as_type)

    @eager
    def send_message(self, message: Any, to: int) -> None:
        """Hands a message to `to`, which calls `recv_message`; what cannot be written is an error on both."""
        self._check_peer("send_message", to)
        frame = messages.frame(message)
        self.passed("send_message", to, None, -1, frames.send, self._live_control(), frame, to)
        messages.read(frame)

    @eager
    def recv_message(self, source: int, as_type: Any = Any) -> Any:
        """What member `source` sends here with `send_message`, decoded as `as_type`."""
        self._check_peer("recv_message", source)
        return messages.read(
            self.passed("recv_message", source, None, -1, frames.recv, self._live_control(), source), as_type)

    @eager
    def barrier(self) -> None:
        """Returns when every member has called it; the device may still be at work."""
        self.watched(None, "barrier", None, None, -1, (), self._live_control().barrier)

    def destroy(self) -> None:
        """Ends the use of this group; the runtime ends the process groups, which others may share."""
        for communicator in self.communicators:
            communicator.close()
        if self.queue:
            self.queue.leave()
        self._refuse_calls()

    def disown(self) -> None:
        """In a forked child: calls are refused, and nothing is closed that the parent uses."""
        self._parents = self.communicators, self._control, self.queue
        self._refuse_calls()

    def _refuse_calls(self) -> None:
        self.communicators, self._control, self.queue = (), None, None
        if self._seat:
            self._seat.communicators, self._seat.streams = (), set()
        self.device_group = self.cpu_group = None
        self.router = Router(self.name, self.world_size, ())

    # -- routing ---------------------------------------------------------------------------------------------

    def route(self, name: str, x: Tensor, op: str | None = None, count: int | None = None,
              even: bool = True) -> Communicator:
        """The communicator that takes the collective `name` of x.

        `count`: elements of the whole, where x is a piece of it.
        """
        nbytes = x.nbytes if count is None else count if count < 0 else count * x.dtype.itemsize
        # x.device.type alone takes 0.4 µs
        device = "cuda" if x.is_cuda else "cpu" if x.is_cpu else x.device.type
        call = (name, op, x.dtype, device, nbytes, even,
                x.is_cuda and torch.cuda.is_current_stream_capturing())
        return self.router.known.get(call) or self.router.route(Call(*call))

    def check_open(self, what: str) -> None:
        """SpecError, saying `what` was asked for, after `destroy`."""
        if self._control is None:
            raise SpecError(f"{what} over {self.name}: the group was destroyed")

    def _live_control(self) -> Communicator:
        self.check_open("control message")
        return self._control
