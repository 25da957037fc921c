"""``linear_scan`` in PyTorch operations on whole chunks: any device, any dtype, no compiler.

Within chunks of ``CHUNK`` tokens the recurrence is solved by doubling (Hillis and Steele 1986), all chunks at once; a
loop over chunks carries the state. Sequence boundaries are masks on the doubling, so no value crosses one, not even
NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from seqzoo.kernels.checks import accumulator
from seqzoo.kernels.dispatch import check_boundaries
from seqzoo.kernels.linear_scan.op import CHUNK
from seqzoo.packing import Packing


def forward(
    a: Tensor, b: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """As the op ``linear_scan_forward``."""
    dtype = accumulator(b.dtype)
    h, final_state = scan(a.to(dtype), b.to(dtype), initial_state, cu_seqlens, reverse)
    return h.to(b.dtype).contiguous(), final_state, h.new_empty((0, b.shape[2]))


def backward(
    grad_h: Tensor,
    grad_final_state: Tensor,
    a: Tensor,
    b: Tensor,
    initial_state: Tensor | None,
    h: Tensor | None,
    chunk_states: Tensor,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As the op ``linear_scan_backward``.

    With gamma_t the gradient of the loss in h_t through everything later, ``gamma_t = grad_h_t + conj(a_{t+1})
    gamma_{t+1}``: the same scan the other way, entered by the gradient of the final state with the factor 1.
    """
    dtype = accumulator(b.dtype)
    factors = a.to(dtype).expand(b.shape)
    if h is None:
        h, _ = scan(factors, b.to(dtype), initial_state, cu_seqlens, reverse)
    first, last, lengths = ends(b, cu_seqlens, reverse)
    given = torch.zeros_like(grad_final_state) if initial_state is None else initial_state
    following = _shift(factors, last, torch.ones_like(given), lengths, -1 if not reverse else 1)
    gamma, _ = scan(following.conj().resolve_conj(), grad_h.to(dtype), grad_final_state, cu_seqlens, not reverse)
    previous = _shift(h.to(dtype), first, given, lengths, 1 if not reverse else -1)
    grad_a = gamma * previous.conj()
    grad_a = grad_a.sum((0, 1)) if a.dim() == 1 else grad_a
    at_first = (factors.conj() * gamma).flatten(0, 1)
    if at_first.shape[0]:
        chosen = at_first[first.clamp(max=at_first.shape[0] - 1)]
        grad_state = torch.where((lengths > 0)[:, None], chosen, grad_final_state)
    else:
        grad_state = grad_final_state.clone()
    return grad_a.to(a.dtype).contiguous(), gamma.to(b.dtype).contiguous(), grad_state


def ends(b: Tensor, cu_seqlens: Tensor | None, reverse: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Of every sequence: the row of ``b.flatten(0, 1)`` where the scan enters, where it leaves, and its length."""
    batch, total, _ = b.shape
    if cu_seqlens is None:
        starts = torch.arange(batch, device=b.device) * total
        lengths = torch.full_like(starts, total)
    else:
        starts, lengths = cu_seqlens[:-1].to(torch.int64), cu_seqlens.diff().to(torch.int64)
    stops = (starts + lengths - 1).clamp(min=0)
    return (stops, starts, lengths) if reverse else (starts, stops, lengths)


def _shift(values: Tensor, at: Tensor, fill: Tensor, lengths: Tensor, by: int) -> Tensor:
    """``values`` one token later (``by`` 1) or earlier (-1), with the rows of ``fill`` at the rows ``at``."""
    if values.shape[1] == 0:
        return values
    flat = values.roll(by, dims=1).flatten(0, 1)
    # the row of an empty sequence may be another's, so its fill goes to a row that is cut off afterwards
    rows = torch.where(lengths > 0, at, flat.shape[0])
    return pad(flat, (0, 0, 0, 1)).index_copy(0, rows, fill.to(flat.dtype))[:-1].unflatten(0, values.shape[:2])


def scan(
    a: Tensor, b: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    """The recurrence in the dtype of ``b``; ``a`` may be ``(D,)``."""
    check_boundaries(cu_seqlens, b.shape[1])
    batch, total, width = b.shape
    a = a.expand(b.shape)
    n_sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = b.new_zeros(n_sequences, width) if initial_state is None else initial_state
    if total == 0:
        return b.clone(), state.clone()
    if reverse:
        flipped = None if cu_seqlens is None else total - cu_seqlens.flip(0)
        order = state.flip(0) if cu_seqlens is not None else state
        h, final = _scan(a.flip(1), b.flip(1), order, flipped)
        return h.flip(1), final if cu_seqlens is None else final.flip(0)
    return _scan(a, b, state, cu_seqlens)


def double(a: Tensor, b: Tensor, reach: Tensor) -> tuple[Tensor, Tensor]:
    """Composes every token's recurrence with those of the ``reach`` tokens before it.

    Args:
        a: Factors, ``(..., C, D)``.
        b: Addends, alike.
        reach: int64 ``(..., C)``, at most the token's place; of neighbours of a sequence each has one more.
    """
    step = 1
    while step < a.shape[-2]:
        connected = (reach >= step)[..., None]
        b = torch.where(connected, b + a * b.roll(step, -2), b)
        a = torch.where(connected, a * a.roll(step, -2), a)
        step *= 2
    return a, b


def _scan(a: Tensor, b: Tensor, state: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    batch, total, _ = b.shape
    if cu_seqlens is None:
        positions = torch.arange(total, device=b.device)
        entering = state[:, None]  # (B, 1, D)
    else:
        packing = Packing._derive(cu_seqlens, total, None)
        positions, entering = packing.positions, state[packing.sequence_index][None]  # (1, T, D)
    padded = -(-total // CHUNK) * CHUNK
    a, b = (pad(value, (0, 0, 0, padded - total)).unflatten(1, (-1, CHUNK)) for value in (a, b))  # (B, n, C, D)
    place = torch.arange(CHUNK, device=b.device)
    positions = pad(positions, (0, padded - total)).unflatten(0, (-1, CHUNK))  # (n, C)
    a, b = double(a, b, torch.minimum(positions, place))
    continues = (positions > place)[None, :, :, None]  # the token's sequence began before its chunk
    if cu_seqlens is not None:
        entering = pad(entering, (0, 0, 0, padded - total)).unflatten(1, (-1, CHUNK))
    else:
        entering = entering[:, None].expand(batch, b.shape[1], CHUNK, -1)
    carry, carries = state[:batch], []
    for index in range(b.shape[1]):
        carries.append(carry)
        last = torch.where(continues[:, index, -1], carry, entering[:, index, -1])
        carry = b[:, index, -1] + a[:, index, -1] * last
    before = torch.where(continues, torch.stack(carries, 1)[:, :, None], entering)
    h = (b + a * before).flatten(1, 2)[:, :total]
    if cu_seqlens is None:
        return h, h[:, -1].clone()
    stops = (cu_seqlens[1:].to(torch.int64) - 1).clamp(min=0)
    return h, torch.where((cu_seqlens.diff() > 0)[:, None], h[0, stops], state)
