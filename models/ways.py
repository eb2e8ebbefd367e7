"""How prompts go through a model: at once, or as two halves that run beside each other.

The sums of one half travel while the other computes (`shardlib.run.beside`). Halves are of the rows; where
there is one row, of its tokens, the second behind the first. Where it may be, what lies between two sums, an
addition and a norm, is of each rank's own rows or tokens: a dim that the layout leaves whole is split over
the ranks that add up, and each sum becomes a reduce_scatter and an all_gather.

>>> print(Way("tokens"))
two halves of the tokens in turns, the sums of one beside the other's work
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from shardlib.api import Compiled, Prepared, arg_types
from shardlib.compiler.passes.pack import packings
from shardlib.distributed.runtime import Runtime
from shardlib.ops.attention import placed
from shardlib.program import Program
from shardlib.run.beside import asked, axes_of_sums, largest_sum

BESIDE_BYTES: dict[str, dict[str, int]] = {"rows": {"cuda": 8 << 20}, "tokens": {}}
"""By what is halved, and device: bytes of the sum of half of a call beyond which two halves run beside each
other. Up to there a kernel takes it with the norm. Halves of tokens have not been measured on GPUs."""
SPLITS: dict[str, str] = {}
"""By device, the dims of tokens that are split between the sums of halves, the better one first."""


@dataclass(frozen=True)
class Way:
    """halved: "rows" or "tokens", where two halves of them run beside each other.  over: the dim, if any,
    that is split between sums, where the layout leaves it whole."""
    halved: str = ""
    over: str = ""

    def __str__(self) -> str:
        how = (f"two halves of the {self.halved} in turns, the sums of one beside the other's work"
               if self.halved else "all at once")
        return how + (f"; between sums each rank has its part of {self.over}" if self.over else "")


@dataclass(frozen=True)
class Prompts:
    """The way of some prompts, and the program of them, or of the first half, with the sizes of its dims."""
    way: Way
    program: Program
    sizes: Mapping[str, int]


class Ways:
    """Chooses.

    steps: the compiled program for (of prompts, so many tokens ahead, or None: of a step; the dim that is
    split between sums, or ""; rows, capacity of the cache).  splits: the dims of tokens that the layout
    leaves whole.
    """

    def __init__(self, steps: Callable[[int | None, str, int, int], Compiled], weights: Prepared,
                 sizes: Mapping[str, int], dtype: torch.dtype, runtime: Runtime,
                 splits: Sequence[str]) -> None:
        self.steps, self.weights, self.sizes, self.dtype = steps, weights, sizes, dtype
        self.runtime, self.splits = runtime, splits
        self.made: dict[tuple[int | None, int, int, int], Way] = {}

    def __call__(self, ahead: int | None, size: int, capacity: int, length: int, ranks: int) -> Way:
        """Of `size` rows of `length` tokens. Rows are halved rather than tokens, which attend to those before
        them: each of the `ranks` that have rows of their own has half of them in each half."""
        if not any(self.runtime.device.type in least for least in BESIDE_BYTES.values()):
            return Way()
        key = ahead, size, capacity, length
        if key not in self.made:
            halves = [("rows", size // 2, length)] if size % (2 * ranks) == 0 else []
            halves += [("tokens", size, length // 2)] if ahead is not None and length % 2 == 0 else []
            found = (Way(halved, over) for halved, rows, tokens in halves
                     for over in self._splits(rows, tokens, *key[:3])
                     if self._worth(halved, over, rows, tokens, *key[:3]))
            self.made[key] = next(found, Way())
        return self.made[key]

    def _splits(self, rows: int, tokens: int, ahead: int | None, size: int, capacity: int) -> Iterator[str]:
        """The dims that come into question, and none."""
        if dims := [dim for dim in SPLITS.get(self.runtime.device.type, "") if dim in self.splits]:
            program, mesh = self.steps(ahead, "", size, capacity).program, self.runtime.mesh
            counts, ranks = dict(B=rows, T=tokens), mesh.size(axes_of_sums(program, mesh))
            yield from (dim for dim in dims if ranks > 1 and counts[dim] and counts[dim] % ranks == 0)
        yield ""

    def _worth(self, halved: str, over: str, rows: int, tokens: int, ahead: int | None, size: int,
               capacity: int) -> bool:
        """Whether the sums of a half are long, and what is given may be as it is."""
        least = BESIDE_BYTES[halved].get(self.runtime.device.type)
        plain, mesh = self.steps(ahead, "", size, capacity).program, self.runtime.mesh
        sizes = {**self.sizes, "B": rows, "S": capacity, "T": tokens}
        if least is None or least >= self.dtype.itemsize * largest_sum(plain, mesh, sizes,
                                                                       self.runtime.coordinate):
            return False
        program = self.steps(ahead, over, size, capacity).program
        if halved == "tokens":                          # the second half reads what the first one has written
            later = self.steps((ahead or 0) + tokens, over, size, capacity).program
            if asked(program, mesh) != asked(later, mesh) or not placed(later):
                return False
        return self._given(program) == self._given(plain)

    def _given(self, program: Program) -> object:
        """The types of weights and cache, and which weights are packed."""
        held = {"w", "cache"}
        dtypes = getattr(self.weights, "dtypes", None)
        packed = [group.name for group in packings(program, held, dtypes)] if dtypes else None
        return packed, [arg_types(program, name) for name in sorted(held)]
