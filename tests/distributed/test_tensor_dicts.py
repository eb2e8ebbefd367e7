"""Dicts of tensors, handed on with their specs, on real ranks."""
from __future__ import annotations

from typing import Any

import pytest
import torch
from conformance import DTYPES, LAYOUTS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pool import Pool, World

from shardlib.distributed import connect
from shardlib.distributed.tensor_dicts import Label, label
from shardlib.errors import SpecError
from shardlib.mesh import Mesh

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def square(pool: Pool) -> World:
    return pool.connect("dp=2,pp=2", [("pp",), ("dp", "pp"), ("pp", "dp")], 4)


@pytest.fixture(scope="module")
def pair(pool: Pool) -> World:
    return pool.connect("pp=2", [("pp",)], 2)


@st.composite
def rows(draw: st.DrawFn) -> list[list[Any]]:
    """Any names, dtypes, shapes and strides; specs for some."""
    names = draw(st.lists(st.text(max_size=8).filter(lambda s: s.isprintable()), unique=True, max_size=5))
    made = []
    for name in names:
        shape = draw(st.lists(st.sampled_from((0, 1, 2, 3, 7)), max_size=4))
        spec = " ".join([*"ABCD"[:len(shape)], draw(st.sampled_from(("@pp:1", "@pp:last", "+tp")))])
        made.append([name, draw(st.sampled_from(DTYPES)), shape, draw(st.sampled_from(LAYOUTS)),
                     draw(st.sampled_from((None, spec)))])
    return made


@settings(max_examples=150, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(rows=rows(), source=st.integers(0, 3), way=st.integers(0, 3),
       axes=st.sampled_from((["pp"], ["dp", "pp"], ["pp", "dp"])))
def test_any_dict_arrives_as_it_was_sent(square: World, rows: list[list[Any]], source: int, way: int,
                                         axes: list[str]) -> None:
    n = 2 if axes == ["pp"] else 4
    source %= n
    to = None if way == 0 else (source + 1 + way % (n - 1)) % n
    assert square.run("tensor_dict", axes, rows, source, to) == [[]] * 4


def test_many_tensors_and_a_message_of_many_blocks(pair: World) -> None:
    rows = [[f"layers.{i}.{'long' * 20}", DTYPES[i % len(DTYPES)], [i % 3, 2], LAYOUTS[i % len(LAYOUTS)],
             "B T @pp:1"] for i in range(200)]
    assert (pair.run("tensor_dict", ["pp"], rows, 0, 1)
            == pair.run("tensor_dict", ["pp"], rows, 1, None) == [[], []])
    assert (pair.run("tensor_dict", ["pp"], [["x", "float32", [1 << 20], "contiguous", None]], 0, 1)
            == [[], []])
    assert (pair.run("tensor_dict", ["pp"], [], 0, 1)
            == pair.run("tensor_dict", ["pp"], [], 0, None) == [[], []])


REFUSED = [
    "'cache' is a dict; give its tensors names of their own in the dict that is sent, as \"x.y\"",
    "a list is no dict of tensors by name",
    "a tensor's name is a string, not 3",
    "'x' is a list, not a tensor, nor a pair of a tensor and its spec",
    "'x' is a tuple, not a tensor, nor a pair of a tensor and its spec",
    "'x' is sparse_coo; make a dense tensor of it first",
    "'x' is on meta; this group sends tensors on cpu",
    "'x' is quantized; make a dense tensor of it first",
    "'x' comes with spec \"B B\": dim B appears twice; give the second one its own letter",
    "'x' has 2 dims; its spec \"B T D\" has 3",
    "'x' has 2 dims; its spec \"... B T D\" has 3",
    "'x' has a spec of type int, not a string",
    "'x' is jagged; make a dense tensor of it first",
    "'x' is nested; make a dense tensor of it first",
    "'x' is a FakeTensor; only plain tensors can be sent",
    ("a message holds plain data only: 'utf-8' codec can't encode character '\\ud800' in position 0: "
     "surrogates not allowed"),
]


def test_what_cannot_be_sent_is_refused_on_both_ends_and_nobody_hangs(pair: World) -> None:
    sent = [f"send_tensors over pp: {text}" for text in REFUSED[:-1]] + REFUSED[-1:]
    told = [f"broadcast_tensors over pp: {text}" for text in REFUSED[:2]]
    for me, answer in enumerate(pair.run("tensor_dict_misuse", ["pp"])):
        assert answer == [sent, told, [
            "send_tensors over pp: no member 2 in a group of 2",
            f"recv_tensors over pp: member {me} is the one that calls; it has what it would send",
            "broadcast_tensors over pp: no member -1 in a group of 2",
            f"send over pp: member {me} is the one that calls; it has what it would send"], []]


def test_debug_mode_compares_their_roots(pair: World) -> None:
    text, names = pair.run("tensor_dict_checked", ["pp"])[0]
    assert text == ("collective 1 of group pp (ranks 0 1): its ranks do not call the same\n"
                    "  rank 0   broadcast_tensors from member 0\n"
                    "  rank 1   broadcast_tensors from member 1")
    assert names == ["x"]


def test_a_group_of_one_gets_copies_and_has_nobody_to_send_to() -> None:
    with connect(Mesh(pp=1), device="cpu") as runtime:
        group, x = runtime.group(("pp",)), torch.ones(2)
        got = group.broadcast_tensors({"x": x, "y": (x[:0], "D @pp:0")}, 0)
        assert torch.equal(got["x"], x) and got["x"].data_ptr() != x.data_ptr() and got["y"][1] == "D @pp:0"
        for call, text in (
                (lambda: group.send_tensors({"x": x}, 0), "send: a group of one has nobody to send to"),
                (lambda: group.recv_tensors(0), "recv: a group of one has nobody to receive from")):
            with pytest.raises(SpecError, match=f"^{text}$"):
                call()


# -- labels --------------------------------------------------------------------------------------------------

def test_a_label_says_where_its_tensor_goes() -> None:
    x = torch.ones(2, 3)
    labels, given = label("send_tensors", {"x": x}, torch.device("cuda", 1))
    assert labels == [Label("x", "float32", (2, 3), True)] and given[0] is x
    assert labels[0].room(torch.device("meta")).device.type == "cpu"
    assert Label("x", "bfloat16", (2, 0), False).room(torch.device("meta")).device.type == "meta"
    with pytest.raises(SpecError) as refused:
        label("send_tensors", {"x": x.to("meta")}, torch.device("cuda", 1))
    assert str(refused.value) == "send_tensors: 'x' is on meta; this group sends tensors on cpu and cuda"


def test_a_dtype_of_another_torch_is_named() -> None:
    with pytest.raises(SpecError) as refused:
        Label("x", "float3_e1m1", (2,), True).room(CPU)
    assert str(refused.value) == (
        f"'x' is of dtype float3_e1m1, which this torch {torch.__version__} does not have")
    with pytest.raises(SpecError):
        Label("x", "load", (2,), True).room(CPU)


@pytest.mark.parametrize("ndim, spec, fits", [(0, "...", True), (0, "... D", False), (1, "...", True),
                                              (1, "... D", True), (3, "... D", True), (1, "... B D", False),
                                              (0, "()", True), (1, "()", False), (1, "D", True),
                                              (2, "D", False), (2, "T/tp D +x", True)])
def test_a_spec_that_fits_its_tensor(ndim: int, spec: str, fits: bool) -> None:
    """A name for each dim; "..." stands for any number of them, none included."""
    x = torch.ones((2,) * ndim)
    if fits:
        assert label("put", {"x": (x, spec)}, CPU)[0][0].spec == spec
    else:
        with pytest.raises(SpecError, match=f"^put: 'x' has {ndim} dims; its spec "):
            label("put", {"x": (x, spec)}, CPU)
