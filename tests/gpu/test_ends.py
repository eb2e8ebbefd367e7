"""The ends of a step on one GPU: see ends_worker.py."""
from __future__ import annotations

import subprocess
import sys
from pathlib import Path

WORKER = str(Path(__file__).parent / "ends_worker.py")


def test_ends_of_a_step() -> None:
    done = subprocess.run([sys.executable, WORKER, "90"], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and "ends 90: 0 wrong" in done.stdout, done.stdout + done.stderr[-4000:]
