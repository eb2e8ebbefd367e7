"""The arguments of a sharded function: for each a spec, or the pytree that it is."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shardlib.errors import SpecError
from shardlib.language.calls import check_count, check_tree, what
from shardlib.language.signature import Signature
from shardlib.params import Params, struct
from shardlib.tree import Struct


def argument_trees(f: Signature, args: Sequence[Any]) -> list[tuple[str, Any]]:
    """(name, spec or Struct) of every argument; a pytree's from the instance in `args`,
    else from its annotation."""
    hints, trees = f.hints(), []
    if len(args) > len(f.arg_names):
        check_count(f, args)
    for i, (name, spec) in enumerate(zip(f.arg_names, f.ins)):
        given = args[i] if i < len(args) else None
        if spec is None and given is not None and not isinstance(given, Struct):
            check_tree(f, name, given, hints.get(name))
        elif spec is not None and isinstance(given, Params):
            raise SpecError(f"{f.__name__}: {name} is {what(given)}; it is one tensor, {spec}")
        trees.append((name, spec if spec is not None else _struct(
            f, name, given if isinstance(given, (Params, Struct)) else hints.get(name))))
    return trees


def _struct(f: Signature, name: str, given: Any) -> Struct:
    if isinstance(given, Struct):
        return given
    if isinstance(given, Params) or (isinstance(given, type) and issubclass(given, Params)):
        return struct(given)
    raise SpecError(
        f'{f.__name__}: {name} is "*" in "{f.signature}", a pytree; annotate it with its Params class, '
        f'or pass an instance')
