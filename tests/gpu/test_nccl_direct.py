"""Direct NCCL under torchrun: the conformance kit, CUDA graphs, a storm of calls, tensors by name,
and the end of a group."""
from __future__ import annotations

from pathlib import Path

import pytest
from gpus import torchrun

pytest.importorskip("nccl.bindings", reason="needs nccl4py: pip install 'shardlib[nccl]'")
WORKER = Path(__file__).parent / "nccl_direct_worker.py"


@pytest.mark.parametrize("ranks", (2, 4))
@pytest.mark.parametrize("what", (["conformance"], ["graphs"], ["stress", "4000"], ["tensors"], ["close"]),
                         ids=lambda what: what[0])
def test_nothing_is_wrong(what: list[str], ranks: int) -> None:
    assert " 0 wrong" in torchrun(ranks, WORKER, *what)
