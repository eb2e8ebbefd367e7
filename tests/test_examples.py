"""Every example in a docstring runs and prints what it says; each public name has one that uses it."""
from __future__ import annotations

import doctest
import importlib.util
import inspect
import io
import pkgutil
import re
import tomllib
import types
import warnings
from pathlib import Path

import pytest

import shardlib
import shardlib.functions
import shardlib.ops

PYPROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
FOLDERS = PYPROJECT["tool"]["setuptools"]["package-dir"]
NOT_IMPORTED = {"shardlib.__main__": "it runs the command line when it is imported"}
PUBLIC = [(m, name) for m in (shardlib, shardlib.functions, shardlib.ops) for name in m.__all__]


def modules() -> list[str]:
    """Every module that is installed, the packages themselves among them."""
    roots = [importlib.import_module(name) for name in FOLDERS]
    found = [m.name for root in roots for m in pkgutil.walk_packages(root.__path__, f"{root.__name__}.")]
    return sorted({*FOLDERS, *found})


def run(module: types.ModuleType) -> tuple[int, str]:
    """How many examples ran, and what doctest says of those that failed.

    They run as lines of a user's own file (the library looks for these), with warnings as errors.
    """
    runner, report, attempted = doctest.DocTestRunner(), io.StringIO(), 0
    names = {**vars(module), "__name__": "__main__"}
    for test in doctest.DocTestFinder().find(module, globs=names):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            attempted += runner.run(test, out=report.write).attempted
    return attempted, report.getvalue()


def written(source: str) -> int:
    """How many examples a source file has, found by doctest or not."""
    return len(re.findall(r"^ *>>> ", source, re.M))


@pytest.mark.parametrize("name", [name for name in modules() if name not in NOT_IMPORTED])
def test_examples_run(name: str) -> None:
    module = importlib.import_module(name)
    attempted, report = run(module)
    assert report == ""
    assert attempted == written(Path(module.__file__).read_text()), "doctest finds not all of them"


@pytest.mark.parametrize("name", NOT_IMPORTED)
def test_what_is_not_imported_has_no_example(name: str) -> None:
    assert written(Path(importlib.util.find_spec(name).origin).read_text()) == 0


def has_example(public: object, name: str) -> bool:
    """Whether an example in its docstring (of a plain value, in that of its class) uses it by its name."""
    lines = [example.source for example in doctest.DocTestParser().get_examples(public.__doc__ or "")]
    return any(re.search(rf"\b{name}\b", line) for line in lines if not line.startswith(("import ", "from ")))


@pytest.mark.parametrize("module, name", PUBLIC, ids=[f"{m.__name__}.{n}" for m, n in PUBLIC])
def test_public_names_have_an_example(module: types.ModuleType, name: str) -> None:
    assert has_example(getattr(module, name), name), f"{name} has no example in its docstring"


def test_every_function_of_models_is_public() -> None:
    """What gives a value of a program is called by users."""
    found = [importlib.import_module(name) for name in modules() if name.startswith("shardlib.ops.")]
    calls = {name for m in found for name, f in vars(m).items() if inspect.isfunction(f)
             and f.__module__ == m.__name__ and name[0] != "_" and f.__annotations__.get("return") == "Value"}
    assert sorted(calls - {*shardlib.ops.__all__}) == []


# -- what these tests would find ----------------------------------------------------------------------------

def made(doc: str) -> types.ModuleType:
    """A module with one function of this docstring."""
    module = types.ModuleType("made")
    exec("def thing(): pass", vars(module))
    module.thing.__doc__ = doc
    module.thing.__module__ = "made"
    return module


def test_a_wrong_example_is_found() -> None:
    attempted, report = run(made(">>> 1 + 1\n3\n"))
    assert attempted == 1 and "Expected:\n    3\nGot:\n    2\n" in report


def test_a_warning_of_an_example_is_found() -> None:
    attempted, report = run(made('>>> import warnings\n>>> warnings.warn("slow")\n'))
    assert attempted == 2 and "UserWarning: slow" in report


def test_a_name_without_an_example_is_found() -> None:
    assert has_example(made(">>> thing()\n").thing, "thing")
    assert not has_example(made("thing()").thing, "thing")
    assert not has_example(made(">>> something()\n").thing, "thing")
    assert not has_example(made(">>> from made import thing\n").thing, "thing")
    assert not has_example(made("").thing, "thing")


def test_examples_run_as_a_users_own() -> None:
    assert run(made(">>> __name__\n'__main__'\n")) == (1, "")
