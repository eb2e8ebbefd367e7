"""Meshes: ranks and coordinates, groups, and where the pieces of an uneven split begin."""
from __future__ import annotations

import threading
from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardlib.errors import SpecError
from shardlib.mesh import MAX_RANKS, Mesh, current_mesh
from shardlib.reports.classes import classes_of
from shardlib.spec import parse


@st.composite
def meshes(draw: st.DrawFn) -> Mesh:
    names = draw(st.permutations(("dp", "tp", "x", "y")))
    return Mesh({n: draw(st.sampled_from((1, 2, 3, 4))) for n in names[:draw(st.integers(0, 3))]})


@st.composite
def splits(draw: st.DrawFn) -> tuple[Mesh, tuple[str, ...], int]:
    """A mesh, some of its axes in any order, and a number of rows."""
    mesh = draw(meshes())
    axes = tuple(draw(st.permutations(list(mesh.axes))))
    return mesh, axes[:draw(st.integers(0, len(axes)))], draw(st.integers(0, 40))


# -- extents -------------------------------------------------------------------------------------------------

@given(splits())
def test_pieces_tile_the_rows_in_order_of_the_axes(case: tuple) -> None:
    mesh, axes, n = case
    group = mesh.group(axes, 0)
    pieces = [mesh.extent(n, axes, mesh.coordinate(r)) for r in group]
    at = 0
    for start, size in pieces:
        assert start == at and size >= 0
        at += size
    assert at == n


@given(splits(), st.integers(0, 3), st.integers(1, 3))
def test_the_rows_of_a_group_are_those_of_whole_units_of_its_first_dim(case: tuple, g: int, h: int) -> None:
    mesh, axes, n = case
    group, sizes, rows = (parse("(K G H)").dims[0].split(axes), dict(K=n, G=g, H=h),
                          [k for k in range(n) for _ in range(g * h)])
    for c in mesh.coordinates():
        (at, some), (start, size) = mesh.extent(n, axes, c), mesh.rows(group, sizes, c)
        assert (rows[start:start + size] == [k for k in range(at, at + some) for _ in range(g * h)]
                and start == at * g * h)


def test_an_axis_that_cuts() -> None:
    """What is split over it has as many rows as it says; what is cut again has them evenly."""
    mesh = Mesh(dp=2, pp=(5, 0, 2))
    assert (str(mesh), Mesh.parse("dp=2,pp=5+0+2"), Mesh(mesh.given)) == ("dp=2,pp=5+0+2", mesh, mesh)
    assert mesh.axes == dict(dp=2, pp=3) and mesh != Mesh(dp=2, pp=3)
    assert [mesh.extent(7, ("pp",), mesh.coordinate(r)) for r in range(3)] == [(0, 5), (5, 0), (5, 2)]
    assert [mesh.extent(7, ("pp", "dp"), mesh.coordinate(r)) for r in (0, 3, 5)] == [(0, 3), (3, 2), (6, 1)]
    with pytest.raises(SpecError) as refused:
        mesh.extent(8, ("pp",), mesh.coordinate(0))
    assert str(refused.value) == "mesh dp=2,pp=5+0+2: 8 rows are split over pp, which cuts 7"
    assert classes_of(mesh, [parse("L/pp")], dict(L=7)).starts == {"dp": (0,), "pp": (0, 1, 2)}
    for wrong in ((), (3, -1), (2, True)):
        with pytest.raises(SpecError):
            Mesh(pp=wrong)


def test_a_value_is_held_by_a_coordinate_that_there_is() -> None:
    mesh = Mesh(pp=3)
    assert [str(mesh.resolve(parse(f"D @pp:{at}")))
            for at in (0, 2, "last")] == ["D @pp:0", "D @pp:2", "D @pp:2"]
    with pytest.raises(SpecError) as refused:
        mesh.resolve(parse("D @pp:3"))
    assert str(refused.value) == 'spec "D @pp:3": axis pp has coordinates 0 to 2, not 3'


@given(splits())
def test_a_piece_lies_in_the_piece_of_every_prefix_and_is_its_split(case: tuple) -> None:
    mesh, axes, n = case
    for c in mesh.coordinates():
        for i in range(len(axes) + 1):
            outer, size = mesh.extent(n, axes[:i], c)
            start, inner = mesh.extent(size, axes[i:], c)
            assert mesh.extent(n, axes, c) == (outer + start, inner)


@given(splits())
def test_the_first_pieces_of_one_axis_hold_one_row_more(case: tuple) -> None:
    mesh, _, n = case
    for axis, k in mesh.axes.items():
        sizes = [mesh.extent(n, (axis,), {axis: i})[1] for i in range(k)]
        assert sizes == [n // k + 1] * (n % k) + [n // k] * (k - n % k)


@given(splits())
def test_other_axes_do_not_matter(case: tuple) -> None:
    mesh, axes, n = case
    for c in mesh.coordinates():
        assert mesh.extent(n, axes, c) == mesh.extent(n, axes, {a: c[a] for a in axes})


def test_a_nested_split_is_not_the_split_of_the_product() -> None:
    nested, flat = Mesh(x=2, y=3), Mesh(xy=6)
    assert [nested.extent(8, ("x", "y"), c)[1] for c in nested.coordinates()] == [2, 1, 1, 2, 1, 1]
    assert [flat.extent(8, ("xy",), c)[1] for c in flat.coordinates()] == [2, 2, 1, 1, 1, 1]


@given(meshes(), st.integers(0, 9), st.integers(0, 9))
def test_the_local_shape_is_that_of_the_extents(mesh: Mesh, t: int, k: int) -> None:
    axes = list(mesh.axes)
    spec = parse("T 3 (K G)").split({"T": tuple(axes[:1]), "(K G)": tuple(axes[1:])})
    for c in mesh.coordinates():
        assert mesh.local_shape(spec, dict(T=t, K=k, G=2),
                                c) == (mesh.extent(t, axes[:1], c)[1], 3, 2 * mesh.extent(k, axes[1:], c)[1])


# -- ranks ---------------------------------------------------------------------------------------------------

@given(meshes())
def test_ranks_and_coordinates_are_inverse_and_the_last_axis_runs_fastest(mesh: Mesh) -> None:
    coordinates = mesh.coordinates()
    assert len(coordinates) == mesh.world_size == prod(mesh.axes.values())
    assert [mesh.rank(c) for c in coordinates] == list(range(mesh.world_size))
    assert [mesh.coordinate(r) for r in range(mesh.world_size)] == coordinates
    assert sorted(coordinates, key=lambda c: tuple(c.values())) == coordinates


@given(splits())
def test_groups_over_some_axes_are_a_partition_in_the_order_of_the_axes(case: tuple) -> None:
    mesh, axes, _ = case
    groups = {mesh.group(axes, r) for r in range(mesh.world_size)}
    assert sorted(r for g in groups for r in g) == list(range(mesh.world_size))
    for group in groups:
        assert len(group) == mesh.size(axes)
        assert [mesh.group(axes, r) for r in group] == [group] * len(group)
        places = [tuple(mesh.coordinate(r)[a] for a in axes) for r in group]
        assert places == sorted(places)


def test_the_order_of_axes_is_the_order_of_the_group() -> None:
    mesh = Mesh(dp=2, tp=3)
    assert mesh.group(("dp", "tp"), 4) == (0, 1, 2, 3, 4, 5)
    assert mesh.group(("tp", "dp"), 4) == (0, 3, 1, 4, 2, 5)
    assert mesh.group(("dp",), 4) == (1, 4)
    assert mesh.group((), 4) == (4,)


# -- text, equality, the mesh in force -----------------------------------------------------------------------

@given(meshes(), st.data())
def test_a_mesh_is_read_back(mesh: Mesh, data: st.DataObject) -> None:
    axes = data.draw(st.permutations(list(mesh.axes)))
    made = Mesh({**mesh.axes, **({"all_": tuple(axes)} if axes else {})})
    assert Mesh.parse(str(made)) == made and hash(Mesh.parse(str(made))) == hash(made)
    assert eval(repr(made)) == made


def test_the_order_of_axes_is_part_of_a_mesh() -> None:
    assert Mesh(x=2, y=3) != Mesh(y=3, x=2)
    assert Mesh(x=2, y=3).coordinate(1) == dict(x=0, y=1) and Mesh(y=3, x=2).coordinate(1) == dict(y=0, x=1)


def test_the_mesh_in_force_is_the_innermost_and_each_thread_has_its_own() -> None:
    outer, inner, seen = Mesh(x=2), Mesh(y=3), []
    assert current_mesh() == Mesh()
    with outer:
        with inner:
            with outer:
                assert current_mesh() is outer
            assert current_mesh() is inner and current_mesh(outer) is outer
            thread = threading.Thread(target=lambda: seen.append(current_mesh()))
            thread.start()
            thread.join()
        assert current_mesh() is outer
    assert current_mesh() == Mesh() and seen == [Mesh()]


@given(st.one_of(st.text(max_size=20), st.text("xydp=,/0123 ", max_size=20)))
def test_any_text_is_a_mesh_or_a_spec_error(text: str) -> None:
    try:
        mesh = Mesh.parse(text)
    except SpecError:
        return
    assert Mesh.parse(str(mesh)) == mesh


# -- what is refused, in whole -------------------------------------------------------------------------------

@pytest.mark.parametrize("axes, says", (
    (dict(x=0), "mesh: axis x has size 0; a size is an integer of at least 1"),
    (dict(x=-2), "mesh: axis x has size -2; a size is an integer of at least 1"),
    (dict(x=True), "mesh: axis x has size True; a size is an integer of at least 1"),
    (dict(x=2.0), "mesh: axis x has size 2.0; a size is an integer of at least 1"),
    (dict(x="y"), "mesh: axis x has size 'y'; a size is an integer of at least 1"),
    ({"a b": 2}, "mesh: 'a b' is no axis name; use letters, digits and _"),
    ({"": 2}, "mesh: '' is no axis name; use letters, digits and _"),
    ({3: 2}, "mesh: 3 is no axis name; use letters, digits and _"),
    ({"x\n": 2}, "mesh: 'x\\n' is no axis name; use letters, digits and _"),
    (dict(x=2, e=("x", "y")), "mesh: alias e names x, y; it may name each of the axes x once"),
    (dict(x=2, e=("x", "x")), "mesh: alias e names x, x; it may name each of the axes x once"),
    (dict(x=2, e=()), "mesh: alias e names nothing; it may name each of the axes x once"),
    (dict(x=2, e=("x",), f=("e",)), "mesh: alias f names e; it may name each of the axes x once"),
    (dict(x=2 * MAX_RANKS), "mesh: 2097152 ranks; the most allowed is 1048576"),
    ({f"a{i}": 1 for i in range(65)}, "mesh: 65 axes; the most allowed is 64"),
))
def test_a_refusal_says(axes: dict, says: str) -> None:
    with pytest.raises(SpecError) as caught:
        Mesh(axes)
    assert str(caught.value) == says


@pytest.mark.parametrize("text, says", (
    ("x", "mesh 'x': 'x' is not NAME=SIZE"),
    ("x=2,y", "mesh 'x=2,y': 'y' is not NAME=SIZE"),
    ("x=-1", "mesh 'x=-1': 'x=-1' is not NAME=SIZE"),
    ("x=1e3", "mesh 'x=1e3': 'x=1e3' is not NAME=SIZE"),
    ("x=9999999999", "mesh 'x=9999999999': 'x=9999999999' is not NAME=SIZE"),
    ("x=2,x=3", "mesh 'x=2,x=3': axis x is given twice"),
    ("x=0", "mesh: axis x has size 0; a size is an integer of at least 1"),
    (2, "a mesh is a string, not int"),
))
def test_a_refused_text_says(text: str, says: str) -> None:
    with pytest.raises(SpecError) as caught:
        Mesh.parse(text)
    assert str(caught.value) == says
