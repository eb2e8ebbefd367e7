"""What surrounds a call and would change its numbers, or lose its gradients, without a word.

Generated code computes in the dtypes that its program says, so `torch.autocast` is off within a call,
functions in `local` included; one that wants it says so itself. torch.autograd records what one rank does and
not what others did with it: tensors that require grad are refused where there are several ranks.
"""
from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from shardlib.errors import SpecError

any_autocast = torch._C._is_any_autocast_enabled


@contextmanager
def without_autocast() -> Iterator[None]:
    """torch.autocast is off inside, for CPUs and CUDA, on which programs run."""
    with ExitStack() as off:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                off.enter_context(torch.autocast(device, enabled=False))
        yield


def refuse_gradients(name: str, leaves: Iterable[tuple[str, Any]]) -> None:
    """SpecError where grad mode is on and a leaf of an argument of `name` requires grad.

    A prepared leaf is a tuple of layers.
    """
    if not torch.is_grad_enabled():
        return
    for path, leaf in leaves:
        if any(getattr(x, "requires_grad", False) for x in (leaf if isinstance(leaf, tuple) else (leaf,))):
            raise SpecError(f"{name}: {path} requires grad, and torch.autograd does not reach other ranks; "
                            f"take value_and_grad({name}), or call it under torch.no_grad()")
