"""``seqzoo train`` on a task of Long Range Arena: what it shows and leaves, and that it resumes."""

from __future__ import annotations

import json

import pytest
import torch

from seqzoo.hub import from_pretrained
from seqzoo.models import SequenceClassifier
from seqzoo.train.averaging import weights_to_judge
from seqzoo.train.checkpoints import read_checkpoint
from seqzoo.train.classification import ClassificationModule
from seqzoo.train.command import main
from seqzoo.train.metrics_table import read_metrics

TINY = """
    --config task/listops-lite --config model/s4d --model.config.d_model 16 --model.config.n_layers 1
    --data.training_examples 100 --data.validation_examples 30 --data.test_examples 30 --data.batch_size 4
    --trainer.max_steps 12 --trainer.val_check_interval 4 --trainer.log_every_n_steps 3 --model.warmup_steps 6
"""

# what a judgement holds beside the accuracy
REST = {"loss": 1.0, "examples": 30}


def train(tmp_path, runs: str, *more: str) -> int:
    folders = ["--runs", str(tmp_path / runs), "--data.cache", str(tmp_path / "cache")]
    return main([*TINY.split(), *folders, *more])


def test_it_trains_reports_and_has_nothing_to_resume(tmp_path, capsys):
    assert train(tmp_path, "runs") == 0
    (run,) = (tmp_path / "runs").iterdir()
    shown = capsys.readouterr().out
    report = json.loads((run / "report.json").read_text())
    assert report["steps"] == 12
    assert report["test_examples"] == 30
    assert 0 <= report["test_accuracy"] <= 1
    assert {"chance", "most frequent class", "0 levels", "4 levels"} <= set(report["baselines_accuracy"])
    for words in ("100 to train on, 30 to validate, 30 to test", "this model", "most frequent class", "step 12/12"):
        assert words in shown
    rows = read_metrics(run / "metrics.csv")
    assert [row["step"] for row in rows if row["train_loss"] is not None] == [3, 6, 9, 12]
    assert [row["step"] for row in rows if row["validation_accuracy"] is not None] == [4, 8, 12]
    best = max(row["validation_accuracy"] for row in rows if row["validation_accuracy"] is not None)
    assert report["validation_accuracy"] == pytest.approx(best)
    assert all(0.5 < row["packing"] <= 1.0 for row in rows if row["train_loss"] is not None)
    assert all(row["gradient_norm"] > 0 for row in rows if row["train_loss"] is not None)
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert type(from_pretrained(run / "model")) is SequenceClassifier
    assert main(["--resume", str(run)]) == 0
    assert "there is nothing to resume" in capsys.readouterr().out


def test_the_best_weights_are_taken_though_training_went_on(tmp_path, monkeypatch):
    found = iter([0.25, 0.75])
    monkeypatch.setattr(ClassificationModule, "judge", lambda self, batches: {"accuracy": next(found, 0.5), **REST})
    assert train(tmp_path, "runs", "--trainer.val_check_interval", "8") == 0
    (run,) = (tmp_path / "runs").iterdir()
    report = json.loads((run / "report.json").read_text())
    # of the last weights and those of the only validation, which was not at the end
    assert (report["steps"], report["model_of_step"], report["validation_accuracy"]) == (12, 8, 0.75)
    kept = from_pretrained(run / "model").state_dict()
    best = weights_to_judge(read_checkpoint(run / "checkpoints" / "best.safetensors"))
    assert all(torch.equal(tensor, best[f"model.{name}"]) for name, tensor in kept.items())


def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path, interrupted):
    assert train(tmp_path, "whole", "--checkpoint_steps", "5") == 0
    with interrupted(7):
        train(tmp_path, "stopped", "--checkpoint_steps", "5")
    (whole,), (stopped,) = ((tmp_path / name).iterdir() for name in ("whole", "stopped"))
    assert main(["--resume", str(stopped)]) == 0
    for name in ("model/model.safetensors", "model/config.json"):
        assert (whole / name).read_bytes() == (stopped / name).read_bytes()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model.config.n_classes", "3"], "the data need model.config.n_classes 10, got 3"),
        (["--data.max_depth", "2"], "a tree of max_depth 2 and max_args 10 has at most 12 tokens"),
        (["--data.folder", "/nowhere"], "there is no file /nowhere/basic_train.tsv"),
    ],
)
def test_what_does_not_fit_is_one_message(options, words, tmp_path, capsys):
    assert train(tmp_path, "runs", *options) == 2
    assert words in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())


def test_minutes_become_steps(tmp_path, capsys):
    assert train(tmp_path, "runs", "--trainer.max_steps", "-1", "--minutes", "0.15") == 0
    assert "tokens/s: " in capsys.readouterr().out
