"""Layouts: one ordered line, completed by the longest prefix of axes that is still free."""
from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardlib.errors import SpecError
from shardlib.layout import EXPLICIT, Layout
from shardlib.mesh import Mesh
from shardlib.spec import parse

DIMS = ("B", "T", "D", "K", "F")
AXES = ("dp", "tp", "x", "y")


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    dims = draw(st.permutations(DIMS))
    return Layout({d: tuple(draw(st.permutations(AXES))[:draw(st.integers(1, 3))])
                   for d in dims[:draw(st.integers(0, 5))]})


@st.composite
def completions(draw: st.DrawFn) -> tuple[Layout, tuple[str, ...], dict[str, tuple[str, ...]],
                                          tuple[str, ...]]:
    """A layout, names, what some of them are pinned to, and axes that are taken."""
    axes, names = (list(draw(st.permutations(AXES))),
                   tuple(draw(st.permutations(DIMS))[:draw(st.integers(0, 5))]))
    pinned = {n: tuple(axes.pop() for _ in range(draw(st.integers(0, 2))) if axes)
              for n in names if draw(st.integers(0, 3)) == 0}
    return draw(layouts()), names, pinned, tuple(axes[:draw(st.integers(0, 1))])


def by_hand(layout: Layout, names: tuple[str, ...], pinned: Mapping[str, tuple[str, ...]],
            taken: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """The rule, word for word: the entries in order, each dim taking the longest prefix
    of its axes that is still free."""
    given = [a for n in names for a in pinned.get(n, ())] + list(taken)
    out = {n: pinned.get(n, ()) for n in names}
    for dim, axes in layout.entries.items():
        if dim in names and dim not in pinned:
            free = [i for i in range(len(axes) + 1) if not set(axes[:i]) & set(given)]
            out[dim] = axes[:max(free)]
            given += out[dim]
    return out


@given(completions())
def test_each_dim_takes_the_longest_free_prefix(case: tuple) -> None:
    layout, names, pinned, taken = case
    out = layout.complete(names, pinned, taken)
    assert out == by_hand(layout, names, pinned, taken)
    assert list(out) == list(names)
    axes = [a for split in out.values() for a in split] + list(taken)
    assert len(axes) == len(set(axes))


@given(completions())
def test_completing_twice_changes_nothing(case: tuple) -> None:
    layout, names, pinned, taken = case
    out = layout.complete(names, pinned, taken)
    assert layout.complete(names, out, taken) == out


@given(layouts(), st.permutations(DIMS))
def test_a_value_that_stands_alone_is_completed_over_its_own_dims(layout: Layout, names: list[str]) -> None:
    spec = parse(f"{names[0]} ({names[1]} {names[2]}) {names[3]}/1")
    kind = layout.complete_alone(spec)
    split = layout.complete(spec.names, {names[2]: (), names[3]: ()})
    assert [d.axes for d in kind.dims] == [split[names[0]], split[names[1]], ()]
    assert kind.labels == spec.labels and not kind.owed


def test_what_a_value_owes_is_not_given_to_its_dims() -> None:
    assert str(Layout(T=("tp", "x")).complete_alone(parse("T D +tp"))) == "T D +tp"
    assert str(Layout(T=("x", "tp")).complete_alone(parse("T D +tp"))) == "T/x D +tp"
    assert str(Layout(T="tp", D="tp").complete_alone(parse("T/1 D"))) == "T D/tp"
    assert str(Layout(G="tp").complete_alone(parse("(K G)"))) == "(K G)"


def test_the_order_of_entries_decides() -> None:
    names = ("B", "T", "F")
    assert Layout(B="dp", F="tp", T="tp").complete(names, {}) == dict(B=("dp",), T=(), F=("tp",))
    assert Layout(B="dp", T="tp", F="tp").complete(names, {}) == dict(B=("dp",), T=("tp",), F=())
    assert Layout(F="tp", T=("tp", "dp")).complete(names, {}) == dict(B=(), T=(), F=("tp",))
    assert Layout(F="tp", T=("dp", "tp")).complete(names, {}) == dict(B=(), T=("dp",), F=("tp",))


def test_an_alias_is_its_axes() -> None:
    mesh = Mesh(dp=2, tp=3, ep=("dp", "tp"))
    assert Layout(B="dp", E="ep").on(mesh) == Layout(B="dp", E=("dp", "tp"))
    assert EXPLICIT.on(mesh) is EXPLICIT


# -- text and equality ---------------------------------------------------------------------------------------

@given(layouts())
def test_a_layout_is_read_back(layout: Layout) -> None:
    read = Layout.parse(str(layout))
    assert read == layout and hash(read) == hash(layout) and list(read.entries) == list(layout.entries)
    assert eval(repr(layout)) == layout


def test_order_is_meaning() -> None:
    assert Layout(B="dp", T="tp") != Layout(T="tp", B="dp")
    assert Layout() != EXPLICIT and EXPLICIT != Layout() and repr(EXPLICIT) == "EXPLICIT"


@given(st.one_of(st.text(max_size=20), st.text("BTdp=,/01 ", max_size=20)))
def test_any_text_is_a_layout_or_a_spec_error(text: str) -> None:
    try:
        layout = Layout.parse(text)
    except SpecError:
        return
    assert Layout.parse(str(layout)) == layout


# -- what is refused, in whole -------------------------------------------------------------------------------

@pytest.mark.parametrize("entries, says", (
    ({"B": "d p"}, "layout: 'd p' is no name; use letters, digits and _"),
    ({"B": ""}, "layout: '' is no name; use letters, digits and _"),
    ({"B/": "dp"}, "layout: 'B/' is no name; use letters, digits and _"),
    ({"B": ("dp", 1)}, "layout: 1 is no name; use letters, digits and _"),
    ({"B": ("dp", "dp")}, "layout: B is split over dp/dp; an axis splits a dim once"),
    ({"B": None}, "layout: B is given None; an axis, or a tuple of axes"),
))
def test_a_refusal_says(entries: dict, says: str) -> None:
    with pytest.raises(SpecError) as caught:
        Layout(entries)
    assert str(caught.value) == says


@pytest.mark.parametrize("text, says", (
    ("B", "layout 'B': 'B' is not DIM=AXIS or DIM=AXIS/AXIS"),
    ("B=dp,T=", "layout 'B=dp,T=': 'T=' is not DIM=AXIS or DIM=AXIS/AXIS"),
    ("B=dp/", "layout 'B=dp/': 'B=dp/' is not DIM=AXIS or DIM=AXIS/AXIS"),
    ("B=dp,B=tp", "layout 'B=dp,B=tp': dim B is given twice"),
    (None, "a layout is a string, not NoneType"),
))
def test_a_refused_text_says(text: str, says: str) -> None:
    with pytest.raises(SpecError) as caught:
        Layout.parse(text)
    assert str(caught.value) == says


def test_an_axis_that_the_mesh_lacks() -> None:
    with pytest.raises(SpecError) as caught:
        Layout(B="dp", T="sp").on(Mesh(dp=2, tp=2))
    assert str(caught.value) == "layout, dim T: unknown axis sp; the mesh has dp, tp"
