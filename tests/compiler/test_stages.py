"""A scan over a split dim: what each stage has, computes, sends; against the same on one rank."""
from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shardlib import (
    EXPLICIT,
    Layout,
    Mesh,
    Params,
    SpecError,
    cond,
    einsum,
    explain,
    init,
    lower,
    param,
    prove,
    reshard,
    scan,
    sharded,
    simulate,
    stacked,
    value_and_grad,
)
from shardlib.compiler.stages import needed
from shardlib.functions import mean, silu, sum
from shardlib.lowering.emit import Emitter
from shardlib.ops import TABLE, embedding
from shardlib.params import leaf_values
from shardlib.parser import check, parse_program

pytestmark = pytest.mark.usefixtures("one_thread")


class Layer(Params):
    up: Tensor = param("D F")
    down: Tensor = param("F D")


class Net(Params):
    embed: Tensor = param("V D")
    layers: Layer = stacked("L", Layer)
    scale: Tensor = param("D")
    head: Tensor = param("V D")                     # absent where the table is tied


@sharded("B D, *, D -> B D, B F")
def layer(x, w: Layer, scale):
    h = silu(einsum("B D, D F -> B F", x * scale, w.up))
    return x + einsum("B F, F D -> B D", h, w.down), h


@sharded("B, * -> B V, L B F")
def net(ids, w: Net):
    x, inner = scan(layer, embedding("B, V D -> B D", ids, w.embed), w.layers, w.scale)
    return einsum("B D, V D -> B V", x, w.embed if w.head is None else w.head), inner


@sharded("B, B V, * -> ()")
def loss(ids, y, w: Net):
    logits, _ = net(ids, w)
    return mean("B V -> ()", (logits - y) * (logits - y))


def weights(sizes: dict[str, int], tied: bool) -> Net:
    w = init(Net, sizes, dtype=torch.float64)
    return Net(embed=w.embed, layers=w.layers, scale=w.scale, head=None if tied else w.head)


@settings(max_examples=8)
@given(st.integers(0, 6), st.integers(1, 4),
       st.sampled_from((dict(), dict(tp=2), dict(dp=2), dict(dp=2, tp=2))),
       st.booleans(), st.integers(0, 5), st.data())
def test_it_is_the_scan_on_one_rank(layers, stages, more, tied, rows, data) -> None:
    """Uneven layers, more stages than layers, no layers, no rows; with axes beside, in any order."""
    mesh = Mesh(dict(data.draw(st.permutations([("pp", stages), *more.items()]))))
    entries = {"L": "pp", **{d: a for d, a in dict(B="dp", F="tp", V="tp", D="dp").items() if a in more}}
    sizes = dict(L=layers, B=rows, D=4, F=5, V=7)
    ids = torch.arange(rows) % 7
    y, w, layout = torch.randn(rows, 7, dtype=torch.float64), weights(sizes, tied), Layout(entries)
    for f, args in ((net, (ids, w)), (value_and_grad(loss), (ids, y, w))):
        if f is not net and not rows:
            continue
        program = lower(f, layout, *args, mesh=mesh)
        assert check(parse_program(str(program), TABLE), mesh) == program
        found, whole = (simulate(f, a, *args, mesh=m) for a, m in ((layout, mesh), (Layout(), Mesh())))
        for a, b in zip(found, whole):
            for (_, x), (_, z) in zip(*(leaf_values(v, "") if isinstance(v, Params) else [("", v)]
                                        for v in (a, b))):
                torch.testing.assert_close(x, z, rtol=1e-9, atol=1e-12)
        proof, told = prove(program, mesh, sizes), explain(program, mesh, sizes)
        log: list = []
        simulate(f, layout, *args, mesh=mesh, log=log)
        assert proof.collectives == len(log)
        assert (told.collectives > 0) == (mesh.world_size > 1)


PRINTED = '''class Layer(Params):
    up: Tensor = param("D F")
    down: Tensor = param("F D")


class Net(Params):
    embed: Tensor = param("V D @pp:0")
    layers: Layer = stacked("L/pp", Layer)
    scale: Tensor = param("D")
    head: Tensor = param("V D @pp:2")


@sharded("B D, *, D -> B D, B F", layout=EXPLICIT)
def layer(x, w: Layer, scale):
    v1 = x * scale
    v2 = einsum("B D, D F -> B F", v1, w.up)
    h = silu(v2)
    v3 = einsum("B F, F D -> B D", h, w.down)
    v4 = x + v3
    return v4, h


@sharded("B, * -> B V, L/pp B F", layout=EXPLICIT)
def net(ids, w: Net):
    v1 = embedding("B, V D @pp:0 -> B D @pp:0", ids, w.embed)
    x, inner = scan(layer, v1, (w.layers,), w.scale, stages=3)
    v2 = einsum("B D @pp:2, V D @pp:2 -> B V @pp:2", x, w.head)
    v3 = broadcast("B V @pp:2 -> B V", v2)
    return v3, inner
'''


def test_what_it_prints() -> None:
    """The embedding is the first stage's, the head the last one's; what is sent is on the page."""
    made = sharded("B, * -> B V, L/pp B F")(net.fn)
    assert str(lower(made, Layout(L="pp"), mesh=Mesh(pp=3))).replace("f(ids", "net(ids") == PRINTED


def test_what_it_prints_is_explicit_text() -> None:
    def net_of(text: str):
        names: dict = {}
        exec("from shardlib.ops.lowered import *\n" + text, names)
        return names["net"]
    assert str(lower(net_of(PRINTED), EXPLICIT, mesh=Mesh(pp=3))) == PRINTED
    with pytest.raises(SpecError, match="^scan: it has 3 stages, and L is split over 4 ranks "):
        lower(net_of(PRINTED), EXPLICIT, mesh=Mesh(pp=4))


def test_a_rank_needs_no_other_stage_s_weights() -> None:
    mesh = Mesh(pp=3)
    for tied, used in ((False, [{"embed"}, set(), {"head"}]), (True, [{"embed"}, set(), {"embed"}])):
        w = weights(dict(L=4, D=2, F=2, V=3), tied)
        program = lower(net, Layout(L="pp"), None, w, mesh=mesh)
        found = [needed(program, c) for c in mesh.coordinates()]
        always = {"w.layers.up", "w.layers.down", "w.scale"}
        assert [{path.removeprefix("w.") for path in f if path != "ids"} for f in found] == [
            {p.removeprefix("w.") for p in always} | more for more in used]


def test_the_code_of_a_stage_is_its_own() -> None:
    program = lower(net, Layout(L="pp"), mesh=Mesh(pp=3))
    codes = [Emitter(Mesh(pp=3), rank, dict(L=5, B=2, D=4, F=5, V=7)).program(program) for rank in range(3)]
    assert ["rows_of" in c for c in codes] == [True, False, False]              # the embedding
    assert [c.count(".send(") for c in codes] == [1, 1, 0] and [c.count(".recv(") for c in codes] == [0, 1, 1]
    assert "g0.recv((2, 4), torch.float32, 1)" in codes[2] and "g0.send(v2, 1)" in codes[0]


def test_memory_follows_from_the_types() -> None:
    """Embedding and head count where they are, layers by stage."""
    sizes = dict(L=4, B=2, D=3, F=5, V=7)
    told = explain(lower(net, Layout(L="pp"), mesh=Mesh(pp=3)), Mesh(pp=3), sizes)
    layer, table, rest = 4 * 2 * 15, 4 * 21, 4 * 3 + 2 * 8
    assert told.argument_bytes == (2 * layer + table + rest, layer + rest, layer + table + rest)
    assert told.received == (4 * 14, 4 * 6 + 4 * 14, 4 * 6)


@sharded("B D, *, D -> B D")
def two_scans(x, w: Net, scale):
    y, _ = scan(layer, x, w.layers, scale)
    z, _ = scan(layer, y, w.layers, scale)
    return z


def test_one_pipeline_after_another_starts_at_the_first_stage() -> None:
    mesh, sizes = Mesh(pp=2), dict(L=3, B=2, D=3, F=5, V=7)
    program, w = lower(two_scans, Layout(L="pp"), mesh=mesh), weights(sizes, False)
    assert [s.op.name for s in program.steps] == ["hold", "scan", "send", "scan", "broadcast"]
    args = torch.randn(2, 3, dtype=torch.float64), w, torch.ones(3, dtype=torch.float64)
    found, whole = (simulate(two_scans, layout, *args, mesh=m)
                    for layout, m in ((Layout(L="pp"), mesh), (Layout(), Mesh())))
    torch.testing.assert_close(found, whole, rtol=1e-12, atol=0)


@sharded("B D, L D F -> B D")
def unstacked(x, ups):
    return scan(step, x, ups)


@sharded("B D, D F -> B D")
def step(x, up):
    return x + einsum("B F, D F -> B D", silu(einsum("B D, D F -> B F", x, up)), up)


@sharded("B D, N L D F -> ()")
def nested(x, ups):
    y = scan(unstacked, x, ups)
    return mean("B D -> ()", y * y)


@sharded("B D, L D F -> B D")
def as_it_is(x, ups):
    return x


@sharded("B D, L D F -> B D")
def in_a_branch(x, ups):
    return cond(sum("B D -> ()", x) > 0, unstacked, as_it_is, x, ups)


def test_a_pipeline_in_each_round_of_a_scan_and_in_a_branch() -> None:
    """Its end is where the body of the outer one wants it: on every rank."""
    draw = torch.Generator().manual_seed(0)
    x, ups = (torch.randn(*shape, dtype=torch.float64, generator=draw) for shape in ((3, 4), (2, 5, 4, 3)))
    for f, args in ((value_and_grad(nested, wrt=["x", "ups"]), (x, ups)), (in_a_branch, (x.abs(), ups[0])),
                    (in_a_branch, (-x.abs(), ups[0]))):
        found, whole = (simulate(f, layout, *args, mesh=mesh) for layout, mesh in (
            (Layout(L="pp", B="dp"), Mesh(pp=2, dp=2)), (Layout(), Mesh())))
        for a, b in zip(found, whole):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_a_branch_after_a_pipeline_is_refused() -> None:
    @sharded("B D -> B D")
    def same(x):
        return x

    @sharded("B D, *, D -> B D")
    def branches(x, w: Net, scale):
        y, _ = scan(layer, x, w.layers, scale)
        return cond(sum("B D -> ()", y) > 0, same, same, y)
    with pytest.raises(SpecError, match="^cond: all ranks take one branch, and an operand is held at pp:1; a "
                                        "cond after a pipeline is not built yet "):
        lower(branches, Layout(L="pp"), mesh=Mesh(pp=2))


@sharded("D @pp:0, D @pp:1 -> D @pp:1", layout=EXPLICIT)
def of_two_stages(x, y):
    return x + y


@sharded("D @pp:0 -> D @pp:1", layout=EXPLICIT)
def of_another_stage(x):
    return x


@sharded("D -> D @pp:1", layout=EXPLICIT)
def of_all_stages(x):
    return x


@pytest.mark.parametrize("f, says", (
    (of_two_stages, """
add: y is held at pp:1, another operand is held at pp:0          model.py:3

  x   D  @pp:0          owed in the signature of of_two_stages
  y   D         @pp:1   owed in the signature of of_two_stages
                ^^^^^

  reshard("D @pp:0 -> D", x) + y     1 x the size of x per rank
"""),
    (of_another_stage, """
of_another_stage: the result is held at pp:0; the signature says "D @pp:1"          model.py:3

  x           D  @pp:0          owed in the signature of of_another_stage
  signature   D         @pp:1
                 ^^^^^

  return reshard("D @pp:0 -> D @pp:1", x)     1 x the size of the result per rank
"""),
    (of_all_stages, """
of_all_stages: the result is not held at pp:1; the signature says "D @pp:1"          model.py:3

  x           D
  signature   D  @pp:1
                 ^^^^^

  return reshard("D -> D @pp:1", x)     free
""")))
def test_across_a_cut_both_stages_are_said(f, says: str) -> None:
    with pytest.raises(SpecError) as error:
        lower(f, mesh=Mesh(pp=2))
    assert re.sub(r"test_stages\.py:\d+", "model.py:3", str(error.value)) == says.strip("\n")


def test_what_is_offered_across_a_cut_types() -> None:
    @sharded("D @pp:0, D @pp:1 -> D @pp:1", layout=EXPLICIT)
    def broadcasts(x, y):
        return reshard("D @pp:0 -> D", x) + y

    @sharded("D @pp:0 -> D @pp:1", layout=EXPLICIT)
    def sends(x):
        return reshard("D @pp:0 -> D @pp:1", x)

    @sharded("D -> D @pp:1", layout=EXPLICIT)
    def holds(x):
        return reshard("D -> D @pp:1", x)
    x, y = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 5.0])
    made = [simulate(f, EXPLICIT, *args, mesh=Mesh(pp=2)).tolist()
            for f, args in ((broadcasts, (x, y)), (sends, (x,)), (holds, (x,)))]
    assert made == [[4.0, 7.0], [1.0, 2.0], [1.0, 2.0]]
