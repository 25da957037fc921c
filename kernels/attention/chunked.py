"""``attention`` in tiles of queries and keys, in PyTorch operations on any device.

The softmax is taken online (https://arxiv.org/abs/1805.02867): over the tiles of keys that a tile of queries sees run
its greatest score m, its sum l of ``exp(s - m)`` and its sum of weighted values, and whoever brings a greater score
scales down what was there. Tiles that no query sees are not visited. The backward pass makes the weights again from
the logarithm of their sum (FlashAttention-2, https://arxiv.org/abs/2307.08691, section 3.1)::

    P = exp(s - lse)     dP = dO V^T     dS = P (dP - rowsum(dO O) + dlse)

where a sink is part of lse, and its own gradient the same with ``exp(sink - lse)`` for P and no dP.

Packed sequences of equal lengths are stacked, and what is stacked is one batch: as many steps as there are different
lengths, at most ``sqrt(2 T)``, and no tile that two sequences share. Their boundaries are read on the host.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from seqzoo.kernels.checks import accumulator
from seqzoo.kernels.dispatch import check_boundaries

# queries and keys of a tile of scores; elements of the tiles that are computed at once
QUERIES, KEYS = 128, 256
TILES_CPU, TILES = 1 << 18, 1 << 24


@dataclass(frozen=True)
class Form:
    """What is the same for all sequences of a call."""

    causal: bool
    window: int | None
    scale: float
    logit_cap: float | None

    def near(self, total: int, total_k: int) -> tuple[int, Form]:
        """The first key that any query sees, and the form of what remains, without what hides none of that."""
        seen = self.visible(range(total_k - total, total_k), range(total_k))
        first = seen.start if seen else 0
        window, total_k = self.window, total_k - first
        if window is not None and window >= (total_k if self.causal else max(total, total_k)):
            window = None
        # a single query is the last, and no key is behind it
        causal = self.causal and total > 1
        kept = causal == self.causal and window == self.window
        return first, self if kept else replace(self, causal=causal, window=window)

    def visible(self, queries: range, keys: range) -> range:
        """The keys that some of the queries see, both counted from where the sequence of keys begins."""
        first, end = keys.start, keys.stop
        if self.window is not None:
            first = max(first, queries.start - self.window + 1)
            end = min(end, queries.stop - 1 + self.window)
        if self.causal:
            end = min(end, queries.stop)
        return range(first, max(first, end))

    def hidden(self, queries: range, keys: range, device: torch.device) -> Tensor | None:
        """Where a query does not see a key, bool ``(queries, keys)``; None where all see all."""
        ahead = keys.stop - 1 - queries.start
        behind = queries.stop - 1 - keys.start
        future = self.causal and ahead > 0
        past = self.window is not None and behind >= self.window
        far = self.window is not None and not self.causal and ahead >= self.window
        if not (future or past or far):
            return None
        distance = (
            torch.arange(queries.start, queries.stop, device=device)[:, None]
            - torch.arange(keys.start, keys.stop, device=device)[None]
        )
        found = distance < 0 if self.causal else None
        if self.window is not None:
            beyond = (distance if self.causal else distance.abs()) >= self.window
            found = beyond if found is None else found | beyond
        return found


# from q, k, v, the bias and the form to o in q's dtype and lse, and from the gradients of both to those of all four
Attend = Callable[[Tensor, Tensor, Tensor, "Tensor | None", Form], tuple[Tensor, Tensor]]
Differentiate = Callable[..., tuple[Tensor, Tensor, Tensor, "Tensor | None"]]


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    bias: Tensor | None,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float,
    logit_cap: float | None,
    attend: Attend | None = None,
) -> tuple[Tensor, Tensor]:
    """As the op ``attention_forward``; ``attend`` computes a batch of dense sequences, in tiles when omitted."""
    attend = attend_in_tiles if attend is None else attend
    form = Form(causal, window, scale, logit_cap)
    if cu_seqlens is None:
        o, lse = _attend(attend, q, k, v, bias, form)
    else:
        o = q.new_zeros((*q.shape[:3], v.shape[3]))
        lse = q.new_full(q.shape[:3], -torch.inf, dtype=accumulator(q.dtype))
        for queries, keys in stacks(cu_seqlens, cu_seqlens_k, q.shape[1], k.shape[1]):
            found = _attend(attend, queries.take(q), keys.take(k), keys.take(v), None, form)
            queries.put(o, found[0])
            queries.put(lse, found[1])
    if sinks is not None:
        before, lse = lse, torch.logaddexp(lse, sinks.to(lse.dtype))
        # where there is neither key nor sink both are -infinity
        o = (o * (before - lse.masked_fill(lse == -torch.inf, 0.0)).exp_()[..., None]).to(q.dtype)
    return o, lse


def backward(
    grad_o: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    bias: Tensor | None,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    o: Tensor,
    lse: Tensor,
    causal: bool,
    window: int | None,
    scale: float,
    logit_cap: float | None,
    bias_gradient: bool,
    differentiate: Differentiate | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As the op ``attention_backward``."""
    differentiate = differentiate_in_tiles if differentiate is None else differentiate
    form = Form(causal, window, scale, logit_cap)
    # a query that sees nothing passes no gradient on, not even one that is not a number
    blind = lse == -torch.inf
    grad_o, grad_lse = grad_o.masked_fill(blind[..., None], 0.0), grad_lse.masked_fill(blind, 0.0)
    lse = lse.masked_fill(blind, 0.0)
    grad_bias = None
    if cu_seqlens is None:
        *grads, grad_bias = _differentiate(differentiate, grad_o, grad_lse, q, k, v, bias, o, lse, form, bias_gradient)
    else:
        grads = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
        for queries, keys in stacks(cu_seqlens, cu_seqlens_k, q.shape[1], k.shape[1]):
            of_o, of_lse, q_rows, o_rows, lse_rows = (queries.take(x) for x in (grad_o, grad_lse, q, o, lse))
            columns = keys.take(k), keys.take(v)
            *found, _ = _differentiate(
                differentiate, of_o, of_lse, q_rows, *columns, None, o_rows, lse_rows, form, False
            )
            for place, target, value in zip((queries, keys, keys), grads, found, strict=True):
                place.put(target, value)
    grad_q, grad_k, grad_v = grads
    grad_sinks = q.new_empty(0)
    if sinks is not None:
        rows = grad_lse - _products(grad_o, o)
        grad_sinks = ((sinks.to(lse.dtype) - lse).exp_() * rows).sum((0, 1)).to(sinks.dtype)
    return grad_q, grad_k, grad_v, grad_sinks, q.new_empty(0) if grad_bias is None else grad_bias


def _attend(attend: Attend, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, form: Form) -> tuple[Tensor, Tensor]:
    """A batch of dense sequences, without the keys that no query sees."""
    first, form = form.near(q.shape[1], k.shape[1])
    if first:
        k, v, bias = k[:, first:], v[:, first:], None if bias is None else bias[..., first:]
    return attend(q, k, v, bias, form)


def _differentiate(
    differentiate: Differentiate,
    grad_o: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    o: Tensor,
    lse: Tensor,
    form: Form,
    bias_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    first, form = form.near(q.shape[1], k.shape[1])
    near = k[:, first:], v[:, first:], None if bias is None else bias[..., first:]
    grad_q, grad_k, grad_v, grad_bias = differentiate(grad_o, grad_lse, q, *near, o, lse, form, bias_gradient)
    if first:
        grad_k, grad_v = (pad(x, (0, 0, 0, 0, first, 0)) for x in (grad_k, grad_v))
        grad_bias = None if grad_bias is None else pad(grad_bias, (first, 0))
    return grad_q, grad_k, grad_v, grad_bias


def _products(a: Tensor, b: Tensor) -> Tensor:
    dtype = accumulator(a.dtype)
    return (a.to(dtype) * b.to(dtype)).sum(-1)


# -- packed sequences --


@dataclass(frozen=True)
class Stack:
    """Where sequences of equal length are in ``(1, T, ...)``: behind one another from ``first`` on, or at ``index``."""

    number: int
    length: int
    first: int
    index: Tensor | None

    def take(self, x: Tensor) -> Tensor:
        """``(number, length, ...)``, a view where it can be."""
        if self.index is not None:
            return x[0].index_select(0, self.index).unflatten(0, (self.number, self.length))
        return x[0, self.first : self.first + self.number * self.length].unflatten(0, (self.number, self.length))

    def put(self, target: Tensor, values: Tensor) -> None:
        """Writes ``(number, length, ...)``."""
        if self.index is not None:
            target[0].index_copy_(0, self.index, values.flatten(0, 1))
        else:
            self.take(target).copy_(values)


def stacks(cu_seqlens: Tensor, cu_seqlens_k: Tensor | None, total: int, total_k: int) -> Iterator[tuple[Stack, Stack]]:
    """Queries and keys of the sequences that have some of both, those of equal lengths together."""
    cu_seqlens_k = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
    check_boundaries(cu_seqlens, total)
    check_boundaries(cu_seqlens_k, total_k)
    bounds, bounds_k = (itertools.pairwise(cu.tolist()) for cu in (cu_seqlens, cu_seqlens_k))
    found: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for (start, end), (start_k, end_k) in zip(bounds, bounds_k, strict=True):
        if end > start and end_k > start_k:
            found.setdefault((end - start, end_k - start_k), []).append((start, start_k))
    for (length, length_k), starts in found.items():
        of_queries, of_keys = zip(*starts, strict=True)
        yield _stack(of_queries, length, cu_seqlens.device), _stack(of_keys, length_k, cu_seqlens.device)


def _stack(starts: tuple[int, ...], length: int, device: torch.device) -> Stack:
    number, first = len(starts), starts[0]
    if starts == tuple(range(first, first + number * length, length)):
        return Stack(number, length, first, None)
    index = torch.tensor(starts, device=device)[:, None] + torch.arange(length, device=device)
    return Stack(number, length, first, index.flatten())


# -- a batch of dense sequences --


class Tiles:
    """How the scores of a batch are cut, and the memory that one tile after the other uses.

    A block is some rows of the batch and some groups of heads, N of either together; its queries are rows of a group's
    ``members`` times a tile's tokens.
    """

    def __init__(self, q: Tensor, k: Tensor, form: Form) -> None:
        self.batch, self.total, heads, _ = q.shape
        self.total_k, self.groups = k.shape[1:3]
        self.members, self.device, self.dtype = heads // self.groups, q.device, accumulator(q.dtype)
        self.form, self.shift = form, self.total_k - self.total
        limit = TILES_CPU if self.device.type == "cpu" else TILES
        # tiles much shorter than the window have few keys that a part of their queries does not see
        wanted = QUERIES if form.window is None else min(QUERIES, max(form.window // 4, QUERIES // 8))
        self.n_queries = min(self.total, max(1, wanted))
        rows = max(1, self.n_queries * self.members)
        # few queries make room for more keys
        self.n_keys = max(1, min(self.total_k, max(KEYS, limit // (rows * max(1, self.batch * self.groups)))))
        heads_at_once = max(1, limit // (rows * self.n_keys))
        self.n_groups = min(self.groups, heads_at_once)
        self.n_rows = max(1, min(self.batch, heads_at_once // self.groups))
        self._memory: list[Tensor] = []

    def blocks(self) -> Iterator[tuple[slice, slice]]:
        """Rows of the batch and groups."""
        return itertools.product(_slices(self.batch, self.n_rows), _slices(self.groups, self.n_groups))

    def queries(self) -> Iterator[tuple[slice, range]]:
        """The tiles of queries, by their own places and by those beside them among the keys."""
        for tile in _slices(self.total, self.n_queries):
            yield tile, range(tile.start + self.shift, tile.stop + self.shift)

    def keys(self, queries: range) -> Iterator[range]:
        """The tiles of keys that these queries see, of nearly equal sizes."""
        seen = self.form.visible(queries, range(self.total_k))
        number = -(-len(seen) // self.n_keys)
        for index in range(number):
            yield seen[len(seen) * index // number : len(seen) * (index + 1) // number]

    def memory(self, index: int, shape: tuple[int, ...]) -> Tensor:
        """One of several tiles that are used again and again."""
        while len(self._memory) <= index:
            size = self.n_rows * self.n_groups * self.members * self.n_queries * self.n_keys
            self._memory.append(torch.empty(size, dtype=self.dtype, device=self.device))
        return self._memory[index][: shape[0] * shape[1] * shape[2]].view(shape)

    def rows(self, x: Tensor, block: tuple[slice, slice], tile: slice) -> Tensor:
        """A tile of ``(B, T, H, ...)`` as ``(N, members * queries, ...)``."""
        rows, groups = block
        heads = slice(groups.start * self.members, groups.stop * self.members)
        cut = x[rows, tile, heads].transpose(1, 2)
        count = (groups.stop - groups.start) * (rows.stop - rows.start)
        return cut.to(self.dtype).reshape(count, self.members * cut.shape[2], *cut.shape[3:])

    def put_rows(self, target: Tensor, block: tuple[slice, slice], tile: slice, values: Tensor) -> None:
        """Writes ``(N, members * queries, ...)`` into a tile of ``(B, T, H, ...)``."""
        rows, groups = block
        heads = slice(groups.start * self.members, groups.stop * self.members)
        place = target[rows, tile, heads].transpose(1, 2)
        place.copy_(values.reshape(place.shape))

    def columns(self, x: Tensor, block: tuple[slice, slice]) -> Tensor:
        """All keys of a block of ``(B, T_k, G, X)`` as ``(N, T_k, X)``, a view where it can be."""
        rows, groups = block
        return x[rows, :, groups].transpose(1, 2).to(self.dtype).flatten(0, 1)

    def scores(
        self,
        index: int,
        q: Tensor,
        k: Tensor,
        bias: Tensor | None,
        block: tuple[slice, slice],
        tile: slice,
        beside: range,
        keys: range,
    ) -> tuple[Tensor, Tensor | None]:
        """``(N, rows, keys)`` of scaled queries, and what the cap made of them before the bias."""
        columns = k[:, keys.start : keys.stop]
        scores = self.memory(index, (q.shape[0], q.shape[1], len(keys)))
        torch.bmm(q, columns.transpose(1, 2), out=scores)
        bounded = None
        if self.form.logit_cap is not None:
            bounded = self.memory(index + 1, scores.shape)
            torch.tanh(scores.div_(self.form.logit_cap), out=bounded)
            torch.mul(bounded, self.form.logit_cap, out=scores)
        if bias is not None:
            self.apart(scores, block).add_(self.of_bias(bias, block, tile, keys))
        hidden = self.form.hidden(beside, keys, self.device)
        if hidden is not None:
            self.apart(scores, block).masked_fill_(hidden, -torch.inf)
        return scores, bounded

    def apart(self, scores: Tensor, block: tuple[slice, slice]) -> Tensor:
        """A view of ``(N, members * queries, keys)`` as ``(rows, heads, queries, keys)``."""
        rows, groups = block
        return scores.view(rows.stop - rows.start, (groups.stop - groups.start) * self.members, -1, scores.shape[2])

    def of_bias(self, bias: Tensor, block: tuple[slice, slice], tile: slice, keys: range) -> Tensor:
        """The part of a bias that adds to a tile, sizes of 1 kept."""
        rows, groups = block
        heads = slice(groups.start * self.members, groups.stop * self.members)
        cut = [
            whole if size == 1 else part
            for whole, size, part in zip([slice(None)] * 3, bias.shape, (rows, heads, tile), strict=False)
        ]
        return bias[(*cut, slice(keys.start, keys.stop))]


# an exported program calls the op while autograd records, which cannot follow what writes to tiles in place
@torch.no_grad()
def attend_in_tiles(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, form: Form) -> tuple[Tensor, Tensor]:
    """o and lse of a batch of dense sequences."""
    tiles = Tiles(q, k, form)
    o = q.new_empty((*q.shape[:3], v.shape[3]))
    lse = q.new_empty(q.shape[:3], dtype=tiles.dtype)
    for block in tiles.blocks():
        keys_of_block, values = tiles.columns(k, block), tiles.columns(v, block)
        for tile, beside in tiles.queries():
            queries = form.scale * tiles.rows(q, block, tile)
            largest = queries.new_full((*queries.shape[:2], 1), -torch.inf)
            sums, total = torch.zeros_like(largest), queries.new_zeros((*queries.shape[:2], v.shape[3]))
            for keys in tiles.keys(beside):
                weights, _ = tiles.scores(0, queries, keys_of_block, bias, block, tile, beside, keys)
                before, largest = largest, torch.maximum(largest, weights.amax(-1, keepdim=True))
                # what no key was seen for stays at zero
                shift = largest.masked_fill(largest == -torch.inf, 0.0)
                weights.sub_(shift).exp_()
                fading = (before - shift).exp_()
                sums.mul_(fading).add_(weights.sum(-1, keepdim=True))
                total.mul_(fading).baddbmm_(weights, values[:, keys.start : keys.stop])
            tiles.put_rows(o, block, tile, total.div_(sums.masked_fill(sums == 0, 1.0)))
            tiles.put_rows(lse, block, tile, (largest + sums.log()).squeeze(-1))
    return o, lse


@torch.no_grad()
def differentiate_in_tiles(
    grad_o: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    o: Tensor,
    lse: Tensor,
    form: Form,
    bias_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v and, if wanted, of the bias; of queries that see no key grad_o, grad_lse and lse are 0."""
    tiles = Tiles(q, k, form)
    contiguous = torch.contiguous_format
    grad_q, grad_k, grad_v = (torch.empty_like(x, memory_format=contiguous) for x in (q, k, v))
    grad_bias = torch.zeros_like(bias, dtype=tiles.dtype) if bias is not None and bias_gradient else None
    offsets = _products(grad_o, o).sub_(grad_lse)
    for block in tiles.blocks():
        keys_of_block, values = tiles.columns(k, block), tiles.columns(v, block)
        of_keys, of_values = (torch.zeros_like(x, memory_format=contiguous) for x in (keys_of_block, values))
        for tile, beside in tiles.queries():
            queries, gradients = form.scale * tiles.rows(q, block, tile), tiles.rows(grad_o, block, tile)
            sums, offset = (tiles.rows(x, block, tile)[..., None] for x in (lse, offsets))
            of_queries = torch.zeros_like(queries)
            for keys in tiles.keys(beside):
                seen = slice(keys.start, keys.stop)
                weights, bounded = tiles.scores(1, queries, keys_of_block, bias, block, tile, beside, keys)
                weights.sub_(sums).exp_()
                of_values[:, seen].baddbmm_(weights.transpose(1, 2), gradients)
                of_scores = tiles.memory(0, weights.shape)
                torch.bmm(gradients, values[:, seen].transpose(1, 2), out=of_scores)
                of_scores.sub_(offset).mul_(weights)
                if grad_bias is not None:
                    part = tiles.of_bias(grad_bias, block, tile, keys)
                    part.add_(tiles.apart(of_scores, block).sum_to_size(part.shape))
                if bounded is not None:
                    of_scores.addcmul_(of_scores, bounded.square_(), value=-1)
                of_queries.baddbmm_(of_scores, keys_of_block[:, seen])
                of_keys[:, seen].baddbmm_(of_scores.transpose(1, 2), queries)
            tiles.put_rows(grad_q, block, tile, of_queries.mul_(form.scale))
        rows, groups = block
        for target, found in ((grad_k, of_keys), (grad_v, of_values)):
            place = target[rows, :, groups].transpose(1, 2)
            place.copy_(found.view(place.shape))
    return grad_q, grad_k, grad_v, None if grad_bias is None or bias is None else grad_bias.to(bias.dtype)


def _slices(size: int, step: int) -> Iterator[slice]:
    for start in range(0, size, max(1, step)):
        yield slice(start, min(start + step, size))
