"""The definition of ``block_recurrence``, sequence by sequence and block by block, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# added to the mean square of the states
EPSILON = 1e-5


def block_recurrence(
    states: Tensor,
    state_kv: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Tensor,
    ids: Tensor,
    in_weight: Tensor,
    in_bias: Tensor | None,
    gate_weight: Tensor,
    gate_bias: Tensor,
    keep: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As :func:`seqzoo.kernels.block_recurrence.block_recurrence`."""
    kind, heads = k.dtype, k.shape[2]
    ids, in_weight, gate_weight, gate_bias = (value.to(kind) for value in (ids, in_weight, gate_weight, gate_bias))
    in_bias = None if in_bias is None else in_bias.to(kind)
    found, final, block = [], [], 0
    for row, (inside, touched, complete) in enumerate(layout.T.tolist()):
        c = states[row]
        for index in range(touched):
            read = F.rms_norm(c, c.shape[-1:], eps=EPSILON).to(kind) + ids
            q_s, q_t, kv = F.linear(read, in_weight, in_bias).tensor_split((c.shape[1], 2 * c.shape[1]), dim=-1)
            kv = state_kv[row] if inside and index == 0 else kv
            found.append(kv)
            if index < complete:
                own = attend(q_s.unflatten(-1, (heads, -1)), *kv.unflatten(-1, (2, heads, -1)).unbind(1))
                other = attend(q_t.unflatten(-1, (heads, -1)), k[block], v[block])
                raw = F.linear(torch.cat((own, other), -1), gate_weight, gate_bias).to(c.dtype)
                if keep is None:
                    z, i, f = raw.chunk(3, dim=-1)
                    c = torch.sigmoid(f + 1) * c + torch.sigmoid(i - 1) * torch.tanh(z)
                else:
                    kept = torch.sigmoid(keep.to(c.dtype))
                    c = kept * c + (1 - kept) * raw
            block += 1
        final.append(c)
    padding = [k.new_zeros(state_kv.shape[1:])] * (k.shape[0] - block)
    return torch.stack(found + padding), torch.stack(final)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention of ``(S, H, K)`` to all of ``(W, H, K)``, as ``(S, H K)``."""
    scores = torch.einsum("shk,whk->hsw", q, k).to(torch.promote_types(q.dtype, torch.float32)) * q.shape[-1] ** -0.5
    return torch.einsum("hsw,whk->shk", scores.softmax(-1).to(v.dtype), v).flatten(1)
