"""ruff has nothing to say, as pyproject.toml has it told; and it would."""
from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

def ruff(*words: str) -> str:
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--quiet", "--output-format", "concise",
               *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout


def test_ruff_has_nothing_to_say() -> None:
    assert ruff(".") == ""


@pytest.mark.parametrize(
    "rule, text", [("F401", "import os\n"), ("I001", "import sys\nimport os\nos, sys\n"),
                   ("W291", "x = 1 \n"), ("E711", "x = 1\nx == None\n"), ("B006", "def f(x=[]): pass\n"),
                   ("UP006", "import typing\nx: typing.List[int] = []\n")])
def test_ruff_is_told_to_look(rule: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(text)
    assert rule in ruff("--config", str(ROOT / "pyproject.toml"), str(tmp_path / "a.py"))
