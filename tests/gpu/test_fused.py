"""A decoding step by kernels, teacher-forced: its logits are within twice the error of the bodies, and the
token is theirs where the two best differ by more."""
from __future__ import annotations

from pathlib import Path

import pytest
from gpus import torchrun

WORKER = str(Path(__file__).parent / "fused_worker.py")


@pytest.mark.parametrize("mesh, dtype", [("tp=1", "bfloat16"), ("tp=2", "float16"), ("tp=2", "bfloat16"),
                                         ("tp=3", "bfloat16"), ("tp=4", "bfloat16")])
def test_fused_steps_give_the_logits_of_their_bodies(mesh: str, dtype: str) -> None:
    count = int(mesh.partition("=")[2])
    said = torchrun(count, WORKER, mesh, dtype)
    for rows in (1, 3, 8, 32, 40):
        (line,) = (line for line in said.splitlines()
                   if line.startswith(f"logits {mesh} {dtype} {rows} rows:"))
        assert "by kernels all_reduce_add_rms_norm; cached_attention" in line
        assert "gate_up" in line and ("matmul" in line) == (rows <= 32), line
