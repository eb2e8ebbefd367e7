"""Training as a pipeline over NCCL under torchrun: every schedule gives the gradients of one CPU process."""
from __future__ import annotations

from pathlib import Path

import pytest
from gpus import torchrun

HERE = Path(__file__).parent


@pytest.mark.parametrize("mesh", ("pp=2", "pp=4", "dp=2,pp=2", "pp=2,tp=2"))
def test_every_schedule_equals_one_process(mesh: str) -> None:
    ranks = 2 if mesh == "pp=2" else 4
    assert f"equal on {mesh}" in torchrun(ranks, str(HERE / "pipeline_worker.py"), mesh)
