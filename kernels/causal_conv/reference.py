"""``causal_conv`` as a loop over time: the specification, in plain PyTorch."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from seqzoo.kernels.checks import accumulator


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    activation: str | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``y_t = act(bias + sum_j weight_j x_{t - W + 1 + j})``; arguments as the public function's, taken as checked."""
    dtype = accumulator(x.dtype)
    batch, _, width = x.shape
    taps = weight.shape[1]
    factors = weight.to(dtype).t()  # (W, D)
    if cu_seqlens is None:
        sequences = [x]
    else:
        sequences = [x[:, start:end] for start, end in itertools.pairwise(cu_seqlens.tolist())]
    if initial_state is None:
        states = [x.new_zeros(batch, taps - 1, width)] * len(sequences)
    else:
        states = [initial_state] if cu_seqlens is None else initial_state.split(1)
    outputs, final = [], []
    for sequence, state in zip(sequences, states, strict=True):
        inputs = torch.cat((state, sequence), dim=1)
        for t in range(sequence.shape[1]):
            y = (factors * inputs[:, t : t + taps].to(dtype)).sum(1)
            y = y if bias is None else y + bias.to(dtype)
            outputs.append(F.silu(y) if activation == "silu" else y)
        final.append(inputs[:, sequence.shape[1] :])
    y = torch.stack(outputs, dim=1) if outputs else x[:, :0]
    return y.to(x.dtype), torch.cat(final)
