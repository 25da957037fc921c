"""The example of short ListOps runs, and tells who is above the oracle."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

pytest.importorskip("lightning")

EXAMPLE = Path(__file__).parents[2] / "examples" / "listops_lite.py"


@pytest.fixture
def example(tmp_path: Path, monkeypatch) -> dict:
    monkeypatch.setenv("SEQZOO_CACHE", str(tmp_path / "cache"))
    return runpy.run_path(str(EXAMPLE))


def test_it_trains_and_judges(example, tmp_path: Path, capsys):
    tiny = ["--trainer.max_steps", "2", "--data.training_examples", "40", "--data.validation_examples", "10"]
    tiny += ["--data.test_examples", "200", "--model.config.d_model", "16", "--model.config.n_layers", "1"]
    arguments = ["--models", "s4d", "--runs", str(tmp_path / "runs"), *tiny]
    # two steps teach nothing
    assert example["main"](arguments) == 1
    printed = capsys.readouterr().out
    assert "s4d: " in printed
    assert "NOT above the oracle of one level" in printed
    easy, lite = sorted((tmp_path / "runs").iterdir())
    assert (lite / "accuracy.png").is_file()
    assert f"weights: {easy / 'model'}\n" in (lite / "config.yaml").read_text()
    assert "weights: null\n" in (easy / "config.yaml").read_text()


def test_a_training_that_fails_is_told(example, tmp_path: Path):
    with pytest.raises(SystemExit, match="training mamba did not end well"):
        example["main"](["--models", "mamba", "--runs", str(tmp_path), "--data.max_args", "99"])


def test_a_share_of_all_leaves_nothing(example, tmp_path: Path, capsys):
    with pytest.raises(SystemExit):
        example["main"](["--runs", str(tmp_path / "runs"), "--easy", "1"])
    assert "a share from 0 to less than 1, got 1.0" in capsys.readouterr().err


def test_the_verdict(example, capsys):
    namespace = example["main"].__globals__
    for accuracy, status, words in ((0.5, 0, "mamba: 50.0 %, above"), (0.4, 1, "mamba: 40.0 %, NOT above")):
        namespace["run"] = lambda *arguments, accuracy=accuracy: (accuracy, 0.4)
        assert example["main"](["--models", "mamba"]) == status
        assert words in capsys.readouterr().out
