"""Collectives on GPUs are right wherever they are called:
in threads, in inference mode, with other defaults."""
from __future__ import annotations

from pathlib import Path

from gpus import torchrun


def test_nothing_is_wrong() -> None:
    torchrun(2, str(Path(__file__).with_name("surroundings_worker.py")))
