"""What dispatch, grouped_einsum and combine do on one rank's tensors.

A rank has some experts, `tokens` tokens and `choices` of each. A choice of an own expert has a number,
(expert * tokens + token) * choices + choice; `at` holds those that there are, in order, so that rows of one
expert lie together; behind them stands experts * tokens * choices. Shapes do not depend on what was chosen,
nothing waits for a GPU, and sums are in the order of the choices.

>>> x, chosen = torch.tensor([[1.0], [2.0]]), torch.tensor([[0, 2], [2, 1]])
>>> rows, at = chosen_rows(x, chosen, 2, 2, 2, first=1, most=4)                  # of experts 1 and 2
>>> rows.tolist(), at.tolist()
([[2.0], [1.0], [2.0], [0.0]], [3, 5, 6, 8])
>>> combined(rows, at, 2, 2, 2, (2, 1)).tolist()
[[1.0], [4.0]]
"""
from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


def chosen_rows(x: Tensor, chosen: Tensor, experts: int, tokens: int, choices: int, first: int, most: int,
                look: Callable[[Tensor], None] | None = None, room: Callable[[Tensor], None] | None = None,
                none: int | None = None) -> tuple[Tensor, Tensor]:
    """The rows of tokens that chose one of the own experts, which begin with `first`; and which they are.

    look: gets what was chosen, where nobody knows that these are experts, and each once.  room: looks at how
    many rows there are, where there may be more than `most`.  none: a number below 0 that is no expert.
    """
    if look is not None:
        look(chosen := each_once(chosen, none))
    here, n = chosen.reshape(-1) - first, tokens * choices
    numbers = here * n + torch.arange(n, device=x.device)
    own = (here >= 0) & (here < experts)
    if room is not None:
        room(own.sum())
    at = torch.where(own, numbers, experts * n).sort().values[:most]
    return token_rows(x, at, experts, tokens, choices), at


def each_once(chosen: Tensor, none: int | None = None) -> Tensor:
    """The same, but -1, or what is below `none`, for an expert that the token has already."""
    again = (chosen.unsqueeze(-1) == chosen.unsqueeze(-2)).tril(-1).any(-1)
    return (chosen.masked_fill(again, -1) if none is None else
            chosen.masked_fill(again & (chosen != none), none - 1))


def token_rows(x: Tensor, at: Tensor, experts: int, tokens: int, choices: int,
               weights: Tensor | None = None) -> Tensor:
    """Each row's token, times its weight; 0 in rows that mean nothing."""
    n = max(tokens * choices, 1)
    slot, live = at % n, (at < experts * n).unsqueeze(-1)
    rows = x.reshape(tokens, x.shape[-1])[slot // max(choices, 1)]
    if weights is not None:
        rows = (rows * weights.reshape(-1)[slot].unsqueeze(-1)).to(x.dtype)
    return torch.where(live, rows, 0)


def combined(rows: Tensor, at: Tensor, experts: int, tokens: int, choices: int, shape: tuple[int, ...],
             weights: Tensor | None = None) -> Tensor:
    """The sum of each token's rows, times their weights; added up in at least float32."""
    found = _by_slot(rows, at, experts, tokens, choices)
    if weights is not None:
        found = found * weights.reshape(tokens, choices, 1)
    return found.sum(1).to(rows.dtype).view(shape)


def slot_products(rows: Tensor, at: Tensor, g: Tensor, experts: int, tokens: int, choices: int,
                  shape: tuple[int, ...]) -> Tensor:
    """Each choice's row times g of its token; 0 where the expert is another rank's."""
    found = _by_slot(rows, at, experts, tokens, choices)
    return (found * g.reshape(tokens, 1, rows.shape[1])).sum(-1).view(shape)


def _by_slot(rows: Tensor, at: Tensor, experts: int, tokens: int, choices: int) -> Tensor:
    """The row of each choice of each token, in at least float32; 0 where it is not here."""
    n, wide = tokens * choices, torch.promote_types(rows.dtype, torch.float32)
    if not len(at):
        return rows.new_zeros((tokens, choices, rows.shape[1]), dtype=wide)
    slot = torch.where(at < experts * n, at % n, n)
    order = torch.arange(len(at), device=at.device)
    row = torch.full((n + 1,), len(at), device=at.device).scatter(0, slot, order)[:n]
    found = rows[row.clamp(max=len(at) - 1)].to(wide)
    return torch.where((row < len(at)).unsqueeze(-1), found, 0).view(tokens, choices, rows.shape[1])


# -- matrices of experts -------------------------------------------------------------------------------------

def _ends(at: Tensor, experts: int, tokens: int, choices: int) -> Tensor:
    """Where the rows of each expert end."""
    return torch.searchsorted(at, torch.arange(1, experts + 1, device=at.device) * (tokens * choices))


def takes_grouped(rows: Tensor, other: Tensor) -> bool:
    """Whether torch's grouped matmul does: bfloat16 on a GPU, lines multiples of 16 bytes apart."""
    return (rows.is_cuda and rows.dtype == other.dtype == torch.bfloat16 and rows.numel() * other.numel() > 0
            and rows.shape[1] % 8 == other.shape[-1] % 8 == 0
            and all(x.is_contiguous() or x.mT.is_contiguous() for x in (rows, other)))


def grouped_product(rows: Tensor, at: Tensor, w: Tensor, experts: int, tokens: int, choices: int) -> Tensor:
    """Each row times the matrix of its expert, w: (experts, in, out)."""
    ends = _ends(at, experts, tokens, choices)
    if takes_grouped(rows, w):
        return F.grouped_mm(rows, w, offs=ends.int())
    if rows.is_cuda:        # nothing waits for the counts: each expert's product with all rows, those kept
        out = rows.new_zeros(len(at), w.shape[2])
        for own, m in zip(_own(ends, len(at)), w):
            out = torch.where(own, rows @ m, out)
        return out
    parts = [rows[a:b] @ m for (a, b), m in zip(pairwise([0, *ends.tolist()]), w)]
    return torch.cat([*parts, rows.new_zeros(len(at) - sum(map(len, parts)), w.shape[2])])


def grouped_outer(rows: Tensor, at: Tensor, g: Tensor, experts: int, tokens: int, choices: int) -> Tensor:
    """For each expert the sum over its rows of row times g: (experts, in, out)."""
    ends = _ends(at, experts, tokens, choices)
    if experts and takes_grouped(rows, g):
        return F.grouped_mm(rows.mT, g, offs=ends.int())
    if rows.is_cuda:
        parts = [torch.where(own, rows, 0).mT @ torch.where(own, g, 0) for own in _own(ends, len(at))]
    else:
        parts = [rows[a:b].mT @ g[a:b] for a, b in pairwise([0, *ends.tolist()])]
    return torch.stack(parts) if parts else rows.new_zeros(0, rows.shape[1], g.shape[1])


def _own(ends: Tensor, rows: int) -> list[Tensor]:
    """For each expert, which of the rows are its own."""
    here, begins = torch.arange(rows, device=ends.device)[:, None], torch.cat((ends.new_zeros(1), ends[:-1]))
    return [(here >= a) & (here < b) for a, b in zip(begins.unbind(), ends.unbind())]
