"""What queries see of keys: by where both stand, within a window, below a length, by a mask.

Nothing here holds all pairs at once, unless it is asked for `bias`.

>>> Seen(0, 3, 0, 3, window=2).block(0, 3, 0, 3)[0, 0, 0].int()
tensor([[1, 0, 0],
        [1, 1, 0],
        [0, 1, 1]], dtype=torch.int32)
"""
from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from shardlib.ops.rope import positions


@dataclass(frozen=True, eq=False)
class Seen:
    """t queries, query i of row b at start[b] + offset + i, and s keys, key j at first + j.

    A query sees keys up to its own place where it is `causal`, those less than `window` places from it, those
    below lengths[b], and those where `mask` is true: all four, where they are given.

    start, lengths: (b,), of int64.  mask: (b, k, g, t, s), each 1 or all.
    """
    offset: int
    t: int
    first: int
    s: int
    causal: bool = True
    window: int | None = None
    start: Tensor | None = None
    lengths: Tensor | None = None
    mask: Tensor | None = None

    @property
    def ahead(self) -> int:
        """Where the first query stands, counted from the first key; of no start."""
        return self.offset - self.first

    @property
    def known(self) -> bool:
        """Whether what is seen follows from the sizes alone."""
        placed = self.start is not None and (self.causal or self.window is not None)
        return not placed and self.lengths is None and self.mask is None

    def keys(self, at: int, n: int) -> tuple[int, int]:
        """(from, to): the keys that some of the n queries from `at` on may see, as far as sizes say."""
        low, high = 0, self.s
        if self.start is None and self.window is not None:
            low = self.ahead + at - self.window + 1
            high = self.ahead + at + n - 1 + self.window
        if self.start is None and self.causal:
            high = min(high, self.ahead + at + n)
        low = min(max(low, 0), self.s)
        return low, min(max(high, low), self.s)

    def part(self, at: int, n: int) -> Seen:
        """Of the n queries from `at` on."""
        mask = self.mask if self.mask is None or self.mask.shape[3] == 1 else self.mask[..., at:at + n, :]
        return replace(self, offset=self.offset + at, t=n, mask=mask)

    def block(self, at: int, n: int, low: int, high: int,
              device: torch.device | None = None) -> Tensor | None:
        """Which of the keys from `low` to `high` the n queries from `at` on see: (b, k, g, n, keys), each 1
        or all; None where they see all. That of all queries is made once."""
        if n < self.t:
            return self._block(at, n, low, high, device)
        if (low, high) not in self._blocks:
            self._blocks[low, high] = self._block(at, n, low, high, device)
        return self._blocks[low, high]

    @cached_property
    def _blocks(self) -> dict[tuple[int, int], Tensor | None]:
        return {}

    def _block(self, at: int, n: int, low: int, high: int, device: torch.device | None) -> Tensor | None:
        parts = []
        if self.causal or self.window is not None:
            parts.append(self._near(at, n, low, high, device))
        if self.lengths is not None:
            key = torch.arange(self.first + low, self.first + high, device=device)
            parts.append((key < self.lengths[:, None])[:, None, None, None])
        if self.mask is not None:
            rows = slice(None) if self.mask.shape[3] == 1 else slice(at, at + n)
            parts.append(self.mask[..., rows, low:high])
        seen = None
        for part in parts:
            seen = part if seen is None else seen & part
        return seen

    def _near(self, at: int, n: int, low: int, high: int, device: torch.device | None) -> Tensor:
        """By place: (b or 1, 1, 1, n, keys)."""
        start = torch.zeros(1, dtype=torch.int64, device=device) if self.start is None else self.start
        query = positions(start, self.offset + at, n)[:, None, None, :, None]
        key = torch.arange(self.first + low, self.first + high, device=device)
        if self.window is None:
            return key <= query
        near = key > query - self.window
        return near & (key <= query if self.causal else key < query + self.window)

    # -- in other forms, each made once ----------------------------------------------------------------------

    @cached_property
    def reach(self) -> Tensor:
        """(b,): how many keys the first query sees of a `start`, each later one seeing one more; below 0
        or above s no further than it takes to say that none are seen, or all: int32 has room for them."""
        assert self.start is not None
        return (self.start + (self.ahead + 1)).clamp(-self.t, self.s)

    @cached_property
    def _biases(self) -> dict[tuple[int, torch.dtype], Tensor]:
        return {}

    def bias(self, g: int, dtype: torch.dtype) -> Tensor:
        """What is added to the scores of all pairs: 0 where a key is seen, -inf elsewhere; (b, k, g t, s), b
        and k 1 or all."""
        if (g, dtype) not in self._biases:
            device = next(x.device for x in (self.start, self.lengths, self.mask) if x is not None)
            seen = self.block(0, self.t, 0, self.s, device)
            assert seen is not None
            self._biases[g, dtype] = bias(seen, g, self.t, dtype)
        return self._biases[g, dtype]


def bias(seen: Tensor, g: int, t: int, dtype: torch.dtype) -> Tensor:
    """0 where `seen`, (b, k, g, t, s), is true, -inf elsewhere: (b, k, g t, s)."""
    b, k, groups, times, s = seen.shape
    out = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))
    if groups == 1 and (times == 1 or g == 1):
        return out.view(b, k, times, s)                 # one row for all queries of a head, or one for each
    return out.expand(b, k, g, t, s).reshape(b, k, g * t, s)
