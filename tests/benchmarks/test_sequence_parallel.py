"""A sequence on two processes beside one, and packed sequences beside a single one of their length."""

from __future__ import annotations

import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from seqzoo.models import LanguageModel, ModelConfig
from seqzoo.packing import Packing
from seqzoo.parallel import next_tokens

POOL = runpy.run_path(str(Path(__file__).parents[1] / "parallel/conftest.py"))["Pool"]
TOKENS = 4096
# tokens of packed sequences
LENGTHS = (1024, 512, 2, 1500, 1058)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Two processes of one thread each."""
    ranks = POOL(2, tmp_path_factory.mktemp("ranks") / "store", 60)
    yield ranks
    ranks.stop()


@pytest.mark.parametrize("exchange", ["chain", "allgather", "hillis_steele", "pipelined"])
def test_two_processes(measure, device: torch.device, pair: Any, exchange: str):
    """Of a limit of 0.5x nothing is lost."""
    if device.type != "cpu":
        pytest.skip("the processes are on the CPU")

    def of(size: int) -> Callable[[], Callable[[], object]]:
        return lambda: lambda: pair.call("measured_step", size, exchange=exchange, length=TOKENS)

    group = f"language model of mamba and gated_deltanet, {TOKENS:,} tokens, forward+backward+update"
    measure(of(2), group=group, name=f"2 processes, {exchange}", role="seqzoo", limit=of(1), seconds=4.0)


def step(pattern: str, lengths: tuple[int, ...] | None, device: torch.device) -> Callable[[], Callable[[], object]]:
    """What makes training steps on sequences of these lengths, or a single one of all tokens."""

    def make() -> Callable[[], object]:
        torch.manual_seed(0)
        config = ModelConfig(vocab_size=256, d_model=64, n_layers=2, pattern=pattern)
        model = LanguageModel(config).to(device)
        ids = torch.randint(0, 256, (1, TOKENS), device=device)
        packing = None if lengths is None else Packing.from_lengths(lengths, device=device)
        labels = next_tokens(ids, packing)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

        def call() -> object:
            optimizer.zero_grad()
            model.loss(ids, labels, cu_seqlens=packing).backward()
            return optimizer.step()

        return call

    return make


@pytest.mark.parametrize("pattern", ["mamba", "min_gru", "gla", "gated_deltanet"])
def test_a_packed_step(measure, device: torch.device, pattern: str):
    group = f"{pattern} language model, {TOKENS:,} tokens, forward+backward+update"
    alone = step(pattern, None, device)
    measure(step(pattern, LENGTHS, device), group=group, name="packed", role="seqzoo", limit=alone, seconds=3.0)
