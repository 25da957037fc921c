"""Every shipped task with every shipped model, a step of training at a toy's size."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from seqzoo.train.configuration import combine, load, shipped
from seqzoo.train.options import TrainingCLI
from seqzoo.train.training import check_data

pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")

TASKS = [name for name in shipped() if name.startswith("task/")]
MODELS = [name for name in shipped() if name.startswith("model/")]
# of those that the others are with in the fast part
SOME_TASKS, SOME_MODELS = ("task/stdlib", "task/listops-lite"), ("model/min_gru",)
FAMILIES = {
    "s4", "s4d", "s5", "lru", "dss", "mamba", "mamba2", "min_gru", "min_lstm", "linear_attention", "gla", "deltanet",
    "gated_deltanet", "mlstm", "attention", "rglru", "hgrn2", "retnet", "hybrid",
}  # fmt: skip
FEW = {"training_examples": 8, "validation_examples": 4, "test_examples": 4}
TOY = {
    "FolderBytes": {"validation_fraction": 0.25, "context": 16, "batch_size": 2, "validation_streams": 2},
    "FolderDocuments": {"validation_fraction": 0.25, "context": 16, "tokens": 48, "validation_streams": 2},
    "ListOps": {"above": 3, "below": 12, "max_depth": 2, "max_args": 9, "batch_size": 2, **FEW},
    "GeneratedPathfinder": {"size": 32, "contour_length": 6, "batch_size": 2, **FEW},
    "Text": {"longest": 12, "batch_size": 2},
    "Retrieval": {"longest": 12, "batch_size": 2},
    "GreyImage": {"batch_size": 2},
    # with options by the name of the diagnostic
    "Diagnostic": {"validation_examples": 2, "test_examples": 2, "batch_size": 2},
    # files of the test's in place of every source
    "Corpus": {
        **dict.fromkeys(("dataset", "subset", "validation_split", "test_split", "revision", "sizes", "max_tokens")),
        **dict.fromkeys(("validation_files", "test_files")),
        **dict.fromkeys(("joined", "streaming", "reverse_complement"), False),
        "tokenizer": "bytes",
        "validation_fraction": 0.25,
        "context": 16,
        "batch_size": 2,
        "validation_streams": 2,
    },
}

SHORT = {
    "mqar": {"length": 16, "n_pairs": 2, "vocab_size": 16},
    "selective-copying": {"length": 12, "n_tokens": 2},
    "induction-heads": {"length": 12},
    "parity": {"length": 12},
    "group-words": {"length": 6},
}


@pytest.fixture(scope="module")
def stands(tmp_path_factory, corpus):
    """Folders with what stands for the corpora of every kind of data."""
    root = tmp_path_factory.mktemp("stands")
    for side in ("train", "test"):
        for number in range(40):
            path = root / "Text" / side / ("pos" if number % 2 else "neg") / f"{number}_7.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"a film, number {number}")
    (root / "Retrieval").mkdir()
    for split in ("train", "eval", "test"):
        lines = [f"{number % 2}\t0\t0\tan article {number}\tanother" for number in range(8)]
        (root / "Retrieval" / f"new_aan_pairs.{split}.tsv").write_text("\n".join(lines) + "\n")
    (root / "GreyImage").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (20, 3 * 32 * 32), dtype=np.uint8)
    rows = b"".join(bytes([number % 10]) + row.tobytes() for number, row in enumerate(pixels))
    for name in ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"):
        (root / "GreyImage" / f"{name}.bin").write_bytes(rows)
    for name in ("FolderBytes", "FolderDocuments"):
        (root / name).symlink_to(corpus)
    return root


def cases():
    for task in TASKS:
        for model in MODELS:
            fast = task in SOME_TASKS or model in SOME_MODELS
            yield pytest.param(task, model, marks=[] if fast else [pytest.mark.slow])


def test_there_is_a_model_of_every_family():
    assert {f"model/{name}" for name in FAMILIES} <= set(MODELS)
    pattern = load("model/hybrid")["model"]["init_args"]["config"]["pattern"]
    assert sorted(pattern) == ["attention"] + 7 * ["mamba2"]


@pytest.mark.parametrize(("task", "model"), list(cases()))
def test_they_train_together(task, model, stands, quiet_trainer):
    data = load(task)["data"]["class_path"].rpartition(".")[2]
    assert data in TOY, "a new kind of data needs a toy"
    folder = stands / data
    place = {"folder": folder} if folder.exists() else {"cache": stands / "cache"}
    if data == "Diagnostic":
        name = load(task)["data"]["init_args"]["name"]
        place = {f"options.{option}": value for option, value in SHORT[name].items()}
    if data == "Corpus":
        place["files"] = json.dumps([str(stands / "FolderBytes" / "**/*.py")])
    pattern = load(model)["model"]["init_args"]["config"]["pattern"]
    options = {f"data.{name}": value for name, value in {**TOY[data], **place}.items()}
    if data == "Corpus":
        options["model.config.vocab_size"] = 256
    # a first step of 50000 of warm-up is below what float32 adds to 1
    options |= {"model.warmup_steps": 0, "model.config.d_model": 16}
    options |= {"model.config.n_layers": len(pattern) if isinstance(pattern, list) else 1}
    words = [word for name, value in options.items() for word in (f"--{name}", "null" if value is None else str(value))]
    cli = TrainingCLI(combine([task, model]), words)
    check_data(cli)
    before = {name: parameter.detach().clone() for name, parameter in cli.model.named_parameters()}
    fit = quiet_trainer(1, limit_val_batches=1)
    fit.fit(cli.model, datamodule=cli.datamodule)
    assert fit.global_step == 1
    assert all(torch.isfinite(value) for value in fit.callback_metrics.values())
    assert fit.callback_metrics
    still = [name for name, parameter in cli.model.named_parameters() if torch.equal(parameter, before[name])]
    # what has no gradient in one step: rows of nothing else than zeros, or a bias before a norm
    assert len(still) < len(before) / 3, still
