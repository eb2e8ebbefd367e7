"""Kernels of few rows on GPUs: against float64 and sums in rank order, at random sizes,
eager and in graphs."""
from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from gpus import torchrun

WORKER = str(Path(__file__).parent / "kernels_worker.py")


def test_one_gpu() -> None:
    done = subprocess.run([sys.executable, WORKER, "one_gpu", "240"], capture_output=True, text=True,
                          timeout=300)
    assert (done.returncode == 0
            and "one_gpu 240: 0 wrong" in done.stdout), done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.parametrize("ranks", (2, 3, 4))
def test_sums_with_norms(ranks: int) -> None:
    assert f"norms 10000 on tp={ranks}: 0 wrong" in torchrun(ranks, WORKER, "norms", "10000")
