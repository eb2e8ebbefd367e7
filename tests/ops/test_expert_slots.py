"""Which slot a token's row goes to: what is refused, in whole. What it means: the oracle of rules."""
from __future__ import annotations

import pytest
import torch

from shardlib import Layout, Mesh, SpecError, sharded, simulate
from shardlib.ops import slots_of


@sharded("X R, B T J -> B T J")
def placed(table, chosen):
    return slots_of("X R, B T J -> B T J", table, chosen)


def test_replicas_take_turns_by_a_tokens_number_in_the_batch() -> None:
    table = torch.tensor([[0, 3, 4], [1, -1, -1], [2, 5, -1]])
    chosen = torch.tensor([0, 1, 2, -1]).expand(2, 3, 4)
    wanted = [[[0, 1, 2, -1], [3, 1, 5, -1], [4, 1, 2, -1]], [[0, 1, 5, -1], [3, 1, 2, -1], [4, 1, 5, -1]]]
    for layout in ("", "B=a,T=b", "T=b/a", "B=b"):
        assert simulate(placed, Layout.parse(layout), table, chosen, mesh=Mesh(a=2, b=2)).tolist() == wanted


@pytest.mark.parametrize("layout", ("", "T=tp"))
def test_an_expert_that_has_no_line_in_the_table(layout: str) -> None:
    with pytest.raises(SpecError) as caught:
        simulate(placed, Layout.parse(layout), torch.zeros(3, 1).long(), torch.tensor([[[0], [3]]]),
                 mesh=Mesh(tp=2))
    assert str(caught.value).split("  ")[0] == "slots_of: chosen holds 3, outside of 0 to 2 (X=3)"


@pytest.mark.parametrize("text", ("X, T J -> T J", "X R, T J -> J T", "X R, T R -> T R",
                                  "X R, T J -> T J, X"))
def test_a_text_that_is_no_call_says(text: str) -> None:
    with pytest.raises(SpecError) as caught:
        slots_of(text, None, None)
    assert str(caught.value) == f'slots_of "{text}": the specs are those of "X R, B T J -> B T J"'
