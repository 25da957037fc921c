"""The module of classification with the data of Long Range Arena: what it learns, counts, resumes and refuses."""

from __future__ import annotations

import itertools

import lightning.pytorch as lightning
import pytest
import torch

from seqzoo.models import ClassifierConfig, DualEncoder, SequenceClassifier
from seqzoo.train.classification import ClassificationModule
from seqzoo.train.data import GeneratedPathfinder, ListOps, Retrieval
from seqzoo.train.data.examples import EvaluationBatches
from seqzoo.train.finite import NonFiniteLoss

# Lightning's own use of torch
pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")
SHORT = {"above": 3, "below": 12, "max_depth": 2, "max_args": 9}


def listops(folder, **options) -> ListOps:
    counts = {"training_examples": 400, "validation_examples": 50, "test_examples": 50}
    return ListOps(**{"cache": str(folder), "batch_size": 16, **SHORT, **counts, **options})


def build(**options) -> ClassificationModule:
    torch.manual_seed(0)
    module = {name: options.pop(name) for name in ("pairs", "lr", "warmup_steps", "seed") if name in options}
    values = {"d_model": 16, "n_layers": 1, "pattern": "s4d", "n_classes": 10, "vocab_size": 15, "bidirectional": True}
    return ClassificationModule(ClassifierConfig(**values | options), **{"lr": 0.01, "warmup_steps": 10} | module)


def test_it_learns_and_counts_every_validation_example(tmp_path, quiet_trainer):
    data, module = listops(tmp_path), build(dropout=0.1)
    fit = quiet_trainer(150)
    fit.fit(module, datamodule=data)
    judged = module.judge(EvaluationBatches(data.examples("validation"), batch_size=7))
    assert judged["examples"] == 50
    assert judged["accuracy"] == pytest.approx(float(fit.callback_metrics["validation_accuracy"]))
    assert judged["loss"] == pytest.approx(float(fit.callback_metrics["validation_loss"]), rel=1e-5)
    training = module.judge(EvaluationBatches(data.examples("training"), batch_size=64))
    baselines = data.baselines()
    assert training["accuracy"] > max(baselines["chance"], baselines["most frequent class"]) + 0.1
    # on the test examples, by hand
    right = 0
    with torch.inference_mode():
        for row in range(50):
            batch = data.examples("test").batch(torch.tensor([row]).numpy())
            right += int(module.model.eval()(batch["x"]).argmax() == batch["labels"])
    fit.test(module, datamodule=data, verbose=False)
    assert float(fit.callback_metrics["test_accuracy"]) == pytest.approx(right / 50)


def test_it_resumes_to_the_same_bits(tmp_path, quiet_trainer):
    whole = build(dropout=0.1)
    quiet_trainer(8).fit(whole, datamodule=listops(tmp_path))
    first = build(dropout=0.1)
    half = quiet_trainer(8)
    stop = lightning.Callback()
    stop.on_train_batch_end = lambda trainer, *rest: (
        trainer.save_checkpoint(tmp_path / "half.ckpt") if trainer.global_step == 5 else None
    )
    half.callbacks.append(stop)
    half.fit(first, datamodule=listops(tmp_path))
    again = build(dropout=0.1)
    resumed = quiet_trainer(8)
    resumed.fit(again, datamodule=listops(tmp_path), ckpt_path=str(tmp_path / "half.ckpt"), weights_only=True)
    assert resumed.global_step == 8
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name


def test_padding_changes_no_score(tmp_path):
    data, module = listops(tmp_path), build()
    data.setup()
    batch = data.examples("training").batch(torch.arange(6).numpy())
    wide = batch | {"x": torch.nn.functional.pad(batch["x"], (0, 9), value=3)}
    torch.testing.assert_close(module.score(batch), module.score(wide))


def test_pairs_are_a_dual_encoder(tmp_path, quiet_trainer):
    lines = [f"{number % 2}\t0\t0\tabc{number}\t{'x' if number % 2 else 'y'}" for number in range(12)]
    for split in ("train", "eval", "test"):
        (tmp_path / f"new_aan_pairs.{split}.tsv").write_text("\n".join(lines) + "\n")
    data = Retrieval(folder=str(tmp_path), batch_size=4)
    data.setup()
    module = build(pairs=True, n_classes=2, vocab_size=256)
    assert type(module.model) is DualEncoder
    assert type(build().model) is SequenceClassifier
    module.check_data(data)
    before = module.judge(data.test_dataloader())
    quiet_trainer(40).fit(module, datamodule=data)
    after = module.judge(data.test_dataloader())
    assert before["examples"] == after["examples"] == 12
    assert after["accuracy"] == 1.0
    assert after["loss"] < before["loss"]


def test_pixels_are_numbers_or_tokens(tmp_path, quiet_trainer):
    options = {"training_examples": 8, "validation_examples": 4, "test_examples": 4, "contour_length": 6}
    for tokens, kind in ((False, {"vocab_size": None, "n_features": 1}), (True, {"vocab_size": 256})):
        data = GeneratedPathfinder(cache=str(tmp_path), batch_size=4, tokens=tokens, **options)
        data.setup()
        module = build(n_classes=2, **kind)
        module.check_data(data)
        quiet_trainer(2).fit(module, datamodule=data)
        assert module.judge(data.val_dataloader())["examples"] == 4


def test_a_loss_that_is_not_finite_names_the_parameter(tmp_path, quiet_trainer):
    module = build()
    with torch.no_grad():
        module.model.head.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteLoss, match=r"loss of step 1 is nan; the parameter head\.weight is not finite"):
        quiet_trainer(2).fit(module, datamodule=listops(tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_classes": 9}, "the data need model.config.n_classes 10, got 9"),
        ({"vocab_size": 14}, "the data need model.config.vocab_size 15, got 14"),
        ({"vocab_size": None, "n_features": 1}, "the data need model.config.vocab_size 15, got None"),
        ({"max_positions": 8}, "max_positions must be at least the longest sequence, 11, got 8"),
        ({"pairs": True}, "the data are single sequences: model.pairs must be false, got True"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        build(**options).check_data(listops(tmp_path))


def test_room_for_more_tokens_is_accepted(tmp_path):
    build(vocab_size=256).check_data(listops(tmp_path))


@pytest.mark.parametrize(
    ("options", "message"), [({"lr": -1.0}, "lr must be at least 0"), ({"warmup_steps": -1}, "warmup")]
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_s4d_sees_more_of_a_tree_than_its_root(tmp_path, record_property, quiet_trainer):
    """ListOps of lengths 50 to 200 and depth 5: above what the first token alone gives."""
    data = ListOps(cache=str(tmp_path), above=50, below=200, max_depth=5, batch_size=32)
    module = build(d_model=64, n_layers=4, mlp="none", lr=0.01, warmup_steps=200)
    quiet_trainer(2500).fit(module, datamodule=data)
    found = module.judge(itertools.islice(data.test_dataloader(), 30))
    baselines = data.baselines()
    record_property("accuracy", found["accuracy"])
    print(found, baselines)
    assert found["accuracy"] > baselines["0 levels"] + 0.05
