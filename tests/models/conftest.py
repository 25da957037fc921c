"""Small models of every registered mixer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from seqzoo import list_mixers
from seqzoo.mixer import registration
from seqzoo.models import LanguageModel, ModelConfig

VOCABULARY = 23


def stateful(name: str) -> bool:
    """Whether a mixer can do all that a language model asks for: states, packing, stepping, causality."""
    return not registration(name).mixer.limits


@pytest.fixture(params=[name for name in list_mixers() if stateful(name)])
def mixer(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def build() -> Callable[..., LanguageModel]:
    """Builds a small language model in float64 and evaluation mode, the same one each time."""

    def make(pattern: Any = "min_gru", dtype: torch.dtype = torch.float64, **options: Any) -> LanguageModel:
        torch.manual_seed(0)
        values = {"vocab_size": VOCABULARY, "d_model": 16, "n_layers": 2, **options}
        model = LanguageModel(ModelConfig(pattern=pattern, **values)).to(dtype).eval()
        with torch.no_grad():
            # away from the initialisation, where all logits are nearly equal and errors would not show
            model.embedding.weight.mul_(5)
            if model.head is not None:
                model.head.weight.mul_(20)
        return model

    return make


@pytest.fixture
def tokens() -> Callable[..., torch.Tensor]:
    """Draws tokens of a shape, the same ones each time."""

    def draw(*shape: int, seed: int = 0) -> torch.Tensor:
        return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))

    return draw
