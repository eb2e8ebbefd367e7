"""No silent hang: a thread that knows which collective this process is in,
and ends the job with a report when one takes too long.

Every process of a job writes its state on a `board` in the store of torch.distributed, a few times a second,
and looks there whether the job is over; nothing of this goes through a process group, which may be what is
broken. A report reads the states of the ranks that this one waits for, and says which of them are not there:

    shardlib [rank 0] has waited 45 s in collective 3 of group tp (ranks 0 1): all_reduce ...
    shardlib [rank 0]   rank 1 is in no collective; its last was collective 2 of group tp (ranks 0 1): ...

A collective may wait for three quarters of `timeout_s`; the rest is for telling, so that after `timeout_s` no
process is left.

    it waited too long   all ranks report, and end with exit status 1
    it failed            the rank reports at once, and the collective raises a `RankError` with that report
    one rank's data      it raises what no other can know of (`end_others`); these end with its first line
    SIGTERM came         the launcher ends us since another rank has failed: the rank says where it was

Whatever befalls these threads, the process ends in time: a store that does not answer, a stderr that nobody
reads, an error of theirs. A forked child has no part in this, and gives its parent no signals.

The store is on one host. A rank that is cut off from it cannot know who else is gone, and says so: `the store
on 192.0.2.1 does not answer`.

A communicator with a method `report() -> str | None` adds a line of its own: what its kernel waits for.
"""
from __future__ import annotations

import ctypes
import os
import re
import select
import signal
import socket
import threading
import weakref
from itertools import chain, islice
from time import monotonic, sleep
from typing import Any

import torch
import torch.distributed as dist

from shardlib.distributed.board import Board
from shardlib.distributed.rank_error import RankError
from shardlib.distributed.saying import flush, say
from shardlib.distributed.scene import Scene, State
from shardlib.distributed.siblings import end_stopped
from shardlib.distributed.streams import marks, passed
from shardlib.distributed.watch import Doing, Moment, Watch, encodable

LOOKED = 64
"""Ranks whose states a report reads, at most, where it does not wait for more."""
_FAILED, _STOP, _RAISED = 0x80, 0x81, 0x82      # what wakes the thread, beside the numbers of signals


class Watchdog:
    """The thread of one process.

    `store` is its own connection; `device` is asked too whether it makes progress, where it is a GPU.
    """

    def __init__(self, watch: Watch, store: dist.Store, rank: int, world_size: int, timeout_s: float,
                 device: torch.device) -> None:
        self.watch, self.board, self.device = watch, Board(store), device
        self.rank, self.world_size = rank, world_size
        self.timeout_s, self.limit_s, self.tick_s = timeout_s, 0.75 * timeout_s, min(1.0, timeout_s / 40)
        self._beat, self._failure, self._report, self._left = 0, (None, ""), "", False
        self._raised = ""                           # how this rank has ended the job, if it has
        self._leaving = False                       # it has reported, and waits for the others to
        self._told, self._marked, self._waiting = threading.Event(), None, None
        self._mute = f"  {self.board.where} does not answer"
        self._woken, self._wake = socket.socketpair()
        self._wake.setblocking(False)
        self._stopped, self._failing = threading.Event(), threading.Lock()
        self._signals = self._take_signals()
        _LIVE.add(self)
        self._threads = [threading.Thread(target=f, name=f"shardlib {f.__name__}", daemon=True)
                         for f in (self._watch, self._guard)]
        for thread in self._threads:
            thread.start()

    # -- what the process itself calls -----------------------------------------------------------------------

    def failed(self, error: BaseException) -> RankError:
        """The error to raise instead of `error`, which ended the collective that runs.

        Its report is on stderr when this returns.
        """
        with self._failing:
            mine = self.watch.mine
            self._failure = mine, f"failed in {Moment.of(mine)}: {_first_line(error)}"
            self._told.clear()
            self._post(_FAILED)
            if not self._told.wait(5 * self.tick_s + 1) and not self._report:
                self._tell_alone(self._failure[1])
            self.watch.failed = mine
            return RankError(self._report or self._failure[1])

    def end_others(self, note: str) -> None:
        """Ends the other ranks, which say at once that this one `note`, as in "has raised ValueError: ...";
        it goes on, to raise that."""
        with self._failing:
            self.watch.note = self._raised = encodable(note)
            self._told.clear()
            self._post(_RAISED)
            self._told.wait(5 * self.tick_s + 1)

    def stop(self, note: str) -> None:
        """Ends the thread; other ranks learn that this one `note`, as in "has closed its runtime";
        "" where a collective has failed."""
        self.watch.note, self._left = self.watch.note or note, True
        self._post(_STOP)
        self._threads[0].join(2 * self.tick_s + 1)
        self._stopped.set()
        self._let_go()

    def _post(self, byte: int) -> None:
        try:
            self._wake.send(bytes([byte]))
        except OSError:
            pass                        # full, or closed: the thread is awake, or gone

    # -- signals ---------------------------------------------------------------------------------------------

    def _take_signals(self) -> bool:
        """SIGTERM wakes the thread, even while the process waits in C, where nobody else has taken it."""
        if (threading.current_thread() is not threading.main_thread()
            or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL):
            return False
        others = signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
        if others != -1:
            signal.set_wakeup_fd(others)
            return False
        signal.signal(signal.SIGTERM, self._on_term)
        return True

    def _let_go(self) -> None:
        """Gives signals back, as far as nobody has taken them since, and closes the socket. Another thread
        cannot give them back: then what they write to stays open."""
        taken = self._signals and threading.current_thread() is not threading.main_thread()
        if self._signals and not taken:
            if (other := signal.set_wakeup_fd(-1)) not in (-1, self._wake.fileno()):
                signal.set_wakeup_fd(other)
            if signal.getsignal(signal.SIGTERM) == self._on_term:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if not self._threads[0].is_alive():
            for end in (self._woken, self._wake):
                end.detach() if taken else end.close()

    def _forked(self) -> None:
        """In a child of this process, which shares the socket with it, but has none of its threads."""
        self._left = True
        self._stopped.set()
        self._let_go()

    def _on_term(self, *_: Any) -> None:
        # asyncio takes the descriptor that signals write to, and does not give it back
        self._post(signal.SIGTERM)
        if not self._threads[0].is_alive():         # it would have ended the process
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.raise_signal(signal.SIGTERM)

    # -- the thread ------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        woken = b""
        if self.device.type == "cuda":
            _leave_captures_alone()
        while _STOP not in woken:
            try:
                self._look(woken)
            except Exception as error:
                say(self.rank, [f"the watchdog: {type(error).__name__}: {error}"])
            ready, _, _ = select.select([self._woken], [], [], self.tick_s)
            woken = self._woken.recv(64) if ready else b""
        self._publish()

    def _look(self, woken: bytes) -> None:
        self._publish()
        if _FAILED in woken:
            mine, head = self._failure
            self._tell(head, mine)
            self._told.set()
        if _RAISED in woken:
            self.board.ask(lambda s: s.set("over", f"rank {self.rank} {self._raised}"))
            self._let_all_say()
            self._told.set()
        if signal.SIGTERM in woken and signal.getsignal(signal.SIGTERM) == self._on_term:
            self._terminated()
        self._judge()

    def _judge(self) -> None:
        """Ends the process where its collective takes too long, or another rank has ended the job."""
        stuck, over = self._stuck(), self._over()
        if stuck is None and over is None:
            return
        mine = self._waiting = stuck or self.watch.now
        if over is None:
            self.board.ask(lambda s: s.set("over", ""))
        where = Moment.of(mine) if mine else None
        waits = (f"has waited {monotonic() - mine[-1]:.0f} s in {where}" if stuck else f"ends in {where}"
                 if mine else f"ends: it {self._state()}")
        try:
            if over:
                self._tell_why(over)
            else:
                self._tell(waits, mine)
        finally:
            self._leave()

    def _over(self) -> str | None:
        """Why another rank has ended the job: "" where a collective took too long. None where none has."""
        over = None if self._raised else self.board.look("over")
        return None if over is None else over.decode()

    def _stuck(self) -> tuple | None:
        """The collective that takes longer than it may; on a GPU also the last, if it is not come past."""
        now, at = self.watch.now, monotonic()
        if now is not None:
            return now if at - now[-1] > self.limit_s else None
        last = self.watch.last
        if self.device.type != "cuda" or last is None or at - last[-1] < self.limit_s / 4:
            return None
        if self._marked is None or self._marked[0] is not last or all(map(passed, self._marked[1])):
            self._marked = (
                last, marks(self.device, {0, *(h for s in self.watch.seats for h in tuple(s.streams))}), at)
        return last if at - last[-1] > self.limit_s and at - self._marked[2] > self.limit_s / 2 else None

    def _terminated(self) -> None:
        """Says where the launcher's SIGTERM met us, if that was in a collective, and ends."""
        self._left = True
        try:
            self._publish()
            if over := self._over():
                self._tell_why(over)
            elif (now := self.watch.now) is not None and not self._report:
                self._tell(f"was ended by its launcher (SIGTERM) in {Moment.of(now)}")
        finally:
            flush()
            os._exit(128 + signal.SIGTERM)

    def _leave(self) -> None:
        """Ends the process after all that live have reported: torchrun ends the others after the first.

        One that is late finds in its state that it has left, and does not take it for dead.
        """
        self._leaving = True
        self._let_all_say()
        self._left = True
        self._publish()
        try:
            end_stopped()
        finally:
            flush()
            os._exit(1)

    def _let_all_say(self) -> None:
        """Waits, some ticks at most, until all ranks have said why the job ends."""
        self.board.ask(lambda s: s.add("said", 1))
        self.board.wait(lambda: (self.board.ask(lambda s: s.add("said", 0)) or self.world_size)
                        >= self.world_size, 3 * self.tick_s)

    def _guard(self) -> None:
        """Ends the process in time even if the other thread is gone, or waits: for the store, say.

        A store that is cut off neither answers nor fails: the timeout of its connection is for keys that it
        does not have.
        """
        if self.device.type == "cuda":
            _leave_captures_alone()
        while not self._stopped.wait(self.tick_s):
            now, asked, at = self.watch.now, self.board.asked, monotonic()
            cut_off = asked is not None and at - asked > self.timeout_s / 5
            share = 0.75 if cut_off else 1.0 if self._leaving else 0.95     # leaving, it waits for others
            if now is not None and at - now[-1] > share * self.timeout_s:
                try:
                    if not self._leaving:
                        self._tell_alone(f"has waited {at - now[-1]:.0f} s in {Moment.of(now)}")
                finally:
                    os._exit(1)

    # -- reports ---------------------------------------------------------------------------------------------

    def _tell(self, head: str, mine: tuple | None = None) -> None:
        """The report: its first line at once, the others after a look at who still lives."""
        mine = mine or self.watch.now
        say(self.rank, [head])
        lines = (self._absent(Moment.of(mine)) if self.board.ask(lambda s: s.check(["over"]) is not None)
                 else [self._mute])
        lines += [f"  {text}" for c in (Doing(*mine).seat.communicators if mine else ())
                  if (text := _report_of(c))]
        say(self.rank, lines)
        self._report = "\n".join([head, *lines])

    def _tell_why(self, over: str) -> None:
        """The report of a rank that another one has ended."""
        self._report = f"ends: {over}"
        say(self.rank, [self._report, f"  it {self._state()}"])

    def _tell_alone(self, head: str) -> None:
        """The report of a rank whose store does not answer."""
        say(self.rank, [head, self._mute])
        self._report = f"{head}\n{self._mute}"

    def _absent(self, mine: Moment | None) -> list[str]:
        """Who is not there, in lines.

        Where more than LOOKED ranks wait, one looks for all that are in this call: the first that gets here.
        The others show it meanwhile that they live.
        """
        if mine is None or mine.peer is not None or len(mine.ranks) <= LOOKED:
            return self._scene(mine).lines()
        key = f"absent from {mine}"
        if self.board.ask(lambda s: s.add(f"{key}: looks", 1)) != 1:
            found = self.board.wait(lambda: self._publish() or self.board.look(key), 4 * self.tick_s)
            return found.decode().split("\n") if found else ["  the rank that looks for all has not answered"]
        lines = self._scene(mine).lines()
        self.board.ask(lambda s: s.set(key, "\n".join(lines)))
        return lines

    def _scene(self, mine: Moment | None) -> Scene:
        """The states that matter, and who is silent: whose beat stands still, at a second look too where the
        machine may be busy."""
        near = self._near(mine)
        before = self.board.read(near)
        for ticks in (2.5, 1.5):
            until = monotonic() + ticks * self.tick_s
            while monotonic() < until:
                sleep(self.tick_s / 4)
                self._publish()
            states = self.board.read(near)
            still = [r for r, s in states.items()
                     if r != self.rank and s.beat == before[r].beat and not s.left]
            if not still:
                break
        return Scene(self.rank, mine, states, {r: "it was killed, stopped or cut off" for r in still})

    def _near(self, mine: Moment | None) -> list[int]:
        """The ranks that this one waits for; and others up to LOOKED, from its smallest group to the job."""
        waits = () if mine is None else mine.ranks if mine.peer is None else (mine.peer,)
        groups = sorted((seat.ranks for seat in self.watch.seats), key=len)
        found = dict.fromkeys(chain(waits, *groups, range(self.world_size)))
        return list(islice(found, max(LOOKED, len(waits))))

    def _state(self) -> State:
        watch = self.watch
        now = watch.now or self._waiting or (watch.last if watch.last is watch.failed else None)
        return State(self._beat, {str(s): s.count for s in watch.seats}, Moment.of(now),
                     Moment.of(watch.last), self._left, encodable(watch.note))

    def _publish(self) -> None:
        self._beat += 1
        self.board.write(self.rank, self._state())


def _leave_captures_alone() -> None:
    """What this thread asks of the GPU does not end the capture of a CUDA graph in another one."""
    relaxed = ctypes.c_int(2)
    ctypes.CDLL("libcuda.so.1").cuThreadExchangeStreamCaptureMode(ctypes.byref(relaxed))


def _first_line(error: BaseException) -> str:
    """`error` in one line, without the place in gloo's own source."""
    text = re.sub(r"^\[[^\]]*\]\s*", "", str(error).strip()).split("\n")[0].split(". This is typically")[0]
    return text or type(error).__name__


def _report_of(communicator: Any) -> str | None:
    """What it says of itself, if it does.

    Nothing that goes wrong in it may end the thread that ends the job.
    """
    try:
        return getattr(communicator, "report", lambda: None)()
    except Exception as error:
        return f"{communicator.name}: no report: {type(error).__name__}: {error}"


_LIVE: weakref.WeakSet[Watchdog] = weakref.WeakSet()
_MASKS: list[Any] = []


def _before_fork() -> None:
    """A SIGTERM that comes to a child before it has let go of our socket would tell us to end."""
    _MASKS.append(signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM}))


def _after_fork() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _MASKS.pop())


def _after_fork_in_child() -> None:
    for dog in tuple(_LIVE):
        dog._forked()
    _after_fork()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)
