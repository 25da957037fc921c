"""``gated_scan`` in PyTorch operations on whole chunks: the gates around the chunked ``linear_scan``."""

from __future__ import annotations

import torch
from torch import Tensor

from seqzoo.kernels.gated_scan.op import CELLS
from seqzoo.kernels.gated_scan.reference import gates, logit
from seqzoo.kernels.linear_scan import chunked


def forward(
    x: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    cell: str,
    lo: float,
    hi: float,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As the op ``gated_scan_forward``."""
    a, b = gates(x, cell, lo, hi)
    h, final_state, chunk_states = chunked.forward(a, b, initial_state, cu_seqlens, reverse)
    return h.to(x.dtype), final_state, chunk_states


def backward(
    grad_h: Tensor,
    grad_final_state: Tensor,
    x: Tensor,
    initial_state: Tensor | None,
    h: Tensor | None,
    chunk_states: Tensor,
    cu_seqlens: Tensor | None,
    cell: str,
    lo: float,
    hi: float,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """As the op ``gated_scan_backward``."""
    a, b = gates(x, cell, lo, hi)
    grad_a, grad_b, grad_state = chunked.backward(
        grad_h, grad_final_state, a, b, initial_state, h, chunk_states, cu_seqlens, reverse
    )
    *raw, value = x.to(a.dtype).chunk(CELLS[cell], dim=-1)
    weight = logit(raw)
    # 1 - z would cancel where the gate is open
    z, rest = torch.sigmoid(weight), torch.sigmoid(-weight)
    grad_logit = (grad_b * value - (hi - lo) * grad_a) * z * rest
    if cell == "min_lstm":
        forget, enter = raw
        parts = (-torch.sigmoid(-forget) * grad_logit, torch.sigmoid(-enter) * grad_logit)
    else:
        parts = (grad_logit,)
    return torch.cat((*parts, grad_b * z), dim=-1).to(x.dtype), grad_state
