"""The communicator over NVLink: the conformance kit, and long random runs, eager and in graphs,
on two channels at once."""
from __future__ import annotations

from pathlib import Path

import pytest
from gpus import finished, torchrun

WORKER = str(Path(__file__).parent / "nvlink_worker.py")
COUNTS = (2, 3, 4, 5, 6, 8)


@pytest.mark.parametrize("ranks", COUNTS)
@pytest.mark.parametrize("what", ["conformance", "stress 20000"])
def test_nothing_is_wrong(ranks: int, what: str) -> None:
    assert f"{what} on tp={ranks}: 0 wrong" in torchrun(ranks, WORKER, *what.split())


@pytest.mark.parametrize("what, count, line", [
    ("all_reduce", 4096, ("of rank 1, 4096 of 4096 words have not come: block 0 waits for quad 0, expects "
                          "data and sees 0x7fff7fff")),
    ("all_gather", 1 << 16, ("of rank 1, 65536 of 65536 words have not come: block 0 waits for quad 0, "
                             "expects data and sees 0x7fff7fff")),
    ("graph", 4096, ("of rank 1, 64 of 64 words have not come: block 0 waits for quad 0, expects data and "
                     "sees 0x7fff7fff"))])
def test_a_kernel_that_waits_says_for_what(what: str, count: int, line: str) -> None:
    done = finished(2, Path(WORKER).with_name("nvlink_silent.py"), what, str(count))
    assert done.returncode != 0
    assert f"shardlib [rank 0]   NVLink over tp: {line}" in done.stderr, done.stderr[-4000:]
