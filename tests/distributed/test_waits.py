"""What waits: how often it asks, and when it gives up, by a clock of the test; and frames cut in two."""
from __future__ import annotations

import itertools
from collections import deque
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from shardlib.distributed import board, frames, messages, rank_error
from shardlib.distributed.rank_error import wait_until
from shardlib.distributed.watch import Watch

YIELD_S = 2.0 ** -14


class Clock:
    """Stands still but where somebody sleeps, or yields the core: each time for a quarter of YIELD_S."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.naps, self.yields = 64.0, [], 0
        monkeypatch.setattr(rank_error, "time", SimpleNamespace(monotonic=lambda: self.now, sleep=self.sleep))
        monkeypatch.setattr(rank_error, "os", SimpleNamespace(sched_yield=self.sched_yield))
        monkeypatch.setattr(rank_error, "YIELD_S", YIELD_S)
        monkeypatch.setattr(board, "monotonic", lambda: self.now)
        monkeypatch.setattr(board, "sleep", self.sleep)

    def sleep(self, seconds: float) -> None:
        self.naps.append((self.now - 64.0, seconds))
        self.now += seconds

    def sched_yield(self) -> None:
        self.yields += 1
        self.now += YIELD_S / 4


def test_a_wait_yields_then_naps_and_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, looks = Clock(monkeypatch), []
    assert not wait_until(lambda: False, 0.5, lambda: looks.append(clock.now - 64.0))
    assert clock.yields == 4 and looks == [waited for waited, _ in clock.naps]
    assert 0.5 < clock.now - 64.0 <= 0.501 and YIELD_S <= looks[0] < 1.01 * YIELD_S
    assert [nap for _, nap in clock.naps] == [min(waited / 16, 1e-3) for waited in looks]
    assert {nap for waited, nap in clock.naps if waited > 0.017} == {1e-3}


@pytest.mark.parametrize("at", range(12))
def test_a_wait_ends_as_soon_as_it_may(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, asked = Clock(monkeypatch), itertools.count()
    assert wait_until(lambda: next(asked) >= at, 9.0)
    assert next(asked) == at + 1 and clock.yields == min(4, max(0, at - 1))
    assert len(clock.naps) == max(0, at - 1 - clock.yields)


def test_what_came_true_at_the_end_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked once more when the time is up."""
    clock, late = Clock(monkeypatch), []

    def ready() -> bool:
        late.extend([clock.now] * (clock.now > 64.5))
        return len(late) == 2
    assert wait_until(ready, 0.5) and late[0] == late[1]


def test_what_looks_may_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch)

    def look() -> None:
        raise KeyError(7)
    with pytest.raises(KeyError):
        wait_until(lambda: False, 0.5, look)


@pytest.mark.parametrize("at", [0, 1, 5, 12, 13])
def test_a_board_is_asked_a_dozen_times(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, asked = Clock(monkeypatch), itertools.count()
    found = board.Board(dist.HashStore()).wait(lambda: "it" if next(asked) >= at else None, 12.0)
    assert clock.naps == [(float(i), 1.0) for i in range(min(at, 12))]
    assert found == ("it" if at <= 12 else None)


@pytest.mark.parametrize("more", [-messages.BLOCK, -1, 0, 1, 2 * messages.BLOCK])
def test_a_frame_travels_in_one_part_or_two(more: int) -> None:
    """The second is not sent where there is none: nobody would take it."""
    frame = messages.frame("x" * (messages.BLOCK - messages.HEAD - 3 + more if more > -messages.BLOCK else 0))
    sent: deque[torch.Tensor] = deque()

    def recv(count: int, dtype: torch.dtype, device: torch.device, source: int) -> torch.Tensor:
        assert (len(sent[0]), dtype, device, source) == (count, torch.uint8, torch.device("cpu"), 3)
        return sent.popleft()
    control = SimpleNamespace(send=lambda x, to: sent.append(x.clone()), recv=recv)
    frames.send(control, frame, 1)
    parts = [len(part) for part in sent]
    assert parts == [messages.BLOCK, *([len(frame) - messages.BLOCK] if len(frame) > messages.BLOCK else [])]
    assert messages.read(frames.recv(control, 3)) == messages.read(frame) and not sent


def test_replays_that_are_over_are_let_go_in_order() -> None:
    """Of those that the device has come past, up to the first that it has not."""
    watch, over = Watch(), set()
    seat = watch.replays("step", (0, 1))

    def launched() -> list[int]:
        number = seat.count
        watch.launch(seat, lambda: number in over)
        return [call[1] for call, _ in watch.launched]
    assert [launched() for _ in range(3)] == [[1], [1, 2], [1, 2, 3]] and watch.last is None
    over |= {0, 1, 3}
    assert launched() == [3, 4] and watch.last[1] == 2
    over.add(2)
    assert launched() == [5] and watch.last[1] == 4
