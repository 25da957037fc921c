"""The public ``ssm_scan``: its documentation, its checks and the choice of the way it is computed."""

from __future__ import annotations

import torch
from torch import Tensor

from seqzoo.kernels.checks import (
    COMPLEX_OF,
    accumulator,
    check_activation,
    check_device,
    check_finite,
    check_rank,
    check_same,
    check_shape,
)
from seqzoo.kernels.dispatch import check_boundaries, require, slot, uncast
from seqzoo.kernels.ssm_kernel.discretise import state_space
from seqzoo.kernels.ssm_kernel.op import narrowed
from seqzoo.packing import Packing, assert_values, boundaries


def ssm_scan(
    u: Tensor,
    poles: Tensor,
    b: Tensor,
    c: Tensor,
    step: Tensor,
    initial_state: Tensor | None = None,
    *,
    low_rank: tuple[Tensor, Tensor] | None = None,
    discretisation: str = "zoh",
    conjugate_pairs: bool = False,
    cu_seqlens: Tensor | Packing | None = None,
) -> tuple[Tensor, Tensor]:
    """State spaces ``x' = A x + b u``, ``y = Re(c x)``, one a channel, run over sequences with a state in and out.

    The recurrence whose response to an impulse is :func:`seqzoo.ops.ssm_kernel`, with the same parameters: what S4
    (https://arxiv.org/abs/2111.00396) and S4D (https://arxiv.org/abs/2206.11893) are where there is a state, where
    sequences are packed, and where tokens come one by one. Sequences are cut into chunks: inside one the outputs are a
    product with the Toeplitz matrix of the kernel's first taps, and only states pass from one to the next, through the
    elements of a diagonal transition or the dense matrix of one with a low rank. The cost a token does not depend on
    the length, and no Fourier transform mixes positions.

    Args:
        u: ``(B, T, D)``: float64, float32, bfloat16 or float16.
        poles: ``(D, N)``, complex64, or complex128 for u of float64, as b and c.
        b: ``(D, N)``.
        c: ``(D, N)``, a row: it is not conjugated.
        step: ``(D,)``, real, positive.
        initial_state: ``(B, D, N)``, of the poles' dtype; zero when omitted. With ``cu_seqlens`` one row a sequence,
            ``(S, D, N)``.
        low_rank: As of :func:`seqzoo.ops.ssm_kernel`, like the two that follow.
        discretisation: ``"zoh"`` or ``"bilinear"``.
        conjugate_pairs: Whether the conjugates of all states count, without being stored.
        cu_seqlens: Boundaries of packed sequences, int32 ``(S + 1,)`` from 0 to T, or a Packing; B is then 1.

    Returns:
        y: ``(B, T, D)``, of u's dtype.
        final_state: ``(B, D, N)`` or ``(S, D, N)``, of the poles' dtype. A sequence without tokens returns the state
            that it was given.

    Raises:
        TypeError: If a dtype is none of those above.
        ValueError: If shapes, devices or boundaries disagree, the discretisation is unknown, or it is not
            ``"bilinear"`` with a low rank; under ``seqzoo.ops.checks`` if a pole's real part is positive or a step not.
        RuntimeError: If an implementation asked for by name cannot run; if it is differentiated twice, forward or under
            ``torch.func``, which ``backend("reference")`` allows.

    Example:
        >>> import torch
        >>> from seqzoo.ops import ssm_scan
        >>> poles, ones = torch.full((1, 1), -1.0 + 0j), torch.ones(1, 1, dtype=torch.complex64)
        >>> step = torch.full((1,), 0.5)
        >>> y, state = ssm_scan(torch.ones(1, 3, 1), poles, ones, ones, step, discretisation="bilinear")
        >>> y.flatten(), state.flatten()
        (tensor([0.4000, 0.6400, 0.7840]), tensor([0.7840+0.j]))
    """
    if slot.parallel is not None:
        space = {"low_rank": low_rank, "discretisation": discretisation, "conjugate_pairs": conjugate_pairs}
        return slot.parallel.ssm_scan(u, poles, b, c, step, initial_state, space, cu_seqlens)
    check_activation("u", u)
    check_rank("u", u, 3, "(B, T, D)")
    space = state_space(poles, b, c, step, low_rank, discretisation, conjugate_pairs)
    check_same("poles", poles, f"u of {u.dtype}", COMPLEX_OF[accumulator(u.dtype)])
    batch, total, width = u.shape
    check_shape("poles", poles, (width, poles.shape[1]), of="(D, N)")
    check_device("poles", poles, "u", u.device)
    bounds = boundaries(cu_seqlens, batch, total, u.device)
    if initial_state is not None:
        check_same("initial_state", initial_state, "the poles", poles.dtype)
        rows, letters = (batch, "(B, D, N)") if bounds is None else (bounds.shape[0] - 1, "(S, D, N)")
        check_shape("initial_state", initial_state, (rows, *poles.shape), of=letters)
        check_device("initial_state", initial_state, "u", u.device)
    check_finite(u=u, initial_state=initial_state)
    if slot.backend == "reference":
        check_boundaries(bounds, total)
        from seqzoo.kernels.ssm_scan import reference

        accumulated = u.to(accumulator(u.dtype))
        y, final_state = reference.ssm_scan(accumulated, narrowed(space, poles.dtype), initial_state, bounds)
        return y.to(u.dtype), final_state
    require(u.device, poles.dtype == torch.complex128)
    if isinstance(cu_seqlens, Tensor) and u.device.type == "cuda":
        assert_values(cu_seqlens, total)
    if not torch.compiler.is_compiling():
        check_boundaries(bounds, total)
    from seqzoo.kernels.ssm_scan import chunked

    with uncast(u.device):
        given = None if initial_state is None else initial_state.contiguous()
        return chunked.ssm_scan(u.contiguous(), space, given, bounds, poles.dtype)
