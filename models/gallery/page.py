"""A page of the gallery: a model, what its config says, and a row for each of its weights.

    checkpoint = open_checkpoint("/models/Qwen3-8B")
    page = PAGES[checkpoint.metadata["model_type"]]
    config, layout = config_of(page, checkpoint), Layout(K="tp", F="tp", V="tp")
    w = load(page, checkpoint, layout, runtime.mesh, runtime.coordinate)
    logits = compile(page.logits, layout, config=config, sizes=config.sizes)(ids, w)

Each rank reads its own shards from a Hugging Face folder, as `shardlib.models.files` does it for all models.
"""
from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self, TypeVar

import torch

from shardlib.api import Sharded
from shardlib.layout import Layout
from shardlib.mesh import Mesh
from shardlib.models.causal import CausalLM
from shardlib.models.files.checkpoint import Checkpoint
from shardlib.models.files.rope_said import rope_of, turned
from shardlib.models.files.said import Said
from shardlib.models.files.weights import Weight, load_weights
from shardlib.params import Params, fill, struct


@dataclass(frozen=True)
class Config:
    """The sizes of a model's dims, by letter, and the few numbers that its page asks for."""
    letters: tuple[tuple[str, int], ...]
    eps: float
    theta: float = 10_000.0
    window: int | None = None
    scale: float | None = None
    softcap: float | None = None
    final_softcap: float | None = None
    buckets: tuple[int, int] | None = None
    tied: bool = False
    scaling: tuple[Any, ...] | None = None
    max_context: int = 0
    family: str = ""

    @property
    def sizes(self) -> dict[str, int]:
        return dict(self.letters)

    @property
    def vocab_size(self) -> int:
        return self.sizes["V"]

    def with_sizes(self, **sizes: int) -> Self:
        """The same with other sizes, or more."""
        return replace(self, letters=tuple({**self.sizes, **sizes}.items()))


C = TypeVar("C", bound=Config)


@dataclass(frozen=True)
class Page:
    """One model. name: its model_type.  params: the class of its weights; those without a row are absent.

    logits: the function of (ids, weights), whose dims `takes` and `gives` say.  config: what it makes of a
    config.json.  table: its rows.  lm: where it is a decoder, the programs that `generate` runs.
    """
    name: str
    params: type[Params]
    logits: Sharded
    config: Callable[[Said], Config]
    table: Callable[[Config], tuple[Weight, ...]]
    takes: str = "B T/1"
    gives: str = "B T V"
    lm: CausalLM | None = None

    @classmethod
    def of(cls, name: str, lm: CausalLM, config: Callable[[Said], Config],
           table: Callable[[Any], tuple[Weight, ...]]) -> Page:
        """Of a model that `generate` continues prompts with."""
        return cls(name, lm.params, lm.logits, config, table, lm=lm)

    def tree(self, config: Config) -> Any:
        """Its weights as a pytree of paths, None where there is no row."""
        return _those(fill(self.params, "", lambda path: path[1:]), {w.path for w in self.table(config)})


def config_of(page: Page, checkpoint: Checkpoint) -> Config:
    """What a Hugging Face folder says of its model. CheckpointError for what the page does not have."""
    said = Said(checkpoint.metadata, "config.json")
    said.only("model_type", page.name)
    said.only("quantization_config", None)
    return replace(page.config(said), family=page.name)


def load(page: Page, checkpoint: Checkpoint, layout: Layout, mesh: Mesh, coordinate: Mapping[str, int],
         dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Any:
    """The weights that `coordinate` holds under a layout: an instance of the page's Params."""
    config = config_of(page, checkpoint)
    tree = page.tree(config)
    kinds = struct(tree).map(lambda spec: layout.on(mesh).complete_alone(spec).resolve(mesh))
    types = {path[1:]: kind for path, kind in kinds.leaves("")}
    table = page.table(config)
    shards = load_weights(checkpoint, table, config.sizes, types, mesh, coordinate, dtype, device)
    return fill(tree, "", lambda path: shards.pop(path[1:]))


def _those(tree: Any, rows: Collection[str]) -> Any:
    return type(tree)(**{name: _those(value, rows) if isinstance(value, Params)
                         else value if value in rows else None for name, value in vars(tree).items()})


def decoder_config(said: Said, kind: type[C] = Config, eps: float = 1e-6, partial: bool = False,
                   **more: Any) -> C:
    """The config of a decoder with grouped queries, as most have it. eps: where it says none.  partial: for
    one that turns R of a head's H elements, where these are not all."""
    d_model, heads = said.size("hidden_size"), said.size("num_attention_heads")
    kv_heads = said.size("num_key_value_heads", default=heads)
    head_dim = said.size("head_dim", default=None) or said.whole(d_model, heads, "elements a head")
    said.only("hidden_act", "silu", default="silu")
    theta, scaling = rope_of(said, partial)
    turns = turned(said, head_dim) if partial else head_dim
    return kind(
        (("V", said.size("vocab_size")), ("D", d_model), ("L", said.size("num_hidden_layers")),
         ("K", kv_heads), ("G", said.whole(heads, kv_heads, "query heads for each kv head")),
         ("H", said.even(head_dim)), ("F", said.size("intermediate_size")),
         *((("R", turns),) if turns < head_dim else ())),
        eps=said.number("rms_norm_eps", default=eps), theta=theta, scaling=scaling,
        tied=said.flag("tie_word_embeddings", default=False),
        max_context=said.size("max_position_embeddings"), **more)


def decoder_rows(config: Config, *more: Weight, without: tuple[str, ...] = ()) -> tuple[Weight, ...]:
    """The rows of such a decoder; `more` come in place of those of the same path."""
    rows = {row.path: row for row in (*_DECODER, *more)}
    return tuple(row for path, row in rows.items()
                 if path not in without and not (config.tied and path == "head"))


def ends(config: Config) -> tuple[Weight, ...]:
    """The rows of what is no layer."""
    return tuple(row for row in decoder_rows(config) if not row.path.startswith("layers."))


LAYER = "model.layers.{L}."
_DECODER = (
    Weight("embed",        "V D",       "model.embed_tokens.weight",               "V D"),
    Weight("layers.norm1", "L D",       LAYER + "input_layernorm.weight",          "D"),
    Weight("layers.wq",    "L D K G H", LAYER + "self_attn.q_proj.weight",         "(K G H) D"),
    Weight("layers.wk",    "L D K H",   LAYER + "self_attn.k_proj.weight",         "(K H) D"),
    Weight("layers.wv",    "L D K H",   LAYER + "self_attn.v_proj.weight",         "(K H) D"),
    Weight("layers.wo",    "L K G H D", LAYER + "self_attn.o_proj.weight",         "D (K G H)"),
    Weight("layers.norm2", "L D",       LAYER + "post_attention_layernorm.weight", "D"),
    Weight("layers.gate",  "L D F",     LAYER + "mlp.gate_proj.weight",            "F D"),
    Weight("layers.up",    "L D F",     LAYER + "mlp.up_proj.weight",              "F D"),
    Weight("layers.down",  "L F D",     LAYER + "mlp.down_proj.weight",            "D F"),
    Weight("norm",         "D",         "model.norm.weight",                       "D"),
    Weight("head",         "V D",       "lm_head.weight",                          "V D"),
)
