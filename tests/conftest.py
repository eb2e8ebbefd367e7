"""Hypothesis without a deadline; in CI (the variable CI is set) the same examples every time.

HYPOTHESIS_PROFILE=more draws 25 times as many; counts of a test's own are multiples of the profile's.

Files that take longest come first, so that of two processes neither is left alone with one at the end.

Tests may import what is in helpers/ by name. Where there is no GPU, kernels run in Triton's interpreter:
Triton decides that once, when it is first imported.

The store of torch.distributed looks up the name of each process that connects to it, and answers nobody
meanwhile. A name server that loses a packet would cost 10 s: more than tests of deadlines wait. With the
options below it costs 1 s."""
from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).resolve().parent / "helpers"))

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")

import quick_interpreter  # noqa: E402
from fake_cuda import Cuda  # noqa: E402

from shardlib.distributed.graph_capture import capture_stream  # noqa: E402

if os.environ.get("TRITON_INTERPRET") == "1":
    quick_interpreter.install()
LONGEST = ("test_rules_oracle", "test_protocols", "test_generate", "test_conformance", "test_compiled",
           "test_programs", "test_faults", "test_two_hosts", "test_gallery", "test_totality", "test_watchdog",
           "test_security", "test_planner", "test_gradients", "test_llama", "test_fused_step",
           "test_weights_checkpoint", "test_weights_load", "test_calibrate", "test_shared_memory",
           "test_interpreted", "test_mutants", "test_packaging", "test_errors", "test_mixtral")
COMMON = dict(deadline=None, report_multiple_bugs=False, print_blob=True, suppress_health_check=[
    HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large])
settings.register_profile("default", max_examples=40, **COMMON)
SAME = {**COMMON, "derandomize": True, "database": None, "print_blob": False}
settings.register_profile("ci", max_examples=40, **SAME)         # the same ones each time
settings.register_profile("same", max_examples=100, **SAME)      # what mutants are held against
settings.register_profile("more", max_examples=1000, **COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "default"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With --no-loadscope-reorder: else xdist puts the files with the fewest tests last."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For tests of many tiny tensors: more threads only make them slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cuda]:
    """In place of CUDA; none of its streams is left behind."""
    capture_stream.cache_clear()
    yield Cuda(monkeypatch)
    capture_stream.cache_clear()
