"""The communicator over NCCL itself, without torch.distributed between:
every call is one NCCL call, or one group of them.

    connect(mesh, communicators=(nccl,))            # pip install 'shardlib[nccl]'

It runs on the current stream, in which torch.distributed's calls would leave for a stream of their own and
come back, and works on the memory that it is given. So a call costs no events, and is captured in a CUDA
graph as any kernel is: connections between the members are made with the communicator, not by a first call.
Pieces that differ from member to member, which torch.distributed pads or copies, are grouped calls straight
from and to their places:

    all_gather, all_to_all, gather      even: ncclAllGather     else: ncclSend and ncclRecv, all in one group
    reduce_scatter                      even: ncclReduceScatter else: ncclReduce to each member, in one group

What is only moved is moved as bytes, whatever its dtype. Refused by `supports`: a max of floats, since NCCL's
drops NaN; reductions of int16, uint16, float8, bool and complex numbers, which NCCL has not, or not as
`reduction` defines them.

Not made where nccl4py is not installed, where the group's tensors are not on GPUs, or where NCCL itself says
no, as it does of two members on one GPU. The NCCL that torch has loaded is used. As with all of NCCL, members
must issue their calls in one order: on several streams at once only where something else orders these.
"""
from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from shardlib.distributed.communicators.protocol import Call, Place

CODES = {torch.int8: 0, torch.uint8: 1, torch.int32: 2, torch.uint32: 3, torch.int64: 4, torch.uint64: 5,
         torch.float16: 6, torch.float32: 7, torch.float64: 8, torch.bfloat16: 9}
"""ncclDataType_t of what NCCL adds up as torch does: integers wrap round, floats are rounded after
every step."""
OPS = {"sum": 0, "max": 2}
"""ncclRedOp_t."""
BYTE = CODES[torch.uint8]
CLOSE_S = 5.0
"""Seconds that `close` waits for the device, and then again for NCCL."""

Piece = tuple[int, int, int]
"""(address, bytes, member) of what goes to, or comes from, a member."""


def nccl(place: Place) -> Nccl | str:
    """The communicator of the group at `place`, or why it has none;
    the same on all members, who all call it."""
    reason = place.agree(_reason(place))
    if reason is not None:
        return reason
    library = _library()
    identity, reason = place.share(_identity(library) if place.me == 0 else (b"", None))[0]
    if reason is not None:
        return reason
    made = None
    try:
        made = within(place.timeout_s / 2, partial(_join, place, library, identity))
    except Exception as error:
        reason = _said("NCCL", error)
    reason = place.agree(reason)
    if reason is not None and made is not None:
        made.close()
    return made if reason is None else reason


def _library() -> Any:
    """nccl4py's functions of nccl.h.

    They take addresses; its classes above them take tensors, and 5 µs for each.
    """
    return importlib.import_module("nccl.bindings.nccl")


def _reason(place: Place) -> str | None:
    if place.device.type != "cuda":
        return f"the group's tensors are on {place.device.type}"
    try:
        _library().get_version()
    except ImportError as error:
        return f"nccl4py cannot be imported: {error}; pip install 'shardlib[nccl]'"
    except Exception as error:
        return _said("nccl4py", error)
    return None


def _identity(library: Any) -> tuple[bytes, str | None]:
    """What the members of a new communicator know it by, or why there is none."""
    try:
        return bytes(library.get_unique_id()), None
    except Exception as error:
        return b"", _said("NCCL", error)


def _join(place: Place, library: Any, identity: bytes) -> Nccl:
    torch.cuda.set_device(place.device)                  # of this thread
    made = Nccl(place, library,
                library.comm_init_rank_scalable(place.size, place.me, 1, bytearray(identity), 0))
    made.first_calls()
    return made


def _said(who: str, error: Exception) -> str:
    return f"{who}: {str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}"


def within(timeout_s: float, call: Callable[[], Any]) -> Any:
    """What `call` returns or raises, in a thread of its own.

    TimeoutError after timeout_s; the thread then waits on alone.
    """
    outcome: list[tuple[Any, Exception | None]] = []

    def run() -> None:
        try:
            outcome.append((call(), None))
        except Exception as error:
            outcome.append((None, error))
    thread = threading.Thread(target=run, daemon=True, name="shardlib NCCL")
    thread.start()
    thread.join(timeout_s)
    if not outcome:
        raise TimeoutError(f"no answer within {timeout_s:g} s")
    result, error = outcome[0]
    if error is not None:
        raise error
    return result


class Nccl:
    """Collectives of the members of `place` over the communicator `comm` of `library`. Made by `nccl`."""

    name = "NCCL"
    deterministic = False
    strided = False

    def __init__(self, place: Place, library: Any, comm: Any) -> None:
        self.group, self.me, self.size, self.device = place.name, place.me, place.size, place.device
        self._library, self._comm = library, comm

    @property
    def version(self) -> str:
        """Of the NCCL that runs, and where it lies."""
        number = self._library.get_version()
        return f"{number // 10000}.{number // 100 % 100}.{number % 100} {self._library.get_library_path()}"

    def supports(self, call: Call) -> str | None:
        if call.device != self.device.type:
            return f"NCCL takes tensors on {self.device.type}, not on {call.device}"
        if call.op == "max" and call.dtype.is_floating_point:
            return f"NCCL's max of {str(call.dtype)[6:]} drops NaN"
        return (f"NCCL has no {call.op} of {str(call.dtype)[6:]}" if call.op and call.dtype not in CODES
                else None)

    def first_calls(self) -> None:
        """Connects the members with each other, and looks whether a sum is one.

        All call it; waits for the device.
        """
        ones, n = torch.ones(64 * self.size, device=self.device), self.size
        total = self.all_reduce(ones, "sum")
        self.reduce_scatter(self.all_gather(ones, (64 * n,) * n), (64 * n,) * n, "sum")
        self.all_to_all(ones, (64,) * n, (64,) * n)
        if (total != n).any():
            raise RuntimeError(f"the sum of {n} ones is {total[0].item():g}")

    # -- reductions ------------------------------------------------------------------------------------------

    def all_reduce(self, x: Tensor, op: str) -> Tensor:
        out = torch.empty_like(x)
        if x.numel():
            self._do("all_reduce", [
                (self._library.all_reduce, x.data_ptr(), out.data_ptr(), x.numel(), CODES[x.dtype], OPS[op])])
        return out

    def reduce_scatter(self, x: Tensor, counts: Sequence[int], op: str) -> Tensor:
        out, codes, library = x.new_empty(counts[self.me]), (CODES[x.dtype], OPS[op]), self._library
        if _even(counts):
            calls = ([(library.reduce_scatter, x.data_ptr(), out.data_ptr(), out.numel(), *codes)]
                     if x.numel() else [])
        else:
            size = x.dtype.itemsize
            calls = [(library.reduce, start, out.data_ptr(), nbytes // size, *codes, m)
                     for start, nbytes, m in _pieces(x, counts)]
        self._do("reduce_scatter", calls)
        return out

    # -- moves -----------------------------------------------------------------------------------------------

    def all_gather(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        out = x.new_empty(sum(counts))
        if _even(counts):
            self._do("all_gather", [(self._library.all_gather, x.data_ptr(), out.data_ptr(), x.nbytes, BYTE)]
                     if x.numel() else [])
        else:
            self._exchange("all_gather", [(x.data_ptr(), x.nbytes, m) for m in range(self.size)],
                           _pieces(out, counts))
        return out

    def all_to_all(self, x: Tensor, send: Sequence[int], recv: Sequence[int]) -> Tensor:
        out = x.new_empty(sum(recv))
        self._exchange("all_to_all", _pieces(x, send), _pieces(out, recv))
        return out

    def gather(self, x: Tensor, root: int, counts: Sequence[int]) -> Tensor | None:
        out = x.new_empty(sum(counts)) if self.me == root else None
        self._exchange("gather", [(x.data_ptr(), x.nbytes, root)],
                       [] if out is None else _pieces(out, counts))
        return out

    def broadcast(self, x: Tensor, root: int) -> Tensor:
        out = torch.empty_like(x)
        if x.numel():
            self._do("broadcast",
                     [(self._library.broadcast, x.data_ptr(), out.data_ptr(), x.nbytes, BYTE, root)])
        return out

    def send(self, x: Tensor, to: int) -> None:
        self._exchange("send", [(x.data_ptr(), x.nbytes, to)], [])

    def recv(self, count: int, dtype: torch.dtype, device: torch.device, source: int) -> Tensor:
        out = torch.empty(count, dtype=dtype, device=device)
        self._exchange("recv", [], [(out.data_ptr(), out.nbytes, source)])
        return out

    def barrier(self) -> None:
        """Waits for the device, too."""
        self.all_reduce(torch.zeros(1, device=self.device), "sum").item()

    # -- calls -----------------------------------------------------------------------------------------------

    def _exchange(self, what: str, send: Iterable[Piece], recv: Iterable[Piece]) -> None:
        """Pieces to and from other members, and from this one to itself, all at once.

        Both ends leave out empty ones.
        """
        out, into = self._library.send, self._library.recv
        self._do(what, [*((out, start, nbytes, BYTE, m) for start, nbytes, m in send if nbytes),
                        *((into, start, nbytes, BYTE, m) for start, nbytes, m in recv if nbytes)])

    def _do(self, what: str, calls: Sequence[tuple]) -> None:
        """Each call (function, arguments, ...) on the current stream; several as one group."""
        end = (self._comm, self._stream()) if calls else ()
        try:
            if len(calls) == 1:
                call, *args = calls[0]
                call(*args, *end)
            elif calls:
                self._do_grouped(calls, end)
        except self._library.NCCLError as error:
            raise RuntimeError(f"{what} over {self.group}: NCCL: {error}") from error

    def _do_grouped(self, calls: Sequence[tuple], end: tuple) -> None:
        self._library.group_start()
        try:
            for call, *args in calls:
                call(*args, *end)
        finally:
            self._library.group_end()

    def _stream(self) -> int:
        return torch.cuda.current_stream(self.device).cuda_stream

    def close(self) -> None:
        """Aborts NCCL's communicator once the device is done with what was called, or after CLOSE_S.

        An abort waits for CUDA graphs that hold calls of the communicator: after CLOSE_S it goes on in the
        background, until these graphs are gone. Let them go first.
        """
        comm, self._comm = self._comm, None
        for call in ((partial(torch.cuda.synchronize, self.device), partial(self._library.comm_abort, comm))
                     if comm else ()):
            try:
                within(CLOSE_S, call)
            except Exception:               # what is wrong with the device was said by what called it
                pass


def _pieces(x: Tensor, counts: Sequence[int]) -> list[Piece]:
    """Where the pieces of x lie, which has counts[m] elements for each member m; empty ones are left out."""
    size, base = x.dtype.itemsize, x.data_ptr()
    starts = accumulate((n * size for n in counts), initial=base)
    return [(start, n * size, m) for m, (start, n) in enumerate(zip(starts, counts)) if n]


def _even(counts: Sequence[int]) -> bool:
    return counts.count(counts[0]) == len(counts)
