"""Tests of kernels without a GPU: in Triton's interpreter, which tests/conftest.py asks for."""
from __future__ import annotations

import os
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE):
            # of numpy, at sums of infinities
            item.add_marker(pytest.mark.filterwarnings("ignore::RuntimeWarning"))
            if os.environ.get("TRITON_INTERPRET") != "1" and item.path.stem != "test_compiled":
                item.add_marker(pytest.mark.skip(
                    reason="where there is a GPU, kernels are compiled: TRITON_INTERPRET=1 runs this"))
