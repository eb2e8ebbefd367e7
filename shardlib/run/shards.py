"""A whole pytree as the shards of this rank, and back: how values come to a mesh, and leave it for a file."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from shardlib.distributed.runtime import Runtime
from shardlib.language.trace import Function
from shardlib.language.verbs import reshard
from shardlib.layout import EXPLICIT
from shardlib.params import named_leaves, rebuild
from shardlib.placement import shard_of
from shardlib.run.compiled import Compiled
from shardlib.spec import Spec


def place(run: Compiled, name: str, whole: Any) -> Any:
    """This rank's shards of the argument `name` of a compiled function, copied out of whole tensors.

    `whole`: a tensor or a pytree, the same on every rank; nothing is sent.

    >>> import torch
    >>> from shardlib import Layout, Mesh, compile, sharded
    >>> run = compile(sharded("B D -> B D")(lambda x: x * 2), Layout(B="dp"), mesh=Mesh(dp=1))
    >>> run(place(run, "x", torch.ones(1, 2)))
    tensor([[2., 2.]])
    """
    there, types = run.runtime, run.types(name, whole)
    cut = [shard_of(x, types[path], there.mesh, there.coordinate).to(there.device, copy=True)
           for path, x in named_leaves(name, whole)]
    return rebuild(cut, (whole,))


def gather(run: Compiled, name: str, shards: Any) -> Any:
    """The whole tensors of which the ranks have these shards of the argument `name`; all ranks call it.

    >>> import torch
    >>> from shardlib import Layout, Mesh, compile, sharded
    >>> doubled = sharded("B D -> B D")(lambda x: x * 2)
    >>> run = compile(doubled, Layout(B="dp"), mesh=Mesh(dp=1), sizes=dict(B=1))
    >>> gather(run, "x", torch.ones(1, 2))
    tensor([[1., 1.]])
    """
    types = run.types(name, shards)
    whole = [_gathered(run.runtime, types[path], run.sizes, x) for path, x in named_leaves(name, shards)]
    return rebuild(whole, (shards,))


def _gathered(runtime: Runtime, kind: Spec, sizes: Mapping[str, int], x: Tensor) -> Tensor:
    text = f"{kind} -> {kind.whole()}"
    if kind == kind.whole():
        return x
    known = {n: size for n, size in sizes.items() if n in kind.names}
    return Compiled(Function(lambda x: reshard(text, x), text, EXPLICIT), None, runtime, known, (), {})(x)
