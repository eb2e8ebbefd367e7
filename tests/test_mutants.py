"""`make mutants`: what it says of a mutant that a test kills,
of one that survives and of one that is no more."""
from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent / "mutants"


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(HERE))
    spec = importlib.util.spec_from_file_location("mutants_runner", HERE / "__main__.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    yield made
    sys.modules.pop("table", None)


def test_what_becomes_of_a_mutant(runner, tmp_path: Path) -> None:
    (tmp_path / "shardlib").mkdir()
    (tmp_path / "ops").mkdir()
    (tmp_path / "shardlib" / "__init__.py").write_text("")
    (tmp_path / "ops" / "__init__.py").write_text("")
    (tmp_path / "ops" / "halve.py").write_text(
        "def halve(n):\n    while n % 2 == 0:\n        n = n // 2\n    return n  # odd\n")
    (tmp_path / "test_halve.py").write_text(
        "from shardlib.ops.halve import halve\n\n\ndef test_halve():\n    assert halve(12) == 3\n")
    outcomes = runner.outcomes(tmp_path,
                               [runner.Mutant("ops/halve.py", old, new, "test_halve.py") for old, new in (
                                   ("n % 2 == 0", "n % 3 == 0"), ("n // 2", "n >> 1"), ("n % 5", "n % 6"),
                                   (" n", " m"))], 2, 300.0)
    assert [outcome for outcome, _ in outcomes] == ["passes", "killed", "SURVIVES", "TO BE WRITTEN ANEW",
                                                    "TO BE WRITTEN ANEW"]
    assert not runner.passes(tmp_path, "test_halve.py", 0.001)              # out of time
    (tmp_path / "test_halve.py").write_text("def test_halve():\n    assert 0\n")
    broken = runner.Mutant("ops/halve.py", "2 == 0", "3 == 0", "test_halve.py")
    assert next(runner.outcomes(tmp_path, [broken], 1, 300.0))[0] == "FAILS WITHOUT A MUTANT"
    assert ((tmp_path / "ops" / "halve.py").read_text().count("n % 2 == 0") == 1
            and not (tmp_path / "shardlib" / "ops").exists())


def test_every_mutant_of_the_table_has_its_place(runner) -> None:
    """One whose text is gone, or stands twice, tests nothing any more; nor one whose tests are elsewhere."""
    root = HERE.parents[1]
    assert [m for m in runner.MUTANTS if (root / m.file).read_text().count(m.old) != 1] == []
    named = {word for m in runner.MUTANTS for word in m.tests.split() if word.startswith("tests/")}
    assert [word for word in named if not (root / word.partition("::")[0]).exists()] == []
