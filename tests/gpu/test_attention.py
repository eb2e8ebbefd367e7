"""torch's fused attention on a GPU, and what runs beside it: forward and gradient, against float64."""
from __future__ import annotations

import subprocess
import sys
from pathlib import Path

WORKER = str(Path(__file__).parent / "attention_worker.py")


def test_one_gpu() -> None:
    done = subprocess.run([sys.executable, WORKER, "300"], capture_output=True, text=True, timeout=300)
    assert (done.returncode == 0
            and "attention 300: 0 wrong" in done.stdout), done.stdout[-4000:] + done.stderr[-4000:]
