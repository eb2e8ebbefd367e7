"""calibrate: what it measures, that all ranks have the same table, and that calls are routed by it."""
from __future__ import annotations

import datetime
import json
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from launching import ranks
from pool import Pool

from shardlib.distributed import calibrate
from shardlib.distributed.calibrate import SIZES, axes_of, main, maker, measure, merged, target, write
from shardlib.distributed.communicators.protocol import Call
from shardlib.distributed.communicators.shared_memory import shared_memory
from shardlib.distributed.routing import Curve, Table, own_file
from shardlib.errors import SpecError

CPU = torch.device("cpu")


def test_every_collective_of_every_communicator_in_every_group(pool: Pool) -> None:
    both, taken = "torch.distributed (gloo)", ("all_reduce", "reduce_scatter", "all_gather", "broadcast")
    want = sorted([name, size, "float32", False, who, [2048, 8192]] for size in (2, 4)
                  for who in (both, "shared memory")
                  for name in (*taken, *(["all_to_all"] if who == both else [])))
    world = pool.connect("a=2,b=2", [("b",), ("a", "b")], 4)
    assert (world.run("calibrated")
            == [{"curves": want, "positive": True, "fastest": True, "predicted": True, "same": True}] * 4)


@given(st.integers(2, 64))
def test_a_mesh_for_any_number_of_ranks(ranks: int) -> None:
    axes = axes_of(ranks)
    product = 1
    for size in axes.values():
        product *= size
    assert (product == ranks and list(axes.values()) == sorted(axes.values(), reverse=True)
            and len(set(axes)) == len(axes))


@given(st.integers(2, 200), st.sampled_from((torch.bfloat16, torch.float32)))
def test_pieces_are_multiples_of_16_bytes(ranks: int, dtype: torch.dtype) -> None:
    """Whatever the number of ranks: what takes no others is measured too.

    Sizes without a piece for each rank are left out.
    """
    asked: list[Call] = []
    refuses = SimpleNamespace(supports=lambda call: asked.append(call) or "not here")
    group = SimpleNamespace(world_size=ranks, device=torch.device("cpu"))
    assert measure(group, "all_gather", refuses, dtype, False) is None
    assert [call.nbytes for call in asked] == [n for size in SIZES
                                               if (n := size // (16 * ranks) * 16 * ranks)]


def test_what_another_run_has_measured_stays() -> None:
    def curve(size: int, us: float) -> Curve:
        return Curve("all_reduce", size, "float32", False, "gloo", ((1, us),))
    old, new = (Table("here", {"date": "1"}, (curve(2, 1.0), curve(4, 2.0))),
                Table("here", {"date": "2"}, (curve(2, 3.0),)))
    assert merged(old, new) == Table("here", {"date": "2"}, (curve(4, 2.0), curve(2, 3.0)))
    assert merged(Table("elsewhere", {}, (curve(8, 1.0),)), new) == new and merged(None, new) == new


def test_where_figures_come_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commit of a checkout; of what is installed, or where there is no git, the version."""
    today, asked = datetime.date.today().isoformat(), []
    torchs = {"versions": f"torch {torch.__version__}", "date": today}

    def git(command: list[str], **how: object) -> SimpleNamespace:
        asked.append((command, how["cwd"]))
        return SimpleNamespace(stdout="abc123\n" if how["text"] else b"abc123\n")
    monkeypatch.setattr(calibrate, "__file__", str(tmp_path / "a" / "b" / "c.py"))
    monkeypatch.setattr(calibrate.subprocess, "run", git)
    installed = {**torchs, "commit": f"shardlib {version('shardlib')}"}
    assert calibrate.provenance(CPU) == installed and not asked
    (tmp_path / ".git").mkdir()
    assert calibrate.provenance(CPU) == {**torchs, "commit": "abc123"}
    assert asked == [(["git", "rev-parse", "--short", "HEAD"], tmp_path)]
    monkeypatch.setattr(calibrate.subprocess, "run", lambda *_, **__: (_ for _ in ()).throw(OSError()))
    assert calibrate.provenance(CPU) == installed


def test_times_are_of_the_slowest_member(monkeypatch: pytest.MonkeyPatch) -> None:
    """The median of rounds, each as long as its slowest member took; one call before is not timed."""
    ticks, calls, gathered = iter([0.0, 0.5, 10.0, 11.0, 20.0, 20.25, 30.0, 36.0, *range(100, 140)]), [], []

    def all_gather(x: torch.Tensor, dim: int, sizes: tuple[int, ...]) -> torch.Tensor:
        gathered.append((x.tolist(), dim, sizes))
        return torch.cat([x, x.flip(0)])
    group = SimpleNamespace(world_size=2, barrier=lambda: calls.append("barrier"), all_gather=all_gather)
    monkeypatch.setattr(calibrate, "ROUNDS", 4)
    monkeypatch.setattr(calibrate.time, "perf_counter", lambda: next(ticks))
    took = calibrate.time_on_cpu(lambda: calls.append("call"), group, 2)
    assert calls == ["call", *["barrier", "call", "call"] * 4]
    assert gathered == [([0.25, 0.5, 0.125, 3.0], 0, (4, 4))]
    assert took == pytest.approx(1e6 * (0.5 + 3.0) / 2)


def test_one_process_has_nothing_to_measure(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["--out", str(tmp_path / "table.json")]) == 2
    assert capsys.readouterr().err == (
        "calibrate measures what processes say to each other: start it with torchrun --nproc-per-node N\n")
    assert not list(tmp_path.iterdir())


def refusal(out: Path | None) -> str:
    with pytest.raises(SpecError) as refused:
        target(out, CPU)
    return str(refused.value)


def test_where_no_table_can_be_written_is_known_before(tmp_path: Path,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    damaged, long = tmp_path / "damaged.json", tmp_path / ("x" * 253)
    damaged.write_text("{")
    for out, wrong in ((damaged, "Input data was truncated"), (tmp_path, "it is there, and no file"),
                       (Path("/dev/null"), "it is there, and no file"), (damaged / "t.json", "File exists"),
                       (long, "File name too long")):
        assert refusal(out) == f"routing table {out}: {wrong}"
    assert refusal(Path("/proc/t.json")).startswith("routing table /proc/t.json: ")
    assert list(tmp_path.iterdir()) == [damaged] and damaged.read_text() == "{"
    for name in ("XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    assert refusal(None) == (
        "calibrate: this user has no home to keep the table in; set XDG_CACHE_HOME, or pass --out FILE")


def test_what_is_written_is_found_again_and_nothing_beside_it(tmp_path: Path) -> None:
    file, link, table = (tmp_path / "new" / "t.json", tmp_path / "link",
                         Table("here", {}, (Curve("all_reduce", 2, "float32", False, "gloo", ((1, 1.0),)),)))
    link.symlink_to(file)
    assert target(link, CPU) == target(file, CPU) == (file, None) and not list(file.parent.iterdir())
    write(table, file)
    assert target(link, CPU) == (file, table) and list(file.parent.iterdir()) == [file]
    with pytest.raises(SpecError) as refused:
        write(Table("there", {}), tmp_path / "new")
    assert str(refused.value) == f"routing table {tmp_path / 'new'}: Is a directory"
    assert sorted(tmp_path.iterdir()) == [link, file.parent]


@pytest.mark.parametrize("arguments, text", [
    (["--communicators", "foo"], "argument --communicators: 'foo' is no MODULE:FUNCTION"),
    (["--communicators", "foo:"], "argument --communicators: 'foo:' is no MODULE:FUNCTION"),
    (["--communicators", "no_such:foo"], "argument --communicators: no_such:foo: No module named 'no_such'"),
    (["--communicators", "..no:foo"], ("argument --communicators: ..no:foo: the 'package' argument is "
                                       "required to perform a relative import for '..no'")),
    (["--communicators", "math:foo"], "argument --communicators: math:foo: module math has no function foo"),
    (["--communicators", "math:pi"], "argument --communicators: math:pi: module math has no function pi"),
    (["--max-bytes", "0"], "argument --max-bytes: 0: the smallest tensor that is measured has 2048 bytes"),
    (["--max-bytes", "-1"], "argument --max-bytes: -1: the smallest tensor that is measured has 2048 bytes"),
    (["--max-bytes", "2047"],
     "argument --max-bytes: 2047: the smallest tensor that is measured has 2048 bytes")])
def test_arguments_that_mean_nothing(arguments: list[str], text: str,
                                     capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        main(arguments)
    assert refused.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"python -m shardlib.distributed.calibrate: error: {text}")


def test_a_maker_of_communicators_by_name() -> None:
    assert maker("shardlib.distributed.communicators.shared_memory:shared_memory") is shared_memory


PROGRAM = """
import contextlib, io, json, os, sys
from pathlib import Path
from shardlib.distributed.calibrate import main

runs = []
for out in ([], ["--out", sys.argv[2]]):
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        code = main(["--device", "cpu", "--max-bytes", "2048", *out])
    runs.append([code, stdout.getvalue(), stderr.getvalue()])
Path(sys.argv[1], os.environ["RANK"]).write_text(json.dumps(runs))
"""


def test_a_damaged_table_is_replaced_in_the_cache_and_left_alone_elsewhere(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    mine, other = own_file(CPU), tmp_path / "other.json"
    mine.parent.mkdir(parents=True)
    for file in (mine, other):
        file.write_text("{")
    (tmp_path / "program.py").write_text(PROGRAM)
    done = ranks(2, [tmp_path / "program.py", tmp_path, other], GLOO_SOCKET_IFNAME="lo")
    assert done.returncode == 0, done.stderr
    (cached, named), (cached_1, named_1) = (json.loads((tmp_path / rank).read_text()) for rank in "01")
    assert (cached[0], cached[1].splitlines()[-1], cached[2]) == (
        0, f"written to {mine}", f"routing table {mine}: Input data was truncated; it is replaced\n")
    assert (cached_1 == [0, "", ""]
            and named == named_1 == [2, "", f"routing table {other}: Input data was truncated\n"])
    assert (len(Table.decode(mine.read_bytes(), "").curves) == 9 and list(mine.parent.iterdir()) == [mine]
            and other.read_text() == "{")
