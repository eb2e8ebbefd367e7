"""What becomes of rows once their next tokens are chosen: they go on, or end."""
from __future__ import annotations

import torch
from torch import Tensor

from shardlib.ops.few_rows import starts_early


def going(chosen: Tensor, ends: Tensor) -> Tensor:
    """Which rows do not end with these tokens."""
    return (chosen[:, None] != ends).all(-1)


def follow(chosen: Tensor, tokens: Tensor, ids: Tensor, position: Tensor, live: Tensor, ends: Tensor) -> None:
    """The chosen tokens are told, and fed next by the rows that go on; each row that lived has one more. On a
    GPU by one kernel.

    >>> position, live = torch.tensor([4, 4, 4]), torch.tensor([True, True, False])
    >>> tokens, ids = torch.zeros(3, dtype=torch.int64), torch.tensor([7, 7, 7])
    >>> follow(torch.tensor([5, 2, 8]), tokens, ids, position, live, ends=torch.tensor([2]))
    >>> tokens.tolist(), ids.tolist(), position.tolist(), live.tolist()
    ([5, 2, 8], [5, 7, 7], [5, 5, 4], [True, False, False])
    """
    if chosen.is_cuda:
        from shardlib.triton_kernels import follow as kernels
        kernels.follow(chosen.contiguous(), tokens, ids, position, live, ends,
                       starts_early(chosen.device, len(chosen)))
        return
    tokens.copy_(chosen)
    position.add_(live)
    live.logical_and_(going(chosen, ends))
    torch.where(live, chosen, ids, out=ids)
