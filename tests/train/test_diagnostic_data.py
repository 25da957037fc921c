"""Diagnostics as data to train on: what is drawn when, what is learned and judged, and what is refused."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch

from seqzoo.cli import main
from seqzoo.hub import from_pretrained
from seqzoo.models import LanguageModel, ModelConfig
from seqzoo.train.classification import TokenClassification
from seqzoo.train.data import Diagnostic
from seqzoo.train.data.diagnostics import DIAGNOSTICS
from seqzoo.train.data.windows import IGNORED

pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")
LENGTH = ("selective-copying", "induction-heads", "parity", "modular-sum", "group-words", "cycle-navigation")
NEEDS = {"mqar": {"length": 16, "n_pairs": 3, "vocab_size": 16}, **{name: {"length": 12} for name in LENGTH}}


def copying(**options) -> Diagnostic:
    values = {"validation_examples": 20, "test_examples": 30, "batch_size": 8, "test_options": {"length": 24}}
    return Diagnostic("selective-copying", {"length": 12, "n_tokens": 2, "n_symbols": 3}, **{**values, **options})


def build(**options) -> TokenClassification:
    torch.manual_seed(0)
    values = {"vocab_size": 5, "d_model": 16, "n_layers": 1, "pattern": "min_gru"}
    return TokenClassification(ModelConfig(**values | options), lr=0.01, warmup_steps=5)


@pytest.mark.parametrize("name", sorted(set(DIAGNOSTICS) - {"mad-compression"}))
def test_every_diagnostic_can_be_trained_on(name):
    data = Diagnostic(name, NEEDS.get(name, {}), validation_examples=3, test_examples=4, batch_size=2)
    data.setup()
    batch = next(iter(data.train_dataloader()))
    assert batch["x"].shape == batch["labels"].shape
    assert len(batch["x"]) == 2
    assert [len(one["x"]) for one in data.val_dataloader()] == [2, 1]
    config = ModelConfig(vocab_size=data.vocab_size, d_model=8, n_layers=1, pattern="min_gru")
    module = TokenClassification(config)
    module.check_data(data)
    assert torch.isfinite(module.loss(batch))
    assert module.judge(data.test_dataloader())["examples"] == len(data.asked("test"))


@pytest.mark.parametrize("name", sorted(set(DIAGNOSTICS) - {"mad-compression"}))
def test_the_vocabulary_is_that_of_all_sequences(name):
    """Few sequences need not have all ids; a model is asked for room for those of the others."""
    few, many = (Diagnostic(name, NEEDS.get(name, {}), {}, 1, count, batch_size=1) for count in (1, 800))
    for data in (few, many):
        data.setup()
    judged = many.judged["test"]
    assert few.vocab_size == many.vocab_size
    last = 1 + max(int(judged.ids.max()), int(judged.labels.max()))
    assert last == many.vocab_size


def test_the_vocabulary_has_room_for_the_test():
    data = copying(test_options={"n_symbols": 7})
    data.setup()
    assert data.vocab_size == 9


def test_what_is_judged_are_other_sequences():
    """Validation, test and training of every run have numbers of their own."""
    options = {"options": {"length": 40}, "test_options": {}, "validation_examples": 8, "test_examples": 8}
    runs = [Diagnostic("parity", **options, batch_size=8, seed=seed) for seed in (0, 1, 2)]
    for data in runs:
        data.setup()
    drawn = [data.judged[split].batch(np.arange(8))["x"] for data in runs[:1] for split in ("validation", "test")]
    drawn += [batch["x"] for data in runs for batch in itertools.islice(data.train_dataloader(), 5)]
    rows = [row.numpy().tobytes() for batch in drawn for row in batch]
    assert len(set(rows)) == len(rows)
    # which sequences there are the seed of the data says, and that of a run which of them train
    other = Diagnostic("parity", **options, batch_size=8, data_seed=1)
    other.setup()
    for one in (other.judged["validation"].batch(np.arange(8)), next(iter(other.train_dataloader()))):
        assert not set(rows) & {row.numpy().tobytes() for row in one["x"]}


def test_no_sequence_of_training_comes_twice_and_none_is_judged():
    data, other = copying(batch_size=64), copying(batch_size=64, seed=1)
    for one in (data, other):
        one.setup()
    seen = [
        row.numpy().tobytes()
        for one in (data, other)
        for batch in itertools.islice(one.train_dataloader(), 4)
        for row in batch["x"]
    ]
    # of 66 * 9 sequences some come by chance, of all that are drawn few
    assert len(set(seen)) > 0.6 * len(seen)
    assert data.description() == other.description()
    first, again = (next(iter(copying().train_dataloader())) for _ in range(2))
    assert torch.equal(first["x"], again["x"])
    assert not torch.equal(first["x"][:8], data.judged["validation"].batch(np.arange(8))["x"])


def test_processes_read_different_sequences():
    data = copying()
    data.setup()

    class Place:
        global_step, accumulate_grad_batches, world_size, global_rank = 3, 2, 2, 0

    alone = [batch["x"] for batch in itertools.islice(data.train_dataloader(), 16)]
    for rank in (0, 1):
        data.trainer = Place()
        data.trainer.global_rank = rank
        found = [batch["x"] for batch in itertools.islice(data.train_dataloader(), 2)]
        # three updates of two batches, of both processes, are behind
        assert torch.equal(found[0], alone[12 + rank])
        assert torch.equal(found[1], alone[14 + rank])


def test_it_learns_the_rule(quiet_trainer):
    data, module = copying(batch_size=32), build(d_model=32, n_layers=2)
    fit = quiet_trainer(250)
    fit.fit(module, datamodule=data)
    judged = module.judge(data.val_dataloader())
    assert judged["accuracy"] == pytest.approx(float(fit.callback_metrics["validation_accuracy"]))
    assert judged["examples"] == 40
    assert judged["accuracy"] > data.baselines()["most frequent label"] + 0.3


def test_it_scores_the_tokens_that_are_asked_for():
    data, module = copying(), build()
    data.setup()
    batch = data.judged["test"].batch(np.arange(30))
    logits, _ = module.model.eval()(batch["x"])
    asked = batch["labels"] != IGNORED
    assert asked.sum() == 60
    right = (logits.argmax(-1) == batch["labels"])[asked]
    found = module.judge(data.test_dataloader())
    assert found["accuracy"] == pytest.approx(float(right.double().mean()))
    expected = torch.nn.functional.cross_entropy(logits[asked], batch["labels"][asked])
    assert found["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert module.loss(batch).item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_baselines_are_counted():
    data = Diagnostic("parity", {"length": 16}, validation_examples=200, test_examples=200)
    data.setup()
    found = data.baselines()
    assert found["chance"] == 0.5
    asked = data.asked("test")
    # of labels of the test, as longer sequences may have more of them
    uneven = Diagnostic("selective-copying", {"length": 9}, {"n_symbols": 3}, 50, 50)
    uneven.setup()
    assert uneven.baselines()["chance"] == pytest.approx(1 / 3)
    assert found["most frequent label"] in ((asked == 0).mean(), (asked == 1).mean())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "selective-coping"}, "did you mean selective-copying"),
        ({"options": {"lenght": 3}}, "no option 'lenght'; did you mean length"),
        ({"name": "mqar", "options": {"length": 8}}, "mqar needs n_pairs, vocab_size"),
        ({"options": {"length": 2}}, "length must be at least n_tokens = 4, got 2"),
        ({"test_options": {"length": 2}}, "length must be at least n_tokens = 4, got 2"),
        ({"name": "mad-compression", "options": {}}, "answers that its tokens do not have a place for"),
        ({"options": {"length": 8.0}}, "selective-copying takes length as int, got 8.0"),
        ({"options": {"length": "8"}}, "selective-copying takes length as int, got '8'"),
        ({"options": {"length": True}}, "selective-copying takes length as int, got True"),
        ({"options": {"length": None}}, "selective-copying takes length as int, got None"),
        ({"name": "group-words", "options": {"length": 8, "group": 5}}, "takes group as str, got 5"),
        ({"options": {"length": 8, "batch_size": 3}}, "no option 'batch_size'"),
        ({"options": {"length": 8}, "test_options": {"seed": 3}}, "no option 'seed'"),
        (
            {"name": "mqar", "options": {"length": 8, "n_pairs": 1, "vocab_size": 8, "power": float("nan")}},
            "power must be a finite number, got nan",
        ),
        ({"test_examples": 0}, "test_examples must be a positive integer, got 0"),
        ({"batch_size": 0}, "batch_size must be a positive integer, got 0"),
    ],
)
def test_bad_options(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        Diagnostic(**arguments).setup()


def test_a_model_that_does_not_fit_is_refused():
    data = copying()
    data.setup()
    with pytest.raises(ValueError, match=r"needs model.config.vocab_size of at least 5, got 4"):
        build(vocab_size=4).check_data(data)
    with pytest.raises(ValueError, match="max_positions must be at least the longest sequence, 26, got 20"):
        build(max_positions=20, pattern="attention").check_data(data)
    build(vocab_size=64).check_data(data)


class TestCommand:
    OPTIONS = """
        --config task/parity-lite --config model/min_gru --model.config.d_model 16 --model.config.n_layers 1
        --data.validation_examples 20 --data.test_examples 30 --trainer.max_steps 12 --trainer.val_check_interval 4
        --trainer.log_every_n_steps 3 --checkpoint_steps 5
    """

    def train(self, runs, *more: str) -> int:
        return main(["train", *self.OPTIONS.split(), "--runs", str(runs), *more])

    def test_a_run_is_judged_at_the_test_length(self, tmp_path, capsys):
        assert self.train(tmp_path) == 0
        (run,) = tmp_path.iterdir()
        shown = " ".join(capsys.readouterr().out.split())
        assert "parity (length 24; test: length 96): new sequences to train on, 20 to validate, 30 to test" in shown
        report = json.loads((run / "report.json").read_text())
        assert (report["test_examples"], report["steps"]) == (30 * 96, 12)
        assert isinstance(from_pretrained(run / "model"), LanguageModel)
        assert main(["eval", str(run)]) == 0
        printed = capsys.readouterr().out
        found = json.loads((run / "evaluation.json").read_text())
        assert found["accuracy"] == pytest.approx(report["test_accuracy"])
        assert "| position | examples | accuracy, % |" in printed
        assert sum(row["examples"] for row in found["groups"]["position"]) == 30 * 96
        assert 0 < found["standard_error"] < 0.05
        assert (run / "accuracy.png").read_bytes().startswith(b"\x89PNG")
        assert main(["eval", str(run), "--limit", "7"]) == 0
        assert json.loads((run / "evaluation.json").read_text())["examples"] == 7
        assert main(["eval", str(run), "--limit", "0"]) == 1
        assert "--limit must be at least 1" in capsys.readouterr().err

    def test_a_stopped_run_goes_on_to_the_same_bits(self, tmp_path, interrupted):
        assert self.train(tmp_path / "whole") == 0
        with interrupted(7):
            self.train(tmp_path / "stopped")
        (whole,), (stopped,) = ((tmp_path / name).iterdir() for name in ("whole", "stopped"))
        assert main(["train", "--resume", str(stopped)]) == 0
        assert (whole / "model/model.safetensors").read_bytes() == (stopped / "model/model.safetensors").read_bytes()

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (["--data.options.lenght", "3"], "no option 'lenght'; did you mean length?"),
            (["--data.name", "parityy"], "there is no diagnostic 'parityy'; did you mean parity?"),
            (["--data.options.length", "0"], "length must be positive, got 0"),
            (["--model.config.vocab_size", "1"], "parity needs model.config.vocab_size of at least 2, got 1"),
            (["--config", "task/mqar-lite", "--model.config.vocab_size", "8"], "vocab_size of at least 64, got 8"),
        ],
    )
    def test_what_does_not_fit_is_one_message(self, options, words, tmp_path, capsys):
        assert self.train(tmp_path / "runs", *options) == 2
        assert words in " ".join(capsys.readouterr().err.split())
        assert not (tmp_path / "runs").exists()

    @pytest.mark.parametrize(
        ("model", "kind"),
        [
            ("seqzoo.train.modules.LanguageModeling", "LanguageData"),
            ("seqzoo.train.classification.ClassificationModule", "ClassificationData"),
        ],
    )
    def test_a_module_for_other_data_is_refused(self, model, kind, tmp_path, capsys):
        own = tmp_path / "own.yaml"
        config = "{n_classes: 2, vocab_size: 2}" if kind == "ClassificationData" else "{vocab_size: 2}"
        init = f"{{config: {config}}}"
        own.write_text(
            f"model: {{class_path: {model}, init_args: {init}}}\n"
            "data: {class_path: seqzoo.train.data.Diagnostic, init_args: {name: parity, options: {length: 8}}}\n"
        )
        assert main(["train", "--config", str(own), "--config", "model/min_gru", "--runs", str(tmp_path / "runs")]) == 2
        assert f"takes data of the kind {kind}, got Diagnostic" in " ".join(capsys.readouterr().err.split())
