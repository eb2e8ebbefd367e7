"""Collectives on GPUs are right wherever they are called:
in threads, in inference mode, with other defaults."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_nccl import torchrun


def test_nothing_is_wrong() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs 2 GPUs, this machine has {torch.cuda.device_count()}")
    torchrun(2, str(Path(__file__).with_name("surroundings_worker.py")))
