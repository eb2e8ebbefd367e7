"""Batch generation: prefill once, then one token at a time for every unfinished prompt.

Prompts of unequal length are padded on the right. Each row has its own position: what padding wrote into the
cache is overwritten before any query may see it. What is on the device is the `Decoder`'s; what is decided,
by tokens alone, is decided here.
"""
from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch

from shardlib import Layout, Mesh, Params, SpecError, compile, lower
from shardlib.api import Compiled
from shardlib.compiler.passes import DEFAULT
from shardlib.compiler.passes.fuse import fuse
from shardlib.compiler.stages import needed
from shardlib.distributed.runtime import Runtime
from shardlib.language.held import stage_axis
from shardlib.language.trace import Function
from shardlib.models.cache_buffer import CacheBuffer
from shardlib.models.causal import Sampling
from shardlib.models.decoder import Decoder, answered
from shardlib.models.expert_placement import Placement
from shardlib.models.families import config_of, family_of, load, weights_of
from shardlib.models.files.checkpoint import Checkpoint
from shardlib.models.gallery import Config
from shardlib.models.llama import LlamaConfig
from shardlib.models.mixtral import MixtralConfig
from shardlib.models.placing import check, place_anew, placed
from shardlib.models.random_weights import random_weights, shape_of
from shardlib.models.row_groups import Told, continued, split_rows
from shardlib.models.ways import Ways
from shardlib.ops.fusions import FUSIONS, by_few_rows
from shardlib.params import fill, leaf_values, struct
from shardlib.program import Program
from shardlib.run.beside import axes_of_sums
from shardlib.run.turns import Pipeline, Requests

PASSES = (*DEFAULT, "rotate_scan", *fuse(FUSIONS, by_few_rows))


@dataclass(frozen=True)
class Generated:
    """Prompt and answer ids of every row, the end token included where it was met;
    seconds from prefill to the last token."""
    tokens: list[list[int]]
    new_tokens: int
    seconds: float


class Model:
    """A model on this rank: its shards, and the programs that run it."""

    def __init__(self, config: LlamaConfig | Config, weights: Params, layout: Layout, runtime: Runtime,
                 dtype: torch.dtype) -> None:
        self.config, self.weights, self.layout, self.runtime, self.dtype = (
            config, weights, layout, runtime, dtype)
        self._steps: dict[tuple[Sampling, int | None, str], Compiled] = {}
        self._decoders: dict[tuple[Sampling, bool, int], Decoder] = {}
        self._caches: dict[int, CacheBuffer] = {}               # by group of rows
        self.placements: list[Placement] = []                   # of its experts' slots, by layer

    @classmethod
    def load(cls, checkpoint: Checkpoint, layout: Layout, runtime: Runtime,
             dtype: torch.dtype = torch.float32) -> Model:
        """The shards that this rank's specs need, and no more."""
        config = config_of(checkpoint)
        types = used_weights(config, layout, runtime)
        shards = load(checkpoint, types, runtime.mesh, runtime.coordinate, dtype, runtime.device)
        return cls(config, _filled(config, shards, layout, runtime.mesh, dtype), layout, runtime, dtype)

    @classmethod
    def random(cls, name: str, layout: Layout, runtime: Runtime, dtype: torch.dtype = torch.bfloat16,
               seed: int = 0) -> Model:
        """A model of the published shape `name`, its weights drawn on this rank's device:
        to measure without a download."""
        config = shape_of(name)
        types = used_weights(config, layout, runtime)
        drawn = random_weights(config, types, runtime.mesh, runtime.coordinate, dtype, runtime.device, seed)
        return cls(config, _filled(config, drawn, layout, runtime.mesh, dtype), layout, runtime, dtype)

    def pack(self) -> Model:
        """The same model with its weights in the form that runs fastest.

        Each plain weight is let go as soon as it is packed.
        """
        step, weights = self._step(Sampling()), self.weights
        leaves = dict(leaf_values(weights, "w"))
        self.weights = weights = None
        self.weights = step.prepare("w", leaves, weights_of(self.config))
        self._decoders.clear()
        return self

    def place(self, placements: Sequence[Placement]) -> Model:
        """The same model with its experts in the slots of a placement for each layer.

        Where they are in slots already, and these are as many, they change places in their buffers: also
        between two steps of `generate` (in `on_tokens`, on all ranks), which goes on with the same tokens.
        """
        if not isinstance(self.config, MixtralConfig):
            raise SpecError("place: the model has no experts")
        if not self.placements:
            config, weights = placed(self.config, self.weights, placements, self.layout, self.runtime)
            model = Model(config, weights, self.layout, self.runtime, self.dtype)
        else:
            check(placements, self.config, self.layout, self.runtime.mesh)
            place_anew(self.weights, self.placements, placements, self.layout, self.runtime)
            model = self
        model.placements = [*placements]
        return model

    def lower(self, sampling: Sampling = Sampling()) -> Program:
        """The program of one step."""
        function, static = self._function(sampling)
        return lower(function, self.layout, None, weights_of(self.config), mesh=self.runtime.mesh,
                     passes=PASSES, **static)

    def _function(self, sampling: Sampling, ahead: int | None = None) -> tuple[Function, dict[str, object]]:
        """The program of a step, or of prompts behind `ahead` tokens, and what it is made with."""
        lm, static = family_of(self.config).lm, {} if ahead is None else {"ahead": ahead}
        if sampling.temperature:
            static["sampling"] = sampling
        step, prompt = ((lm.next_sample, lm.prompt_sample) if sampling.temperature
                        else (lm.next_token, lm.prompt_token))
        return step if ahead is None else prompt, {"config": self.config, **static}

    def _step(self, sampling: Sampling, ahead: int | None = None, over: str = "") -> Compiled:
        """over: see `Ways`."""
        key = sampling, ahead, over
        if key not in self._steps:
            function, static = self._function(sampling, ahead)
            layout = self.layout
            if over:
                axes = axes_of_sums(self._step(sampling, ahead).program, self.runtime.mesh)
                layout = Layout({**layout.entries, over: axes})
            made = compile(function, layout, runtime=self.runtime, sizes=self.config.sizes,
                           donate=("cache",), passes=PASSES, **static)
            made.lower(None, weights_of(self.config))
            self._steps[key] = made
        return self._steps[key]

    @cached_property
    def pipeline(self) -> Pipeline | None:
        """What lets the stages of a pipeline work at once; None where there is one."""
        axis = next((a for s in self._step(Sampling()).program.steps if (a := stage_axis(s))), None)
        return (Pipeline(self.runtime, axis) if axis is not None and self.runtime.mesh.axes[axis] > 1
                else None)

    def decoder(self, sampling: Sampling = Sampling(), graph: bool = True, group: int = 0) -> Decoder:
        """The device's side of `generate`, step by step: to measure. group: of rows, each with a cache."""
        if (sampling, graph, group) not in self._decoders:
            function, _ = self._function(sampling)

            def steps(ahead: int | None, over: str, rows: int, capacity: int) -> Compiled:
                return self._step(sampling, ahead, over).at(B=rows, S=capacity)
            whole = [dim for dim in ("B", "T") if dim not in self.layout.entries]
            ways = None if self.pipeline else Ways(steps, self.weights, self.config.sizes, self.dtype,
                                                   self.runtime, whole)
            cache = self._caches.setdefault(group, CacheBuffer(self.dtype, self.runtime.device))
            lm = family_of(self.config).lm
            self._decoders[sampling, graph, group] = Decoder(
                function.__name__, steps, sampling.temperature > 0, self.weights, lm.cache, self.config.sizes,
                self.config.max_context, self.runtime, cache, graph, ways, self.pipeline, lm.chunk)
        return self._decoders[sampling, graph, group]

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, eos_ids: Collection[int] = (),
                 sampling: Sampling = Sampling(),
                 on_tokens: Callable[[list[int | None]], None] = lambda new: None,
                 graph: bool | None = None, groups: int | None = None) -> Generated:
        """Continue every prompt by up to `max_new_tokens`.

        on_tokens: gets each step's new token per row, None where a row is done.
        groups: into how many the rows go, so that the stages of a pipeline are at different ones at once; by
        default as many as stages.
        graph: each step is the replay of a CUDA graph, of a bucket of rows and a capacity of the cache,
        rounded up; by default on GPUs, but not of a pipeline, whose graphs have not run there yet. The host
        then follows one step behind: all ranks decide what comes after step n + 1 by the tokens of step n.
        """
        check_prompts(prompts, max_new_tokens, self.config)
        graph = self.runtime.device.type == "cuda" and not self.pipeline if graph is None else graph
        began, calls = time.perf_counter(), self.calls(prompts, max_new_tokens, eos_ids, sampling, on_tokens,
                                                       graph, groups)
        with torch.inference_mode():
            found = self.pipeline.run(calls) if self.pipeline else [*map(answered, calls)]
        tokens = [row for group in found for row in group]
        made, seconds = sum(map(len, tokens)) - sum(map(len, prompts)), time.perf_counter() - began
        for step in [step for (of, *_), step in self._steps.items() if of == sampling]:
            step.check()  # replays note what they are asked for, and nobody has looked yet
        return Generated(tokens, made, seconds)

    def calls(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, eos_ids: Collection[int],
              sampling: Sampling, on_tokens: Callable[[list[int | None]], None], graph: bool,
              groups: int | None = None) -> list[Requests]:
        """What `generate` does, for each group of rows; each returns its rows."""
        parts = split_rows(len(prompts), groups, self.pipeline.line.stages if self.pipeline else 1)
        told = Told([len(part) for part in parts], on_tokens)
        return [continued(self.decoder(sampling, graph, i), prompts[part.start:part.stop], part.start,
                          max_new_tokens, eos_ids, partial(told.say, i)) for i, part in enumerate(parts)]


def check_prompts(prompts: Sequence[Sequence[int]], max_new_tokens: int,
                  config: LlamaConfig | Config) -> None:
    """SpecError for prompts that cannot be continued."""
    if not prompts or any(not p for p in prompts):
        raise SpecError("the prompt is empty; give it at least one token")
    if max_new_tokens < 1:
        raise SpecError(f"max_new_tokens is {max_new_tokens}; ask for at least 1")
    for token in (t for p in prompts for t in p):
        if not 0 <= token < config.vocab_size:
            raise SpecError(f"token {token} of a prompt is none of the model's, which are 0 to "
                            f"{config.vocab_size - 1}; its tokenizer is another's")
    longest = max(map(len, prompts))
    if longest + max_new_tokens > config.max_context:
        raise SpecError(f"the prompt has {longest} tokens and {max_new_tokens} are to follow; the model's "
                        f"context is {config.max_context}")


def weight_types(config: LlamaConfig | Config, layout: Layout, mesh: Mesh) -> dict[str, object]:
    """path -> type of every weight at rest."""
    kinds = struct(weights_of(config)).map(lambda spec: layout.on(mesh).complete_alone(spec).resolve(mesh))
    return {path[1:]: kind for path, kind in kinds.leaves("")}


def used_weights(config: LlamaConfig | Config, layout: Layout, runtime: Runtime) -> dict[str, object]:
    """path -> type of the weights that this rank uses: of a pipeline those of its stage."""
    types = weight_types(config, layout, runtime.mesh)
    if "L" not in layout.entries:
        return types
    step = lower(family_of(config).lm.next_token, layout, None, weights_of(config), mesh=runtime.mesh,
                 config=config)
    used = needed(step, runtime.coordinate)
    return {path: kind for path, kind in types.items() if f"w.{path}" in used}


def _filled(config: LlamaConfig | Config, shards: dict[str, torch.Tensor], layout: Layout, mesh: Mesh,
            dtype: torch.dtype) -> Params:
    """The weights, of which the rank has `shards`: what another stage has are shapes alone."""
    types = weight_types(config, layout, mesh)

    def leaf(path: str) -> torch.Tensor:
        if path[1:] in shards:
            return shards.pop(path[1:])
        shape = mesh.local_shape(types[path[1:]], config.sizes, dict.fromkeys(mesh.axes, 0))
        return torch.empty(shape, dtype=dtype, device="meta")
    return fill(weights_of(config), "", leaf)
