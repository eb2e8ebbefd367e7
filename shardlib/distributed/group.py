"""A group of ranks: who stands where, and what a collective of it must fit,
each a SpecError before anything is sent."""
from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod
from operator import index

import torch
from torch import Tensor

from shardlib.distributed.eager import fault
from shardlib.distributed.flat import Cut
from shardlib.errors import SpecError

_ORDINARY, _STRIDED = (Tensor, torch.nn.Parameter), torch.strided
"""Where `fault` finds nothing, unless nested or quantized."""


@lru_cache(maxsize=4096, typed=True)
def _elements(*sizes: int) -> int:
    """Of a tensor of these sizes. TypeError or ValueError where it cannot be."""
    if min(sizes, default=0) < 0:
        raise ValueError(sizes)
    return prod(map(index, sizes))


class Group:
    """The group `name` of `ranks`, in that order, seen from `rank`."""

    def __init__(self, name: str, ranks: Sequence[int], rank: int, local_rank: int) -> None:
        self.name, self.ranks, self.rank, self.local_rank = name, tuple(ranks), rank, local_rank
        self.world_size, self.rank_in_group = len(self.ranks), self.ranks.index(rank)

    @property
    def first_rank(self) -> int:
        return self.ranks[0]

    @property
    def last_rank(self) -> int:
        return self.ranks[-1]

    @property
    def is_first_rank(self) -> bool:
        return self.rank == self.first_rank

    @property
    def is_last_rank(self) -> bool:
        return self.rank == self.last_rank

    @property
    def next_rank(self) -> int:
        """The rank after this one; after the last comes the first."""
        return self.ranks[(self.rank_in_group + 1) % self.world_size]

    @property
    def prev_rank(self) -> int:
        """The rank before this one; before the first comes the last."""
        return self.ranks[self.rank_in_group - 1]

    # -- what a call must fit --------------------------------------------------------------------------------

    def _cut(self, name: str, x: Tensor, dim: int, sizes: Sequence[int]) -> Cut:
        self._check_count(name, "sizes", sizes)
        try:
            # (2.0, 2.0) is (2, 2) to what remembers cuts
            return Cut.of(x.shape, index(dim), tuple(map(index, sizes)))
        except IndexError:
            raise SpecError(f"{name} over {self.name}: no dim {dim} in a tensor of {x.ndim} dims") from None
        except (TypeError, ValueError):
            raise SpecError(f"{name} over {self.name}: sizes {tuple(sizes)} along dim {dim} are not all "
                            "whole numbers of 0 or more") from None

    def _count(self, name: str, shape: Sequence[int]) -> int:
        """The number of elements of a tensor of this shape."""
        try:
            return _elements(*shape)
        except (TypeError, ValueError):
            raise SpecError(f"{name} over {self.name}: the sizes of shape {tuple(shape)} are not all whole "
                            "numbers of 0 or more") from None

    def _dense(self, name: str, x: Tensor) -> Tensor:
        if ((type(x) not in _ORDINARY or x.layout is not _STRIDED or x.is_nested or x.is_quantized)
            and (wrong := fault(x))):
            raise SpecError(f"{name} over {self.name}: the tensor {wrong}")
        return x

    def _cut_of_pieces(self, name: str, x: Tensor, dim: int, sizes: Sequence[int]) -> Cut:
        """The cut of which x is this member's piece."""
        cut, me = self._cut(name, x, dim, sizes), self.rank_in_group
        if x.shape != cut.shapes[me]:
            raise SpecError(f"{name} over {self.name}: dim {dim} of member {me} has {x.shape[dim]}; "
                            f"sizes {cut.sizes} say {cut.sizes[me]}")
        return cut

    def _check_count(self, name: str, what: str, given: Sequence[object]) -> None:
        if len(given) != self.world_size:
            raise SpecError(f"{name} over {self.name}: {what} has length {len(given)}; the group has "
                            f"{self.world_size} members")

    def _check_member(self, name: str, member: int) -> None:
        if not hasattr(member, "__index__") or not 0 <= member < self.world_size:
            raise SpecError(f"{name} over {self.name}: no member {member} in a group of {self.world_size}")

    def _check_peer(self, name: str, member: int) -> None:
        self._check_member(name, member)
        if member == self.rank_in_group and self.world_size > 1:
            raise SpecError(
                f"{name} over {self.name}: member {member} is the one that calls; it has what it would send")
