"""Fixtures for tests on real ranks. Test modules of this folder may import its other files by name."""
from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Iterator

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from family import ours  # noqa: E402
from pool import Pool  # noqa: E402

from shardlib.distributed import segment  # noqa: E402


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Up to four processes on gloo."""
    with Pool(4) as pool:
        yield pool


@pytest.fixture
def nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Names in /dev/shm are this process's and its children's own during the test, and none is there at its end."""
    monkeypatch.setattr(segment, "PREFIX", f"shardlib-test-{os.getpid()}-")
    yield
    assert ours() == []
