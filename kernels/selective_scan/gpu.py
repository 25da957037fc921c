"""``selective_scan`` on Triton: which kernels run, over which grid, and what they move.

Launches: 1 forward and 2 backward (the second adds up partial sums), where sequences are cut into segments 3 and 4.

Bytes an element of u in bf16 with a gate, N = 16: forward 9 (u, delta, z, y and 1 for the states between chunks),
backward 15 and 4 for the partial sums of the gradients of B and C, one fp32 number a tile of 64 channels, written and
read; segments add 4 and 6, tiles of 32 channels another 4. B and C come from the caches once a tile, 1 byte an element
in 64 channels. A kernel of one channel a program reads 64 bytes an element there and adds 128 atomically.

What a program keeps for itself stays in the caches and is not counted: the carry between blocks, 8 bytes an element
each way forward, and backward with the sums for A and the states that enter blocks 64. Arithmetic is the tighter
limit: an exponential an element and value of the state forward, and backward two, because h is recomputed first from
the chunk to its blocks and then within them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seqzoo.kernels.checks import COMPLEX_OF
from seqzoo.kernels.launch import Device, Example, Launch, properties, run
from seqzoo.kernels.linear_scan.gpu import MODES, SHAPES, Layout, as_real, cut
from seqzoo.kernels.selective_scan.gpu_kernels import (
    backward_kernel,
    enter_kernel,
    forward_kernel,
    reduce_kernel,
    summary_kernel,
)
from seqzoo.kernels.selective_scan.op import CHUNK

# segments compute every exponential twice: they pay only where not even half of the schedulers have a warp
FILLED = 2
WANTED = 8
# all that a thread can have: the programs that WANTED asks for fit, and the assembler's own lower choice spills
REGISTERS = 255
# numbers that a program of the last launch adds up
BLOCK = 256


class Inputs(NamedTuple):
    """The inputs of the op that every launch sees."""

    u: Tensor
    delta: Tensor
    A: Tensor | None
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    delta_bias: Tensor | None
    cu_seqlens: Tensor | None
    delta_softplus: bool

    @property
    def sequences(self) -> int | None:
        """Their number when packed."""
        return None if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Those that are read."""
        return self.u, self.delta, self.A, self.B, self.C, self.D, self.z, self.delta_bias


def layout(inputs: Inputs, device: Device) -> Layout:
    """The rule for (device, shape).

    A thread holds two channels, which halves the reads of B and C and the exchanges that their gradients cost, where
    values are real and there are channels enough.
    """
    batch, total, width = inputs.u.shape
    groups = inputs.B.shape[2]
    sequences = inputs.sequences
    rows = batch if sequences is None else 1

    def columns(block: int) -> int:
        return groups * -(-(width // groups) // block)

    block = 2 * device.warp
    if inputs.B.is_complex() or columns(block) * rows < FILLED * device.processors or width // groups <= device.warp:
        block = device.warp
    return cut(batch, total, sequences, columns(block), block, device, FILLED, WANTED)


def _common(inputs: Inputs, plan: Layout) -> dict[str, Any]:
    """The arguments that the kernels which walk take."""
    return {
        "p_u": inputs.u,
        "p_delta": inputs.delta,
        "p_A": as_real(inputs.A),
        "p_B": as_real(inputs.B),
        "p_bias": inputs.delta_bias,
        "p_z": inputs.z,
        **_shape(inputs, plan),
        "G": inputs.B.shape[2],
        "SOFTPLUS": inputs.delta_softplus,
        "CHUNK": CHUNK,
    }


def _shape(inputs: Inputs, plan: Layout) -> dict[str, Any]:
    """The arguments that all kernels over segments take."""
    return {
        "p_cu": inputs.cu_seqlens,
        "T": inputs.u.shape[1],
        "S": inputs.sequences or 0,
        "D": inputs.u.shape[2],
        "N": inputs.B.shape[3],
        "segment": plan.segment,
        "COMPLEX": inputs.B.is_complex(),
        "BD": plan.block,
    }


def _grid(inputs: Inputs, plan: Layout) -> tuple[int]:
    groups = inputs.B.shape[2]
    return (plan.slots * groups * -(-(inputs.u.shape[2] // groups) // plan.block),)


def _scratch(inputs: Inputs, rows: int) -> Tensor:
    """``(rows, N, D)`` in the type of the state."""
    dtype = COMPLEX_OF[torch.float32] if inputs.B.is_complex() else torch.float32
    return inputs.u.new_empty((rows, inputs.B.shape[3], inputs.u.shape[2]), dtype=dtype)


def _entered(
    inputs: Inputs, plan: Layout, state: Tensor | None, grad_y: Tensor | None
) -> tuple[dict[str, Tensor | None], list[Launch]]:
    """The carries of all programs and the state that they start from, and the launches that fill the carries.

    Without segments a program fills its own; with them it is given None as its state.
    """
    carry = _scratch(inputs, plan.slots)
    rates = None if inputs.A is None else _scratch(inputs, plan.slots)
    buffers = {"p_rates": as_real(rates), "p_carry": as_real(carry)}
    if not plan.split:
        return {**buffers, "p_state": as_real(state), "SPLIT": False}, []
    factors = torch.empty_like(carry)
    adjoint = grad_y is not None
    summaries = {
        **_common(inputs, plan),
        "p_C": as_real(inputs.C),
        "p_grad_y": grad_y,
        "p_rates": buffers["p_rates"],
        "p_factors": as_real(factors),
        "p_addends": as_real(carry),
        "ADJOINT": adjoint,
        "ROWS": _rows(inputs, adjoint),
    }
    if not adjoint:
        # neither is read: left out, they do not make a form of their own
        summaries |= {"p_C": None, "p_z": None}
    reads = (inputs.u, inputs.delta, inputs.A, inputs.B, inputs.delta_bias)
    if adjoint:
        # Longhorn's decay comes from B, the exponential's does not; u enters no decay
        reads = (inputs.delta, inputs.A, None if inputs.A is not None else inputs.B, inputs.delta_bias)
        reads = (*reads, inputs.C, inputs.z, grad_y)
    enter = {
        **_shape(inputs, plan),
        "p_state": as_real(state),
        "p_factors": as_real(factors),
        "p_addends": as_real(carry),
        "ADJOINT": adjoint,
        "ROWS": 8,
    }
    width, size = inputs.u.shape[2], inputs.B.shape[3]
    rows = inputs.u.shape[0] if inputs.sequences is None else inputs.sequences
    launches = [
        Launch(summary_kernel, _grid(inputs, plan), summaries, reads, (factors, carry), registers=REGISTERS),
        Launch(enter_kernel, (rows * size * -(-width // plan.block),), enter, (state, factors, carry), (carry,)),
    ]
    return {**buffers, "p_state": None, "SPLIT": True}, launches


def _rows(inputs: Inputs, backward: bool) -> int:
    """Tokens that a program holds at once: as many as registers allow."""
    return 4 if backward or inputs.B.is_complex() else 8


def plan_forward(inputs: Inputs, initial_state: Tensor | None) -> tuple[tuple[Tensor, Tensor, Tensor], list[Launch]]:
    """The results of a forward pass, unwritten, and the launches that write them."""
    u = inputs.u
    batch, total, width = u.shape
    plan = layout(inputs, properties(u.device))
    n_chunks = batch * -(-total // CHUNK) if inputs.sequences is None else total // CHUNK + inputs.sequences
    rows = batch if inputs.sequences is None else inputs.sequences
    y = torch.empty_like(u)
    final_state = _scratch(inputs, rows).view(rows, width, inputs.B.shape[3])
    chunk_states = _scratch(inputs, n_chunks)
    buffers, launches = _entered(inputs, plan, initial_state, None)
    arguments = {
        **_common(inputs, plan),
        **buffers,
        "p_C": as_real(inputs.C),
        "p_D": inputs.D,
        "p_y": y,
        "p_final": as_real(final_state),
        "p_chunks": as_real(chunk_states),
        "ROWS": _rows(inputs, False),
    }
    reads = (*inputs.tensors(), initial_state)
    launches.append(Launch(forward_kernel, _grid(inputs, plan), arguments, reads, (y, final_state, chunk_states)))
    return (y, final_state, chunk_states), launches


def plan_backward(
    inputs: Inputs, grad_y: Tensor, grad_final_state: Tensor, chunk_states: Tensor
) -> tuple[tuple[Tensor | None, ...], list[Launch]]:
    """The gradients of the inputs and the initial state, unwritten, and the launches that write them."""
    u, B = inputs.u, inputs.B
    batch, total, width = u.shape
    groups, size = B.shape[2:]
    plan = layout(inputs, properties(u.device))
    tiles = -(-(width // groups) // plan.block)
    words = 2 if B.is_complex() else 1
    longhorn = inputs.A is None
    given = (u, inputs.delta, inputs.A, B, inputs.C, inputs.D, inputs.z, inputs.delta_bias, grad_final_state)
    gradients = tuple(None if value is None else torch.empty_like(value) for value in given)
    grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_z, grad_bias, grad_state = gradients

    def parts(*shape: int) -> Tensor:
        return u.new_empty(shape, dtype=torch.float32)

    parts_B, parts_C = parts(2, tiles, batch * total, groups, size * words).unbind()
    parts_norm = parts(tiles, batch * total, groups) if longhorn else None
    numbers = ((0 if longhorn else size * words) + 2) * width
    parts_slot = parts(plan.slots, numbers)
    tokens = _rows(inputs, True)
    buffers, launches = _entered(inputs, plan, grad_final_state, grad_y)
    arguments = {
        **_common(inputs, plan),
        **buffers,
        "p_C": as_real(inputs.C),
        "p_D": inputs.D,
        "p_grad_y": grad_y,
        "p_chunks": as_real(chunk_states),
        "p_grad_u": grad_u,
        "p_grad_delta": grad_delta,
        "p_grad_z": grad_z,
        "p_grad_state": as_real(grad_state),
        "p_parts_B": parts_B,
        "p_parts_C": parts_C,
        "p_parts_norm": parts_norm,
        "p_parts": parts_slot,
        "p_lost": None if longhorn else as_real(_scratch(inputs, plan.slots)),
        "p_entered": as_real(_scratch(inputs, plan.slots * (CHUNK // tokens))),
        "tokens": batch * total,
        "ROWS": tokens,
    }
    reads = (grad_y, grad_final_state, *inputs.tensors(), chunk_states)
    partial = (parts_B, parts_C, parts_norm, parts_slot)
    writes = (grad_u, grad_delta, grad_z, grad_state, *partial)
    launches.append(Launch(backward_kernel, _grid(inputs, plan), arguments, reads, writes, registers=REGISTERS))
    arguments = {
        "p_parts_B": parts_B,
        "p_parts_C": parts_C,
        "p_parts_norm": parts_norm,
        "p_parts": parts_slot,
        "p_B": B if longhorn else None,
        "p_grad_B": as_real(grad_B),
        "p_grad_C": as_real(grad_C),
        "p_grad_A": as_real(grad_A),
        "p_grad_D": grad_D,
        "p_grad_bias": grad_bias,
        "tiles": tiles,
        "slots": plan.slots,
        "D": width,
        "N": size,
        "rows": batch * total * groups,
        "numbers": numbers,
        "COMPLEX": B.is_complex(),
        "ROWS": 8,
        "BLOCK": BLOCK,
    }
    grid = (-(-B.numel() * words // BLOCK) + -(-numbers // BLOCK),)
    reads = (*partial, B if longhorn else None)
    launches.append(Launch(reduce_kernel, grid, arguments, reads, (grad_A, grad_B, grad_C, grad_D, grad_bias)))
    return gradients, launches


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
    inputs = Inputs(u, delta, A, B, C, D, z, delta_bias, cu_seqlens, delta_softplus)
    results, launches = plan_forward(inputs, initial_state)
    run(launches, u.device)
    return results


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
    """As the op ``selective_scan_backward``; h is recomputed from ``chunk_states``, the initial state among them."""
    inputs = Inputs(u, delta, A, B, C, D, z, delta_bias, cu_seqlens, delta_softplus)
    gradients, launches = plan_backward(inputs, grad_y, grad_final_state, chunk_states)
    run(launches, u.device)
    return tuple(u.new_empty(0) if gradient is None else gradient for gradient in gradients)


def example(label: str, inputs: Inputs, state: bool) -> Iterator[Example]:
    """The launches of one call forward and backward on meta tensors, for compiling ahead of time."""
    u = inputs.u
    initial_state = _scratch(inputs, inputs.sequences or u.shape[0]).transpose(1, 2) if state else None
    (y, final_state, chunk_states), launches = plan_forward(inputs, initial_state)
    yield Example(f"{label} forward", launches, u.numel())
    _, launches = plan_backward(inputs, y, final_state, chunk_states)
    yield Example(f"{label} backward", launches, u.numel())


def examples(exhaustive: bool) -> Iterator[Example]:
    """What is compiled ahead of time: every form that compiles differently, or one of each kind."""
    kinds = {
        "bfloat16": (torch.bfloat16, torch.bfloat16),
        "float32": (torch.float32, torch.float32),
        "float16": (torch.float16, torch.float16),
        "bfloat16, delta float32": (torch.bfloat16, torch.float32),
    }
    few = [
        ("exponential", "bfloat16", "one pass", False, True, False, 1),
        ("exponential", "bfloat16", "segments", True, True, True, 1),
        ("exponential", "float32", "segments", False, False, True, 4),
        ("longhorn", "bfloat16", "segments", False, True, False, 1),
        ("complex", "float32", "segments", True, True, True, 1),
    ]
    forms = ("exponential", "longhorn", "complex")
    every = itertools.product(forms, kinds, MODES, (False, True), (False, True), (False, True), (1, 4))
    for form, kind, mode, packed, gated, state, groups in every if exhaustive else few:
        dtype, step_dtype = kinds[kind]
        batch, total, width = SHAPES[mode, packed]
        yield from example(
            f"{form}, {kind}, {mode}, {'packed' if packed else 'dense'}{' gated' if gated else ''}"
            f"{' state' if state else ''}{f' {groups} groups' if groups > 1 else ''}",
            example_inputs(form, dtype, step_dtype, (batch, total, width), packed, gated, groups),
            state,
        )


def example_inputs(
    form: str,
    dtype: torch.dtype,
    step_dtype: torch.dtype,
    shape: tuple[int, int, int],
    packed: bool,
    gated: bool,
    groups: int,
    size: int = 16,
) -> Inputs:
    """Inputs on the meta device; what is gated also has D, a bias and a softplus, as in Mamba."""
    batch, total, width = shape

    def tensor(*extent: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(extent, dtype=dtype, device="meta")

    number = COMPLEX_OF[torch.float32] if form == "complex" else dtype
    parameter = COMPLEX_OF[torch.float32] if form == "complex" else torch.float32
    return Inputs(
        u=tensor(*shape, dtype=dtype),
        delta=tensor(*shape, dtype=step_dtype),
        A=None if form == "longhorn" else tensor(width, size, dtype=parameter),
        B=tensor(batch, total, groups, size, dtype=number),
        C=tensor(batch, total, groups, size, dtype=number),
        D=tensor(width, dtype=torch.float32) if gated else None,
        z=tensor(*shape, dtype=dtype) if gated else None,
        delta_bias=tensor(width, dtype=torch.float32) if gated else None,
        cu_seqlens=tensor(9, dtype=torch.int32) if packed else None,
        delta_softplus=gated,
    )
