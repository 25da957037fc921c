"""What a path means to ``from_pretrained``: a folder, a repository of the Hub, or a mistake."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from seqzoo.hub import from_pretrained, save_pretrained
from seqzoo.hub.saving import find_checkpoint
from seqzoo.models import LanguageModel

Build = Callable[..., LanguageModel]


def test_local_folders_are_not_taken_for_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "file").touch()
    for path, error, words in (
        ("/nowhere/model", FileNotFoundError, "no folder /nowhere/model, and it is no owner/name"),
        ("./model", FileNotFoundError, "no folder ./model"),
        ("model", FileNotFoundError, "no folder model, and it is no owner/name"),
        (Path("owner/name"), FileNotFoundError, "no folder owner/name"),
        ("runs/model", FileNotFoundError, "though runs exists; to load from the Hub write hf://runs/model"),
        ("file", NotADirectoryError, "file is a file"),
        ("owner/name", ImportError, r"owner/name is no local folder.*pip install 'seqzoo\[hub\]'"),
        ("hf://runs/model", ImportError, r"pip install 'seqzoo\[hub\]'"),
        ("hf://model", ValueError, "written owner/name, got 'model'"),
    ):
        with pytest.raises(error, match=words):
            from_pretrained(path)
    (tmp_path / "runs" / ".model.previous").mkdir()
    with pytest.raises(FileNotFoundError, match=r"interrupted save left the last as runs/.model.previous"):
        from_pretrained("runs/model")


def test_the_hub(build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save_pretrained(build(), tmp_path / "snapshot")
    asked: list[tuple[str, list[str]]] = []

    class Refusal(Exception):
        pass

    def snapshot_download(hub_id: str, *, allow_patterns: list[str]) -> str:
        asked.append((hub_id, allow_patterns))
        if hub_id == "owner/private":
            raise Refusal("401")
        return str(tmp_path / "snapshot")

    hub = types.ModuleType("huggingface_hub")
    errors = types.ModuleType("huggingface_hub.errors")
    hub.snapshot_download = snapshot_download
    errors.HfHubHTTPError = errors.LocalEntryNotFoundError = Refusal
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", errors)
    monkeypatch.chdir(tmp_path)
    assert type(from_pretrained("owner/name")) is LanguageModel
    assert type(from_pretrained("hf://owner/name")) is LanguageModel
    # no pickle is even fetched
    assert asked == [("owner/name", ["config.json", "model.safetensors"])] * 2
    with pytest.raises(FileNotFoundError, match="owner/private is no local folder, and the Hub did not give it: 401"):
        from_pretrained("owner/private")


def test_a_run_folder_holds_its_checkpoint(build: Build, tmp_path: Path):
    save_pretrained(build(), tmp_path / "run" / "model")
    assert (
        find_checkpoint(tmp_path / "run") == find_checkpoint(tmp_path / "run" / "model") == tmp_path / "run" / "model"
    )
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*none"):
        find_checkpoint(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"neither .* nor its folder model holds a checkpoint"):
        find_checkpoint(tmp_path)
    (tmp_path / "run" / "model" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"run/model lacks config.json"):
        find_checkpoint(tmp_path / "run")
