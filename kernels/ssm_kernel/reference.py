"""The definition of ``ssm_kernel``: the response of a state space to an impulse, one token after the other."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from seqzoo.kernels.ssm_kernel.discretise import StateSpace


def matrices(space: StateSpace) -> tuple[Tensor, Tensor, Tensor]:
    """The discretised transition ``(D, M, M)``, input ``(D, M)`` and readout ``(D, M)``.

    They are dense, and with conjugate pairs hold both halves, M = 2 N.
    """
    poles, b, c = space.poles, space.b, space.c
    pair = space.low_rank
    if space.conjugate_pairs:
        poles, b, c = (torch.cat((value, value.conj()), -1) for value in (poles, b, c))
        pair = None if pair is None else tuple(torch.cat((value, value.conj()), -1) for value in pair)
    A = torch.diag_embed(poles)
    if pair is not None:
        A = A - pair[0].mT @ pair[1].conj()
    step = space.step[:, None, None].to(A.dtype)
    if space.discretisation == "bilinear":
        identity = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
        below = identity - step / 2 * A
        after = torch.linalg.solve(below, identity + step / 2 * A)
        return after, torch.linalg.solve(below, step * b[..., None])[..., 0], c
    # the exponential of a matrix with one more column, for the input, and one more row, of zeros
    column = pad(step * b[..., None], (A.shape[-1], 0, 0, 1))
    exponential = torch.linalg.matrix_exp(pad(step * A, (0, 1, 0, 1)) + column)
    return exponential[:, :-1, :-1], exponential[:, :-1, -1], c


def ssm_kernel(space: StateSpace, length: int) -> Tensor:
    """As :func:`seqzoo.ops.ssm_kernel`, in the precision of the space."""
    A, state, c = matrices(space)
    taps = []
    for _ in range(length):
        taps.append((c * state).sum(-1).real)
        state = (A @ state[..., None])[..., 0]
    return torch.stack(taps, -1) if taps else c.real[:, :0]
