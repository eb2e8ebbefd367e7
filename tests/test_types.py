"""mypy has nothing to say of the public modules and the operators, nor of a user's model;
of wrong calls it has.

It takes a package for one folder: the folders lie in a tree of links, as they do where shardlib is installed.
"""
from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
PACKAGES = ("shardlib.language", "shardlib.ops", "shardlib.reports")
MODULES = ("shardlib", *(f"shardlib.{name}" for name in ("api", "errors", "functions", "layout", "mesh",
                                                         "params", "program", "spec")))
MODEL = '''
import torch
from torch import Tensor

from shardlib import Layout, Mesh, Params, compile, einsum, init, param
from shardlib import scan, sharded, stacked, value_and_grad
from shardlib.functions import mean, silu
from shardlib.ops import cross_entropy, rms_norm

class Block(Params):
    norm: Tensor = param("D", initial="ones")
    up: Tensor = param("D F")
    down: Tensor = param("F D")

class Model(Params):
    table: Tensor = param("V D", scale=0.02)
    blocks: Block = stacked("L", Block)

@sharded("B T D, * -> B T D")
def block(x: Tensor, w: Block):
    h = rms_norm(x, w.norm)
    up = einsum("B T D, D F -> B T F", h, w.up)
    reveal_type(h)
    reveal_type(up)
    reveal_type(silu(up) * 2 + 1)
    return x + einsum("B T F, F D -> B T D", silu(up), w.down)

@sharded("B T, *, B T -> ()")
def loss(x, w: Model, labels):
    x = scan(block, x, w.blocks)
    logits = einsum("B T D, V D -> B T V", x, w.table)
    return mean("B T -> ()", cross_entropy("B T V, B T -> B T", logits, labels))

step = value_and_grad(loss, wrt="w")
run = compile(step, Layout(B="dp", F="tp"), mesh=Mesh(dp=1, tp=1))
w = init(Model, dict(D=4, F=8, V=5, L=2))
value, grads = run(torch.ones(2, 3, 4), w, torch.zeros(2, 3, dtype=torch.int64))
blocks = Block(norm=torch.ones(2, 4), up=torch.ones(2, 4, 8), down=torch.ones(2, 8, 4))
made = Model(table=torch.ones(5, 4), blocks=blocks)
reveal_type(made.blocks.up)
reveal_type(loss)
reveal_type(loss(value))
reveal_type(step)
reveal_type(run)
'''
REVEALED = ["shardlib.language.value.Value", "shardlib.language.value.Value", "shardlib.language.value.Value",
            "torch._tensor.Tensor", "shardlib.api.Sharded", "Any", "shardlib.api.ValueAndGrad",
            "shardlib.run.compiled.Compiled"]
WRONG = '''
from shardlib import Params, compile, param, sharded
from shardlib.functions import silu
from shardlib.ops import rms_norm

class Weights(Params):
    norm: int = param(1)

@sharded("D, * -> D")
def f(x, w: Weights):
    return rms_norm(x)

Weights(norm=1).norm = 2
Weights(nrom=1, norm=1)
compile(silu)
sharded(2)
f.signatures
'''
FOUND = [
    'Argument 1 to "param" has incompatible type "int"; expected "str"  [arg-type]',
    'Missing positional argument "w" in call to "rms_norm"  [call-arg]',
    'Property "norm" defined in "Weights" is read-only  [misc]',
    'Unexpected keyword argument "nrom" for "Weights"  [call-arg]',
    ('No overload variant of "compile" matches argument type "Callable[[Value | Tensor], Value]"  '
     '[call-overload]'),
    'Argument 1 to "sharded" has incompatible type "int"; expected "str"  [arg-type]',
    '"Sharded" has no attribute "signatures"  [attr-defined]']


def links(tree: Path) -> None:
    """The packages below `tree`, each in its place."""
    (tree / "shardlib").mkdir()
    for path in (ROOT / "shardlib").iterdir():
        (tree / "shardlib" / path.name).symlink_to(path)
    for package, folder in FLOORS.items():
        if package != "shardlib":
            (tree / package.replace(".", "/")).symlink_to(ROOT / folder)


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, str]]:
    """What mypy says in one run, a pair a line: of which file, and what.

    What it has read it keeps: the next run takes a second.
    """
    tree = tmp_path_factory.mktemp("tree")
    links(tree)
    (tree / "model.py").write_text(MODEL)
    (tree / "wrong.py").write_text(WRONG)
    asked = [word for flag, names in (("-p", PACKAGES), ("-m", (*MODULES, "model", "wrong")))
             for name in names for word in (flag, name)]
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), "--cache-dir",
               str(ROOT / ".mypy_cache"), "--no-pretty"]
    done = subprocess.run([*command, "--no-error-summary", *asked], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 1 and not done.stderr, done.stdout + done.stderr          # wrong.py is wrong
    return [(file, text) for file, _, text in (line.split(":", 2) for line in done.stdout.splitlines())]


def test_the_library_has_no_errors(said: list[tuple[str, str]]) -> None:
    assert [(file, text) for file, text in said if file not in ("model.py", "wrong.py")] == []


def test_a_model_has_no_errors_and_its_types_are_known(said: list[tuple[str, str]]) -> None:
    assert ([text for file, text in said if file == "model.py"]
            == [f' note: Revealed type is "{name}"' for name in REVEALED])


def test_wrong_calls_are_errors(said: list[tuple[str, str]]) -> None:
    errors = [text for file, text in said if file == "wrong.py" and text.startswith(" error: ")]
    assert errors == [f" error: {text}" for text in FOUND]


def test_nothing_is_ignored() -> None:
    """No comment hides what mypy would say."""
    files = [path for floor in ("shardlib", "ops") for path in (ROOT / floor).rglob("*.py")]
    assert files and [path for path in files if "type: " + "ignore" in path.read_text()] == []
