"""Direct NCCL under torchrun: the conformance kit, CUDA graphs, a storm of calls, tensors by name,
and the end of a group."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("nccl.bindings", reason="needs nccl4py: pip install 'shardlib[nccl]'")
WORKER = Path(__file__).parent / "nccl_direct_worker.py"


@pytest.mark.parametrize("ranks", (2, 4))
@pytest.mark.parametrize("what", (["conformance"], ["graphs"], ["stress", "4000"], ["tensors"], ["close"]),
                         ids=lambda what: what[0])
def test_nothing_is_wrong(what: list[str], ranks: int) -> None:
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs, this machine has {torch.cuda.device_count()}")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks),
                           str(WORKER), *what], capture_output=True,
                          text=True, timeout=240,
                          env={**os.environ, "OMP_NUM_THREADS": "2", "NCCL_NVLS_ENABLE": "0"})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert " 0 wrong" in done.stdout
