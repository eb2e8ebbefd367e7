"""torch's fused attention as it is called: on the CPU its numbers; the kernels of GPUs by torch's own
signatures, on tensors without numbers."""
from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from shardlib.ops import flash
from shardlib.ops.attend_lse import parts_of
from shardlib.ops.seen import Seen
from shardlib.oracle import same

pytestmark = pytest.mark.usefixtures("one_thread")


def operands(g: int, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    """q, k, v and a cotangent."""
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=dtype, device=device)
            for shape in ((2, 5, 3, g, 16), (2, 5, 3, 16), (2, 5, 3, 16), (2, 5, 3, g, 16))]


@pytest.mark.parametrize("causal", (True, False))
def test_the_derivative_is_that_of_what_it_is_told(causal: bool) -> None:
    """`out` and lse of more keys than these: what a piece gets of the whole."""
    q, k, v, g = operands(2, torch.float64, "cpu")
    out, lse = torch.randn_like(g), torch.randn(2, 5, 3, 2, dtype=torch.float64)
    score = torch.einsum("btkgh,bskh->bkgts", q, k) * 0.3
    weight = (score - lse.permute(0, 2, 3, 1)[..., None]).exp()
    weight = weight.tril() if causal else weight
    given = torch.einsum("btkgh,bskh->bkgts", g, v) - (g * out).sum(-1).permute(0, 2, 3, 1)[..., None]
    of_score = weight * given * 0.3
    wanted = (torch.einsum("bkgts,bskh->btkgh", of_score, k), torch.einsum("bkgts,btkgh->bskh", of_score, q),
              torch.einsum("bkgts,btkgh->bskh", weight, g))
    made = flash.attend_vjp(q, k, v, out, lse, g, causal, 0.3)
    assert made is not None and all(same(a, b, 1e-12) for a, b in zip(made, wanted, strict=True))


@pytest.mark.parametrize("g", (1, 2))
@pytest.mark.parametrize("number, name", flash.KERNELS.items())
def test_the_kernels_of_gpus_are_called_as_torch_says(number: int, name: str, g: int,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *operands, **options: number)
    dtype = torch.float32 if name == "efficient" else torch.bfloat16
    with FakeTensorMode():
        q, k, v, cotangent = operands(g, dtype, "cuda")
        assert flash.choice(q, k, v, True, 0.3) == name
        # the efficient one takes as many heads of keys as of queries
        assert flash.heads_of(q, k, v)[1].shape[1] == 3 * (g if name == "efficient" else 1)
        made = flash.attend(q, k, v, True, 0.3)
        assert made is not None
        out, lse = made
        assert (out.shape, out.dtype, lse.shape, lse.dtype) == (q.shape, dtype, q.shape[:4], torch.float32)
        found = flash.attend_vjp(q, k, v, out, lse, cotangent, True, 0.3)
        assert found is not None
        assert [(x.shape, x.dtype) for x in found] == [(x.shape, dtype) for x in (q, k, v)]


@pytest.mark.parametrize("what", ("window", "bias"))
def test_windows_and_biases_on_gpus(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flash has windows; the efficient kernel has biases, where asked for, and as many heads of keys as of
    queries."""
    asked = []
    monkeypatch.setattr(flash, "BIASES", True)
    for name in ("flash", "efficient"):
        monkeypatch.setattr(torch.backends.cuda, f"can_use_{name}_attention",
                            lambda params, name=name: asked.append(name) or True)
    monkeypatch.setattr(torch.backends.cuda, "SDPAParams", lambda *of: of)
    with FakeTensorMode():
        q, k, v, cotangent = operands(2, torch.bfloat16, "cuda")
        bias = torch.randn(1, 3, 2, 5, 5, dtype=q.dtype, device="cuda")
        how = ((1, 0), None) if what == "window" else (None, bias)
        made = flash.attend(q, k, v, True, 0.3, *how)
        assert made is not None
        out, lse = made
        assert (out.shape, out.dtype, lse.shape, lse.dtype) == (q.shape, q.dtype, q.shape[:4], torch.float32)
        found = flash.attend_vjp(q, k, v, out, lse, cotangent, True, 0.3, *how)
        assert found is not None
        given = (q, k, v) if what == "window" else (q, k, v, bias)
        assert [(x.shape, x.dtype) for x in found] == [(x.shape, x.dtype) for x in given]
        assert set(asked) == {"flash" if what == "window" else "efficient"}
        assert flash.attend(q, k, v, True, 0.3, (1, 0), bias) is flash.attend(q, k, v, True, 0.3, None,
                                                                         bias.float()) is None


@pytest.mark.parametrize("s", (5, 16))
@pytest.mark.parametrize("dims", ("bkgts", "kgts", "bts", "kts", "kgs", "s", "stgkb"))
def test_a_bias_as_the_efficient_kernel_reads_it(dims: str, s: int) -> None:
    """Rows of one element after another, some 16 elements apart, whatever dims it has, in whichever order."""
    q = torch.zeros(2, 3, 4, 5, 8)
    sizes = dict(b=2, k=4, g=5, t=3, s=s)
    bias = torch.randn([sizes[n] if n in dims else 1 for n in "bkgts"])
    bias = bias.mT.contiguous().mT if dims == "stgkb" else bias
    for of in (bias, torch.cat([bias, bias], 4)[..., 1:][..., :bias.shape[4]]):
        rows = flash.aligned(of, q, s)
        assert torch.equal(rows, of.expand(2, 4, 5, 3, s).flatten(1, 2))
        assert rows.stride(3) == 1
        assert not any(n % 16 for n in (*rows.stride()[:3], rows.storage_offset()))


@pytest.mark.parametrize("t, s", ((1030, 1030), (5, 5), (3, 7)))
def test_whose_keys_a_bias_hides(t: int, s: int) -> None:
    """Also where rows are taken some at a time."""
    bias = torch.randn(2, t, s).masked_fill(torch.rand(2, t, s) < 0.5, float("-inf"))
    bias[:, ::3] = float("-inf")
    bias[0, 3 * (t // 4), min(s, t) // 2:] = 1.0
    for causal in (False, True)[:1 + (t == s)]:
        score = bias.masked_fill(torch.ones(t, s).triu(1).bool(), float("-inf")) if causal else bias
        assert torch.equal(flash.hidden(bias, causal), (score == float("-inf")).all(-1))


@pytest.mark.parametrize("seen, parts", (
    (Seen(0, 6, 0, 6, window=2), [(0, 6, True, (1, 0))]), (Seen(0, 6, 0, 6, window=6), [(0, 6, True, None)]),
    (Seen(4, 2, 0, 9, window=3), [(2, 6, True, (2, 0))]),
    (Seen(4, 3, 0, 6, window=2), [(3, 6, True, (0, 1))]),
    (Seen(4, 2, 0, 6, False, 3), [(2, 6, False, (2, 2))]),
    (Seen(6, 2, 3, 3, window=4), [(0, 3, True, (1, 2))]),
    (Seen(6, 3, 3, 3, False, 4), [(0, 3, False, (0, 6))]), (Seen(0, 4, 0, 6, False, 3), None),
    (Seen(6, 4, 3, 3, window=4), None), (Seen(0, 2, 1, 6, window=1), None)))
def test_which_keys_a_window_takes(seen: Seen, parts: list[tuple] | None) -> None:
    """The same pairs as `block` says, where the last query stands at the last key."""
    assert parts_of(seen) == parts
    for low, high, _, near in (parts or []) if seen.window != seen.s else []:
        at, shown = torch.arange(seen.t)[:, None] + (high - low - seen.t), torch.arange(high - low)
        own = (shown >= at - near[0]) & (shown <= at + near[1])
        whole = seen.block(0, seen.t, 0, seen.s)[0, 0, 0]
        assert torch.equal(whole[:, low:high], own) and not whole[:, :low].any() and not whole[:, high:].any()


def test_what_no_kernel_takes() -> None:
    q, k, v, _ = operands(2, torch.float64, "cpu")
    assert flash.choice(q, k, v, True, 0.3) == "cpu"
    for other in ((q, k, v[..., :8]), (q, k[:, :0], v[:, :0]), (q.float(), k, v)):
        assert flash.choice(*other, True, 0.3) is flash.attend(*other, True, 0.3) is None
    with FakeTensorMode():
        q, k, v, _ = (x.narrow(-1, 0, 12) for x in operands(2, torch.bfloat16, "cuda"))
        assert flash.choice(q, k, v, True, 0.3) is None         # heads of 12
