"""What a program says of its conversions: which operand of which op asks, by which entry of the layout; and
which entries a warning is said of."""
from __future__ import annotations

import warnings

import pytest
from torch import Tensor

from shardlib import Layout, Mesh, Params, einsum, lower, param, rename, scan, sharded, stacked
from shardlib.errors import LayoutWarning
from shardlib.functions import cumsum, sort
from shardlib.models import llama, mixtral
from shardlib.models.layouts import named_layout
from shardlib.models.llama import LlamaConfig
from shardlib.models.mixtral import MixtralConfig

MESH = Mesh(x=2, y=2)
LLAMA = LlamaConfig(vocab_size=11, d_model=18, num_layers=2, num_kv_heads=4, queries_per_kv=2, head_dim=4,
                    d_ff=7, norm_eps=1e-5, rope_theta=1e4, rope_scaling=None, tied=False, max_context=64)
MIXTRAL = MixtralConfig(**vars(LLAMA), num_experts=5, top_k=2, window=2)


def reasons(f, layout: str) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LayoutWarning)
        program = lower(f, Layout.parse(layout), mesh=MESH)
    return [s.why for p in (*program.bodies(), program) for s in p.steps if s.op.moves]


def warned(f, layout: str) -> list[str]:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        lower(f, Layout.parse(layout), mesh=MESH)
    assert {w.category for w in said} <= {LayoutWarning}
    return [str(w.message).split("          ")[0] for w in said]


@sharded("B T D, D F -> B T F")
def wide(h, up):
    return einsum("B T D, D F -> B T F", h, up)


@sharded("B T D, D E -> B T E")
def routed(h, w):
    return einsum("B T D/1, D E -> B T E", h, w)


@sharded("B T -> B T")
def counted(mask):
    return cumsum(mask, along="T")


@sharded("B T -> B S")
def called_otherwise(x):
    return rename("B T -> B S", x)


@sharded("T D, B T +x -> B T D +x")
def beside_what_owes(h, y):
    return einsum("T D, B T +x -> B T D +x", h, y)


@pytest.mark.parametrize("f, layout, said", [
    (wide, "F=x,T=x", ["einsum takes h as B T D: F=x, of up, comes before T=x"]),
    (wide, "B=x,D=x/y", ["einsum takes up as D F: B=x, of h, comes before D=x/y"]),
    (wide, "D=x,T=x", ["the layout keeps B T F as B T/x F: T=x"]),
    (wide, "D=x", ["the layout keeps B T F as B T F"]),
    (routed, "D=x,B=y", ["einsum takes h as B/y T D: D is whole in it",
                         "einsum takes w as D E: D is whole in it"]),
    (beside_what_owes, "D=x", ["einsum takes h as T D: y owes over x"]),
    (counted, "T=x", ["cumsum takes mask as B T: it needs all of T", "the layout keeps B T as B T/x: T=x"]),
    (counted, "T=x,B=x", ["cumsum takes mask as B/x T: it needs all of T",
                          "the layout keeps B T as B T/x: T=x"]),
    (called_otherwise, "T=x", ["rename makes B S: T is S there, which no entry splits"]),
    (called_otherwise, "S=x", ["rename makes B S/x: S=x"])],
                         ids=lambda x: x if isinstance(x, str) else getattr(x, "__name__", ""))
def test_who_asks_for_a_conversion(f, layout: str, said: list[str]) -> None:
    assert reasons(f, layout) == said


WHOLE = "needs all of T, so {} is gathered; where another of its dims may have the axis, too, it is exchanged"


class Layer(Params):
    w: Tensor = param("D D2")


class Net(Params):
    layers: Layer = stacked("L", Layer)


@sharded("B D, * -> B D")
def layer(x, w: Layer):
    return x + rename("B D2 -> B D", einsum("B D, D D2 -> B D2", x, w.w))


@sharded("B D, * -> B D")
def layers(x, net: Net):
    return scan(layer, x, net.layers)


@sharded("D, B D -> D")
def recurrent(h, xs):
    return scan(sharded("D, D -> D")(lambda h, x: h * x), h, xs)


def test_an_entry_that_gathers_since_an_op_needs_its_dim_is_warned_of_once() -> None:
    """Not where another dim has the axis meanwhile, nor where an entry further in front has it: that is what
    the order means, as in sequence parallelism; nor of weights."""
    twice = sharded("B T -> B T")(lambda x: cumsum(cumsum(x * 2, along="T"), along="T"))
    weights = sharded("* -> L D D2, L D D2")(lambda net: sort(net.layers.w, along="D"))
    weights.fn.__annotations__["net"] = Net
    assert warned(counted, "T=x") == [f"layout T=x: cumsum {WHOLE.format('mask')}"]
    assert len(warned(twice, "T=x")) == 1
    assert warned(counted, "T=x,B=x") == warned(wide, "F=x,T=x") == warned(weights, "D=x") == []


def test_a_scan_that_becomes_a_pipeline_is_warned_of() -> None:
    """Unless it goes along layers: there a pipeline is what one wants."""
    assert warned(layers, "L=x") == warned(recurrent, "D=x") == []
    assert warned(recurrent, "B=x") == [
        "layout B=x: the scan of f goes along B, so it is a pipeline of 2 stages, of which each waits "
        "for the one before"]


@pytest.mark.filterwarnings("error::shardlib.errors.LayoutWarning")
@pytest.mark.parametrize("mesh, layout", [
    ("tp=2", "tp"), ("tp=2", "sp"), ("dp=2,tp=2", "tp+sp+fsdp"), ("dp=2,tk=2,tg=2", "tp+sp+fsdp"),
    ("cp=2", "cp"), ("dp=2,cp=2,tp=2", "tp+sp+fsdp+cp"), ("dp=2,tp=2", "tp+ep"),
    ("pp=2,tp=2", "L=pp,K=tp,F=tp,V=tp")])
def test_of_shipped_layouts_of_shipped_models_none_is_warned_of(mesh: str, layout: str) -> None:
    at = Mesh.parse(mesh)
    for f in (llama.loss, llama.next_token, mixtral.loss):
        lower(f, named_layout(layout, at), mesh=at, config=MIXTRAL if f is mixtral.loss else LLAMA)


def test_an_entry_that_is_nearly_a_dim_is_warned_of() -> None:
    """A layout may have entries for the dims of other functions."""
    long = sharded("batch d_model -> batch d_model")(lambda x: x * 2)
    assert warned(wide, "t=x,V=y") == ["layout t=x: wide has no dim t; it has T"]
    assert warned(long, "d_modle=x,heads=y") == ["layout d_modle=x: f has no dim d_modle; it has d_model"]
    assert warned(long, "d_model=x") == []
