"""Rotary embeddings for longer contexts: logits of small random models are those of transformers, beyond the
context that they had, and as the config says it in either version of transformers; and of some elements of a
head alone."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from gallery_models import SMALL

from shardlib import Layout, Mesh, simulate
from shardlib.models import llama, llama_config
from shardlib.models.files.checkpoint import CheckpointError
from shardlib.models.files.model_files import open_checkpoint
from shardlib.models.files.rope_said import rope_of, turned
from shardlib.models.files.said import Said
from shardlib.models.gallery import PAGES, Page, config_of, load
from shardlib.models.gallery.page import decoder_config, decoder_rows

pytestmark = pytest.mark.usefixtures("one_thread")
LLAMA = Page.of("llama", llama.LM, decoder_config, decoder_rows)
LATENT = dict(num_attention_heads=3, n_routed_experts=6, num_experts_per_tok=3, n_group=3, topk_group=2,
              n_shared_experts=2, moe_intermediate_size=6, first_k_dense_replace=1, q_lora_rank=6,
              kv_lora_rank=5, qk_nope_head_dim=3, qk_rope_head_dim=8, v_head_dim=5,
              experts_implementation="eager")
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=8, beta_fast=2.0, beta_slow=0.25)
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], tuple | None]] = {
    "llama, linear": ("Llama", {}, dict(rope_type="linear", factor=3.0), ("linear", 3.0)),
    "llama, dynamic": ("Llama", {}, dict(rope_type="dynamic", factor=2.0), ("dynamic", 2.0, 8)),
    "llama, yarn": ("Llama", dict(max_position_embeddings=32), YARN,
                    ("yarn", 4.0, 8, 2.0, 0.25, pytest.approx(1.13862944))),
    "qwen3, yarn of a factor of its own": (
        "Qwen3", dict(max_position_embeddings=32), {**YARN, "attention_factor": 0.7},
        ("yarn", 4.0, 8, 2.0, 0.25, 0.7)),
    "mistral, yarn by the lengths": (
        "Mistral", dict(max_position_embeddings=24, sliding_window=5), {**YARN, "factor": None},
        ("yarn", 3.0, 8, 2.0, 0.25, pytest.approx(1.10986123))),
    "deepseek_v3, yarn": (
        "DeepseekV3", dict(**LATENT, max_position_embeddings=32),
        {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3},
        ("yarn", 4.0, 8, 2.0, 0.25, pytest.approx(1.09704061 / 1.18021827))),
    "phi3, of a half of each head": (
        "Phi3", dict(max_position_embeddings=24), dict(rope_type="default", partial_rotary_factor=0.5), None),
}


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    kind, sizes, rope, scaling = CASES[name]
    torch.manual_seed(0)
    said = {**SMALL, "hidden_size": 12, "head_dim": 8, "max_position_embeddings": 8, **sizes}
    config = getattr(transformers, f"{kind}Config")(**said, rope_parameters={"rope_theta": 100.0, **rope})
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    model.set_attn_implementation("eager")
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.4)
    ids = torch.randint(13, (2, 20))
    rounded = model(ids).logits.detach().double()
    model.save_pretrained(tmp_path)
    truth = model.double()(ids).logits.detach()
    page, checkpoint = PAGES.get(config.model_type, LLAMA), open_checkpoint(tmp_path)
    ours, w = config_of(page, checkpoint), load(page, checkpoint, Layout(), Mesh(), {}, torch.float64)
    assert (ours.theta, ours.scaling) == (100.0, scaling)
    if page is LLAMA:
        made = llama_config.config_of(checkpoint)
        assert (made.theta, made.scaling) == (100.0, scaling)
    for layout, mesh in ((Layout(), Mesh()), (Layout.parse("K=tp,T=cp,S=cp"), Mesh(tp=3, cp=2))):
        logits = simulate(page.logits, layout, ids, w, mesh=mesh, config=ours)
        assert (logits - truth).abs().max() <= 2 * (rounded - truth).abs().max()


@pytest.mark.parametrize("rope, says", (
    (dict(rope_type="longrope"), "rope_type is 'longrope', which is not implemented; it may be 'default' or "
     "'linear' or 'dynamic' or 'yarn' or 'llama3'"),
    (dict(rope_type="linear"), "no factor"),
    (dict(rope_type="dynamic", factor=0), "factor is 0; it must be a positive number"),
    (dict(rope_type="yarn", rope_theta=1.0, factor=2.0),
     "rope_theta is 1, of which yarn has no logarithm to divide by"),
    (dict(rope_type="yarn", factor=2.0, truncate=False),
     "truncate is False, which is not implemented; it may be True"),
    (dict(rope_type="yarn", factor=2.0, beta_fast=-1), "beta_fast is -1; it must be a positive number")))
def test_what_is_refused(rope: dict[str, Any], says: str) -> None:
    with pytest.raises(CheckpointError) as error:
        rope_of(Said(dict(max_position_embeddings=64, rope_parameters=rope), "config.json"))
    assert str(error.value) == f"config.json: {says}"


@pytest.mark.parametrize("factor, part", ((0.4, 3), (0.1, 0), (1.5, 12)))
def test_elements_of_a_head_that_are_no_pairs(factor: float, part: int) -> None:
    with pytest.raises(CheckpointError) as error:
        turned(Said(dict(partial_rotary_factor=factor), "config.json"), 8)
    assert str(error.value) == (f"config.json: partial_rotary_factor is {factor}, {part} of 8 elements of a "
                                "head; some are turned, in pairs, or all")


def test_a_part_is_said_beside_the_rotary_embedding_or_in_it() -> None:
    """Phi-4-mini's config has it beside; what is in it is what counts."""
    beside, within = dict(partial_rotary_factor=0.75), dict(rope_parameters=dict(partial_rotary_factor=0.25))
    found = [turned(Said(said, "config.json"), 16) for said in ({}, beside, within, {**beside, **within})]
    assert found == [16, 12, 4, 4]
    for said in (beside, within):
        with pytest.raises(CheckpointError, match="partial_rotary_factor is 0..5, which is not implemented"):
            rope_of(Said(said, "config.json"))


def test_as_transformers_4_has_said_it() -> None:
    """Of `dynamic` the length that counts is the one that the config names as the context."""
    said = dict(max_position_embeddings=64, rope_theta=5e5, original_max_position_embeddings=32,
                rope_scaling=dict(type="dynamic", factor=2))
    assert rope_of(Said(said, "config.json")) == (5e5, ("dynamic", 2.0, 64))


def test_one_of_two_weights_of_yarn_is_none() -> None:
    rope = dict(rope_type="yarn", factor=2.0, mscale=0.5)
    _, scaling = rope_of(Said(dict(max_position_embeddings=64, rope_parameters=rope), "config.json"))
    assert scaling == ("yarn", 2.0, 64, 32.0, 1.0, pytest.approx(1.06931472))


def test_what_yarn_is_where_a_config_leaves_it_out() -> None:
    """As transformers has it: 32 and 1 turns, and the context that the model has."""
    def read(**rope: Any) -> object:
        return rope_of(Said(dict(max_position_embeddings=64, rope_parameters=dict(
            rope_type="yarn", factor=4.0, **rope)), "config.json"))
    told = dict(beta_fast=32.0, beta_slow=1.0, original_max_position_embeddings=64)
    assert all(read(**{n: v for n, v in told.items() if n != left}) == read(**told) for left in told)
    assert read(**{**told, "beta_fast": 16.0}) != read(**told) != read(**{**told, "beta_slow": 2.0})
