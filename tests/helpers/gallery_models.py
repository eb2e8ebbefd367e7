"""Small random models of transformers, one of each that the gallery has a page of."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers

# a padding token's row would have no gradient
ALONE = dict(bos_token_id=1, eos_token_id=2, pad_token_id=None)
SMALL = dict(vocab_size=13, hidden_size=8, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=3,
             head_dim=4, intermediate_size=10, max_position_embeddings=16, **ALONE)
SPARSE = dict(num_experts=5, num_experts_per_tok=2, experts_implementation="eager")
MODELS: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=13, n_embd=12, n_layer=2, n_head=3, n_positions=16, **ALONE)),
    "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(
        **{**SMALL, "hidden_size": 12, "num_attention_heads": 3})),
    "mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**SMALL, sliding_window=3)),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(
        **{**SMALL, "hidden_size": 12}, tie_word_embeddings=True)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SMALL)),
    "olmo2": lambda: transformers.Olmo2ForCausalLM(transformers.Olmo2Config(**{**SMALL, "hidden_size": 12})),
    "phi3": lambda: transformers.Phi3ForCausalLM(transformers.Phi3Config(
        **{**SMALL, "hidden_size": 12})),
    "gemma2": lambda: transformers.Gemma2ForCausalLM(transformers.Gemma2Config(
        **{**SMALL, "num_hidden_layers": 4, "hidden_size": 12}, sliding_window=2, query_pre_attn_scalar=3,
        attn_logit_softcapping=2.0, final_logit_softcapping=3.0)),
    "t5": lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(
        vocab_size=13, d_model=12, d_kv=4, d_ff=10, num_layers=2, num_heads=3, decoder_start_token_id=1,
        relative_attention_num_buckets=8, relative_attention_max_distance=7, dropout_rate=0.0,
        **{**ALONE, "pad_token_id": 0})),
    "vit": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(
        hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=10, image_size=6,
        patch_size=2, num_channels=3, num_labels=5)),
    "mamba2": lambda: transformers.Mamba2ForCausalLM(transformers.Mamba2Config(
        vocab_size=13, hidden_size=6, num_hidden_layers=2, num_heads=6, head_dim=2, n_groups=3, state_size=4,
        conv_kernel=3, chunk_size=8, residual_in_fp32=False, **ALONE)),
    "qwen3_moe": lambda: transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(
        **SMALL, **SPARSE, moe_intermediate_size=6, norm_topk_prob=True)),
    "olmoe": lambda: transformers.OlmoeForCausalLM(transformers.OlmoeConfig(
        **{**SMALL, "hidden_size": 24}, **SPARSE)),
    "deepseek_v3": lambda: transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(
        **{**SMALL, "hidden_size": 12, "num_hidden_layers": 3, "num_attention_heads": 3}, n_routed_experts=6,
        num_experts_per_tok=3, n_group=3, topk_group=2, n_shared_experts=2, moe_intermediate_size=6,
        first_k_dense_replace=1, q_lora_rank=6, kv_lora_rank=5, qk_nope_head_dim=3, qk_rope_head_dim=4,
        v_head_dim=5, experts_implementation="eager")),
}


def constants(model: Any) -> list[torch.Tensor]:
    """What a checkpoint holds that no gradient reaches: biases of DeepSeek's routers."""
    return [x for name, x in model.named_buffers() if name.endswith("e_score_correction_bias")]
