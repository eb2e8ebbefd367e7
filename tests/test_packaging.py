"""The package from outside: imports only go down, the folder map is complete,
a wheel works where no checkout is."""

import ast
import graphlib
import json
import os
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from shardlib import cli

ROOT = Path(__file__).parents[1]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
FLOORS = {ROOT / folder: package for package, folder in SETUPTOOLS["package-dir"].items()}


def module_name(path: Path) -> str:
    """The import name of a source file: ops/swiglu.py is shardlib.ops.swiglu."""
    floor = next(floor for floor in FLOORS if path.is_relative_to(floor))
    parts = path.relative_to(floor).with_suffix("").parts
    return ".".join([FLOORS[floor], *(part for part in parts if part != "__init__")])


SOURCES = {module_name(path): path for floor in sorted(FLOORS) for path in sorted(floor.rglob("*.py"))}


def imports(module: str, path: Path) -> Iterator[str]:
    """Every module that a file imports at any depth of nesting, what only a type checker reads included.

    `from shardlib.compiler.passes import fuse` gives `shardlib.compiler.passes.fuse`, be it a module or a
    name in one.
    """
    package = module if path.stem == "__init__" else module.rpartition(".")[0]
    nodes = [ast.parse(path.read_text())]
    while nodes:
        node = nodes.pop()
        match node:
            case ast.Import():
                yield from (alias.name for alias in node.names)
            case ast.ImportFrom():
                above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
                base = ".".join([*above, *([node.module] if node.module else [])])
                yield from (f"{base}.{alias.name}" for alias in node.names)
            case ast.Call(ast.Name(id=name) | ast.Attribute(attr=name),
                          [ast.Constant(value=str(target)), *_]):
                if name in ("import_module", "__import__"):
                    yield target
        nodes += ast.iter_child_nodes(node)


def floor_of(module: str) -> str:
    return max((floor for floor in FLOORS.values() if is_in(module, floor)), key=len)


def is_in(module: str, package: str) -> bool:
    return f"{module}.".startswith(f"{package}.")


FORBIDDEN = {
    "shardlib": ("shardlib.ops", "shardlib.models", "shardlib.triton_kernels", "triton"),
    "shardlib.ops": ("shardlib.models",),
    "shardlib.models": (),
}
CHECKOUT_ONLY = ("ops", "models", "triton_kernels")  # top-level names that resolve only where the folders lie
KERNELS_MAY = ("torch", "triton", "numpy", "shardlib.triton_kernels", *sys.stdlib_module_names)


def climbs(module: str, target: str) -> bool:
    """Whether `target` lies above the floor of `module`,
    or is none of the few things that a kernel may import."""
    floor = floor_of(module)
    if floor == "shardlib.triton_kernels":
        return not any(is_in(target, allowed) for allowed in KERNELS_MAY)
    return any(is_in(target, forbidden) for forbidden in (*FORBIDDEN[floor], *CHECKOUT_ONLY))


@pytest.mark.parametrize("module", SOURCES)
def test_imports_only_go_down(module: str) -> None:
    assert [target for target in imports(module, SOURCES[module]) if climbs(module, target)] == []


@pytest.mark.parametrize(
    ("module", "source", "found"),
    [
        ("shardlib.language.trace", "def f():\n    from shardlib.ops import swiglu", ["shardlib.ops.swiglu"]),
        ("shardlib.language.trace", "from shardlib import models", ["shardlib.models"]),
        ("shardlib.language.trace", "from .. import ops", ["shardlib.ops"]),
        ("shardlib.compiler.passes.fuse", "from ...ops.swiglu import swiglu", ["shardlib.ops.swiglu.swiglu"]),
        ("shardlib.language.trace", "try:\n    import triton.language\nexcept ImportError:\n    pass",
         ["triton.language"]),
        ("shardlib.language.trace", "import importlib\nimportlib.import_module('shardlib.ops')",
         ["shardlib.ops"]),
        ("shardlib.language.trace",
         "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import shardlib.ops", ["shardlib.ops"]),
        ("shardlib.language.trace", "import tritonish, shardlib.opsy, torch", []),
        ("shardlib.ops.swiglu", "from shardlib.triton_kernels import swiglu", []),
        ("shardlib.ops.swiglu", "import shardlib.spec, shardlib.models.llama", ["shardlib.models.llama"]),
        ("shardlib.models.llama", "import shardlib.ops\nfrom ops import swiglu", ["ops.swiglu"]),
        ("shardlib.triton_kernels.swiglu", "import math, torch, triton.language, einops", ["einops"]),
        ("shardlib.triton_kernels.swiglu", "from shardlib.spec import Spec", ["shardlib.spec.Spec"]),
    ],
)
def test_a_climbing_import_is_found(tmp_path: Path, module: str, source: str, found: list[str]) -> None:
    path = tmp_path / "source.py"
    path.write_text(source)
    assert [target for target in sorted(imports(module, path)) if climbs(module, target)] == found


def test_no_import_cycles() -> None:
    def resolve(target: str) -> str:
        return target if target in SOURCES else target.rpartition(".")[0]

    graph = {module: {resolve(target) for target in imports(module, path)}
             for module, path in SOURCES.items()}
    graphlib.TopologicalSorter(graph).prepare()


STOREYS = ("vocabulary", "language", "compiler", "lowering", "distributed", "reports", "run", "top")
TOP = ("shardlib", "shardlib.__main__", "shardlib.api", "shardlib.cli", "shardlib.functions",
       "shardlib.oracle", "shardlib.parser")


def storey_of(module: str) -> str:
    """Where in shardlib a module stands: in a folder, or a file of its own below or above all folders."""
    folder = module.split(".")[1] if module.count(".") else ""
    return folder if folder in STOREYS else "top" if module in TOP else "vocabulary"


@pytest.mark.parametrize("module", [module for module in SOURCES if floor_of(module) == "shardlib"])
def test_imports_go_down_from_storey_to_storey(module: str) -> None:
    found = {target if target in SOURCES else target.rpartition(".")[0]
             for target in imports(module, SOURCES[module])}
    mine = STOREYS.index(storey_of(module))
    assert [target for target in found if target in SOURCES and floor_of(target) == "shardlib"
            and STOREYS.index(storey_of(target)) > mine and target != "shardlib"] == []


def test_the_rooms_are_small() -> None:
    """One noun a file, 400 lines at most; and less than twenty beside `shardlib/__init__.py`."""
    lines = {module: len(path.read_text().splitlines()) for module, path in SOURCES.items()}
    assert {module: n for module, n in lines.items() if n > 400} == {}
    top = [path for path in SOURCES.values() if path.parent == ROOT / "shardlib" and path.stem != "__init__"]
    assert 0 < len(top) < 20


def test_no_file_is_named_utils() -> None:
    folders = [*FLOORS, ROOT / "tests", ROOT / "benchmarks"]
    assert [path for folder in folders for path in folder.rglob("utils.py")] == []


def test_every_package_folder_is_in_the_package_map() -> None:
    folders = {path.parent: module_name(path.parent / "__init__.py") for path in SOURCES.values()}
    unlisted = sorted(set(folders.values()) - set(SETUPTOOLS["packages"]))
    assert not unlisted, f"add {unlisted} to packages under [tool.setuptools] in pyproject.toml"
    gone = sorted(set(SETUPTOOLS["packages"]) - set(folders.values()))
    assert not gone, f"take {gone} out of packages under [tool.setuptools] in pyproject.toml"
    bare = [folder for folder in folders if not (folder / "__init__.py").exists()]
    assert not bare, f"{bare} hold Python files but no __init__.py"


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command away from the checkout; its output, which a failure shows whole."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True)
    assert result.returncode == 0, result.stdout
    return result.stdout


def test_import_does_not_import_triton(tmp_path: Path) -> None:
    loaded = ("import sys, shardlib, shardlib.cli; shardlib.cli.main(['--version']); print('triton' in "
              "sys.modules)")
    assert run(sys.executable, "-c", loaded, cwd=tmp_path).splitlines()[-1] == "False"


def test_the_four_folders_are_one_import_name(tmp_path: Path) -> None:
    run(sys.executable, "-c", "import shardlib.ops, shardlib.triton_kernels, shardlib.models", cwd=tmp_path)


def test_version_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    first, *facts = capsys.readouterr().out.splitlines()
    assert first == "shardlib 0.1.0"
    names = "python platform cpus torch triton numpy cuda nccl gpus"
    assert " ".join(fact.split()[0] for fact in facts) == names


def test_version_report_counts_equal_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, total_memory=140 * 2**30)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda index: gpu)
    assert cli.version_report().endswith("\ngpus      2 x NVIDIA H200 (sm_90, 140 GiB)")


def test_version_report_survives_a_broken_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise cli.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(cli.metadata, "version", missing)
    monkeypatch.setitem(sys.modules, "torch", None)
    report = cli.version_report()
    assert report.startswith("shardlib not installed\n")
    assert "\ntriton    not installed\nnumpy     not installed\n" in report
    assert ("\ntorch     not available (ModuleNotFoundError: import of torch halted; None in "
            "sys.modules)\n") in report


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the sources, so that nothing is left in the checkout
    and no stale build gets in."""
    folder = tmp_path_factory.mktemp("wheel")
    for path in ROOT.glob("*.*"):
        if path.suffix in (".toml", ".md"):
            shutil.copy(path, folder)
    shutil.copy(ROOT / "LICENSE", folder)
    for floor in FLOORS:
        shutil.copytree(floor, folder / floor.name, ignore=shutil.ignore_patterns("__pycache__"))
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-index", "--no-build-isolation", ".",
        cwd=folder)
    return next(folder.glob("*.whl"))


def test_wheel_holds_every_file_of_the_folders(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = {
        f"{package.replace('.', '/')}/{path.relative_to(floor)}"
        for floor, package in FLOORS.items()
        for path in floor.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert packed == expected
    assert "shardlib/py.typed" in packed


def test_wheel_works_where_no_checkout_is(wheel: Path, tmp_path: Path) -> None:
    home = tmp_path / "venv"
    venv.create(home, symlinks=True)
    python = home / "bin" / "python"
    install = (sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index",
               wheel)
    run(*install, cwd=tmp_path)
    dependencies = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    site_packages = next(home.glob("lib/python*/site-packages"))
    (site_packages / "dependencies.pth").write_text("\n".join(dependencies))

    program = ("import shardlib as s, shardlib.ops as o, shardlib.models as m; print(s.__file__, o.__file__, "
               "m.__file__)")
    files = run(python, "-c", program, cwd=tmp_path).split()
    assert [Path(file).is_relative_to(site_packages) for file in files] == [True] * 3, files
    assert run(home / "bin" / "shardlib", "--version", cwd=tmp_path).startswith("shardlib 0.1.0\n")
    assert run(python, "-m", "shardlib", "--version", cwd=tmp_path).startswith("shardlib 0.1.0\n")
    answer = json.loads(
        run(python, "-m", "shardlib.models.generate", "--model", "smollm2", "--raw", "--prompt",
            "The capital of France is", "--max-new-tokens", "1", "--json", cwd=tmp_path))
    assert (answer["tokens"], answer["text"]) == ([504, 3575, 282, 4649, 314, 7042], " Paris")


WITHOUT_TRITON = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ImportError("no triton here")
sys.meta_path.insert(0, Missing())
import torch, shardlib.models.decoding
from shardlib import sharded
from shardlib.ops import attention
q, k = torch.zeros(1, 1, 1, 1, 2), torch.zeros(1, 3, 1, 2)
f = sharded("B T K G H, B S K H, B S K H, B -> B T K G H")(
    lambda q, k, v, start: attention("B T K G H, B S K H, B S K H, B -> B T K G H", q, k, v, start))
print(f(q, k, k + 1, torch.tensor([1])).flatten().tolist())
"""


def test_where_triton_is_not_models_run() -> None:
    """It is installed on Linux alone."""
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("[1.0, 1.0]\n", "")
