"""Models by name: arrangements of the literature at sizes that a laptop trains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from seqzoo.mixer import nearest
from seqzoo.models.config import ModelConfig
from seqzoo.models.language_model import LanguageModel


@dataclass(frozen=True)
class Preset:
    """A named model.

    Attributes:
        name: Its name.
        paper: Title of the paper that it follows.
        arxiv: The paper's identifier on arXiv.
        description: What of the paper it has, and where it deviates.
        values: The values of its :class:`ModelConfig`.
    """

    name: str
    paper: str
    arxiv: str
    description: str
    values: Mapping[str, Any]

    def config(self, **overrides: Any) -> ModelConfig:
        """The configuration, with other values where they are given.

        Raises:
            TypeError: If a value has the wrong type.
            ValueError: If a value is out of range, or ModelConfig has no such field.
        """
        return ModelConfig.from_dict({**self.values, **overrides})


def _preset(name: str, paper: str, arxiv: str, description: str, **values: Any) -> Preset:
    # bytes, which need no tokenizer
    return Preset(name, paper, arxiv, description, MappingProxyType({"vocab_size": 256, **values}))


# one head of keys and values, which divides any number of heads; no positions, for the mixers beside it know the order
_GLOBAL = {"name": "attention", "n_kv_heads": 1, "rotary_base": None}
_LOCAL = {"name": "sliding_window_attention", "window": 512, "n_kv_heads": 1}
# the norms of step, B and C that a deep hybrid needs
_JAMBA_MAMBA = {"name": "mamba", "norm_eps": 1e-6}
_HYMBA = {"name": "mamba", "expand": 1}

_PRESETS = (
    _preset(
        "transformer-small",
        "LLaMA: Open and Efficient Foundation Language Models",
        "2302.13971",
        "Attention with rotary positions, SwiGLU, RMS norms before both. Embeddings are tied here.",
        d_model=256,
        n_layers=8,
        pattern="attention",
    ),
    _preset(
        "mamba-small",
        "Mamba: Linear-Time Sequence Modeling with Selective State Spaces",
        "2312.00752",
        "Mamba blocks without MLPs.",
        d_model=256,
        n_layers=12,
        pattern="mamba",
        mlp="none",
    ),
    _preset(
        "jamba-small",
        "Jamba: A Hybrid Transformer-Mamba Language Model",
        "2403.19887",
        "One attention layer without positions to seven of Mamba with inner norms, experts in every other layer, two a "
        "token. 8 experts instead of 16; the inner norms have no weights.",
        d_model=256,
        n_layers=8,
        pattern=[
            (_GLOBAL if index == 4 else _JAMBA_MAMBA) | {"mlp": "experts" if index % 2 else "gated"}
            for index in range(8)
        ],
        n_experts=8,
        top_k=2,
    ),
    _preset(
        "samba-small",
        "Samba: Simple Hybrid State Space Models for Efficient Unlimited Context Language Modeling",
        "2406.07522",
        "Mamba, MLP, sliding window attention, MLP, in turns. The window is 512 instead of 2048.",
        d_model=256,
        n_layers=8,
        pattern=["mamba", _LOCAL],
    ),
    _preset(
        "hymba-small",
        "Hymba: A Hybrid-head Architecture for Small Language Models",
        "2411.13676",
        "Attention and Mamba side by side in every block: over all tokens in the first, the middle and the last block, "
        "over a window in the others. No meta tokens, no keys and values shared between layers, and each mixer has "
        "projections of its own.",
        d_model=256,
        n_layers=7,
        pattern=[{"parallel": [_GLOBAL if index in (0, 3, 6) else _LOCAL, _HYMBA]} for index in range(7)],
    ),
    _preset(
        "zamba-small",
        "Zamba: A Compact 7B SSM Hybrid Model",
        "2405.16712",
        "Blocks of a state space without MLPs, and after every five one attention block with an MLP whose parameters "
        "are the same at every depth. Mamba-2, as in Zamba2 (2411.15242), instead of Mamba; the shared block reads the "
        "residual without the embeddings beside it.",
        d_model=256,
        n_layers=12,
        pattern=[{"name": "mamba2", "d_state": 64, "mlp": "none"}] * 5 + [{"name": "attention", "shared": "global"}],
    ),
    _preset(
        "griffin-small",
        "Griffin: Mixing Gated Linear Recurrences with Local Attention for Efficient Language Models",
        "2402.19427",
        "Two recurrent blocks to one of local attention with one head of keys and values, MLPs of three times the "
        "width. SwiGLU instead of GeGLU, the recurrence as wide as the model instead of 4/3, a window of 512 instead "
        "of 1024.",
        d_model=256,
        n_layers=9,
        pattern=["rglru", "rglru", _LOCAL],
        mlp_ratio=3.0,
    ),
)
_BY_NAME = {one.name: one for one in _PRESETS}


def list_models() -> list[str]:
    """Names of all presets, sorted."""
    return sorted(_BY_NAME)


def preset(name: str) -> Preset:
    """The preset of a name.

    Raises:
        ValueError: If there is none; the message gives the nearest.
    """
    if not isinstance(name, str) or name not in _BY_NAME:
        raise ValueError(f"there is no model {name!r}; {nearest(str(name), _BY_NAME)}")
    return _BY_NAME[name]


def create_model(name: str, **overrides: Any) -> LanguageModel:
    """Builds a model by name, freshly initialised: ``create_model("jamba-small", vocab_size=32000)``.

    Args:
        name: One of :func:`list_models`.
        overrides: Fields of :class:`ModelConfig` that are to have other values.

    Raises:
        TypeError: If a value has the wrong type.
        ValueError: If there is no model of that name, no such field, or a value is out of range.
    """
    return LanguageModel(preset(name).config(**overrides))


def table() -> str:
    """All presets in aligned columns: name, parameters, state at 16,384 tokens, paper."""
    rows = [("name", "parameters", "state at 16,384 tokens", "paper")]
    for name in list_models():
        one = preset(name)
        with torch.device("meta"):
            model = create_model(name)
        size = sum(parameter.numel() for parameter in model.parameters())
        rows.append((name, f"{size:,}", f"{model.state_size(16384):,}", f"{one.paper} ({one.arxiv})"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
