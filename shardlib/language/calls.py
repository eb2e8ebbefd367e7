"""What the functions of the API are called with: one line for what they do not take,
before anything is traced, made or sent.

>>> check_layout("compile", "B=dp")                                     # doctest: +ELLIPSIS
Traceback (most recent call last):
shardlib.errors.SpecError: compile: the layout is a str; it is a Layout, as in ...
"""
from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from shardlib.dtypes import ITEMSIZE
from shardlib.errors import SpecError
from shardlib.language.signature import Signature
from shardlib.layout import Layout
from shardlib.params import Params
from shardlib.program import Step

_MISCALLED = re.compile(r"(\w+)\(\) (missing|takes|got) .*")
_STARS: dict[object, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
_TOLD = ("donate", "graph", "layout", "mesh", "passes", "schedule", "sizes")   # not the function, `compile`
_PUBLIC = ("shardlib", "shardlib.functions", "shardlib.ops")


def check_layout(who: str, layout: Any) -> None:
    """SpecError unless `layout` is a Layout, or None."""
    if layout is not None and not isinstance(layout, Layout):
        raise SpecError(f'{who}: the layout is {what(layout)}; it is a Layout, as in Layout(B="dp") or '
                        'Layout.parse("B=dp")')


def check_static(f: Signature, static: Mapping[str, Any]) -> None:
    """SpecError unless `static` are the keyword-only arguments of `f`."""
    for name in static:
        if name in f.arg_names:
            raise SpecError(f"{f.__name__}: {name} is given by its place; keywords are for static arguments, "
                            "which come after a \"*,\"")
        if name not in f.static_names:
            raise SpecError(f"{f.__name__}: it has no keyword argument {name}" + (
                f"; compile({f.__name__}, {name}=...) has" if name in _TOLD else ""))
    if missing := [name for name, needed in f.static_names.items() if needed and name not in static]:
        raise SpecError(f"{f.__name__}: the keyword argument {missing[0]} is missing")


def check_keywords(step: Step) -> None:
    """SpecError unless the step's keyword arguments are those that its op takes."""
    kinds, given = step.op.keywords, step.options
    if ((wrong := next((n for n in (*kinds, *given) if n not in kinds or not kinds[n](given.get(n))), None))
        is not None):
        raise SpecError(f"{step.op.name}: the keyword argument {wrong} is missing" if wrong not in given else
                        f"{step.op.name}: it has no keyword argument {wrong}" if wrong not in kinds else
                        f"{step.op.name}: {wrong} is {given[wrong]!r}")


def refuse_named(f: Signature, named: Mapping[str, Any]) -> None:
    """SpecError where what has been made of `f` is called with arguments by name."""
    if named:
        raise SpecError(f"{f.__name__}: {next(iter(named))} is given by name; tensors are given by their "
                        "place, static arguments when it is compiled")


def check_count(f: Signature, args: Sequence[Any]) -> None:
    """SpecError unless `f` is given as many arguments as it takes."""
    if len(args) != len(f.arg_names):
        takes = (f"{f.__name__} takes {len(f.arg_names)} argument{'s' * (len(f.arg_names) != 1)}, "
                 f"{', '.join(f.arg_names)}")
        raise SpecError(f"{takes}; {len(args)} {'was' if len(args) == 1 else 'were'} given")


def check_given(f: Signature, args: Sequence[Any]) -> None:
    """SpecError unless `f` is given as many arguments as it takes, and no None for a pytree."""
    check_count(f, args)
    for name, spec, arg in zip(f.arg_names, f.ins, args):
        if arg is None and spec is None:
            check_tree(f, name, arg, f.hints().get(name))


def check_tree(f: Signature, name: str, given: Any, hint: Any) -> None:
    """SpecError unless `given` is a pytree that the argument `name` of `f` may be."""
    wanted = hint if isinstance(hint, type) and issubclass(hint, Params) else None
    if not isinstance(given, wanted or Params):
        found = "the class itself" if given is wanted else what(given)
        raise SpecError(f"{f.__name__}: {name} is {found}; it is a pytree of "
                        f"Params{f', {_a(wanted.__name__)}' if wanted else ''}")


def what(x: Any) -> str:
    """The kind of thing that x is, for a person."""
    return "None" if x is None else _a(type(x).__name__)


def _a(name: str) -> str:
    return f"an {name}" if name[0] in "AEIOUaeiou" else f"a {name}"


def check_tensors(f: Signature, leaves: Iterable[tuple[str, Any]], stages: bool = False) -> None:
    """SpecError unless all leaves are plain tensors of dtypes that programs have, on one device.

    A prepared leaf is a tuple of layers. stages: some may be on the meta device, being those of other stages.
    """
    first: tuple[str, Tensor] | None = None
    for path, leaf in leaves:
        x = leaf[0] if isinstance(leaf, tuple) and leaf else leaf
        if isinstance(x, tuple):
            continue
        if not isinstance(x, Tensor):
            raise SpecError(f"{f.__name__}: {path} is {what(x)}, not a tensor")
        kind, form = (str(said).removeprefix("torch.") for said in (x.dtype, x.layout))
        if form != "strided" or x.is_nested:
            raise SpecError(f"{f.__name__}: {path} is {'nested' if x.is_nested else form}; make a dense "
                            "tensor of it first")
        if kind not in ITEMSIZE:
            raise SpecError(
                f"{f.__name__}: {path} is {kind}; a tensor of a program is one of {', '.join(ITEMSIZE)}")
        if x.is_meta and stages:
            continue
        first = first or (path, x)
        if x.device != first[1].device:
            raise SpecError(f"{f.__name__}: {path} is on {x.device}, {first[0]} on {first[1].device}; all "
                            "arguments are on one device")


def misuse(error: TypeError | ValueError, ours: Any) -> SpecError | None:
    """What is said in place of an error that a function of the library was called with what it does not take;
    None where a user's own code has raised it. ours(module): whether a module is the library's."""
    frames, entry = [], error.__traceback__
    while entry is not None:
        frames.append(entry.tb_frame)
        entry = entry.tb_next
    last = max((i for i, frame in enumerate(frames) if not ours(frame.f_globals.get("__name__", ""))),
               default=-1)
    if last + 1 < len(frames):
        return SpecError(f"{frames[last + 1].f_code.co_name}: {error}") if last >= 0 else None
    if not (called := _MISCALLED.fullmatch(str(error))):
        return None
    f = next((f for m in _PUBLIC if inspect.isfunction(f := getattr(sys.modules.get(m), called[1], None))),
             None)
    return SpecError(f"{called[1]}: it is called {called[1]}({_parameters(f)}), and "
                     f"{str(error).partition('() ')[2]}") if f else None


def _parameters(f: Any) -> str:
    said: list[str] = []
    for p in inspect.signature(f).parameters.values():
        if p.kind is p.KEYWORD_ONLY and "*" not in said and not any(n.startswith("*") for n in said):
            said.append("*")
        said.append(_STARS.get(p.kind, "") + p.name)
    return ", ".join(said)
