"""``gated_scan`` on Triton: the kernels of ``linear_scan``, which read the gates from the raw projections.

Bytes an element in bf16: minGRU 6 forward and 10 backward, in segments 10 and 14; minLSTM 8 and 14, in segments 14 and 20.
"""

from __future__ import annotations

from torch import Tensor

from seqzoo.kernels.gated_scan.op import CELLS
from seqzoo.kernels.launch import run
from seqzoo.kernels.linear_scan.gpu import Source, plan_backward, plan_forward


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
    width = x.shape[2] // CELLS[cell]
    results, launches = plan_forward(Source(x, x, cell, lo, hi), width, initial_state, cu_seqlens, reverse)
    run(launches, x.device)
    return results


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
    """As the op ``gated_scan_backward``; h is recomputed from ``chunk_states``, which hold the initial state too."""
    source = Source(x, x, cell, lo, hi)
    (grad_x, _, grad_state), launches = plan_backward(
        source, grad_h, grad_final_state, chunk_states, cu_seqlens, reverse
    )
    run(launches, x.device)
    return grad_x, grad_state
