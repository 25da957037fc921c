"""Several continuations of one prompt, which is read once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from seqzoo.models.language_model import LanguageModel
from seqzoo.models.padding import check_ids
from seqzoo.packing import Packing


class Score(NamedTuple):
    """Of each token of a continuation ``(T,)`` its log-probability, and whether none is more probable."""

    log_probabilities: Tensor
    greedy: Tensor


def log_likelihoods(
    model: LanguageModel, prompts: Sequence[Tensor], continuations: Sequence[Sequence[Tensor]]
) -> list[Tensor]:
    """The logarithm of the probability of each continuation behind its prompt.

    The prompts are read packed, once, and the continuations packed behind copies of their prompt's state, so that those
    of a preference pair cost their own tokens and the prompt's once ("Accelerating Direct Preference Optimization with
    Prefix Sharing", https://arxiv.org/abs/2410.20305, whose results these are), whatever the mixers. Differentiable:
    the gradients of all continuations meet in their prompt's state.

    Args:
        model: The model.
        prompts: int64 or int32 tokens ``(T,)`` each, none of them empty.
        continuations: For each prompt tokens ``(T,)`` that may follow it, none of them empty.

    Returns:
        For each prompt ``(n,)``, float32 (float64 for float64 models), one a continuation.

    Raises:
        TypeError: If tokens are no tensors of integers.
        ValueError: If the numbers of prompts and of lists of continuations differ, one of them is empty, or a token
            lies outside the vocabulary (on the CPU).

    Example:
        >>> import torch
        >>> from seqzoo.models import LanguageModel, ModelConfig, log_likelihoods
        >>> model = LanguageModel(ModelConfig(vocab_size=9, d_model=16, n_layers=1, pattern="min_gru"))
        >>> pair = torch.tensor([3]), torch.tensor([4, 5])
        >>> chosen, rejected = log_likelihoods(model, [torch.tensor([1, 2])], [pair])[0]
        >>> bool(chosen < 0), bool(rejected < 0)
        (True, True)
    """
    wide = torch.promote_types(model.embedding.weight.dtype, torch.float32)
    none = model.embedding.weight.new_zeros(0, dtype=wide)
    return [
        torch.stack([one.log_probabilities.sum() for one in several]) if several else none
        for several in score(model, prompts, continuations)
    ]


def score(
    model: LanguageModel,
    prompts: Sequence[Tensor],
    continuations: Sequence[Sequence[Tensor]],
    prefix_lengths: Sequence[int] | None = None,
) -> list[list[Score]]:
    """As :func:`log_likelihoods`, token by token.

    Of each prompt ``prefix_lengths`` tokens are a prefix to the mixers that know one (see
    :meth:`seqzoo.packing.Packing.with_prefixes`); None means none.
    """
    if len(prompts) != len(continuations):
        raise ValueError(
            f"there must be a list of continuations for each of {len(prompts)} prompts, got {len(continuations)}"
        )
    counts = [len(several) for several in continuations]
    flat = [one for several in continuations for one in several]
    for name, rows in (("prompt", prompts), ("continuation", flat)):
        for index, row in enumerate(rows):
            check_ids(f"{name} {index}", row)
            if row.dim() != 1 or row.shape[0] == 0:
                raise ValueError(
                    f"a {name} must be tokens of shape (T,), T at least 1, got {tuple(row.shape)} at {index}"
                )
    if not flat:
        return [[] for _ in prompts]
    _check_range(torch.cat(flat), model.config.vocab_size)
    device = model.embedding.weight.device
    packing = Packing.from_lengths([len(row) for row in prompts], prefix_lengths=prefix_lengths, device=device)
    logits, state = model.prefill(torch.cat(list(prompts))[None].to(device), packing)
    order = torch.repeat_interleave(torch.arange(len(prompts)), torch.tensor(counts)).to(device)
    copies = [{key: value.index_select(0, order) for key, value in one.items()} for one in state]
    before = logits[order][:, None]
    lengths = [len(row) - 1 for row in flat]
    later = logits.new_zeros(0, logits.shape[-1])
    if sum(lengths):
        ids = torch.cat([row[:-1] for row in flat])[None].to(device)
        later = model(ids, copies, cu_seqlens=Packing.from_lengths(lengths, device=device))[0][0]
    scores = []
    for row, *parts in zip(flat, before, later.split(lengths), strict=True):
        predicted = torch.cat(parts).to(torch.promote_types(logits.dtype, torch.float32))
        targets = row.to(device, torch.int64)
        found = predicted.log_softmax(-1).gather(1, targets[:, None])[:, 0]
        scores.append(Score(found, predicted.argmax(-1) == targets))
    remaining = iter(scores)
    return [[next(remaining) for _ in range(count)] for count in counts]


def _check_range(tokens: Tensor, vocab_size: int) -> None:
    # the last of a continuation is predicted alone, so that no embedding looks at it
    if tokens.device.type == "cpu" and bool(((tokens < 0) | (tokens >= vocab_size)).any()):
        raise ValueError(f"ids must lie between 0 and {vocab_size - 1}, got {int(tokens.min())} to {int(tokens.max())}")
