"""Methods that run as they stand, whatever traces or transforms the code that calls them.

    torch.compile           the graph breaks at the call: what it does depends on other ranks
    torch.func.grad, jvp    the call sees and gives plain values, since no gradient flows through it
    torch.vmap              a value that differs from sample to sample is refused; another is a plain one
    FakeTensorMode          is off within the call
    make_fx                 is refused: its graph would hold values of other ranks

None of them may reach what a call leaves behind for the next one.

>>> class Twice:
...     name = "tp"
...     @eager
...     def double(self, x: torch.Tensor) -> torch.Tensor:
...         return x.detach() * 2
>>> torch.func.grad(lambda x: x * Twice().double(x))(torch.tensor(3.0))
tensor(6.)
"""
from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from shardlib.errors import SpecError

_PROXY = torch._C._TorchDispatchModeKey.PROXY
_transform, _modes = _functorch.peek_interpreter_stack, torch._C._len_torch_dispatch_stack

def eager(method: Callable) -> Callable:
    """`method` of something that has a `name`, run as it stands.

    Its tensors come by themselves, in lists or in tuples.
    """
    @wraps(method)
    def called(self: Any, *args: Any, **options: Any) -> Any:
        if _transform() is None and not _modes():
            return method(self, *args, **options)
        return _alone(method, self, args, options)
    return _untraced(called)


def _untraced(called: Callable) -> Callable:
    """`called`, by which torch.compile breaks the graph.

    It runs no code for this at each call, as torch.compiler.disable does for 0.3 µs.
    """
    try:
        from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy
    except ImportError:
        return torch.compiler.disable(called)
    called._torchdynamo_disable, called._torchdynamo_disable_msg = True, "a collective is not traced"
    set_code_exec_strategy(called.__code__, _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP))
    return called


def _alone(method: Callable, self: Any, args: tuple, options: dict[str, Any]) -> Any:
    what = f"{method.__name__} over {self.name}"
    if torch._C._get_dispatch_mode(_PROXY) is not None:
        raise SpecError(f"{what}: make_fx cannot trace a collective")
    with ExitStack() as outside:
        outside.enter_context(torch._C._DisableFuncTorch())
        outside.enter_context(unset_fake_temporarily())
        return method(self, *(_bare(what, a) for a in args),
                      **{key: _bare(what, a) for key, a in options.items()})


def _bare(what: str, x: Any) -> Any:
    """An argument, whose tensors are without what transforms have put round them."""
    if isinstance(x, (list, tuple)) and any(isinstance(each, Tensor) for each in x):
        return [_bare(what, each) for each in x]
    if not isinstance(x, Tensor):
        return x
    if _functorch.is_batchedtensor(x := bare(x)):
        raise SpecError(f"{what}: the tensor {fault(x)}")
    return x


# -- tensors -------------------------------------------------------------------------------------------------

def bare(x: Tensor) -> Tensor:
    """x without what torch.func.grad, jvp and functionalize have put round it."""
    while (functional := _functorch.is_functionaltensor(x)) or _functorch.is_gradtrackingtensor(x):
        if functional:
            torch._sync(x)                                  # what was written to it
        x = _functorch.get_unwrapped(x)
    return x


def fault(x: Tensor) -> str | None:
    """Why x has no elements of its own in memory, one for each of its places; None where it has."""
    if _functorch.is_batchedtensor(x):
        return "differs from sample to sample of torch.vmap; call the collective outside of it"
    kind = ("quantized" if x.is_quantized else str(x.layout).removeprefix("torch.")
            if x.layout != torch.strided else "nested" if x.is_nested else "")
    if kind:
        return f"is {kind}; make a dense tensor of it first"
    ours = type(x).__torch_dispatch__ is torch._C._disabled_torch_dispatch_impl
    return None if ours else f"is a {type(x).__name__}; only plain tensors can be sent"
