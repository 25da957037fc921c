"""``linear_attention`` on Triton: which kernels run, over which grid, and what they move.

Launches with a scalar decay or none: 2 forward (states between chunks, outputs) and 3 backward (states and their
gradients, grad_v, grad_q with grad_k and the decay's). Where the tiles of the states are too few to fill the device one
more each way summarises segments, and one more backward adds up shares where several programs hold heads of a group or
columns of the keys. A decay for each key takes one more each way, for the scores inside the chunks. States between
chunks are not kept for the backward pass: they weigh as much as the inputs, and finding them again reads k and v.
The kernels accumulate in float32. Float64, which devices leave to the chunked implementation and which reaches this one
under the interpreter only, goes there too.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seqzoo.kernels.checks import accumulator
from seqzoo.kernels.launch import Device, Example, Launch, properties, run
from seqzoo.kernels.linear_attention import chunked
from seqzoo.kernels.linear_attention.gpu_kernels import (
    grad_key_kernel,
    grad_qk_kernel,
    grad_v_kernel,
    output_kernel,
    scores_kernel,
    shares_kernel,
    states_kernel,
)

# tokens of a chunk of bfloat16, and of one whose products of float32 take three times its registers
CHUNK, SHORT_CHUNK = 64, 32
# tokens of a secondary chunk of a decay for each key, as in the kernels
SUB = 16
# programs a processor below which sequences are cut into segments, and how many to aim at then
FILLED, WANTED = 1, 2
SHORTEST = 8 * CHUNK
# every program composes the summaries before its own, so their number has a limit
MOST_SEGMENTS = 32

_forced: list[tuple[int, int]] = []


@contextmanager
def forced_layout(segment: int, parts: int = 1) -> Iterator[None]:
    """Cuts sequences into segments of ``segment`` tokens and groups into at most ``parts`` inside the block: for tests.

    Args:
        segment: A positive multiple of CHUNK.
        parts: Programs that share the heads of a group.
    """
    if segment < CHUNK or segment % CHUNK != 0:
        raise ValueError(f"segment must be a positive multiple of {CHUNK}, got {segment}")
    _forced.append((segment, parts))
    try:
        yield
    finally:
        _forced.pop()


def forced_segment() -> int | None:
    """Tokens of a segment inside of :func:`forced_layout`, else None."""
    return _forced[-1][0] if _forced else None


class Layout(NamedTuple):
    """How a call is spread over the device.

    Attributes:
        segment: Tokens of a segment, a multiple of CHUNK.
        slots: Segments that may exist.
        cut: Whether sequences may have more than one segment.
        chunks: Chunks that may exist.
        rows: Sequences.
    """

    segment: int
    slots: int
    cut: bool
    chunks: int
    rows: int


def layout(batch: int, total: int, tiles: int, sequences: int | None, chunk: int, device: Device) -> Layout:
    """The rule for (device, shape).

    Args:
        batch: B.
        total: T.
        tiles: Programs that a segment takes: heads times tiles of their states.
        sequences: Their number when packed, else None. One of them may then hold nearly every token.
        chunk: Tokens of a chunk, a divisor of CHUNK.
        device: What it is for.
    """
    programs = tiles * (batch if sequences is None else 1)
    forced, segment = forced_segment(), _round_up(max(total, 1))
    if forced is not None:
        segment = forced
    elif 0 < programs < FILLED * device.processors:
        wanted = min(-(-WANTED * device.processors // programs), MOST_SEGMENTS)
        segment = min(segment, _round_up(max(-(-total // wanted), SHORTEST)))
    if sequences is not None:
        return Layout(segment, total // segment + sequences, total > segment, total // chunk + sequences, sequences)
    n_segments = max(-(-total // segment), 1)
    return Layout(segment, batch * n_segments, total > segment, batch * -(-total // chunk), batch)


def parts_of_group(programs: int, shared: int, device: Device) -> int:
    """Into how many programs the ``shared`` heads of a group go, a divisor of it, where one each makes ``programs``."""
    wanted = _forced[-1][1] if _forced else -(-FILLED * device.processors // max(programs, 1))
    return next(parts for parts in range(1, shared + 1) if shared % parts == 0 and parts >= min(wanted, shared))


def _round_up(tokens: int) -> int:
    return -(-tokens // CHUNK) * CHUNK


def _block(size: int, most: int) -> int:
    """The tile for a dimension: a power of two, at least what a product of matrices takes."""
    return min(max(1 << (size - 1).bit_length(), 16) if size > 0 else 16, most)


class Call(NamedTuple):
    """The inputs of one call and what follows from their shapes."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    cu_seqlens: Tensor | None
    scale: float
    causal: bool

    @property
    def decay(self) -> str:
        """The name of the form of decay in the kernels."""
        if self.log_decay is None:
            return "none"
        return {1: "head", 3: "token", 4: "key"}[self.log_decay.dim()]

    def chunk(self) -> int:
        """Tokens of a chunk."""
        return CHUNK if self.q.dtype == torch.bfloat16 else SHORT_CHUNK

    def blocks(self) -> tuple[int, int]:
        """Columns of keys and of values of a program."""
        return _block(self.q.shape[3], 32), _block(self.v.shape[3], self.chunk())

    def sequences(self) -> int | None:
        """Their number when packed."""
        return None if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    def layout(self, directions: int) -> Layout:
        """The layout with the states in one direction or in both."""
        batch, total, heads, values = self.v.shape
        rows, columns = self.blocks()
        tiles = heads * -(-self.q.shape[3] // rows) * -(-values // columns) * directions
        return layout(batch, total, tiles, self.sequences(), self.chunk(), properties(self.q.device))

    def matrices(self, count: int, dtype: torch.dtype) -> Tensor:
        """States of all heads, unwritten."""
        return self.q.new_empty((count, self.v.shape[2], self.q.shape[3], self.v.shape[3]), dtype=dtype)

    def common(self) -> dict[str, Any]:
        """The arguments that all kernels take."""
        rows, columns = self.blocks()
        return {
            "p_cu": self.cu_seqlens,
            "T": self.q.shape[1],
            "S": self.sequences() or 0,
            "G": self.q.shape[2],
            "H": self.v.shape[2],
            "K": self.q.shape[3],
            "V": self.v.shape[3],
            "scale": self.scale,
            "C": self.chunk(),
            "BK": rows,
            "BV": columns,
        }

    def tiles(self) -> int:
        """Tiles of all heads' states."""
        rows, columns = self.blocks()
        return self.v.shape[2] * -(-self.q.shape[3] // rows) * -(-self.v.shape[3] // columns)

    def columns(self) -> int:
        """Tiles of all heads' values."""
        return self.v.shape[2] * -(-self.v.shape[3] // self.blocks()[1])


def _kept(call: Call, fine: bool) -> torch.dtype:
    """The dtype of what passes between launches: bfloat16 where results are, since float16 could overflow."""
    return torch.bfloat16 if call.q.dtype == torch.bfloat16 and not fine else torch.float32


def _states(
    call: Call,
    plan: Layout,
    grad_o: Tensor | None,
    starts: tuple[Tensor | None, Tensor | None],
    states: tuple[Tensor | None, Tensor | None],
    ends: tuple[Tensor | None, Tensor | None],
) -> list[Launch]:
    """The launches that find states and, given ``grad_o``, their gradients: between chunks and at the sequences' ends.

    Args:
        call: The inputs.
        plan: Their layout.
        grad_o: The gradient of the outputs.
        starts: The initial state and the gradient of the final one.
        states: What is written for each chunk.
        ends: The final state and the gradient of the initial one, to be written.
    """
    directions = 1 if grad_o is None else 2
    factors = addends = None
    if plan.cut:
        addends = call.matrices(directions * plan.slots, torch.float32)
        size = {"none": None, "key": (call.q.shape[3],)}.get(call.decay, ())
        if size is not None:
            factors = addends.new_empty((directions * plan.slots, call.v.shape[2], *size))
    arguments = {
        **call.common(),
        "p_q": call.q,
        "p_k": call.k,
        "p_v": call.v,
        "p_log": call.log_decay,
        "p_grad_o": grad_o,
        "p_initial": starts[0],
        "p_grad_final": starts[1],
        "p_states": states[0],
        "p_grad_states": states[1],
        "p_final": ends[0],
        "p_grad_initial": ends[1],
        "p_factors": factors,
        "p_addends": addends,
        "segment": plan.segment,
        "n_slots": plan.slots,
        "DECAY": call.decay,
        "CUT": plan.cut,
    }
    grid = (plan.slots * call.tiles(), directions)
    inputs = (call.k, call.v, call.log_decay, *(() if grad_o is None else (call.q, grad_o)))
    launches = []
    if plan.cut:
        summary = {**arguments, "SUMMARY": True}
        launches.append(Launch(states_kernel, grid, summary, inputs, (factors, addends), num_warps=4))
    reads = (*inputs, *starts, factors, addends)
    launches.append(Launch(states_kernel, grid, {**arguments, "SUMMARY": False}, reads, (*states, *ends), num_warps=4))
    return launches


def _scores(call: Call, plan: Layout, grad_o: Tensor | None, fine: bool) -> tuple[tuple[Tensor, Tensor], list[Launch]]:
    """The scores inside the chunks under a decay for each key, their gradients given ``grad_o``, and the launch."""
    shape = (plan.chunks, call.v.shape[2], call.chunk(), call.chunk())
    scores = call.q.new_empty(shape, dtype=_kept(call, False))
    grad_scores = scores if grad_o is None else scores.new_empty(shape, dtype=_kept(call, fine))
    arguments = {
        **call.common(),
        # pairs of a secondary chunk are held for every key
        "BK": _block(call.q.shape[3], 16),
        "p_q": call.q,
        "p_k": call.k,
        "p_v": call.v,
        "p_log": call.log_decay,
        "p_grad_o": grad_o,
        "p_scores": scores,
        "p_grad_scores": grad_scores,
    }
    reads = (call.q, call.k, call.log_decay, *(() if grad_o is None else (call.v, grad_o)))
    writes = (scores,) if grad_o is None else (scores, grad_scores)
    grid = (plan.chunks * call.v.shape[2] * (call.chunk() // SUB),)
    return (scores, grad_scores), [Launch(scores_kernel, grid, arguments, reads, writes, num_warps=4)]


def plan_forward(call: Call, initial_state: Tensor | None) -> tuple[tuple[Tensor, Tensor], list[Launch]]:
    """The results of a forward pass, unwritten, and the launches that write them."""
    plan = call.layout(1)
    o = torch.empty_like(call.v)
    final_state = call.matrices(plan.rows, torch.float32)
    states = call.matrices(plan.chunks, _kept(call, False)) if call.causal else None
    launches = _states(call, plan, None, (initial_state, None), (states, None), (final_state, None))
    scores = None
    if call.decay == "key":
        (scores, _), more = _scores(call, plan, None, False)
        launches += more
    read = final_state if states is None else states
    arguments = {
        **call.common(),
        "p_q": call.q,
        "p_k": call.k,
        "p_v": call.v,
        "p_log": call.log_decay,
        "p_states": read,
        "p_scores": scores,
        "p_o": o,
        "DECAY": call.decay,
        "CAUSAL": call.causal,
    }
    reads = (call.q, *((call.k, call.v) if call.causal else ()), call.log_decay, read, scores)
    launches.append(Launch(output_kernel, (plan.chunks * call.columns(),), arguments, reads, (o,), num_warps=4))
    return (o, final_state), launches


def plan_backward(
    call: Call, grad_o: Tensor, grad_final_state: Tensor, initial_state: Tensor | None
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor], list[Launch]]:
    """The results of a backward pass, unwritten, and the launches that write them."""
    q, k, v, log_decay = call.q, call.k, call.v, call.log_decay
    batch, total, groups, size = q.shape
    heads, shared = v.shape[2], v.shape[2] // groups
    device, plan, decay = properties(q.device), call.layout(2), call.decay
    fine = log_decay is not None and log_decay.dtype == torch.float32
    grads = [torch.empty_like(tensor) for tensor in (q, k, v)]
    grad_q, grad_k, grad_v = grads
    grad_log = None if log_decay is None else torch.empty_like(log_decay)
    grad_state = torch.empty_like(grad_final_state)
    if call.causal:
        states, grad_states = (call.matrices(plan.chunks, _kept(call, fine)) for _ in range(2))
        between, ends = (states, grad_states), (None, grad_state)
    else:
        states, grad_states = call.matrices(plan.rows, torch.float32), grad_state
        between, ends = (None, None), (states, grad_state)
    launches = _states(call, plan, grad_o, (initial_state, grad_final_state), between, ends)
    scores = grad_scores = None
    if decay == "key":
        (scores, grad_scores), more = _scores(call, plan, grad_o, fine)
        launches += more
    chunk = {**call.common(), "p_q": q, "p_k": k, "p_log": log_decay, "p_grad_o": grad_o, "p_grad_states": grad_states}
    arguments = {**chunk, "p_scores": scores, "p_grad_v": grad_v, "DECAY": decay, "CAUSAL": call.causal}
    reads = (k, *((q, grad_o) if call.causal else ()), log_decay, grad_states, scores)
    launches.append(Launch(grad_v_kernel, (plan.chunks * call.columns(),), arguments, reads, (grad_v,), num_warps=4))
    # what meets here at once fits the registers in narrow tiles only, narrower where its products have to be exact
    block = _block(size, 16 if decay == "key" or fine else 32)
    threads = {"num_warps": 256 // device.warp}
    n_columns = -(-size // block)
    parts = shared if decay == "key" else parts_of_group(plan.chunks * groups * n_columns, shared, device)
    shares_q, shares_k, shares_log = grad_q, grad_k, grad_log
    if parts > 1:
        shares_q, shares_k = (q.new_empty((parts, *q.shape), dtype=torch.float32) for _ in range(2))
    if decay == "head":
        shares_log = q.new_empty((n_columns * plan.chunks, heads), dtype=torch.float32)
    elif decay == "token" and n_columns > 1:
        shares_log = q.new_empty((n_columns, batch * total * heads), dtype=torch.float32)
    arguments = {
        **chunk,
        "BK": block,
        "BV": call.blocks()[1] if decay == "key" else _block(v.shape[3], 32),
        "p_v": v,
        "p_states": states,
        "p_grad_q": shares_q,
        "p_grad_k": shares_k,
        "p_grad_log": shares_log,
        "size_qk": q.numel(),
    }
    reads = (q, k, v, log_decay, grad_o, states, grad_states, grad_scores)
    writes = (shares_q, shares_k, shares_log)
    if decay == "key":
        arguments |= {"p_grad_scores": grad_scores, "FINE": fine}
        grid = (plan.chunks * heads * n_columns,)
        launches.append(Launch(grad_key_kernel, grid, arguments, reads, writes, **threads))
    else:
        size_log = plan.chunks * heads if decay == "head" else batch * total * heads
        arguments |= {"DECAY": decay, "CAUSAL": call.causal, "FINE": fine, "HEADS": shared // parts}
        arguments["size_log"] = size_log
        grid = (plan.chunks * groups * parts * n_columns,)
        launches.append(Launch(grad_qk_kernel, grid, arguments, reads, writes, **threads))
    cut_log = shares_log is not grad_log
    if parts > 1 or cut_log:
        launches.append(_add_up(grads, grad_log, writes, parts, cut_log))
    return (grad_q, grad_k, grad_v, grad_log, grad_state), launches


def _add_up(
    grads: list[Tensor], grad_log: Tensor | None, shares: tuple[Tensor, Tensor, Tensor | None], parts: int, cut: bool
) -> Launch:
    """The launch that adds up the shares of q and k where there are ``parts``, and of the decay where it is ``cut``."""
    shares_q, shares_k, shares_log = shares
    sizes = (grads[0].numel() if parts > 1 else 0, grad_log.numel() if cut and grad_log is not None else 0)
    # a fixed decay has many shares of few numbers
    n_shares = shares_log.shape[0] if cut and shares_log is not None else 0
    high = max(parts, n_shares)
    rows = min(_block(high, 64), 64) if high > 16 else 16
    columns = 1024 // rows if sizes[0] or sizes[1] > 1024 else 16
    arguments = {
        "p_shares_q": shares_q if parts > 1 else None,
        "p_shares_k": shares_k if parts > 1 else None,
        "p_shares_log": shares_log if cut else None,
        "p_grad_q": grads[0],
        "p_grad_k": grads[1],
        "p_grad_log": grad_log,
        "n_parts": parts,
        "n_shares": n_shares,
        "size_qk": sizes[0],
        "size_log": sizes[1],
        "BN": columns,
        "BP": rows,
    }
    reads = (*((shares_q, shares_k) if parts > 1 else ()), shares_log if cut else None)
    writes = (*((grads[0], grads[1]) if parts > 1 else ()), grad_log if cut else None)
    grid = (-(-max(sizes) // columns), 3)
    return Launch(shares_kernel, grid, arguments, reads, writes, num_warps=4)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """As the op ``linear_attention_forward``."""
    if q.dtype == torch.float64:
        return chunked.forward(q, k, v, log_decay, initial_state, cu_seqlens, scale, causal)
    results, launches = plan_forward(Call(q, k, v, log_decay, cu_seqlens, scale, causal), initial_state)
    run(launches, q.device)
    return results


def backward(
    grad_o: Tensor,
    grad_final_state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As the op ``linear_attention_backward``."""
    if q.dtype == torch.float64:
        return chunked.backward(grad_o, grad_final_state, q, k, v, log_decay, initial_state, cu_seqlens, scale, causal)
    call = Call(q, k, v, log_decay, cu_seqlens, scale, causal)
    (grad_q, grad_k, grad_v, grad_log, grad_state), launches = plan_backward(
        call, grad_o, grad_final_state, initial_state
    )
    run(launches, q.device)
    return grad_q, grad_k, grad_v, q.new_empty(0) if grad_log is None else grad_log, grad_state


def example(
    label: str,
    decay: str,
    dtype: torch.dtype,
    of_decay: torch.dtype,
    sizes: tuple[int, int, int, int],
    packed: bool,
    state: bool,
    causal: bool = True,
) -> Iterator[Example]:
    """The launches of one call forward and backward on meta tensors, for compiling ahead of time.

    Args:
        label: Names it.
        decay: ``"none"``, ``"head"``, ``"token"`` or ``"key"``.
        dtype: Of the activations.
        of_decay: Of the logarithms.
        sizes: G, H, K and V.
        packed: Whether 65536 tokens are 8 sequences, else 4 rows of 4096.
        state: Whether there is an initial state.
        causal: As in the op.
    """
    groups, heads, size, values = sizes
    batch, total = (1, 65536) if packed else (4, 4096)

    def tensor(*shape: int, kind: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=kind, device="meta")

    q, v = (tensor(batch, total, *last, kind=dtype) for last in ((groups, size), (heads, values)))
    shapes = {"head": (heads,), "token": (batch, total, heads), "key": (batch, total, heads, size)}
    log_decay = None if decay == "none" else tensor(*shapes[decay], kind=of_decay)
    call = Call(q, q, v, log_decay, tensor(9, kind=torch.int32) if packed else None, size**-0.5, causal)
    final_state = tensor(8 if packed else batch, heads, size, values, kind=accumulator(dtype))
    initial_state = final_state if state else None
    words = (f"{decay} decay", "" if causal else "whole", "packed" if packed else "dense", "state" if state else "")
    label = " ".join(filter(None, (f"{label}, G={groups} H={heads} K={size} V={values},", *words)))
    _, launches = plan_forward(call, initial_state)
    yield Example(f"{label} forward", launches, batch * total * heads)
    _, launches = plan_backward(call, v, final_state, initial_state)
    yield Example(f"{label} backward", launches, batch * total * heads)


def examples(exhaustive: bool) -> Iterator[Example]:
    """What is compiled ahead of time: every form that compiles differently, or one of each kind, by token and head."""
    full, half = torch.float32, torch.bfloat16
    if not exhaustive:
        yield from example("bfloat16, decay float32", "token", half, full, (1, 32, 128, 64), False, False)
        yield from example("bfloat16", "none", half, half, (16, 16, 128, 128), True, True)
        yield from example("bfloat16, decay float32", "key", half, full, (8, 8, 128, 128), True, True)
        return
    kinds = {
        "bfloat16": (half, half),
        "bfloat16, decay float32": (half, full),
        "float16": (torch.float16, torch.float16),
        "float32": (full, full),
    }
    forms = itertools.product(kinds, ("none", "head", "token", "key"), (16, 256), (False, True))
    for kind, decay, size, packed in forms:
        dtype, of_decay = kinds[kind]
        yield from example(kind, decay, dtype, of_decay, (2, 8, size, size), packed, packed)
        if decay == "none":
            yield from example(kind, decay, dtype, of_decay, (2, 8, size, size), packed, packed, causal=False)
