"""Argument checks that the public functions of all ops share: dtypes, shapes, devices, values."""

from __future__ import annotations

import torch
from torch import Tensor

from seqzoo.kernels.dispatch import slot

REAL = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
COMPLEX = (torch.complex128, torch.complex64)
HALF = (torch.bfloat16, torch.float16)
COMPLEX_OF = {torch.float64: torch.complex128, torch.float32: torch.complex64}


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which activations of ``dtype`` are accumulated, which is the states': at least float32."""
    return torch.float32 if dtype in HALF else dtype


def check_activation(name: str, tensor: Tensor, allowed: tuple[torch.dtype, ...] = REAL) -> None:
    """Raises TypeError unless ``tensor`` is a Tensor of one of the allowed dtypes."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in allowed:
        raise TypeError(
            f"{name} must be one of {', '.join(dict.fromkeys(map(_short, allowed)))}, got {_short(tensor.dtype)}"
        )


def check_parameter(name: str, tensor: Tensor, activation: str, dtype: torch.dtype) -> None:
    """Raises TypeError unless ``tensor`` has the activations' ``dtype`` or is float32 (decays, biases, states)."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(tensor).__name__}")
    allowed = (dtype,) if dtype.is_complex else (dtype, torch.float32)
    if tensor.dtype not in allowed:
        words = " or ".join(dict.fromkeys(map(_short, allowed)))
        raise TypeError(f"{name} must be {words} beside {activation} of {_short(dtype)}, got {_short(tensor.dtype)}")


def check_same(name: str, tensor: Tensor, activation: str, dtype: torch.dtype) -> None:
    """Raises TypeError unless ``tensor`` is an activation of ``dtype``, as another one is."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(tensor).__name__}")
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must be {_short(dtype)} beside {activation}, got {_short(tensor.dtype)}")


def check_shape(name: str, tensor: Tensor, *expected: tuple[int, ...], of: str) -> None:
    """Raises ValueError unless the shape is one of those expected; ``of`` says in letters what they mean."""
    # ranks first: tuples compare their entries before their lengths, which would tie B to a width under torch.compile
    if not any(len(shape) == tensor.dim() and tuple(tensor.shape) == shape for shape in expected):
        shapes = " or ".join(map(str, expected))
        raise ValueError(f"{name} must have shape {of} = {shapes}, got {tuple(tensor.shape)}")


def check_rank(name: str, tensor: Tensor, rank: int, of: str) -> None:
    """Raises ValueError unless ``tensor`` has ``rank`` dimensions."""
    if tensor.dim() != rank:
        raise ValueError(f"{name} must have {rank} dimensions, {of}, got {tensor.dim()} in shape {tuple(tensor.shape)}")


def check_device(name: str, tensor: Tensor, activation: str, device: torch.device) -> None:
    """Raises ValueError unless ``tensor`` is on ``device``, where the activation is."""
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, {activation} on {device}; move one of them")


def check_finite(**tensors: Tensor | None) -> None:
    """Under ``seqzoo.ops.checks``: raises ValueError naming the first tensor that holds NaN or infinity, and where."""
    if not slot.checks or torch.compiler.is_compiling():
        return
    for name, tensor in tensors.items():
        if tensor is None or bool(torch.isfinite(tensor).all()):
            continue
        index = tuple(int(i) for i in torch.nonzero(~torch.isfinite(tensor))[0])
        raise ValueError(f"{name} must be finite, got {tensor[index].item()} at index {index}")


def check_sign(name: str, tensor: Tensor | None) -> None:
    """Under ``seqzoo.ops.checks``: raises ValueError where a decay's real part is positive, beyond a slack of 1e-5."""
    if tensor is None or not slot.checks or torch.compiler.is_compiling():
        return
    real = tensor.real if tensor.is_complex() else tensor
    if bool((real > 1e-5).any()):
        index = tuple(int(i) for i in torch.nonzero(real > 1e-5)[0])
        raise ValueError(f"{name} must not be positive, got {real[index].item()} at index {index}")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
