"""dp ranks that steps couple, some without a token: none waits for good, and one that leaves its step out is
named. `make idle` takes 1,000 steps."""
from __future__ import annotations

import re

from here import HELPERS
from launching import ranks

WORKER = HELPERS / "idle_worker.py"


def test_idle_ranks_come_to_every_step() -> None:
    done = ranks(3, [WORKER, "30"])
    assert (done.returncode, done.stderr) == (0, "")
    found = re.findall(r"rank (\d): 30 steps, idle in (\d+)", done.stdout)
    assert sorted(rank for rank, _ in found) == ["0", "1", "2"] and all(int(n) > 3 for _, n in found)


def test_a_rank_that_leaves_out_its_idle_step_is_named() -> None:
    """No rank has a token in it; the others wait in its first collective, and say for whom."""
    done = ranks(2, [WORKER, "9", "3"])
    assert done.returncode != 0 and done.stdout == ""
    group = r"collective \d+ of group dp \(ranks 0 1\): all_gather"
    assert re.search(rf"\[rank 0\] has waited \d+ s in {group} .*, at step 1 of experts", done.stderr)
    assert "shardlib [rank 0]   rank 1 is in no collective; its last was " in done.stderr
