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
from shardlib.mesh import Mesh
from shardlib.models import (
    gallery,
    llama,
    llama_config,
    llama_weights,
    mixtral,
    mixtral_config,
    mixtral_weights,
)
from shardlib.models.causal import CausalLM
from shardlib.models.files.checkpoint import Checkpoint, CheckpointError
from shardlib.models.files.weights import Weight, load_weights
from shardlib.models.gallery.page import Config, Page
from shardlib.models.llama import LlamaConfig
from shardlib.params import fill
from shardlib.spec import Spec


@dataclass(frozen=True)
class Family:
    """One model. config_of, table: from a checkpoint.  tree: of a config, the paths of its weights."""
    name: str
    lm: CausalLM
    config_of: Callable[[Checkpoint], Any]
    table: Callable[[Any, Checkpoint], tuple[Weight, ...]]
    tree: Callable[[Any], Any]


def _mixtral_config(checkpoint: Checkpoint) -> mixtral.MixtralConfig:
    llama_config.refuse_biases(checkpoint)
    return mixtral_config.config_from_hf(checkpoint.metadata)


def _untied(params: Callable[[Any], type[Params]]) -> Callable[[Any], Any]:
    """Without a head where it is tied."""
    def tree(config: LlamaConfig) -> Any:
        full: Any = fill(params(config), "", lambda path: path[1:])
        return type(full)(**{**vars(full), "head": None if config.tied else full.head})
    return tree


def _of_page(page: Page, lm: CausalLM) -> Family:
    return Family(page.name, lm, lambda checkpoint: gallery.config_of(page, checkpoint),
                  lambda config, checkpoint: page.table(config), page.tree)


LLAMA = Family("llama", llama.LM, llama_config.config_of,
               lambda config, checkpoint: llama_weights.weights_of(config, checkpoint.format),
               _untied(lambda config: llama.Llama))
MIXTRAL = Family("mixtral", mixtral.LM, _mixtral_config,
                 lambda config, checkpoint: mixtral_weights.weights_of(config, checkpoint.tensors),
                 _untied(lambda config: mixtral.Placed if config.num_slots else mixtral.Mixtral))
FAMILIES = {family.name: family for family in (
    LLAMA, MIXTRAL, *(_of_page(page, page.lm) for page in gallery.PAGES.values() if page.lm))}


def family_of(config: LlamaConfig | Config) -> Family:
    return FAMILIES[config.family]


def config_of(checkpoint: Checkpoint) -> Any:
    """What the headers of a checkpoint say of its model: a `LlamaConfig`, or a `Config` of the gallery."""
    said = checkpoint.metadata.get("model_type") if checkpoint.format == "huggingface" else LLAMA.name
    if said not in FAMILIES:
        raise CheckpointError(f"config.json: model_type is {said!r:.80}, which does not generate here; it is "
                              f"one of {', '.join(FAMILIES)}")
    return FAMILIES[said].config_of(checkpoint)


def weights_of(config: LlamaConfig | Config) -> Any:
    """The pytree of weights of `config`, its leaves paths."""
    return family_of(config).tree(config)


def load(checkpoint: Checkpoint, types: Mapping[str, Spec], mesh: Mesh, coordinate: Mapping[str, int],
         dtype: torch.dtype, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """What `coordinate` holds of each leaf of `types`."""
    config = config_of(checkpoint)
    table = family_of(config).table(config, checkpoint)
    return load_weights(checkpoint, table, config.sizes, types, mesh, coordinate, dtype, device)
