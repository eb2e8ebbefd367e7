"""What a report says of a kernel that waits for a rank that never calls:
read off the arena, as the kernel itself has left it."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from trials import Call, data, workspaces

from shardlib.ops.nvlink_report import Reader, missing
from shardlib.triton_kernels.lamport import EMPTY
from shardlib.triton_kernels.simulator import Deadlock, Simulation

RANKS = (4, 7, 9)
pytestmark = pytest.mark.usefixtures("one_thread")


def report_of(call: Call, silent: int, calls_before: int) -> list[str]:
    """Of the first rank, where all have made `calls_before` calls of another size,
    and `silent` makes no more."""
    calls = [Call("one_shot", torch.float32, 1, 3, 1)] * calls_before + [call]
    world, xs = len(RANKS), data(calls, len(RANKS), 1)
    spaces = workspaces(world, max(c.slot_bytes(world) for c in calls))

    def rank(r: int) -> Callable[[], Any]:
        mine = list(zip(calls, xs))[:calls_before if r == silent else None]
        return lambda: [c.run(x[r], spaces[r]) for c, x in mine]
    with pytest.raises(Deadlock):
        Simulation(1).run([rank(r) for r in range(world)])
    return missing(spaces[0], Reader(torch.device("cpu")), RANKS)


@pytest.mark.parametrize("calls_before", (0, 2))
@pytest.mark.parametrize("silent", (1, 2))
@pytest.mark.parametrize("kernel, words, what", [
    ("one_shot", 160, "words"), ("reduce_scatter", 160, "words"), ("all_gather", 160, "words"),
    ("all_to_all", 160, "words"), ("two_shot", 56, "words of the pieces"), ("norm", 160, "words")])
def test_it_names_the_silent_rank(kernel: str, words: int, what: str, silent: int, calls_before: int) -> None:
    """Whatever has been called before."""
    text = "expects data and sees 0x7fff7fff"
    found = report_of(Call(kernel, torch.float32, 1, 40, 2, 32), silent, calls_before)
    assert found[0] == (
        f"of rank {RANKS[silent]}, {words} of {words} {what} have not come: block 0 waits for quad 0, {text}")
    lines = [
        f"of rank {RANKS[silent]}, 2 of 2 words of lines have not come: block 0 waits for line 0, {text}"]
    sums = [f"of rank {r}, {words} of {words} words of the sums have not come: block 0 waits for quad 0, "
            f"{text}" for r in RANKS[1:]]
    assert found[1:] == (sums if kernel == "two_shot" else lines if kernel in ("all_gather", "all_to_all")
                         else [])


def test_of_rows_it_knows_the_words_that_say_whether_they_come() -> None:
    """And which block waits for the first of them."""
    call, text = Call("dispatch_rows", torch.float32, 1, 40, 2), "expects data and sees 0x7fff7fff"
    assert report_of(call, 1, 1) == [
        f"of rank 7, 4 of 4 words of rows have not come: block 0 waits for part 0, {text}"]
    workspace = workspaces(3, call.slot_bytes(3))[0]
    workspace.state[5:] = torch.tensor([2, 0, 0, 2, 1])
    workspace.state[0] = 1
    workspace.arena[:16] = 1
    workspace.arena[11] = EMPTY.value
    assert missing(workspace, Reader(torch.device("cpu")), RANKS) == [
        f"of rank 9, 1 of 8 words of rows have not come: block 1 waits for part 3, {text}"]
