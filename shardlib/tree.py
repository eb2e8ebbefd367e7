"""The shapes of pytrees: which fields there are, and the spec of each."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

from shardlib.spec import Spec


@dataclass(frozen=True)
class Struct:
    """The shape of a pytree argument: a Params class by name, its fields each a Spec or a Struct;
    absent ones are left out.

    `stacked`: the leading dim along which many are stacked; it stands in the specs of all fields.
    """
    name: str
    fields: tuple[tuple[str, Spec | Struct], ...]
    stacked: str = ""

    def leaves(self, path: str) -> list[tuple[str, Spec]]:
        """(path, spec) of every tensor."""
        return [(path + suffix, spec) for suffix, spec in self._leaves]

    @cached_property
    def _leaves(self) -> list[tuple[str, Spec]]:
        return [leaf for name, sub in self.fields for leaf in leaves(f".{name}", sub)]

    def map(self, f: Callable[[Spec], Spec]) -> Struct:
        return replace(self,
                       fields=tuple((n, s.map(f) if isinstance(s, Struct) else f(s)) for n, s in self.fields))

    def slice(self) -> Struct:
        """One of the stacked."""
        return replace(self.map(lambda spec: spec.with_dims(spec.dims[1:])), stacked="")


Tree = Spec | Struct


def leaves(name: str, tree: Tree) -> list[tuple[str, Spec]]:
    """(path, spec) of every tensor in the argument `name`."""
    return tree.leaves(name) if isinstance(tree, Struct) else [(name, tree)]
