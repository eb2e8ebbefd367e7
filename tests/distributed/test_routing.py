"""Routing by measurement: the fastest that may take the call, by the table; and the tables themselves."""
from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardlib.distributed import GroupCoordinator
from shardlib.distributed.communicators.alone import Alone
from shardlib.distributed.communicators.protocol import Call
from shardlib.distributed.routing import SHIPPED, UNMEASURED, Curve, Table, find_table, hardware, own_file
from shardlib.distributed.topology import hosts, identity
from shardlib.errors import SpecError

CPU = torch.device("cpu")
CALL = Call("all_reduce", "sum", torch.float32, "cpu", 4096)


def curve(communicator: str, *points: tuple[int, float], name: str = "all_reduce", size: int = 2, dtype: str = "float32", capturing: bool = False) -> Curve:
    return Curve(name, size, dtype, capturing, communicator, points)


class Named(Alone):
    def __init__(self, name: str, deterministic: bool = True, most: float = math.inf) -> None:
        self.name, self.deterministic, self.most = name, deterministic, most

    def supports(self, call: Call) -> str | None:
        return None if call.nbytes <= self.most else f"{self.name} takes {self.most} bytes"


def group(*communicators: Alone, table: Table = UNMEASURED, deterministic: bool = False) -> GroupCoordinator:
    return GroupCoordinator("tp", (0, 1), 0, 0, CPU, communicators, Alone(), table=table, deterministic=deterministic)


@given(st.lists(st.tuples(st.integers(1, 1 << 30), st.floats(0.5, 1e6)), min_size=1, max_size=6, unique_by=lambda p: p[0]).map(sorted),
       st.integers(1, 1 << 31))
def test_between_two_sizes_the_time_is_between_theirs(points: list[tuple[int, float]], nbytes: int) -> None:
    c = curve("a", *points)
    assert all(c.us(n) == pytest.approx(us) for n, us in points)
    below, above = [us for n, us in points if n <= nbytes], [us for n, us in points if n >= nbytes]
    if below and above:
        ends = sorted((below[-1], above[0]))
        assert ends[0] * (1 - 1e-9) <= c.us(nbytes) <= ends[1] * (1 + 1e-9)


def test_the_fastest_that_supports_the_call_takes_it() -> None:
    table = Table("x", {}, (curve("a", (1024, 5.0), (65536, 500.0)), curve("b", (1024, 50.0), (65536, 60.0))))
    g = group(Named("c"), Named("b"), Named("a", most=65536), table=table)
    assert [g.router.route(CALL._replace(nbytes=n)).name for n in (100, 2048, 60000, 70000)] == ["a", "a", "b", "b"]
    assert g.router.route(CALL._replace(name="broadcast", op=None)).name == "c"           # not measured: the first


def test_a_choice_says_why() -> None:
    table = Table("x", {}, (curve("a", (1024, 5.0)), curve("b", (1024, 50.0))))
    g = group(Named("c", most=8), Named("b"), Named("a"), table=table)
    assert g.router.choice(CALL._replace(nbytes=1024)) == ("a", 5.0, "measured: a 5 µs, b 50 µs; c takes 8 bytes")
    other = GroupCoordinator("tp", (0, 1), 0, 0, CPU, (Named("b"),), Alone(), declined={"nvlink": "members run on 2 hosts"})
    assert other.router.choice(CALL) == ("b", None, "b, the first that takes it; no nvlink: members run on 2 hosts")


def test_only_what_adds_in_rank_order_is_deterministic() -> None:
    table = Table("x", {}, (curve("fast", (1024, 5.0)), curve("exact", (1024, 50.0))))
    fast, exact = Named("fast", deterministic=False), Named("exact")
    assert group(fast, exact, table=table).router.route(CALL).name == "fast"
    careful = group(fast, exact, table=table, deterministic=True)
    assert careful.router.route(CALL).name == "exact" and careful.router.route(CALL._replace(op=None)).name == "fast"
    with pytest.raises(SpecError) as refused:
        group(fast, deterministic=True).router.route(CALL)
    assert str(refused.value) == "all_reduce over tp: fast does not add up in rank order"


def test_a_curve_of_another_dtype_serves_where_there_is_none_of_this() -> None:
    table = Table("x", {}, (curve("a", (1, 1.0), dtype="bfloat16"), curve("a", (1, 3.0), dtype="int8"), curve("a", (1, 9.0), capturing=True)))
    assert [table.us(CALL._replace(dtype=d), 2, "a") for d in (torch.int8, torch.float64)] == [3.0, 1.0]
    assert table.us(CALL, 3, "a") is None and table.us(CALL._replace(capturing=True), 2, "a") == 9.0
    assert table.us(CALL._replace(nbytes=-1), 2, "a") is None


def test_tables_are_found_and_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("SHARDLIB_ROUTES", raising=False)
    mine = Table(hardware(CPU), {"date": "2026-01-01"}, (curve("a", (1, 1.0)),))
    assert find_table(CPU) == UNMEASURED or find_table(CPU).hardware == hardware(CPU)
    own_file(CPU).parent.mkdir()
    own_file(CPU).write_bytes(mine.encode())
    assert find_table(CPU) == mine
    other = tmp_path / "other.json"
    other.write_bytes(Table("elsewhere", {}).encode())
    monkeypatch.setenv("SHARDLIB_ROUTES", str(other))
    assert find_table(CPU) == Table("elsewhere", {})
    other.write_text('{"hardware": 3}')
    with pytest.raises(SpecError) as refused:
        find_table(CPU)
    assert str(refused.value) == f"routing table {other}: Expected `str`, got `int` - at `$.hardware`"
    monkeypatch.setenv("SHARDLIB_ROUTES", str(tmp_path / "none.json"))
    with pytest.raises(SpecError) as refused:
        find_table(CPU)
    assert str(refused.value) == f"SHARDLIB_ROUTES: there is no file {tmp_path / 'none.json'}"


@pytest.mark.parametrize("points", [(), ((8, 1.0), (4, 2.0)), ((4, 1.0), (4, 2.0)), ((4, 0.0),)])
def test_points_that_are_no_curve(points: tuple[tuple[int, float], ...]) -> None:
    with pytest.raises(SpecError) as refused:
        Table.decode(Table("x", {}, (curve("a", *points),)).encode(), "t.json")
    assert str(refused.value) == "routing table t.json: all_reduce by a: its points are sizes that rise, with µs above 0"


def test_a_maximum_is_not_predicted_from_sums() -> None:
    table = Table("x", {}, (curve("a", (1024, 5.0)),))
    assert table.us(CALL, 2, "a") == 5.0 and table.us(CALL._replace(op="max"), 2, "a") is None


def test_shipped_tables_are_tables() -> None:
    for file in SHIPPED.glob("*.json"):
        table = Table.decode(file.read_bytes(), file.name)
        assert table.curves and {"versions", "date", "commit"} <= set(table.provenance), file
        assert all(c.points == tuple(sorted(c.points)) for c in table.curves)


def test_processes_of_one_machine_have_one_host() -> None:
    assert hosts([identity(), "elsewhere", identity()]) == (0, 1, 0)
