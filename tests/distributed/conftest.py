"""Fixtures for tests on real ranks."""
from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from family import ours
from pool import Pool

from shardlib.distributed import segment


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Up to four processes on gloo."""
    with Pool(4) as pool:
        yield pool


@pytest.fixture
def nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Names in /dev/shm are this process's and its children's own during the test,
    and none is there at its end."""
    monkeypatch.setattr(segment, "PREFIX", f"shardlib-test-{os.getpid()}-")
    yield
    assert ours() == []
