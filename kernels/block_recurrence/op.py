"""State vectors that attend to one another and to a block of tokens, block after block, and then change."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seqzoo.kernels.derivatives import needs_gradient, once
from seqzoo.kernels.dispatch import define, slot, uncast


def block_recurrence(
    states: Tensor,
    state_kv: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Tensor,
    ids: Tensor,
    in_weight: Tensor,
    in_bias: Tensor | None,
    gate_weight: Tensor,
    gate_bias: Tensor,
    keep: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The horizontal direction of a block-recurrent transformer, https://arxiv.org/abs/2203.07852, section 3.1.

    Of every sequence, from one block c to the next c', with the keys k_b and values v_b of the block's tokens::

        q_s, q_t, k_s, v_s = W_in (rms_norm(c) + ids) + b_in
        h = [attention(q_s, k_s, v_s), attention(q_t, k_b, v_b)]
        c' = sigmoid(keep) c + (1 - sigmoid(keep)) (W_gate h + b_gate)
        c' = sigmoid(f + 1) c + sigmoid(i - 1) tanh(z)   where keep is None, with z, i, f = W_gate h + b_gate

    Called with arguments that :class:`seqzoo.layers.BlockRecurrent` made. The layout is read on the host, once
    forwards and once backwards. Differentiable once, in all floating arguments.

    Args:
        states: c before the first block of every sequence, ``(R, S, D)``, float32 or float64.
        state_kv: ``[k_s, v_s]`` of the blocks that sequences are inside of, ``(R, S, 2 D)``; others are not read.
        k: Keys by blocks, those of a sequence behind one another, ``(N, W, H, K)``, ``H K = D``.
        v: As k.
        layout: int64 ``(3, R)``: of every sequence whether it is inside a block (not 0), the blocks that it has, and
            how many of them are complete.
        ids: ``(S, D)``.
        in_weight: ``(4 D, D)``, like the next two of any precision: it is taken in that of k.
        in_bias: ``(4 D,)``.
        gate_weight: ``(D, 2 D)``; ``(3 D, 2 D)`` where ``keep`` is None.
        gate_bias: ``(D,)`` or ``(3 D,)``.
        keep: ``(D,)``.

    Returns:
        kv: ``[k_s, v_s]`` during every block, ``(N, S, 2 D)``, of k's dtype; zero behind the last one.
        final_states: c behind the last complete block of every sequence, ``(R, S, D)``.
    """
    if slot.backend == "reference":
        from seqzoo.kernels.block_recurrence import reference

        with uncast(k.device):
            return reference.block_recurrence(
                states, state_kv, k, v, layout, ids, in_weight, in_bias, gate_weight, gate_bias, keep
            )
    arguments = (states, state_kv, k, v, layout, ids, in_weight, in_bias, gate_weight, gate_bias, keep)
    if not needs_gradient(*arguments):
        return _forward(*arguments, slot.backend or "")[:2]
    kv, final_states = _BlockRecurrence.apply(*arguments, slot.backend or "")
    return kv, final_states


def _forward_fake(
    states: Tensor, state_kv: Tensor, k: Tensor, v: Tensor, layout: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    blocks = k.shape[0]
    kv = k.new_empty((blocks, *state_kv.shape[1:]))
    return kv, states.new_empty(states.shape), states.new_empty((blocks, *states.shape[1:]))


def _backward_fake(grad_kv: Tensor, grad_final_states: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *tensors, _, _, _ = arguments
    k = tensors[2]
    return tuple(
        k.new_empty(0) if value is None else value.new_empty(value.shape)
        for value in tensors
        if value is not tensors[_LAYOUT]
    )


_LAYOUT = 4
_ARGUMENTS = (
    "Tensor states, Tensor state_kv, Tensor k, Tensor v, Tensor layout, Tensor ids, Tensor in_weight, Tensor? in_bias,"
    " Tensor gate_weight, Tensor gate_bias, Tensor? keep"
)

_forward = define(
    "block_recurrence",
    "forward",
    f"({_ARGUMENTS}, str backend) -> (Tensor kv, Tensor final_states, Tensor starts)",
    _forward_fake,
)
_backward = define(
    "block_recurrence",
    "backward",
    f"(Tensor grad_kv, Tensor grad_final_states, {_ARGUMENTS}, Tensor kv, Tensor starts, str backend)"
    " -> (Tensor grad_states, Tensor grad_state_kv, Tensor grad_k, Tensor grad_v, Tensor grad_ids,"
    " Tensor grad_in_weight, Tensor grad_in_bias, Tensor grad_gate_weight, Tensor grad_gate_bias, Tensor grad_keep)",
    _backward_fake,
)


class _BlockRecurrence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        *tensors, ctx.backend = arguments
        kv, final_states, starts = _forward(*arguments)
        ctx.save_for_backward(*tensors, kv, starts)
        return kv, final_states

    @staticmethod
    @once
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore - torch types no arity
        *tensors, kv, starts = ctx.saved_tensors
        found = list(_backward(*gradients, *tensors, kv, starts, ctx.backend))
        found.insert(_LAYOUT, None)
        given = [None if value is None else gradient for value, gradient in zip(tensors, found, strict=True)]
        return *given, None
