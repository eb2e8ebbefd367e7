"""Batch generation: prefill once, then one token at a time for every unfinished prompt.

Prompts of unequal length are padded on the right. Each row has its own position: what padding wrote into the cache is
overwritten before any query may see it.
"""
from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Callable, Collection, Sequence

import torch

from shardlib import Layout, Mesh, SpecError, compile, lower, sharded
from shardlib.api import shard_of
from shardlib.api import arg_types
from shardlib.distributed.runtime import Runtime
from shardlib.models.checkpoint import Checkpoint
from shardlib.models.llama import Cache, Llama, LlamaConfig, next_logits, next_token
from shardlib.models.llama_config import config_of
from shardlib.models.llama_weights import load
from shardlib.ops import sample
from shardlib.params import fill, init, leaf_values, struct
from shardlib.program import Program


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: temperature 0 is greedy."""
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@sharded("B T/1, *, *, B, B -> B/1, *")
def next_sample(ids, w: Llama, cache: Cache, start, last, *, config, sampling):
    """One drawn token a row, by (seed, position, row)."""
    logits, cache = next_logits(ids, w, cache, start, last, config=config)
    return sample("B V, B -> B", logits, start + last, temperature=sampling.temperature, top_p=sampling.top_p, seed=sampling.seed), cache


@dataclass(frozen=True)
class Generated:
    """Prompt and answer ids of every row, the end token included where it was met; seconds from prefill to the last token."""
    tokens: list[list[int]]
    new_tokens: int
    seconds: float


class Model:
    """A Llama on this rank: its shards, and the programs that run it."""

    def __init__(self, config: LlamaConfig, weights: Llama, layout: Layout, runtime: Runtime, dtype: torch.dtype) -> None:
        self.config, self.weights, self.layout, self.runtime, self.dtype = config, weights, layout, runtime, dtype
        self._steps: dict[Sampling, object] = {}

    @classmethod
    def load(cls, checkpoint: Checkpoint, layout: Layout, runtime: Runtime, dtype: torch.dtype = torch.float32) -> Model:
        """The shards that this rank's specs need, and no more."""
        config = config_of(checkpoint)
        types = weight_types(config, layout, runtime.mesh)
        shards = load(checkpoint, types, runtime.mesh, runtime.coordinate, dtype, runtime.device)
        return cls(config, fill(llama_of(config), "", lambda path: shards.pop(path[1:])), layout, runtime, dtype)

    def pack(self) -> Model:
        """The same model with its weights in the form that runs fastest. Each plain weight is let go as soon as it is packed."""
        step, weights = self._step(Sampling()), self.weights
        leaves = dict(leaf_values(weights, "w"))
        self.weights = weights = None
        self.weights = step.prepare("w", leaves, llama_of(self.config))
        return self

    def lower(self, sampling: Sampling = Sampling()) -> Program:
        """The program of one step."""
        function, static = self._function(sampling)
        return lower(function, self.layout, None, llama_of(self.config), mesh=self.runtime.mesh, **static)

    def _function(self, sampling: Sampling) -> tuple:
        if sampling.temperature == 0:
            return next_token, {"config": self.config}
        return next_sample, {"config": self.config, "sampling": sampling}

    def _step(self, sampling: Sampling) -> object:
        if sampling not in self._steps:
            function, static = self._function(sampling)
            self._steps[sampling] = compile(function, self.layout, runtime=self.runtime, sizes=self.config.sizes, donate=("cache",), **static)
        return self._steps[sampling]

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, eos_ids: Collection[int] = (), sampling: Sampling = Sampling(),
                 on_tokens: Callable[[list[int | None]], None] = lambda new: None) -> Generated:
        """Continue every prompt by up to `max_new_tokens`. `on_tokens` gets each step's new token per row, None where a row is done."""
        check_prompts(prompts, max_new_tokens, self.config)
        rows, mesh, here = len(prompts), self.runtime.mesh, self.runtime.coordinate
        longest = max(map(len, prompts))
        step = self._step(sampling)
        step.sizes.update(B=rows, S=longest + max_new_tokens)
        program = step.lower(None, llama_of(self.config))
        kinds = arg_types(program, "cache")
        cache = step.prepare("cache", init(Cache, {**self.config.sizes, **step.sizes}, kinds, mesh=mesh, coordinate=here, dtype=self.dtype,
                                           path="cache", device=self.runtime.device))
        types = dict(program.args)

        def local(name: str, values: object) -> torch.Tensor:
            return shard_of(torch.tensor(values, device=self.runtime.device), types[name], mesh, here)
        ids = local("ids", [[*p, *[0] * (longest - len(p))] for p in prompts])
        start, last = [0] * rows, [len(p) - 1 for p in prompts]
        tokens = [list(p) for p in prompts]
        live = [True] * rows
        made, began = 0, time.perf_counter()
        with torch.inference_mode():
            for _ in range(max_new_tokens):
                chosen, cache = step(ids, self.weights, cache, local("start", start), local("last", last))
                new = chosen.tolist()
                for row in range(rows):
                    if live[row]:
                        tokens[row].append(new[row])
                        made += 1
                on_tokens([new[row] if live[row] else None for row in range(rows)])
                live = [ok and token not in eos_ids for ok, token in zip(live, new)]
                if not any(live):
                    break
                start, last = [s + n + 1 for s, n in zip(start, last)], [0] * rows
                ids = local("ids", [[n] for n in new])
        return Generated(tokens, made, time.perf_counter() - began)


def check_prompts(prompts: Sequence[Sequence[int]], max_new_tokens: int, config: LlamaConfig) -> None:
    """SpecError for prompts that cannot be continued."""
    if not prompts or any(not p for p in prompts):
        raise SpecError("the prompt is empty; give it at least one token")
    if max_new_tokens < 1:
        raise SpecError(f"max_new_tokens is {max_new_tokens}; ask for at least 1")
    for token in (t for p in prompts for t in p):
        if not 0 <= token < config.vocab_size:
            raise SpecError(f"token {token} of a prompt is none of the model's, which are 0 to {config.vocab_size - 1}; its tokenizer is another's")
    longest = max(map(len, prompts))
    if longest + max_new_tokens > config.max_context:
        raise SpecError(f"the prompt has {longest} tokens and {max_new_tokens} are to follow; the model's context is {config.max_context}")


def llama_of(config: LlamaConfig) -> Llama:
    """The Llama pytree of `config`: without a head where it is tied."""
    full = fill(Llama, "", lambda path: path)
    return Llama(embed=full.embed, layers=full.layers, norm=full.norm, head=None if config.tied else full.head)


def weight_types(config: LlamaConfig, layout: Layout, mesh: Mesh) -> dict[str, object]:
    """path -> type of every weight at rest."""
    kinds = struct(llama_of(config)).map(lambda spec: layout.on(mesh).complete_alone(spec).resolve(mesh))
    return {path[1:]: kind for path, kind in kinds.leaves("")}
