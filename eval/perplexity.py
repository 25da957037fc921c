"""Bits a token and a byte of a text at several context lengths."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from seqzoo.mixer import LimitError
from seqzoo.models.language_model import LanguageModel


@dataclass(frozen=True)
class Likelihood:
    """How well a model predicts a text.

    Attributes:
        nats: Sum over the tokens, of minus the logarithm of their probability.
        tokens: How many were predicted: all but the first of every window.
        share: Predicted tokens as a share of the text's.
        bytes_per_token: Of the text.
    """

    nats: float
    tokens: int
    share: float
    bytes_per_token: float

    @property
    def perplexity(self) -> float:
        """Of a token."""
        return math.exp(self.nats / self.tokens)

    @property
    def bits_per_byte(self) -> float:
        """Of the text; what different tokenizers can be compared by."""
        return self.nats / self.tokens / math.log(2.0) / self.bytes_per_token


@torch.inference_mode()
def in_windows(
    model: LanguageModel, ids: Tensor, context: int, *, bytes_per_token: float = 1.0, batch_tokens: int = 16384
) -> Likelihood:
    """The likelihood of a text cut into windows of ``context`` tokens, of which each begins anew.

    Every window predicts its tokens but the first from those before them; what is left at the end is not read.

    Args:
        model: The model, in evaluation mode.
        ids: int64 ``(T,)``.
        context: Tokens of a window, at least 2.
        bytes_per_token: Of the text.
        batch_tokens: Tokens that are read in one call, at least one window.

    Raises:
        ValueError: If the text has no whole window, or the model sees fewer tokens.
    """
    limit = model.config.max_positions
    if limit is not None and context > limit:
        raise ValueError(f"the model has max_positions={limit} and cannot read windows of {context} tokens")
    if not 2 <= context <= ids.shape[0]:
        raise ValueError(f"context must lie between 2 and the text's {ids.shape[0]} tokens, got {context}")
    windows = ids[: ids.shape[0] // context * context].view(-1, context)
    nats, rows = 0.0, max(1, batch_tokens // context)
    for part in windows.split(rows):
        part = part.to(model.embedding.weight.device)
        logits, _ = model(part[:, :-1])
        nats += float(_nats(logits, part[:, 1:]))
    tokens = windows.shape[0] * (context - 1)
    return Likelihood(nats, tokens, tokens / ids.shape[0], bytes_per_token)


@torch.inference_mode()
def carried(
    model: LanguageModel, ids: Tensor, *, bytes_per_token: float = 1.0, batch_tokens: int = 16384
) -> Likelihood:
    """The likelihood of a text read in one piece, the state handed from part to part; arguments as of windows.

    Raises:
        LimitError: If a mixer of the model has no state.
        ValueError: If the text has fewer than 2 tokens, or more than the model sees.
    """
    limit = model.config.max_positions
    if limit is not None and ids.shape[0] > limit + 1:
        raise ValueError(f"the model has max_positions={limit} and cannot read a text of {ids.shape[0]} tokens at once")
    if ids.shape[0] < 2:
        raise ValueError(f"a text needs at least 2 tokens, got {ids.shape[0]}")
    nats, state = 0.0, None
    for start in range(0, ids.shape[0] - 1, batch_tokens):
        part = ids[start : start + batch_tokens + 1][None].to(model.embedding.weight.device)
        logits, state = model(part[:, :-1], state, return_state=True)
        nats += float(_nats(logits, part[:, 1:]))
    tokens = ids.shape[0] - 1
    return Likelihood(nats, tokens, tokens / ids.shape[0], bytes_per_token)


def at_contexts(
    model: LanguageModel, ids: Tensor, contexts: Sequence[int], *, bytes_per_token: float = 1.0
) -> dict[str, Likelihood]:
    """The likelihoods in windows of all lengths, by their length in words, and carried where the model can.

    Raises:
        ValueError: If no length is given, or as :func:`in_windows` does.
    """
    if not contexts:
        raise ValueError("contexts must name at least one length")
    found = {
        f"{context}": in_windows(model, ids, context, bytes_per_token=bytes_per_token)
        for context in sorted(set(contexts))
    }
    limit = model.config.max_positions
    if limit is None or ids.shape[0] <= limit + 1:
        # a mixer without a state has no longer context than a window
        with contextlib.suppress(LimitError):
            found["carried"] = carried(model, ids, bytes_per_token=bytes_per_token)
    return found


def draw(found: Mapping[str, Likelihood], baselines: Mapping[str, float], trained: int | None) -> bytes:
    """Bits a byte over context lengths, with the baselines as level lines; a PNG file.

    Args:
        found: Of :func:`at_contexts`.
        baselines: Bits a byte by name.
        trained: Tokens of a window in training, where known.
    """
    figure = Figure(figsize=(8.0, 4.6), layout="constrained")
    axes = figure.add_subplot()
    points = [(int(name), one.bits_per_byte) for name, one in found.items() if name != "carried"]
    axes.plot(*zip(*points, strict=True), "o-", label="windows that begin anew")
    if "carried" in found:
        level = found["carried"].bits_per_byte
        axes.axhline(level, color="tab:green", linewidth=1.4, label=f"state carried on: {level:.3f}")
    if trained is not None:
        axes.axvline(trained, color="0.5", linestyle=":", label=f"length in training: {trained}")
    for (name, level), style in zip(
        baselines.items(), ["--", "-.", (0, (1, 1)), (0, (5, 1)), (0, (3, 5))], strict=False
    ):
        axes.axhline(level, color="0.35", linewidth=1.0, linestyle=style, label=f"{name}: {level:.3f}")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="tokens of context", ylabel="bits per byte")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8.5)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()


def _nats(logits: Tensor, labels: Tensor) -> Tensor:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide.flatten(0, 1), labels.flatten(), reduction="sum").double()
