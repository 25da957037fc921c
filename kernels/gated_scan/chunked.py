"""``gated_scan`` in PyTorch operations on whole chunks: the gates by autograd around the chunked ``linear_scan``."""

from __future__ import annotations

import torch
from torch import Tensor

from seqzoo.kernels.gated_scan.reference import gates
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
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        a, b = gates(leaf, cell, lo, hi)
    with torch.no_grad():
        grad_a, grad_b, grad_state = chunked.backward(
            grad_h, grad_final_state, a, b, initial_state, h, chunk_states, cu_seqlens, reverse
        )
    (grad_x,) = torch.autograd.grad((a, b), leaf, (grad_a, grad_b))
    return grad_x, grad_state
