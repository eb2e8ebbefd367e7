"""A layer of experts whose tokens are split over them, as one fused step: where it is found, what its kernels
take, and what they give, all ranks at once by the simulator of protocols."""
from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from trials import workspaces

from shardlib import Layout, Mesh, lower, sharded, simulate
from shardlib.compiler.fusion import Site
from shardlib.compiler.passes import DEFAULT
from shardlib.compiler.passes.fuse import fuse
from shardlib.functions import silu
from shardlib.ops import combine, dispatch, expert_exchange, grouped_einsum
from shardlib.ops.expert_exchange import EXCHANGES, by_exchange
from shardlib.ops.fusions import FUSIONS
from shardlib.triton_kernels import expert_exchange as kernels
from shardlib.triton_kernels.launching import Grid
from shardlib.triton_kernels.simulator import Simulation
from shardlib.triton_kernels.workspace import Workspace

RAGGED = "(E B T)~J"
ROWS, TOKENS = EXCHANGES[0].function, EXCHANGES[2].function


@sharded("B T D, B T J, B T J, E D F, E D F, E F D -> B T D")
def layer(x, chosen, weights, gate, up, down):
    rows, at = dispatch(f"B T D, B T J -> {RAGGED} D, {RAGGED}", x, chosen)
    gate = grouped_einsum(f"{RAGGED} D, {RAGGED}, E D F -> {RAGGED} F", rows, at, gate)
    up = grouped_einsum(f"{RAGGED} D, {RAGGED}, E D F -> {RAGGED} F", rows, at, up)
    down = grouped_einsum(f"{RAGGED} F, {RAGGED}, E F D -> {RAGGED} D", silu(gate) * up, at, down)
    return combine(f"{RAGGED} D, {RAGGED}, B T J -> B T D", down, at, weights)


@pytest.mark.parametrize("entries, found", [
    (dict(B="x", E="x"), "exchange_rows"), (dict(T="x", E="x"), "exchange_tokens"),
    (dict(B="x", E="x", F="y"), "exchange_rows_by_width"),
    (dict(T="x", E="x", F="y"), "exchange_tokens_by_width"), (dict(E="x"), "expert_ffn_by_experts"),
    (dict(B="x", E=("x", "y")), "expert_ffn_by_experts"),
    (dict(B="x", T="y", E=("x", "y")), "expert_ffn_by_experts")])
def test_tokens_that_are_split_over_their_experts_are_exchanged(entries: dict[str, Any], found: str) -> None:
    """Not over two axes, of which each has a gather of its own."""
    passes = (*DEFAULT, *fuse(FUSIONS))
    program = lower(layer, Layout(entries), mesh=Mesh(x=2, y=2), passes=passes)
    assert [s.bodies[0].name for s in program.steps if s.bodies] == [found]


class Exchanging:
    """Of one rank, as NVLink does it, in the interpreter."""

    def __init__(self, workspace: Workspace, most: int = 100) -> None:
        self.me, self.workspace, self.most, self.grid = workspace.rank, workspace, most, Grid(2, 1)

    def refuses_rows(self, tokens: int, width: int, dtype: torch.dtype) -> str | None:
        return None if tokens <= self.most else f"{tokens} tokens of a rank"

    def dispatch_rows(self, *operands: Any) -> Tensor:
        return kernels.dispatch_rows(*operands, self.workspace, self.grid)

    def combine_rows(self, *operands: Any) -> Tensor:
        return kernels.combine_rows(*operands, self.workspace, self.grid)


def drawn(b: int, t: int, experts: int, top_k: int, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(b * t)
    d, f = 16, 8
    return [torch.randn(b, t, d).to(dtype), torch.rand(b, t, experts).topk(top_k).indices,
            torch.rand(b, t, top_k),
            *((torch.randn(experts, *shape) / 4).to(dtype) for shape in ((d, f), (d, f), (f, d)))]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("form, b, t, top_k", [(ROWS, 2, 3, 2), (TOKENS, 1, 6, 3), (TOKENS, 2, 4, 1)])
def test_all_ranks_get_what_the_body_gives(form: Any, b: int, t: int, top_k: int,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit: of float32, whose products and sums are made in the same order."""
    monkeypatch.setattr(expert_exchange, "MOST_TOKENS", 4)
    whole, dim = drawn(b, t, 4, top_k, torch.float32), 0 if form is ROWS else 1
    split = [dim, None, None, 0, 0, 0]
    ranks = [[x if at is None else x.chunk(2, at)[r].contiguous() for x, at in zip(whole, split)]
             for r in range(2)]
    spaces = workspaces(2, 1 << 18)

    def run(r: int) -> Tensor:
        site = Site(form, "cuda", [x.to("meta") for x in ranks[r]], {}, [object(), Exchanging(spaces[r])], 2)
        return by_exchange(site)(*ranks[r])
    made = Simulation(1, weak=False).run([lambda r=r: run(r) for r in range(2)])
    want = simulate(layer, Layout({"BT"[dim]: "x", "E": "x"}), *whole, mesh=Mesh(x=2))
    assert torch.equal(torch.cat(made, dim), want)


def site(**changed: Any) -> Site:
    given = dict(device="cuda", t=80, e=2, j=2, dtype=torch.bfloat16, weights=torch.float32, up=None,
                 most=100) | changed
    t, e, j, d, f = given["t"], given["e"], given["j"], 16, 8
    shapes = ((1, t, d), (2, t, j), (2, t, j), (e, d, f), (e, d, f), (e, f, d))
    dtypes = (given["dtype"], torch.int64, given["weights"], given["dtype"], given["up"] or given["dtype"],
              given["dtype"])
    return Site(ROWS, given["device"],
                [torch.empty(shape, dtype=kind, device="meta") for shape, kind in zip(shapes, dtypes)], {},
                [object(), Exchanging(workspaces(2, 16)[0], given["most"])][:given.get("ways", 2)], 2)


@pytest.mark.parametrize("changed, said", [
    (dict(device="cpu"), "no kernel exchanges rows on cpu"),
    (dict(up=torch.float16), "tokens and experts are not of one dtype of 16 or 32 bits"),
    (dict(dtype=torch.float64), "tokens and experts are not of one dtype of 16 or 32 bits"),
    (dict(weights=torch.float64), "the weights are float64"),
    (dict(t=64), "128 tokens, of which all go everywhere"),
    (dict(e=0), "0 experts here, 2 of a token: kernels take some, at most 128 here"),
    (dict(e=129), "129 experts here, 2 of a token: kernels take some, at most 128 here"),
    (dict(j=0), "2 experts here, 0 of a token: kernels take some, at most 128 here"),
    (dict(most=79), "80 tokens of a rank"), (dict(ways=1), "no communicator exchanges rows"),
    ({}, "taken"), (dict(e=128, t=65), "taken")])
def test_what_the_kernels_take(changed: dict[str, Any], said: str) -> None:
    found = by_exchange(site(**changed))
    assert (found if isinstance(found, str) else "taken") == said
