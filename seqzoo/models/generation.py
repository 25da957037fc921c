"""Generation: prompts are read in parallel, then the model steps, in constant memory and time a token."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from seqzoo.mixer import State
from seqzoo.models.language_model import LanguageModel
from seqzoo.packing import Packing


class _Sampling(NamedTuple):
    temperature: float
    top_k: int | None
    top_p: float | None
    generator: torch.Generator | None


def generate(
    model: LanguageModel,
    prompts: Tensor | Sequence[Tensor],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Continues prompts and returns the new tokens, int64 ``(B, max_new_tokens)``; :func:`stream` has the arguments."""
    tokens = list(
        stream(
            model,
            prompts,
            max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            generator=generator,
        )
    )
    return torch.stack(tokens, dim=1)


def stream(
    model: LanguageModel,
    prompts: Tensor | Sequence[Tensor],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    prefix_lengths: Sequence[int] | None = None,
) -> Iterator[Tensor]:
    """Continues prompts token by token; each is ready when it is computed, and stopping early costs nothing.

    Prompts of one length are read as a dense batch, unequal ones packed, in one call. What follows takes constant
    memory and time a token where the mixers' states have a constant size. The model computes in evaluation mode and
    without gradients, and is left as it was.

    The most probable token (``temperature=0``) of a row does not depend on the other rows. Samples do: the rows draw
    from one stream of random numbers, so the same seed gives a row other samples in a batch of another size.

    Args:
        model: The model.
        prompts: ``(B, T)``, or one ``(T,)`` tensor a row; none may be empty.
        max_new_tokens: How many tokens to add to each.
        temperature: Divides the logits; 0 takes the most probable token.
        top_k: Samples among the ``top_k`` most probable tokens alone.
        top_p: Samples among the fewest most probable tokens whose probabilities sum to ``top_p``, after ``top_k``.
        seed: Of the random numbers; by default PyTorch's own state goes on.
        generator: Source of the random numbers, on the model's device, instead of a seed.
        prefix_lengths: Tokens of each prompt that are a prefix to the mixers that know one (see
            :meth:`seqzoo.packing.Packing.with_prefixes`); None means none.

    Returns:
        An iterator over the new tokens, int64 ``(B,)`` each.

    Raises:
        TypeError: If the prompts are no tensors of integers.
        ValueError: If a prompt is empty, an option is out of range, or the sequences would exceed ``max_positions``.
    """
    rows = _rows(prompts)
    _check_options(model, temperature, top_k, top_p)
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be a positive integer, got {max_new_tokens!r}")
    limit = model.config.max_positions
    # the last new token is never read
    longest = max(row.shape[0] for row in rows) + max_new_tokens - 1
    if limit is not None and longest > limit:
        raise ValueError(f"prompt and new tokens need {longest} positions, the model has max_positions={limit}")
    if seed is not None and generator is not None:
        raise ValueError("seed and generator exclude each other")
    if seed is not None:
        generator = torch.Generator(model.embedding.weight.device).manual_seed(seed)
    # checked when called, not when first iterated
    return _stream(model, rows, max_new_tokens, _Sampling(temperature, top_k, top_p, generator), prefix_lengths)


def _stream(
    model: LanguageModel, rows: list[Tensor], n_tokens: int, sampling: _Sampling, prefixes: Sequence[int] | None
) -> Iterator[Tensor]:
    # each part enters and leaves inference mode by itself: a block around a yield would put the caller into it
    with torch.inference_mode(), _evaluating(model):
        logits, state = _prefill(model, rows, prefixes)
        token = sample(logits, *sampling)
    for _ in range(n_tokens - 1):
        # a clone made outside of inference mode may enter the caller's autograd
        yield token.clone()
        with torch.inference_mode(), _evaluating(model):
            logits, state = model.step(token, state)
            token = sample(logits, *sampling)
    yield token.clone()


def _prefill(model: LanguageModel, rows: list[Tensor], prefixes: Sequence[int] | None) -> tuple[Tensor, list[State]]:
    device = model.embedding.weight.device
    lengths = [row.shape[0] for row in rows]
    if prefixes is None and len(set(lengths)) == 1:
        return model.prefill(torch.stack(rows).to(device))
    packing = Packing.from_lengths(lengths, prefix_lengths=prefixes, device=device)
    return model.prefill(torch.cat(rows)[None].to(device), packing)


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draws one token a row, ``(B, V)`` to int64 ``(B,)``; the options are those of :func:`stream`."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # without the subtraction a small temperature overflows
    scores = (scores - scores.amax(dim=-1, keepdim=True)) / temperature
    index = None
    if top_k is not None:
        scores, index = scores.topk(top_k, dim=-1)
    elif top_p is not None:
        scores, index = scores.sort(dim=-1, descending=True, stable=True)
    probabilities = scores.softmax(dim=-1)
    if top_p is not None:
        before = probabilities.cumsum(dim=-1) - probabilities
        # the first stays whatever rounding does to its sum
        dropped = before >= top_p
        dropped[..., 0] = False
        probabilities = probabilities.masked_fill(dropped, 0.0)
    drawn = torch.multinomial(probabilities, 1, generator=generator)
    return (drawn if index is None else index.gather(-1, drawn))[..., 0]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _rows(prompts: Tensor | Sequence[Tensor]) -> list[Tensor]:
    if isinstance(prompts, Tensor) and prompts.dim() != 2:
        raise ValueError(f"prompts must have shape (B, T) or be a list of (T,), got {tuple(prompts.shape)}")
    rows = list(prompts)
    if not rows:
        raise ValueError("prompts must hold at least one prompt, got none")
    for index, row in enumerate(rows):
        if not isinstance(row, Tensor) or row.dtype not in (torch.int64, torch.int32):
            kind = row.dtype if isinstance(row, Tensor) else type(row).__name__
            raise TypeError(f"a prompt must be an int64 or int32 Tensor, got {kind} at index {index}")
        if row.dim() != 1:
            raise ValueError(f"a prompt must have shape (T,), got {tuple(row.shape)} at index {index}")
        if row.shape[0] == 0:
            raise ValueError(f"a prompt must hold at least one token, the one at index {index} is empty")
    return [row.to(torch.int64) for row in rows]


def _check_options(model: LanguageModel, temperature: float, top_k: int | None, top_p: float | None) -> None:
    for name, value in (("temperature", temperature), ("top_k", top_k), ("top_p", top_p)):
        if isinstance(value, bool):
            raise ValueError(f"{name} must be a number, got {value!r}")
    if not (isinstance(temperature, (int, float)) and 0.0 <= temperature < math.inf):
        raise ValueError(f"temperature must be finite and at least 0, got {temperature!r}")
    vocab_size = model.config.vocab_size
    if top_k is not None and not (isinstance(top_k, int) and 1 <= top_k <= vocab_size):
        raise ValueError(f"top_k must be an integer from 1 to the {vocab_size} tokens there are, got {top_k!r}")
    if top_p is not None and not (isinstance(top_p, (int, float)) and 0.0 < top_p <= 1.0):
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p!r}")
