"""Routing as Mixtral, Qwen3-MoE, OLMoE and DeepSeek-V3 have it, against the routers of transformers."""
from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV3Config, MixtralConfig, OlmoeConfig, Qwen3MoeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from shardlib import Layout, Mesh, SpecError, einsum, sharded, simulate, value_and_grad
from shardlib.functions import sum
from shardlib.ops import route

EXPERTS, WIDTH = 8, 6
DEEPSEEK = dict(score="sigmoid", scale=2.5, groups=4, top_groups=2)


@sharded("T D, E D, E -> T J, T J")
def routing(x, w, bias, *, biased, more):
    logits = einsum("T D, E/1 D -> T E/1", x, w)
    if biased:
        return route("T E, E -> T J, T J", logits, bias, **more)
    return route("T E -> T J, T J", logits, **more)


@pytest.mark.parametrize("router, config, more", (
    (MixtralTopKRouter, MixtralConfig(num_local_experts=EXPERTS, num_experts_per_tok=2), dict(top_k=2)),
    (OlmoeTopKRouter, OlmoeConfig(num_experts=EXPERTS, num_experts_per_tok=3),
     dict(top_k=3, renormalise=False)),
    (Qwen3MoeTopKRouter, Qwen3MoeConfig(num_experts=EXPERTS, num_experts_per_tok=3, norm_topk_prob=True),
     dict(top_k=3)),
    (DeepseekV3TopkRouter, DeepseekV3Config(n_routed_experts=EXPERTS, num_experts_per_tok=3, n_group=4,
                                            topk_group=2, routed_scaling_factor=2.5, norm_topk_prob=True),
     dict(top_k=3, **DEEPSEEK)),
    (DeepseekV3TopkRouter, DeepseekV3Config(n_routed_experts=EXPERTS, num_experts_per_tok=3, n_group=4,
                                            topk_group=2, routed_scaling_factor=2.5, norm_topk_prob=False),
     dict(top_k=3, renormalise=False, **DEEPSEEK)),
), ids=lambda v: getattr(v, "__name__", "") if isinstance(v, type) else "")
def test_routers_of_transformers(router: type, config: Any, more: dict[str, Any]) -> None:
    config.hidden_size = WIDTH
    g = torch.Generator().manual_seed(3)
    x, w, bias = (torch.randn(*shape, generator=g) for shape in ((17, WIDTH), (EXPERTS, WIDTH), (EXPERTS,)))
    theirs = router(config)
    theirs.weight.data, biased = w, router is DeepseekV3TopkRouter
    if biased:
        theirs.e_score_correction_bias.data = bias
    _, weights, experts = theirs(x)
    found: tuple[Tensor, Tensor] = simulate(routing, Layout(T="dp", E="dp"), x, w, bias, mesh=Mesh(dp=2),
                                            biased=biased, more=more)
    ours, order = found[1].sort(-1)
    assert torch.equal(ours, experts.sort(-1).values)
    wanted = weights.gather(-1, experts.argsort(-1))
    torch.testing.assert_close(found[0].gather(-1, order), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("more, says", (
    (dict(top_k=9), "route: top_k is 9, of 8 experts in 1 groups, of which 1 count"),
    (dict(top_k=5, **DEEPSEEK), "route: top_k is 5, of 8 experts in 4 groups, of which 2 count"),
    (dict(top_k=2, groups=3, top_groups=2), "route: top_k is 2, of 8 experts in 3 groups, of which 2 count"),
    (dict(top_k=2, score="relu"), "route: score is 'relu'"),
    (dict(top_k=0), "route: top_k is 0"),
))
def test_what_is_no_routing_says(more: dict[str, Any], says: str) -> None:
    x, w = torch.zeros(2, WIDTH), torch.zeros(EXPERTS, WIDTH)
    with pytest.raises(SpecError) as caught:
        simulate(routing, Layout(), x, w, torch.zeros(EXPERTS), mesh=Mesh(), biased=False, more=more)
    assert str(caught.value).startswith(says)


@pytest.mark.parametrize("text", ("T E -> T J", "T E -> T J, J T", "T E, D -> T J, T J", "T E -> T E, T E"))
def test_a_text_that_is_no_routing_says(text: str) -> None:
    with pytest.raises(SpecError, match='the specs are those of "B T E -> B T J, B T J", or of'):
        route(text, None, top_k=1)


def test_scores_that_are_all_0_have_no_gradient() -> None:
    """Of a sigmoid far below zero: weights are divided by their sum, which is 0."""
    @sharded("T E -> ()")
    def weights(logits):
        return sum("T J -> ()", route("T E -> T J, T J", logits, top_k=2, score="sigmoid")[0])
    _, found = simulate(value_and_grad(weights, "logits"), None, torch.full((1, 3), -200.0), mesh=Mesh())
    assert torch.equal(found, torch.zeros(1, 3))
