"""``vandermonde`` on Triton: which kernels run, over which grid, and what they move.

One launch each way, and backwards the sum of what the segments found. Bytes a position of a channel: 4 forward and 4
backward, which are read again for every ``TERMS`` terms.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from seqzoo.kernels.launch import Device, Example, Launch, properties, run
from seqzoo.kernels.vandermonde import chunked
from seqzoo.kernels.vandermonde.gpu_kernels import backward_kernel, forward_kernel

# rows and columns of a tile: backwards few columns, for a sum over them is one of float32, and one over rows is not
FORWARD, BACKWARD = (16, 64), (32, 16)
# terms of a matrix product
TERMS = 16
# programs a processor to aim at
WANTED = 4


def tiles_of_segment(programs: int, tiles: int, device: Device) -> int:
    """How many neighbouring tiles are summed by one program, where so many programs would share one segment."""
    segments = max(1, min(tiles, -(-WANTED * device.processors // max(programs, 1))))
    return max(1, -(-tiles // segments))


def plan_forward(exponents: Tensor, weights: Tensor, length: int) -> tuple[Tensor, list[Launch]]:
    """The kernel, unwritten, and the launch that writes it."""
    (width, size), (rows, columns) = exponents.shape, FORWARD
    kernel = weights.new_empty((width, length), dtype=torch.float32)
    sources = torch.view_as_real(exponents), torch.view_as_real(weights)
    arguments = dict(zip(("p_exponents", "p_weights"), sources, strict=True))
    arguments |= {"p_kernel": kernel, "length": length, "N": size, "BR": rows, "BC": columns, "BN": TERMS}
    grid = (width * -(-length // (rows * columns)),)
    return kernel, [Launch(forward_kernel, grid, arguments, sources, (kernel,), num_warps=4)]


def plan_backward(grad: Tensor, exponents: Tensor) -> tuple[Tensor, list[Launch]]:
    """The sums of every segment, ``(segments, 4, D, N)``, unwritten, and the launch that writes them."""
    (width, size), length, (rows, columns) = exponents.shape, grad.shape[1], BACKWARD
    tiles, programs = -(-length // (rows * columns)), width * -(-size // TERMS)
    segment = tiles_of_segment(programs, tiles, properties(exponents.device))
    sums = exponents.new_empty((-(-tiles // segment), 4, width, size), dtype=torch.float64)
    source = torch.view_as_real(exponents)
    arguments = {"p_grad": grad, "p_exponents": source, "p_sums": sums, "D": width, "length": length, "N": size}
    arguments |= {"tiles": segment, "BR": rows, "BC": columns, "BN": TERMS}
    grid = (sums.shape[0] * programs,)
    return sums, [Launch(backward_kernel, grid, arguments, (grad, source), (sums,), num_warps=4)]


def forward(exponents: Tensor, weights: Tensor, length: int) -> Tensor:
    """As the op ``vandermonde_forward``."""
    if weights.dtype == torch.complex128:
        return chunked.forward(exponents, weights, length)
    kernel, launches = plan_forward(exponents, weights, length)
    run(launches, exponents.device)
    return kernel


def backward(grad: Tensor, exponents: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """As the op ``vandermonde_backward``."""
    if weights.dtype == torch.complex128:
        return chunked.backward(grad, exponents, weights)
    sums, launches = plan_backward(grad, exponents)
    run(launches, exponents.device)
    re, im, late_re, late_im = sums.sum(0)
    return torch.conj_physical(weights) * torch.complex(late_re, late_im), torch.complex(re, im).to(weights.dtype)


def examples(exhaustive: bool) -> Iterator[Example]:
    """What is compiled ahead of time: all sizes compile alike."""
    few = [(256, 32, 4096)]
    for width, size, length in [*few, (8, 2, 1000), (1, 1, 65536)] if exhaustive else few:
        exponents = torch.empty((width, size), dtype=torch.complex128, device="meta")
        kernel, launches = plan_forward(exponents, exponents.to(torch.complex64), length)
        label = f"D={width} N={size} length={length}"
        yield Example(f"{label} forward", launches, kernel.numel())
        yield Example(f"{label} backward", plan_backward(kernel, exponents)[1], kernel.numel())
