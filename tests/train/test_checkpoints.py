"""The format of checkpoints: what goes in comes out, and damage is told."""

from __future__ import annotations

import errno
import os
import pickle
from collections import OrderedDict

import pytest
import torch

from seqzoo.hub import files
from seqzoo.hub.files import WriteError
from seqzoo.train.checkpoints import CheckpointError, SafetensorsIO, finite, read_checkpoint, write_checkpoint


def example() -> dict:
    shared = torch.randn(3, 4)
    return {
        "tied": [shared, shared],
        "view": torch.arange(12.0).view(3, 4)[:, 1],
        "empty": torch.zeros(0, 2),
        "scalar": torch.tensor(7, dtype=torch.int64),
        "low": torch.randn(5).to(torch.bfloat16),
        "by number": {0: {"step": torch.tensor(1.0)}, 1: {}},
        "betas": (0.9, 0.95),
        "numbers": [1, 2.5, True, None, float("inf"), "text", -0.1],
        "$odd": {"$tensor": "not a tensor"},
        "ordered": OrderedDict(a=1),
    }


def same(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


def test_round_trip(tmp_path):
    state = example()
    path = tmp_path / "one.safetensors"
    write_checkpoint(state, path)
    assert same({**state, "ordered": {"a": 1}}, read_checkpoint(path))
    assert [entry.name for entry in tmp_path.iterdir()] == ["one.safetensors"]


def test_what_would_need_pickle_is_refused(tmp_path):
    path = tmp_path / "one.safetensors"
    with pytest.raises(CheckpointError, match="got <class 'object'>"):
        write_checkpoint({"thing": object()}, path)
    assert not path.exists()


def test_missing_truncated_and_foreign_files_are_named(tmp_path):
    path = tmp_path / "one.safetensors"
    with pytest.raises(CheckpointError, match=r"there is no checkpoint .*one\.safetensors"):
        read_checkpoint(path)
    write_checkpoint(example(), path)
    whole = path.read_bytes()
    for length in (0, 5, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=rf"one\.safetensors \({length} bytes\) is truncated or damaged"):
            read_checkpoint(path)
    path.write_bytes(pickle.dumps({"state_dict": {}}))
    with pytest.raises(CheckpointError, match="expected a whole safetensors file"):
        read_checkpoint(path)


def test_full_disk_leaves_the_earlier_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "last.safetensors"
    write_checkpoint({"step": 1}, path)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(WriteError, match=r"last\.safetensors: No space left on device") as caught:
        write_checkpoint({"step": 2}, path)
    assert caught.value.errno == errno.ENOSPC
    assert read_checkpoint(path) == {"step": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.safetensors"]


def test_lightning_plugin(tmp_path):
    plugin = SafetensorsIO()
    plugin.save_checkpoint({"global_step": 3}, tmp_path / "a")
    assert plugin.load_checkpoint(tmp_path / "a") == {"global_step": 3}
    plugin.remove_checkpoint(tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_finite():
    assert finite({"a": torch.ones(2), "b": torch.arange(3)})
    assert not finite({"a": torch.tensor([1.0, float("nan")])})
