"""What the watchdog knows and says, piece by piece; whole jobs are in test_faults."""
from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from shardlib import Layout, Mesh, SpecError, lower, reshard, sharded
from shardlib.distributed import connect
from shardlib.distributed import watchdog as watchdog_module
from shardlib.distributed.agreement import different_plans, said
from shardlib.distributed.board import Board
from shardlib.distributed.communicators.alone import Alone
from shardlib.distributed.group_coordinator import GroupCoordinator
from shardlib.distributed.rank_error import wait_until
from shardlib.distributed.saying import say
from shardlib.distributed.scene import Scene, State
from shardlib.distributed.watch import Moment, Seat, Watch
from shardlib.distributed.watchdog import Watchdog, _first_line, _report_of
from shardlib.lowering.emit import Emitter

ROOT = Path(__file__).resolve().parents[2]
TP = "group tp (ranks 0 1)"
FIRST = Moment(TP, (0, 1), 1, "all_reduce sum of 4 float32")


def watchdog(store: dist.Store) -> Watchdog:
    return Watchdog(Watch(), store, 0, 2, 40.0, torch.device("cpu"))


def test_a_moment_in_words() -> None:
    watch = Watch()
    seat = watch.seat("tp", (0, 1))
    for how, text in (((seat, "barrier"), f"collective 1 of {TP}: barrier"),
                      ((seat, "all_to_all", None, torch.bfloat16),
                       f"collective 2 of {TP}: all_to_all of bfloat16"),
                      ((seat, "send", None, torch.int64, 3, None, 1), f"send of 3 int64 to rank 1 in {TP}"),
                      ((seat, "recv", None, torch.int64, 3, None, 1), f"recv of 3 int64 from rank 1 in {TP}"),
                      ((seat, "all_reduce", "max", torch.float32, 4, "step 2 of f, m.py:3: N max:tp -> N"),
                       f"collective 3 of {TP}: all_reduce max of 4 float32, at step 2 of f, m.py:3: N max:tp "
                       "-> N")):
        watch.begin(*how)
        assert str(Moment.of(watch.now)) == text
        watch.end()
    assert seat.count == 3 and watch.now is None and Moment.of(watch.last).number == 3


def test_who_is_absent() -> None:
    there, gone = State(counts={TP: 1}, now=FIRST), State(left=True, note="has closed its runtime")
    done, other = (State(counts={TP: 1}, last=FIRST),
                   State(counts={TP: 1}, now=Moment(TP, (0, 1), 1, "all_reduce sum of 5 float32")))
    for state, line in ((there, "  all its ranks are there"), (done, "  all its ranks are there"),
                        (State(), "  rank 1 is in no collective, and has called none"),
                        (other, f"  rank 1 is in collective 1 of {TP}: all_reduce sum of 5 float32"),
                        (gone, "  rank 1 has closed its runtime")):
        assert Scene(0, FIRST, {0: there, 1: state}, {}).lines() == [line]
    killed = "it was killed, stopped or cut off"
    assert (Scene(0, FIRST, {0: there, 1: there}, {1: killed}).lines()
            == [f"  rank 1 is silent: {killed}; when last heard of it was in {FIRST}"])
    assert Scene(1, None, {0: there, 1: State()}, {}).lines() == [f"  rank 0 is in {FIRST}"]


def test_a_send_waits_for_its_peer_alone() -> None:
    send = Moment("group tp (ranks 0 1 2)", (0, 1, 2), 0, "send of 3 int64", "", 2)
    states = {0: State(now=send), 1: State(), 2: State()}
    assert Scene(0, send, states, {}).lines() == ["  rank 2 is in no collective, and has called none"]
    states[2] = State(now=Moment("group tp (ranks 0 1 2)", (0, 1, 2), 0, "recv of 3 int64", "", 0))
    assert Scene(0, send, states, {}).lines() == ["  all its ranks are there"]


def test_a_report_names_some_ranks_of_many() -> None:
    group = "group tp (all)"
    moment = Moment(group, tuple(range(100)), 1, "barrier")
    lines = Scene(0, moment, {r: State() for r in range(100)}, {}).lines()
    assert len(lines) == 9 and lines[7:] == ["  rank 8 is in no collective, and has called none",
                                             "  and 91 more ranks"]


def test_a_communicator_whose_report_fails_does_not_end_the_watchdog() -> None:
    """It is the thread that ends the job."""
    def fails() -> str:
        raise KeyError(7)
    assert _report_of(SimpleNamespace(name="NVLink", report=fails)) == "NVLink: no report: KeyError: 7"
    assert _report_of(SimpleNamespace(name="NVLink", report=lambda: "waits")) == "waits"
    assert _report_of(SimpleNamespace(name="gloo")) is None


def script(text: str, *arguments: str) -> tuple[int, str, str]:
    """A process's exit status, and what it has printed."""
    done = subprocess.run(
        [sys.executable, "-c", text, *arguments], capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])})
    return done.returncode, done.stdout, done.stderr


class Gpu:
    """Streams of a GPU that come past every mark but those that are `stuck`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.at, self.stuck = -1, set()
        monkeypatch.setattr(watchdog_module, "monotonic", lambda: self.at)
        monkeypatch.setattr(watchdog_module, "marks", lambda device, handles: sorted(handles))
        monkeypatch.setattr(watchdog_module, "passed", lambda handle: handle not in self.stuck)


@pytest.mark.parametrize("stuck", [0, 7, 9])
def test_a_gpu_that_does_not_come_past_a_collective(stuck: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the default stream, or one that any group has called on; asked again as long as it does."""
    gpu, watch = Gpu(monkeypatch), Watch()
    for handle in (7, 9):
        watch.seat("tp", (0, 1)).streams.add(handle)
    watch.last = (watch.seats[0], 1, "all_reduce", "sum", torch.float32, 4, None, None, 0.0)
    dog = SimpleNamespace(watch=watch, device=torch.device("cuda", 0), limit_s=45.0, _marked=None)

    def found() -> list[float]:
        """When the watchdog that asks every second has found the collective stuck."""
        times = []
        for gpu.at in range(gpu.at + 1, gpu.at + 101):
            times += [gpu.at] if Watchdog._stuck(dog) is watch.last else []
        return times
    assert found() == []
    gpu.stuck = {stuck}
    assert found() == list(range(99 + 23, 200))         # limit_s / 2 after the last mark that was passed
    gpu.stuck = set()
    assert found() == []


def test_a_group_that_is_destroyed_is_no_longer_looked_after() -> None:
    """What its communicators hold can go, and the streams that it has called on."""
    watch = Watch()
    group = GroupCoordinator("tp", (0,), 0, 0, torch.device("cpu"), (Alone(),), Alone(),
                             watchdog=SimpleNamespace(watch=watch))
    watch.seats[0].streams.add(7)
    assert [c.name for c in watch.seats[0].communicators] == [Alone.name]
    group.destroy()
    assert (watch.seats[0].communicators, watch.seats[0].streams) == ((), set())


def test_gloo_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    text = ("[/source/pair.cc:553] Connection closed by peer [127.0.0.1]:9. This is typically caused by a "
            "remote worker crashing. Check\nthe logs")
    assert _first_line(RuntimeError(text)) == "Connection closed by peer [127.0.0.1]:9"
    assert _first_line(RuntimeError()) == "RuntimeError"
    say(3, ["a\x1b[31m\nb"])
    assert capsys.readouterr().err == "shardlib [rank 3] a?[31m?b\n"


def test_states_travel_through_the_store() -> None:
    store = dist.HashStore()
    dog = watchdog(store)
    try:
        seat = dog.watch.seat("tp", (0, 1))
        dog.watch.begin(seat, "barrier")
        assert (dog.limit_s, dog.tick_s) == (30.0, 1.0)
        # what its thread has begun to write may come after ours
        wait_until(lambda: dog.board.read((0, 1))[0].counts == {TP: 1}, 10.0, dog._publish)
        state = dog.board.read((0, 1))[0]
        assert ((state.counts, str(state)) == ({TP: 1}, f"is in collective 1 of {TP}: barrier")
                and dog.board.read((0, 1))[1] == State())
        store.set("1", b"\xc1 no message")
        assert str(dog.board.read((0, 1))[1]) == "has written what is no state"
    finally:
        dog.stop("has closed its runtime")
    assert str(dog.board.read((0, 1))[0]) == "has closed its runtime"


@pytest.mark.parametrize("timeout_s, limit_s, tick_s",
                         [(8.0, 6.0, 0.2), (40.0, 30.0, 1.0), (400.0, 300.0, 1.0)])
def test_it_looks_forty_times_within_a_deadline_and_each_second_at_least(timeout_s: float, limit_s: float,
                                                                        tick_s: float) -> None:
    dog = Watchdog(Watch(), dist.HashStore(), 0, 2, timeout_s, torch.device("cpu"))
    dog.stop("")
    assert (dog.timeout_s, dog.limit_s, dog.tick_s) == (timeout_s, limit_s, tick_s)


def test_sigterm_is_taken_only_where_nobody_has_it() -> None:
    dog = watchdog(dist.HashStore())
    assert signal.getsignal(signal.SIGTERM) == dog._on_term
    second = watchdog(dist.HashStore())
    second.stop("")
    assert signal.getsignal(signal.SIGTERM) == dog._on_term
    dog.stop("")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL and signal.set_wakeup_fd(-1) == -1

    def mine(*_: object) -> None: ...
    signal.signal(signal.SIGTERM, mine)
    try:
        third = watchdog(dist.HashStore())
        third.stop("")
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_signals_are_given_back_as_far_as_nobody_has_taken_them() -> None:
    """A descriptor that stays behind would be that of the next file that is opened."""
    dog = watchdog(dist.HashStore())
    signal.signal(signal.SIGTERM, lambda *_: None)
    dog.stop("")
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert signal.set_wakeup_fd(-1) == -1
    dog = watchdog(dist.HashStore())
    here, there = socket.socketpair()
    there.setblocking(False)
    signal.set_wakeup_fd(there.fileno())
    dog.stop("")
    assert signal.set_wakeup_fd(-1) == there.fileno() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    here.close()
    there.close()
    dog = watchdog(dist.HashStore())
    written_to = dog._wake.fileno()
    (stopper := Thread(target=dog.stop, args=("",))).start()
    stopper.join()
    assert signal.set_wakeup_fd(-1) == written_to
    os.close(written_to)                                        # it was open
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_debug_mode_compares_the_shapes_of_a_fused_call() -> None:
    """Whatever a collective is called."""
    one, other = (said("all_reduce_add_rms_norm", "sum", torch.float32, ((rows, 4), (4,))) for rows in (2, 3))
    assert one == "all_reduce_add_rms_norm sum of float32 (2, 4) (4,)" and one != other


def test_what_is_not_utf8_is_said_nevertheless() -> None:
    """Names of files need not be: text that cannot be sent would silence a rank."""
    store = dist.HashStore()
    dog = watchdog(store)
    dog.watch.begin(dog.watch.seat("tp", (0, 1)), "barrier", at="step 1 of f, caf\udce9.py:3")
    dog.stop("has raised ValueError: caf\udce9")
    state = dog.board.read((0, 1))[0]
    assert (state.note, state.now.step) == ("has raised ValueError: caf\\udce9",
                                            "step 1 of f, caf\\udce9.py:3")


def test_an_error_of_the_watchdog_does_not_end_it(capfd: pytest.CaptureFixture[str]) -> None:
    dog = watchdog(dist.HashStore())
    dog._judge = lambda: {}["no such"]
    dog._post(0)
    said: list[str] = []
    assert wait_until(lambda: said.append(capfd.readouterr().err) or "the watchdog" in "".join(said), 10.0,
                      lambda: None)
    assert ("".join(said).startswith("shardlib [rank 0] the watchdog: KeyError: 'no such'\n")
            and dog._threads[0].is_alive())
    dog.stop("")


def test_a_rank_that_ends_the_others_goes_on_once_they_have_said_why(capfd: pytest.CaptureFixture[str],
                                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    """It says nothing itself, for it raises; the others say its line, and where they are,
    at their next look."""
    store, left = dist.HashStore(), []
    monkeypatch.setattr(Watchdog, "_leave", lambda self: (left.append(self.rank), self._let_all_say()))
    dog, other = watchdog(store), Watchdog(Watch(), store, 1, 2, 40.0, torch.device("cpu"))
    other.watch.begin(other.watch.seat("tp", (0, 1)), "barrier")
    dog.end_others("has raised SpecError: ids holds caf\udce9")
    other.stop("")
    dog.stop("")
    assert left[0] == 1 and 0 not in left and store.add("said", 0) >= 2
    lines = capfd.readouterr().err.splitlines()
    assert lines[:2] == ["shardlib [rank 1] ends: rank 0 has raised SpecError: ids holds caf\\udce9",
                         f"shardlib [rank 1]   it is in collective 1 of {TP}: barrier"]
    assert (not [line for line in lines if "[rank 0]" in line]
            and dog.board.read((0, 1))[0].note == "has raised SpecError: ids holds caf\\udce9")


def test_each_thread_is_in_a_collective_of_its_own(capfd: pytest.CaptureFixture[str]) -> None:
    """The one that fails is the one that is reported; the oldest is the one that is waited for."""
    dog = watchdog(dist.HashStore())
    mine, other = dog.watch.seat("tp", (0, 1)), dog.watch.seat("dp", (0, 1))
    dog.watch.begin(mine, "barrier")
    errors: list[str] = []
    waited_for: list[object] = []

    def fail() -> None:
        dog.watch.begin(other, "all_reduce")
        waited_for.append(dog.watch.now[0])
        errors.append(str(dog.failed(RuntimeError("peer is gone"))))
        dog.watch.end()
    (thread := Thread(target=fail)).start()
    thread.join()
    assert waited_for == [mine]
    assert errors[0].startswith("failed in collective 1 of group dp (ranks 0 1): all_reduce: peer is gone\n")
    assert (Moment.of(dog.watch.now) == Moment.of(dog.watch.mine) and dog.watch.now[0] is mine
            and dog.watch.last[0] is other)
    dog.watch.end()
    dog.stop("")
    assert dog.watch.now is None


CHILDREN = """
import multiprocessing, os, signal, sys, threading, time, torch, torch.distributed as dist
from shardlib.distributed.watch import Watch
from shardlib.distributed.watchdog import Watchdog

dog = Watchdog(Watch(), dist.HashStore(), 0, 2, 8.0, torch.device("cpu"))
with multiprocessing.get_context("fork").Pool(2) as pool:           # ends its workers by SIGTERM
    print(pool.map(abs, [-1, 2]))
if (child := os.fork()) == 0:
    dog.stop("has ended")
    os._exit(0)
print(os.waitpid(child, 0)[1])
if (child := os.fork()) == 0:
    time.sleep(3600)
os.kill(child, signal.SIGTERM)
print(os.WTERMSIG(os.waitpid(child, 0)[1]))
time.sleep(1.0)
print(sorted(t.name for t in threading.enumerate() if "shardlib" in t.name))
dog.stop("has ended")
"""


def test_what_forked_children_do_and_suffer_is_theirs() -> None:
    assert script(CHILDREN)[:2] == (0, "[1, 2]\n0\n15\n['shardlib _guard', 'shardlib _watch']\n")


ASYNC = """
import asyncio, os, signal, time, torch, torch.distributed as dist
from shardlib.distributed.watch import Watch
from shardlib.distributed.watchdog import Watchdog

dog = Watchdog(Watch(), dist.HashStore(), 0, 2, 40.0, torch.device("cpu"))

async def serve():
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, print)

asyncio.run(serve())
print("served", flush=True)
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(30)
"""


def test_sigterm_ends_the_process_after_asyncio_has_had_the_signals() -> None:
    assert script(ASYNC) == (128 + signal.SIGTERM, "served\n", "")


UNREAD = """
import fcntl, os, sys, time, torch, torch.distributed as dist
from shardlib.distributed.watch import Watch
from shardlib.distributed.watchdog import Watchdog

read, write = os.pipe()
if sys.argv[1] == "full":
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
    os.write(write, b"x" * 4096)
else:
    os.close(read)
os.dup2(write, 2)
watch = Watch()
watch.begin(watch.seat("tp", (0, 1)), "barrier")
dog = Watchdog(watch, dist.HashStore(), 0, 1, 2.0, torch.device("cpu"))
time.sleep(30)
"""


@pytest.mark.parametrize("how", ["full", "closed"])
def test_a_stderr_that_nobody_reads_holds_nobody_up(how: str) -> None:
    """As a pager, or `2>&1 | head`, leaves it."""
    assert script(UNREAD, how)[:2] == (1, "")


LEAVES = """
import sys, time, torch, torch.distributed as dist
from shardlib.distributed.watch import Watch
from shardlib.distributed.watchdog import Watchdog

watch = Watch()
watch.begin(watch.seat("tp", (0, 1)), "barrier")
Watchdog(watch, dist.FileStore(sys.argv[1]), 0, 2, 8.0, torch.device("cpu"))._leave()
"""


def test_a_rank_that_has_ended_after_its_report_is_not_silent(tmp_path: Path) -> None:
    """One that reports later still reads in which collective it was."""
    assert script(LEAVES, str(tmp_path / "store"))[0] == 1
    state = Board(dist.FileStore(str(tmp_path / "store"))).read((0,))[0]
    assert state.left and str(state) == f"is in collective 1 of {TP}: barrier"


MUTE = """
import sys, time, torch
from shardlib.distributed.watch import Watch
from shardlib.distributed.watchdog import Watchdog

class Mute:
    def set(self, *_): time.sleep(3600)

watch = Watch()
watch.begin(watch.seat("tp", (0, 1)), "barrier", at="step 1 of f, m.py:1: N +tp -> N")
dog = Watchdog(watch, Mute(), 0, 2, float(sys.argv[1]), torch.device("cpu"))
print(dog.failed(RuntimeError("peer is gone"))) if len(sys.argv) > 2 else time.sleep(3600)
"""


def mute(*arguments: str) -> tuple[int, str, str]:
    """A rank in a collective, whose store takes what it is told and never answers."""
    return script(MUTE, *arguments)


def test_a_store_that_does_not_answer_holds_nobody_up() -> None:
    assert mute("1") == (1, "", (
        f"shardlib [rank 0] has waited 1 s in collective 1 of {TP}: barrier, at step 1 of f, m.py:1: N +tp "
        "-> N\n"
        "shardlib [rank 0]   the store does not answer\n"))


@pytest.mark.parametrize("asked, leaving, ends", [(None, False, 38), (0.0, False, 30), (None, True, 40)])
def test_a_rank_that_is_cut_off_from_its_store_ends_sooner(asked: float | None, leaving: bool, ends: int,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 40 s: when the store has not answered since `asked`, as soon as a thread that could ask it would
    have judged; else after that one. Where it has reported, and waits for the others to, nothing is said
    again."""
    clock, said = [0.0], []
    monkeypatch.setattr(watchdog_module, "monotonic", lambda: clock[0])
    monkeypatch.setattr(watchdog_module.os, "_exit", lambda status: clock.append(status))
    watch = SimpleNamespace(now=(Seat("tp", [0, 1]), 1, "barrier", None, None, -1, None, None, 0.0))

    def waits(tick: float) -> bool:
        """A second passes; true, the watchdog is stopped, once the process has ended."""
        clock[0] += 1.0
        return len(clock) > 1
    dog = SimpleNamespace(_stopped=SimpleNamespace(wait=waits), tick_s=1.0, watch=watch,
                          board=SimpleNamespace(asked=asked),
                          timeout_s=40.0, limit_s=30.0, _tell_alone=said.append, device=torch.device("cpu"),
                          _leaving=leaving)
    Watchdog._guard(dog)
    assert said == ([] if leaving else [f"has waited {ends + 1} s in collective 1 of {TP}: barrier"])
    assert clock == [ends + 2, 1]


def test_what_failed_is_said_without_the_store() -> None:
    """On stderr at once, and in the error, which a command may keep to itself since
    the watchdog has said it."""
    lines = [f"failed in collective 1 of {TP}: barrier, at step 1 of f, m.py:1: N +tp -> N: peer is gone",
             "  the store does not answer"]
    assert mute("8", "fails") == (0, "\n".join(lines) + "\n",
                                  "".join(f"shardlib [rank 0] {line}\n" for line in lines))


def test_generated_code_says_where_in_the_plan_it_is() -> None:
    @sharded("M N/tp -> M/tp N")
    def turned(x):
        x = reshard("M N/tp -> M N", x)
        return reshard("M N -> M/tp N", reshard("M N -> M N", x))
    mesh = Mesh(tp=2)
    e = Emitter(mesh, 0, {"M": 4, "N": 4})
    source = e.program(lower(turned, Layout(), mesh=mesh, passes=()))
    assert source == ("def main(a0):\n    v1 = g0.all_gather(a0, 1, (2, 2), at=s1)\n"
                      "    v1 = v1.narrow(0, 0, 2)\n    return (v1,)\n")
    line = turned.fn.__code__.co_firstlineno + 2
    assert {n: str(s)
            for n, s in e.plan.items()} == {"s1": f"step 1 of turned, test_watchdog.py:{line}: M N/tp -> M N"}


def test_plans_of_different_lengths() -> None:
    assert (different_plans("f", ["a\nb\n", "a\nb\nc\n", "a\nb\n"])
            == ("f: the ranks have different plans, first in line 3\n"
                "  ranks 0 2   (nothing)\n  rank 1      c\n"
                "compile the same function with the same layout, mesh, sizes and dtypes on every rank"))


def test_the_time_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARDLIB_TIMEOUT_S", "soon")
    with pytest.raises(SpecError, match="^SHARDLIB_TIMEOUT_S is 'soon'; it is a number of seconds$"):
        connect(Mesh(), "cpu")
    assert connect(Mesh(), "cpu", timeout_s=5.0).rank == 0
    assert Seat("tp", [0, 1]).ranks == (0, 1)
