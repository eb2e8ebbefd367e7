"""Losses of routers: as transformers and the papers have them, whatever is split, bfloat16 in float32."""
from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from shardlib import Layout, Mesh, SpecError, lower, sharded, simulate, value_and_grad
from shardlib.ops import load_balancing_loss, route, router_z_loss

pytestmark = pytest.mark.usefixtures("one_thread")
MESH = Mesh(dp=2, tp=2)


@sharded("L B T E -> ()")
def balance(logits):
    _, experts = route("L B T E/1 -> L B T J, L B T J", logits, top_k=2)
    return load_balancing_loss("L B T E, L B T J -> ()", logits, experts)


z_loss = sharded("L B T E -> ()")(lambda logits: router_z_loss("L B T E -> ()", logits))


def theirs(logits: Tensor) -> Tensor:
    return load_balancing_loss_func(tuple(layer.flatten(0, 1) for layer in logits), logits.shape[-1], 2)


def by_formula(logits: Tensor) -> Tensor:
    return logits.exp().sum(-1).log().square().mean()


@pytest.mark.parametrize("f, truth", ((balance, theirs), (z_loss, by_formula)), ids=("balance", "z"))
@pytest.mark.parametrize("layout", ("B=dp,T=tp", "B=dp/tp", "T=dp,E=tp", "L=dp,B=tp"))
def test_value_and_gradient(f: Any, truth: Any, layout: str) -> None:
    """Means are by the number of tokens on all ranks, however they are split."""
    logits = torch.randn(3, 3, 5, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    given = logits.clone().requires_grad_()
    wanted = truth(given)
    grad, = torch.autograd.grad(wanted, given)
    found = simulate(value_and_grad(f, wrt="logits"), Layout.parse(layout), logits, mesh=MESH)
    torch.testing.assert_close(found, (wanted.detach().double(), grad), rtol=1e-6, atol=1e-8)


def test_tokens_send_a_number_for_each_expert_and_each_choice() -> None:
    """What is reduced over dp: the mean probabilities, and the means over the choices."""
    def reduced(f: Any) -> list[str]:
        text = str(lower(f, Layout(B="dp"), mesh=MESH))
        return [line.split('"')[1] for line in text.splitlines() if "all_reduce(" in line]
    assert reduced(balance) == ["E +dp -> E", "J +dp -> J"]
    assert reduced(z_loss) == ["+dp -> ()"]


@pytest.mark.parametrize("f, truth", ((balance, theirs), (z_loss, by_formula)), ids=("balance", "z"))
def test_narrow_logits_have_wide_losses(f: Any, truth: Any) -> None:
    logits = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(2)).bfloat16()
    found = simulate(f, Layout(B="dp"), logits, mesh=MESH)
    torch.testing.assert_close(found, truth(logits.float()), rtol=1e-6, atol=0)


@pytest.mark.parametrize("text", (
    "T E, T J -> T", "T E, B J -> ()", "T E, T E -> ()", "E, J -> ()", "T E -> ()"))
def test_a_text_that_is_no_balance_says(text: str) -> None:
    with pytest.raises(SpecError) as caught:
        load_balancing_loss(text, None, None)
    assert str(caught.value) == f'load_balancing_loss "{text}": the specs are those of "B T E, B T J -> ()"'


@pytest.mark.parametrize("text", ("T E -> T", "E -> ()", "T E, T J -> ()"))
def test_a_text_that_is_no_z_loss_says(text: str) -> None:
    with pytest.raises(SpecError) as caught:
        router_z_loss(text, None)
    assert str(caught.value) == f'router_z_loss "{text}": the specs are those of "B T E -> ()"'
