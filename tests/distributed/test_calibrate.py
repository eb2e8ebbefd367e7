"""calibrate: what it measures, that all ranks have the same table, and that calls are routed by it."""
from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pool import Pool

from shardlib.distributed.calibrate import SIZES, axes_of, main, measure, merged
from shardlib.distributed.communicators.protocol import Call
from shardlib.distributed.routing import Curve, Table


def test_every_collective_of_every_communicator_in_every_group(pool: Pool) -> None:
    both, taken = "torch.distributed (gloo)", ("all_reduce", "reduce_scatter", "all_gather", "broadcast")
    want = sorted([name, size, "float32", False, who, [2048, 8192]] for size in (2, 4) for who in (both, "shared memory")
                  for name in (*taken, *(["all_to_all"] if who == both else [])))
    world = pool.connect("a=2,b=2", [("b",), ("a", "b")], 4)
    assert world.run("calibrated") == [{"curves": want, "positive": True, "fastest": True, "predicted": True, "same": True}] * 4


@given(st.integers(2, 64))
def test_a_mesh_for_any_number_of_ranks(ranks: int) -> None:
    axes = axes_of(ranks)
    product = 1
    for size in axes.values():
        product *= size
    assert product == ranks and list(axes.values()) == sorted(axes.values(), reverse=True) and len(set(axes)) == len(axes)


@given(st.integers(2, 200), st.sampled_from((torch.bfloat16, torch.float32)))
def test_pieces_are_multiples_of_16_bytes(ranks: int, dtype: torch.dtype) -> None:
    """Whatever the number of ranks: what takes no others is measured too. Sizes without a piece for each rank are left out."""
    asked: list[Call] = []
    refuses = SimpleNamespace(supports=lambda call: asked.append(call) or "not here")
    group = SimpleNamespace(world_size=ranks, device=torch.device("cpu"))
    assert measure(group, "all_gather", refuses, dtype, False) is None
    assert [call.nbytes for call in asked] == [n for size in SIZES if (n := size // (16 * ranks) * 16 * ranks)]


def test_what_another_run_has_measured_stays() -> None:
    def curve(size: int, us: float) -> Curve:
        return Curve("all_reduce", size, "float32", False, "gloo", ((1, us),))
    old, new = Table("here", {"date": "1"}, (curve(2, 1.0), curve(4, 2.0))), Table("here", {"date": "2"}, (curve(2, 3.0),))
    assert merged(old, new) == Table("here", {"date": "2"}, (curve(4, 2.0), curve(2, 3.0)))
    assert merged(Table("elsewhere", {}, (curve(8, 1.0),)), new) == new and merged(None, new) == new


def test_one_process_has_nothing_to_measure(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["--out", str(tmp_path / "table.json")]) == 2
    assert capsys.readouterr().err == "calibrate measures what processes say to each other: start it with torchrun --nproc-per-node N\n"
    assert not list(tmp_path.iterdir())
