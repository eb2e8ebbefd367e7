"""torch's fused attention, with the log-sum-exp that its derivative needs: no scores are held.

`choice` says which of torch's kernels takes a call, as F.scaled_dot_product_attention would choose; they see
all keys, or, where there are as many keys as queries, each those up to its own; within a window, or with a
bias, where a kernel has that. The lse is ours throughout: (b, t, k, g), of float32 at least.

>>> q, k = torch.zeros(1, 3, 1, 2, 4), torch.zeros(1, 3, 1, 4)
>>> out, lse = attend(q, k, k, causal=True, scale=0.5)
>>> lse[0, :, 0, 0].exp()                                               # as many keys as are seen
tensor([1., 2., 3.])
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

KERNELS = {1: "flash", 2: "efficient", 3: "cudnn"}
BIASES = False
"""Whether a bias goes by the efficient kernel on GPUs: not before tests/gpu/attention_worker.py, which sets
it, has come through on one."""
Near = tuple[int, int] | None
"""A window: how far a query sees behind and ahead, the last query standing at the last key."""
_CPU = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def choice(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, near: Near = None,
           bias: Tensor | None = None) -> str | None:
    """The kernel of torch that takes q (b, t, k, g, h), k and v (b, s, k, h): "cpu", "flash", "efficient" or
    "cudnn"; None where only its plain form would. On GPUs flash alone has a window, and efficient a bias."""
    h = q.shape[-1]
    if 0 in (*q.shape, *k.shape) or v.shape[-1] != h or not q.dtype == k.dtype == v.dtype:
        return None
    if q.device.type == "cpu":
        return "cpu" if q.dtype in _CPU and near is None and bias is None else None
    if q.device.type != "cuda" or h % 8:
        return None                                     # torch pads other heads, and cuts the result
    if near is None and bias is None:
        return KERNELS.get(torch._fused_sdp_choice(*heads_of(q, k, v), None, 0.0, causal, scale=scale,
                                                   enable_gqa=shares(q)))
    if bias is not None and (not BIASES or near is not None or bias.dtype != q.dtype):
        return None
    cuda, all_heads = torch.backends.cuda, bias is not None
    asked = cuda.SDPAParams(*heads_of(q, k, v, all_heads), None, 0.0, causal, shares(q) and not all_heads)
    return ("efficient" if cuda.can_use_efficient_attention(asked) else None) if all_heads else \
        ("flash" if cuda.can_use_flash_attention(asked) else None)


def shares(q: Tensor) -> bool:
    """Whether a kernel lets several heads of queries share one of keys: not that of float32 on GPUs."""
    return q.shape[3] > 1 and (q.device.type == "cpu" or q.itemsize == 2)


def heads_of(q: Tensor, k: Tensor, v: Tensor, every: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """(b, heads, t or s, h) of each, as many heads of keys as of queries where they may not be shared."""
    shared = q.shape[3] == 1 or shares(q) and not every
    k, v = (x if shared else x.repeat_interleave(q.shape[3], 2) for x in (k, v))
    return rows_of(q), k.transpose(1, 2), v.transpose(1, 2)


def rows_of(x: Tensor) -> Tensor:
    """(b, t, k, g, h) -> (b, k g, t, h), a view where it can be one."""
    return x.flatten(2, 3).transpose(1, 2)


def aligned(bias: Tensor, q: Tensor, s: int) -> Tensor:
    """(b, k, g, t, s), each 1 or all, as the efficient kernel reads it: (b, k g, t, s), its rows some 16
    elements apart."""
    b, t, heads, g, _ = q.shape
    rows = bias.expand(-1, heads, g, -1, s).flatten(1, 2)
    if rows.stride(3) != 1 or any(n % 16 for n in (*rows.stride()[:3], rows.storage_offset())):
        rows = F.pad(rows, (0, -s % 16)) if s % 16 else rows.clone(memory_format=torch.contiguous_format)
        rows = rows.narrow(3, 0, s)
    return rows.expand(b, -1, t, -1)


def hidden(bias: Tensor, causal: bool) -> Tensor:
    """(.., t): whether a bias, (.., t, s), is -inf for all the keys that a query sees."""
    if not causal:
        return bias.amax(-1) == float("-inf")
    t, made = bias.shape[-2], []
    for at in range(0, t, 512):                         # of so many rows, keys before them and their own
        n = min(512, t - at)
        rows = bias.narrow(-2, at, n)
        later = torch.ones((n, n), dtype=torch.bool, device=bias.device).triu(1)
        most = rows.narrow(-1, at, n).masked_fill(later, float("-inf")).amax(-1)
        made.append(torch.maximum(most, rows.narrow(-1, 0, at).amax(-1)) if at else most)
    return torch.cat(made, -1) == float("-inf")


def _from_rows(rows: Tensor, like: Tensor) -> Tensor:
    return rows.transpose(1, 2).unflatten(2, like.shape[2:4])


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, near: Near = None,
           bias: Tensor | None = None) -> tuple[Tensor, Tensor] | None:
    """(b, t, k, g, h) and the lse; None where no kernel takes these."""
    name = choice(q, k, v, causal, scale, near, bias)
    if name is None:
        return None
    (rows, keys, values), ops = heads_of(q, k, v, bias is not None), torch.ops.aten
    if near is not None:
        out, lse, *_ = ops._flash_attention_forward(
            q.flatten(2, 3), k, v, None, None, q.shape[1], k.shape[1], 0.0, False, False, scale=scale,
            window_size_left=near[0], window_size_right=near[1])
        return out.unflatten(2, q.shape[2:4]), _from_rows(lse, q)
    if name == "cpu":
        out, lse = ops._scaled_dot_product_flash_attention_for_cpu(rows, keys, values, 0.0, causal,
                                                                   scale=scale)
    elif name == "flash":
        out, lse, *_ = ops._scaled_dot_product_flash_attention(rows, keys, values, 0.0, causal, False,
                                                               scale=scale)
    elif name == "cudnn":
        out, lse, *_ = ops._scaled_dot_product_cudnn_attention(rows, keys, values, None, True, 0.0, causal,
                                                               False, scale=scale)
        lse = lse.view(lse.shape[:3])
    else:
        added = None if bias is None else aligned(bias, q, k.shape[1])
        out, lse, *_ = ops._scaled_dot_product_efficient_attention(rows, keys, values, added, True, 0.0,
                                                                   causal, scale=scale)
        lse = lse.narrow(2, 0, q.shape[1])              # it has room for a whole tile
        if added is not None:                           # the kernel says 0 where all keys are hidden
            lse = lse.masked_fill(hidden(added, causal), float("-inf"))
    return _from_rows(out, q), _from_rows(lse, q)


def attend_vjp(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, g: Tensor, causal: bool,
               scale: float, near: Near = None, bias: Tensor | None = None) -> tuple[Tensor, ...] | None:
    """The cotangents of q, k, v and a bias, of what `out` and `lse` are of all the keys that a query sees,
    these among them; None where no kernel takes these."""
    name = choice(q, k, v, causal, scale, near, bias)
    if name is None:
        return None
    rows, keys, values = heads_of(q, k, v, bias is not None)
    g, out, lse = rows_of(g), rows_of(out), lse.flatten(2, 3).transpose(1, 2)
    ops, t, s = torch.ops.aten, q.shape[1], k.shape[1]
    if name == "cpu":
        made = ops._scaled_dot_product_flash_attention_for_cpu_backward(
            g, *_repeated(rows, keys, values), out, lse, 0.0, causal, scale=scale)
        return _summed(q, k, v, *made)
    # of no dropout
    seed = torch.zeros((2,) if name == "flash" else (), dtype=torch.int64, device=q.device)
    if near is not None:
        dq, dk, dv = ops._flash_attention_backward(
            g.transpose(1, 2), q.flatten(2, 3), k, v, out.transpose(1, 2), lse.contiguous(), None, None, t, s,
            0.0, False, seed, seed, scale=scale, window_size_left=near[0], window_size_right=near[1])
        return dq.unflatten(2, q.shape[2:4]), dk, dv
    if name == "flash":
        dq, dk, dv = ops._scaled_dot_product_flash_attention_backward(
            g, rows, keys, values, out, lse.contiguous(), None, None, t, s, 0.0, causal, seed, seed,
            scale=scale)
    elif name == "cudnn":
        dq, dk, dv = ops._scaled_dot_product_cudnn_attention_backward(
            g, rows, keys, values, out, lse.contiguous().unsqueeze(3), seed, seed, None, None, None, t, s,
            0.0, causal, scale=scale)
    else:
        added = None if bias is None else aligned(bias, q, s)
        if bias is not None:
            lse = lse.masked_fill(lse == float("-inf"), 0)              # as the kernel has it: exp(-inf) is 0
        out = out.transpose(1, 2).contiguous().transpose(1, 2)          # the kernel takes its rows as dense
        room = torch.cat([lse, lse.new_zeros((*lse.shape[:2], -t % 32))], 2)    # whole tiles of each head
        dq, dk, dv, of_bias = ops._scaled_dot_product_efficient_attention_backward(
            g, rows, keys, values, added, out, room, seed, seed, 0.0, [True, True, True, bias is not None],
            causal, scale=scale)
        if bias is not None:                            # tiles above the diagonal were not written
            of_bias = (of_bias.tril_() if causal else of_bias).unflatten(1, q.shape[2:4])
            return *_summed(q, k, v, dq, dk, dv), of_bias.sum_to_size(bias.shape)
    return _summed(q, k, v, dq, dk, dv)


def _repeated(rows: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The CPU's derivative takes as many heads of keys as of queries."""
    times = rows.shape[1] // keys.shape[1]
    if times == 1:
        return rows, keys, values
    return rows, keys.repeat_interleave(times, 1), values.repeat_interleave(times, 1)


def _summed(q: Tensor, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor,
            dv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As they come from the kernels; of repeated heads of keys, those of one together."""
    if dk.shape[1] == k.shape[2]:
        return _from_rows(dq, q), dk.transpose(1, 2), dv.transpose(1, 2)
    return (_from_rows(dq, q), *(x.unflatten(1, (of.shape[2], -1)).sum(2).transpose(1, 2)
                                 for x, of in ((dk, k), (dv, v))))
