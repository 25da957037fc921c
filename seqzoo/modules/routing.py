"""Routing: every token to a few of many parts, whose tokens then lie behind one another."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from seqzoo.kernels.checks import accumulator
from seqzoo.kernels.dispatch import uncast
from seqzoo.modules.options import check_count
from seqzoo.packing import Packing

# rows that share a copy of a part's matrix, where streams are short: fewer copy more, more leave more rows unused
BLOCK = 128


class Router(nn.Module):
    """The parts of every token by their probabilities, ``softmax(W x)``, https://arxiv.org/abs/2101.03961, section 2.

    Computed in float32 at least, under autocast too: a rounding that changes a choice changes the outputs by much more.

    Args:
        d_model: Width of the tokens.
        n_parts: Parts.
        top_k: Parts that a token goes to, at most ``n_parts``.
    """

    def __init__(self, d_model: int, n_parts: int, top_k: int) -> None:
        super().__init__()
        for name, value in (("n_parts", n_parts), ("top_k", top_k)):
            check_count(name, value)
        if top_k > n_parts:
            raise ValueError(f"a token can go to at most all {n_parts} parts, got top_k = {top_k}")
        self.top_k = top_k
        self.weight = nn.Parameter(torch.empty(n_parts, d_model))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``(..., D)`` to the choices, their weights, which add up to 1, both ``(..., top_k)``, and all probabilities.

        Of equal probabilities the first is chosen.
        """
        dtype = accumulator(x.dtype)
        with uncast(x.device):
            probabilities = (x.to(dtype) @ self.weight.to(dtype).T).softmax(-1)
        # topk leaves open which of equal ones it takes
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        chosen = ordered[..., : self.top_k]
        return order[..., : self.top_k], chosen / chosen.sum(-1, keepdim=True), probabilities

    def reset_parameters(self) -> None:
        """Uniform within ``D ** -0.5``, as PyTorch's linear layers."""
        bound = self.weight.shape[1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)

    def extra_repr(self) -> str:
        """The options, as ``print`` shows them."""
        parts, width = self.weight.shape
        return f"{width}, n_parts={parts}, top_k={self.top_k}"


class Streams(NamedTuple):
    """Copies of tokens, sorted by part, sequence and time: packed sequences, one for each part and sequence.

    All shapes follow from the numbers of tokens N, of choices c a token, of parts P and of sequences S.

    Attributes:
        order: int64 ``(N c,)``, the copy, counted token by token, at each place.
        place: int64 ``(N c,)``, the place of each copy.
        source: int64 ``(N c,)``, the token at each place.
        packing: Of the P S streams, all of a part behind one another.
        bounds: int64 ``(P + 1,)``, the places at which parts begin.
    """

    order: Tensor
    place: Tensor
    source: Tensor
    packing: Packing
    bounds: Tensor

    @classmethod
    def of(cls, choices: Tensor, parts: int, sequence: Tensor, sequences: int) -> Streams:
        """Sorts tokens.

        Args:
            choices: int64 ``(N, c)``, the parts that each token goes to, no part twice in a row.
            parts: P.
            sequence: int64 ``(N,)``, the sequence of each token, not descending.
            sequences: S.
        """
        # stable: within a stream the tokens stay in the order of time
        keys, order = (choices * sequences + sequence[:, None]).flatten().sort(stable=True)
        places = torch.arange(order.shape[0], device=order.device)
        edges = torch.arange(parts * sequences + 1, device=keys.device)
        starts = torch.searchsorted(keys, edges, out_int32=True)
        return cls(
            order,
            torch.empty_like(order).index_copy_(0, order, places),
            torch.div(order, choices.shape[1], rounding_mode="floor"),
            Packing.from_cu_seqlens(starts, order.shape[0]),
            starts[torch.arange(parts + 1, device=keys.device) * sequences].to(torch.int64),
        )

    def spread(self, x: Tensor) -> Tensor:
        """``(N, ...)`` to ``(N c, ...)``: every token to its places."""
        return _Take.apply(x, self.source, self.place)

    def gather(self, x: Tensor, weights: Tensor) -> Tensor:
        """``(N c, ...)`` to ``(N, ...)``: the sum of each token's copies times ``(N, c)``, in the weights' dtype."""
        copies = _Take.apply(x, self.place, self.order).unflatten(0, (-1, weights.shape[1]))
        return (copies * weights.view(*weights.shape, *[1] * (x.dim() - 1))).sum(1)


class PartLinear(nn.Module):
    """A linear map for each of several parts, applied to the tokens that go there.

    By PyTorch's grouped product where it has one, of rows of whole 16 bytes: in bfloat16, on the CPU also in float32
    and float16, which it cannot trace and for which on a GPU the host would wait for the counts. Elsewhere the tokens
    of a part lie in blocks of equal length, the last of a part filled up, and each block meets a copy of its part's
    matrix in one batched product. Either way the work is that of the tokens whatever the number of parts, and nothing
    depends on the counts but values.

    Args:
        d_model: Width of the tokens.
        width: Outputs.
        n_parts: P; ``weight`` is ``(P, width, D)``, ``bias`` ``(P, width)``.
        bias: Whether there are biases.
    """

    def __init__(self, d_model: int, width: int, n_parts: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_parts, width, d_model))
        self.bias = nn.Parameter(torch.empty(n_parts, width)) if bias else None

    def forward(self, x: Tensor, streams: Streams) -> Tensor:
        """``(N, D)`` to ``(N c, width)``, in the order of the streams."""
        if self._is_grouped(x, streams):
            return self._grouped(x, streams)
        parts, places = self.weight.shape[0], streams.order.shape[0]
        # long streams have longer blocks: 4 copies of every matrix, as it were, and a quarter of the rows to fill up
        rows = max(1, min(max(BLOCK, places // (4 * parts)), -(-places // parts)))
        starts, counts = streams.bounds[:-1], streams.bounds.diff()
        needed = torch.div(counts + (rows - 1), rows, rounding_mode="floor")
        ends = needed.cumsum(0)
        # the most that the counts can need, whatever they are
        blocks = torch.arange((places + parts * (rows - 1)) // rows, device=x.device)
        part = torch.bucketize(blocks, ends, right=True).clamp(max=parts - 1)
        first = starts + (needed - ends) * rows
        # a filling row is that of any token: it is not read, and its gradient is zero
        taken = (first[part] + blocks * rows)[:, None] + torch.arange(rows, device=x.device)
        tokens = streams.source[taken.flatten().clamp(max=places - 1)]
        index = torch.arange(places, device=x.device)
        slot = index - first[torch.bucketize(index, streams.bounds[1:], right=True)]
        filled = _Take.apply(x, tokens, slot[streams.place]).unflatten(0, (-1, rows))
        # a product, because indexing's gradient would add up copies in an order that varies
        choice = nn.functional.one_hot(part, parts).to(self.weight.dtype)
        weight = (choice @ self.weight.flatten(1)).unflatten(1, self.weight.shape[1:]).transpose(1, 2)
        if self.bias is None:
            y = torch.bmm(filled, weight)
        else:
            y = torch.baddbmm((choice @ self.bias)[:, None], filled, weight)
        return _Pick.apply(y.flatten(0, 1), slot)

    def _is_grouped(self, x: Tensor, streams: Streams) -> bool:
        dtype = _product_dtype(x)
        words = 16 // dtype.itemsize
        eager = x.device.type == "cpu" and not torch.compiler.is_compiling()
        return (
            (dtype == torch.bfloat16 or (eager and dtype in (torch.float16, torch.float32)))
            and x.device.type in ("cpu", "cuda")
            and x.shape[1] % words == self.weight.shape[1] % words == 0
            and streams.order.shape[0] > 0
        )

    def _grouped(self, x: Tensor, streams: Streams) -> Tensor:
        dtype, ends = _product_dtype(x), streams.bounds[1:]
        weight = self.weight.to(dtype).transpose(1, 2)
        y = nn.functional.grouped_mm(streams.spread(x.to(dtype)), weight, offs=ends.to(torch.int32))
        if self.bias is None:
            return y
        index = torch.bucketize(torch.arange(streams.order.shape[0], device=x.device), ends, right=True)
        return y + nn.functional.one_hot(index, ends.shape[0]).to(dtype) @ self.bias.to(dtype)

    def parameter_options(self) -> dict[str, dict[str, float]]:
        """The biases do not decay, though they form a matrix."""
        return {} if self.bias is None else {"bias": {"weight_decay": 0.0}}

    def reset_parameters(self) -> None:
        """Uniform within ``D ** -0.5``, as PyTorch's linear layers, and zero biases."""
        bound = self.weight.shape[2] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        """The options, as ``print`` shows them."""
        parts, width, d_model = self.weight.shape
        return f"{d_model}, {width}, n_parts={parts}, bias={self.bias is not None}"


def _product_dtype(x: Tensor) -> torch.dtype:
    """What autocast makes of a factor of a product."""
    kind = x.device.type
    narrows = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind) and x.dtype != torch.float64
    return torch.get_autocast_dtype(kind) if narrows else x.dtype


class Columns(nn.Module):
    """What a linear map would give, taken from among values that hold it already.

    Args:
        start: First column.
        end: Behind the last.
    """

    def __init__(self, start: int, end: int) -> None:
        super().__init__()
        self.start, self.end = start, end

    def forward(self, x: Tensor) -> Tensor:
        """``(..., width)`` to ``(..., end - start)``."""
        return x[..., self.start : self.end]

    def extra_repr(self) -> str:
        """The options, as ``print`` shows them."""
        return f"{self.start}, {self.end}"


class _Take(torch.autograd.Function):
    """``x[index]`` whose gradient takes rows too, always in one order; PyTorch's adds them up, on a GPU in any."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, places: Tensor) -> Tensor:
        """``places`` holds where the rows of x go, as many for each, one row's behind one another's."""
        ctx.save_for_backward(places)
        ctx.rows = x.shape[0]
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore - torch types no arity
        (places,) = ctx.saved_tensors
        found = gradients[0].index_select(0, places)
        if places.shape[0] == ctx.rows:
            return found, None, None
        return found.unflatten(0, (ctx.rows, places.shape[0] // ctx.rows)).sum(1), None, None


class _Pick(torch.autograd.Function):
    """``x[index]`` of different rows; PyTorch's gradient adds, which takes twice the time of copying."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.rows = x.shape[0]
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore - torch types no arity
        (index,) = ctx.saved_tensors
        gradient = gradients[0]
        return gradient.new_zeros(ctx.rows, *gradient.shape[1:]).index_copy_(0, index, gradient), None
