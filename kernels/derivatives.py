"""What the ops' fast paths promise of derivatives: the first one, backwards. Whatever else is asked for raises."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

REMEDY = 'seqzoo\'s kernels give first derivatives, backwards; for {} run inside seqzoo.ops.backend("reference")'


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd has to record an op on these tensors.

    Raises:
        RuntimeError: Under a transform of torch.func, or if a tensor carries a tangent: both would be lost without a
            word, because such tensors need not require a gradient.
    """
    if not torch.compiler.is_compiling():
        if torch._C._functorch.peek_interpreter_stack() is not None:  # pyright: ignore - not declared
            raise RuntimeError(REMEDY.format("the transforms of torch.func"))
        if forward_ad._current_level >= 0 and any(
            tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors
        ):
            raise RuntimeError(REMEDY.format("forward-mode derivatives"))
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates the ``backward`` of an autograd.Function whose own derivative is not implemented.

    PyTorch's ``once_differentiable`` returns constants where the arriving gradient is one, as that of a sum is, and
    then a gradient penalty vanishes. Here the results depend on all inputs, and to differentiate them raises.
    """

    @functools.wraps(backward)
    def wrapped(ctx: Any, *gradients: Tensor) -> Any:
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return backward(ctx, *gradients)
        return _Once.apply(lambda: backward(ctx, *gradients), *gradients, *ctx.saved_tensors)

    return wrapped


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, compute: Callable[[], Any], *sources: Tensor | None) -> Any:
        return compute()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:  # pyright: ignore - torch types no arity
        raise RuntimeError(REMEDY.format("second derivatives"))
