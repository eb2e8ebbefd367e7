"""A causal language model around its layers: what trains it, and what continues prompts.

A page says once what a layer is, `past` being what tokens see of those before them (`shardlib.ops.past`),

    def block(x, w, angles, past, config):
        ...
        a = past.attention(q, k, v)
        return x + einsum("B T K G H, K G H D -> B T D", a, w.wo)

    LM = CausalLM(Llama, dict(layers=block))

and, where they are not what most have, how ids become x, what layers are told of positions, how x becomes
logits, and what is kept of a layer.

B batch  T query time  S key time (cache slots)  D d_model  L layers  K kv heads  H head_dim  V vocab
"""
from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from shardlib import Params, einsum, param, scan, sharded, stacked
from shardlib.api import Sharded
from shardlib.functions import argmax, clamp, mean, zeros
from shardlib.ops import cross_entropy, embedding, rms_norm, rope_table, sample, take
from shardlib.ops.past import Past


class KeyValue(Params):
    k: Tensor = param("B S K H", initial="zeros")
    v: Tensor = param("B S K H", initial="zeros")


class Cache(Params):
    layers: KeyValue = stacked("L", KeyValue)


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: temperature 0 is greedy."""
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


# -- what most models have -----------------------------------------------------------------------------------

def embed(ids, w, start, config):
    return embedding("B T, V D -> B T D", ids, w.embed)


def angles_at(start, config):
    return rope_table("B -> B T/1 H", start, theta=config.theta, scaling=config.scaling)


def norm(x, w, config):
    return rms_norm(x, w.norm, config.eps)


def head(h, w, config):
    """Of all tokens, or of one a row."""
    return einsum("... D, V D -> ... V", h, w.embed if w.head is None else w.head)


def mean_loss(logits, labels):
    """Cross entropy, in nats per token."""
    return mean("B T -> ()", cross_entropy("B T V, B T -> B T", logits, labels))


# -- the programs --------------------------------------------------------------------------------------------

class CausalLM:
    """params: the weights.  layers: by the stacks in them, in order, what a layer is.  cache: what is kept, a
    stack for each of these.  angles: the dims of what a layer is told of positions from `start` on, or the
    class of a pytree, and that.

    logits_of, logits: after every token, from `start` on, from 0 on.  loss: of `logits_of`.
    next_logits, next_token, next_sample: of ids[b, last[b]], where ids[b, t] stands at start[b] + t and what
    is before it in the cache; the cache, with these.  prompt_...: the same of prompts, all of them behind
    `ahead` tokens: `start` is that everywhere, and `last` negative where a prompt has ended before.
    chunk: of layers with a state, which are told where rows end, behind which is padding: of how many tokens
    of a row they make one matrix.
    """

    def __init__(self, params: type[Params], layers: Mapping[str, Callable[..., Any]],
                 cache: type[Params] = Cache, *, embed: Callable[..., Any] = embed,
                 angles: tuple[str | type[Params], Callable[..., Any]] = ("B T/1 H", angles_at),
                 norm: Callable[..., Any] = norm, head: Callable[..., Any] = head,
                 chunk: int | None = None) -> None:
        self.params, self.layers, self.cache, self.chunk = params, layers, cache, chunk
        self.embed, (told, self.angles), self.norm, self.head = embed, angles, norm, head
        self.told, self.telling = (told, {}) if isinstance(told, str) else ("*", dict(angles=told))
        self.blocks = {stack: self._alone(stack) for stack in layers}
        self.logits_of, self.logits, self.loss = self._logits_of(), self._logits(), self._loss()
        kinds = dict(next=None, prompt=0)               # what `ahead` is where it is not given
        self.next_logits, self.prompt_logits = logits = [self._over(*kind) for kind in kinds.items()]
        self.next_token, self.prompt_token = map(self._greedy, logits, kinds.values())
        self.next_sample, self.prompt_sample = map(self._drawn, logits, kinds.values())

    def _made(self, f: Callable[..., Any], name: str, signature: str, **trees: type[Params]) -> Sharded:
        f.__name__ = f.__qualname__ = name
        f.__annotations__ = {**trees}
        return sharded(signature)(f)

    # -- training, scoring -----------------------------------------------------------------------------------

    def _alone(self, stack: str) -> Sharded:
        layer = self.layers[stack]

        def block(x, w, angles, *, config):
            return layer(x, w, angles, Past(), config)
        return self._made(block, layer.__name__, f"B T D, *, {self.told} -> B T D",
                          w=_one(self.params, stack), **self.telling)

    def _logits_of(self) -> Sharded:
        def logits_of(ids, w, start, *, config):
            x, angles = self.embed(ids, w, start, config), self.angles(start, config)
            for stack, block in self.blocks.items():
                x = scan(block, x, getattr(w, stack), angles, config=config)
            return self.head(self.norm(x, w, config), w, config)
        return self._made(logits_of, "logits_of", "B T/1, *, B -> B T V", w=self.params)

    def _logits(self) -> Sharded:
        def logits(ids, w, *, config):
            return self.logits_of(ids, w, zeros("B", dtype="int64"), config=config)
        return self._made(logits, "logits", "B T/1, * -> B T V", w=self.params)

    def _loss(self) -> Sharded:
        def loss(ids, labels, w, start, *, config):
            return mean_loss(self.logits_of(ids, w, start, config=config), labels)
        return self._made(loss, "loss", "B T/1, B T/1, *, B -> ()", w=self.params)

    # -- over a cache ----------------------------------------------------------------------------------------

    def _kept(self, stack: str, name: str) -> Sharded:
        layer = self.layers[stack]

        def block(x, w, cache, start, angles, *, config, ahead=None):
            past = Past(cache, start, ahead)
            return layer(x, w, angles, past, config), past.kept

        def ending(x, w, cache, start, last, angles, *, config, ahead=None):
            past = Past(cache, start, ahead, last)
            return layer(x, w, angles, past, config), past.kept
        block, at = (ending, "B, B") if self.chunk else (block, "B")
        return self._made(block, f"{name}_{layer.__name__}", f"B T D, *, *, {at}, {self.told} -> B T D, *",
                          w=_one(self.params, stack), cache=_one(self.cache, stack), **self.telling)

    def _over(self, kind: str, default: int | None) -> Sharded:
        names = ("cached",) if default is None else ("prompt", "later")
        first, *later = ({stack: self._kept(stack, name) for stack in self.layers} for name in names)

        def logits(ids, w, cache, start, last, *, config, ahead=default):
            x, angles, kept = self.embed(ids, w, start, config), self.angles(start, config), {}
            at = (start, last) if self.chunk else (start,)
            for stack, block in (later[0] if ahead else first).items():
                x, kept[stack] = scan(block, x, (getattr(w, stack), getattr(cache, stack)), *at, angles,
                                      config=config, ahead=ahead)
            one = clamp(last, min=0) if ahead or self.chunk else last
            h = take("B T D, B -> B D", self.norm(x, w, config), one)
            return self.head(h, w, config), self.cache(**kept)
        return self._made(logits, f"{kind}_logits", "B T/1, *, *, B, B -> B V/1, *", w=self.params,
                          cache=self.cache)

    def _greedy(self, logits_of: Sharded, default: int | None) -> Sharded:
        """The choice among the same logits, made without gathering them."""
        def token(ids, w, cache, start, last, *, config, ahead=default):
            logits, cache = logits_of(ids, w, cache, start, last, config=config, ahead=ahead)
            return argmax("B V -> B", logits), cache
        return self._made(token, logits_of.__name__.replace("logits", "token"),
                          "B T/1, *, *, B, B -> B/1, *", w=self.params, cache=self.cache)

    def _drawn(self, logits_of: Sharded, default: int | None) -> Sharded:
        """One token a row, by (seed, position, number of the row)."""
        def drawn(ids, w, cache, start, last, row, *, config, sampling, ahead=default):
            logits, cache = logits_of(ids, w, cache, start, last, config=config, ahead=ahead)
            token = sample("B V, B, B -> B", logits, start + last, row, temperature=sampling.temperature,
                           top_p=sampling.top_p, seed=sampling.seed)
            return token, cache
        return self._made(drawn, logits_of.__name__.replace("logits", "sample"),
                          "B T/1, *, *, B, B, B -> B/1, *", w=self.params, cache=self.cache)


def _one(tree: type[Params], stack: str) -> type[Params]:
    """The class of what is stacked there."""
    return next(f.metadata["of"] for f in dataclasses.fields(tree) if f.name == stack)
