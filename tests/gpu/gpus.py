"""Processes of a GPU each, on a port of their own; none outlives its test."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch
from launching import Finished
from launching import torchrun as launched


def finished(count: int, *command: str | Path, deadline_s: float = 120) -> Finished:
    """What `count` processes print, and how they end."""
    if torch.cuda.device_count() < count:
        pytest.skip(f"needs {count} GPUs, this machine has {torch.cuda.device_count()}")
    return launched(count, command, deadline_s, OMP_NUM_THREADS="2", NCCL_NVLS_ENABLE="0")


def torchrun(count: int, *command: str | Path) -> str:
    """What they print, where they end well."""
    done = finished(count, *command, deadline_s=240)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout
