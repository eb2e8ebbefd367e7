"""Each field of each config: one that is another is refused, or makes another model, or changes nothing here.

What nobody reads stands in no list below: how a model is trained, begun or sampled from.
"""
from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import transformers
from gallery_models import MODELS, SMALL

from shardlib.models import families, gallery
from shardlib.models.files.checkpoint import Checkpoint, CheckpointError

TWELVE = {**SMALL, "hidden_size": 12}
CONFIGS = {
    **{name: lambda make=make: make().config for name, make in MODELS.items()},
    "llama": lambda: transformers.LlamaConfig(**TWELVE),
    "mixtral": lambda: transformers.MixtralConfig(**TWELVE, num_local_experts=5, num_experts_per_tok=2)}
REFUSED_AND_READ = {
    "gpt2": (
        "activation_function n_embd n_head n_inner quantization_config scale_attn_by_inverse_layer_idx "
        "scale_attn_weights",
        "layer_norm_epsilon n_layer n_positions tie_word_embeddings vocab_size"),
    "bert": (
        "hidden_act hidden_size num_attention_heads quantization_config tie_word_embeddings",
        "intermediate_size layer_norm_eps max_position_embeddings num_hidden_layers type_vocab_size "
        "vocab_size"),
    "mistral": (
        "hidden_act num_attention_heads num_key_value_heads quantization_config",
        "head_dim hidden_size intermediate_size max_position_embeddings num_hidden_layers rms_norm_eps "
        "sliding_window tie_word_embeddings vocab_size"),
    "qwen2": (
        "hidden_act num_attention_heads num_key_value_heads quantization_config use_sliding_window",
        "head_dim hidden_size intermediate_size max_position_embeddings num_hidden_layers rms_norm_eps "
        "tie_word_embeddings vocab_size"),
    "qwen3": (
        "attention_bias hidden_act num_attention_heads num_key_value_heads quantization_config "
        "use_sliding_window",
        "head_dim hidden_size intermediate_size max_position_embeddings num_hidden_layers rms_norm_eps "
        "tie_word_embeddings vocab_size"),
    "olmo2": (
        "attention_bias hidden_act num_attention_heads num_key_value_heads quantization_config",
        "head_dim hidden_size intermediate_size max_position_embeddings num_hidden_layers rms_norm_eps "
        "tie_word_embeddings vocab_size"),
    "phi3": (
        "hidden_act num_attention_heads num_key_value_heads quantization_config sliding_window",
        "head_dim hidden_size intermediate_size max_position_embeddings num_hidden_layers rms_norm_eps "
        "tie_word_embeddings vocab_size"),
    "gemma2": (
        "attention_bias hidden_activation num_attention_heads num_hidden_layers num_key_value_heads "
        "quantization_config tie_word_embeddings",
        "attn_logit_softcapping final_logit_softcapping head_dim hidden_size intermediate_size "
        "max_position_embeddings query_pre_attn_scalar rms_norm_eps sliding_window vocab_size"),
    "t5": (
        "feed_forward_proj num_decoder_layers num_layers quantization_config tie_word_embeddings",
        "d_ff d_kv d_model layer_norm_epsilon num_heads relative_attention_max_distance "
        "relative_attention_num_buckets vocab_size"),
    "vit": (
        "hidden_act hidden_size num_attention_heads qkv_bias quantization_config",
        "image_size intermediate_size layer_norm_eps num_channels num_hidden_layers patch_size"),
    "mamba2": (
        "expand head_dim hidden_act hidden_size n_groups num_heads quantization_config use_bias "
        "use_conv_bias",
        "conv_kernel layer_norm_epsilon num_hidden_layers state_size tie_word_embeddings vocab_size"),
    "qwen3_moe": (
        "attention_bias decoder_sparse_step hidden_act num_attention_heads num_experts_per_tok "
        "num_key_value_heads quantization_config use_sliding_window",
        "head_dim hidden_size max_position_embeddings moe_intermediate_size norm_topk_prob "
        "num_hidden_layers num_local_experts rms_norm_eps tie_word_embeddings vocab_size"),
    "olmoe": (
        "attention_bias clip_qkv hidden_act num_attention_heads num_experts_per_tok num_key_value_heads "
        "quantization_config",
        "head_dim hidden_size intermediate_size max_position_embeddings norm_topk_prob num_experts "
        "num_hidden_layers rms_norm_eps tie_word_embeddings vocab_size"),
    "deepseek_v3": (
        "attention_bias first_k_dense_replace hidden_act num_attention_heads num_experts_per_tok "
        "num_key_value_heads quantization_config",
        "hidden_size intermediate_size kv_lora_rank max_position_embeddings moe_intermediate_size n_group "
        "n_routed_experts n_shared_experts norm_topk_prob num_hidden_layers q_lora_rank qk_nope_head_dim "
        "qk_rope_head_dim rms_norm_eps rope_interleave routed_scaling_factor tie_word_embeddings "
        "topk_group v_head_dim vocab_size"),
    "llama": (
        "attention_bias hidden_act mlp_bias num_attention_heads num_key_value_heads quantization_config",
        "head_dim hidden_size intermediate_size max_position_embeddings num_hidden_layers rms_norm_eps "
        "tie_word_embeddings vocab_size"),
    "mixtral": (
        "hidden_act num_attention_heads num_experts_per_tok num_key_value_heads quantization_config "
        "sliding_window",
        "head_dim hidden_size intermediate_size max_position_embeddings num_hidden_layers "
        "num_local_experts output_router_logits rms_norm_eps tie_word_embeddings vocab_size"),
}
"""Of each model the fields of which another value is refused, and those of which one makes another model."""
NEEDED = {
    "gpt2": (
        "n_embd n_head n_layer n_positions vocab_size"),
    "bert": (
        "hidden_size intermediate_size max_position_embeddings num_attention_heads num_hidden_layers "
        "vocab_size"),
    "mistral": (
        "head_dim hidden_size intermediate_size max_position_embeddings num_attention_heads "
        "num_hidden_layers num_key_value_heads vocab_size"),
    "qwen2": (
        "hidden_size intermediate_size max_position_embeddings num_attention_heads num_hidden_layers "
        "num_key_value_heads vocab_size"),
    "qwen3": (
        "head_dim hidden_size intermediate_size max_position_embeddings num_attention_heads "
        "num_hidden_layers num_key_value_heads vocab_size"),
    "olmo2": (
        "hidden_size intermediate_size max_position_embeddings num_attention_heads num_hidden_layers "
        "vocab_size"),
    "phi3": (
        "hidden_size intermediate_size max_position_embeddings num_attention_heads num_hidden_layers "
        "vocab_size"),
    "gemma2": (
        "hidden_activation hidden_size intermediate_size max_position_embeddings num_attention_heads "
        "num_hidden_layers num_key_value_heads query_pre_attn_scalar sliding_window vocab_size"),
    "t5": (
        "d_ff d_kv d_model num_heads num_layers vocab_size"),
    "vit": (
        "hidden_size image_size intermediate_size num_attention_heads num_channels num_hidden_layers "
        "patch_size"),
    "mamba2": (
        "conv_kernel expand head_dim hidden_size layer_norm_epsilon n_groups num_heads num_hidden_layers "
        "state_size vocab_size"),
    "qwen3_moe": (
        "head_dim hidden_size intermediate_size max_position_embeddings moe_intermediate_size "
        "num_attention_heads num_experts_per_tok num_hidden_layers num_key_value_heads num_local_experts "
        "vocab_size"),
    "olmoe": (
        "hidden_size intermediate_size max_position_embeddings num_attention_heads num_experts "
        "num_experts_per_tok num_hidden_layers vocab_size"),
    "deepseek_v3": (
        "first_k_dense_replace hidden_size intermediate_size kv_lora_rank max_position_embeddings "
        "moe_intermediate_size n_group n_routed_experts n_shared_experts num_attention_heads "
        "num_experts_per_tok num_hidden_layers num_key_value_heads q_lora_rank qk_nope_head_dim "
        "qk_rope_head_dim topk_group v_head_dim vocab_size"),
    "llama": (
        "hidden_size intermediate_size max_position_embeddings num_attention_heads num_hidden_layers "
        "vocab_size"),
    "mixtral": (
        "hidden_size intermediate_size max_position_embeddings num_attention_heads num_hidden_layers "
        "num_key_value_heads vocab_size"),
}
"""Of each model the fields that may not be left out."""


def config_of(fields: dict[str, Any]) -> Any:
    checkpoint = Checkpoint("huggingface", {}, {}, fields)
    page = gallery.PAGES.get(fields["model_type"])
    return families.config_of(checkpoint) if page is None else gallery.config_of(page, checkpoint)


def another(value: Any) -> Any:
    """None of lists and dicts."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return 2 * value + 2
    return "other" if value is None or isinstance(value, str) else None


@pytest.mark.parametrize("name", CONFIGS)
def test_what_becomes_of_another_value(name: str) -> None:
    fields = {"quantization_config": None, **CONFIGS[name]().to_dict()}
    whole, refused, read = config_of(fields), [], []
    for key in sorted(fields.keys() - {"model_type"}):
        if (value := another(fields[key])) is None:
            continue
        try:
            if config_of({**fields, key: value}) != whole:
                read.append(key)
        except CheckpointError as error:
            assert str(error).startswith("config.json: ")
            refused.append(key)
    assert (" ".join(refused), " ".join(read)) == REFUSED_AND_READ[name]
    assert config_of({key: value for key, value in fields.items() if value is not None}) == whole


@pytest.mark.parametrize("name", CONFIGS)
def test_a_field_that_is_left_out_is_what_transformers_takes_then(name: str) -> None:
    """Or is asked for."""
    config, needed = CONFIGS[name](), []
    fields = {"quantization_config": None, **config.to_dict()}
    for key in sorted(fields.keys() - {"model_type"}):
        less = {k: value for k, value in fields.items() if k != key}
        try:
            ours = config_of(less)
        except CheckpointError:
            needed.append(key)
            continue
        with warnings.catch_warnings(action="ignore"):
            theirs = {"quantization_config": None, **type(config).from_dict(less).to_dict()}
        assert ours == config_of(theirs), key
    assert " ".join(needed) == NEEDED[name]


@pytest.mark.parametrize("name", ["qwen3_moe", "olmoe"])
def test_experts_are_counted_by_either_name(name: str) -> None:
    fields = {key: value for key, value in CONFIGS[name]().to_dict().items() if not key.endswith("_experts")}
    for said, experts in (({"num_experts": 5}, 5), ({"num_local_experts": 7}, 7),
                          ({"num_experts": 5, "num_local_experts": 7}, 5),
                          ({"num_experts": None, "num_local_experts": 7}, 7)):
        assert config_of({**fields, **said}).sizes["E"] == experts
    size = "it must be an integer from 1 to 2147483648"
    for said, key in (({}, "no num_experts"), ({"num_local_experts": None}, "no num_experts"),
                      ({"num_local_experts": -1}, f"num_local_experts is -1; {size}")):
        with pytest.raises(CheckpointError) as caught:
            config_of({**fields, **said})
        assert str(caught.value) == f"config.json: {key}"


JUNK = (None, True, 0, -1, 1 << 40, 1 << 2000, 0.5, math.nan, math.inf, "", "x", [], [1], [[]], {}, {"a": {}},
        {"rope_type": []}, ["full_attention"])


@pytest.mark.parametrize("name", CONFIGS)
def test_values_of_any_kind(name: str) -> None:
    """They mean something, or there is an error of ours, in a line."""
    fields = {"quantization_config": None, **CONFIGS[name]().to_dict()}
    refused = 0
    for key in fields.keys() - {"model_type"}:
        for junk in JUNK:
            try:
                config_of({**fields, key: junk})
            except CheckpointError as error:
                assert str(error).startswith("config.json: ") and len(str(error)) < 300
                refused += 1
    assert refused > 60
