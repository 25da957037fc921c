"""Configurations and options: what combines, what overrides, what is refused and in which words."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import yaml

from seqzoo.train import run_folder
from seqzoo.train.arguments import Request
from seqzoo.train.command import main
from seqzoo.train.configuration import ConfigurationError, combine, flatten, load, merge, shipped
from seqzoo.train.options import TrainingCLI

TASKS = [name for name in shipped() if name.startswith("task/")]
# with all the others tests/train/test_combinations.py builds and trains them
MODELS = ["model/min_gru", "model/s4d"]
SMALL = ["--model.config.d_model", "16", "--model.config.n_layers", "1"]


def build(configurations=(), overrides=()) -> TrainingCLI:
    return TrainingCLI(combine(configurations), [*SMALL, *overrides])


def test_the_shipped_files_are_found():
    assert {"task/stdlib", "model/min_gru", "model/min_lstm"} <= set(shipped())


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("model", MODELS)
def test_every_task_combines_with_every_model(task, model):
    for order in ([task, model], [model, task]):
        cli = build(order)
        assert cli.config.name == "-".join(name.split("/")[1] for name in order)
        assert cli.model.model.config.pattern == load(model)["model"]["init_args"]["config"]["pattern"]


def test_what_is_not_named_is_the_quickstart():
    assert combine([])["name"] == "stdlib-min_gru"
    assert combine(["model/min_lstm"])["name"] == "stdlib-min_lstm"
    assert combine(["task/stdlib.yaml"])["name"] == "min_gru-stdlib"
    assert build().config.trainer.max_steps == -1


def test_another_class_takes_no_options_of_the_first():
    below = {"class_path": "a.B", "init_args": {"x": 1}}
    assert merge(below, {"class_path": "a.C"}) == {"class_path": "a.C"}
    assert merge(below, {"class_path": "a.B", "init_args": {"y": 2}})["init_args"] == {"x": 1, "y": 2}
    assert merge({"init_args": {"x": 1}}, below) == below


def test_paths_lie_over_names(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("model: {init_args: {lr: 1e-3, config: {pattern: [min_gru, {name: min_lstm, expand: 1.5}]}}}\n")
    cli = build(["model/min_lstm", str(path)])
    assert cli.model.lr == 0.001
    assert cli.model.model.config.pattern == ["min_gru", {"name": "min_lstm", "expand": 1.5}]
    assert cli.config.name == "stdlib-min_lstm-mine"


def test_options_override_files():
    cli = build(
        [], ["--model.lr=1e-2", "--data.batch_size", "3", "--model.init_args.config.dropout", "0.25", "--seed", "9"]
    )
    assert cli.model.lr == 0.01
    assert cli.datamodule.batch_size == 3
    assert cli.model.model.config.dropout == 0.25
    assert cli.datamodule.seed == cli.model.seed == 9


def test_the_written_configuration_builds_the_same(tmp_path):
    cli = build([], ["--seed", "5", "--trainer.max_steps", "12", "--model.config.pattern", "min_lstm"])
    path = tmp_path / "config.yaml"
    path.write_text(cli.text())
    again = TrainingCLI(combine([str(path)]), [])
    assert again.text() == cli.text()
    assert again.config.seed == again.datamodule.seed == 5
    for name, parameter in cli.model.named_parameters():
        assert parameter.equal(again.model.get_parameter(name))
    assert "seed" not in yaml.safe_load(cli.text())["data"]["init_args"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model.config.d_modell", "3"], "no option 'model.config.d_modell'; did you mean model.config.d_model"),
        (["--data.batchsize", "3"], "did you mean data.batch_size"),
        (["--trainer.max_step", "3"], "did you mean trainer.max_steps"),
        (["--frobnicate", "3"], "no option 'frobnicate'; seqzoo train --help lists them"),
        (["--model.config.d_model", "abc"], "Expected a <class 'int'>. Got value: abc"),
        (["--model.config.d_model", "0"], "d_model must be at least 1, got 0"),
        (["--model.config.pattern", "min_gruu"], "no mixer 'min_gruu'; did you mean min_gru"),
        (["--model.lr", "-1"], "lr must be at least 0, got -1"),
        (["--model.config.vocab_size", "100"], "vocab_size of at least 256, got 100"),
        (["--model.config.max_positions", "8"], "max_positions must be at least data.context, 256, got 8"),
        (["--minutes", "0"], "minutes must be positive, got 0"),
        (["--model.warmup_steps", "2"], "warmup_steps must be above 4, got 2"),
        (["--trainer.accelerator", "abacus"], "abacus"),
        (["--data.folder", "/nowhere"], "'/nowhere' does not exist"),
        (
            ["--config", "task/stdlb"],
            "no configuration 'task/stdlb', neither a file nor shipped; did you mean task/stdlib",
        ),
        (["--config"], "--config needs a value"),
        (["--resume", "run", "--seed", "3"], "takes no other option"),
        (["minutes", "3"], "options begin with --, got 'minutes'"),
        (["--help", "weather"], "no help on 'weather'; known are model, data, trainer"),
    ],
)
def test_wrong_input_is_one_message(arguments, words, capsys, tmp_path):
    runs = (
        [] if "--resume" in arguments or "--help" in arguments or "minutes" in arguments else ["--runs", str(tmp_path)]
    )
    assert main([*runs, *arguments]) == 2
    shown = capsys.readouterr()
    message = " ".join(shown.err.split())
    assert words in message
    assert message.startswith("seqzoo train: ")
    assert "Traceback" not in message
    assert not list(tmp_path.iterdir()), "a run that never began leaves nothing"


def test_a_disk_that_is_too_small_is_said_before_training(tmp_path, corpus, capsys, monkeypatch):
    monkeypatch.setattr(run_folder.shutil, "disk_usage", lambda path: SimpleNamespace(free=5000))
    assert main([*SMALL, "--data.folder", str(corpus), "--runs", str(tmp_path)]) == 1
    assert "MB free; checkpoints and model will need about" in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- a\n", "must be a mapping"),
        ("a: [\n", "is not YAML"),
        ("data: {class_path: nowhere.Data}\n", "cannot be imported"),
    ],
)
def test_wrong_files_are_named(text, words, tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    assert main(["--config", str(path)]) == 2
    assert words in " ".join(capsys.readouterr().err.split())


def test_help_is_short_and_its_sections_are_complete(capsys):
    assert main(["--help"]) == 0
    short = capsys.readouterr().out
    assert len(short.splitlines()) < 50
    for word in ("--minutes", "--resume", "task/stdlib", "model/min_lstm", "--model.config.d_model"):
        assert word in short
    for section, option in (
        ("model", "--model.warmup_steps"),
        ("data", "--data.validation_fraction"),
        ("trainer", "--trainer.precision"),
    ):
        assert main(["--help", section]) == 0
        assert option in capsys.readouterr().out


def test_small_pieces():
    assert merge({"a": {"b": 1, "c": 2}, "d": [1]}, {"a": {"c": 3}, "d": [2]}) == {"a": {"b": 1, "c": 3}, "d": [2]}
    assert dict(flatten({"a": {"b": 1}, "c": 2})) == {"a.b": 1, "c": 2}
    request = Request.parse(["--config=a", "-c", "b", "--seed", "3", "--x=y"])
    assert request.configurations == ["a", "b"]
    assert request.overrides == ["--seed", "3", "--x=y"]
    with pytest.raises(ConfigurationError, match="class_path"):
        TrainingCLI({"model": {}, "data": {}}, [])
