"""``gated_scan`` on Triton: the kernels of ``linear_scan``, which read the gates from the raw projections.

Bytes an element in bf16: minGRU 6 forward and 10 backward, in segments 10 and 14; minLSTM 8 and 14, in segments 14 and
20. Launches as there.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from seqzoo.kernels.gated_scan.op import CELLS
from seqzoo.kernels.launch import Example, run
from seqzoo.kernels.linear_scan.gpu import MODES, SHAPES, Source, example, plan_backward, plan_forward


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


def examples(exhaustive: bool) -> Iterator[Example]:
    """What is compiled ahead of time: every form that compiles differently, or one of each kind."""
    few = [
        ("min_gru", torch.bfloat16, "one pass", False, False, False),
        ("min_gru", torch.bfloat16, "segments", True, True, True),
        ("min_lstm", torch.bfloat16, "segments", True, True, False),
    ]
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    every = itertools.product(CELLS, dtypes, MODES, (False, True), (False, True), (False, True))
    for cell, dtype, mode, packed, state, reverse in every if exhaustive else few:
        batch, total, width = SHAPES[mode, packed]
        x = torch.empty((batch, total, CELLS[cell] * width), dtype=dtype, device="meta")
        label = f"{cell}, {str(dtype).removeprefix('torch.')}, {mode},"
        yield from example(label, Source(x, x, cell), width, packed, state, reverse)
