"""Captured steps on GPUs: tokens and results of replays are those of eager calls;
a replay that waits is reported as one."""
from __future__ import annotations

import re
from pathlib import Path

import pytest
from gpus import finished, torchrun

WORKER = str(Path(__file__).parent / "captured_worker.py")


@pytest.mark.parametrize("mesh, dtype", [
    ("tp=1", "bfloat16"), ("tp=2", "float32"), ("tp=2", "bfloat16"), ("tp=2", "float16"), ("dp=2", "float32"),
    ("tp=4", "bfloat16"), ("dp=2,tp=2", "float32")])
def test_captured_tokens_are_the_eager_ones(mesh: str, dtype: str) -> None:
    assert f"tokens {mesh} {dtype}: equal" in ranks(mesh, "tokens", dtype)


@pytest.mark.parametrize("mesh, dtype", [("tp=1", "bfloat16"), ("tp=2", "float16"), ("tp=4", "bfloat16")])
def test_captured_tokens_of_experts_are_the_eager_ones(mesh: str, dtype: str) -> None:
    """Of a Mixtral, its experts split by width and one by one."""
    assert f"experts {mesh} {dtype}: equal" in ranks(mesh, "experts", dtype)


@pytest.mark.parametrize("mesh", ["tp=1", "tp=2", "tp=4"])
def test_replays_and_eager_calls_take_turns(mesh: str) -> None:
    assert f"calls {mesh} bfloat16: equal" in ranks(mesh, "calls", "bfloat16")


def test_ranks_that_are_late() -> None:
    assert "stragglers tp=2 bfloat16: equal" in ranks("tp=2", "stragglers", "bfloat16")


def test_a_replay_that_a_rank_never_comes_to() -> None:
    done = finished(2, WORKER, "silent", "tp=2", "bfloat16")
    said = [line for line in done.stderr.splitlines() if line.startswith("shardlib [rank 0]")]
    assert done.returncode == 1, done.stderr
    assert re.search(r"has waited \d+ s in replay (\d+) of next_token, 8 rows of 64 \(ranks 0 1\)",
                     said[0]), said
    assert re.search(r"rank 1 is in no collective; its last was replay \d+ of next_token, 8 rows of 64 "
                     r"\(ranks 0 1\)", said[1]), said


def ranks(mesh: str, what: str, dtype: str) -> str:
    count = 1
    for part in mesh.split(","):
        count *= int(part.partition("=")[2])
    return torchrun(count, WORKER, what, mesh, dtype)
