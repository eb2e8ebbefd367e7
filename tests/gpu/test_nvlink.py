"""The communicator over NVLink: the conformance kit, and long random runs, eager and in graphs, on two channels at once."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_nccl import torchrun

WORKER = str(Path(__file__).parent / "nvlink_worker.py")
COUNTS = (2, 3, 4)


@pytest.mark.parametrize("ranks", COUNTS)
@pytest.mark.parametrize("what", ["conformance", "stress 20000"])
def test_nothing_is_wrong(ranks: int, what: str) -> None:
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs, this machine has {torch.cuda.device_count()}")
    assert f"{what} on tp={ranks}: 0 wrong" in torchrun(ranks, WORKER, *what.split())
