"""``attention`` on the CPU: PyTorch's own flash kernel where it has the form, the tiles of :mod:`.chunked` elsewhere.

The kernel knows neither windows nor caps, nor queries that stand beside the last of more keys, and has no gradient of
lse. Such queries take it twice, for the keys before them and for the square of the rest, merged by lse; backwards
either part takes the output and the lse of both.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad

from seqzoo.kernels.attention import chunked
from seqzoo.kernels.attention.chunked import Form, attend_in_tiles, differentiate_in_tiles

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, form: Form) -> tuple[Tensor, Tensor]:
    """As :func:`attend_in_tiles`."""
    if not _has_kernel(q, k, v, bias, form):
        return attend_in_tiles(q, k, v, bias, form)
    q, k, v = (_heads_first(x) for x in (q, k, v))
    mask = _mask(bias, q)
    if q.shape[2] == 1 and q.shape[1] > k.shape[1] and (mask is None or mask.shape[1] == 1):
        # the queries of a group as those of one head read its keys once
        o, lse = _dense(q.reshape(q.shape[0], k.shape[1], -1, q.shape[3]), k, v, mask, form)
        return o.reshape(q.shape).transpose(1, 2), lse.reshape(q.shape[:3]).transpose(1, 2)
    before = k.shape[2] - q.shape[2] if form.causal else 0
    if before > 0:
        o, lse = _flash(q, k[:, :, :before], v[:, :, :before], 0.0, False, scale=form.scale)
        own, lse_of_own = _flash(q, k[:, :, before:], v[:, :, before:], 0.0, True, scale=form.scale)
        first, lse = lse, torch.logaddexp(lse, lse_of_own)
        o = (o * (first - lse).exp_()[..., None] + own * (lse_of_own - lse).exp_()[..., None]).to(q.dtype)
    elif before < 0:
        o, lse = torch.zeros_like(q), q.new_full(q.shape[:3], -torch.inf, dtype=chunked.accumulator(q.dtype))
        o[:, :, -before:], lse[:, :, -before:] = _flash(q[:, :, -before:], k, v, 0.0, True, scale=form.scale)
    else:
        o, lse = _dense(q, k, v, mask, form)
    return o.transpose(1, 2).contiguous(), lse.transpose(1, 2).contiguous()


def differentiate(
    grad_o: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    o: Tensor,
    lse: Tensor,
    form: Form,
    bias_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """As :func:`differentiate_in_tiles`."""
    # to look whether lse was used at all costs a number a query
    if bias_gradient or not _has_kernel(q, k, v, bias, form) or bool(grad_lse.count_nonzero()):
        return differentiate_in_tiles(grad_o, grad_lse, q, k, v, bias, o, lse, form, bias_gradient)
    grad_o, q, k, v, o = (_heads_first(x) for x in (grad_o, q, k, v, o))
    lse = lse.transpose(1, 2)
    before = k.shape[2] - q.shape[2] if form.causal else 0
    if before > 0:
        earlier, own = (
            _flash_backward(grad_o, q, k[:, :, part], v[:, :, part], o, lse, 0.0, causal, scale=form.scale)
            for part, causal in ((slice(before), False), (slice(before, None), True))
        )
        grads = earlier[0] + own[0], *(torch.cat(pair, 2) for pair in zip(earlier[1:], own[1:], strict=True))
    else:
        mask = _mask(bias, q)
        of_queries = [x[:, :, -before:] for x in (grad_o, q, o, lse)]
        given = *of_queries[:2], k, v, *of_queries[2:], 0.0, form.causal
        grads = _flash_backward(*given, attn_mask=mask, scale=form.scale)
        if before < 0:
            grads = pad(grads[0], (0, 0, -before, 0)), *grads[1:]
    grad_q, grad_k, grad_v = (x.transpose(1, 2).contiguous() for x in grads)
    return grad_q, grad_k, grad_v, None


forward = partial(chunked.forward, attend=attend)
backward = partial(chunked.backward, differentiate=differentiate)


def _dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, form: Form) -> tuple[Tensor, Tensor]:
    o, lse = _flash(q, k, v, 0.0, form.causal, attn_mask=mask, scale=form.scale)
    if mask is not None:
        # the kernel's lse is 0 where nothing is seen
        lse = lse.masked_fill(mask.amax(-1) == -torch.inf, -torch.inf)
    return o, lse


def _mask(bias: Tensor | None, q: Tensor) -> Tensor | None:
    """The bias in a dtype that the kernel takes: q's, or float32 beside half precision, whose rounding it is spared."""
    return bias if bias is None or q.dtype != torch.float64 else bias.to(q.dtype)


def _has_kernel(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, form: Form) -> bool:
    plain = form.window is None and form.logit_cap is None and (bias is None or not form.causal)
    return plain and q.shape[3] == v.shape[3] and q.numel() > 0 and k.numel() > 0


def _heads_first(x: Tensor) -> Tensor:
    """``(B, H, T, X)``, a view unless the features are apart from one another in memory."""
    return (x if x.stride(-1) == 1 else x.contiguous()).transpose(1, 2)
