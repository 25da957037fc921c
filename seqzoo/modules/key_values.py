"""Keys and values of earlier tokens: a cache that grows, a ring that holds the last ones, and attention over either.

A cache is ``{"k": (B, capacity, G, K), "v": (B, capacity, G, V), "length": (B,)}``: of each row the first ``length``
places hold tokens, the others zeros. One that is written in place lies head by head in memory, as attention reads it:
one after the other its keys are read at twice the speed. A ring has as many places as its window, and the token at
position p is at place ``p % window``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seqzoo.kernels.attention import attention
from seqzoo.mixer import State, StateSpec
from seqzoo.packing import Packing

# places of the smallest cache that is written in place
LEAST = 16


def cache_spec(batch_size: int, groups: int, key: int, value: int, dtype: torch.dtype) -> StateSpec:
    """The spec of a cache of any capacity."""
    return {
        "k": ((batch_size, None, groups, key), dtype),
        "v": ((batch_size, None, groups, value), dtype),
        "length": ((batch_size,), torch.int64),
    }


def attend_to_cache(
    q: Tensor, k: Tensor, v: Tensor, state: State | None, packing: Packing | None, return_state: bool, **options: Any
) -> tuple[Tensor, State | None]:
    """Causal attention to all tokens so far, and the cache that holds them.

    With gradients the cache is copied whenever it grows. Without, it is written in place and doubles when it is full,
    and the given one is used up. In compiled code it grows by all tokens of a call, on whatever sequence they are.

    Args:
        q: ``(B, T, H, K)``.
        k: ``(B, T, G, K)``.
        v: ``(B, T, G, V)``.
        state: The cache, or None for an empty one; packed, one row a sequence.
        packing: Of packed sequences.
        return_state: Whether the cache is wanted.
        options: Of :func:`seqzoo.ops.attention`.
    """
    held = () if state is None else (state["k"], state["v"])
    # whatever takes a gradient keeps keys and values for it
    sources = (q, k, v, options.get("sinks"), *held)
    recorded = torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in sources)
    if state is None:
        o, _ = attention(q, k, v, cu_seqlens=packing, **options)
        if not return_state:
            return o, None
        rows = k.shape[0] if packing is None else packing.n_sequences
        empty = k.new_zeros(rows, dtype=torch.int64)
        if packing is None:
            return o, {"k": k.clone(), "v": v.clone(), "length": empty + k.shape[1]}
        none = {name: value[:1, :0].expand(rows, -1, -1, -1) for name, value in (("k", k), ("v", v))}
        return o, Cache(none, empty, recorded).add(k, v, packing)
    cache = Cache({"k": state["k"], "v": state["v"]}, state["length"], recorded)
    after = cache.add(k, v, packing)
    alike = cache.alike if packing is None else None
    if alike is not None:
        end = alike + k.shape[1]
        o, _ = attention(q, after["k"][:, :end], after["v"][:, :end], **options)
    elif packing is None and q.shape[1] == 1:
        places = torch.arange(after["k"].shape[1], device=q.device)
        hidden = (places >= after["length"][:, None])[:, None, None]
        bias = hidden.new_zeros(hidden.shape, dtype=torch.float32).masked_fill(hidden, -torch.inf)
        o, _ = attention(q, after["k"], after["v"], causal=False, bias=bias.to(_bias_dtype(q)), **options)
    else:
        places = torch.arange(state["k"].shape[1], device=q.device)
        places = torch.where(places < state["length"][:, None], places, -1)
        o = attend_to_joined(q, k, v, state, places, packing, **options)
    return o, after


class Cache:
    """A cache to which tokens are added.

    Args:
        tensors: ``"k"`` and ``"v"``.
        length: Tokens of each row.
        recorded: Whether a gradient may ask for keys and values again, so that they are not written in place.
    """

    def __init__(self, tensors: State, length: Tensor, recorded: bool) -> None:
        self.tensors, self.length, self.recorded = tensors, length, recorded
        self.known = not torch.compiler.is_compiling()
        self.alike = self._alike()

    def _alike(self) -> int | None:
        """The length that all rows have, where the host may know it."""
        if not self.known or self.length.shape[0] == 0:
            return None
        lengths = self.length.tolist()
        return lengths[0] if lengths.count(lengths[0]) == len(lengths) else None

    def add(self, k: Tensor, v: Tensor, packing: Packing | None) -> State:
        """The cache with more tokens, ``(B, T, G, K)`` and ``(B, T, G, V)``."""
        new = {"k": k, "v": v}
        total, capacity = k.shape[1], self.tensors["k"].shape[1]
        after = self.length + (total if packing is None else packing.lengths)
        in_place = self._in_place()
        if packing is None and self.alike is not None and not in_place:
            kept = {name: value[:, : self.alike] for name, value in self.tensors.items()}
            return {name: torch.cat((kept[name], new[name]), 1) for name in new} | {"length": after}
        needed = capacity + total
        if self.known:
            needed = int(after.max()) if after.numel() else 0
        if in_place:
            grown = self.tensors
            if needed > capacity:
                room = max(needed, 2 * capacity, LEAST)
                grown = {name: _padded(value, room) for name, value in self.tensors.items()}
            for name, value in grown.items():
                self._write(value, new[name], packing)
            return {**grown, "length": after}
        room = {name: _padded(value, max(needed, capacity)) for name, value in self.tensors.items()}
        index = token_positions(k, self.length, packing)
        return {name: value.index_put(index, new[name].flatten(0, 1)) for name, value in room.items()} | {
            "length": after
        }

    def _in_place(self) -> bool:
        values = self.tensors.values()
        return (
            self.known
            and not self.recorded
            and all(value.transpose(1, 2).is_contiguous() or value.is_contiguous() for value in values)
            and (torch.is_inference_mode_enabled() or not any(value.is_inference() for value in values))
        )

    def _write(self, value: Tensor, new: Tensor, packing: Packing | None) -> None:
        if packing is None and self.alike is not None:
            value[:, self.alike : self.alike + new.shape[1]] = new
        else:
            value.index_put_(token_positions(new, self.length, packing), new.flatten(0, 1))


def token_positions(new: Tensor, start: Tensor, packing: Packing | None) -> tuple[Tensor, Tensor]:
    """Row and position of every token of ``(B, T, ...)``, both ``(B T,)``, of rows that have ``start`` tokens.

    Packed sequences may be more than rows; those have none.
    """
    if packing is not None:
        start = F.pad(start, (0, packing.n_sequences - start.shape[0]))
        return packing.sequence_index, packing.positions + start[packing.sequence_index]
    batch, total = new.shape[:2]
    rows = torch.arange(batch, device=new.device)[:, None].expand(batch, total)
    positions = start[:, None] + torch.arange(total, device=new.device)
    return rows.flatten(), positions.flatten()


def attend_to_joined(
    q: Tensor, k: Tensor, v: Tensor, state: State, places: Tensor, packing: Packing | None, **options: Any
) -> Tensor:
    """Causal attention of new tokens to those that a cache or ring holds and to one another.

    All keys are sorted by row and position and packed, so that rows may hold any numbers of them. What fills up a row
    comes last, as a sequence without queries; packed sequences beyond the rows see nothing. All shapes follow from
    those of the arguments.

    Args:
        q: ``(B, T, H, K)``.
        k: ``(B, T, G, K)``.
        v: ``(B, T, G, V)``.
        state: ``"k"`` and ``"v"``, ``(S, capacity, ...)``, and ``"length"``, the tokens that each row has seen.
        places: int64 ``(S, capacity)``, the position of every token that is held, negative where there is none.
        packing: Of packed sequences, S or more.
        options: Of :func:`seqzoo.ops.attention`.
    """
    rows, total = places.shape[0], q.shape[0] * q.shape[1]
    row, position = token_positions(k, state["length"], packing)
    held = places >= 0
    # positions are below 2 ** 40; what nobody reads sorts behind the last row
    of_held = torch.where(held, torch.arange(rows, device=q.device)[:, None] * 2**40 + places, rows * 2**40)
    of_new = row.clamp(max=rows) * 2**40 + torch.where(row < rows, position, 0)
    order = torch.cat((of_held.flatten(), of_new)).argsort(stable=True)
    joined = [
        torch.cat((old.flatten(0, 1), new.flatten(0, 1))).index_select(0, order)[None]
        for old, new in ((state["k"], k), (state["v"], v))
    ]
    if packing is None:
        bounds = torch.arange(rows + 1, device=q.device) * q.shape[1]
    else:
        bounds = packing.cu_seqlens[: rows + 1].to(torch.int64)
    bounds_k = F.pad(held.sum(1).cumsum(0), (1, 0)) + bounds
    ends, ends_k = bounds.new_full((2,), total), torch.stack((bounds_k[-1], bounds_k.new_full((), order.shape[0])))
    cu_seqlens, cu_seqlens_k = (torch.cat(pair).to(torch.int32) for pair in ((bounds, ends), (bounds_k, ends_k)))
    o, _ = attention(q.flatten(0, 1)[None], *joined, cu_seqlens=cu_seqlens, cu_seqlens_k=cu_seqlens_k, **options)
    return o[0].unflatten(0, q.shape[:2])


def ring_spec(batch_size: int, window: int, groups: int, key: int, value: int, dtype: torch.dtype) -> StateSpec:
    """The spec of a ring."""
    return {
        "k": ((batch_size, window, groups, key), dtype),
        "v": ((batch_size, window, groups, value), dtype),
        "length": ((batch_size,), torch.int64),
    }


def attend_to_ring(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: State | None,
    packing: Packing | None,
    return_state: bool,
    window: int,
    **options: Any,
) -> tuple[Tensor, State | None]:
    """Causal attention to the last ``window`` tokens, and the ring that holds them; arguments as for a cache."""
    if state is None:
        o, _ = attention(q, k, v, window=window, cu_seqlens=packing, **options)
        if not return_state:
            return o, None
        rows = k.shape[0] if packing is None else packing.n_sequences
        empty = {name: value.new_zeros(rows, window, *value.shape[2:]) for name, value in (("k", k), ("v", v))}
        return o, turn({**empty, "length": k.new_zeros(rows, dtype=torch.int64)}, k, v, packing)
    if packing is None and q.shape[1] == 1:
        after = turn(state, k, v, packing)
        places = torch.arange(window, device=q.device)
        hidden = (places >= after["length"][:, None])[:, None, None]
        bias = hidden.new_zeros(hidden.shape, dtype=torch.float32).masked_fill(hidden, -torch.inf)
        o, _ = attention(q, after["k"], after["v"], causal=False, bias=bias.to(_bias_dtype(q)), **options)
        return o, after
    places = _ring_positions(state["length"], window)
    o = attend_to_joined(q, k, v, state, places, packing, window=window, **options)
    return o, turn(state, k, v, packing)


def _ring_positions(length: Tensor, window: int) -> Tensor:
    """int64 ``(S, window)``: the last position before ``length`` at each place, negative where there is none."""
    places = torch.arange(window, device=length.device)
    last = length[:, None] - 1
    return last - torch.remainder(last - places, window)


def turn(state: State, k: Tensor, v: Tensor, packing: Packing | None) -> State:
    """The ring with more tokens."""
    after = _seen(state, k, packing)
    return replace_places(state, k, v, packing, _ring_positions(after, state["k"].shape[1]))


def replace_places(state: State, k: Tensor, v: Tensor, packing: Packing | None, positions: Tensor) -> State:
    """What is held, with new tokens where they belong.

    Args:
        state: ``"k"`` and ``"v"``, ``(S, places, ...)``, and ``"length"``, the tokens that each row has seen.
        k: ``(B, T, G, K)``.
        v: ``(B, T, G, V)``.
        packing: Of packed sequences, S or more, of which the first S are the rows.
        positions: int64 ``(S, places)``, the position of the token that each place is for.
    """
    before, after = state["length"], _seen(state, k, packing)
    total = k.shape[0] * k.shape[1]
    if total == 0:
        return {name: value.clone() for name, value in state.items()}
    rows = torch.arange(before.shape[0], device=k.device)
    first = rows * k.shape[1] if packing is None else packing.cu_seqlens[:-1].to(torch.int64)[rows]
    new = (positions >= before[:, None]) & (positions < after[:, None])
    index = torch.where(new, first[:, None] + positions - before[:, None], 0)
    found = {}
    for name, value in (("k", k), ("v", v)):
        taken = value.flatten(0, 1).index_select(0, index.flatten()).unflatten(0, index.shape)
        found[name] = torch.where(new[..., None, None], taken, state[name])
    return {**found, "length": after}


def _seen(state: State, k: Tensor, packing: Packing | None) -> Tensor:
    """How many tokens the rows have seen after the new ones."""
    before = state["length"]
    return before + (k.shape[1] if packing is None else packing.lengths[: before.shape[0]])


def _bias_dtype(q: Tensor) -> torch.dtype:
    return q.dtype if q.dtype == torch.float64 else torch.float32


def _padded(value: Tensor, places: int) -> Tensor:
    """``(S, capacity, G, K)`` with zeros up to so many places, head by head in memory."""
    return F.pad(value.transpose(1, 2), (0, 0, 0, places - value.shape[1])).transpose(1, 2)
