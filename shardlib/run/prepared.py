"""Arguments in the form in which a program runs fastest:
weights packed, what a scan runs over held layer by layer."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shardlib.compiler.passes.pack import pack, packings
from shardlib.errors import SpecError
from shardlib.language.scan import SCAN
from shardlib.params import Params, leaf_dtypes, leaf_values
from shardlib.placement import arg_types
from shardlib.program import Program, Scan


@dataclass(frozen=True)
class Prepared:
    """A pytree argument as `Compiled.prepare` made it.

    flat: its leaves; stacked ones as a tuple of layers.  shapes, dtypes: of the leaves it was made from, by
    path.
    parts: what each of `flat` is: a path, or the paths that are packed in it.
    number: equal for arguments of one name, equal parts, dtypes and shapes.
    """
    name: str
    flat: tuple[Any, ...]
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]
    parts: tuple[str, ...]
    number: int


def prepare(program: Program, name: str, weights: Params | dict[str, Tensor]) -> Prepared:
    """The argument `name` of `program`. A dict path -> tensor is emptied on the way."""
    given = weights if isinstance(weights, dict) else dict(leaf_values(weights, name))
    paths = list(arg_types(program, name))
    if set(paths) != set(given):
        raise SpecError(f"prepare: {name} has the leaves {', '.join(paths)}; given are {', '.join(given)}")
    leaves = {p: given.pop(p) for p in paths}
    shapes, dtypes = {p: tuple(v.shape) for p, v in leaves.items()}, leaf_dtypes(leaves.items())
    packed = {path: group for group in packings(program, {name}, dtypes) for path in group.outer_paths}
    scanned = {n for s in program.steps if s.op is SCAN for _, n in Scan.of(s).stacked}
    made: dict[str, Any] = {}
    for path in paths:
        if path not in packed:
            leaf = leaves.pop(path)
            made[path] = leaf.unbind(0) if path in scanned else leaf
        elif packed[path].name not in made:
            made[packed[path].name] = pack(packed[path], leaves)
    return Prepared(name, tuple(made.values()), shapes, dtypes, tuple(made),
                    _number_of((name, *made, *shapes.items(), *dtypes.items())))


_NUMBERS: dict[tuple, int] = {}


def _number_of(kind: tuple) -> int:
    return _NUMBERS.setdefault(kind, len(_NUMBERS))


def whole(leaf: Any) -> Tensor:
    """A leaf that may be held layer by layer, as one tensor."""
    return leaf if isinstance(leaf, Tensor) else torch.stack(leaf)
