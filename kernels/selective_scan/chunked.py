"""``selective_scan`` in PyTorch operations on whole chunks: any device, any dtype, no compiler.

A loop over chunks of ``CHUNK`` tokens makes a and b of one chunk at a time and solves it by doubling. Chunks are cut
regardless of sequence boundaries, which are masks on the doubling and on what enters a chunk.

Conjugates are physical: a compiled graph runs an op without what resolves lazy ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from seqzoo.kernels.checks import accumulator
from seqzoo.kernels.dispatch import check_boundaries
from seqzoo.kernels.linear_scan.chunked import double
from seqzoo.kernels.selective_scan.op import CHUNK
from seqzoo.kernels.selective_scan.reference import coefficients, step_of


@dataclass
class _Chunk:
    """Some tokens' recurrence, ``h = factor h_before + addend``, and where in their sequences they are.

    Attributes:
        span: Which tokens.
        u: ``(B, C, D)``.
        step: ``(B, C, D)``.
        B: ``(B, C, D, N)``, of every channel.
        C: ``(B, C, D, N)``.
        factor: ``(B, C, D, N)``.
        addend: ``(B, C, D, N)``.
        rows: The sequence of every token, ``(B, C)``.
        since: How many tokens of the sequence come before, ``(B, C)``.
        until: How many come after, ``(B, C)``.
    """

    span: slice
    u: Tensor
    step: Tensor
    B: Tensor
    C: Tensor
    factor: Tensor
    addend: Tensor
    rows: Tensor
    since: Tensor
    until: Tensor

    @property
    def starts(self) -> Tensor:
        """Whether a token is its sequence's first, ``(B, C, 1, 1)``."""
        return (self.since == 0)[..., None, None]

    @property
    def ends(self) -> Tensor:
        """Whether a token is its sequence's last, ``(B, C, 1, 1)``."""
        return (self.until == 0)[..., None, None]

    def solve(self, entering: Tensor, given: Tensor) -> Tensor:
        """The states after every token, from those before the chunk and those that the tokens' sequences began with."""
        place = torch.arange(self.rows.shape[1], device=self.rows.device)
        before = torch.where((self.since > place)[..., None, None], entering[:, None], given)
        factor, addend = _double(self.factor, self.addend, torch.minimum(self.since, place))
        return addend + factor * before

    def adjoint(self, sources: Tensor, carry: Tensor) -> Tensor:
        """The gradients in the states, of those in what reads them and of what the next chunk hands back."""
        place = torch.arange(self.rows.shape[1], device=self.rows.device)
        sources = sources.clone()
        sources[:, -1] += torch.where(self.ends[:, -1], 0, carry)
        following = self.factor.conj_physical().roll(-1, 1)
        reach = torch.minimum(self.until, place.flip(0))
        _, gamma = _double(following.flip(1), sources.flip(1), reach.flip(1))
        return gamma.flip(1)


def _double(a: Tensor, b: Tensor, reach: Tensor) -> tuple[Tensor, Tensor]:
    composed = double(a.flatten(2), b.flatten(2), reach)
    return composed[0].unflatten(2, a.shape[2:]), composed[1].unflatten(2, a.shape[2:])


def _chunks(
    u: Tensor, step: Tensor, A: Tensor | None, B: Tensor, C: Tensor, cu_seqlens: Tensor | None, backwards: bool
) -> Iterator[_Chunk]:
    batch, total, width = u.shape
    tokens = torch.arange(total, device=u.device)
    if cu_seqlens is None:
        rows = torch.arange(batch, device=u.device)[:, None].expand(batch, total)
        since, until = (value.expand(batch, total) for value in (tokens, total - 1 - tokens))
    else:
        bounds = cu_seqlens.to(torch.int64)
        rows = torch.bucketize(tokens, bounds[1:], right=True)[None]
        since, until = tokens - bounds[rows], bounds[rows + 1] - 1 - tokens
    dtype, repeats = accumulator(B.dtype), width // B.shape[2]
    firsts = range(0, total, CHUNK)
    for first in reversed(firsts) if backwards else firsts:
        span = slice(first, first + CHUNK)
        # a channel's row of its group
        b, c = (value[:, span].to(dtype).repeat_interleave(repeats, dim=2) for value in (B, C))
        factor, addend = coefficients(u[:, span], step[:, span], A, b)
        places = rows[:, span], since[:, span], until[:, span]
        yield _Chunk(span, u[:, span], step[:, span], b, c, factor, addend, *places)


def _put(target: Tensor, chunk: _Chunk, where: Tensor, values: Tensor) -> None:
    """``target[row of the token] = value`` for the tokens marked; the last row of the target takes all others'."""
    rows = torch.where(where[..., 0, 0], chunk.rows, target.shape[0] - 1)
    target.index_copy_(0, rows.flatten(), values.flatten(0, 1))


def _initial(B: Tensor, u: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    if initial_state is not None:
        return initial_state
    rows = u.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return B.new_zeros((rows, u.shape[2], B.shape[3]), dtype=accumulator(B.dtype))


def forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor | None,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As the op ``selective_scan_forward``."""
    check_boundaries(cu_seqlens, u.shape[1])
    dtype = accumulator(u.dtype)
    values, step = u.to(dtype), step_of(delta, delta_bias, delta_softplus, dtype)
    state = _initial(B, u, initial_state, cu_seqlens)
    A = None if A is None else A.to(state.dtype)
    final = pad(state, (0, 0, 0, 0, 0, 1))
    y = torch.empty_like(values)
    h, kept = torch.zeros_like(state[:1]).expand(u.shape[0], -1, -1), []
    for chunk in _chunks(values, step, A, B, C, cu_seqlens, backwards=False):
        kept.append(h.transpose(1, 2))
        states = chunk.solve(h, state[chunk.rows])
        out = (chunk.C * states).sum(-1)
        y[:, chunk.span] = out.real if out.is_complex() else out
        _put(final, chunk, chunk.ends, states)
        h = states[:, -1]
    if D is not None:
        y += D.to(dtype) * values
    if z is not None:
        y *= torch.nn.functional.silu(z.to(dtype))
    chunk_states = torch.cat(kept) if kept else state.new_empty((0, state.shape[2], state.shape[1]))
    return y.to(u.dtype), final[:-1].contiguous(), chunk_states.contiguous()


def backward(
    grad_y: Tensor,
    grad_final_state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor | None,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    chunk_states: Tensor,
    cu_seqlens: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor, ...]:
    """As the op ``selective_scan_backward``.

    With gamma_t the gradient of the loss in h_t through everything later, ``gamma_t = conj(C_t) g_t + conj(a_{t+1})
    gamma_{t+1}``: the recurrence the other way. a and b pass it on to the step, u, B and A.
    """
    dtype = accumulator(u.dtype)
    values, step = u.to(dtype), step_of(delta, delta_bias, delta_softplus, dtype)
    state = _initial(B, u, initial_state, cu_seqlens)
    decay = None if A is None else A.to(state.dtype)
    arriving = grad_y.to(dtype)
    raw = torch.zeros_like(arriving) if z is None else z.to(dtype)
    gate = torch.sigmoid(raw)
    out = arriving if z is None else arriving * raw * gate
    grad_u = torch.zeros_like(out) if D is None else out * D.to(dtype)
    y = torch.zeros_like(out) if D is None else D.to(dtype) * values
    grad_step = torch.empty_like(out)
    grad_A = None if decay is None else torch.zeros_like(decay)
    grad_B, grad_C = (value.new_empty(value.shape, dtype=state.dtype) for value in (B, C))
    grad_state = pad(grad_final_state, (0, 0, 0, 0, 0, 1))
    carry = torch.zeros_like(state[:1]).expand(u.shape[0], -1, -1)
    index = chunk_states.shape[0]
    for chunk in _chunks(values, step, decay, B, C, cu_seqlens, backwards=True):
        index -= u.shape[0]
        entering = chunk_states[index : index + u.shape[0]].transpose(1, 2)
        given = state[chunk.rows]
        h = chunk.solve(entering, given)
        g = out[:, chunk.span, :, None]
        sources = chunk.C.conj_physical() * g + torch.where(chunk.ends, grad_final_state[chunk.rows], 0)
        gamma = chunk.adjoint(sources, carry)
        handed = chunk.factor.conj_physical() * gamma
        carry = handed[:, 0]
        _put(grad_state, chunk, chunk.starts, handed)
        before = torch.where(chunk.starts, given, torch.cat((entering[:, None], h[:, :-1]), dim=1))
        grad_factor = gamma * before.conj_physical()
        read = (chunk.C * h).sum(-1)
        y[:, chunk.span] += read.real if read.is_complex() else read
        grad_C[:, chunk.span] = _by_group(h.conj_physical() * g, C)
        through_u, through_step, through_B, through_A = _coefficients_backward(chunk, decay, grad_factor, gamma)
        grad_u[:, chunk.span] += through_u
        grad_step[:, chunk.span] = through_step
        grad_B[:, chunk.span] = _by_group(through_B, B)
        if grad_A is not None and through_A is not None:
            grad_A += through_A
    if delta_softplus:
        before = delta.to(dtype) if delta_bias is None else delta.to(dtype) + delta_bias.to(dtype)
        grad_step = grad_step * torch.sigmoid(before)
    grad_z = None if z is None else arriving * y * gate * (1 + raw * (1 - gate))
    found = (
        (u, grad_u),
        (delta, grad_step),
        (A, grad_A),
        (B, grad_B),
        (C, grad_C),
        (D, (out * values).sum((0, 1))),
        (z, grad_z),
        (delta_bias, grad_step.sum((0, 1))),
    )
    nothing = u.new_empty(0)
    return *(
        nothing.clone() if given is None or gradient is None else gradient.to(given.dtype).contiguous()
        for given, gradient in found
    ), grad_state[:-1].contiguous()


def _by_group(values: Tensor, like: Tensor) -> Tensor:
    """The sum over the channels of each group: ``(B, T, D, N)`` to ``(B, T, G, N)``."""
    return values.unflatten(2, (like.shape[2], -1)).sum(3)


def _coefficients_backward(
    chunk: _Chunk, A: Tensor | None, grad_factor: Tensor, grad_addend: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients in u, the step, B of every channel and A."""
    u, step, B = chunk.u[..., None], chunk.step[..., None], chunk.B
    if A is not None:
        through = grad_factor * chunk.factor.conj_physical()
        along = grad_addend * B.conj_physical()
        grad_step = through * A.conj_physical() + along * u
        grad_u = along * step
        if along.is_complex():
            grad_step, grad_u = grad_step.real, grad_u.real
        return grad_u.sum(-1), grad_step.sum(-1), grad_addend * (step * u), (through * step).sum((0, 1))
    square = B.square()
    inverse = 1 / (1 + step * square.sum(-1, keepdim=True))
    rate = step * inverse
    grad_rate = (grad_addend * B * u - grad_factor * square).sum(-1, keepdim=True)
    grad_B = grad_addend * rate * u - 2 * B * (grad_factor * rate + grad_rate * rate.square())
    grad_u = (grad_addend * B).sum(-1) * rate[..., 0]
    return grad_u, (grad_rate * inverse.square())[..., 0], grad_B, None
