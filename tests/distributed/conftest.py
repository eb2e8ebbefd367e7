"""Fixtures for tests on real ranks. Test modules of this folder may import its other files by name."""
from __future__ import annotations

import sys
from pathlib import Path
from typing import Iterator

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from pool import Pool  # noqa: E402


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Up to four processes on gloo."""
    with Pool(4) as pool:
        yield pool
