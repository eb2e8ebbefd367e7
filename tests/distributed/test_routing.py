"""Routing by measurement: the fastest that may take the call, by the table; and the tables themselves."""
from __future__ import annotations

import math
import os
import pwd
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from launching import ranks

from shardlib.distributed import GroupCoordinator, Runtime, connect, routing, runtime
from shardlib.distributed.communicators.alone import Alone
from shardlib.distributed.communicators.protocol import Call
from shardlib.distributed.router import REMEMBERED
from shardlib.distributed.routing import SHIPPED, UNMEASURED, Curve, Table, find_table, hardware, own_file
from shardlib.distributed.topology import hosts, identity
from shardlib.errors import SpecError
from shardlib.mesh import Mesh

CPU = torch.device("cpu")
CALL = Call("all_reduce", "sum", torch.float32, "cpu", 4096)


def curve(communicator: str, *points: tuple[int, float], name: str = "all_reduce", size: int = 2,
          dtype: str = "float32", capturing: bool = False) -> Curve:
    return Curve(name, size, dtype, capturing, communicator, points)


class Named(Alone):
    def __init__(self, name: str, deterministic: bool = True, most: float = math.inf) -> None:
        self.name, self.deterministic, self.most = name, deterministic, most

    def supports(self, call: Call) -> str | None:
        return None if call.nbytes <= self.most else f"{self.name} takes {self.most} bytes"


def group(*communicators: Alone, table: Table = UNMEASURED, deterministic: bool = False) -> GroupCoordinator:
    return GroupCoordinator("tp", (0, 1), 0, 0, CPU, communicators, Alone(), table=table,
                            deterministic=deterministic)


@given(st.lists(st.tuples(st.integers(1, 1 << 30), st.floats(0.5, 1e6)), min_size=1, max_size=6,
                unique_by=lambda p: p[0]).map(sorted),
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
    assert ([g.router.route(CALL._replace(nbytes=n)).name for n in (100, 2048, 60000, 70000)]
            == ["a", "a", "b", "b"])
    assert g.router.route(CALL._replace(name="broadcast", op=None)).name == "c"  # not measured: the first


def test_a_choice_says_why() -> None:
    table = Table("x", {}, (curve("a", (1024, 5.0)), curve("b", (1024, 50.0))))
    g = group(Named("c", most=8), Named("b"), Named("a"), table=table)
    assert g.router.choice(CALL._replace(nbytes=1024)) == ("a", 5.0,
                                                           "measured: a 5 µs, b 50 µs; c takes 8 bytes")
    other = GroupCoordinator("tp", (0, 1), 0, 0, CPU, (Named("b"),), Alone(),
                             declined={"nvlink": "members run on 2 hosts"})
    assert other.router.choice(CALL) == ("b", None,
                                         "b, the first that takes it; no nvlink: members run on 2 hosts")


def test_another_table_holds_for_calls_that_were_made_before() -> None:
    one, other = (Table("x", {}, (curve("a", (1024, a)), curve("b", (1024, 7.0)))) for a in (5.0, 9.0))
    g = group(Named("a"), Named("b"), table=one)
    x, asked = torch.ones(1024), []
    for table in (one, other, one):
        g.router.use(table)
        asked.append(
            (g.router.route(CALL).name, g.route("all_reduce", x, "sum").name, g.router.choice(CALL).us))
    assert asked == [("a", "a", 5.0), ("b", "b", 7.0), ("a", "a", 5.0)]


def test_what_is_remembered_is_told_apart_by_all_that_a_call_says() -> None:
    """And forgotten before it is too much."""
    g = group(Named("small", most=8), Named("any"))
    for nbytes in (8, 9, 8, 9):
        assert g.router.route(CALL._replace(nbytes=nbytes)).name == ("small" if nbytes == 8 else "any")
    for nbytes in range(2 * REMEMBERED):
        g.router.route(CALL._replace(nbytes=nbytes))
    assert 0 < len(g.router.known) <= REMEMBERED


def test_only_what_adds_in_rank_order_is_deterministic() -> None:
    table = Table("x", {}, (curve("fast", (1024, 5.0)), curve("exact", (1024, 50.0))))
    fast, exact = Named("fast", deterministic=False), Named("exact")
    assert group(fast, exact, table=table).router.route(CALL).name == "fast"
    careful = group(fast, exact, table=table, deterministic=True)
    assert (careful.router.route(CALL).name == "exact"
            and careful.router.route(CALL._replace(op=None)).name == "fast")
    with pytest.raises(SpecError) as refused:
        group(fast, deterministic=True).router.route(CALL)
    assert str(refused.value) == "all_reduce over tp: fast does not add up in rank order"


def test_a_curve_of_another_dtype_serves_where_there_is_none_of_this() -> None:
    table = Table("x", {}, (curve("a", (1, 1.0), dtype="bfloat16"), curve("a", (1, 3.0), dtype="int8"),
                            curve("a", (1, 9.0), capturing=True)))
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
    (shipped := tmp_path / "shipped").mkdir()
    monkeypatch.setattr(routing, "SHIPPED", shipped)
    theirs, foreign = Table(hardware(CPU), {"date": "2025-01-01"}), Table("elsewhere", {})
    (shipped / "a.json").write_bytes(foreign.encode())
    (shipped / "b.json").write_bytes(theirs.encode())
    assert find_table(CPU) == mine  # measured here, before what came with the package
    own_file(CPU).write_bytes(foreign.encode())
    assert find_table(CPU) == theirs
    (shipped / "b.json").unlink()
    assert find_table(CPU) == UNMEASURED
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


@given(st.lists(st.tuples(st.integers(1, (1 << 60) - 1), st.floats(0, 1e12, exclude_min=True)), min_size=1,
                max_size=4, unique_by=lambda p: p[0]).map(sorted),
       st.integers(1, 1 << 60), st.integers(1, 1 << 60))
@example([(1024, 1.0), (1025, 2.0)], 1 << 40, 1 << 41)
@example([(1 << 59, 1.0), ((1 << 59) + 1, 2.0)], (1 << 59) + 2, 1 << 60)
@example([(1, 1e12), (2, 5e-324)], 3, 1 << 60)
def test_beyond_the_largest_size_the_time_neither_falls_nor_outruns_the_bytes(points: list[tuple[int, float]],
                                                                              one: int, other: int) -> None:
    """Of every table that decodes."""
    (c,) = Table.decode(Table("x", {}, (curve("a", *points),)).encode(), "t.json").curves
    last, (few, many) = points[-1][0], sorted((one, other))
    assert 0 <= c.us(one) < math.inf
    if few >= last:
        assert c.us(few) * (1 - 1e-9) <= c.us(many) <= c.us(few) * many / few * (1 + 1e-9)


def test_beyond_the_largest_size_the_line_goes_on() -> None:
    assert curve("a", (1, 9.0), (1024, 10.0), (4096, 20.0)).us(16384) == pytest.approx(40.0)
    assert (curve("a", (1024, 1.0), (1025, 2.0)).us(1025 * 10) == pytest.approx(20.0)
            and curve("a", (1, 3.0), (2, 2.0)).us(1 << 40) == 2.0)


AT = "at `$.curves[0].points"


@pytest.mark.parametrize("points, wrong", [
    ("[]", "Expected `array` of length >= 1 - at `$.curves[0].points`"),
    ("[[8, 1.0], [4, 2.0]]", "all_reduce by a: its points are sizes that rise"),
    ("[[4, 1.0], [4, 2.0]]", "all_reduce by a: its points are sizes that rise"),
    ("[[0, 1.0], [4, 2.0]]", f"Expected `int` >= 1 - {AT}[0][0]`"),
    ("[[-4, 1.0], [4, 2.0]]", f"Expected `int` >= 1 - {AT}[0][0]`"),
    (f"[[4, 1.0], [{10 ** 30}, 2.0]]", f"Expected `int` <= {(1 << 60) - 1} - {AT}[1][0]`"),
    ("[[4, 0.0]]", f"Expected `float` > 0.0 - {AT}[0][1]`"),
    ("[[4, -1]]", f"Expected `float` > 0.0 - {AT}[0][1]`"),
    ("[[4, 1e308]]", f"Expected `float` <= 1000000000000.0 - {AT}[0][1]`"),
    ("[[4, 1e999]]", f"Number out of range - {AT}[0][1]`"),
    ("[[4, null]]", f"Expected `float`, got `null` - {AT}[0][1]`"),
    ("[[4, NaN]]", "JSON is malformed: invalid character (byte 157)")])
def test_points_that_are_no_curve(points: str, wrong: str) -> None:
    fields = '"name": "all_reduce", "size": 2, "dtype": "float32", "capturing": false, "communicator": "a"'
    with pytest.raises(SpecError) as refused:
        Table.decode(f'{{"hardware": "x", "provenance": {{}}, "curves": [{{{fields}, "points": '
                     f'{points}}}]}}'.encode(), "t.json")
    assert str(refused.value) == f"routing table t.json: {wrong}"


def test_a_file_that_is_no_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "t.json"
    monkeypatch.setenv("SHARDLIB_ROUTES", str(file))
    for text, wrong in ((b'{"hardware": "\xff"}',
                         "'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"),
                        (b'{"more": ' + b"[" * 200_000,
                         "maximum recursion depth exceeded while deserializing an object")):
        file.write_bytes(text)
        with pytest.raises(SpecError) as refused:
            find_table(CPU)
        assert str(refused.value) == f"routing table {file}: {wrong}"


@pytest.fixture
def locked(tmp_path: Path) -> Iterator[Path]:
    """A folder that this process may not enter, root or not."""
    folder = tmp_path / "locked"
    folder.mkdir(0)
    if os.geteuid() == 0:
        os.seteuid(65534)
    yield folder
    os.seteuid(os.getuid())
    folder.chmod(0o700)


def test_an_own_table_in_a_locked_folder_is_none(locked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SHARDLIB_ROUTES", raising=False)
    for cache in (locked, locked.parent / ("x" * 300)):
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
        assert find_table(CPU).hardware in (UNMEASURED.hardware, hardware(CPU))


def test_an_own_table_that_cannot_be_read_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("SHARDLIB_ROUTES", raising=False)
    own_file(CPU).parent.mkdir()
    own_file(CPU).symlink_to("/proc/self/mem")              # a file, whose first byte no process has
    assert find_table(CPU).hardware in (UNMEASURED.hardware, hardware(CPU))


def test_a_user_without_a_home_has_no_own_table(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SHARDLIB_ROUTES", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
    assert own_file(CPU) is None and find_table(CPU).hardware in (UNMEASURED.hardware, hardware(CPU))


def test_whatever_is_wrong_rank_0_can_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    here = SimpleNamespace(device=CPU, table=UNMEASURED)
    monkeypatch.setenv("SHARDLIB_ROUTES", "\udcff")
    assert Runtime._find_table(here) == (b"", "SHARDLIB_ROUTES: there is no file \\udcff")
    given = Table("given", {})
    assert Runtime._find_table(SimpleNamespace(device=CPU, table=given)) == (given.encode(), None)
    monkeypatch.setattr(runtime, "find_table", {}.__getitem__)
    assert Runtime._find_table(here) == (b"", "the routing table was not found: KeyError: device(type='cpu')")


PROGRAM = """
import os, sys, torch
from pathlib import Path
from shardlib.distributed import connect, runtime
from shardlib.errors import SpecError
from shardlib.mesh import Mesh

def meet():
    try:
        with connect(Mesh(tp=2), "cpu", 20.0) as r:
            r.create_groups([("tp",)])
            return str(r.group(("tp",)).all_reduce(torch.ones(1)).item())
    except SpecError as error:
        return str(error)

rank, said = os.environ["RANK"], []
os.environ["XDG_CACHE_HOME"] = "x" * 300
said.append(meet())
if rank == "0":
    runtime.find_table = {}.__getitem__
said.append(meet())
os.environ["SHARDLIB_TIMEOUT_S"] = "nan"
try:
    connect(Mesh(tp=2), "cpu")
except SpecError as error:
    said.append(str(error))
Path(sys.argv[1], rank).write_text("\\n".join(said))
"""


def test_no_rank_waits_for_one_without_a_table(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    done = ranks(2, [tmp_path / "program.py", tmp_path], GLOO_SOCKET_IFNAME="lo")
    said = ["2.0", "the routing table was not found: KeyError: device(type='cpu')",
            "SHARDLIB_TIMEOUT_S is 'nan'; it is a number of seconds from 1 to 1e9"]
    assert [(tmp_path / rank).read_text().split("\n") for rank in "01"] == [said] * 2, done.stderr


@pytest.mark.parametrize("seconds", [math.nan, math.inf, -math.inf, 0, -1, 1e-9, 0.99, 1.1e9])
def test_a_time_in_which_no_job_can_wait(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    for asked, text in (({"timeout_s": seconds}, f"connect: timeout_s is {seconds!r}"),
                        ({}, f"SHARDLIB_TIMEOUT_S is {str(seconds)!r}")):
        monkeypatch.setenv("SHARDLIB_TIMEOUT_S", str(seconds))
        with pytest.raises(SpecError) as refused:
            connect(Mesh(), "cpu", **asked)
        assert str(refused.value) == f"{text}; it is a number of seconds from 1 to 1e9"


def test_a_time_that_is_no_number() -> None:
    for given_, text in (("soon", "'soon'"), ([], "[]"), (1 << 5000, repr(1 << 5000))):
        with pytest.raises(SpecError) as refused:
            connect(Mesh(), "cpu", given_)
        assert str(refused.value) == f"connect: timeout_s is {text}; it is a number of seconds"


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
