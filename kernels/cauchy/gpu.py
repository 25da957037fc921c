"""``cauchy`` on Triton: which kernels run, over which grid, and what they move.

One launch each way; the backward pass then adds up, in their order, what the segments of nodes found.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from seqzoo.kernels.cauchy.chunked import half_angles
from seqzoo.kernels.cauchy.gpu_kernels import backward_kernel, forward_kernel
from seqzoo.kernels.cauchy.op import n_nodes
from seqzoo.kernels.launch import Device, Example, Launch, properties, run

# sums and poles that a program has in registers
SUMS, POLES = 4, 2
WARPS = 4
# of a thread of the backward pass: left alone the assembler settles for 96 in some forms, and spills
REGISTERS = 128
# nodes of a segment: in a longer one a thread would add more numbers than float32 holds well, shorter ones fill more
# processors
LONGEST, SHORTEST = 4096, 512
# programs a processor to aim at
WANTED = 8

_forced: list[int] = []


@contextmanager
def forced_segment(steps: int) -> Iterator[None]:
    """Ends segments after so many steps of a program inside the block: for tests and measurements."""
    if steps < 1:
        raise ValueError(f"steps must be positive, got {steps}")
    _forced.append(steps)
    try:
        yield
    finally:
        _forced.pop()


def segment_of(weights: Tensor, total: int, device: Device) -> int:
    """The rule for (device, shape): nodes of a segment of the backward pass, a multiple of a step's."""
    if _forced:
        return _forced[-1] * WARPS * device.warp
    width, number, size = weights.shape
    programs, segment = width * -(-size // POLES) * -(-number // SUMS), LONGEST
    while segment > SHORTEST and -(-total // segment) * programs < WANTED * device.processors:
        segment //= 2
    return segment


def _common(weights: Tensor, poles: Tensor, length: int, conjugate_pairs: bool) -> tuple[int, dict[str, Any]]:
    """The number of blocks of sums, and the arguments that both kernels take."""
    _, number, size = weights.shape
    # without the products
    tables, block = half_angles(length, weights.device)[:2], max(1, min(SUMS, number))
    arguments = {
        "p_weights": torch.view_as_real(weights),
        "p_poles": torch.view_as_real(poles),
        "p_tables": tables,
        "M": number,
        "N": size,
        "F": tables.shape[1],
        "PAIRS": conjugate_pairs,
        "BM": block,
        "BJ": WARPS * properties(weights.device).warp,
    }
    return -(-number // block), arguments


def plan_forward(weights: Tensor, poles: Tensor, length: int, conjugate_pairs: bool) -> tuple[Tensor, list[Launch]]:
    """The sums, unwritten, and the launches that write them."""
    blocks, common = _common(weights, poles, length, conjugate_pairs)
    sums = weights.new_empty((*weights.shape[:2], common["F"]))
    grid = (weights.shape[0] * -(-common["F"] // common["BJ"]), blocks)
    reads = (weights, poles, common["p_tables"])
    arguments = {**common, "p_sums": torch.view_as_real(sums)}
    return sums, [Launch(forward_kernel, grid, arguments, reads, (sums,), num_warps=WARPS)]


def plan_backward(
    grad_sums: Tensor, weights: Tensor, poles: Tensor, length: int, conjugate_pairs: bool
) -> tuple[tuple[Tensor, Tensor], list[Launch]]:
    """The gradients by segment of nodes (and block of sums), unwritten, and the launches that write them."""
    blocks, common = _common(weights, poles, length, conjugate_pairs)
    width, _, size = weights.shape
    segment = segment_of(weights, common["F"], properties(weights.device))
    segments = -(-common["F"] // segment)
    grad_weights = weights.new_empty((segments, *weights.shape))
    grad_poles = poles.new_empty((segments, blocks, *poles.shape))
    arguments = {
        **common,
        "p_grad": torch.view_as_real(grad_sums),
        "p_grad_weights": torch.view_as_real(grad_weights),
        "p_grad_poles": torch.view_as_real(grad_poles),
        "D": width,
        "segment": segment,
        "BN": POLES,
    }
    grid = (width * -(-size // POLES), blocks, segments)
    reads, results = (grad_sums, weights, poles, common["p_tables"]), (grad_weights, grad_poles)
    launch = Launch(backward_kernel, grid, arguments, reads, results, num_warps=WARPS, registers=REGISTERS)
    return results, [launch]


def forward(weights: Tensor, poles: Tensor, length: int, conjugate_pairs: bool) -> Tensor:
    """As the op ``cauchy_forward``."""
    sums, launches = plan_forward(weights, poles, length, conjugate_pairs)
    run(launches, weights.device)
    return sums


def backward(
    grad_sums: Tensor, weights: Tensor, poles: Tensor, length: int, conjugate_pairs: bool
) -> tuple[Tensor, Tensor]:
    """As the op ``cauchy_backward``."""
    (grad_weights, grad_poles), launches = plan_backward(grad_sums, weights, poles, length, conjugate_pairs)
    run(launches, weights.device)
    return grad_weights.sum(0, dtype=torch.complex128).to(weights.dtype), grad_poles.sum((0, 1))


def examples(exhaustive: bool) -> Iterator[Example]:
    """What is compiled ahead of time: few and many sums over a call's poles, and sizes of 1, which are constants."""
    forms = [(1024, sums, 32, 4096) for sums in ((1, 2, 3, 4, 5) if exhaustive else (1, 4))]
    for width, sums, size, length in [*forms, (1, 1, 1, 1)]:
        for pairs in (True, False) if exhaustive or sums > 1 else (True,):
            weights = torch.empty((width, sums, size), dtype=torch.complex64, device="meta")
            poles = torch.empty((width, size), dtype=torch.complex128, device="meta")
            label = f"complex64, D={width} M={sums} N={size} length={length} {'pairs' if pairs else 'alone'}"
            result, launches = plan_forward(weights, poles, length, pairs)
            yield Example(f"{label} forward", launches, width * sums * n_nodes(length))
            _, launches = plan_backward(result, weights, poles, length, pairs)
            yield Example(f"{label} backward", launches, width * sums * n_nodes(length))
