"""The definition of ``ssm_scan``: a state space with dense matrices, one token after the other."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from seqzoo.kernels.ssm_kernel.discretise import StateSpace
from seqzoo.kernels.ssm_kernel.reference import matrices


def ssm_scan(
    u: Tensor, space: StateSpace, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As :func:`seqzoo.ops.ssm_scan`, in the precision of the space; the outputs are not rounded to u's dtype."""
    A, b, c = matrices(space)
    batch, total, width = u.shape
    if cu_seqlens is None:
        bounds = [(row, 0, total) for row in range(batch)]
    else:
        bounds = [(0, start, end) for start, end in itertools.pairwise(cu_seqlens.tolist())]
    outputs, finals = [], []
    for index, (row, start, end) in enumerate(bounds):
        state = torch.zeros_like(space.poles) if initial_state is None else initial_state[index].to(space.poles.dtype)
        if space.conjugate_pairs:
            state = torch.cat((state, state.conj()), -1)
        for token in range(start, end):
            state = (A @ state[..., None])[..., 0] + b * u[row, token, :, None]
            outputs.append((c * state).sum(-1).real)
        finals.append(state[:, : space.poles.shape[1]])
    y = torch.stack(outputs).view(batch, total, width) if outputs else space.step.new_zeros((batch, total, width))
    return y, torch.stack(finals) if finals else space.poles.new_zeros((0, *space.poles.shape))
