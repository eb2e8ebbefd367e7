"""Attention on one GPU, forward and gradient: `CASES [SEED]` of random sizes, kernels, dtypes and what is
seen. Exit status 1 where anything is wrong.

    python tests/gpu/attention_worker.py 300

Each is at most twice as far from float64 as torch's own attention with a mask in the same dtype, beside what
comes of a result that was kept in that dtype: a gradient takes g out from g v, which may all but cancel.
"""
from __future__ import annotations

import random
import sys
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from shardlib.ops import flash
from shardlib.ops.attend import attend
from shardlib.ops.attend_lse import Scores, attend_lse
from shardlib.ops.attend_vjp import attend_vjp, sinks_vjp
from shardlib.ops.seen import Seen

sys.path.append(str(Path(__file__).parents[1] / "helpers"))
from accuracy import near  # noqa: E402

flash.BIASES = True

KERNELS = dict(flash=SDPBackend.FLASH_ATTENTION, efficient=SDPBackend.EFFICIENT_ATTENTION,
               cudnn=SDPBackend.CUDNN_ATTENTION, blocks=SDPBackend.MATH)


def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scores: Scores, bias: Tensor | None,
          sinks: Tensor | None) -> Tensor:
    """torch's attention with all pairs; with a softcap, which it does not have, written out."""
    seen = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, float("-inf"))
    added = seen if bias is None else bias + seen
    rows = q.permute(0, 2, 3, 1, 4)
    keys, values = (x.transpose(1, 2)[:, :, None] for x in (k, v))
    added = added.expand(*rows.shape[:4], k.shape[1])
    if sinks is not None:
        added = torch.cat([added, sinks[:, :, None, None].expand(*added.shape[:4], 1)], -1)
        keys, values = (F.pad(x, (0, 0, 0, 1)) for x in (keys, values))
    keys, values = (x.expand(-1, -1, q.shape[3], -1, -1) for x in (keys, values))
    nothing = (added == float("-inf")).all(-1, keepdim=True)
    added = added.masked_fill(nothing, 0)
    if scores.softcap is None:
        flat = [x.flatten(1, 2) for x in (rows, keys, values, added)]
        out = F.scaled_dot_product_attention(*flat, scale=scores.scale).unflatten(1, q.shape[2:4])
    else:
        score = scores.softcap * torch.tanh(rows @ keys.mT * scores.scale / scores.softcap)
        if sinks is not None:
            score = torch.cat([score[..., :-1], torch.zeros_like(score[..., -1:])], -1)
        out = torch.softmax(score + added, -1) @ values
    return out.masked_fill(nothing, 0).permute(0, 3, 1, 2, 4)


class Cases:
    def __init__(self, seed: int) -> None:
        self.random, self.failures, self.taken = random.Random(seed), [], Counter()
        torch.manual_seed(seed)

    def some(self, *of: Any) -> Any:
        return self.random.choice(of)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, device="cuda").to(self.dtype)

    def one(self) -> None:
        some, self.dtype = self.some, self.some(torch.bfloat16, torch.float16, torch.float32)
        b, t, heads, g, h = (some(1, 2, 3), some(1, 2, 5, 64, 130, 257), some(1, 2, 3), some(1, 2, 4),
                             some(8, 16, 64, 80, 128, 192, 12))
        ahead, behind = some(0, 0, 0, 1, 70), some(0, 0, 0, 3, 64)
        s = ahead + t + behind
        q, k, v = self.normal(b, t, heads, g, h), self.normal(b, s, heads, h), self.normal(b, s, heads, h)
        extra = some("", "", "", "start", "lengths", "mask", "window", "window", "window sinks", "softcap",
                     "bias", "bias", "bias sinks", "sinks", "start sinks", "window bias")
        device = dict(device="cuda")
        seen = Seen(0 if "start" in extra else ahead, t, 0, s, causal=some(True, True, False),
                    window=some(1, 16, 100) if "window" in extra else None,
                    start=torch.randint(-t, s + 1, (b,), **device) if "start" in extra else None,
                    lengths=torch.randint(0, s + 2, (b,), **device) if "lengths" in extra else None,
                    mask=torch.rand(b, 1, 1, t, s, **device) < 0.6 if "mask" in extra else None)
        of_bias = some((1, heads, g, t, s), (b, 1, 1, t, s), (1, heads, 1, t, s), (1, heads, g, 1, s))
        bias = self.normal(*of_bias) if "bias" in extra else None
        if bias is not None and some(True, False):      # it hides some keys, and of a query all
            bias = bias.masked_fill(torch.rand(bias.shape, **device) < 0.3, float("-inf"))
            bias[..., :1, :] = float("-inf")
        sinks = self.normal(heads, g) if "sinks" in extra else None
        scores = Scores(some(h ** -0.5, 0.3 / h ** 0.5), 5.0 if "softcap" in extra else None)
        kernel = some("any", *KERNELS)
        self.what = (f"{extra or 'places'} causal={seen.causal} b={b} t={t} s={s} ahead={ahead} k={heads} "
                     f"g={g} h={h} {self.dtype} {kernel}")
        if kernel == "any":
            self.check(q, k, v, seen, scores, bias, sinks)
        else:
            with sdpa_kernel([KERNELS[kernel], SDPBackend.MATH]):
                self.check(q, k, v, seen, scores, bias, sinks)

    def check(self, q: Tensor, k: Tensor, v: Tensor, seen: Seen, scores: Scores, bias: Tensor | None,
              sinks: Tensor | None) -> None:
        what = "window" if seen.window else "bias" if bias is not None else "places"
        near = (0, 0) if seen.window else None
        self.taken[what, flash.choice(q, k, v, False, scores.scale, near, bias), self.dtype] += 1
        mask = seen.block(0, seen.t, 0, seen.s, q.device)
        mask = torch.ones((1, 1, 1, 1, 1), dtype=torch.bool, device="cuda") if mask is None else mask
        given = [x for x in (q, k, v, bias, sinks) if x is not None]
        names = [n for n, x in zip(("q", "k", "v", "bias", "sinks"), (q, k, v, bias, sinks)) if x is not None]
        ct = torch.randn_like(q)

        def graded(dtype: torch.dtype, f: Any) -> list[Tensor]:
            leaves = dict(zip(names, (x.to(dtype).detach().requires_grad_() for x in given)))
            out = f(leaves["q"], leaves["k"], leaves["v"], leaves.get("bias"), leaves.get("sinks"))
            return [out.detach(), *torch.autograd.grad(out, list(leaves.values()), ct.to(dtype))]

        def dense(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, sinks: Tensor | None) -> Tensor:
            return plain(q, k, v, mask, scores, bias, sinks)
        exact = graded(torch.float64, dense)
        with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            torchs = graded(self.dtype, dense)
        slack = [0.0, *self.noise(exact, graded_names=names, ct=ct, mask=mask, q=q, k=k, v=v, bias=bias,
                                  sinks=sinks, scores=scores)]
        by_torch = graded(self.dtype, lambda q, k, v, bias, sinks: attend(q, k, v, seen, scores, bias, sinks))
        with torch.inference_mode():
            fast = attend(q, k, v, seen, scores, bias, sinks)
            out, lse = attend_lse(q, k, v, seen, scores, bias, sinks)
            grads = list(attend_vjp(q, k, v, seen, scores, bias, out, lse, ct))
            if sinks is not None:
                wide = [x.to(lse.dtype) for x in (sinks, out, lse, ct)]
                grads.append(sinks_vjp(*wide).to(sinks.dtype))
        self.compare("autograd", ["out", *names], by_torch, torchs, exact, slack)
        self.compare("forward", ["out"], [fast], torchs, exact, slack)
        self.compare("kept", ["out", *names], [out, *grads], torchs, exact, slack)
        hidden = ~mask if bias is None else ~mask | (bias == float("-inf"))
        nothing = hidden.all(-1).expand(*q.permute(0, 2, 3, 1, 4).shape[:4]).permute(0, 3, 1, 2)
        if sinks is None and (bool(out[nothing].any()) or bool((lse[nothing] != -torch.inf).any())):
            self.failures.append(f"{self.what}: what sees nothing is not zero")

    def noise(self, exact: list[Tensor], graded_names: list[str], **of: Any) -> list[float]:
        """Of each gradient, what comes of roundings of g v, g out and of weights in this dtype, and of scores
        in float32, signs at random."""
        q, k, v, ct = (of[n].double() for n in ("q", "k", "v", "ct"))
        scores, eps = of["scores"], torch.finfo(self.dtype).eps
        score = torch.einsum("btkgh,bskh->bkgts", q, k) * scores.scale
        if scores.softcap is not None:
            score = scores.softcap * torch.tanh(score / scores.softcap)
        score = (score + (0 if of["bias"] is None else of["bias"])).masked_fill(~of["mask"], float("-inf"))
        lse = score.logsumexp(-1, keepdim=True)
        if of["sinks"] is not None:
            lse = torch.logaddexp(lse, of["sinks"].double()[..., None, None])
        weight = (score - lse).exp().nan_to_num(0)
        size = torch.einsum("btkgh,bskh->bkgts", ct.square(), v.square())
        mean = (ct * exact[0]).square().sum(-1).permute(0, 2, 3, 1)[..., None]
        largest = score.masked_fill(weight == 0, 0).abs().amax(-1, keepdim=True)
        of_score = torch.finfo(torch.float32).eps * largest
        weight = weight * (eps + 2 * of_score)
        noise = weight.square() * (size + mean)
        each = dict(q=torch.einsum("bkgts,bskh->", noise, k.square()) * scores.scale ** 2,
                    k=torch.einsum("bkgts,btkgh->", noise, q.square()) * scores.scale ** 2,
                    v=torch.einsum("bkgts,btkgh->", weight.square(), ct.square()),
                    bias=noise.sum(), sinks=(eps ** 2 * mean).sum())
        return [2 * float(each[n]) ** 0.5 for n in graded_names]

    def compare(self, how: str, names: list[str], got: list[Tensor], torchs: list[Tensor],
                exact: list[Tensor], slack: list[float]) -> None:
        for name, a, b, c, more in zip(names, got, torchs, exact, slack):
            error = float((a.double() - c).norm())
            if not bool(a.isfinite().all()) or error > more and not near(a, b, c, n=128):
                errors = [float((x.double() - c).norm() / c.norm().clamp(min=1e-30)) for x in (a, b)]
                self.failures.append(f"{self.what}: {how} {name}: error {errors[0]:.3g}, "
                                     f"torch's {errors[1]:.3g}")


def main() -> int:
    count, seed = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    cases = Cases(seed)
    for _ in range(count):
        try:
            cases.one()
        except Exception:
            cases.failures.append(f"{cases.what}: {traceback.format_exc()[-1500:]}")
    for name, n in sorted(cases.taken.items(), key=str):
        print(name, n)
    print("\n".join(cases.failures[:40]))
    print(f"attention {count}: {len(cases.failures)} wrong")
    return bool(cases.failures)


if __name__ == "__main__":
    sys.exit(main())
