"""``causal_conv`` in PyTorch operations: any device, any dtype, no compiler.

Every sequence is laid out behind the inputs before it, its state, so that a window of W rows never reaches into another
sequence: row ``i`` of state ``s`` lies at ``cu[s] + (W - 1) s + i``, and the window of token ``t`` begins at
``t + (W - 1) s``. The last W - 1 rows of a sequence are its final state, however short it is.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from seqzoo.kernels.checks import accumulator
from seqzoo.kernels.dispatch import check_boundaries
from seqzoo.packing import Packing


class Layout(NamedTuple):
    """Where things lie, as int64 indices of rows.

    Attributes:
        windows: ``(B * T,)``, the first row of every token's window; the token is its last.
        initial: ``(S * (W - 1),)``, the rows of the states before the sequences.
        final: ``(S * (W - 1),)``, the rows of those after them.
    """

    windows: Tensor
    initial: Tensor
    final: Tensor


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: str | None,
) -> tuple[Tensor, Tensor]:
    """As the op ``causal_conv_forward``."""
    layout = _layout(x, weight, cu_seqlens)
    rows = _rows(x, weight, initial_state, layout)
    final_state = rows[layout.final].unflatten(0, (-1, weight.shape[1] - 1))
    y = _convolve(rows.to(accumulator(x.dtype)), weight, bias)[layout.windows]
    y = F.silu(y) if activation == "silu" else y
    return y.to(x.dtype).view(x.shape), final_state


def backward(
    grad_y: Tensor,
    grad_final_state: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As the op ``causal_conv_backward``."""
    dtype = accumulator(x.dtype)
    layout = _layout(x, weight, cu_seqlens)
    rows = _rows(x, weight, initial_state, layout).to(dtype)
    grad = grad_y.to(dtype).flatten(0, 1)
    if activation == "silu":
        inner = _convolve(rows, weight, bias)[layout.windows]
        gate = torch.sigmoid(inner)
        grad = grad * gate * (1 + inner * (1 - gate))
    taps, length = weight.shape[1], rows.shape[0] - weight.shape[1] + 1
    # at the first row of its window; W - 1 empty rows before, for what the first rows receive
    placed = grad.new_zeros(length + taps - 1, x.shape[2]).index_copy(0, layout.windows + taps - 1, grad)
    factors = weight.to(dtype)
    spread = grad.new_zeros(length, x.shape[2])
    grad_weight = torch.empty_like(factors)
    for j in range(taps):
        spread += placed[taps - 1 - j : taps - 1 - j + length] * factors[:, j]
        grad_weight[:, j] = (grad * rows[layout.windows + j]).sum(0)
    spread = spread.index_copy(0, layout.final, spread[layout.final] + grad_final_state.to(dtype).flatten(0, 1))
    spread = spread.to(x.dtype)
    return (
        spread[layout.windows + taps - 1].view(x.shape),
        grad_weight.to(weight.dtype),
        weight.new_empty(0) if bias is None else grad.sum(0).to(bias.dtype),
        x.new_empty(0) if initial_state is None else spread[layout.initial].view(initial_state.shape),
    )


def final_states(x: Tensor, weight: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """The last W - 1 inputs of every sequence."""
    layout = _layout(x, weight, cu_seqlens)
    return _rows(x, weight, initial_state, layout)[layout.final].unflatten(0, (-1, weight.shape[1] - 1))


def _layout(x: Tensor, weight: Tensor, cu_seqlens: Tensor | None) -> Layout:
    check_boundaries(cu_seqlens, x.shape[1])
    batch, total, _ = x.shape
    if cu_seqlens is None:
        cu_seqlens = torch.arange(batch + 1, device=x.device) * total
    before = weight.shape[1] - 1
    packing = Packing._derive(cu_seqlens, batch * total, None)
    starts = cu_seqlens.to(torch.int64) + before * torch.arange(packing.n_sequences + 1, device=x.device)
    offsets = torch.arange(before, device=x.device)
    return Layout(
        torch.arange(batch * total, device=x.device) + before * packing.sequence_index,
        (starts[:-1, None] + offsets).flatten(),
        (starts[1:, None] - before + offsets).flatten(),
    )


def _rows(x: Tensor, weight: Tensor, initial_state: Tensor | None, layout: Layout) -> Tensor:
    """The sequences behind their states, and W - 1 rows more, which windows that begin at the last rows reach."""
    before = weight.shape[1] - 1
    rows = x.new_zeros(layout.windows.shape[0] + layout.initial.shape[0] + before, x.shape[2])
    rows = rows.index_copy(0, layout.windows + before, x.flatten(0, 1))
    return rows if initial_state is None else rows.index_copy(0, layout.initial, initial_state.flatten(0, 1))


def _convolve(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The sum over the window that begins at each row, with the bias."""
    length = rows.shape[0] - weight.shape[1] + 1
    factors = weight.to(rows.dtype)
    total = rows.new_zeros(length, rows.shape[1]) if bias is None else bias.to(rows.dtype).expand(length, -1)
    for j in range(weight.shape[1]):
        total = total + rows[j : j + length] * factors[:, j]
    return total
