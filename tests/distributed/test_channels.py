"""Messages over channels come in every schedule, though each communicator does what its two ends ask for in
the order in which they asked; over fewer communicators they do not."""
from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from shardlib import SpecError
from shardlib.distributed.channels import Channels, Parcel
from shardlib.distributed.communicators.torch_distributed import TorchDistributed
from shardlib.distributed.mail import by_number
from shardlib.schedules.generators import gpipe, interleaved, one_f_one_b, zbv, zero_bubble
from shardlib.schedules.schedule import Action, Schedule
from shardlib.schedules.waits import Edge, messages


class Recorded:
    """A communicator that writes down what is asked of it: (what, the channel, the message)."""

    def __init__(self, log: list[tuple], name: Hashable) -> None:
        self.log, self.name, self.asked = log, name, 0

    def post(self, x: torch.Tensor, to: int) -> Any:
        self.log.append(("send", self.name, x.item()))
        return self._work(x.item())

    def expect(self, count: int, dtype: torch.dtype, device: Any, source: int) -> tuple[Any, torch.Tensor]:
        self.log.append(("recv", self.name, None))
        self.asked += 1
        return self._work(self.asked), torch.zeros(count, dtype=dtype)

    def _work(self, nth: int) -> Any:
        return SimpleNamespace(is_completed=lambda: False,
                               wait=lambda: self.log.append(("wait", self.name, nth)))


def passed(name: str, peer: int, dtype: Any, count: int, call: Callable, *args: Any, at: object) -> Any:
    return call(*args)


GROUP = SimpleNamespace(device=torch.device("cpu"), passed=passed)
Log = list[tuple[str, Hashable, int | None]]


def channels_of(schedule: Schedule, log: Log) -> tuple[Channels, dict[Action, int]]:
    """Those of all stages; the number of each message."""
    edges = messages(schedule)
    number = {sender: 1000 * i + n for i, sent in enumerate(edges.values(), 1)
              for n, (sender, _) in enumerate(_posted(schedule, sent), 1)}
    return Channels(GROUP, {edge: Recorded(log, edge) for edge in edges}, {
        edge: [Parcel(number[sender], (1,), torch.int64) for sender, _ in _posted(schedule, sent)]
        for edge, sent in edges.items()}), number


def _posted(schedule: Schedule, sent: list[tuple[Action, Action]]) -> list[tuple[Action, Action]]:
    return sorted(sent, key=lambda pair: schedule.ranks[schedule.rank_of[pair[0].stage]].index(pair[0]))


def logs(schedule: Schedule) -> list[Log]:
    """What each rank asks of its communicators, in order."""
    found = []
    for actions in schedule.ranks:
        log: Log = []
        channels, number = channels_of(schedule, log)
        for action in actions:
            for source in schedule.before(action):
                if action.stage in schedule.sends(source):
                    channels.take((1,), torch.int64, 0, number[source])
            for _ in schedule.sends(action):
                channels.post(torch.tensor([number[action] % 1000]), 1, number[action])
        found.append(log)
    return found


def left(ranks: list[Log], lane: Callable[[Edge], Hashable]) -> int:
    """How many ranks do not come to their end, where the channels of one `lane` share a communicator: the
    first call that each end has made of it is done when these two meet."""
    at, done = [0] * len(ranks), set()
    asked: dict[tuple[int, Hashable], deque] = {}
    count: dict[tuple[int, Edge, str], int] = {}
    moved = True
    while moved:
        moved = False
        for rank, log in enumerate(ranks):
            while at[rank] < len(log):
                what, edge, nth = log[at[rank]]
                if what == "wait" and (edge, nth) not in done:
                    break
                if what != "wait":
                    count[rank, edge, what] = n = count.get((rank, edge, what), 0) + 1
                    asked.setdefault((rank, lane(edge)), deque()).append((what, edge, n))
                at[rank], moved = at[rank] + 1, True
        for (rank, name), queue in asked.items():
            for (other, same), theirs in asked.items():
                if same == name and other != rank and queue and theirs and (
                        queue[0][0], theirs[0][0]) == ("send", "recv") and queue[0][1:] == theirs[0][1:]:
                    done.add(queue.popleft()[1:])
                    theirs.popleft()
                    moved = True
    return sum(n < len(log) for n, log in zip(at, ranks))


OWN = Schedule.parse("0F0 0F1 0F2 0B2 0B0 0B1\n1F2 1F0 1F1 1B1 1B0 1B2")        # taken in another order
ALL = (OWN, gpipe(3, 4), one_f_one_b(2, 4), one_f_one_b(4, 8), interleaved(2, 4, 2), interleaved(4, 8, 2),
       zero_bubble(3, 5), zbv(2, 4), zbv(4, 8))


def test_a_channel_for_each_two_stages_is_what_it_takes() -> None:
    """With one for each rank all wait forever where forward and backward take turns; with one for each two
    ranks and direction they do in ZBV, of which two ranks have two such edges."""
    def stuck(lane: Callable[[Schedule, Edge], Hashable]) -> list[int]:
        return [left(logs(schedule), lambda edge: lane(schedule, edge)) for schedule in ALL]

    assert stuck(lambda schedule, edge: edge) == [0] * len(ALL)
    assert stuck(lambda schedule, edge: "all") == [0, 0, 2, 4, 2, 4, 3, 2, 4]
    assert stuck(lambda schedule, edge: tuple(map(schedule.rank_of.get, edge))) == [0] * 7 + [2, 4]


def test_what_comes_before_is_kept() -> None:
    """The second message is wanted first; the third has no elements, and is not sent. Then a round more."""
    log: Log = []
    parcels = [Parcel(5, (2,), torch.float32), Parcel(6, (), torch.int64), Parcel(7, (0, 3), torch.float32)]
    channels = Channels(GROUP, {"a": Recorded(log, "a")}, {"a": parcels})
    for _ in range(2):
        assert channels.take((), torch.int64, 0, 6).shape == ()
        assert channels.take((0, 3), torch.float32, 0, 7).shape == (0, 3)
        assert channels.take((2,), torch.float32, 0, 5).shape == (2,)
        channels.wait()
    assert [what for what, *_ in log] == ["recv", "recv", "wait", "wait"] * 2
    assert [nth for what, _, nth in log if what == "wait"] == [2, 1, 4, 3]


def test_a_message_out_of_turn_is_refused() -> None:
    parcels = [Parcel(5, (2,), torch.float32), Parcel(6, (2,), torch.float32)]
    channels = Channels(GROUP, {}, {(0, 1): parcels})
    with pytest.raises(SpecError) as refused:
        channels.post(torch.zeros(2), 1, 6)
    assert str(refused.value) == ("channel (0, 1): message 6, torch.float32 of (2,), is posted; the next is "
                                  "5, torch.float32 of (2,)")


def test_numbers_are_for_the_device_of_the_group() -> None:
    """A group on GPUs has gloo, too, for what is on the CPU: it does not carry what is on a GPU."""
    gloo = TorchDistributed.__new__(TorchDistributed)
    gloo.posts, gloo.device = True, "cpu"
    assert by_number(SimpleNamespace(device=torch.device("cpu"), communicators=[gloo])) is gloo
    assert by_number(SimpleNamespace(device=torch.device("cuda", 0), communicators=[gloo])) is None


def test_the_watchdog_is_told_of_what_the_gpu_waits_for() -> None:
    channels = Channels(SimpleNamespace(device=torch.device("cuda", 0), passed=passed), {}, {})
    assert channels.report() is None
    over = [True, False, False]
    channels._taken = [(SimpleNamespace(is_completed=lambda i=i: over[i]),
                        f"stage 1, microbatch {i}, forward") for i in range(3)]
    assert channels.report() == "the GPU waits for a message, at stage 1, microbatch 1, forward"
