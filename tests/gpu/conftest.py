"""Tests that need GPUs: skipped, with a reason, where there are fewer than two. They run against an installed
shardlib, `make test-gpu`: from a checkout, what its packages offer as entry points (NVLink) would be missing,
and nobody would notice."""
from __future__ import annotations

import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))


def pytest_collection_modifyitems(items) -> None:
    count = torch.cuda.device_count()
    if count >= 2 and not entry_points(group="shardlib.communicators"):
        raise pytest.UsageError(
            "tests/gpu: shardlib is not installed, so that connect finds no NVLink; run make test-gpu")
    if count < 2:
        for item in items:                              # the hook sees those of other folders, too
            if item.path.is_relative_to(Path(__file__).parent):
                item.add_marker(pytest.mark.skip(reason=f"needs 2 GPUs, this machine has {count}"))
