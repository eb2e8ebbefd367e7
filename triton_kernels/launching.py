"""Launching a kernel again without asking Triton which one it is:
that takes longer than the smallest collectives themselves.

The first launch goes through Triton as usual, and gives the compiled kernel. Every later one with the same
key passes its arguments to that one directly. A key says all that the compiled code depends on: dtypes,
constants, the alignment of what is passed.
"""
from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch

_COMPILED: dict[Hashable, tuple[Any, tuple[Any, ...]]] = {}


class Grid(NamedTuple):
    """How a kernel is launched.

    registers: of a thread, at most; what does not fit them spills. None: as many as the compiler likes.
    early: before the kernel before it has ended; of kernels that have a constant EARLY (see `early`).
    """
    blocks: int
    warps: int = 8
    registers: int | None = None
    early: bool = False

    @property
    def threads(self) -> int:
        """Of a block."""
        return 32 * self.warps

    def over(self, count: int) -> Grid:
        """Without the blocks that would have none of so many elements, one a thread."""
        most = -(-count // (32 * self.warps))
        return self if self.blocks <= most else self._replace(blocks=most)


def launch(kernel: Any, key: tuple[Hashable, ...], grid: Grid, arguments: tuple[Any, ...],
           constants: Callable[[], dict[str, Any]], interpret: bool) -> None:
    """Runs the kernel. arguments: in order, those that are no constants, the first a tensor; `constants` is
    called only when it has to be."""
    blocks, warps, registers, early = grid
    key = (kernel, warps, registers, early, *key)
    known = None if interpret else _COMPILED.get(key)
    if known is None:
        named = constants() | ({"EARLY": early} if "EARLY" in kernel.arg_names else {})
        how = {"launch_pdl": True} if early else {}
        assert "EARLY" in named or not early, "it would not wait for the kernel before it"
        assert warps & (warps - 1) == 0, f"{warps} warps are no power of two, as Triton wants"
        compiled = kernel[(blocks,)](*arguments, **named, num_warps=warps, maxnreg=registers, **how)
        if not interpret:
            _COMPILED[key] = compiled, tuple(named[n] for n in kernel.arg_names[len(arguments):])
    else:
        compiled, rest = known
        compiled[blocks, 1, 1](*arguments, *rest,
                               stream=torch._C._cuda_getCurrentRawStream(arguments[0].device.index))
