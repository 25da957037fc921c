"""ModelConfig: its way through JSON, and an error for everything that is wrong, at once."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from seqzoo import list_mixers
from seqzoo.models import ModelConfig
from seqzoo.models.config import FORMAT

SMALL: dict[str, Any] = {"vocab_size": 11, "d_model": 16, "n_layers": 3, "pattern": "min_gru"}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pattern": ["min_gru", {"name": "min_lstm", "expand": 2.0, "gate_range": [-1.0, 1.0]}]},
        {"mlp": "plain", "mlp_ratio": 3.5, "norm": "layer", "norm_position": "post", "tie_embeddings": False},
        {"mlp": "none", "norm": "batch", "dropout": 0.25, "max_positions": 7, "auxiliary_weight": 0.5},
        {"norm_eps": 1e-3, "residual_in_fp32": True},
        {"mlp": "experts", "n_experts": 3, "top_k": 1, "mlp_chunk_size": 5, "checkpoint_blocks": True},
        {"pattern": [{"parallel": ["min_gru", {"name": "mamba", "expand": 1}], "shared": "a"}, "min_gru"]},
    ],
)
def test_round_trip(options: dict[str, Any]):
    config = ModelConfig(**{**SMALL, **options})
    again = ModelConfig.from_json(config.to_json())
    assert again == config
    assert ModelConfig.from_dict(config.to_dict()) == config
    assert json.loads(config.to_json()) == {**dataclasses.asdict(ModelConfig(**SMALL)), **options}


def test_an_older_format_becomes_the_present():
    """Format 1 had neither norm_eps nor residual_in_fp32, format 2 neither experts nor what spares memory."""
    for older in (1, 2):
        config = ModelConfig.from_dict({**SMALL, "format": older})
        assert config == ModelConfig(**SMALL)
        assert (config.format, config.norm_eps, config.residual_in_fp32) == (FORMAT, 1e-5, False)
        assert (config.mlp_chunk_size, config.checkpoint_blocks) == (None, False)


@pytest.mark.parametrize("mixer", list_mixers())
def test_every_mixer_is_a_pattern(mixer: str):
    assert type(ModelConfig(**{**SMALL, "pattern": mixer}).mixers()[2]).__name__ != ""


def test_the_pattern_repeats_with_its_options():
    config = ModelConfig(**{**SMALL, "pattern": ["min_gru", {"name": "min_lstm", "expand": 2}]})
    built = config.mixers()
    assert [type(mixer).__name__ for mixer in built] == ["MinGRU", "MinLSTM", "MinGRU"]
    assert [mixer.width for mixer in built] == [16, 32, 16]


def test_the_pattern_is_a_copy():
    entry = {"name": "min_lstm", "expand": 2}
    config = ModelConfig(**{**SMALL, "pattern": [entry]})
    entry["expand"] = 4
    config.to_dict()["pattern"][0]["expand"] = 5
    assert config.pattern == [{"name": "min_lstm", "expand": 2}]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"pattern": "min_gro"}, ValueError, "no mixer 'min_gro'; did you mean min_gru"),
        ({"pattern": ["min_gru", "min_lsmt"]}, ValueError, "did you mean min_lstm"),
        ({"pattern": [{"name": "min_gru", "expnd": 2}]}, TypeError, "no option 'expnd'; did you mean expand"),
        ({"pattern": [{"name": "min_gru", "expand": -1}]}, ValueError, "expand.*-1"),
        ({"pattern": [{"name": "min_gru", "d_model": 8}]}, ValueError, "d_model belongs to the model"),
        ({"pattern": [{"expand": 2}]}, ValueError, "needs a name, or 'parallel'"),
        ({"pattern": []}, ValueError, "at least one mixer"),
        ({"pattern": ""}, ValueError, "at least one mixer"),
        ({"pattern": 3}, TypeError, "a name or a list, got 3"),
        ({"pattern": [3]}, TypeError, "a name or a mapping.*got 3"),
        ({"vocab_size": 0}, ValueError, "vocab_size must be at least 1, got 0"),
        ({"d_model": 16.0}, TypeError, "d_model must be an integer, got 16.0"),
        ({"n_layers": True}, TypeError, "n_layers must be an integer, got True"),
        ({"max_positions": -2}, ValueError, "max_positions must be at least 1, got -2"),
        ({"mlp": "gatd"}, ValueError, "no mlp 'gatd'; did you mean gated"),
        ({"mlp": None}, TypeError, "mlp must be a name, got None"),
        ({"mlp_ratio": 0}, ValueError, "mlp_ratio must be positive"),
        ({"mlp_ratio": float("nan")}, ValueError, "mlp_ratio.*nan"),
        ({"norm": "rmsnorm"}, ValueError, "no norm 'rmsnorm'; did you mean rms"),
        ({"norm_position": "middle"}, ValueError, "no norm_position 'middle'; known are post, pre"),
        ({"norm_eps": 0}, ValueError, "norm_eps must be positive, got 0"),
        ({"norm_eps": "1e-5"}, TypeError, "norm_eps must be a number, got '1e-5'"),
        ({"tie_embeddings": 1}, TypeError, "tie_embeddings must be true or false, got 1"),
        ({"residual_in_fp32": 1}, TypeError, "residual_in_fp32 must be true or false, got 1"),
        (
            {"residual_in_fp32": True, "norm_position": "post"},
            ValueError,
            "residual_in_fp32 needs norm_position='pre', got 'post'",
        ),
        ({"dropout": 1.0}, ValueError, "dropout must be at least 0 and below 1.0, got 1.0"),
        ({"dropout": "0.1"}, TypeError, "dropout must be a number, got '0.1'"),
        ({"auxiliary_weight": -0.5}, ValueError, "auxiliary_weight must be at least 0.*got -0.5"),
        ({"format": FORMAT + 1}, ValueError, f"format {FORMAT + 1} is newer.*upgrade"),
        ({"format": 0}, ValueError, "format must be at least 1, got 0"),
    ],
)
def test_wrong_values(options: dict[str, Any], error: type[Exception], words: str):
    with pytest.raises(error, match=words):
        ModelConfig(**{**SMALL, **options})
    with pytest.raises(error, match=words):
        ModelConfig.from_dict({**SMALL, **options})


def test_wrong_keys():
    with pytest.raises(ValueError, match="ModelConfig has no 'n_layer'; did you mean n_layers"):
        ModelConfig.from_dict({**SMALL, "n_layer": 2})
    with pytest.raises(TypeError, match="needs d_model, pattern"):
        ModelConfig.from_dict({"vocab_size": 11, "n_layers": 3})


def test_a_newer_format_explains_unknown_keys():
    with pytest.raises(ValueError, match="is newer"):
        ModelConfig.from_dict({**SMALL, "format": FORMAT + 1, "not_yet_known": 1})


def test_wrong_json():
    with pytest.raises(TypeError, match="ModelConfig is made of names and values, a JSON object, got NoneType"):
        ModelConfig.from_dict(None)  # pyright: ignore - that is refused
    with pytest.raises(TypeError, match="JSON object, got list"):
        ModelConfig.from_json("[]")
    with pytest.raises(ValueError, match="Expecting"):
        ModelConfig.from_json("{")
