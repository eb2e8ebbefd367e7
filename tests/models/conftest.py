"""A tiny Llama with random weights, and the files that others would write of it."""
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from einops import rearrange
from gguf import GGMLQuantizationType
from transformers import LlamaConfig, LlamaForCausalLM

GGUF_NAMES = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
              "lm_head.weight": "output.weight", "input_layernorm": "attn_norm",
              "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
              "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
              "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
              "model.layers.": "blk."}


@pytest.fixture(scope="session")
def tiny_llama() -> LlamaForCausalLM:
    """3 kv heads, 2 queries for each: uneven on 2 and on 4 ranks. Rows are whole blocks of 32."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=70, hidden_size=96, intermediate_size=160, num_hidden_layers=3,
                    num_attention_heads=6, num_key_value_heads=3, head_dim=16, max_position_embeddings=64))


@pytest.fixture(scope="session")
def tiny_folder(tiny_llama: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Hugging Face folder of `tiny_llama`, in one file."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_llama.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_gguf(tiny_llama: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_llama` as llama.cpp's convert_hf_to_gguf.py would write it, in fp32."""
    return write_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf", tiny_llama, GGMLQuantizationType.F32)


@pytest.fixture(scope="session")
def tiny_quantised(tiny_llama: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with its matrices in blocks of 8-bit integers."""
    return write_gguf(tmp_path_factory.mktemp("tiny") / "tiny.Q8_0.gguf", tiny_llama,
                      GGMLQuantizationType.Q8_0)


def write_gguf(path: Path, model: LlamaForCausalLM, kind: GGMLQuantizationType) -> Path:
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    for name, weight in model.state_dict().items():
        data = weight.float().numpy()
        for heads, ours in ((config.num_attention_heads, "q_proj"), (config.num_key_value_heads, "k_proj")):
            if ours in name:
                data = permuted(data, heads)
        for theirs, short in GGUF_NAMES.items():
            name = name.replace(theirs, short)
        if data.ndim == 1:
            writer.add_tensor(name, data)
        else:
            writer.add_tensor(name, gguf.quants.quantize(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def permuted(data: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head with its halves interleaved, as GGUF keeps what turns by pairs."""
    return rearrange(data, "(heads two half) ... -> (heads half two) ...", heads=heads, two=2)
