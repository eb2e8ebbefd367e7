"""Lookups on GPUs, where what is asked for is noted and looked at later: by one kernel each, where torch
takes four to eight."""
from __future__ import annotations

from math import prod

from torch import Tensor

from shardlib.lowering.index_check import IndexSite
from shardlib.ops.few_rows import FLOATS, differentiated, starts_early


def look(site: IndexSite, index: Tensor) -> None:
    """`site.look(index)`."""
    if not notes(site, index):
        return site.look(index)
    assert site.seen is not None
    from shardlib.triton_kernels.lookup import note
    note(index, site.seen, starts_early(index.device, index.numel()))


def notes(site: IndexSite, index: Tensor) -> bool:
    """Whether a kernel notes these indices."""
    return (index.is_cuda and site.seen is not None and site.ignored is None and index.numel() > 0
            and index.is_contiguous() and not index.dtype.is_floating_point)


def looks_up(site: IndexSite, x: Tensor, index: Tensor, dim: int) -> bool:
    """Whether `looked_up` takes these: an index for all of x before `dim`, or, where that is 0, any."""
    return (notes(site, index) and x.is_contiguous() and x.dtype in FLOATS and x.shape[dim] > 0
            and not differentiated(x)
            and (dim == 0 or index.shape == (*x.shape[:dim], *(1,) * (x.dim() - dim))))


def looked_up(site: IndexSite, x: Tensor, index: Tensor, dim: int, first: int) -> Tensor:
    """x at index - first along `dim`, zero where that is not there, and the index noted: a result for each
    index, with the dims of x behind `dim`."""
    assert site.seen is not None
    from shardlib.triton_kernels.lookup import lookup
    entries = x.view(prod(x.shape[:dim]), x.shape[dim], -1)
    found = lookup(entries, index.view(-1), first, site.seen, starts_early(x.device, index.numel()))
    return found.view(*(index.shape if dim == 0 else x.shape[:dim]), *x.shape[dim + 1:])
