"""Where CUDA graphs are captured: the example of `graph_capture` runs,
on a stand-in for CUDA that writes down what it is told."""
from __future__ import annotations

import inspect
import textwrap

import pytest
import torch
from fake_cuda import Cuda

from shardlib.distributed import GroupCoordinator, connect
from shardlib.distributed.communicators.alone import Alone
from shardlib.errors import SpecError
from shardlib.mesh import Mesh


def group(name: str) -> GroupCoordinator:
    return GroupCoordinator(name, (0,), 0, 0, torch.device("cuda", 0), (Alone(),), Alone())


def test_the_example_warms_up_and_captures_on_one_stream(cuda: Cuda) -> None:
    text = inspect.getdoc(GroupCoordinator.graph_capture)
    begin = text.index("    with tp.graph_capture()")
    example = textwrap.dedent(text[begin:text.index("\n\n", begin)])
    exec(example, {"tp": group("tp"), "step": lambda x: cuda.log.append(f"step on {cuda.now.name}"), "x": 1,
                   "graph": cuda.new_graph(), "torch": torch})
    side = "side 1 of cuda:0"
    assert cuda.log == [f"{side} waits for main", f"step on {side}", f"capture on {side}", f"step on {side}",
                        "captured", f"main waits for {side}", "replay on main"]


def test_all_groups_capture_on_one_stream(cuda: Cuda) -> None:
    with group("tp").graph_capture() as first, group("ep").graph_capture() as second:
        assert first is second
    assert cuda.now.name == "main" and cuda.made == 1
    assert cuda.log[-1] == "main waits for side 1 of cuda:0"


def test_a_failed_capture_leaves_the_stream(cuda: Cuda) -> None:
    with pytest.raises(KeyError), group("tp").graph_capture():
        raise KeyError
    with group("tp").graph_capture() as stream:
        assert stream.name == "side 1 of cuda:0"


def test_there_are_no_graphs_on_the_cpu() -> None:
    with connect(Mesh(tp=1), device="cpu") as runtime, pytest.raises(SpecError) as refused:
        runtime.group(("tp",)).graph_capture()
    assert str(refused.value) == (
        "graph_capture over tp: CUDA graphs are of calls on cuda; this group is on cpu")
