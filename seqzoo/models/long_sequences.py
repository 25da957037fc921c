"""Gradients of a long sequence, exact, in the memory of a part of it."""

from __future__ import annotations

import contextlib
import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from seqzoo.kernels.checks import accumulator
from seqzoo.mixer import State, join
from seqzoo.models.language_model import LanguageModel
from seqzoo.models.padding import Inputs, check_ids, embed, unpad
from seqzoo.modules.linear_cross_entropy import IGNORED
from seqzoo.modules.options import check_count
from seqzoo.packing import Packing


class _Chunk(NamedTuple):
    """Tokens of a chunk, the sequences that they belong to, and the boundaries of those within it."""

    tokens: slice
    rows: slice
    packing: Packing | None

    @property
    def size(self) -> int:
        return self.tokens.stop - self.tokens.start


def backward_in_chunks(
    model: LanguageModel,
    ids: Tensor,
    labels: Tensor,
    chunk_size: int,
    state: Sequence[State] | None = None,
    *,
    cu_seqlens: Tensor | Packing | None = None,
    lengths: Sequence[int] | Tensor | None = None,
    attention_mask: Tensor | None = None,
    return_state: bool = False,
    scale: float = 1.0,
) -> Tensor | tuple[Tensor, list[State]]:
    """Computes ``model.loss(...)`` and adds its gradients to the parameters, in the memory of one chunk of tokens.

    Gradients are those of the whole sequence, through the states, not truncated. A first pass without gradients keeps
    the state before every chunk; then, from the last chunk to the first, each is computed anew from its state, and
    takes the gradient of the state behind it back to the state before it (checkpointing along time,
    https://arxiv.org/abs/1604.06174, section 4). So a token is computed forward twice and backward once, as if blocks
    were checkpointed; beside a chunk's activations there are one state a chunk, and the caches of attention with
    their gradients, which grow with the sequence. Dropout is the same in both passes.

    A prefix that a prefix-non-causal mixer sees as a whole must lie within a chunk.

    An auxiliary loss is the mean of the chunks', weighted by their tokens. That is the whole sequence's where the loss
    is a mean over tokens; balance losses (MoM, experts) are products of means, so there it is their mean over chunks.

    Args:
        model: The model; all of its mixers must hand on a state.
        ids: As of :meth:`LanguageModel.loss`, like ``labels`` and those that are not below.
        chunk_size: Tokens of a chunk, of each row, or of the packed sequences together.
        state: The state before the first token, which is not used up. Where its tensors require gradients, they get
            them; a graph behind them is walked.
        return_state: Whether to return the state after the last token, without a graph.
        scale: Factor of the gradients, not of the loss returned: of gradient accumulation, or against underflow.

    Returns:
        The loss, a scalar without a graph; with ``return_state`` the loss and the state.

    Raises:
        TypeError: If a dtype is wrong.
        ValueError: If ``chunk_size`` is no positive integer, a chunk ends inside a prefix, or as
            :meth:`LanguageModel.loss` does.
        LimitError: If a mixer hands on no state.
        RuntimeError: Where gradients are switched off.
    """
    check_count("chunk_size", chunk_size)
    if not torch.is_grad_enabled():
        raise RuntimeError(
            "backward_in_chunks computes gradients, which are switched off here; call model.loss instead"
        )
    check_ids("ids", ids, 2, "(B, T)")
    check_ids("labels", labels)
    if labels.shape != ids.shape:
        raise ValueError(f"labels must have the shape of ids, {tuple(ids.shape)}, got {tuple(labels.shape)}")
    inputs = unpad(ids, cu_seqlens, lengths, attention_mask)
    targets = labels if inputs.padding is None else inputs.padding.pack(labels)
    run = _Run(model, inputs, targets, _chunks(inputs, chunk_size))
    given = run.initial_state() if state is None else state
    model.backbone.mixer_states(given)
    run.forward(given)
    loss, gradients = run.backward(scale)
    wanted = [
        (value, _fitted(gradients[layer][key], value.shape))
        for layer, one in enumerate(given)
        for key, value in one.items()
        if value.requires_grad
    ]
    if wanted:
        values, seeds = zip(*wanted, strict=True)
        torch.autograd.backward(values, seeds)
    return (loss, run.state) if return_state else loss


class _Run:
    """Both passes over the chunks of one batch."""

    def __init__(self, model: LanguageModel, inputs: Inputs, targets: Tensor, chunks: list[_Chunk]) -> None:
        self.model, self.inputs, self.targets, self.chunks = model, inputs, targets, chunks
        self.device = inputs.tokens.device
        self.state: list[State] = []
        self.entering: list[list[State]] = []
        self.random: list[list[Tensor]] = []

    def initial_state(self) -> list[State]:
        packing = self.inputs.packing
        rows = self.inputs.tokens.shape[0] if packing is None else packing.n_sequences
        return self.model.init_state(rows, device=self.device)

    def forward(self, given: Sequence[State]) -> None:
        """Keeps the state before every chunk, and what random numbers the chunk draws."""
        # the first chunk's, which must not be written to, as a cache is without gradients
        self.state = [{key: value.detach().clone() for key, value in one.items()} for one in given]
        for index, chunk in enumerate(self.chunks):
            entering = _rows(self.state, chunk.rows)
            self.entering.append(self._kept(entering, chunk))
            self.random.append(self._random_state())
            if index + 1 < len(self.chunks):
                with torch.no_grad():
                    _, after, _ = self._hidden(chunk, entering)
                self.state = _replaced(self.state, chunk.rows, after)

    def backward(self, scale: float) -> tuple[Tensor, list[State]]:
        """Adds up the gradients; returns the loss, and the gradient of the state before the first token."""
        counted = (self.targets != IGNORED).sum().clamp(min=1)
        total = self.inputs.tokens.shape[1]
        weight = self.model.embedding.weight
        loss = weight.new_zeros((), dtype=accumulator(weight.dtype))
        gradients: list[State] = []
        while self.entering:
            # a chunk's state is not needed after it
            entering, random, chunk = self.entering.pop(), self.random.pop(), self.chunks[len(self.entering)]
            leaves = [
                {key: value.detach().requires_grad_(_differentiable(value)) for key, value in one.items()}
                for one in entering
            ]
            last = not gradients
            with contextlib.nullcontext() if last else self._replaying(random):
                hidden, after, auxiliary = self._hidden(chunk, leaves)
            if last:
                detached = [{key: value.detach() for key, value in one.items()} for one in after]
                self.state = _replaced(self.state, chunk.rows, detached)
                gradients = [
                    {key: torch.zeros_like(value) for key, value in one.items() if _differentiable(value)}
                    for one in self.state
                ]
            labels = self.targets[:, chunk.tokens]
            share = (labels != IGNORED).sum().to(loss.dtype) / counted
            own = self.model.cross_entropy(hidden, labels) * share
            own = own + self.model.config.auxiliary_weight * auxiliary * (chunk.size / total)
            loss += own.detach()
            self._backward(own * scale, leaves, after, _rows(gradients, chunk.rows))
            found = [{key: _gradient(leaf) for key, leaf in one.items() if _differentiable(leaf)} for one in leaves]
            gradients = _replaced(gradients, chunk.rows, found)
        return loss, gradients or _zeros(self.state)

    @staticmethod
    def _backward(loss: Tensor, leaves: list[State], after: list[State], gradients: list[State]) -> None:
        values, seeds = [loss], [torch.ones_like(loss)]
        for one, gradient in zip(after, gradients, strict=True):
            for key, value in one.items():
                if value.requires_grad:
                    values.append(value)
                    seeds.append(_fitted(gradient[key], value.shape))
        torch.autograd.backward(values, seeds)

    def _hidden(self, chunk: _Chunk, state: Sequence[State]) -> tuple[Tensor, list[State], Tensor]:
        x = embed(self.model.embedding, self.inputs.tokens[:, chunk.tokens])
        hidden, after, auxiliary = self.model.backbone(x, state, cu_seqlens=chunk.packing, return_state=True)
        return hidden, after, auxiliary

    def _kept(self, state: list[State], chunk: _Chunk) -> list[State]:
        """What the second pass needs: copies, but of the caches of a dense batch views.

        A cache is written to behind its tokens alone, and what is there is not read: one that grows from chunk to chunk
        takes the memory of the last.
        """
        kind = self.model.embedding.weight.dtype
        specs = [mixer.state_spec(1, kind) for mixer in self.model.backbone.mixers()]
        # the positions' state comes after the mixers'
        specs += [{} for _ in state[len(specs) :]]
        dense = chunk.packing is None
        return [
            {
                key: value if dense and key in spec and None in spec[key][0] else value.clone()
                for key, value in one.items()
            }
            for one, spec in zip(state, specs, strict=True)
        ]

    def _random_state(self) -> list[Tensor]:
        states = [torch.get_rng_state()]
        if self.device.type != "cpu":
            states.append(torch.get_device_module(self.device).get_rng_state(self.device))
        return states

    @contextlib.contextmanager
    def _replaying(self, states: list[Tensor]) -> Iterator[None]:
        """Draws the random numbers that followed a state, and leaves the generators as they are."""
        on_host = self.device.type == "cpu"
        kind = "cuda" if on_host else self.device.type
        with torch.random.fork_rng(devices=[] if on_host else [self.device], device_type=kind):
            torch.set_rng_state(states[0])
            if not on_host:
                torch.get_device_module(self.device).set_rng_state(states[1], self.device)
            yield


def _chunks(inputs: Inputs, size: int) -> list[_Chunk]:
    total = inputs.tokens.shape[1]
    packed = inputs.packing
    bounds = [] if packed is None else packed.bounds()
    chunks = []
    for start in range(0, total, size):
        end = min(start + size, total)
        if packed is None:
            chunks.append(_Chunk(slice(start, end), slice(None), None))
            continue
        # the sequences that have tokens in the chunk, and empty ones between them
        rows = slice(bisect_right(bounds, start) - 1, bisect_left(bounds, end))
        edges = [min(max(edge, start), end) - start for edge in bounds[rows.start : rows.stop + 1]]
        lengths = [after - before for before, after in itertools.pairwise(edges)]
        prefixes = _prefixes(packed, rows, start, end)
        packing = Packing.from_lengths(lengths, prefix_lengths=prefixes, device=inputs.tokens.device)
        chunks.append(_Chunk(slice(start, end), rows, packing))
    return chunks


def _prefixes(packing: Packing, rows: slice, start: int, end: int) -> list[int] | None:
    """The prefixes of the sequences that have tokens between ``start`` and ``end``, of those that begin there."""
    if packing.prefix_lengths is None:
        return None
    found = []
    bounds, prefixes = packing.bounds()[rows], packing.prefix_lengths[rows].tolist()
    for index, (begin, prefix) in enumerate(zip(bounds, prefixes, strict=True), rows.start):
        if begin < end < begin + prefix:
            raise ValueError(
                f"the prefix of sequence {index}, tokens {begin} to {begin + prefix} of all, is cut by a chunk that "
                f"ends at {end}; a prefix lies in one piece: choose another chunk_size"
            )
        found.append(prefix if begin >= start else 0)
    return found


def _rows(state: Sequence[State], rows: slice) -> list[State]:
    return [{key: value[rows] for key, value in one.items()} for one in state]


def _replaced(state: list[State], rows: slice, new: list[State]) -> list[State]:
    """A state, or the gradients of one, with other rows; caches grow to the longest."""
    if rows == slice(None):
        return new
    return [
        join([_rows([one], slice(rows.start))[0], other, _rows([one], slice(rows.stop, None))[0]])
        for one, other in zip(state, new, strict=True)
    ]


def _zeros(state: list[State]) -> list[State]:
    return [{key: torch.zeros_like(value) for key, value in one.items()} for one in state]


def _differentiable(value: Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()


def _gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _fitted(gradient: Tensor, shape: torch.Size) -> Tensor:
    """A gradient of a cache of one capacity as that of another: what is cut or filled up holds no token."""
    cut = gradient[tuple(slice(size) for size in shape)]
    missing = [size - have for size, have in zip(shape, cut.shape, strict=True)]
    return F.pad(cut, [end for count in reversed(missing) for end in (0, count)]) if any(missing) else cut
