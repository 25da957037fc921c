"""The quickstart at toy size, in a process of its own: everything that it promises to leave."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import yaml

from seqzoo.hub import from_pretrained
from seqzoo.train.checkpoints import read_checkpoint
from seqzoo.train.metrics_table import read_metrics

LEFT = """
    config.yaml environment.json metrics.csv curves.png report.json sample.txt model/config.json
    model/model.safetensors checkpoints/last.safetensors checkpoints/best.safetensors
"""


def test_it_leaves_everything(whole):
    run, done = whole
    assert done.statuses == [0], done.err
    for name in LEFT.split():
        assert (run / name).stat().st_size > 0, name
    assert list((run / "tensorboard").glob("events*"))
    assert not list(run.rglob(".*.tmp"))
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (run / "sample.txt").read_text().startswith("def ")


def test_its_report_sets_every_number_beside_the_baselines(whole):
    run, done = whole
    report = json.loads((run / "report.json").read_text())
    assert report["finished"]
    assert set(report["baselines_bits_per_byte"]) == {"gzip -9", "bz2 -9", "xz -9e", "order-2 model", "uniform"}
    assert report["validation_bits_per_byte"] < 7.5, "a model that has learned anything beats 8 bits per byte"
    for name, value in report["baselines_bits_per_byte"].items():
        assert name in done.out
        assert f"{value:.3f}" in done.out
    assert f"{report['validation_bits_per_byte']:.3f}" in done.out
    assert done.out.count(str(run)) >= 3, "the folder is printed at the start and at the end"
    assert "B/s" in done.out
    assert "step 24/24" in done.out
    assert done.err == ""


def test_its_rows_are_complete(whole):
    run, _ = whole
    rows = read_metrics(run / "metrics.csv")
    assert [row["step"] for row in rows if row["train_loss"] is not None] == [3, 6, 9, 12, 15, 18, 21, 24]
    assert [row["step"] for row in rows if row["validation_bpb"] is not None] == [8, 16, 24]
    losses = [row["train_loss"] for row in rows if row["train_loss"] is not None]
    assert losses[-1] < losses[0] - 0.3


def test_its_configuration_and_environment_are_exact(whole, corpus):
    run, _ = whole
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["trainer"]["max_steps"] == 24
    assert config["data"]["class_path"].endswith(".FolderBytes")
    assert config["data"]["init_args"]["folder"] == str(corpus)
    facts = json.loads((run / "environment.json").read_text())
    assert facts["torch"] == torch.__version__
    assert facts["threads"] == 1
    assert facts["data"]["training_bytes"] > facts["data"]["validation_bytes"] > 0
    assert "--trainer.max_steps" in facts["arguments"]


def test_its_model_loads_and_is_the_last_step(whole):
    run, _ = whole
    model = from_pretrained(run / "model")
    state = read_checkpoint(run / "checkpoints" / "last.safetensors")
    assert state["global_step"] == 24
    report = json.loads((run / "report.json").read_text())
    assert report["model_of_step"] == 24
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state["state_dict"][f"model.{name}"])


@pytest.mark.slow
def test_minutes_become_steps_that_repeat(train, tiny, tmp_path):
    options = tiny[: tiny.index("--trainer.max_steps")]
    done = train(([*options, "--minutes", "0.15", "--model.warmup_steps", "40", "--runs", tmp_path / "one"], None))
    assert done.statuses == [0], done.err
    first = next((tmp_path / "one").iterdir())
    config = yaml.safe_load((first / "config.yaml").read_text())
    steps = config["trainer"]["max_steps"]
    report = json.loads((first / "report.json").read_text())
    assert steps == report["steps"] > 12
    assert report["seconds"] < 0.15 * 60
    done = train((["--config", first / "config.yaml", "--runs", tmp_path / "two"], None))
    assert done.statuses == [0], done.err
    second = next((tmp_path / "two").iterdir())
    assert (first / "model/model.safetensors").read_bytes() == (second / "model/model.safetensors").read_bytes()
    assert second.name.startswith("stdlib-min_gru-")
    shutil.rmtree(tmp_path / "two")
