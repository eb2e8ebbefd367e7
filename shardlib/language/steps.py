"""What an op may ask of whoever builds a program's steps:
its derivative, and its form over pieces, are written with these.

    def _vjp(b: Steps, step: Step, cotangents: Sequence[str]) -> list[str]:
        return [b.call(MUL, [cotangents[0], step.inputs[1]]), b.call(MUL, [cotangents[0], step.inputs[0]])]

Values are names; every step is typed by its op's rule as it is added.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from shardlib.mesh import Mesh
from shardlib.program import Op
from shardlib.spec import Spec


class Steps(Protocol):
    """Steps under construction, on `mesh`. types: of every value so far."""
    mesh: Mesh
    types: Mapping[str, Spec]

    def add(self, op: Op, inputs: Sequence[str], outs: Sequence[Spec]) -> tuple[str, ...]:
        """A step whose result types are known."""

    def call(self, op: Op, inputs: Sequence[str], outs: Sequence[Spec] | None = None, base: str = "",
             **attrs: Any) -> Any:
        """A step typed by its rule; `outs` are the results' dims, for an op with a spec string.

        One name, or several.
        """

    def move(self, name: str, want: Spec, why: str = "") -> str:
        """`name` converted to type `want`."""

    def settle(self, name: str) -> str:
        """`name` with what it owes paid, on every rank."""

    def einsum_to(self, spec: Spec, names: Sequence[str]) -> str:
        """The product of `names`, summed or repeated to the dims of `spec`."""

    def spread(self, name: str, like: Spec, mean: bool = False) -> str:
        """`name` repeated along the dims of `like` that it lacks; with `mean`, over their sizes."""

    def scale(self, name: str, by: float) -> str:
        """`name` times a number."""

    def like(self, name: str, value: str) -> str:
        """`name` in the dtype of `value`."""

    def quotient(self, a: str, b: str) -> str:
        """a / b."""
