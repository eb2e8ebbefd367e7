"""What an op may ask of whoever writes one rank's code:
shapes, offsets and dtypes of its operands, names for what it calls.

    def _emit(e: LocalCode, step: Step, args: list[str]) -> str:
        return f"{e.use(my_function)}({args[0]}, {e.shape(step.outs[0])})"

`Op.emit` returns a Python expression; all else that belongs to the code around it is asked for here.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from shardlib.mesh import Mesh
from shardlib.program import Step
from shardlib.spec import Dim, Spec
from shardlib.wires import Wire


class LocalCode(Protocol):
    """The code of `rank`, which stands at `coordinate` of `mesh`.

    sizes: the global size of every dim.  dtypes: of the values of the program that is being written.
    constants: tensors that the code has by name.  in_place: values whose buffers the current step may write
    to.
    """
    mesh: Mesh
    rank: int
    coordinate: Mapping[str, int]
    sizes: Mapping[str, int]
    dtypes: Mapping[str, Any]
    constants: dict[str, Tensor]
    in_place: set[str]

    def shape(self, spec: Spec) -> tuple[int, ...]:
        """The local shape of a value of type `spec`."""

    def opened_shape(self, spec: Spec) -> tuple[int, ...]:
        """The local shape with groups taken apart."""

    def rows(self, dim: Dim) -> tuple[int, int]:
        """(start, size) of this rank's piece of `dim`, a group's in rows of the group."""

    def pieces(self, dim: Dim) -> tuple[tuple[int, int], ...]:
        """The same of each member along the dim's axes, in their order."""

    def count(self, *dims: Dim) -> int:
        """The global size of `dims` together."""

    def use(self, helper: Callable) -> str:
        """The name under which the code calls `helper`."""

    def index_site(self, step: Step, operand: int, variable: str, dim: Dim, argument: str, *, op: str = "",
                   rows: Dim | None = None, ignored: int | None = None, hint: str = "") -> str:
        """The name of the place where `variable`, an operand of the step,
        is an index into `dim`: an `IndexSite`.

        argument: what it is called where the user has no name for it.  op: what the user has called, if not
        the step's own.
        rows, ignored, hint: as an `IndexSite` has them.
        """

    def room_site(self, step: Step, dim: Dim) -> str | None:
        """The name of the place where rows of a ragged dim come to this rank: a `RoomSite`.

        None where there is room for all that may.
        """

    def maker(self, value: str) -> Step | None:
        """The step of the program that is being written which makes `value`; None of an argument."""

    def hoist(self, variable: str, template: str, parts: int = 1) -> str:
        """`template` applied to `variable`: once before the loop,
        where the variable is the same in every round.

        There, the result is a variable's name; or several, "v1, v2", where the template makes a tuple of
        `parts`.
        """

    def view(self, text: str, shape: Sequence[int]) -> str:
        """`text` viewed as `shape`: a view of a view is one view."""

    def collective(self, wire: Wire, axes: Sequence[str], pieces: Sequence[str], more: tuple) -> str:
        """A call of the coordinator of the group over `axes`; over one rank, nothing is left of it."""

    def exchanging(self, helper: Callable, axes: Sequence[str], wires: Sequence[Wire], args: str) -> str:
        """What `helper` gives, a generator of requests to the group over `axes`, its first argument."""

    def send(self, axis: str, source: int, target: int, x: str) -> str:
        """A call that hands `x` from one coordinate of an axis to another."""

    def recv(self, axis: str, source: int, target: int, shape: Sequence[int], dtype: str) -> str:
        """What the other coordinate gets."""

    def product(self, x: str, w: str, sizes: tuple[int, int, int], dtype: str,
                then: Step | None = None) -> str | None:
        """A kernel's x @ w, of two dims; None where the library multiplies.

        sizes: rows and lines of x, which may have any dims, and columns of w; w.mT is contiguous.  then: the
        fused step that takes all columns; the kernel gives its result.
        """

    def read(self, variable: str, have: str, want: str) -> str:
        """`variable`, of dtype `have`, in the dtype `want`."""

    def variable(self) -> str:
        """A name that the code has not used yet."""
