"""Speed and memory of a model over the length of its sequences."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from seqzoo.models.language_model import LanguageModel
from seqzoo.models.memory import kept_bytes


class Speed(NamedTuple):
    """What sequences of one length cost.

    Attributes:
        length: Tokens of a sequence.
        forward: Tokens a second, without gradients.
        training: Tokens a second, forward and backward.
        step: Tokens a second of one sequence that is decoded behind so many; NaN where the model sees no more.
        kept: Bytes a token that training keeps for the backward pass, parameters apart.
        state: Bytes that a sequence carries.
    """

    length: int
    forward: float
    training: float
    step: float
    kept: float
    state: int


def measure(model: LanguageModel, lengths: Sequence[int], *, batch_tokens: int = 4096, rounds: int = 3) -> list[Speed]:
    """Measures a model at several lengths; batches hold ``batch_tokens`` tokens, at least one sequence.

    Args:
        model: The model; its parameters keep their values, gradients are dropped.
        lengths: Tokens of a sequence.
        batch_tokens: Tokens of a batch.
        rounds: Repetitions, of which the median counts, after one that warms up.

    Raises:
        ValueError: If a length is below 1 or more than the model sees, or ``rounds`` is below 1.
    """
    limit = model.config.max_positions
    for length in lengths:
        if length < 1 or (limit is not None and length >= limit):
            most = "" if limit is None else f" and below max_positions, {limit},"
            raise ValueError(f"a length must be at least 1{most} got {length}")
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    return [_at(model, length, max(1, batch_tokens // length), rounds) for length in sorted(set(lengths))]


def _at(model: LanguageModel, length: int, rows: int, rounds: int) -> Speed:
    device = model.embedding.weight.device
    ids = torch.randint(model.config.vocab_size, (rows, length), device=device)
    tokens = rows * length
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def forward() -> None:
        with torch.inference_mode():
            model(ids)

    def training() -> None:
        torch.autograd.grad(cast("Tensor", model.loss(ids, ids)), parameters, allow_unused=True)

    with torch.inference_mode():
        _, state = model(ids[:1], return_state=True)
    if state is None:
        raise RuntimeError("the model returned no state although it was asked for one")
    held = sum(value.numel() * value.element_size() for one in state for value in one.values())
    steps = 16

    def decode() -> None:
        nonlocal state
        with torch.inference_mode():
            # one after the other from where it stands: a cache of keys is used up by every step
            for _ in range(steps):
                _, state = model.step(ids[:1, 0], state)

    forward_time = _time(forward, rounds, device)
    limit = model.config.max_positions
    room = limit is None or length + steps * (rounds + 1) <= limit
    step_time = _time(decode, rounds, device) / steps if room else float("nan")
    kept = kept_bytes(lambda: model.loss(ids, ids), parameters) / tokens
    return Speed(
        length,
        tokens / forward_time,
        tokens / _time(training, rounds, device),
        1.0 / step_time,
        kept,
        held,
    )


def _time(call: Callable[[], Any], rounds: int, device: torch.device) -> float:
    def once() -> float:
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    once()
    return statistics.median(once() for _ in range(rounds))
