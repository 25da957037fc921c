"""Published weights: what transformers computes, in both directions, and clear words about what does not fit."""

from __future__ import annotations

import json
import os
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

# before transformers is imported
os.environ["HF_HUB_OFFLINE"] = "1"
from transformers import (
    AutoModelForCausalLM,
    FalconMambaForCausalLM,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from seqzoo.hub import export_pretrained, from_pretrained, load_pretrained, save_pretrained, saving
from seqzoo.hub.conversion import find_family
from seqzoo.layers import MinGRU
from seqzoo.models import LanguageModel, ModelConfig, generate

Tokens = Callable[..., torch.Tensor]

SMALL: dict[str, Any] = {
    "vocab_size": 23,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id")),
}
SMALL2: dict[str, Any] = {"num_heads": 8, "head_dim": 8, "state_size": 6, "n_groups": 1}
CASES: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "mamba": (MambaForCausalLM, {}),
    "untied": (MambaForCausalLM, {"tie_word_embeddings": False}),
    "biases": (MambaForCausalLM, {"use_bias": True, "use_conv_bias": False}),
    "sizes": (MambaForCausalLM, {"state_size": 5, "expand": 3, "conv_kernel": 2, "time_step_rank": 7}),
    "epsilon": (MambaForCausalLM, {"layer_norm_epsilon": 0.3, "residual_in_fp32": False, "hidden_act": "swish"}),
    "steps": (MambaForCausalLM, {"time_step_min": 0.01, "time_step_max": 0.5, "time_step_floor": 0.02}),
    "falcon": (FalconMambaForCausalLM, {"tie_word_embeddings": False}),
    # the expansion that the published one states is not that of its tensors
    "falcon sizes": (
        FalconMambaForCausalLM,
        {"mixer_rms_eps": 0.2, "expand": 16, "intermediate_size": 48, "layer_norm_epsilon": 1e-3},
    ),
    "mamba2": (Mamba2ForCausalLM, SMALL2),
    # each group's channels are normalised by themselves
    "mamba2 groups": (Mamba2ForCausalLM, {**SMALL2, "n_groups": 4, "tie_word_embeddings": True}),
    "mamba2 biases": (Mamba2ForCausalLM, {**SMALL2, "n_groups": 2, "use_bias": True, "use_conv_bias": False}),
    "mamba2 sizes": (
        Mamba2ForCausalLM,
        {"num_heads": 6, "head_dim": 16, "expand": 3, "state_size": 5, "n_groups": 3, "conv_kernel": 2},
    ),
    "mamba2 epsilon": (
        Mamba2ForCausalLM,
        {**SMALL2, "layer_norm_epsilon": 0.3, "residual_in_fp32": False, "hidden_act": "swish"},
    ),
    "mamba2 steps": (
        Mamba2ForCausalLM,
        {**SMALL2, "time_step_limit": (0.2, 0.6), "time_step_min": 0.01, "time_step_max": 0.5, "time_step_floor": 0.02},
    ),
    "mamba2 least step": (Mamba2ForCausalLM, {**SMALL2, "time_step_limit": (0.4, float("inf"))}),
}
# Mamba-2 of transformers does not limit the steps of tokens that it decodes from a cache
UNCACHED = ("mamba2 steps", "mamba2 least step")


def published(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model of transformers whose every parameter counts."""
    kind, options = CASES[name]
    torch.manual_seed(0)
    model = kind(kind.config_class(**{**SMALL, **options})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.to(dtype)


@pytest.fixture
def store(tmp_path: Path) -> Callable[..., Path]:
    """Saves a model as transformers does."""

    def make(model: Any, name: str = "theirs", **options: Any) -> Path:
        model.save_pretrained(tmp_path / name, **options)
        return tmp_path / name

    return make


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


def retold(folder: Path, **changes: Any) -> None:
    """Changes entries of config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def retensored(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = {name: value.clone() for name, value in saving.read_tensors(folder / "model.safetensors").items()}
    change(tensors)
    saving.write_tensors(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_model_of_transformers(name: str, store: Callable[..., Path], tokens: Tokens):
    theirs = published(name)
    ours = load_pretrained(store(theirs))
    assert type(ours) is LanguageModel
    assert not ours.training
    ids = tokens(2, 40)
    with torch.no_grad():
        expected = theirs(ids).logits
        assert float(expected.std()) > 0.3
        close(ours(ids)[0], expected)
    prompts = tokens(3, 9, seed=1)
    # one prompt after the other: a batch without padding has no need of a mask either
    options = {"do_sample": False, "max_new_tokens": 20, "use_cache": name not in UNCACHED}
    continued = theirs.generate(prompts, attention_mask=torch.ones_like(prompts), **options)
    assert torch.equal(generate(ours, prompts, 20, temperature=0), continued[:, 9:])


@pytest.mark.parametrize("name", CASES)
def test_round_trip(name: str, store: Callable[..., Path], tokens: Tokens, tmp_path: Path):
    theirs = published(name)
    ours = load_pretrained(store(theirs))
    export_pretrained(ours, tmp_path / "ours")
    assert sorted(entry.name for entry in (tmp_path / "ours").iterdir()) == ["config.json", "model.safetensors"]
    again = load_pretrained(tmp_path / "ours")
    assert again.config == ours.config
    for key, tensor in ours.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key
    # the transformers of 2024 refuse files without it
    with safe_open(tmp_path / "ours" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    stored = saving.read_tensors(tmp_path / "theirs" / "model.safetensors")
    exported = saving.read_tensors(tmp_path / "ours" / "model.safetensors")
    assert stored.keys() == exported.keys()
    assert all(torch.equal(stored[key], exported[key]) for key in stored)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert type(loaded) is type(theirs)
    assert not any(report.values()), report
    keys = {"layer_norm_epsilon", "residual_in_fp32", "time_step_rank", "intermediate_size", "time_step_min"}
    keys |= {"time_step_limit", "num_heads", "head_dim", "n_groups", "state_size", "expand"}
    for key in keys & vars(theirs.config).keys() - ({"expand"} if name == "falcon sizes" else set()):
        found, expected = getattr(loaded.config, key), getattr(theirs.config, key)
        assert found == expected or tuple(found) == tuple(expected), key
    ids = tokens(2, 40)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(ids).logits, theirs(ids).logits)


def test_bfloat16(store: Callable[..., Path], tokens: Tokens, tmp_path: Path):
    wide = published("falcon", torch.bfloat16)
    folder = store(wide)
    ours = load_pretrained(folder)
    mixer = ours.backbone.blocks[0].mixer
    assert ours.head.weight.dtype == mixer.in_proj.weight.dtype == torch.bfloat16
    assert mixer.A_log.dtype == mixer.D.dtype == mixer.dt_proj.bias.dtype == torch.float32
    theirs = wide.backbone.layers[0].mixer
    assert torch.equal(mixer.A_log, theirs.A_log.float())
    export_pretrained(ours, tmp_path / "ours")
    exported = saving.read_tensors(tmp_path / "ours" / "model.safetensors")
    assert exported["backbone.layers.0.mixer.A_log"].dtype == torch.float32
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    ids = tokens(2, 40)
    with torch.no_grad():
        assert loaded.dtype == torch.bfloat16
        expected = wide(ids).logits
        assert torch.equal(loaded(ids).logits, expected)
        # no further from the exact model than theirs
        exact = load_pretrained(folder, dtype=torch.float64)(ids)[0]
        error = (expected.double() - exact).abs().max()
        assert (ours(ids)[0].double() - exact).abs().max() <= 2 * error


@pytest.mark.parametrize("wide", [True, False])
def test_residual_in_fp32(wide: bool, store: Callable[..., Path], tokens: Tokens):
    folder = store(published("mamba", torch.bfloat16))
    retold(folder, residual_in_fp32=wide)
    model = load_pretrained(folder)
    seen = []
    for block in model.backbone.blocks:
        block.mixer_norm.register_forward_pre_hook(lambda _, given: seen.append(given[0].dtype))
    _, state = model(tokens(2, 5), return_state=True)
    logits, _ = model.step(tokens(2), state)
    assert set(seen) == {torch.float32 if wide else torch.bfloat16}
    assert len(seen) == 4
    assert logits.dtype == torch.bfloat16


def test_dtype_and_device(store: Callable[..., Path]):
    folder = store(published("mamba"))
    model = load_pretrained(str(folder), dtype=torch.bfloat16)
    assert model.embedding.weight.dtype == torch.bfloat16
    assert model.backbone.blocks[0].mixer.A_log.dtype == torch.float32
    assert load_pretrained(folder, device="meta").embedding.weight.is_meta
    with pytest.raises(TypeError, match=r"floating-point dtype, got torch.int8"):
        load_pretrained(folder, dtype=torch.int8)


def test_several_stored_dtypes_become_the_widest(store: Callable[..., Path], tokens: Tokens):
    folder = store(published("mamba", torch.bfloat16))
    narrow = load_pretrained(folder).backbone.norm.weight
    retensored(folder, lambda t: t.update({"backbone.norm_f.weight": t["backbone.norm_f.weight"].float()}))
    model = load_pretrained(folder)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(model.backbone.norm.weight, narrow.float())
    assert model(tokens(1, 3))[0].dtype == torch.float32


def test_parts(store: Callable[..., Path], tokens: Tokens):
    theirs = published("untied")
    folder = store(theirs, max_shard_size="20KB")
    parts = sorted(folder.glob("model-*.safetensors"))
    assert len(parts) > 2
    ids = tokens(2, 9)
    with torch.no_grad():
        close(load_pretrained(folder)(ids)[0], theirs(ids).logits)
    parts[1].unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks {parts[1].name}, which model.safetensors.index.json lists"):
        load_pretrained(folder)
    for text, words in (
        ('{"weight_map": {"a": "../secret.safetensors"}}', r"files beside it, got \['../secret.safetensors'\]"),
        ('{"weight_map": {"a": "pytorch_model.bin"}}', r"must list safetensors files"),
        ('{"weight_map": {}}', "must list safetensors files"),
        ('{"weight_map": 3}', "is no index of weights"),
        ("{}", "is no index of weights: KeyError"),
        ("[]", "is no index of weights"),
        ("{", "is no index of weights"),
    ):
        (folder / "model.safetensors.index.json").write_text(text)
        with pytest.raises(ValueError, match=words):
            load_pretrained(folder)


def test_tied_weights_in_every_form(store: Callable[..., Path], tokens: Tokens):
    theirs = published("mamba")
    folder = store(theirs)
    ids, embedding, head = tokens(2, 9), "backbone.embeddings.weight", "lm_head.weight"
    expected = load_pretrained(folder)(ids)[0]
    forms: list[Callable[[dict[str, torch.Tensor]], object]] = [
        lambda t: t.update({head: t[embedding].clone()}),
        lambda t: t.pop(embedding),
        # as a hook of transformers takes it
        lambda t: t.update({"backbone.embedding.weight": t.pop(head)}),
    ]
    for form in forms:
        retensored(folder, form)
        assert torch.equal(load_pretrained(folder)(ids)[0], expected)
    # stored narrower beside the original
    retensored(folder, lambda t: t.update({head: t["backbone.embedding.weight"].bfloat16()}))
    assert torch.equal(load_pretrained(folder)(ids)[0], expected)
    retensored(folder, lambda t: t.update({head: t["backbone.embedding.weight"][:5].clone()}))
    with pytest.raises(ValueError, match=rf"holds {head} of shape \(5, 32\) and {embedding} of \(23, 32\), though"):
        load_pretrained(folder)
    retensored(folder, lambda t: t.update({head: t["backbone.embedding.weight"] + 1}))
    with pytest.raises(ValueError, match=f"holds {head} different from {embedding}, though config.json ties them"):
        load_pretrained(folder)
    retold(folder, tie_word_embeddings=False)
    with torch.no_grad():
        assert not torch.equal(load_pretrained(folder)(ids)[0], expected)


def test_as_published_years_ago(store: Callable[..., Path], tokens: Tokens):
    """The keys that the converted weights of 2024 have, the absence of those that came later."""
    folder = store(published("mamba"))
    expected = load_pretrained(folder)
    values = json.loads((folder / "config.json").read_text())
    for key in ("tie_word_embeddings", "use_mambapy", "use_associative_scan", "dtype", "time_step_min"):
        del values[key]
    values |= {"_name_or_path": "/home", "d_inner": 64, "d_model": 32, "fused_add_norm": True, "n_layer": 2}
    values |= {"pad_vocab_size_multiple": 8, "rms_norm": True, "ssm_cfg": {}, "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(values))
    model = load_pretrained(folder)
    assert model.config == expected.config
    assert torch.equal(model(tokens(2, 9))[0], expected(tokens(2, 9))[0])


@pytest.mark.parametrize("kind", [MambaForCausalLM, FalconMambaForCausalLM, Mamba2ForCausalLM])
def test_absent_keys_have_the_values_of_transformers(kind: type[Any]):
    told = json.loads(kind.config_class().to_json_string())
    family = find_family(told)
    assert family.read({"model_type": told["model_type"]}) == family.read(told)


def test_every_tensor_that_does_not_fit_is_named_at_once(store: Callable[..., Path]):
    folder = store(published("untied"))

    def damage(tensors: dict[str, torch.Tensor]) -> None:
        for layer in (0, 1):
            del tensors[f"backbone.layers.{layer}.mixer.D"]
            tensors[f"backbone.layers.{layer}.norm.bias"] = torch.zeros(32)
        tensors["backbone.layers.1.mixer.A_log"] = torch.zeros(64, 8)
        tensors["backbone.norm_f.weight"] = torch.zeros(32, dtype=torch.int8)
        tensors["backbone.layers.0.mixer.in_proj.weight"] = torch.zeros(128, 32).to(torch.float8_e4m3fn)
        del tensors["lm_head.weight"]

    retensored(folder, damage)
    with pytest.raises(ValueError, match=r"model.safetensors holds other tensors than config.json") as caught:
        load_pretrained(folder)
    assert str(caught.value).splitlines()[1:] == [
        "  missing (3): backbone.layers.0.mixer.D, backbone.layers.1.mixer.D, lm_head.weight",
        "  unexpected (2): backbone.layers.0.norm.bias, backbone.layers.1.norm.bias",
        (
            "  misshapen (3): "
            "backbone.layers.0.mixer.in_proj.weight is torch.float8_e4m3fn, must be like torch.float32, "
            "backbone.layers.1.mixer.A_log is (64, 8), must be (64, 16), "
            "backbone.norm_f.weight is torch.int8, must be like torch.float32"
        ),
    ]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "llama"}, "model_type = 'llama' has no equal here, known are falcon_mamba, mamba, mamba2"),
        ({"model_type": None}, "model_type = None has no equal here"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' has no equal here, hidden_act = 'silu' has"),
        ({"ssm_cfg": {"layer": "Mamba2"}, "rms_norm": False}, r"rms_norm = False .*; ssm_cfg = \{'layer': 'Mamba2'\}"),
        ({"quantization_config": {"bits": 4}, "x": 1}, r"quantization_config = \{'bits': 4\} has no equal here; x = 1"),
        ({"d_model": 16, "n_layer": 3}, "d_model = 16 contradicts hidden_size = 32; n_layer = 3 contradicts"),
        ({"mixer_rms_eps": 1e-6}, "mixer_rms_eps = 1e-06 has no equal here"),
        ({"hidden_size": "32", "use_bias": 1}, "hidden_size must be an integer, got '32'; use_bias must be true or"),
        ({"residual_in_fp32": None, "state_size": True}, "residual_in_fp32 .* got None; state_size .* got True"),
        ({"time_step_rank": "full"}, "time_step_rank must be an integer or 'auto', got 'full'"),
        ({"intermediate_size": "64"}, "intermediate_size must be an integer, got '64'"),
        ({"hidden_size": 0}, "hidden_size must be at least 1, got 0"),
        ({"conv_kernel": 9}, "d_conv must be an integer from 2 to 8, got 9; conv_kernel is d_conv here"),
        ({"layer_norm_epsilon": 0}, "norm_eps must be .*got 0.*layer_norm_epsilon is norm_eps here"),
        ({"time_step_min": 1}, "dt_min must not be above dt_max.* time_step_min is dt_min here"),
    ],
)
def test_configurations_without_equal(changes: dict[str, Any], words: str, store: Callable[..., Path]):
    folder = store(published("mamba"))
    retold(folder, **changes)
    with pytest.raises(ValueError, match=f"config.json does not describe a model that seqzoo reads: .*{words}"):
        load_pretrained(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rms_norm": False}, "rms_norm = False has no equal here"),
        ({"num_heads": 7}, r"num_heads \* head_dim = 56 contradicts expand \* hidden_size = 2 \* 32"),
        (
            {"num_heads": None, "expand": 1.5},
            "num_heads must be an integer, got None; expand must be an integer, got 1.5",
        ),
        ({"intermediate_size": 48}, r"intermediate_size = 48 contradicts expand \* hidden_size"),
        ({"time_step_limit": [0.1]}, r"time_step_limit must be two numbers, got \[0.1\]"),
        ({"time_step_limit": None}, "time_step_limit must be two numbers, got None"),
        ({"time_step_limit": [0.0, {"__float__": "NaN"}]}, "time_step_limit must be two numbers"),
        ({"time_step_limit": [0.5, 0.1]}, "dt_limit must be a range"),
        ({"n_groups": 3}, "n_groups must divide the 8 heads, got 3"),
    ],
)
def test_configurations_of_mamba2_without_equal(changes: dict[str, Any], words: str, store: Callable[..., Path]):
    folder = store(published("mamba2"))
    retold(folder, **changes)
    with pytest.raises(ValueError, match=f"config.json does not describe a model that seqzoo reads: .*{words}"):
        load_pretrained(folder)


def test_mamba2_as_published_years_ago(store: Callable[..., Path], tokens: Tokens):
    """The keys of Codestral Mamba and of the converted weights of 2024."""
    folder = store(published("mamba2 groups"))
    expected = load_pretrained(folder)
    retold(
        folder,
        intermediate_size=64,
        norm_before_gate=True,
        rms_norm=True,
        time_step_init_scheme="random",
        time_step_scale=1.0,
        time_step_limit=[0.0, float("inf")],
        torch_dtype="float32",
    )
    assert "Infinity" in (folder / "config.json").read_text()
    model = load_pretrained(folder)
    assert model.config == expected.config
    assert torch.equal(model(tokens(2, 9))[0], expected(tokens(2, 9))[0])


def test_the_expansion_decides_where_the_file_has_no_intermediate_size(store: Callable[..., Path]):
    folder = store(published("mamba"))
    values = json.loads((folder / "config.json").read_text())
    del values["intermediate_size"], values["time_step_rank"]
    for expand, error in ((2, None), (3, "misshapen"), ("2", "expand must be a number, got '2'")):
        (folder / "config.json").write_text(json.dumps({**values, "expand": expand}))
        if error is None:
            load_pretrained(folder)
        else:
            with pytest.raises(ValueError, match=error):
                load_pretrained(folder)


def test_a_ratio_of_widths_that_no_float_is(store: Callable[..., Path], tokens: Tokens, tmp_path: Path):
    """464 / 112 * 112 is not 464."""
    config = MambaConfig(**{**SMALL, "hidden_size": 112, "intermediate_size": 464})
    theirs = MambaForCausalLM(config).eval()
    ours, ids = load_pretrained(store(theirs)), tokens(2, 9)
    with torch.no_grad():
        close(ours(ids)[0], theirs(ids).logits)
    export_pretrained(ours, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["intermediate_size"] == 464


def test_what_is_no_such_checkpoint(store: Callable[..., Path], tmp_path: Path):
    folder = store(published("mamba"))
    with pytest.raises(ValueError, match=r"transformers; seqzoo.hub.load_pretrained reads those"):
        from_pretrained(folder)
    save_pretrained(load_pretrained(folder), tmp_path / "ours")
    with pytest.raises(ValueError, match="one of seqzoo's own, which from_pretrained reads"):
        load_pretrained(tmp_path / "ours")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"only pytorch_model.bin. Nothing is ever unpickled; .* convert them"):
        load_pretrained(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="a JSON object, got list"):
        load_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no config.json"):
        load_pretrained(folder)
    with pytest.raises(FileNotFoundError, match="there is no folder /nowhere"):
        load_pretrained("/nowhere")


def test_the_hub(store: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    folder = store(published("mamba"))
    asked: list[tuple[str, list[str]]] = []

    def snapshot_download(hub_id: str, *, allow_patterns: list[str]) -> str:
        asked.append((hub_id, allow_patterns))
        return str(folder)

    hub, errors = types.ModuleType("huggingface_hub"), types.ModuleType("huggingface_hub.errors")
    hub.snapshot_download = snapshot_download
    errors.HfHubHTTPError = errors.LocalEntryNotFoundError = OSError
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", errors)
    monkeypatch.chdir(tmp_path)
    assert type(load_pretrained("state-spaces/mamba-130m-hf")) is LanguageModel
    # no pickle is even fetched
    files = ["config.json", "model.safetensors", "model.safetensors.index.json", "model-*.safetensors"]
    assert asked == [("state-spaces/mamba-130m-hf", files)]


MAMBA: dict[str, Any] = {"vocab_size": 23, "d_model": 16, "n_layers": 2, "pattern": "mamba", "mlp": "none"}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("norm_eps", [None, 0.1])
def test_a_model_of_our_own(norm_eps: float | None, tied: bool, tokens: Tokens, tmp_path: Path):
    entry = {"name": "mamba", "norm_eps": norm_eps, "expand": 1.5, "d_state": 3, "dt_max": 1}
    torch.manual_seed(0)
    config = ModelConfig(**{**MAMBA, "pattern": [entry], "tie_embeddings": tied, "dropout": 0.1})
    model = LanguageModel(config).eval()
    with torch.no_grad():
        model.embedding.weight.mul_(20)
    export_pretrained(torch.compile(model, backend="eager"), tmp_path / "ours")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    ids = tokens(2, 40)
    with torch.no_grad():
        close(model(ids)[0], loaded(ids).logits)
    assert loaded.config.eos_token_id is None
    assert loaded.config.residual_in_fp32 is False


@pytest.mark.parametrize("options", [{}, {"head_dim": 4, "n_groups": 2, "dt_limit": (0.0, 0.5), "A_range": (1, 2)}])
def test_a_mamba2_of_our_own(options: dict[str, Any], tokens: Tokens, tmp_path: Path):
    entry = {"name": "mamba2", "d_state": 5, "d_conv": 3, **options}
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(**{**MAMBA, "pattern": [entry]})).eval()
    with torch.no_grad():
        model.embedding.weight.mul_(20)
    export_pretrained(model, tmp_path / "ours")
    assert ("time_step_limit" in json.loads((tmp_path / "ours" / "config.json").read_text())) == ("dt_limit" in options)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert type(loaded) is Mamba2ForCausalLM
    ids = tokens(2, 40)
    with torch.no_grad():
        close(model(ids)[0], loaded(ids).logits)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mlp": "gated"}, "nearest, mamba: mlp='gated' instead of 'none'"),
        (
            {"norm": "layer", "norm_position": "post", "max_positions": 9},
            "norm='layer' instead of 'rms'; norm_position='post' instead of 'pre'; max_positions=9 instead of None",
        ),
        ({"pattern": "min_gru"}, "pattern with min_gru instead of mamba alone"),
        ({"pattern": ["mamba", "longhorn"]}, "pattern with longhorn instead of mamba alone"),
        (
            {"pattern": ["mamba", {"name": "mamba", "d_state": 4}]},
            "d_state=16 and 4 instead of one value for all blocks",
        ),
        (
            {"pattern": [{"name": "mamba2", "expand": 1.5, "norm_eps": 0.1}]},
            "nearest, mamba2: expand=1.5 instead of an integer; norm_eps=0.1 of the mixer instead of 1e-05, the",
        ),
        ({"pattern": [{"name": "mamba", "shared": "all"}]}, "shared blocks instead of one a layer"),
        ({"pattern": [{"parallel": ["mamba", "min_gru"]}]}, "mixers in parallel instead of one a block"),
        ({"pattern": ["mamba", {"name": "mamba", "mlp": "gated"}]}, "mlp='gated' of a block instead of 'none'"),
    ],
)
def test_models_that_the_format_cannot_hold(options: dict[str, Any], words: str, tmp_path: Path):
    model = LanguageModel(ModelConfig(**{**MAMBA, **options}))
    with pytest.raises(ValueError, match=re.escape(words)):
        export_pretrained(model, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_what_differs_in_words_alone_is_no_difference(tmp_path: Path):
    pattern = ["mamba", {"name": "mamba", "d_state": 16}, "min_gru"]
    export_pretrained(LanguageModel(ModelConfig(**{**MAMBA, "pattern": pattern})), tmp_path / "ours")
    assert load_pretrained(tmp_path / "ours").config.n_layers == 2


def test_only_language_models_are_exported_and_nothing_foreign_is_replaced(tmp_path: Path):
    with pytest.raises(TypeError, match="only a LanguageModel can be exported, this is a MinGRU"):
        export_pretrained(MinGRU(16), tmp_path / "ours")
    model = LanguageModel(ModelConfig(**MAMBA))
    export_pretrained(model, tmp_path)
    export_pretrained(model, tmp_path)
    (tmp_path / "tokenizer.json").touch()
    with pytest.raises(FileExistsError, match=r"holds tokenizer.json; choose another"):
        export_pretrained(model, tmp_path)
