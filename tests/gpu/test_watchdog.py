"""The watchdog sees a GPU that does not come past a collective, long after the call has returned;
NVLink says what its kernel waits for."""
from __future__ import annotations

import re
from pathlib import Path

import pytest
from gpus import finished

from shardlib.ops.nvlink_report import not_come

TP = "group tp (ranks 0 1)"
CALLED = f"collective 2 of {TP}: all_reduce sum of 4 float32, at step 1 of f, model.py:2: N +tp -> N"


@pytest.mark.parametrize("stream", ["default", "side"])
def test_a_collective_that_a_rank_never_comes_to(stream: str) -> None:
    done = finished(2, Path(__file__).with_name("watchdog_worker.py"), stream)
    said = sorted(re.sub(r"has waited \d+ s", "has waited N s", line) for line in done.stderr.splitlines()
                  if line.startswith("shardlib ["))
    assert done.returncode == 1 and done.stdout == "rank 0 has queued it\n", done.stderr
    assert said == sorted([
        f"shardlib [rank 0] has waited N s in {CALLED}",
        f"shardlib [rank 0]   NVLink over tp: {not_come(1, 4, 4, 'words', 0, 'quad 0')}",
        (f"shardlib [rank 0]   rank 1 is in no collective; its last was collective 1 of {TP}: all_reduce sum "
         "of 4 float32"),
        (f"shardlib [rank 1] ends: it is in no collective; its last was collective 1 of {TP}: all_reduce sum "
         "of 4 float32"),
        f"shardlib [rank 1]   rank 0 is in {CALLED}"])
