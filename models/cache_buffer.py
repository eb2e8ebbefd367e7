"""The memory of keys and values, of which every batch takes the front.

Rows are first within a layer, so that the cache of a smaller bucket is a prefix of a larger one's, and
captured steps of all buckets share one piece of memory a leaf. It grows, and is then another: what was
captured on the old one is no more.

>>> buffer = CacheBuffer(torch.float32, torch.device("cpu"))
>>> large, small = (buffer.views({"k": (2, rows, 8, 3, 4)})["k"] for rows in (4, 2))
>>> large.shape, [a.data_ptr() == b.data_ptr() for a, b in zip(large, small)], buffer.made
(torch.Size([2, 4, 8, 3, 4]), [True, True], 1)
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor


class CacheBuffer:
    """`made` counts the pieces of memory that it has been."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device, self.made = dtype, device, 0
        self._flat: dict[str, Tensor] = {}

    def room(self, shapes: Mapping[str, Sequence[int]]) -> bool:
        """Whether there is room for leaves of these shapes, layer by layer."""
        return all(p in self._flat and self._flat[p].shape[1] >= prod(shape[1:])
                   for p, shape in shapes.items())

    def views(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
        """path -> this rank's stacked leaf (L B S K H) of this shape:
        of each layer the front of what there is."""
        if not self.room(shapes):
            self._flat.clear()
            self._flat = {p: torch.zeros((shape[0], prod(shape[1:])), dtype=self.dtype, device=self.device)
                          for p, shape in shapes.items()}
            self.made += 1
        return {p: self._flat[p][:, :prod(shape[1:])].unflatten(1, shape[1:]) for p, shape in shapes.items()}
