"""torch's fused attention, with the log-sum-exp that its derivative needs: no scores are held.

`choice` says which of torch's kernels takes a call, as F.scaled_dot_product_attention would choose; they see
all keys, or, where there are as many keys as queries, each those up to its own, or those in a window. The lse
is ours throughout: (b, t, k, g), of float32 at least.

>>> q, k = torch.zeros(1, 3, 1, 2, 4), torch.zeros(1, 3, 1, 4)
>>> out, lse = attend(q, k, k, causal=True, scale=0.5)
>>> lse[0, :, 0, 0].exp()                                               # as many keys as are seen
tensor([1., 2., 3.])
"""
from __future__ import annotations

import torch
from torch import Tensor

KERNELS = {1: "flash", 2: "efficient", 3: "cudnn"}
Near = tuple[int, int] | None
"""A window: how far a query sees behind and ahead, the last query standing at the last key."""
_CPU = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def choice(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, near: Near = None) -> str | None:
    """The kernel of torch that takes q (b, t, k, g, h), k and v (b, s, k, h): "cpu", "flash", "efficient" or
    "cudnn"; None where only its plain form would. On GPUs flash alone has a window."""
    h = q.shape[-1]
    if 0 in (*q.shape, *k.shape) or v.shape[-1] != h or not q.dtype == k.dtype == v.dtype:
        return None
    if q.device.type == "cpu":
        return "cpu" if q.dtype in _CPU and near is None else None
    if q.device.type != "cuda" or h % 8:
        return None                                     # torch pads other heads, and cuts the result
    if near is None:
        return KERNELS.get(torch._fused_sdp_choice(*heads_of(q, k, v), None, 0.0, causal, scale=scale,
                                                   enable_gqa=shares(q)))
    asked = torch.backends.cuda.SDPAParams(*heads_of(q, k, v), None, 0.0, causal, shares(q))
    return "flash" if torch.backends.cuda.can_use_flash_attention(asked) else None


def shares(q: Tensor) -> bool:
    """Whether a kernel lets several heads of queries share one of keys: not that of float32 on GPUs."""
    return q.shape[3] > 1 and (q.device.type == "cpu" or q.itemsize == 2)


def heads_of(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(b, heads, t or s, h) of each, as many heads of keys as of queries where they may not be shared."""
    k, v = (x if shares(q) or q.shape[3] == 1 else x.repeat_interleave(q.shape[3], 2) for x in (k, v))
    return rows_of(q), k.transpose(1, 2), v.transpose(1, 2)


def rows_of(x: Tensor) -> Tensor:
    """(b, t, k, g, h) -> (b, k g, t, h), a view where it can be one."""
    return x.flatten(2, 3).transpose(1, 2)


def _from_rows(rows: Tensor, like: Tensor) -> Tensor:
    return rows.transpose(1, 2).unflatten(2, like.shape[2:4])


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float,
           near: Near = None) -> tuple[Tensor, Tensor] | None:
    """(b, t, k, g, h) and the lse; None where no kernel takes these."""
    name = choice(q, k, v, causal, scale, near)
    if name is None:
        return None
    (rows, keys, values), ops = heads_of(q, k, v), torch.ops.aten
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
        out, lse, *_ = ops._scaled_dot_product_efficient_attention(rows, keys, values, None, True, 0.0,
                                                                   causal, scale=scale)
        lse = lse.narrow(2, 0, q.shape[1])              # it has room for a whole tile
    return _from_rows(out, q), _from_rows(lse, q)


def attend_vjp(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, g: Tensor, causal: bool,
               scale: float, near: Near = None) -> tuple[Tensor, ...] | None:
    """The cotangents of q, k and v, of what `out` and `lse` are of all the keys that a query sees,
    these among them; None where no kernel takes these."""
    name = choice(q, k, v, causal, scale, near)
    if name is None:
        return None
    rows, keys, values = heads_of(q, k, v)
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
        out = out.transpose(1, 2).contiguous().transpose(1, 2)          # the kernel takes its rows as dense
        room = torch.cat([lse, lse.new_zeros((*lse.shape[:2], -t % 32))], 2)    # whole tiles of each head
        dq, dk, dv, _ = ops._scaled_dot_product_efficient_attention_backward(
            g, rows, keys, values, None, out, room, seed, seed, 0.0, [True, True, True, False], causal,
            scale=scale)
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
