"""The fault matrix: whatever one rank does wrong, all workers end in time, with a report that names it;
and nothing is left of them.

Real processes under torchrun's agent, over gloo and over shared memory: see `fault_cases` for what each rank
does.
"""
from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fault_cases import CASES
from faults import Launcher, Outcome, shared

AT_ONCE = 3
TP = "group tp (ranks 0 1 2)"
TURN = "all_to_all of 12 float32, at step 1 of turn, fault_cases.py:N: M N/tp -> M/tp N"
COLLECT = "all_gather of 36 float32, at step 1 of collect, fault_cases.py:N: M/tp N -> M N"
IDLE = f"is in no collective; its last was collective 2 of {TP}: barrier"
SILENT = "is silent: it was killed, stopped or cut off; when last heard of it was"


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher]:
    with Launcher() as launcher:
        yield launcher


@pytest.fixture(scope="module")
def outcomes(launcher: Launcher,
             tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome | BaseException]:
    """All cases, some at once, since most of them only wait."""
    folder, before = tmp_path_factory.mktemp("faults"), shared()

    def outcome(case: str) -> Outcome | BaseException:
        try:
            return launcher.start(case, folder / case).outcome()
        except AssertionError as error:
            return error
    with ThreadPoolExecutor(AT_ONCE) as pool:
        cases = [case for case in CASES if case != "no_watchdog"]
        found = dict(zip(cases, pool.map(outcome, cases), strict=True))
    assert shared() == before
    return found


def report(rank: int, *lines: str) -> str:
    return "\n".join(f"shardlib [rank {rank}] {line}" for line in lines)


def raised(kind: str, *lines: str) -> str:
    return "\n".join([f"raised {kind}: {lines[0]}", *lines[1:]])


WAITS = f"waits in collective 3 of {TP}: "
IN_TURN, IN_COLLECT = f"is in collective 3 of {TP}: {TURN}", f"is in collective 3 of {TP}: {COLLECT}"
COMPARE = "collective 5 of group job (ranks 0 1 2): compare plans of turn"
PAIR = "all_to_all of 8 float32, at step 1 of turn, fault_cases.py:N: M N/tp -> M/tp N"
DIFFER = f"collective 3 of {TP}: its ranks do not call the same"
SAME = "compile the same function with the same layout, mesh, sizes and dtypes on every rank"


def everywhere(text: str) -> tuple[str, ...]:
    return (text,) * 3


def stopped(call: str) -> tuple[str, ...]:
    """Rank 1 was stopped in the collective that rank 2 has not come to."""
    silent = f"  rank 1 {SILENT} in collective 3 of {TP}: {call}"
    return (report(0, WAITS + call, silent, f"  rank 2 {IDLE}"), "",
            report(2, f"ends: it {IDLE}", f"  rank 0 is in collective 3 of {TP}: {call}", silent))


LABEL = "cross_entropy: labels holds 7, outside of 0 to 4 (N=5)          fault_cases.py:N"


def ended(rank: int) -> str:
    """What a rank says that another one's bad label has ended."""
    return report(rank, f"ends: rank 1 has raised SpecError: {LABEL}",
                  f"  it is in collective 4 of {TP}: all_gather of 6 float32, at step 1 of losses, "
                  "fault_cases.py:N: M/tp -> M")


PP = "group pp (ranks 0 1 2)"
PP_IDLE = f"is in no collective; its last was collective 2 of {PP}: barrier"


def stage(rank: int, peer: int, doing: str) -> str:
    """What a stage of the second call waits for, in its first microbatch."""
    return (f"recv of 2 float32 from rank {peer} in {PP}, at total_and_grad, call 2, stage {rank}, "
            f"microbatch 0, {doing}")


def turn(target: int, source: int, count: int) -> str:
    """What a stage waits for in the first turn of the first of two calls."""
    return (f"recv of {count} float32 from rank {source} in {PP}, at turn 0 of group 0, from stage {source} "
            f"to {target}")


NO_TURN = f"is in no collective; its last was collective 1 of {PP}: barrier"


EXPECTED = {
    "stage_missing": (
        report(0, f"waits in {stage(0, 1, 'backward')}", f"  rank 1 {PP_IDLE}"),
        report(1, f"ends: it {PP_IDLE}", f"  rank 0 is in {stage(0, 1, 'backward')}",
               f"  rank 2 is in {stage(2, 1, 'forward')}"),
        report(2, f"waits in {stage(2, 1, 'forward')}", f"  rank 1 {PP_IDLE}")),
    "stage_late_in_turns": ("", "", ""),
    "stage_missing_in_turns": (
        report(0, f"waits in {turn(0, 2, 1)}", f"  rank 2 is in {turn(2, 1, 8)}"),
        report(1, f"ends: it {NO_TURN}", f"  rank 0 is in {turn(0, 2, 1)}",
               f"  rank 2 is in {turn(2, 1, 8)}"),
        report(2, f"waits in {turn(2, 1, 8)}", f"  rank 1 {NO_TURN}")),
    "stage_stopped_in_turns": (
        report(0, f"ends: it {NO_TURN}", f"  rank 1 {SILENT} in {turn(1, 0, 8)}",
               f"  rank 2 is in {turn(2, 1, 8)}"), "",
        report(2, f"waits in {turn(2, 1, 8)}", f"  rank 1 {SILENT} in {turn(1, 0, 8)}")),
    "late": ("", "", ""),
    "missing": (report(0, WAITS + TURN, f"  rank 1 {IDLE}"),
                report(1, f"ends: it {IDLE}", f"  rank 0 {IN_TURN}", f"  rank 2 {IN_TURN}"),
                report(2, WAITS + TURN, f"  rank 1 {IDLE}")),
    "stopped": stopped(TURN),
    "stopped_in_memory": stopped(COLLECT),
    "bad_label": (ended(0), f"raised SpecError: {LABEL}", ended(2)),
    "wrong_group": (
        report(0, f"waits in collective 3 of group tp (ranks 0 1): {PAIR}",
               "  rank 1 is in collective 1 of group dp (ranks 1 3): all_to_all of float32"),
        report(1, "waits in collective 1 of group dp (ranks 1 3): all_to_all of float32",
               "  rank 3 is in collective 1 of group dp (ranks 1 3): barrier"),
        report(2, "waits in collective 1 of group dp (ranks 0 2): barrier",
               f"  rank 0 is in collective 3 of group tp (ranks 0 1): {PAIR}"),
        report(3, "waits in collective 1 of group dp (ranks 1 3): barrier",
               "  rank 1 is in collective 1 of group dp (ranks 1 3): all_to_all of float32")),
    "wrong_order": (
        report(0, f"{WAITS}all_to_all of float32",
               f"  rank 1 is in collective 3 of {TP}: all_gather of 6 float32"),
        report(1, f"{WAITS}all_gather of 6 float32",
               *(f"  rank {r} is in collective 3 of {TP}: all_to_all of float32" for r in (0, 2))),
        report(2, f"{WAITS}all_to_all of float32",
               f"  rank 1 is in collective 3 of {TP}: all_gather of 6 float32")),
    "checked_size": everywhere(raised("SpecError", DIFFER, "  ranks 0 2   all_reduce sum of float32 (4,)",
                                      "  rank 1      all_reduce sum of float32 (5,)")),
    "checked_order": everywhere(
        raised("SpecError", DIFFER, "  ranks 0 2   all_to_all of float32, even: False",
               "  rank 1      all_gather of float32 to (6,) along dim 0 by (2, 2, 2)")),
    "checked_step": everywhere(raised(
        "SpecError", DIFFER,
        "  ranks 0 2   all_reduce sum of float32 (4,), at step 1 of total, model.py:N: N +tp -> N",
        "  rank 1      all_reduce sum of float32 (4,), at step 2 of total, model.py:N: N +tp -> N")),
    "checked_pieces": everywhere(raised("SpecError", f"collective 3 of {TP}, all_to_all of float32, even: "
                                        "False: rank 1 sends 3 elements to rank 2, "
                                        "which expects 2")),
    "other_plan": everywhere(raised("SpecError", "turn: the ranks have different plans, first in line 2",
                                    "  ranks 0 2   sizes M=6 N=6", "  rank 1      sizes M=6 N=9", SAME)),
    "other_program": everywhere(raised("SpecError", "work: the ranks have different plans, first in line 4",
                                       '  ranks 0 2   @sharded("M N/tp -> M/tp N", layout=EXPLICIT)',
                                       '  rank 1      @sharded("M/tp N -> M N", layout=EXPLICIT)', SAME)),
    "no_plan": (report(0, f"waits in {COMPARE}", f"  rank 1 {IN_TURN}"),
                report(1, WAITS + TURN, f"  rank 0 is in {COMPARE}", f"  rank 2 is in {COMPARE}"),
                report(2, f"waits in {COMPARE}", f"  rank 1 {IN_TURN}")),
}


@pytest.mark.parametrize("case", EXPECTED)
def test_the_report(outcomes: dict[str, Outcome], case: str) -> None:
    assert outcomes[case] == Outcome(EXPECTED[case], (0, 1, 2) if "late" in case else ())


def test_a_rank_that_raises(outcomes: dict[str, Outcome]) -> None:
    """It says why itself; the others at once whose fault it is, unless torchrun was quicker to end them."""
    found = outcomes["raising"]
    failed = f"failed in collective 3 of {TP}: {TURN}: PEER LOST"
    assert found.well == () and found.said[1] == "raised ValueError: no such file"
    for rank in (0, 2):
        why = f"  rank 1 has raised ValueError: no such file; its last was collective 2 of {TP}: barrier"
        said = report(rank, failed, why)
        assert found.said[rank] in (said, f"{said}\n" + raised("RankError", failed, why),
                                    said.replace(failed, "was ended by its launcher (SIGTERM) in collective "
                                                 f"3 of {TP}: {TURN}"))


@pytest.mark.parametrize("case, call", [("killed", TURN), ("killed_in_memory", COLLECT)])
def test_a_rank_that_is_killed(outcomes: dict[str, Outcome], case: str, call: str) -> None:
    """Rank 0 waits for rank 2, and hears of rank 1's end from the launcher, or from whatever it waits on."""
    found = outcomes[case]
    assert found.well == () and found.said[1:] == ("", "")
    head, *lines = found.said[0].splitlines()
    assert head.removeprefix("shardlib [rank 0] ") in (
        f"was ended by its launcher (SIGTERM) in collective 3 of {TP}: {call}",
        f"failed in collective 3 of {TP}: {call}: PEER LOST",
        f"failed in collective 3 of {TP}: {call}: all_gather over tp: rank 1 has died or left")
    said = report(0, f"  rank 1 {SILENT} in collective 3 of {TP}: {call}", f"  rank 2 {IDLE}").splitlines()
    assert lines[:2] == said


def test_a_stage_that_is_killed_in_a_microbatch(outcomes: dict[str, Outcome]) -> None:
    """Rank 1 in its first backward; rank 0 waits for it, and hears of its end from gloo or the launcher."""
    found = outcomes["stage_killed"]
    assert found.well == () and found.said[1:] == ("", "")
    head, line, *_ = found.said[0].splitlines()
    where = stage(0, 1, "backward")
    assert head.removeprefix("shardlib [rank 0] ") in (
        f"failed in {where}: PEER LOST", f"was ended by its launcher (SIGTERM) in {where}")
    assert line == report(0, f"  rank 1 {SILENT} in {stage(1, 2, 'backward')}")


def test_wrong_sizes(outcomes: dict[str, Outcome]) -> None:
    """gloo ends the process that gets too much; the others name it.

    What gets too little sees nothing: that takes check=True.
    """
    found = outcomes["wrong_size"]
    assert found.well == () and found.said[1] == ""
    for rank in (0, 2):
        head, line, *_ = found.said[rank].splitlines()
        assert re.fullmatch(rf"shardlib \[rank {rank}\] (failed|was ended by its launcher \(SIGTERM\)) in "
                            rf"collective [34] of group tp .*", head)
        assert re.fullmatch(rf"shardlib \[rank {rank}\]   rank 1 is silent: .* it was in (no collective; its "
                            rf"last was )?collective [23] of group tp .*", line)


def test_the_harness_sees_a_job_that_hangs(launcher: Launcher, tmp_path: Path) -> None:
    """The negative control: with the watchdog asleep nothing ends the missing case,
    and the harness says so."""
    with pytest.raises(AssertionError) as seen:
        launcher.start("no_watchdog", tmp_path / "case").outcome(deadline_s=2.0)
    assert str(seen.value) == "no_watchdog: waited 2 s for its workers to end; ranks 0 1 are there"
