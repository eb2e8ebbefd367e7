"""Connecting: the place of a process on a mesh, the making and unmaking of groups, and what is refused."""
from __future__ import annotations

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from pool import Pool

from shardlib.distributed import connect
from shardlib.distributed import runtime as runtime_module
from shardlib.distributed.launch import Launch
from shardlib.distributed.rank_error import RankError
from shardlib.distributed.runtime import _parting
from shardlib.errors import SpecError
from shardlib.mesh import Mesh

ROOT = Path(__file__).resolve().parents[2]


def refusal(mesh: Mesh, **how: object) -> str:
    with pytest.raises(SpecError) as refused:
        connect(mesh, **how)
    return str(refused.value)


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def test_one_process_needs_no_process_group() -> None:
    with connect(Mesh(dp=1, tp=1), device="cpu") as runtime:
        runtime.create_groups([("tp",), ("dp", "tp"), ()])
        assert not dist.is_initialized()
        assert (runtime.rank, runtime.coordinate,
                runtime.device) == (0, {"dp": 0, "tp": 0}, torch.device("cpu"))
        assert runtime.group(("dp", "tp")).ranks == (0,) and runtime.group(("tp",)).cpu_group is None
        assert runtime.group(["tp"]) is runtime.group(("tp",))


def test_without_a_launcher_the_mesh_has_one_rank() -> None:
    assert refusal(Mesh(tp=3)) == ("mesh tp=3 has 3 ranks, but this process was started without torchrun; "
                                   "start torchrun --nproc-per-node 3, or change the mesh")


def test_wrong_rank_count_is_one_line_the_same_on_all_ranks(pool: Pool) -> None:
    assert pool.attempt("tp=3", [("tp",)], 2) == [
        "mesh tp=3 has 3 ranks, but torchrun started 2 processes; start torchrun --nproc-per-node 3, or "
        "change the mesh"] * 2
    assert pool.attempt("", [], 2) == [
        "mesh () has 1 rank, but torchrun started 2 processes; start torchrun --nproc-per-node 1, or change "
        "the mesh"] * 2


def test_wrong_rank_count_under_torchrun() -> None:
    program = ("from shardlib.distributed import connect; from shardlib.mesh import Mesh; connect(Mesh(dp=2, "
               "tp=2), device='cpu')")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1",
               "--no-python", sys.executable, "-c", program]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode != 0
    assert ("SpecError: mesh dp=2,tp=2 has 4 ranks, but torchrun started 1 process; "
            "start torchrun --nproc-per-node 4, or change the mesh\n") in done.stderr


@pytest.mark.parametrize("environment, text", [
    ({"RANK": "0"}, "RANK is set, but WORLD_SIZE is ''; start with torchrun, or unset RANK"),
    ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK is set, but RANK is 'x'; start with torchrun, or unset RANK")])
def test_half_a_launcher(environment: dict[str, str], text: str) -> None:
    with pytest.raises(SpecError) as refused:
        Launch.from_environment(environment)
    assert str(refused.value) == text


def test_devices() -> None:
    assert refusal(Mesh(), device="meta") == 'device meta: a runtime runs on "cpu" or "cuda"'
    if not torch.cuda.is_available():
        assert (refusal(Mesh(), device="cuda")
                == ("device cuda takes one GPU per process; GPUs on this host: 0, processes: 1; "
                    'start fewer with torchrun --nproc-per-node, or pass device="cpu"'))
        assert connect(Mesh()).device == torch.device("cpu")


def test_life_of_groups(pool: Pool) -> None:
    world = pool.connect("dp=2,tp=1,pp=2", [], 4)
    texts = ["group dp/pp does not exist yet; call create_groups([('dp', 'pp')]) on every rank first",
             "group: unknown axis xp; the mesh has dp, tp, pp",
             "group dp/dp: an axis is named twice",
             "all_reduce over dp: the group was destroyed",
             "control message over dp: the group was destroyed"]
    assert world.run("life") == [texts] * 4


def test_worlds_come_and_go_in_the_same_processes(pool: Pool) -> None:
    for mesh, n in (("tp=2", 2), ("tp=4", 4), ("tp=2", 2)):
        assert pool.connect(mesh, [("tp",)], n).run("barrier", ["tp"]) == [True] * n


def test_a_forked_child_has_no_part_in_the_job(pool: Pool) -> None:
    """Its calls are refused, and neither the queue nor the watchdog of its parent ends with it."""
    assert pool.connect("tp=2", [("tp",)], 2).run("forked", ["tp"]) == [[0, 2.0, "still there", True]] * 2


def test_a_runtime_goes_on_when_the_one_that_began_is_closed(pool: Pool) -> None:
    assert pool.connect("tp=2", [("tp",)], 2).run("two_runtimes", ["tp"]) == [[2.0, True, False]] * 2


class Wordless(Exception):
    def __str__(self) -> str:
        raise KeyError("no words")


@pytest.mark.parametrize("error, said", [
    (ValueError(" bad\nvalue"), "has raised ValueError: bad"), (ValueError(), "has raised ValueError"),
    (Wordless(), "has raised Wordless"), (SystemExit(0), "has ended"), (SystemExit(), "has ended"),
    (SystemExit(3), "has raised SystemExit: 3"), (RankError("told"), "")])
def test_how_a_rank_has_left(error: BaseException, said: str) -> None:
    assert _parting(error) == said


def test_debug_mode_is_what_the_caller_says_and_else_what_the_environment_does(
        monkeypatch: pytest.MonkeyPatch) -> None:
    for said, wanted in (("", (False, False, True)), ("0", (False, False, True)), ("1", (True, False, True))):
        monkeypatch.setenv("SHARDLIB_CHECK", said)
        for check, on in zip((None, False, True), wanted):
            with connect(Mesh(), device="cpu", check=check) as runtime:
                assert runtime._check is on


def test_a_closed_runtime_makes_no_groups() -> None:
    runtime = connect(Mesh(), device="cpu")
    runtime.close()
    runtime.close()
    with pytest.raises(SpecError, match="^the runtime is closed; connect again$"):
        runtime.group(())


def test_joins_a_torch_distributed_that_is_there_and_leaves_it_there() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert refusal(Mesh(tp=2)) == ("mesh tp=2 has 2 ranks, but torchrun started 1 process; "
                                       "start torchrun --nproc-per-node 2, or change the mesh")
        with connect(Mesh(tp=1), device="cpu") as runtime:
            assert runtime.rank == 0
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()


def test_the_watchdog_asks_the_store_for_a_quarter_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a connection of its own, under keys of its runtime's."""
    asked, inner = [], dist.HashStore()
    monkeypatch.setattr(runtime_module, "own_connection", lambda store, s: asked.append((store, s)) or inner)
    monkeypatch.setattr(runtime_module, "Watchdog", lambda watch, *how: how)
    monkeypatch.setattr(runtime_module.atexit, "register", lambda stop: None)
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: "the store of all")
    here = SimpleNamespace(_stop_watchdog=None, _job=SimpleNamespace(number=3), rank=1, mesh=Mesh(tp=2),
                           _timeout=timedelta(seconds=40), device=torch.device("cpu"))
    store, *how = runtime_module.Runtime._start_watchdog(here)
    assert how == [1, 2, 40.0, here.device] and asked == [("the store of all", 10.0)]
    store.set("x", "y")
    assert inner.get("shardlib/watchdog 3/x") == b"y"
