"""The launchers in real processes that share memory: the kernels interpreted,
the atomics those of the CPU."""
from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import triton
from here import HELPERS

DEADLINE_S = 240.0
OLD = (tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
       and tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4))


@pytest.mark.skipif(OLD, reason="the interpreter of Triton 3.6 runs no loops with numpy 2.4")
def test_two_and_three_processes(tmp_path: Path) -> None:
    """All kernels, several times each, with every dtype: right to the bit.

    Processes that wait for ever are ended.
    """
    worker = HELPERS / "interpreted_worker.py"
    process = subprocess.Popen([sys.executable, worker, tmp_path, "2", "3"],
                               env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        errors = process.communicate(timeout=DEADLINE_S)[1]
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    assert process.returncode == 0, errors
