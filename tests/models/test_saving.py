"""Saving and loading: exact, and clear about everything that can be wrong with a checkpoint."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from seqzoo import create
from seqzoo.hub import from_pretrained, save_pretrained, saving
from seqzoo.layers import Bidirectional, MinGRU
from seqzoo.models import LanguageModel, ModelConfig
from seqzoo.models.config import FORMAT
from seqzoo.models.registry import register_model

Build = Callable[..., LanguageModel]
Tokens = Callable[..., torch.Tensor]


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_round_trip(mixer: str, tied: bool, dtype: torch.dtype, build: Build, tokens: Tokens, tmp_path: Path):
    model = build(mixer, dtype=dtype, tie_embeddings=tied, max_positions=9)
    save_pretrained(model, tmp_path / "model")
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    again = from_pretrained(str(tmp_path / "model"))
    assert torch.equal(torch.rand(3), expected), "loading drew from the caller's random numbers"
    assert type(again) is LanguageModel
    assert again.config == model.config
    assert not again.training
    stored = model.state_dict()
    assert again.state_dict().keys() == stored.keys()
    for name, tensor in again.state_dict().items():
        assert tensor.dtype == stored[name].dtype
        assert torch.equal(tensor, stored[name]), name
    assert torch.equal(again(tokens(2, 5))[0], model(tokens(2, 5))[0])
    assert all(parameter.requires_grad for parameter in again.parameters())
    assert names(tmp_path) == ["model"]
    assert names(tmp_path / "model") == ["config.json", "model.safetensors"]


def test_batch_norm_statistics_travel(build: Build, tokens: Tokens, tmp_path: Path):
    model = build(norm="batch").train()
    model(tokens(2, 5))
    save_pretrained(model, tmp_path / "model")
    assert torch.equal(from_pretrained(tmp_path / "model")(tokens(1, 4))[0], model.eval()(tokens(1, 4))[0])


def test_dtype_and_device(build: Build, tmp_path: Path):
    save_pretrained(build(dtype=torch.float32), tmp_path / "model")
    model = from_pretrained(tmp_path / "model", device="cpu", dtype=torch.bfloat16)
    kept = {id(parameter) for block in model.backbone.blocks for parameter in block.mixer.wide_parameters().values()}
    assert {p.dtype for p in model.parameters() if id(p) not in kept} == {torch.bfloat16}
    assert from_pretrained(tmp_path / "model", device=torch.device("meta")).embedding.weight.is_meta
    with pytest.raises(TypeError, match=r"floating-point dtype, got torch.int8"):
        from_pretrained(tmp_path / "model", dtype=torch.int8)


def test_float32_parameters_stay_float32(build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save_pretrained(build(dtype=torch.bfloat16), tmp_path / "model")
    monkeypatch.setattr(MinGRU, "fp32_parameters", ("in_proj.weight",))
    for dtype in (None, torch.bfloat16):
        model = from_pretrained(tmp_path / "model", dtype=dtype)
        assert model.backbone.blocks[1].mixer.in_proj.weight.dtype == torch.float32
        assert model.backbone.blocks[1].mlp.in_proj.weight.dtype == torch.bfloat16


def test_what_is_loaded_does_not_hang_on_the_file(build: Build, tokens: Tokens, tmp_path: Path):
    model = build()
    save_pretrained(model, tmp_path / "model")
    again = from_pretrained(tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(bytes(weights.stat().st_size))
    assert torch.equal(again(tokens(2, 5))[0], model(tokens(2, 5))[0])


@pytest.fixture
def shared_kind(monkeypatch: pytest.MonkeyPatch) -> type[nn.Module]:
    """A kind of model whose two directions share one mixer."""
    from seqzoo.models import registry

    monkeypatch.setattr(registry, "_kinds", dict(registry._kinds))

    @register_model("shared")
    class Shared(nn.Module):
        config_class = ModelConfig

        def __init__(self, config: ModelConfig) -> None:
            super().__init__()
            self.config = config
            mixer = create("min_gru", d_model=config.d_model)
            self.mixer = Bidirectional(mixer, mixer)
            self.register_buffer("table", torch.arange(4.0), persistent=False)

        def reset_parameters(self) -> None:
            self.mixer.reset_parameters()
            self.table.copy_(torch.arange(4.0))

    return Shared


def test_tied_weights_and_other_kinds(shared_kind: type[Any], tmp_path: Path):
    model = shared_kind(ModelConfig(vocab_size=5, d_model=16, n_layers=1, pattern="min_gru"))
    save_pretrained(model, tmp_path / "model")
    assert list(saving.read_tensors(tmp_path / "model" / "model.safetensors")) == ["mixer.mixer.in_proj.weight"]
    again = from_pretrained(tmp_path / "model")
    assert type(again) is shared_kind
    assert again.mixer.mixer.in_proj.weight is again.mixer.mixer_reverse.in_proj.weight
    assert torch.equal(again.mixer.mixer.in_proj.weight, model.mixer.mixer.in_proj.weight)
    # no file holds it
    assert torch.equal(again.table, torch.arange(4.0))


def test_only_models_are_saved(tmp_path: Path):
    with pytest.raises(TypeError, match=r"Linear is none of the models that can be saved: .*language_model"):
        save_pretrained(nn.Linear(2, 2), tmp_path / "model")
    with pytest.raises(ValueError, match="the name 'language_model' is taken by LanguageModel"):
        register_model("language_model")(nn.Linear)


def test_a_checkpoint_is_replaced_and_nothing_else(build: Build, tmp_path: Path):
    save_pretrained(build(), tmp_path)
    save_pretrained(build("min_lstm"), tmp_path)
    assert from_pretrained(tmp_path).config.pattern == "min_lstm"
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match=r"replaces the whole folder .* holds thesis.tex; choose another"):
        save_pretrained(build(), tmp_path)
    assert names(tmp_path) == ["config.json", "model.safetensors", "thesis.tex"]


def test_a_checkpoint_is_as_readable_as_any_file(build: Build, tmp_path: Path):
    save_pretrained(build(), tmp_path / "model")
    (tmp_path / "plain").touch()
    for name in names(tmp_path / "model"):
        assert (tmp_path / "model" / name).stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_full_disk_while_saving(build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save_pretrained(build(), tmp_path / "model")

    def part(tensors: dict[str, torch.Tensor], path: Path) -> None:
        path.write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(saving, "write_tensors", part)
    with pytest.raises(
        OSError, match=r"could not write the checkpoint of a LanguageModel to .*model: No space"
    ) as caught:
        save_pretrained(build("min_lstm"), tmp_path / "model")
    assert caught.value.errno == errno.ENOSPC
    assert from_pretrained(tmp_path / "model").config.pattern == "min_gru"
    assert names(tmp_path) == ["model"]
    with pytest.raises(OSError, match="No space"):
        save_pretrained(build(), tmp_path / "other")
    assert names(tmp_path) == ["model"]


LIMITED = """
import resource, sys
from seqzoo.hub import from_pretrained, save_pretrained
from seqzoo.models import LanguageModel, ModelConfig
path = sys.argv[1]
save_pretrained(LanguageModel(ModelConfig(vocab_size=9, d_model=16, n_layers=1, pattern="min_gru")), path)
resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))
try:
    save_pretrained(LanguageModel(ModelConfig(vocab_size=9999, d_model=64, n_layers=1, pattern="min_gru")), path)
except OSError as error:
    print(error)
print(from_pretrained(path).config.vocab_size)
"""


def test_a_real_limit_while_saving(tmp_path: Path):
    pytest.importorskip("resource")
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path / "model")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    message, vocab_size = done.stdout.splitlines()
    assert "could not write the checkpoint of a LanguageModel to" in message
    assert "File too large" in message
    assert vocab_size == "9"
    assert names(tmp_path) == ["model"]
    assert names(tmp_path / "model") == ["config.json", "model.safetensors"]


def damaged(folder: Path, **changes: Any) -> None:
    """Changes entries of config.json; None removes one."""
    values = json.loads((folder / "config.json").read_text())
    values = {name: value for name, value in {**values, **changes}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(values))


def retensored(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = {name: value.clone() for name, value in saving.read_tensors(folder / "model.safetensors").items()}
    change(tensors)
    saving.write_tensors(tensors, folder / "model.safetensors")


FIRST = "backbone.blocks.0.mixer.in_proj.weight"
CASES: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    "no weights": (lambda f: (f / "model.safetensors").unlink(), FileNotFoundError, "holds no model.safetensors"),
    "no config": (lambda f: (f / "config.json").unlink(), FileNotFoundError, "holds no config.json"),
    "truncated": (
        lambda f: os.truncate(f / "model.safetensors", 2000),
        ValueError,
        "model.safetensors is damaged or no safetensors file",
    ),
    "truncated header": (
        lambda f: os.truncate(f / "model.safetensors", 20),
        ValueError,
        "model.safetensors is damaged",
    ),
    "empty": (lambda f: os.truncate(f / "model.safetensors", 0), ValueError, "model.safetensors is damaged"),
    "pickle": (
        lambda f: torch.save({FIRST: torch.zeros(3)}, f / "model.safetensors"),
        ValueError,
        "model.safetensors is damaged or no safetensors file",
    ),
    "no JSON": (
        lambda f: (f / "config.json").write_text("{"),
        ValueError,
        "config.json does not describe a model: Exp",
    ),
    "no object": (lambda f: (f / "config.json").write_text("[]"), ValueError, "a JSON object, got list"),
    "no text": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), ValueError, "config.json does not describe"),
    "newer": (lambda f: damaged(f, format=FORMAT + 1, new=1), ValueError, "config.json .* is newer than .*upgrade"),
    "no kind": (lambda f: damaged(f, model=None), ValueError, "there is no model None"),
    "other kind": (lambda f: damaged(f, model="langage_model"), ValueError, "did you mean language_model"),
    "other mixer": (lambda f: damaged(f, pattern="min_grv"), ValueError, "did you mean min_gru"),
    "unknown key": (lambda f: damaged(f, n_layer=2), ValueError, "has no 'n_layer'; did you mean n_layers"),
    "missing key": (lambda f: damaged(f, d_model=None), ValueError, "needs d_model"),
    "missing tensor": (
        lambda f: retensored(f, lambda tensors: tensors.pop(FIRST)),
        ValueError,
        rf"model.safetensors holds other tensors than config.json .*\n  missing \(1\): {FIRST}$",
    ),
    "unexpected tensor": (
        lambda f: retensored(f, lambda tensors: tensors.update(extra=torch.zeros(2))),
        ValueError,
        r"\n  unexpected \(1\): extra$",
    ),
    "fewer layers": (
        lambda f: damaged(f, n_layers=1),
        ValueError,
        r"unexpected \(5\): backbone.blocks.1.*mlp_norm.weight$",
    ),
    "shape": (
        lambda f: damaged(f, vocab_size=24),
        ValueError,
        r"\n  misshapen \(1\): embedding.weight is \(23, 16\), must be \(24, 16\)$",
    ),
    "dtype": (
        lambda f: retensored(f, lambda tensors: tensors.update({FIRST: torch.zeros(32, 16, dtype=torch.int8)})),
        ValueError,
        f"{FIRST} is torch.int8, must be like torch.float32$",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_damaged_checkpoints(case: str, build: Build, tmp_path: Path):
    damage, error, words = CASES[case]
    save_pretrained(build(), tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(error, match=words):
        from_pretrained(tmp_path / "model")
