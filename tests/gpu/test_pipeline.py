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


@pytest.mark.parametrize("mesh, layout", (("pp=2", "L=pp"), ("pp=4", "L=pp"),
                                          ("pp=2,tp=2", "L=pp,K=tp,F=tp,V=tp"), ("dp=2,pp=2", "B=dp,L=pp")))
def test_groups_of_rows_say_the_tokens_of_one_process(mesh: str, layout: str) -> None:
    ranks = 2 if mesh == "pp=2" else 4
    assert f"tokens equal on {mesh}" in torchrun(ranks, str(HERE / "row_groups_worker.py"), mesh, layout)
