"""Cross entropy behind a linear map, in chunks of tokens, so that the logits of all tokens never exist at once."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seqzoo.kernels.checks import accumulator
from seqzoo.kernels.derivatives import needs_gradient, once
from seqzoo.kernels.dispatch import library, slot
from seqzoo.modules.options import check_count

IGNORED = -100
CHUNK_LOGITS = 2**24


def linear_cross_entropy(x: Tensor, weight: Tensor, labels: Tensor, chunk_size: int | None = None) -> Tensor:
    """The mean cross entropy of ``x @ weight.T`` against ``labels``.

    The forward pass computes the gradients too, chunk by chunk, where they will be wanted, so no logit is computed
    twice. Second derivatives raise; ``seqzoo.ops.backend("reference")`` computes all logits at once and has them.

    PyTorch's function of this name (in 2.13) does the same in chunks, as fast and as exactly, but is NaN where no token
    counts, returns a bfloat16 loss for bfloat16 inputs, breaks the graph of ``torch.compile`` and takes one backward
    pass alone, so this is not built on it.

    Args:
        x: ``(T, D)``.
        weight: ``(V, D)``, of x's dtype.
        labels: int64 ``(T,)``, from 0 to V - 1, or -100 for a token that does not count.
        chunk_size: Tokens whose logits exist at once; None means as many as hold 2^24 logits, at least 128.

    Returns:
        A scalar, float32 (float64 for float64 inputs); zero where no token counts.

    Raises:
        ValueError: If a label lies outside the vocabulary (on the CPU), or ``chunk_size`` is no positive integer.
    """
    if chunk_size is None:
        chunk_size = max(128, CHUNK_LOGITS // weight.shape[0])
    else:
        chunk_size = check_count("chunk_size", chunk_size)
    # as autocast itself, which leaves float64 alone
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    count = (labels != IGNORED).sum().clamp(min=1)
    if slot.backend == "reference":
        logits = F.linear(x, weight).to(accumulator(x.dtype))
        return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum") / count
    grad = needs_gradient(x, weight)
    return (
        _LinearCrossEntropy.apply(
            x, weight, labels, chunk_size, grad and x.requires_grad, grad and weight.requires_grad
        )
        / count
    )


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, labels: Tensor, chunk_size: int, want_x: bool, want_weight: bool
    ) -> Tensor:
        loss, grad_x, grad_weight = _op(x, weight, labels, chunk_size, want_x, want_weight)
        # x and the weight for what a second derivative would depend on
        ctx.save_for_backward(grad_x, grad_weight, x, weight)
        ctx.wanted = want_x, want_weight
        ctx.dtype = x.dtype
        return loss

    @staticmethod
    @once
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore - torch types no arity
        # in the accumulator's dtype: a loss scale and the number of tokens together may leave float16's range
        scaled = [
            (grad.to(grad_loss.dtype) * grad_loss).to(ctx.dtype) if wanted else None
            for grad, wanted in zip(ctx.saved_tensors[:2], ctx.wanted, strict=True)
        ]
        return *scaled, None, None, None, None


def _run(
    x: Tensor, weight: Tensor, labels: Tensor, chunk_size: int, want_x: bool, want_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of the losses and its gradients, empty where not wanted; the weight's has the accumulator's dtype."""
    _check_labels(labels, weight.shape[0])
    wide = accumulator(x.dtype)
    loss = x.new_zeros((), dtype=wide)
    grad_x = torch.empty_like(x) if want_x else x.new_empty(0)
    grad_weight = torch.zeros_like(weight, dtype=wide) if want_weight else weight.new_empty(0)
    for start in range(0, x.shape[0], chunk_size):
        part = slice(start, start + chunk_size)
        counted = (labels[part] != IGNORED)[:, None]
        targets = labels[part].clamp(min=0)[:, None]
        scores = F.log_softmax(F.linear(x[part], weight).to(wide), dim=-1)
        chosen = scores.gather(1, targets)
        loss -= chosen.where(counted, 0.0).sum()
        if not (want_x or want_weight):
            continue
        grad = scores.exp_()
        # one entry a row: no two threads write to one place
        grad.scatter_(1, targets, grad.gather(1, targets) - 1.0)
        grad = grad.mul_(counted).to(x.dtype)
        if want_x:
            torch.mm(grad, weight, out=grad_x[part])
        if want_weight:
            grad_weight += grad.t() @ x[part]
    return loss, grad_x, grad_weight


def _check_labels(labels: Tensor, vocab_size: int) -> None:
    if labels.device.type != "cpu" or labels.numel() == 0:
        return
    wrong = labels[((labels < 0) | (labels >= vocab_size)) & (labels != IGNORED)]
    if wrong.numel() > 0:
        raise ValueError(f"labels must lie between 0 and {vocab_size - 1}, or be {IGNORED}, got {int(wrong[0])}")


def _fake(
    x: Tensor, weight: Tensor, labels: Tensor, chunk_size: int, want_x: bool, want_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x = torch.empty_like(x) if want_x else x.new_empty(0)
    grad_weight = torch.empty_like(weight, dtype=accumulator(x.dtype)) if want_weight else weight.new_empty(0)
    return x.new_empty((), dtype=accumulator(x.dtype)), grad_x, grad_weight


library.define(
    "linear_cross_entropy(Tensor x, Tensor weight, Tensor labels, int chunk_size, bool want_x, bool want_weight)"
    " -> (Tensor loss, Tensor grad_x, Tensor grad_weight)"
)
library.impl("linear_cross_entropy", _run, "CompositeExplicitAutograd")
torch.library.register_fake("seqzoo::linear_cross_entropy", _fake, lib=library)
_op = torch.ops.seqzoo.linear_cross_entropy.default
