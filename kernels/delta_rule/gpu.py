"""``delta_rule`` on Triton: which kernels run, over which grid, and what they move.

Two launches forward: the triangular systems of all chunks, then the walks through the sequences, which write the
outputs too, so that no state is stored between chunks. Four backward: the systems, the walks in both directions side by
side, the gradients inside the chunks, those of q, k and the decay; one more adds up shares where several heads read a
group or several programs hold the keys of a scalar decay. Where the walks are few and long they are cut
(:func:`segment_length`), which takes two launches more each way: all segments are summarised, then the summaries
composed to what enters the segments, from where these walk side by side. The kernels accumulate in float32. Float64,
which devices leave to the chunked implementation and which reaches this one under the interpreter only, goes there too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seqzoo.kernels.checks import accumulator
from seqzoo.kernels.delta_rule import chunked
from seqzoo.kernels.delta_rule.gpu_kernels import (
    compose_kernel,
    gradients_kernel,
    pairs_kernel,
    states_kernel,
    summaries_kernel,
    systems_kernel,
)
from seqzoo.kernels.launch import Device, Example, Launch, properties, run
from seqzoo.kernels.linear_attention.gpu import forced_segment
from seqzoo.kernels.linear_attention.gpu_kernels import shares_kernel

# tokens of a chunk, as in the kernels
SUB = 16
# tokens from one state that the backward pass keeps to the next, in bfloat16 and where its products have to be exact
ROWS, SHORT_ROWS = 64, 32
# values of a program that walks through a sequence
VALUES = 16
# programs a processor that walk side by side about as fast as one alone: each mostly waits for its own products
FILLED = 2
# tokens of a segment: a shorter walk does not outlast the launches
SHORTEST = 8 * ROWS
# times by which a walk has to become shorter
WORTH = 1.5


def segment_length(walks: int, summaries: int, total: int, size: int, device: Device) -> int:
    """The rule for (device, shape): tokens of a segment, a multiple of ROWS; beyond any sequence where none is cut.

    A walk takes its steps one after another, a chunk each, and programs beside it cost nothing until they fill the
    device. So there are at most as many segments as fill it with their walks, and n of them take, in n-ths of the whole
    walk's time: 1 for the walks; ``summaries / walks`` for the summaries, which are more programs, since a transition
    has a column for every key; 1 for their composition. That goes from segment to segment by products of the transition
    with the state, K / 16 times what a chunk of 16 tokens multiplies, and takes no longer than a walk through one
    segment as long as ``n K <= T / n``.

    Args:
        walks: Programs that walk where nothing is cut; of packed sequences those of one, which may hold nearly every
            token.
        summaries: Programs that would summarise one segment of each of these.
        total: T.
        size: K.
        device: What it is for.
    """
    if walks * size == 0:
        return total + 1
    segments = min(FILLED * device.processors // walks, math.isqrt(total // size), total // SHORTEST)
    if segments < WORTH * (2 + summaries / walks):
        return total + 1
    return -(-total // (segments * ROWS)) * ROWS


def _block(size: int, most: int) -> int:
    """The tile for a dimension: a power of two, at least what a product of matrices takes."""
    return min(max(1 << (size - 1).bit_length(), 16) if size > 0 else 16, most)


class Call(NamedTuple):
    """The inputs of one call and what follows from their shapes."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    log_decay: Tensor | None
    cu_seqlens: Tensor | None
    scale: float

    @property
    def decay(self) -> str:
        """The name of the form of decay in the kernels."""
        return "none" if self.log_decay is None else {3: "token", 4: "key"}[self.log_decay.dim()]

    @property
    def rows(self) -> int:
        """Sequences."""
        return self.q.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def fine(self) -> bool:
        """Whether a gradient of the betas or the decay is float32."""
        return torch.float32 in (self.beta.dtype, self.q.dtype if self.log_decay is None else self.log_decay.dtype)

    @property
    def kept(self) -> torch.dtype:
        """Of what passes between launches: bfloat16 where results are, since float16 could overflow."""
        return torch.bfloat16 if self.q.dtype == torch.bfloat16 and not self.fine else torch.float32

    @property
    def stretch(self) -> int:
        """Tokens from one kept state to the next."""
        return ROWS if self.kept == torch.bfloat16 else SHORT_ROWS

    @property
    def columns(self) -> int:
        """Programs that hold a head's state, each VALUES columns of it."""
        return -(-self.v.shape[3] // VALUES)

    @property
    def summary_columns(self) -> int:
        """Programs that hold a head's state and behind it the transition."""
        return -(-(self.v.shape[3] + self.q.shape[3]) // VALUES)

    def segment(self, directions: int) -> int:
        """Tokens of a segment with the walks in one direction or in both, beyond any sequence where none is cut."""
        batch, total, heads, _ = self.v.shape
        forced = forced_segment()
        if forced is not None:
            return forced if total > forced else total + 1
        heads *= batch if self.cu_seqlens is None else 1
        walks = heads * self.columns * directions
        summaries = walks + heads * (self.summary_columns - self.columns)
        return segment_length(walks, summaries, total, self.q.shape[3], properties(self.q.device))

    def slots(self, tokens: int) -> int:
        """Stretches of so many tokens that may exist."""
        batch, total = self.q.shape[:2]
        return batch * -(-total // tokens) if self.cu_seqlens is None else total // tokens + self.rows

    def matrices(self, count: int, dtype: torch.dtype) -> Tensor:
        """States of all heads, unwritten."""
        return self.q.new_empty((count, self.v.shape[2], self.q.shape[3], self.v.shape[3]), dtype=dtype)

    def squares(self) -> Tensor:
        """A matrix of SUB tokens by SUB for every chunk and head, a row at each token, unwritten."""
        return self.q.new_empty((*self.v.shape[:3], SUB), dtype=torch.float32)

    def common(self) -> dict[str, Any]:
        """The arguments that most kernels take."""
        return {
            "p_q": self.q,
            "p_k": self.k,
            "p_log": self.log_decay,
            "p_beta": self.beta,
            "p_cu": self.cu_seqlens,
            "T": self.q.shape[1],
            "S": 0 if self.cu_seqlens is None else self.rows,
            "G": self.q.shape[2],
            "H": self.v.shape[2],
            "K": self.q.shape[3],
            "DECAY": self.decay,
        }


def _systems(call: Call, scores: Tensor, solve: Tensor, solve_back: Tensor | None) -> Launch:
    """The launch that solves the triangular systems of all chunks, transposed ones too unless None."""
    # pairs are held for every key where each has a decay; exact products of float32 hold three parts of each operand
    most = 16 if call.decay == "key" else 32 if call.q.dtype == torch.float32 else 64
    block = _block(call.q.shape[3], most)
    arguments = {**call.common(), "p_scores": scores, "p_solve": solve, "p_solve_back": solve_back, "BK": block}
    reads = (call.q, call.k, call.log_decay, call.beta)
    threads = 4 if call.decay == "key" else 1
    grid = (call.slots(SUB) * call.v.shape[2],)
    return Launch(systems_kernel, grid, arguments, reads, (scores, solve, solve_back), num_warps=threads)


def _walks(call: Call, segment: int) -> tuple[dict[str, Any], dict[str, int]]:
    """The arguments and the options of all launches whose programs hold a head's state of VALUES columns."""
    size = call.q.shape[3]
    # the state of 16 values is spread over warps by keys, 32 each; of more values every warp would hold all keys. Parts
    # of 64 keys leave no room for the three parts of every operand that exact products hold
    wide = size > 128 and call.q.dtype == torch.bfloat16
    keys, threads = _block(size, 64 if wide else 32), _block(size, 256)
    arguments = {
        **call.common(),
        "p_v": call.v,
        "V": call.v.shape[3],
        "scale": call.scale,
        "segment": segment,
        "BK": keys,
        "PARTS": -(-size // keys),
        "BV": VALUES,
    }
    return arguments, {"num_warps": max(threads // properties(call.q.device).warp, 1)}


def _states(call: Call, backward: bool, **tensors: Tensor | None) -> list[Launch]:
    """The launches that walk through the sequences, in both directions if ``backward``.

    Args:
        call: The inputs.
        backward: Which pass they are part of.
        tensors: What the kernels read and write beside the inputs, by the names of their pointers without ``p_``.
    """
    directions = 2 if backward else 1
    segment = call.segment(directions)
    cut = call.q.shape[1] > segment
    launches = []
    if cut:
        entering, launches = _entering(call, segment, backward, tensors)
        tensors |= entering
    read = ("grad_o", "scores", "solve", "solve_back", "initial", "grad_final")
    written = ("o", "w", "z", "grad_v", "states", "grad_states", "final", "grad_initial")
    arguments, options = _walks(call, segment)
    arguments |= {f"p_{name}": tensors.get(name) for name in read + written}
    arguments |= {"CUT": cut, "ROWS": call.stretch}
    reads = (call.q, call.k, call.v, call.log_decay, call.beta, *(tensors.get(name) for name in read))
    writes = tuple(tensors.get(name) for name in written)
    slots = call.slots(segment) if cut else call.rows
    grid = (slots * call.v.shape[2] * call.columns, directions)
    return [*launches, Launch(states_kernel, grid, arguments, reads, writes, **options)]


def _entering(
    call: Call, segment: int, backward: bool, tensors: dict[str, Tensor | None]
) -> tuple[dict[str, Tensor], list[Launch]]:
    """What enters the segments, unwritten, in place of what enters the sequences, and the launches that write it.

    Args:
        call: The inputs.
        segment: Tokens of a segment.
        backward: Whether gradients enter too, from behind.
        tensors: What walks read, as in :func:`_states`.
    """
    heads, size, values = call.v.shape[2], call.q.shape[3], call.v.shape[3]
    directions, slots = 2 if backward else 1, call.slots(segment)
    summaries = call.q.new_empty((slots, heads, size, values + size), dtype=torch.float32)
    grad_summaries = call.matrices(slots, torch.float32) if backward else None
    entering = {name: call.matrices(slots, torch.float32) for name in ("initial", "grad_final")[:directions]}
    walks, options = _walks(call, segment)
    found = {"p_summaries": summaries, "p_grad_summaries": grad_summaries}
    systems = {name: tensors.get(name) for name in ("grad_o", "scores", "solve", "solve_back")}
    arguments = {**walks, **{f"p_{name}": tensor for name, tensor in systems.items()}, **found}
    # no outputs, no queries
    queried = (call.q, *systems.values()) if backward else (systems["solve"],)
    reads = (call.k, call.v, call.log_decay, call.beta, *queried)
    grid = (slots * heads * call.summary_columns, directions)
    summarise = Launch(summaries_kernel, grid, arguments, reads, (summaries, grad_summaries), **options)
    names = ("p_cu", "T", "S", "H", "K", "V", "segment", "BK", "PARTS", "BV")
    given = (tensors.get("initial"), tensors.get("grad_final"))
    arguments = {
        **{name: walks[name] for name in names},
        **found,
        "p_initial": given[0],
        "p_grad_final": given[1],
        "p_entering": entering["initial"],
        "p_grad_entering": entering.get("grad_final"),
    }
    grid = (slots * heads * call.columns, directions)
    reads = (summaries, grad_summaries, *given)
    return entering, [summarise, Launch(compose_kernel, grid, arguments, reads, tuple(entering.values()), **options)]


def plan_forward(call: Call, initial_state: Tensor | None) -> tuple[tuple[Tensor, Tensor], list[Launch]]:
    """The results of a forward pass, unwritten, and the launches that write them."""
    o, final_state = torch.empty_like(call.v), call.matrices(call.rows, torch.float32)
    scores, solve = call.squares(), call.squares()
    launches = [
        _systems(call, scores, solve, None),
        *_states(call, False, scores=scores, solve=solve, initial=initial_state, o=o, final=final_state),
    ]
    return (o, final_state), launches


def plan_backward(
    call: Call, grad_o: Tensor, grad_final_state: Tensor, initial_state: Tensor | None
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor], list[Launch]]:
    """The results of a backward pass, unwritten, and the launches that write them."""
    q, k, v, beta, log_decay = call.q, call.k, call.v, call.beta, call.log_decay
    batch, total, groups, size = q.shape
    heads, values = v.shape[2:]
    grad_q, grad_k, grad_v, grad_beta = (torch.empty_like(tensor) for tensor in (q, k, v, beta))
    grad_log = None if log_decay is None else torch.empty_like(log_decay)
    grad_state = torch.empty_like(grad_final_state)
    scores, solve, solve_back = (call.squares() for _ in range(3))
    w, z = (torch.empty_like(v, dtype=call.kept) for _ in range(2))
    states, grad_states = (call.matrices(call.slots(call.stretch), call.kept) for _ in range(2))
    launches = [
        _systems(call, scores, solve, solve_back),
        *_states(
            call, True, grad_o=grad_o, scores=scores, solve=solve, solve_back=solve_back, initial=initial_state,
            grad_final=grad_final_state, w=w, z=z, grad_v=grad_v, states=states, grad_states=grad_states,
            grad_initial=grad_state,
        ),
    ]  # fmt: skip
    common = {**call.common(), "p_w": w, "p_z": z, "p_grad_o": grad_o, "V": values, "scale": call.scale}
    common["FINE"] = call.fine
    grad_scores, grad_near = call.squares(), call.squares()
    names = {"p_w", "p_z", "p_beta", "p_grad_o", "p_cu", "T", "S", "H", "V", "scale", "FINE"}
    arguments = {name: value for name, value in common.items() if name in names}
    arguments |= {"p_grad_scores": grad_scores, "p_grad_near": grad_near, "p_grad_beta": grad_beta}
    arguments["BV"] = _block(values, call.stretch)
    grid = (call.slots(SUB) * heads,)
    writes = (grad_scores, grad_near, grad_beta)
    launches.append(Launch(pairs_kernel, grid, arguments, (w, z, beta, grad_o), writes, num_warps=1))
    # what meets here at once fits the registers in narrow tiles only
    block, shared = _block(size, 16 if call.decay == "key" or call.kept == torch.float32 else 32), heads // groups
    n_columns = -(-size // block)
    shares_q, shares_k, shares_log = grad_q, grad_k, grad_log
    if shared > 1:
        shares_q, shares_k = (q.new_empty((shared, *q.shape), dtype=torch.float32) for _ in range(2))
    cut = call.decay == "token" and n_columns > 1
    if cut:
        shares_log = q.new_empty((n_columns, batch * total * heads), dtype=torch.float32)
    arguments = {
        **common,
        "p_states": states,
        "p_grad_states": grad_states,
        "p_grad_scores": grad_scores,
        "p_grad_near": grad_near,
        "p_grad_q": shares_q,
        "p_grad_k": shares_k,
        "p_grad_log": shares_log,
        "size_qk": q.numel(),
        "size_log": batch * total * heads,
        "ROWS": call.stretch,
        "BK": block,
        "BV": _block(values, 32),
    }
    reads = (q, k, w, z, log_decay, beta, grad_o, states, grad_states, grad_scores, grad_near)
    writes = (shares_q, shares_k, shares_log)
    threads = 4 * call.stretch // properties(q.device).warp
    grid = (call.slots(call.stretch) * heads * n_columns,)
    launches.append(Launch(gradients_kernel, grid, arguments, reads, writes, num_warps=threads))
    if shared > 1 or cut:
        of_qk = (shares_q, shares_k, grad_q, grad_k) if shared > 1 else None
        launches.append(_add_up(of_qk, (shares_log, grad_log) if cut else None))
    return (grad_q, grad_k, grad_v, grad_beta, grad_log, grad_state), launches


def _add_up(
    of_qk: tuple[Tensor, Tensor, Tensor, Tensor] | None, of_log: tuple[Tensor | None, Tensor | None] | None
) -> Launch:
    """The launch that adds up shares of q and k, and shares of the decay, each given with where their sum goes."""
    shares_q, shares_k, grad_q, grad_k = of_qk or (None, None, None, None)
    shares_log, grad_log = of_log or (None, None)
    sizes = tuple(0 if tensor is None else tensor.numel() for tensor in (grad_q, grad_log))
    arguments = {
        "p_shares_q": shares_q,
        "p_shares_k": shares_k,
        "p_shares_log": shares_log,
        "p_grad_q": grad_q,
        "p_grad_k": grad_k,
        "p_grad_log": grad_log,
        "n_parts": 0 if shares_q is None else shares_q.shape[0],
        "n_shares": 0 if shares_log is None else shares_log.shape[0],
        "size_qk": sizes[0],
        "size_log": sizes[1],
        "BN": 64,
        "BP": 16,
    }
    reads, writes = (shares_q, shares_k, shares_log), (grad_q, grad_k, grad_log)
    return Launch(shares_kernel, (-(-max(sizes) // 64), 3), arguments, reads, writes, num_warps=4)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """As the op ``delta_rule_forward``."""
    if q.dtype == torch.float64:
        return chunked.forward(q, k, v, beta, log_decay, initial_state, cu_seqlens, scale)
    results, launches = plan_forward(Call(q, k, v, beta, log_decay, cu_seqlens, scale), initial_state)
    run(launches, q.device)
    return results


def backward(
    grad_o: Tensor,
    grad_final_state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
) -> tuple[Tensor, ...]:
    """As the op ``delta_rule_backward``."""
    if q.dtype == torch.float64:
        return chunked.backward(grad_o, grad_final_state, q, k, v, beta, log_decay, initial_state, cu_seqlens, scale)
    call = Call(q, k, v, beta, log_decay, cu_seqlens, scale)
    (*grads, grad_log, grad_state), launches = plan_backward(call, grad_o, grad_final_state, initial_state)
    run(launches, q.device)
    return *grads, q.new_empty(0) if grad_log is None else grad_log, grad_state


def example(
    label: str,
    decay: str,
    kinds: tuple[torch.dtype, torch.dtype],
    sizes: tuple[int, int, int, int],
    packed: bool,
    state: bool,
) -> Iterator[Example]:
    """The launches of one call forward and backward on meta tensors, for compiling ahead of time.

    Args:
        label: Names it.
        decay: ``"none"``, ``"token"`` or ``"key"``.
        kinds: The dtypes of the activations, and of the logarithms and betas.
        sizes: G, H, K and V.
        packed: Whether 65536 tokens are 8 sequences, else 4 rows of 4096.
        state: Whether there is an initial state.
    """
    groups, heads, size, values = sizes
    batch, total = (1, 65536) if packed else (4, 4096)
    dtype, of_decay = kinds

    def tensor(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=kind, device="meta")

    q, v = tensor(batch, total, groups, size), tensor(batch, total, heads, values)
    beta = tensor(batch, total, heads, kind=of_decay)
    log_decay = {"none": None, "token": beta, "key": tensor(batch, total, heads, size, kind=of_decay)}[decay]
    call = Call(q, q, v, beta, log_decay, tensor(9, kind=torch.int32) if packed else None, size**-0.5)
    final_state = tensor(8 if packed else batch, heads, size, values, kind=accumulator(dtype))
    initial_state = final_state if state else None
    words = (f"{decay} decay", "packed" if packed else "dense", "state" if state else "")
    label = " ".join(filter(None, (f"{label}, G={groups} H={heads} K={size} V={values},", *words)))
    _, launches = plan_forward(call, initial_state)
    yield Example(f"{label} forward", launches, batch * total * heads)
    _, launches = plan_backward(call, v, final_state, initial_state)
    yield Example(f"{label} backward", launches, batch * total * heads)


def examples(exhaustive: bool) -> Iterator[Example]:
    """What is compiled ahead of time: every form that compiles differently, or one of each kind, by token and head."""
    full, half = torch.float32, torch.bfloat16
    if not exhaustive:
        yield from example("bfloat16, decay float32", "token", (half, full), (16, 32, 128, 128), False, False)
        yield from example("bfloat16", "none", (half, half), (16, 16, 128, 128), True, True)
        yield from example("bfloat16, decay float32", "key", (half, full), (16, 16, 128, 128), True, True)
        yield from example("bfloat16, decay float32", "key", (half, full), (2, 2, 128, 128), True, True)
        return
    kinds = {
        "bfloat16": (half, half),
        "bfloat16, decay float32": (half, full),
        "float16": (torch.float16, torch.float16),
        "float32": (full, full),
    }
    # many heads, and few, whose walks are cut where that is worth the columns of the transition
    sizes = ((2, 128, 16, 16), (2, 8, 256, 256), (1, 2, 16, 16), (1, 2, 256, 128))
    for kind, decay, size, packed in itertools.product(kinds, ("none", "token", "key"), sizes, (False, True)):
        yield from example(kind, decay, kinds[kind], size, packed, packed)
