"""The command line's entry, ``list`` and ``doctor``."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from seqzoo import cli, doctor
from seqzoo.kernels import dispatch
from seqzoo.mixer import list_mixers


def test_help_names_every_command(capsys: pytest.CaptureFixture):
    assert cli.main([]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in cli.COMMANDS)


def test_an_unknown_command_gives_the_nearest(capsys: pytest.CaptureFixture):
    assert cli.main(["trian"]) == 2
    assert "there is no command 'trian'; did you mean train?" in capsys.readouterr().err


def test_list_has_a_row_a_mixer(capsys: pytest.CaptureFixture):
    assert cli.main(["list"]) == 0
    text = capsys.readouterr().out
    assert all(any(line.startswith(name + " ") for line in text.splitlines()) for name in list_mixers())


def test_a_missing_extra_is_named():
    code = "import sys; sys.modules['lightning'] = None\nfrom seqzoo.cli import main\nsys.exit(main(['train']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "pip install 'seqzoo[train]'" in done.stderr


def test_doctor_says_which_implementation_is_taken(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert cli.main(["doctor", "--kernels"]) == 0
    text = capsys.readouterr().out
    assert "cpu, float32 and below: cpu" in text
    assert "cpu: gpu cannot run: it takes CUDA tensors" in text


def test_doctor_passes_and_names_what_is_broken(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "DTYPES", (torch.float32,))
    monkeypatch.setattr(dispatch, "BACKENDS", ("reference", "chunked"))
    assert cli.main(["doctor"]) == 0
    assert "every op is as exact as promised" in capsys.readouterr().out
    from seqzoo.kernels.linear_scan import chunked

    honest = chunked.backward
    monkeypatch.setattr(chunked, "backward", lambda *a: tuple(1.001 * g for g in honest(*a)))
    assert cli.main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "FAIL linear_scan cpu chunked float32" in text
    assert "failed: linear_scan on cpu chunked" in text


def test_doctor_survives_a_kernel_that_raises(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    from seqzoo.kernels.gated_scan import chunked

    def broken(*arguments):
        raise RuntimeError("the device is on fire")

    monkeypatch.setattr(doctor, "DTYPES", (torch.float32,))
    monkeypatch.setattr(dispatch, "BACKENDS", ("reference", "chunked"))
    monkeypatch.setattr(chunked, "forward", broken)
    assert cli.main(["doctor"]) == 1
    assert "the device is on fire" in capsys.readouterr().out
