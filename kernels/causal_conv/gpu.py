"""``causal_conv`` on Triton: which kernels run, over which grid, and what they move; and the package ``causal_conv1d``.

One launch each way, then the sum of what the programs found for the weights. Bytes an element in bf16: 4 forward and 6
backward, and per segment and channel 4 for each of the sums.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from seqzoo.kernels.causal_conv.chunked import final_states
from seqzoo.kernels.causal_conv.gpu_kernels import backward_kernel, forward_kernel
from seqzoo.kernels.causal_conv.op import n_sequences
from seqzoo.kernels.checks import accumulator
from seqzoo.kernels.launch import Device, Example, Launch, properties, run
from seqzoo.packing import Packing

# tokens of a segment: a longer one needs fewer sums and reads fewer inputs twice, a shorter one fills more processors
LONGEST, SHORTEST = 512, 64
# programs a processor to aim at
WANTED = 32
# tokens that a program holds at once: at least W - 1, and as many as registers allow
ROWS_FORWARD, ROWS_BACKWARD = 16, 8

_forced: list[int] = []


@contextmanager
def forced_segment(tokens: int) -> Iterator[None]:
    """Cuts sequences into segments of ``tokens`` inside the block: for tests and measurements."""
    if tokens < 1:
        raise ValueError(f"tokens must be positive, got {tokens}")
    _forced.append(tokens)
    try:
        yield
    finally:
        _forced.pop()


def layout(x: Tensor, cu_seqlens: Tensor | None, device: Device) -> tuple[int, int, int]:
    """The rule for (device, shape): tokens of a segment, the number of slots for segments, channels of a program."""
    batch, total, width = x.shape
    # a row of a program is one line of 128 bytes in 16 bits and in 32: 4 bytes a thread
    block = device.warp * (2 if x.dtype.itemsize == 2 else 1)
    programs = batch * -(-width // block)
    segment = LONGEST
    while segment > SHORTEST and -(-total // segment) * programs < WANTED * device.processors:
        segment //= 2
    if _forced:
        segment = _forced[-1]
    if cu_seqlens is not None:
        return segment, total // segment + n_sequences(x, cu_seqlens), block
    return segment, batch * max(-(-total // segment), 1), block


def _common(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: str | None,
) -> tuple[int, tuple[int], dict[str, Any]]:
    """The slots, the grid, and the arguments that both kernels take."""
    segment, slots, block = layout(x, cu_seqlens, properties(x.device))
    width = x.shape[2]
    arguments = {
        "p_x": x,
        "p_weight": weight,
        "p_bias": bias,
        "p_initial": initial_state,
        "p_cu": cu_seqlens,
        "T": x.shape[1],
        "S": 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1,
        "D": width,
        "segment": segment,
        "DTYPE": tl.float64 if x.dtype == torch.float64 else tl.float32,
        "SILU": activation == "silu",
        "W": weight.shape[1],
        "BD": block,
    }
    return slots, (slots * -(-width // block),), arguments


def plan_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: str | None,
) -> tuple[tuple[Tensor, Tensor], list[Launch]]:
    """The results of a forward pass, unwritten, and the launches that write them."""
    y = torch.empty_like(x)
    final_state = x.new_empty((n_sequences(x, cu_seqlens), weight.shape[1] - 1, x.shape[2]))
    _, grid, common = _common(x, weight, bias, initial_state, cu_seqlens, activation)
    arguments = {**common, "p_y": y, "p_final": final_state, "ROWS": ROWS_FORWARD}
    launch = Launch(forward_kernel, grid, arguments, (x, weight, bias, initial_state), (y, final_state))
    return (y, final_state), [launch]


def plan_backward(
    grad_y: Tensor,
    grad_final_state: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: str | None,
) -> tuple[tuple[Tensor, Tensor | None, Tensor], list[Launch]]:
    """The results of a backward pass, unwritten, and the launches that write them.

    Returns:
        The gradients of x and of the initial state, and the sums of every slot for those of the weights, the oldest
        input's first, and of the bias, ``(slots, W or W + 1, D)``; the launches.
    """
    slots, grid, common = _common(x, weight, bias, initial_state, cu_seqlens, activation)
    grad_x = torch.empty_like(x)
    grad_state = None if initial_state is None else torch.empty_like(initial_state)
    sums = x.new_empty((slots, weight.shape[1] + (bias is not None), x.shape[2]), dtype=accumulator(x.dtype))
    arguments = {
        **common,
        "p_grad_y": grad_y,
        "p_grad_final": grad_final_state,
        "p_grad_x": grad_x,
        "p_grad_initial": grad_state,
        "p_sums": sums,
        "ROWS": ROWS_BACKWARD,
    }
    reads = (grad_y, grad_final_state, x, weight, bias, initial_state)
    return (grad_x, grad_state, sums), [Launch(backward_kernel, grid, arguments, reads, (grad_x, grad_state, sums))]


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: str | None,
) -> tuple[Tensor, Tensor]:
    """As the op ``causal_conv_forward``."""
    if x.device.type == "cuda" and package_takes(x, weight, bias, initial_state, cu_seqlens):
        return by_package(x, weight, bias, initial_state, cu_seqlens, activation)
    results, launches = plan_forward(x, weight, bias, initial_state, cu_seqlens, activation)
    run(launches, x.device)
    return results


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
    (grad_x, grad_state, sums), launches = plan_backward(
        grad_y, grad_final_state, x, weight, bias, initial_state, cu_seqlens, activation
    )
    run(launches, x.device)
    total, taps = sums.sum(0), weight.shape[1]
    grad_weight = torch.empty_like(weight).copy_(total[:taps].t())
    grad_bias = weight.new_empty(0) if bias is None else torch.empty_like(bias).copy_(total[taps])
    return grad_x, grad_weight, grad_bias, x.new_empty(0) if grad_state is None else grad_state


@cache
def package() -> Callable[..., Any] | None:
    """The convolution of the package ``causal_conv1d``, or None where it is not installed or cannot be imported."""
    try:
        from causal_conv1d import causal_conv1d_fn
    except ImportError:
        return None
    return causal_conv1d_fn


def package_takes(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> bool:
    """Whether the package is there and takes these: it has one state a row of the batch, not one a packed sequence."""
    return (
        2 <= weight.shape[1] <= 4
        and x.numel() > 0
        and x.shape[2] % 8 == 0
        and all(tensor is None or tensor.dtype == x.dtype for tensor in (weight, bias))
        and (cu_seqlens is None or initial_state is None)
        and package() is not None
    )


def by_package(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: str | None,
) -> tuple[Tensor, Tensor]:
    """:func:`forward` by the package, whose layout is ``(B, D, T)`` and which has no final state when packed."""
    convolve = package()
    if convolve is None:
        raise RuntimeError("the package causal_conv1d is not installed")
    index = None
    if cu_seqlens is not None:
        index = Packing._derive(cu_seqlens, x.shape[1], None).sequence_index.to(torch.int32)[None]
    y = convolve(
        x.transpose(1, 2),
        weight,
        bias,
        seq_idx=index,
        initial_states=None if initial_state is None else initial_state.transpose(1, 2),
        activation=activation,
    )
    return y.transpose(1, 2).contiguous(), final_states(x, weight, initial_state, cu_seqlens)


def examples(exhaustive: bool) -> Iterator[Example]:
    """What is compiled ahead of time: every form that compiles differently, or one of each kind."""
    few = [
        (torch.bfloat16, torch.bfloat16, 4, "silu", True, False, False),
        (torch.bfloat16, torch.float32, 4, "silu", True, True, True),
        (torch.float32, torch.float32, 4, None, False, False, False),
        (torch.bfloat16, torch.bfloat16, 8, "silu", True, True, True),
        (torch.float32, torch.float32, 8, "silu", True, True, True),
    ]
    halves = (torch.bfloat16, torch.float16)
    kinds = [(half, dtype) for half in halves for dtype in (half, torch.float32)] + [(torch.float32, torch.float32)]
    every = (
        (dtype, of_weight, *rest)
        for (dtype, of_weight), *rest in itertools.product(
            kinds, range(2, 9), (None, "silu"), (False, True), (False, True), (False, True)
        )
    )
    for dtype, of_weight, taps, activation, biased, packed, state in every if exhaustive else few:
        batch, total, width = (1, 65536, 2048) if packed else (16, 4096, 2048)

        def tensor(*shape: int, kind: torch.dtype) -> Tensor:
            return torch.empty(shape, dtype=kind, device="meta")

        x, weight = tensor(batch, total, width, kind=dtype), tensor(width, taps, kind=of_weight)
        bias = tensor(width, kind=of_weight) if biased else None
        cu_seqlens = tensor(9, kind=torch.int32) if packed else None
        before = tensor(8 if packed else batch, taps - 1, width, kind=dtype) if state else None
        words = [f"{str(dtype).removeprefix('torch.')}, W={taps}"]
        words += ["" if of_weight == dtype else "weights float32", activation or "", "bias" if biased else ""]
        label = " ".join(filter(None, [*words, "packed" if packed else "dense", "state" if state else ""]))
        shared = (x, weight, bias, before, cu_seqlens, activation)
        (y, final_state), launches = plan_forward(*shared)
        yield Example(f"{label} forward", launches, x.numel())
        _, launches = plan_backward(y, final_state, *shared)
        yield Example(f"{label} backward", launches, x.numel())
