"""Indices out of range on a GPU: no call waits, a CUDA graph holds the notes,
no kernel is asked for what is not there, one rank ends all."""
from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from gpus import finished

from shardlib import Mesh, SpecError, compile, sharded, value_and_grad
from shardlib.distributed import connect
from shardlib.functions import sum
from shardlib.ops import cross_entropy, embedding, take, update_cache


@sharded("B, V D -> ()")
def looked_up(index, table):
    return sum("B D -> ()", embedding("B, V D -> B D", index, table))


@sharded("B, B V -> ()")
def taken(index, x):
    return sum("B -> ()", take("B V, B -> B", x, index))


@sharded("B, B V -> ()")
def losses(index, x):
    return sum("B -> ()", cross_entropy("B V, B -> B", x, index, ignore_index=-2))


@sharded("B, B V D, B T D -> B V D")
def cached(index, cache, rows):
    return update_cache("B V D, B T D, B -> B V D", cache, rows, index)


@contextmanager
def no_waiting() -> Iterator[None]:
    """What waits for the GPU is an error."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype", UserWarning)
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("bad", (-1, 5, 2**40))
@pytest.mark.parametrize("f, shape, want",
                         ((looked_up, (5, 2), 4.0), (taken, (3, 5), 2.0), (losses, (3, 5), 2 * math.log(5))))
def test_nothing_waits_and_the_error_comes_later(f: Callable, shape: tuple[int, ...], want: float,
                                                 bad: int) -> None:
    """The first and the last row count, the one between does not."""
    good, x = torch.tensor([0, 4, 1], device="cuda"), torch.ones(shape, device="cuda")
    index = good.clone()
    index[1] = bad
    with connect(Mesh()) as runtime:
        compiled = compile(value_and_grad(f, f.arg_names[1]), runtime=runtime)
        compiled(good, x)
        compiled.check()
        with no_waiting():
            value, gradient = compiled(index, x)
        assert math.isclose(float(value), want, rel_tol=1e-6)
        assert gradient.any(1).tolist() == ([True, True, False, False, False] if f is looked_up
                                            else [True, False, True])
        torch.cuda.synchronize()
        with pytest.raises(SpecError, match=f": index holds {bad}, outside of 0 to 4 "):
            compiled(good, x)
        compiled(good, x)
        compiled.check()


def test_a_graph_notes_what_its_replays_have_seen() -> None:
    index, table = torch.tensor([0, 4, 1], device="cuda"), torch.ones(5, 2, device="cuda")
    with connect(Mesh()) as runtime:
        compiled = compile(looked_up, runtime=runtime)
        compiled(index, table)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            value = compiled(index, table)
        graph.replay()
        compiled.check()
        index[1] = 5
        graph.replay()
        assert float(value) == 4
        index[1] = 0
        graph.replay()
        with pytest.raises(SpecError, match="^embedding: index holds 5, outside of 0 to 4 "):
            compiled.check()
        graph.replay()
        compiled.check()


def test_a_slot_that_is_not_there_is_no_error_of_the_gpu() -> None:
    with connect(Mesh()) as runtime:
        compiled = compile(cached, runtime=runtime)
        compiled(torch.tensor([0, 4, -3], device="cuda"), torch.zeros(3, 5, 2, device="cuda"),
                 torch.ones(3, 2, 2, device="cuda"))
        with pytest.raises(SpecError, match=r"^update_cache: index holds -3, outside of 0 to 3 \(V=5, T=2\)"):
            compiled.check()
        torch.cuda.synchronize()


def test_one_rank_ends_the_others_with_its_line() -> None:
    done = finished(2, Path(__file__).with_name("index_worker.py"))
    line = "cross_entropy: labels holds 7, outside of 0 to 4 (N=5)          index_worker.py:18"
    said = [text for text in done.stderr.splitlines() if text.startswith("shardlib [")]
    assert done.returncode == 1 and done.stdout == f"rank 1 has raised {line}\n", done.stderr
    assert said[0] == f"shardlib [rank 0] ends: rank 1 has raised SpecError: {line}", done.stderr
