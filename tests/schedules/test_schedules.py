"""Schedules: what one may be, the known ones, and that the proof says what running says."""
from __future__ import annotations

import random
import xml.etree.ElementTree as ET
from collections import Counter

import pytest

from shardlib import SpecError
from shardlib.schedules.clock import run
from shardlib.schedules.generators import decode, gpipe, interleaved, one_f_one_b, zbv, zero_bubble
from shardlib.schedules.schedule import Action, Schedule, schedule
from shardlib.schedules.timeline import svg
from shardlib.schedules.waits import messages, prove_schedule

TRAINING = {"gpipe": gpipe, "1f1b": one_f_one_b, "zero bubble": zero_bubble, "zbv": zbv,
            "interleaved": lambda p, m: interleaved(p, m * p, 2)}
COSTS = {"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0}


def drawn(rng: random.Random) -> Schedule:
    """A schedule whose lists follow some order in which all can be done, so that with room enough it ends."""
    ranks, chunks, batches = rng.choice((2, 3, 4)), rng.choice((1, 2)), rng.choice((1, 2, 4))
    stages, split, bias = ranks * chunks, rng.random() < 0.5, rng.random()
    lists: list[list[Action]] = [[] for _ in range(ranks)]
    ready = [Action(0, "F", m) for m in range(batches)]
    while ready:
        action = min(ready, key=lambda a: a.microbatch * bias + rng.random() * batches)
        ready.remove(action)
        lists[action.stage % ranks].append(action)
        s, kind, m = action
        back = "I" if split else "B"
        if kind == "F":
            ready.append(Action(s + 1, "F", m) if s + 1 < stages else Action(s, back, m))
        elif kind != "W":
            ready += [Action(s - 1, back, m)] if s else []
            ready += [Action(s, "W", m)] if split else []
    return schedule(lists)


def ends(found: Schedule, slots: dict, rng: random.Random) -> bool:
    """Whether ranks that are slow at random, in an order of service that is drawn, come to the end."""
    try:
        run(found, slots, delay=lambda a: rng.random() * 3, choose=rng.choice)
        return True
    except SpecError:
        return False


def proven(found: Schedule, slots: dict) -> bool:
    try:
        prove_schedule(found, slots)
        return True
    except SpecError:
        return False


def test_layers_are_said_in_the_first_line() -> None:
    cut = interleaved(2, 2, 2).cut(3, 0, 1, 4)
    assert Schedule.parse(str(cut)) == cut != interleaved(2, 2, 2)
    assert str(cut).startswith("layers 3 0 1 4\n0F0")
    for layers, said in (((3, 1), "3, 1; each of 4 stages has a number of them"),
                         ((1, 2, 3, -1), "1, 2, 3, -1; each of 4 stages has a number of them")):
        with pytest.raises(SpecError) as refused:
            cut.cut(*layers)
        assert str(refused.value) == f"schedule: layers are {said}"
    with pytest.raises(SpecError) as refused:
        Schedule.parse("layers 2 x\n0F0\n1F0")
    assert str(refused.value) == "schedule: 'x' is no number of layers"


def test_the_proof_says_what_running_says() -> None:
    """80 drawn schedules: with the slots that are named all end; with one or two an edge just those that are
    proven; with one less than named, where that is one, none."""
    rng, seen = random.Random(0), Counter()
    for _ in range(80):
        found = drawn(rng)
        slots = dict(prove_schedule(found).slots)
        assert ends(found, slots, rng)
        for n in (1, 2):
            few = dict.fromkeys(slots, n)
            assert proven(found, few) == ends(found, few, rng) == ends(found, few, rng)
            seen[n, proven(found, few)] += 1
        for edge in (e for e, n in slots.items() if n > 1):
            fewer = {**slots, edge: slots[edge] - 1}
            assert not proven(found, fewer) and not ends(found, fewer, rng)
            seen["one less"] += 1
    assert min(seen.values()) > 5, seen


@pytest.mark.parametrize("name", TRAINING)
def test_the_known_ones_end(name: str) -> None:
    rng = random.Random(1)
    for ranks in (1, 2, 3, 4):
        for batches in (1, 2, 3, 8):
            found = TRAINING[name](ranks, batches)
            assert Schedule.parse(str(found)) == found
            assert ends(found, dict(prove_schedule(found).slots), rng)


def test_what_is_idle_and_kept() -> None:
    """By the formulas of the papers: backward takes twice as long as forward, both of its parts as long."""
    for p, m in ((2, 4), (4, 8), (4, 16)):
        idle = {name: run(TRAINING[name](p, m), duration=COSTS.__getitem__) for name in TRAINING}
        assert idle["gpipe"].idle == pytest.approx((p - 1) / (m + p - 1)) == pytest.approx(idle["1f1b"].idle)
        assert idle["interleaved"].idle == pytest.approx((p - 1) / (2 * m * p + p - 1))
        best = (p - 1) / (3 * m + p - 1)
        assert idle["zbv"].idle < best <= idle["zero bubble"].idle + 1e-9 < 0.65 * idle["1f1b"].idle
        assert idle["gpipe"].kept == (m,) * p and idle["1f1b"].kept == tuple(range(p, 0, -1))
        assert max(idle["zero bubble"].kept) <= p and max(idle["zbv"].kept) <= 2 * p


def test_how_much_is_in_flight_interleaved() -> None:
    """By Megatron's formula: two more a stage that comes after, and a round for each further chunk."""
    assert run(interleaved(4, 8, 2)).kept == tuple((3 - rank) * 2 + 4 + 1 for rank in range(4))


def test_a_send_waits_for_its_slot() -> None:
    """The second message waits in its rank until the first one's slot is free, and holds up what follows."""
    found = Schedule.parse("0F0 0F1 0F2\n1F0 1F1 1F2")
    for n, start in ((1, 11.0), (2, 2.0)):
        made = run(found, {(0, 1): n}, delay=lambda a: 9.0 * a.stage)
        assert {s.action: s.start for s in made.spans}[Action(0, "F", 2)] == start and made.length == 31.0


def test_decoding_keeps_all_stages_busy() -> None:
    found = decode(4, 4, 16)
    made = run(found)
    assert made.idle == pytest.approx(3 / 67) and run(decode(4, 1, 16)).idle == pytest.approx(3 / 4)
    for stage in (0, 1, 2):                                             # the token, to all
        assert messages(found)[3, stage][-1 if stage == 2 else 0][1].stage == stage
    assert messages(found)[3, 0][0] == (Action(3, "F", 0), Action(0, "F", 4))
    assert ends(found, dict(prove_schedule(found).slots), random.Random(2))


def test_groups_that_end_leave_their_turns() -> None:
    """Drawn numbers of groups and steps: what is left ends, in the slots that are named, and in no fewer."""
    rng = random.Random(3)
    for _ in range(25):
        stages, groups = rng.choice((1, 2, 3, 4)), rng.choice((1, 2, 3, 5))
        found = decode(stages, groups, [rng.choice((1, 2, 3, 6)) for _ in range(groups)])
        slots = dict(prove_schedule(found).slots)
        assert ends(found, slots, rng) and ends(found, dict.fromkeys(slots, groups), rng)
        for edge in (e for e, n in slots.items() if n > 1):
            fewer = {**slots, edge: slots[edge] - 1}
            assert not proven(found, fewer) and not ends(found, fewer, rng)
    assert [*found.after].count(-1) == groups


@pytest.mark.parametrize("text, after", (("0F0 0F1", [-1]), ("0F0 0F1", [-1, 1]), ("0F0 0F1 0F2", [-1, 0, 0]),
                                         ("0F0 0F1 0B0 0B1", [-1, 0])))
def test_what_follows_what(text: str, after: list[int]) -> None:
    with pytest.raises(SpecError) as refused:
        Schedule.parse(text, after)
    assert str(refused.value) == ("schedule: after says of each microbatch of decoding which one it follows: "
                                  "an earlier one, that no other follows, or -1")


GOOD = "0F0 0F1 0B0 0B1\n1F0 1B0 1F1 1B1"


@pytest.mark.parametrize("text, says", (
    ("0F0 0F1 0B0 0B1\n1F0 1F1 1B0", "schedule: 1B1 is missing; each stage does F, B of every microbatch"),
    ("0F0 0F1 0B0 0B1\n1B0 1F1 1B1", "schedule: 1F0 is missing; each stage does F, B of every microbatch"),
    ("0F0 0F0 0B0\n1F0 1B0", "schedule: 0F0 comes twice"),
    ("0F0 1B0\n1F0 0B0", "schedule: stage 0 is on ranks 0 and 1; a stage is one rank's"),
    ("0F0 0B0 0W0", "schedule: its actions are F, B, W; they are F alone, F and B, or F, I and W"),
    ("0F0 0X0", "schedule: '0X0' is no action; one is a stage, F, B, I or W, and a microbatch, as in 2F0"),
    ("999999F0", "schedule: 0F0 is missing; each stage does F of every microbatch"),
    ("999999F999999", "schedule: 1000000 stages of 1000000 microbatches are too many"),
    ("# nothing", "schedule: it has 0 actions; from 1 to 1048576 are allowed"),
))
def test_what_is_no_schedule(text: str, says: str) -> None:
    assert str(Schedule.parse(GOOD)) == GOOD
    with pytest.raises(SpecError) as caught:
        Schedule.parse(text)
    assert str(caught.value) == says


def test_what_never_ends() -> None:
    """A pair that is swapped: back before forth on one rank, or two ranks that wait for each other."""
    for text, says in (("0F0 0B0\n1B0 1F0", "1F0 for 1B0 for 1F0"),
                       ("0F0 0B0 0F1 0B1\n1F1 1F0 1B0 1B1", "0B0 for 1B0 for 1F0 for 1F1 for 0F1 for 0B0")):
        found = Schedule.parse(text)
        with pytest.raises(SpecError) as caught:
            prove_schedule(found)
        assert str(caught.value) == f"schedule: its ranks wait for each other: {says}"
        with pytest.raises(SpecError, match="^schedule: its ranks wait for each other: rank 0 is at 0B0, "):
            run(found)


def test_a_picture() -> None:
    made = run(interleaved(2, 2, 2), duration=COSTS.__getitem__)
    picture = ET.fromstring(svg(made))
    boxes = [e for e in picture.iter() if e.tag.endswith("rect")]
    assert len(boxes) == 1 + len(made.spans) + 2 and "3.1" in "".join(picture.itertext())
    assert f"{made.idle:.1%} idle" in "".join(picture.itertext())


@pytest.mark.parametrize("make, given, message", [
    *((make, (wrong, 2, *rest), f"schedule: ranks is {wrong!r}; it is a whole number from 1 to 4096")
      for make, *rest in ((gpipe,), (one_f_one_b,), (interleaved, 2), (zero_bubble,), (zbv,))
      for wrong in (0, 4097, 2.0, True)),
    *((make, (2, wrong, *rest), f"schedule: microbatches is {wrong!r}; it is a whole number from 1 to 4096")
      for make, *rest in ((gpipe,), (one_f_one_b,), (interleaved, 2), (zero_bubble,), (zbv,))
      for wrong in (0, -1, 4097)),
    (interleaved, (2, 2, 0), "schedule: chunks is 0; it is a whole number from 1 to 4096"),
    (interleaved, (2, 3, 2), "interleaved: 3 microbatches are no rounds of 2, one a rank"),
    (interleaved, (4, 2, 2), "interleaved: 2 microbatches are no rounds of 4, one a rank")])
def test_what_generators_refuse(make: object, given: tuple, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        make(*given)
    assert str(caught.value) == message
