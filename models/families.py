"""The models that are implemented: of each, what a checkpoint says, its weights, and its programs.

>>> from shardlib.models.files.model_files import open_checkpoint
>>> family_of(config_of(open_checkpoint("smollm2"))).name
'llama'
"""
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shardlib import Params
from shardlib.language.trace import Function
from shardlib.mesh import Mesh
from shardlib.models import llama, llama_config, llama_weights, mixtral, mixtral_config, mixtral_weights
from shardlib.models.files.checkpoint import Checkpoint, CheckpointError
from shardlib.models.files.weights import Weight, load_weights
from shardlib.models.llama import LlamaConfig
from shardlib.params import fill
from shardlib.spec import Spec


@dataclass(frozen=True)
class Family:
    """One model. config: its class.  weights: its pytree.  config_of, table: from a checkpoint.

    next_logits, prompt_logits, next_token, prompt_token: its programs; prompts are at their beginning.
    """
    name: str
    config: type[LlamaConfig]
    weights: type[Params]
    config_of: Callable[[Checkpoint], Any]
    table: Callable[[Any, Checkpoint], tuple[Weight, ...]]
    next_logits: Function
    prompt_logits: Function
    next_token: Function
    prompt_token: Function


def _family(name: str, module: Any, config: type[LlamaConfig], weights: type[Params],
            config_of: Callable[[Checkpoint], Any],
            table: Callable[[Any, Checkpoint], tuple[Weight, ...]]) -> Family:
    return Family(name, config, weights, config_of, table, module.next_logits, module.prompt_logits,
                  module.next_token, module.prompt_token)


def _mixtral_config(checkpoint: Checkpoint) -> mixtral.MixtralConfig:
    llama_config.refuse_biases(checkpoint)
    return mixtral_config.config_from_hf(checkpoint.metadata)


FAMILIES = (
    _family("llama", llama, LlamaConfig, llama.Llama, llama_config.config_of,
            lambda config, checkpoint: llama_weights.weights_of(config, checkpoint.format)),
    _family("mixtral", mixtral, mixtral.MixtralConfig, mixtral.Mixtral, _mixtral_config,
            lambda config, checkpoint: mixtral_weights.weights_of(config, checkpoint.tensors)),
)
LLAMA = FAMILIES[0]


def family_of(config: LlamaConfig) -> Family:
    return next(family for family in FAMILIES if family.config is type(config))


def config_of(checkpoint: Checkpoint) -> LlamaConfig:
    """What the headers of a checkpoint say of its model."""
    said = checkpoint.metadata.get("model_type") if checkpoint.format == "huggingface" else LLAMA.name
    family = next((family for family in FAMILIES if family.name == said), None)
    if family is None:
        raise CheckpointError(f"config.json: model_type is {said!r:.80}, which is not implemented; it may be "
                              f"{' or '.join(repr(family.name) for family in FAMILIES)}")
    return family.config_of(checkpoint)


def weights_of(config: LlamaConfig) -> Params:
    """The pytree of weights of `config`, its leaves paths: without a head where it is tied."""
    kind = mixtral.Placed if getattr(config, "num_slots", 0) else family_of(config).weights
    full: Any = fill(kind, "", lambda path: path)
    return type(full)(**{**full.__dict__, "head": None if config.tied else full.head})


def load(checkpoint: Checkpoint, types: Mapping[str, Spec], mesh: Mesh, coordinate: Mapping[str, int],
         dtype: torch.dtype, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """What `coordinate` holds of each leaf of `types`."""
    config = config_of(checkpoint)
    table = family_of(config).table(config, checkpoint)
    return load_weights(checkpoint, table, config.sizes, types, mesh, coordinate, dtype, device)

