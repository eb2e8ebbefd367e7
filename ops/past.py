"""What tokens see of those before them: each other alone, or all that is in a cache.

A layer that attends through a `Past` is written once: the program at hand says what it is. In training it is
attention among the tokens. In a step their keys and values are written into the cache, each `keep` taking the
next of its leaves, and queries see all that is in it; so in a chunk of prompts, behind a known number of
tokens. At the beginning of prompts nothing is in it yet: keys are written, and queries see the prompt's.

Of a layer with a state there is no slot a token: a leaf of its cache is what the tokens before left behind,
by `windows` those that a convolution still sees, by `state` anything else. Tokens behind the `last` of a row
are padding, and must leave nothing: `real` makes them 0.

>>> import torch
>>> from shardlib import Params, param, sharded
>>> class Cache(Params):
...     k: torch.Tensor = param("B S K H")
...     v: torch.Tensor = param("B S K H")
>>> def layer(q, x, past):
...     return past.attention(q, x, x)
>>> train = sharded("B T K G H, B T K H -> B T K G H")(lambda q, x: layer(q, x, Past()))
>>> @sharded("B T K G H, B T K H, *, B -> B T K G H, *")
... def step(q, x, cache: Cache, start):
...     past = Past(cache, start)
...     return layer(q, x, past), past.kept
>>> x = torch.arange(3.0).view(1, 3, 1, 1)
>>> train(x[..., None], x).flatten()
tensor([0.0000, 0.7311, 1.8509])
>>> held = Cache(k=x.clone(), v=x.clone())
>>> step(x[:, 2:, ..., None], x[:, 2:], held, torch.tensor([2]))[0].flatten()
tensor([1.8509])

The sum of all elements so far is a state; of the second row here two are real:

>>> from shardlib.functions import sum
>>> class Held(Params):
...     total: torch.Tensor = param("B")
>>> @sharded("B T, *, B, B -> *")
... def added(x, cache: Held, start, last):
...     past = Past(cache, start, last=last)
...     past.state(lambda held: held + sum("B T -> B", past.real(x)))
...     return past.kept
>>> added(torch.ones(2, 3), Held(total=torch.tensor([4.0, 5.0])), torch.tensor([4, 5]), torch.tensor([2, 1]))
Held(total=tensor([7., 7.]))
"""
from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from shardlib.functions import arange, concat, less_equal, windows
from shardlib.language.rearrange import rename
from shardlib.language.value import Value
from shardlib.ops.attention import attention
from shardlib.ops.kv_cache import update_cache
from shardlib.ops.take import take
from shardlib.params import Params, fill, leaf_values


class Past:
    """cache: a pytree of what is kept of a layer; start: where in it the tokens of each row begin.

    ahead: what `start` is everywhere, where that is known; at 0 nothing is in the cache.
    last: of a layer with a state, which of the tokens is the row's last; negative where none is the row's.
    """

    def __init__(self, cache: Any = None, start: Any = None, ahead: int | None = None,
                 last: Any = None) -> None:
        self.cache, self.start, self.ahead, self.last = cache, start, ahead, last
        self._leaves = iter(leaf_values(cache, "") if cache is not None else ())
        self._made: dict[str, Value] = {}

    @property
    def stored(self) -> bool:
        """Whether what `keep` gives is the cache, S long, and not what it got."""
        return self.cache is not None and self.ahead != 0

    def keep(self, dims: str, x: Value) -> Value:
        """`x`, whose dims are these with T for S, goes into the cache. What queries see."""
        if self.cache is None:
            return x
        path, old = next(self._leaves)
        self._made[path] = update_cache(f"{dims}, {_of('T', dims)}, B -> {dims}", old, x, self.start)
        return self._made[path] if self.stored else x

    def attention(self, q: Value, k: Value, v: Value, **how: Any) -> Value:
        """Causal attention, B T K G H, over keys and values that are kept; `how` as `attention` takes it."""
        return self.over("B T K G H, B S K H, B S K H -> B T K G H", q, self.keep("B S K H", k),
                         self.keep("B S K H", v), **how)

    def over(self, text: str, q: Value, k: Value, v: Value, **how: Any) -> Value:
        """The same over what `keep` gave. S is the key time of `text`; where it is not the cache's, the dims
        of k and v have T in its place."""
        if self.ahead:
            return attention(text, q, k, v, ahead=self.ahead, **how)
        if self.stored:
            given, made = text.split(" -> ")
            return attention(f"{given}, B -> {made}", q, k, v, self.start, **how)
        letter = "S" if self.cache is None else "P"                 # S is the cache's
        _, *dims = text.split(" -> ")[0].split(", ")
        k, v = (rename(f"{_of('T', of)} -> {_of(letter, of)}", x) for of, x in zip(dims, (k, v)))
        return attention(_of(letter, text), q, k, v, **how)

    def real(self, x: Value) -> Value:
        """`x`, of dims B T and more, and 0 where a token is padding."""
        return x if self.last is None else x * less_equal("T, B -> B T", arange("T"), self.last)

    def state(self, after: Callable[[Value | None], Value]) -> Value | None:
        """What tokens before these left in the next leaf, None where none did; these leave `after` of it."""
        if self.cache is None:
            return None
        path, old = next(self._leaves)
        held = old if self.stored else None
        self._made[path] = after(held)
        return held

    def windows(self, dims: str, x: Value, taps: int) -> Value:
        """What each token sees through so many taps, B T P `dims`: itself last, and 0 before the first token.
        Kept are the row's last O tokens, one fewer. X and W are letters of its own."""
        def cut(held: Value | None, made: str) -> Value:
            if held is None:
                return windows(f"B T {dims} -> {made} {dims}", x, before=taps - 1)
            both = concat(f"B O {dims}, B T {dims} -> B X {dims}", held, x)
            return windows(f"B X {dims} -> {made} {dims}", both)
        held = self.state(lambda held: take(f"B W O {dims}, B -> B O {dims}", cut(held, "B W O"),
                                            self.last + 1))
        return cut(held, "B T P")

    @property
    def kept(self) -> Params:
        """The cache as it is afterwards."""
        return fill(self.cache, "", self._made.__getitem__)


def _of(letter: str, text: str) -> str:
    """The same with another letter for S."""
    return re.sub(r"\bS\b", letter, text)
