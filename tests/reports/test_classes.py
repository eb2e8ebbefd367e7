"""Classes of ranks: all ranks of one hold pieces of one size,
and no axis is cut where sizes do not change."""
from __future__ import annotations

import itertools

import pytest

from shardlib.mesh import Mesh
from shardlib.reports.classes import LISTED, Classes, PerRank, classes_of
from shardlib.spec import parse

ORDERS = [order for k in (1, 2, 3) for order in itertools.permutations("xyz", k)]


@pytest.mark.parametrize("order", ORDERS, ids="/".join)
def test_ranks_of_a_class_hold_pieces_of_one_size(order: tuple[str, ...]) -> None:
    spec = parse("N/" + "/".join(order))
    for x, y, z, n in itertools.product((1, 2, 3, 5), (1, 2, 4), (1, 3), range(0, 30)):
        mesh = Mesh(x=x, y=y, z=z)
        classes, sizes = classes_of(mesh, [spec], dict(N=n)), {}
        for c, here in zip(classes.by_rank(range(len(classes))), mesh.coordinates()):
            sizes.setdefault(c, set()).add(mesh.local_shape(spec, dict(N=n), here))
        assert all(len(found) == 1 for found in sizes.values()), (mesh, n)
        assert len(sizes) == len(classes)
        if n % mesh.size(order) == 0:
            assert len(classes) == 1


def test_what_one_coordinate_holds_is_a_class_of_its_own() -> None:
    mesh = Mesh(pp=5, tp=2)
    assert classes_of(mesh, [parse("N @pp:2"), parse("N +tp")],
                      dict(N=4)).starts == {"pp": (0, 2, 3), "tp": (0,)}
    assert classes_of(mesh, [parse("N @pp:last")], dict(N=4)).starts == {"pp": (0, 4), "tp": (0,)}


CLASSES = Classes(Mesh(a=5, b=2, c=3), {"a": (0, 2), "b": (0,), "c": (0, 1)})


def test_classes_of_a_mesh() -> None:
    assert len(CLASSES) == 4 and CLASSES.firsts[2] == {"a": 2, "b": 0, "c": 0}
    assert [CLASSES.count(c) for c in range(4)] == [2 * 2 * 1, 2 * 2 * 2, 3 * 2 * 1, 3 * 2 * 2]
    assert CLASSES.by_rank("pqrs") == ("p", "q", "q") * 4 + ("r", "s", "s") * 6
    assert Classes(Mesh(), {}).by_rank([7]) == (7,)


@pytest.mark.parametrize("axes", [(), ("a",), ("c", "a"), ("b", "c"), ("c", "b", "a")], ids="/".join)
def test_who_meets_whom(axes: tuple[str, ...]) -> None:
    """In the order of the group, each class once; and how many groups there are."""
    mesh, kind = CLASSES.mesh, CLASSES.by_rank(range(4))
    for c, here in enumerate(CLASSES.firsts):
        ranks = mesh.group(axes, mesh.rank(here))
        assert CLASSES.peers(c, axes) == list(dict.fromkeys(kind[r] for r in ranks))
        groups = {mesh.group(axes, rank) for rank in range(mesh.world_size) if kind[rank] == c}
        assert CLASSES.groups(c, axes) == len(groups)


def test_plain_data() -> None:
    few, many = (Classes(Mesh(a=n, b=2), {"a": (0, 3, 4), "b": (0,)}) for n in (LISTED // 2, LISTED))
    assert (PerRank(few, (1, 2, 1)).plain() == list(PerRank(few, (1, 2, 1)).by_rank) == [1] * 6 + [2] * 2
            + [1] * (LISTED - 8))
    assert PerRank(many, (1, 2, 1)).plain() == [
        {"bytes": 2, "ranks": 2, "where": ["a=3,b=0-1"]},
        {"bytes": 1, "ranks": 2 * LISTED - 2, "where": ["a=0-2,b=0-1", f"a=4-{LISTED - 1},b=0-1"]}]
    assert (PerRank(many, (1, 2, 1)).total, PerRank(many, (1, 2, 1)).most) == (2 * LISTED + 2, 2)
