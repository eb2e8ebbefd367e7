"""What `explain` says of who runs attention is who runs it, where that can be seen without a GPU."""
from __future__ import annotations

from typing import Any

import pytest
import torch

from shardlib import Layout, Mesh, explain, lower, sharded, simulate, value_and_grad
from shardlib.functions import sum
from shardlib.ops import attend as attending
from shardlib.ops import attend_lse, attend_vjp, attention

pytestmark = pytest.mark.usefixtures("one_thread")
QKV, SIZES = "B T K G H, B S K H, B S K H", dict(B=1, T=8, S=8, K=2, G=2, H=8)
DIMS = dict(start="B", mask="T S", lengths="B", bias="K G T S", sinks="K G")
FUSED = "torch's fused kernel (on GPUs flash, cuDNN's or efficient, as torch chooses): "
BLOCKS = "blocks of queries, whose scores are made anew in backward: "
ON_GPUS = " on GPUs, blocks of queries on the CPU: "
CASES: dict[tuple[str, str], tuple[dict[str, Any], str, str]] = {
    ("", ""): ({}, FUSED + "keys 0 to 7, causal", ""),
    ("", "T=cp"): ({}, FUSED + "keys 0 to 3, causal", ""),
    ("", "T=cp,S=cp"): (
        {}, FUSED + "keys 0 to 3, causal; of other ranks by the same, while more travels", ""),
    ("sinks", ""): (dict(causal=False), FUSED + "keys 0 to 7", ""),
    ("", "K=cp"): (dict(window=3), "torch's flash kernel" + ON_GPUS + "a window of 3", ""),
    ("bias", ""): ({}, BLOCKS + "a bias", ""),
    ("bias", "K=cp"): (dict(window=3), BLOCKS + "a bias beside a window", ""),
    ("", "G=cp"): (dict(softcap=2.0), BLOCKS
                   + "a softcap is between scores and softmax, where no fused kernel lets one", ""),
    ("lengths", ""): ({}, BLOCKS + "what is seen is in lengths, not in sizes", ""),
    ("start", ""): ({}, BLOCKS + "what is seen is in start, not in sizes",
                    "F.scaled_dot_product_attention, some queries at a time: what is seen is in start; few "
                    "queries on GPUs by a kernel"),
    ("", "S=cp"): (
        {}, BLOCKS + "8 queries from 0 on and 4 keys from 0 on are no call of a fused kernel", ""),
}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_who_runs_it(case: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    (name, layout), (options, graded, plain) = case, CASES[case]
    text = f"{QKV}{', ' + DIMS[name] if name else ''}"

    @sharded(f"{text}{'' if name else ', B'} -> ()")
    def f(q, k, v, more):
        given = {} if not name else {"seen" if name == "start" else name: more}
        return sum("B T K G H -> ()", attention(f"{text} -> B T K G H", q, k, v, **given, **options))
    calls = []
    for module in (attend_lse, attend_vjp):
        blocks = module._in_blocks
        monkeypatch.setattr(module, "_in_blocks",
                            lambda *of, blocks=blocks: calls.append("blocks") or blocks(*of))
    monkeypatch.setattr(attending, "_attend_seen", lambda *of, by=attending._attend_seen:
                        calls.append("mask") or by(*of))
    args = [torch.randn([SIZES[d] for d in dims.split()]) for dims in text.split(", ")]
    if name in ("", "start", "lengths"):
        args[3:] = [torch.tensor([5])]
    mesh, dtypes = Mesh(cp=2), {} if name not in ("", "start", "lengths") else dict(more="int64")
    for g, said in ((f, plain or graded), (value_and_grad(f, ("q",)), graded)):
        kernels = explain(lower(g, Layout.parse(layout), mesh=mesh), mesh, SIZES, dtypes).kernels
        assert {line.split(": ", 1)[1] for line in kernels} == {said}, kernels
        calls.clear()
        simulate(g, Layout.parse(layout), *args, mesh=mesh)
        assert {*calls} == ({"mask"} if said.startswith("F.") else {"blocks"} if "blocks" in said else set())


@pytest.mark.parametrize("h, v, t, says", (
    (8, 6, 5, BLOCKS + "keys have 8 elements a head, values 6"), (8, 8, 0, "nothing: it is empty"),
    (12, 12, 5, BLOCKS[:-2] + " on GPUs: heads of 12 elements, which is no multiple of 8"),
    (8, 8, 9, BLOCKS + "9 queries from 0 on and 5 keys from 0 on are no call of a fused kernel")))
def test_sizes_that_no_fused_kernel_takes(h: int, v: int, t: int, says: str) -> None:
    @sharded("B T K G H, B S K H, B S K V -> B T K G V")
    def f(q, k, v):
        return attention("B T K G H, B S K H, B S K V -> B T K G V", q, k, v)
    sizes = dict(SIZES, T=t, S=5, H=h, V=v)
    (line,) = explain(lower(f, Layout(), mesh=Mesh()), Mesh(), sizes).kernels
    assert line.split(": ", 1)[1] == says


def test_queries_that_stand_behind_some_keys() -> None:
    @sharded(f"{QKV} -> B T K G H")
    def f(q, k, v):
        return attention(f"{QKV} -> B T K G H", q, k, v, ahead=3)
    (line,) = explain(lower(f, Layout(), mesh=Mesh()), Mesh(), dict(SIZES, T=5)).kernels
    assert line.split(": ", 1)[1] == FUSED + "keys 0 to 2 and keys 3 to 7, causal"
