"""Direct NCCL without a GPU: the kit over a stand-in for NCCL's functions, what it refuses,
and why it is not made."""
from __future__ import annotations

import inspect
import sys
import threading
import time
import types
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from conformance import Case, check, fixed_cases, quad_cases
from fake_nccl import FakeNccl, OnHost, raising
from family import family

from shardlib.distributed import GroupCoordinator, connect
from shardlib.distributed.communicators import nccl as module
from shardlib.distributed.communicators.nccl import Nccl, nccl, within
from shardlib.distributed.communicators.protocol import Call, Place
from shardlib.mesh import Mesh


def group_of(place: Place) -> GroupCoordinator:
    made = OnHost(place)
    return GroupCoordinator(place.name, place.ranks, place.rank, 0, place.device, (made,), made)


def takes(made: Nccl, case: Case) -> bool:
    op = case.op if case.collective in ("all_reduce", "reduce_scatter") else None
    return made.supports(Call(case.collective, op, getattr(torch, case.dtype), "cpu", 0)) is None


def failures(place: Place, cases: list[Case]) -> list[str]:
    group = group_of(place)
    return [f"{case}: {text}" for case in cases if takes(group.communicators[0], case)
            for text in check(case, group)][:5]


@pytest.mark.parametrize("n", (2, 3))
def test_the_fixed_cases(n: int) -> None:
    cases = [replace(case, root=root) for root in range(n) for case in fixed_cases(("tp",), n)]
    assert family(n, lambda place: failures(place, cases)) == [[]] * n


def test_the_quad_cases() -> None:
    assert family(2, lambda place: failures(place, quad_cases(("tp",), 2))) == [[]] * 2


def calls_of(place: Place, case: Case) -> list[list]:
    """(name, depth of groups) of each NCCL call."""
    group = group_of(place)
    assert not check(case, group)
    return [list(call) for call in group.communicators[0]._library.log]


@pytest.mark.parametrize("case, calls", (
    (Case("all_reduce", ("tp",), "bfloat16", (5,)), [["all_reduce", 0]]),
    (Case("all_reduce", ("tp",), "bfloat16", (0,)), []),
    (Case("all_gather", ("tp",), "int16", (0, 3), sizes=(2, 2)), [["all_gather", 0]]),
    (Case("all_gather", ("tp",), "int16", (0, 3), sizes=(2, 1)),
     [["send", 1], ["send", 1], ["recv", 1], ["recv", 1]]),
    (Case("reduce_scatter", ("tp",), "float32", (0, 3), sizes=(2, 2)), [["reduce_scatter", 0]]),
    (Case("reduce_scatter", ("tp",), "float32", (0, 3), sizes=(2, 1)), [["reduce", 1], ["reduce", 1]]),
    (Case("reduce_scatter", ("tp",), "float32", (0, 3), sizes=(2, 0)), [["reduce", 0]]),
    (Case("broadcast", ("tp",), "bool", (3,), root=1), [["broadcast", 0]])))
def test_a_call_is_one_call_or_one_group(case: Case, calls: list) -> None:
    assert family(2, lambda place: calls_of(place, case)) == [calls] * 2


# -- what it takes -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("call, text", (
    (Call("all_reduce", "sum", torch.bfloat16, "cuda", 8), None),
    (Call("all_reduce", "max", torch.int64, "cuda", 8, capturing=True), None),
    (Call("all_to_all", None, torch.float8_e5m2, "cuda", -1, even=False), None),
    (Call("gather", None, torch.complex64, "cuda", 8, even=False), None),
    (Call("send", None, torch.uint16, "cuda", 0), None),
    (Call("all_reduce", "max", torch.float32, "cuda", 8), "NCCL's max of float32 drops NaN"),
    (Call("reduce_scatter", "max", torch.bfloat16, "cuda", 8), "NCCL's max of bfloat16 drops NaN"),
    (Call("all_reduce", "sum", torch.int16, "cuda", 8), "NCCL has no sum of int16"),
    (Call("all_reduce", "sum", torch.float8_e4m3fn, "cuda", 8), "NCCL has no sum of float8_e4m3fn"),
    (Call("all_reduce", "max", torch.bool, "cuda", 8), "NCCL has no max of bool"),
    (Call("all_reduce", "sum", torch.complex64, "cuda", 8), "NCCL has no sum of complex64"),
    (Call("broadcast", None, torch.float32, "cpu", 8), "NCCL takes tensors on cuda, not on cpu")))
def test_what_it_takes(call: Call, text: str | None) -> None:
    assert Nccl(place_of_one("cuda"), FakeNccl(None), 1).supports(call) == text


# -- whether it is made --------------------------------------------------------------------------------------

class Echo:
    """The control communicator of a group of one."""

    @staticmethod
    def all_gather(x: torch.Tensor, counts: object) -> torch.Tensor:
        return x.clone()


def place_of_one(device: str) -> Place:
    return Place("tp", (0,), 0, (0,), torch.device(device, 0) if device == "cuda" else torch.device(device),
                 None, None, 5.0, Echo())


def stand_in(monkeypatch: pytest.MonkeyPatch, **functions: object) -> None:
    """Puts a module with these functions where nccl4py's would be."""
    made = types.ModuleType("nccl.bindings.nccl")
    made.__dict__.update({"get_version": lambda: 22809, "NCCLError": FakeNccl.NCCLError,
                          "get_unique_id": lambda: bytes(128), **functions})
    for name in ("nccl", "nccl.bindings"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "nccl.bindings.nccl", made)


def test_on_cpu_it_says_why_it_is_not_made() -> None:
    assert nccl(place_of_one("cpu")) == "the group's tensors are on cpu"


def test_real_ranks_on_cpu_are_all_told_why() -> None:
    assert family(2, nccl) == ["the group's tensors are on cpu"] * 2


@pytest.mark.skipif(find_spec("nccl") is not None, reason="nccl4py is installed")
def test_without_nccl4py_it_says_how_to_get_it() -> None:
    assert nccl(place_of_one("cuda")) == (
        "nccl4py cannot be imported: No module named 'nccl'; pip install 'shardlib[nccl]'")


def test_without_its_library_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, get_version=raising(RuntimeError("Failure finding \"libnccl.so\"\nlooked in ...")))
    assert nccl(place_of_one("cuda")) == "nccl4py: Failure finding \"libnccl.so\""


def test_an_error_of_nccl_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, get_unique_id=raising(FakeNccl.NCCLError("SystemError (2): no network")))
    assert nccl(place_of_one("cuda")) == "NCCL: SystemError (2): no network"
    stand_in(monkeypatch,
             comm_init_rank_scalable=raising(FakeNccl.NCCLError("InvalidUsage (5): two ranks on one GPU")))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    assert nccl(place_of_one("cuda")) == "NCCL: InvalidUsage (5): two ranks on one GPU"


def test_a_nccl_that_does_not_come_up_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    never = threading.Event()
    stand_in(monkeypatch, comm_init_rank_scalable=lambda *_: never.wait(20))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    assert nccl(replace(place_of_one("cuda"), timeout_s=0.2)) == "NCCL: no answer within 0.1 s"
    never.set()


def test_a_runtime_on_cpu_lists_it_among_the_declined() -> None:
    with connect(Mesh(tp=1), device="cpu", communicators=(nccl,)) as runtime:
        assert [c.name for c in runtime.group(("tp",)).communicators] == ["alone"]
    assert "nccl" not in sys.modules or not hasattr(sys.modules["nccl"], "bindings")




def test_the_stand_in_takes_what_nccl_takes() -> None:
    """As many arguments, with the communicator and the stream at the end,
    and the numbers of dtypes and reductions."""
    library = pytest.importorskip("nccl.bindings.nccl")
    for name in ("send", "recv", "all_reduce", "reduce", "reduce_scatter", "all_gather", "broadcast",
                 "group_start", "group_end"):
        head = getattr(library, name).__doc__.splitlines()[0]
        given = [p for p in inspect.signature(getattr(FakeNccl, name)).parameters if p != "self"]
        assert head.startswith(f"{name}(") and head.count(",") + 1 == max(1, len(given)), head
        assert (not given or [p.split()[-1] for p in head.rstrip(")").split(", ")[-2:]] == given[-2:]
                == ["comm", "stream"])
    for name in ("get_version", "get_library_path", "get_unique_id", "comm_init_rank_scalable", "comm_abort",
                 "NCCLError"):
        assert hasattr(library, name)
    assert ({str(dtype)[6:].capitalize(): code for dtype, code in module.CODES.items()}.items()
            <= {d.name: d.value for d in library.DataType}.items())
    assert {op: library.RedOp[op.capitalize()].value for op in module.OPS} == module.OPS


# -- errors, and the end -------------------------------------------------------------------------------------

def test_an_error_of_a_call_names_the_call_and_the_group_and_ends_its_nccl_group() -> None:
    made = OnHost(place_of_one("cpu"))
    library = made._library
    library.all_reduce = library.send = raising(FakeNccl.NCCLError("RemoteError (6): a peer left"))
    for call, name in ((lambda: made.all_reduce(torch.ones(2), "sum"), "all_reduce"),
                       (lambda: made.all_to_all(torch.ones(1), (1,), (1,)), "all_to_all")):
        with pytest.raises(RuntimeError) as error:
            call()
        assert str(error.value) == f"{name} over tp: NCCL: RemoteError (6): a peer left"
    assert library.depth == 0


def closing(monkeypatch: pytest.MonkeyPatch, abort: object, wait: object = lambda device: None) -> float:
    """Seconds that `close` takes."""
    library = FakeNccl(None)
    library.comm_abort = abort
    monkeypatch.setattr(torch.cuda, "synchronize", wait)
    monkeypatch.setattr(module, "CLOSE_S", 0.2)
    made, begin = Nccl(place_of_one("cuda"), library, 9), time.monotonic()
    made.close()
    made.close()
    return time.monotonic() - begin


def test_close_aborts_once_after_the_device_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    did: list[object] = []
    assert closing(monkeypatch, did.append, lambda device: did.append(str(device))) < 0.2
    assert did == ["cuda:0", 9]


def test_close_does_not_wait_for_ever_for_graphs_or_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL's abort blocks as long as CUDA graphs hold calls of the communicator."""
    graphs, did = threading.Event(), []
    assert 0.2 <= closing(monkeypatch, lambda comm: graphs.wait(20) and did.append(comm)) < 5
    assert 0.4 <= closing(monkeypatch, lambda comm: graphs.wait(20), lambda device: graphs.wait(20)) < 5
    graphs.set()
    end = time.monotonic() + 5
    while not did and time.monotonic() < end:
        time.sleep(0.01)
    assert did == [9]


def test_close_goes_on_after_an_error_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    did: list[object] = []
    closing(monkeypatch, did.append, raising(RuntimeError("an illegal memory access")))
    assert did == [9]


def test_within_passes_on_results_and_errors() -> None:
    assert within(5, lambda: 3) == 3
    with pytest.raises(KeyError):
        within(5, lambda: {}[1])
    with pytest.raises(TimeoutError, match="^no answer within 0.05 s$"):
        within(0.05, lambda: time.sleep(0.3))
