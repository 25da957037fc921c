"""Softmax attention over sequences that lie on several ranks.

A rank has queries, keys and values of its own tokens. Keys come to the queries (``"allgather"``, ``"ring"``), or every
rank gets all tokens of some of the heads (``"ulysses"``), or both (``"usp"``). Which token is where, and who sees what,
follows from a :class:`Layout` on the host, the same on every rank, so nothing but tensors is exchanged. What a rank
computes are calls of the op on parts of its queries and keys, merged by the logarithms of their sums.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from seqzoo.kernels.attention import attention, op
from seqzoo.kernels.checks import accumulator
from seqzoo.mixer import State
from seqzoo.modules.key_values import Cache, turn
from seqzoo.packing import Packing
from seqzoo.parallel.blocks import Attend, Job
from seqzoo.parallel.exchange import Group, anchor_of, message_bytes
from seqzoo.parallel.layout import Layout, Range, count, merged, place
from seqzoo.parallel.plan import Plan
from seqzoo.parallel.ring import Ring, block_forms
from seqzoo.parallel.routes import Route, Share, bytes_of, gathering, parts_of, routed, to_heads, to_tokens
from seqzoo.parallel.spans import Call, Places, Span, calls, segments, spans

Method = Literal["allgather", "ulysses", "ring", "usp"]


@dataclass(frozen=True)
class Course:
    """What a call exchanges, and what it computes in between: all that follows from integers.

    Attributes:
        there: The route of q, k and v to heads, None where a rank computes all heads of its tokens.
        back: That of o and lse from there.
        share: The heads that this rank computes.
        gather: The route of keys and values to those who see them, None where none is needed.
        ring: How blocks go round.
        held: The tokens of keys and values that are here before any block comes.
        calls: Those for them.
    """

    there: Route | None
    back: Route | None
    share: Share
    gather: Route | None
    ring: Ring
    held: tuple[Range, ...]
    calls: list[Call]


@functools.lru_cache(maxsize=64)
def course(
    layout: Layout, gathers: bool, width: int, n_heads: int, n_groups: int, causal: bool, window: int | None
) -> Course:
    """That of a call; layers of one shape under one layout share it.

    Args:
        layout: Where the tokens are.
        gathers: Whether keys and values are gathered, else they go round.
        width: Ranks that share the heads.
        n_heads: Of the queries.
        n_groups: Of keys and values.
        causal: As of :func:`parallel_attention`, like the next.
        window: Keys that a query sees at most.
    """
    there = back = gather = None
    if width > 1:
        there = to_heads(layout, width, n_heads, n_groups)
        back = to_tokens(layout, there, n_heads)
    ring = Ring.of(layout, width, causal, window)
    held = ring.teams.own
    if gathers and ring.last:
        seen = [layout.seen(rank, causal, window) for rank in range(layout.size)]
        gather, held = gathering(layout, seen, 0, 2), seen[layout.rank]
        ring = Ring(ring.teams, 1, 0, ((),) * layout.size, (0,) * layout.size)
    found = calls(spans(layout.extent, ring.teams.own, held), causal, window, layout.bounds is not None)
    return Course(there, back, Share.of(layout.rank % width, width, n_heads, n_groups), gather, ring, held, found)


def head_ranks_of(method: str, head_ranks: int | None, size: int, n_heads: int) -> int:
    """How many ranks share the heads.

    Raises:
        ValueError: If the method is unknown, or so many ranks cannot share so many heads.
    """
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {', '.join(get_args(Method))}, got {method!r}")
    if method != "usp":
        if head_ranks is not None:
            raise ValueError(f"head_ranks is for method 'usp', got {head_ranks!r} with {method!r}")
        if method != "ulysses":
            return 1
        head_ranks = size
    elif head_ranks is None:
        return math.gcd(size, n_heads)
    fitting = [width for width in range(1, size + 1) if size % width == 0 and n_heads % width == 0]
    if head_ranks not in fitting:
        raise ValueError(
            f"{head_ranks} of {size} ranks cannot share {n_heads} heads evenly: that number must divide both. Use "
            f"method='usp' with head_ranks one of {fitting}, or method 'allgather' or 'ring', which take any heads"
        )
    return head_ranks


def parallel_attention(
    group: Group,
    plan: Plan | Layout,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: State | None = None,
    *,
    method: Method = "allgather",
    head_ranks: int | None = None,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    sinks: Tensor | None = None,
    logit_cap: float | None = None,
    mixer: str = "attention",
) -> tuple[Tensor, Tensor]:
    """This rank's part of :func:`seqzoo.ops.attention` over sequences that lie on all ranks of a group.

    Every rank calls it with the same options, also one without tokens, and runs backward from a loss that depends on o.

    * ``"allgather"``: every rank is sent those keys and values that its queries see, and no others (LASP-2H,
      https://arxiv.org/abs/2502.07563, section 3.3): one all-to-all, and one in backward. They are kept for it.
    * ``"ulysses"``: every rank gets all tokens of H / P heads (https://arxiv.org/abs/2309.14509, section 3.1): one
      all-to-all to there, one back, and the same in backward. Keys are repeated where there are fewer groups than
      ranks.
    * ``"ring"``: blocks of keys and values go from rank to rank while those that are there are attended to
      (https://arxiv.org/abs/2310.01889, section 3), as far as someone sees them; two are held at a time. In backward
      they go again, and their gradients with them, in float32 at least, and home from the last. The op's tiles compute
      it, on a GPU its forward pass once more.
    * ``"usp"``: teams of ``head_ranks`` successive ranks share heads, and blocks go round between teams
      (https://arxiv.org/abs/2405.07719, section 3.3).

    Nothing is sent where no query sees a key of another rank, but for heads. Under activation checkpointing with
    :func:`keep_exchanges` the keys that were gathered, the heads that came, and o and lse of a ring are kept.

    Args:
        group: The ranks.
        plan: Which of them has which tokens; of a dense batch all rows alike.
        q: ``(B, T, H, K)``, this rank's tokens: float64, float32, bfloat16 or float16.
        k: ``(B, T, G, K)``, of q's dtype; G divides H.
        v: ``(B, T, G, V)``, of q's dtype.
        state: Keys and values of the tokens before all of these, equal on every rank, one row a sequence: a cache
            ``{"k", "v", "length"}``, with a window its ring; see :mod:`seqzoo.modules.key_values`. Its gradient is each
            rank's share. Its lengths are read on the host.
        method: How keys and queries come together.
        head_ranks: For ``"usp"`` how many ranks share the heads; None means as many as can.
        causal: Whether queries see no later key.
        window: Keys that a causal query sees at most, its own included; others see as many to the other side.
        scale: Factor of the scores; ``K ** -0.5`` when omitted.
        sinks: ``(H,)``, equal on every rank: what joins each query's sums once; its gradient is each rank's share.
        logit_cap: Greatest magnitude of a score.
        mixer: Name of what calls, for errors.

    Returns:
        o: ``(B, T, H, V)``, of q's dtype.
        lse: ``(B, T, H)``, float32, float64 for float64 inputs. Both are differentiable.

    Raises:
        TypeError: If a dtype is none of those above.
        ValueError: If plan, shapes, options or the state do not fit, before anything is sent.
        SequenceParallelError: If another rank does not answer.
    """
    layout = Layout.of(plan)
    _check(group, layout, q, k, v, state, causal, window, scale, sinks, logit_cap)
    width = head_ranks_of(method, head_ranks, layout.size, q.shape[2])
    way = course(layout, method == "allgather", width, q.shape[2], k.shape[2], causal, window)
    if way.there is not None and way.back is not None:
        q, k, v = routed(way.there, group, mixer, "heads of queries, keys and values", q, k, v)
        k, v = way.share.spread(k), way.share.spread(v)
        sinks = None if sinks is None else sinks[way.share.heads]
    if way.gather is not None:
        k, v = routed(way.gather, group, mixer, "keys and values", k, v)
    earlier, state_k, state_v = [], None, None
    if state is not None:
        rows, places, lengths = _held(state, window)
        state_k, state_v = (way.share.spread(x[:, :, way.share.groups]) for x in rows)
        found = list(_state_spans(way.ring.teams, q.shape[0], places, lengths))
        earlier = calls(found, causal, window, True)
    job = Job(group, mixer, way.ring, way.held, way.calls, earlier, causal, window, scale, logit_cap)
    single = len(way.calls) == 1 and way.calls[0].queries and not way.ring.last and state is None
    if single:
        (call,) = way.calls
        queries, keys = (Places(one, call.kind.reverse, q.device) for one in (call.queries, call.keys))
        o, lse = attention(q, keys.take(k), keys.take(v), sinks=sinks, **job.options(call, queries, keys))
    else:
        o, lse = Attend.apply(job, anchor_of(q), q, k, v, state_k, state_v, sinks)
    if way.there is not None and way.back is not None:
        o, lse = routed(way.back, group, mixer, "outputs", o, lse)
    return o, lse


def _check(
    group: Group,
    layout: Layout,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: State | None,
    causal: bool,
    window: int | None,
    scale: float | None,
    sinks: Tensor | None,
    logit_cap: float | None,
) -> None:
    """Raises unless the arguments belong together."""
    op._check(q, k, v, window, scale, sinks, logit_cap, None, None, None)
    _check_tokens(group, layout, q=q, k=k, v=v)
    if state is None:
        return
    if not causal:
        raise ValueError("a state holds the tokens before all others, which only causal queries can go on from")
    _check_state(layout, k, v, state, window)


def _check_tokens(group: Group, layout: Layout, **tensors: Tensor) -> None:
    if (layout.size, layout.rank) != (group.size, group.rank):
        raise ValueError(
            f"the plan is that of rank {layout.rank} of {layout.size}, this is rank {group.rank} of {group.size} of "
            f"the group {group.name!r}"
        )
    for name, x in tensors.items():
        if x.shape[1] != count(layout.own):
            raise ValueError(f"the plan gives rank {layout.rank} {count(layout.own)} tokens, {name} has {x.shape[1]}")
        if layout.bounds is not None and x.shape[0] != 1:
            raise ValueError(f"packed sequences lie in a batch of 1, got a batch of {x.shape[0]} of {name}")


def _check_state(layout: Layout, k: Tensor, v: Tensor, state: State, window: int | None) -> None:
    rows = k.shape[0] if layout.bounds is None else len(layout.extent) - 1
    for name, like in (("k", k), ("v", v)):
        value = state[name]
        room = value.shape[1] if window is None and value.dim() > 1 else window
        wanted = (rows, room, *like.shape[2:])
        if tuple(value.shape) != wanted or value.dtype != like.dtype:
            raise ValueError(
                f"state[{name!r}] must have shape {wanted} and {like.dtype} for {rows} sequences"
                f"{'' if window is None else f' and a window of {window}'}, got {tuple(value.shape)} and {value.dtype}"
            )
    length = state["length"]
    if tuple(length.shape) != (rows,) or length.dtype != torch.int64:
        raise ValueError(
            f"state['length'] must have shape {(rows,)} and torch.int64, got {tuple(length.shape)} and {length.dtype}"
        )


def _held(state: State, window: int | None) -> tuple[tuple[Tensor, Tensor], list[int], list[int]]:
    """Keys and values of a state, ``(1, S * places, G, ...)``; of every row the place of the first, and how many."""
    lengths = state["length"].tolist()
    n_rows, room = state["k"].shape[:2]
    k, v = (state[name].flatten(0, 1) for name in ("k", "v"))
    firsts = [row * room for row in range(n_rows)]
    if window is not None:
        # from the oldest to the newest, which comes last
        rows = torch.arange(n_rows, device=k.device)[:, None] * room
        order = (rows + (state["length"][:, None] + torch.arange(room, device=k.device)) % room).flatten()
        k, v = k.index_select(0, order), v.index_select(0, order)
        lengths = [min(length, room) for length in lengths]
        firsts = [first + room - length for first, length in zip(firsts, lengths, strict=True)]
    return (k[None], v[None]), firsts, lengths


def _state_spans(layout: Layout, batch: int, firsts: Sequence[int], lengths: Sequence[int]) -> Iterator[Span]:
    """A rank's queries, all rows of a batch as one, and the keys before their sequences, at negative positions."""
    total, extent = count(layout.own), layout.extent
    for row in range(batch):
        for index, first, last in segments(extent, layout.own):
            one = row if layout.bounds is None else index
            query = row * total + place(layout.own, first)
            yield Span(query, last - first, first - extent[index], firsts[one], lengths[one], -lengths[one])


def parallel_state(
    group: Group,
    plan: Plan | Layout,
    o: Tensor,
    k: Tensor,
    v: Tensor,
    state: State | None = None,
    *,
    window: int | None = None,
    mixer: str = "attention",
) -> tuple[Tensor, State]:
    """The state after all tokens, of whole sequences, on every rank: one all-to-all, and one in backward.

    Of a cache every rank is sent all keys and values, of a ring the last ``window`` of every sequence. The gradients of
    all ranks' states come back to the keys' ranks, on the way of o: on every rank the loss must depend on it.

    Args:
        group: The ranks.
        plan: Which of them has which tokens.
        o: What :func:`parallel_attention` returned, ``(B, T, H, V)``.
        k: ``(B, T, G, K)``, this rank's tokens.
        v: ``(B, T, G, V)``, of k's dtype.
        state: The state before the first token, equal on every rank, or None for an empty one. Without gradients a
            cache is written in place.
        window: That of a ring; None for a cache.
        mixer: Name of what calls, for errors.

    Returns:
        o and the state ``{"k", "v", "length"}``.

    Raises:
        ValueError: If plan, shapes or the state do not fit, before anything is sent.
        SequenceParallelError: If another rank does not answer.
    """
    layout = Layout.of(plan)
    _check_tokens(group, layout, o=o, k=k, v=v)
    if state is not None:
        _check_state(layout, k, v, state, window)
    sequences = list(pairwise(layout.extent))
    kept = [(start if window is None else max(start, end - window), end) for start, end in sequences]
    if layout.size > 1:
        route = gathering(layout, (merged(kept),) * layout.size, 1, 2)
        o, k, v = routed(route, group, mixer, "keys and values of the final state", o, k, v)
    else:
        k, v = (torch.cat([x[:, start:end] for start, end in kept], 1) for x in (k, v))
    packing = None
    if layout.bounds is not None:
        packing = Packing.from_lengths([count([one]) for one in kept], device=k.device)
    rows = k.shape[0] if packing is None else packing.n_sequences
    if state is None:
        empty = {name: x.new_zeros(rows, window or 0, *x.shape[2:]) for name, x in (("k", k), ("v", v))}
        state = {**empty, "length": torch.zeros(rows, dtype=torch.int64, device=k.device)}
    if window is None:
        recorded = torch.is_grad_enabled() and any(x.requires_grad for x in (o, k, v, state["k"], state["v"]))
        return o, Cache({"k": state["k"], "v": state["v"]}, state["length"], recorded).add(k, v, packing)
    passed = [first - start for (start, _), (first, _) in zip(sequences, kept, strict=True)]
    passed = torch.tensor(passed).to(k.device, non_blocking=True)
    # the tokens that were not sent are counted, and what is sent fills the ring where there are any
    return o, turn({**state, "length": state["length"] + passed}, k, v, packing)


class Payload(NamedTuple):
    """Bytes that a rank sends to others and receives from them."""

    sent_forward: int
    received_forward: int
    sent_backward: int
    received_backward: int


def attention_payload(
    plan: Plan | Layout,
    method: Method,
    *,
    n_heads: int,
    n_groups: int,
    key_size: int,
    value_size: int,
    dtype: torch.dtype,
    batch_size: int = 1,
    head_ranks: int | None = None,
    causal: bool = True,
    window: int | None = None,
) -> Payload:
    """The bytes of a call of :func:`parallel_attention` and of its backward pass, for the plan's rank.

    With w bytes an element (and 4, at least, of float32), ``c = B G (K + V)`` and messages that are filled up to 16
    bytes for each tensor in them:

    * ``"allgather"``: it receives ``c w`` for every other rank's token that its queries see, and sends the gradients
      back; it sends as much for its own to every rank that sees them. For a causal sequence in P equal shares of L
      tokens rank r receives ``r L c w`` and sends ``(P - 1 - r) L c w``.
    * ``"ulysses"``: of L tokens it sends ``(P - 1) / P`` of ``B L (H K + G (K + V)) w``, G at least P, there and of
      ``B L H (V w + 4)`` back; in backward what it received.
    * ``"ring"``: at each hop of a block, of which others see n tokens, ``n c w``; in backward ``n c (w + 4)``, for
      gradients set out after the first hop and go home after the last.
    * ``"usp"``: both, for its team's tokens and its share of the heads.

    Args:
        plan: Which rank has which tokens.
        method: As of :func:`parallel_attention`, like ``head_ranks``, ``causal`` and ``window``.
        n_heads: Of queries, H.
        n_groups: Of keys and values, G.
        key_size: K.
        value_size: V.
        dtype: Of q, k and v.
        batch_size: Rows, B.

    Raises:
        ValueError: As :func:`parallel_attention` does for the method.
    """
    layout = Layout.of(plan)
    width = head_ranks_of(method, head_ranks, layout.size, n_heads)
    way = course(layout, method == "allgather", width, n_heads, n_groups, causal, window)
    tokens = batch_size, count(layout.own)
    sizes = (n_heads, key_size), (n_groups, key_size), (n_groups, value_size)
    q, k, v = (torch.empty(*tokens, *size, dtype=dtype, device="meta") for size in sizes)
    total = Payload(0, 0, 0, 0)
    if way.there is not None and way.back is not None:
        total = _plus(total, _routed_bytes(way.there, layout.rank, q, k, v))
        q, k, v = way.there.results((q, k, v))
        k, v = way.share.spread(k), way.share.spread(v)
        o = torch.empty(*q.shape[:3], value_size, dtype=dtype, device="meta")
        lse = torch.empty(q.shape[:3], dtype=accumulator(dtype), device="meta")
        total = _plus(total, _routed_bytes(way.back, layout.rank, o, lse))
    if way.gather is not None:
        total = _plus(total, _routed_bytes(way.gather, layout.rank, k, v))
    return _plus(total, _ring_bytes(way.ring, k, v))


def _plus(one: Payload, other: Payload) -> Payload:
    return Payload(*map(sum, zip(one, other, strict=True)))


def _routed_bytes(route: Route, rank: int, *tensors: Tensor) -> Payload:
    sent = bytes_of(parts_of(tensors, route.out), rank)
    received = bytes_of(parts_of(route.results(tensors), route.into), rank)
    return Payload(sent, received, received, sent)


def _ring_bytes(ring: Ring, k: Tensor, v: Tensor) -> Payload:
    """Blocks both ways; gradients leave with every hop that a block has made, and come with every further one, home."""
    sent = received = of_sent = of_received = 0
    for hop in range(1, ring.last + 1):
        arrives, leaves = ring.owner(hop), ring.owner(hop, 1)
        if arrives is not None:
            received += message_bytes(block_forms(k, v, count(ring.parts[arrives])))
            of_sent += message_bytes(block_forms(k, v, count(ring.parts[arrives]), wide=True))
            if hop > 1:
                of_received += message_bytes(block_forms(k, v, count(ring.parts[arrives]), wide=True))
        if leaves is not None:
            sent += message_bytes(block_forms(k, v, count(ring.parts[leaves])))
    if ring.hops[ring.teams.rank]:
        of_received += message_bytes(block_forms(k, v, count(ring.parts[ring.teams.rank]), wide=True))
    return Payload(sent, received, sent + of_sent, received + of_received)
