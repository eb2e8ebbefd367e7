"""What generated code calls where a communicator takes a collective together with the steps around it.

>>> from shardlib.distributed import connect
>>> from shardlib.mesh import Mesh
>>> with connect(Mesh(tp=1), device="cpu") as runtime:
...     added = FusedCall(runtime.group(("tp",)), "all_reduce_add", lambda y, residual: residual + y)
...     added(Tensor([1, 2]), Tensor([3, 4]), at="step 1")
tensor([4., 6.])
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from shardlib.distributed.eager import eager
from shardlib.distributed.flat import plain
from shardlib.distributed.group_coordinator import GroupCoordinator


class FusedCall:
    """`kernel`, of a communicator of `group`, known to the watchdog as the collective `fusion`.

    Its first operand is what is sent; it sees contiguous tensors, but for the weights that lie by columns.
    All members call it, with operands of the same shapes.
    """

    def __init__(self, group: GroupCoordinator, fusion: str, kernel: Callable[..., Any]) -> None:
        self.group, self.name, self.fusion, self.kernel = group, group.name, fusion, kernel

    @eager
    def __call__(self, *operands: Tensor, at: object = None) -> Any:
        given = [plain(x.mT).mT if i and _by_columns(x) else plain(x) for i, x in enumerate(operands)]
        return self.group.watched(at, self.fusion, "sum", given[0], given[0].numel(),
                                  tuple(x.shape for x in given), self.kernel, *given)


def _by_columns(x: Tensor) -> bool:
    return x.dim() > 1 and not x.is_contiguous() and x.mT.is_contiguous()
