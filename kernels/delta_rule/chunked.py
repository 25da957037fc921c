"""``delta_rule`` in PyTorch operations on whole chunks: any device, any dtype, no compiler.

In a chunk that the state S enters, with ``P_ij`` the product of ``k_i`` and what is left of ``k_j`` at token i, j < i,
and ``Q_ij`` that of ``q_i``, j <= i, what the tokens write is the solution of a triangular system::

    u = (I + diag(beta) P)^-1 diag(beta) (v - reach k S)
    o = scale (reach q S + Q u)
    S' = whole S + (rest k)^T u

The system could be solved for all chunks at once, into a part without S and one linear in it. It is solved when S is
known, and by substitution, not by an inverse: so the tokens see what was rounded in S and correct it, as those of the
recurrence do, where solutions from larger terms made two to three times its error.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from seqzoo.kernels.checks import accumulator
from seqzoo.kernels.chunks import Chunks, Decay, KeyDecay, chunk_length
from seqzoo.kernels.delta_rule.reference import delta_rule
from seqzoo.kernels.dispatch import check_boundaries

# tokens: the more there are beside the keys' dimensions, the larger the terms that cancel in the solution, and only the
# next chunk corrects what they round; in float64 that does not matter
CHUNK = {torch.float32: 16, torch.float64: 64}


@dataclass
class _Solved:
    """All chunks, ``(N, B, H, C, ...)``, with what their tokens write.

    Attributes:
        chunks: Where they are.
        decay: What decays in them.
        q: Scaled.
        k: The keys.
        beta: ``(N, B, H, C, 1)``.
        error: ``v - reach k S``, what the state that enters lacks.
        near: P.
        system: ``diag(beta) P``.
        entering: The states before, ``(N, B, H, K, V)``.
        leaving: The states after.
        u: What is written.
    """

    chunks: Chunks
    decay: Decay
    q: Tensor
    k: Tensor
    beta: Tensor
    error: Tensor
    near: Tensor
    system: Tensor
    entering: Tensor
    leaving: Tensor
    u: Tensor


def _solve(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    given: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
) -> _Solved:
    batch, total, heads, _ = v.shape
    size = chunk_length(CHUNK[given.dtype], total, 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1)
    chunks = Chunks(batch, total, cu_seqlens, size, q.device)

    def cut(value: Tensor) -> Tensor:
        return chunks.cut(value.to(given.dtype))

    # a head's row of its group
    queries, keys = (cut(value).repeat_interleave(heads // q.shape[2], dim=2) for value in (q, k))
    queries, values, rates = queries * scale, cut(v), cut(beta[..., None])
    if log_decay is None:
        decay = Decay(torch.zeros_like(rates))
    else:
        decay = Decay(cut(log_decay[..., None])) if log_decay.dim() == 3 else KeyDecay(cut(log_decay))
    near = decay.pairs(keys, keys).tril(-1)
    system = rates * near
    reading, lasting = decay.reach * keys, (decay.rest * keys).transpose(-1, -2)
    entering = given.new_empty((chunks.number, batch, *given.shape[1:]))
    leaving, error, u = torch.empty_like(entering), torch.empty_like(values), torch.empty_like(values)
    carry = torch.zeros_like(given[:1]).expand(batch, -1, -1, -1)
    for chunk in range(chunks.number):
        entering[chunk] = chunks.enter(chunk, given, carry)
        error[chunk] = values[chunk] - reading[chunk] @ entering[chunk]
        u[chunk] = _substitute(system[chunk], rates[chunk] * error[chunk], upper=False)
        leaving[chunk] = decay.whole[chunk] * entering[chunk] + lasting[chunk] @ u[chunk]
        carry = leaving[chunk]
    return _Solved(chunks, decay, queries, keys, rates, error, near, system, entering, leaving, u)


def _substitute(system: Tensor, right: Tensor, *, upper: bool) -> Tensor:
    """``(I + system)^-1 right``; what the system has on its diagonal is not looked at."""
    return torch.linalg.solve_triangular(system, right, upper=upper, unitriangular=True)


def _given(q: Tensor, v: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    if initial_state is not None:
        return initial_state
    rows = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return q.new_zeros((rows, v.shape[2], q.shape[3], v.shape[3]), dtype=accumulator(q.dtype))


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """As the op ``delta_rule_forward``."""
    check_boundaries(cu_seqlens, q.shape[1])
    if q.shape[1] == 1 and cu_seqlens is None:
        # the definition takes fewer operations than the chunks of one token
        return delta_rule(q, k, v, beta, log_decay, initial_state, scale=scale)
    given = _given(q, v, initial_state, cu_seqlens)
    found = _solve(q, k, v, beta, log_decay, given, cu_seqlens, scale)
    o = found.decay.reach * found.q @ found.entering + found.decay.pairs(found.q, found.k) @ found.u
    chunks = found.chunks
    return chunks.join(o).to(v.dtype).contiguous(), chunks.keep(chunks.last, found.leaving, given)


def backward(
    grad_o: Tensor,
    grad_final_state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
) -> tuple[Tensor, ...]:
    """As the op ``delta_rule_backward``.

    With G the gradient in the state behind a chunk, that in u is ``Q^T g + rest k G``, and z, the solution of the
    transposed system for it, leads to v, beta and P. Before the chunk G is
    ``whole G + (reach q)^T g - (reach k)^T diag(beta) z``: the same recurrence the other way.
    """
    check_boundaries(cu_seqlens, q.shape[1])
    given = _given(q, v, initial_state, cu_seqlens)
    found = _solve(q, k, v, beta, log_decay, given, cu_seqlens, scale)
    chunks, decay, u, keys, queries = found.chunks, found.decay, found.u, found.k, found.q
    g = chunks.cut(grad_o.to(given.dtype))
    lasting, transposed = decay.rest * keys, found.system.transpose(-1, -2)
    reading, reached = ((decay.reach * value).transpose(-1, -2) for value in (keys, queries))
    grad_u = decay.pairs(queries, keys).transpose(-1, -2) @ g
    handed, z, grad_v = reached @ g, torch.empty_like(u), torch.empty_like(u)
    grad_leaving = torch.empty_like(found.entering)
    carry = torch.zeros_like(given[:1]).expand(v.shape[0], -1, -1, -1)
    for chunk in reversed(range(chunks.number)):
        grad_leaving[chunk] = chunks.leave(chunk, grad_final_state, carry)
        grad_u[chunk] += lasting[chunk] @ grad_leaving[chunk]
        z[chunk] = _substitute(transposed[chunk], grad_u[chunk], upper=True)
        grad_v[chunk] = found.beta[chunk] * z[chunk]
        handed[chunk] += decay.whole[chunk] * grad_leaving[chunk] - reading[chunk] @ grad_v[chunk]
        carry = handed[chunk]
    grad_beta = (z * (found.error - found.near @ u)).sum(-1)
    before, behind = found.entering.transpose(-1, -2), grad_leaving.transpose(-1, -2)
    read, recalled, written = g @ before, grad_v @ before, u @ behind
    pairs = decay.grade_pairs((g @ u.transpose(-1, -2)).tril(), queries, keys)
    near = decay.grade_pairs((grad_v @ u.transpose(-1, -2)).tril(-1).neg(), keys, keys)
    grad_q = scale * (decay.reach * read + pairs[0])
    grad_k = decay.rest * written - decay.reach * recalled + pairs[1] + near[0] + near[1]
    grad_decay = q.new_empty(0)
    if log_decay is not None:
        of_reach = decay.reach * (queries * read - keys * recalled)
        of_whole = decay.whole * (found.entering * grad_leaving).sum(-1, keepdim=True)
        edges = decay.grade_edges(of_reach, decay.rest * keys * written, of_whole)
        grad_decay = chunks.join(edges + pairs[2] + near[2]).reshape(log_decay.shape).to(log_decay.dtype)
    grad_q, grad_k = (
        chunks.join(value).unflatten(2, (q.shape[2], -1)).sum(3).to(q.dtype) for value in (grad_q, grad_k)
    )
    grad_v, grad_beta = chunks.join(grad_v).to(v.dtype).contiguous(), chunks.join(grad_beta[..., None])[..., 0]
    grad_state = chunks.keep(chunks.first, handed, grad_final_state)
    return grad_q, grad_k, grad_v, grad_beta.to(beta.dtype).contiguous(), grad_decay.contiguous(), grad_state
