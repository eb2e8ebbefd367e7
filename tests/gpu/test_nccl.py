"""Llama on NCCL under torchrun: every layout gives the logits, gradients and tokens of one CPU process."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gpus import torchrun

HERE = Path(__file__).parent
TWO = [("tp=2", "tp"), ("tp=2", "tp+sp"), ("dp=2", "tp+fsdp"), ("cp=2", "cp")]
FOUR = [("tp=4", "tp"), ("tk=2,tg=2", "tp+sp"), ("dp=2,tp=2", "tp+sp+fsdp")]


@pytest.mark.parametrize("mesh, layout", TWO + FOUR)
def test_llama_equals_one_process(mesh, layout):
    ranks = 4 if (mesh, layout) in FOUR else 2
    assert f"equal on {mesh} {layout}" in torchrun(ranks, str(HERE / "llama_worker.py"), mesh, layout)


@pytest.mark.parametrize("how", ([], ["bound"]), ids=("its own", "bound"))
def test_the_conformance_kit_passes_on_nccl(how: list[str]):
    """Bound: beside a default group that somebody has bound to a GPU, off which torch splits all others."""
    ranks = 4 if torch.cuda.device_count() >= 4 else 2
    mesh = "dp=2,tp=2" if ranks == 4 else "tp=2"
    torchrun(ranks, HERE.parent / "helpers" / "torchrun_conformance.py", mesh, "cuda", *how)
