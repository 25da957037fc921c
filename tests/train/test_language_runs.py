"""Runs on language corpora from the command line: training, report, resumption, and what reads the run after it."""

from __future__ import annotations

import io
import json
import math
import os
import re
import signal
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from seqzoo.cli import main as seqzoo
from seqzoo.eval.run_data import data_of
from seqzoo.hub import from_pretrained, save_pretrained
from seqzoo.models import LanguageModel, ModelConfig
from seqzoo.models.tokenizer import load_tokenizer, nucleotides, tokenizer_of
from seqzoo.train.checkpoints import read_checkpoint, write_checkpoint
from seqzoo.train.command import main
from seqzoo.train.configuration import load, shipped
from seqzoo.train.data.language import LanguageData
from seqzoo.train.metrics_table import read_metrics
from seqzoo.train.modules import LanguageModeling

CORPORA = ("wikitext-103", "enwik8", "text8", "pg19", "fineweb-edu", "genome")
OPTIONS = """
    --data.validation_fraction 0.25 --data.context 16 --data.batch_size 4
    --data.validation_streams 4 --model.config.d_model 16 --model.config.n_layers 1 --model.config.vocab_size 304
    --model.warmup_steps 6 --model.lr 0.02 --model.sample_length 20 --trainer.val_check_interval 4
    --trainer.limit_val_batches 4 --trainer.log_every_n_steps 2 --trainer.max_steps 8
"""


@pytest.fixture(scope="module")
def bpe(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer that was trained on the corpus."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    inner.train([str(path) for path in sorted(corpus.rglob("*.py"))], trainer)
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    inner.save(str(path))
    return path


@pytest.fixture(scope="module")
def options(corpus: Path, bpe: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    configuration = tmp_path_factory.mktemp("configuration") / "corpus.yaml"
    configuration.write_text("data:\n  class_path: seqzoo.train.data.Corpus\n  init_args: {}\n")
    words = OPTIONS.split()
    cache = ["--data.cache", str(tmp_path_factory.mktemp("cache"))]
    files = ["--data.files", json.dumps([str(corpus / "**/*.py")])]
    return ["--config", str(configuration), *words, *cache, *files, "--data.tokenizer", str(bpe)]


@pytest.fixture(scope="module")
def run(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    with redirect_stdout(io.StringIO()) as printed:
        assert main([*options, "--runs", str(runs)]) == 0
    (run,) = runs.iterdir()
    (run / "printed.txt").write_text(printed.getvalue(), encoding="utf-8")
    return run


def test_a_run_is_judged_on_what_it_held_out(run, capsys):
    asked = ["eval", str(run), "--contexts", "16", "--tokens", "500"]
    assert seqzoo([*asked, "--output", str(run / "held")]) == 0
    found = json.loads((run / "held" / "evaluation.json").read_text())
    assert found["tokens"] == 500
    assert found["bytes"] > 600
    assert seqzoo([*asked, "--side", "test"]) == 1
    assert "no test side, they have training, validation" in capsys.readouterr().err


def test_a_run_leaves_its_tokenizer_and_tells_bits_of_bytes(run, bpe):
    tokenizer = tokenizer_of(run / "model", from_pretrained(run / "model").config.vocab_size)
    assert tokenizer.digest() == load_tokenizer(bpe).digest()
    report = json.loads((run / "report.json").read_text())
    facts = json.loads((run / "environment.json").read_text())["data"]
    size = facts["validation_bytes"] / facts["validation_tokens"]
    assert size > 1.5
    bits = report["validation_bits_per_byte"]
    assert report["validation_perplexity"] == pytest.approx(2 ** (bits * size))
    assert bits < report["baselines_bits_per_byte"]["uniform"] == pytest.approx(math.log2(300) / size)
    assert bits > report["baselines_bits_per_byte"]["gzip -9"] / 4
    rows = [row for row in read_metrics(run / "metrics.csv") if row["validation_bpb"] is not None]
    assert rows
    for row in rows:
        assert row["validation_perplexity"] == pytest.approx(2 ** (row["validation_bpb"] * size))
    training = facts["training_bytes"] / facts["training_tokens"]
    for row in read_metrics(run / "metrics.csv"):
        if row["train_loss"] is not None:
            assert row["train_bpb"] == pytest.approx(row["train_loss"] / math.log(2) / training)
    assert (run / "sample.txt").read_text().startswith("def ")


def test_its_lines_tell_bits_of_bytes_and_perplexity_of_tokens(run):
    printed = " ".join((run / "printed.txt").read_text(encoding="utf-8").split())
    (found,) = re.findall(r"loss ([\d.]+) \(([\d.]+) bpb, perplexity ([\d.]+)\).*? [\d.]+ k?tokens/s", printed)[-1:]
    loss, bits, perplexity = map(float, found)
    assert perplexity == pytest.approx(math.exp(loss), rel=2e-3)
    assert bits == pytest.approx(loss / math.log(2) / _token_size(run, "training"), abs=1e-3)
    (bits, perplexity) = map(float, re.findall(r"validation ([\d.]+) bits per byte, perplexity ([\d.]+)", printed)[-1])
    (*_, row) = (row for row in read_metrics(run / "metrics.csv") if row["validation_bpb"] is not None)
    assert (bits, perplexity) == pytest.approx((row["validation_bpb"], row["validation_perplexity"]), rel=1e-3)


def test_the_report_judges_the_test_texts_of_weights_that_validation_chose(options, corpus, tmp_path, capsys):
    held = sorted(corpus.rglob("*.py"))[:3]
    assert main([*options, "--runs", str(tmp_path), "--data.test_files", json.dumps(list(map(str, held)))]) == 0
    (run,) = tmp_path.iterdir()
    report = json.loads((run / "report.json").read_text())
    assert report["test_perplexity"] == pytest.approx(2 ** (report["test_bits_per_byte"] * _token_size(run, "test")))
    assert report["test_bits_per_byte"] != report["validation_bits_per_byte"]
    assert f"of test {report['test_bits_per_byte']:.3f} bits per byte" in " ".join(capsys.readouterr().out.split())
    asked = ["eval", str(run), "--side", "test", "--contexts", "16", "--tokens", "100000", "--output", str(run / "e")]
    assert seqzoo(asked) == 0
    windows = json.loads((run / "e" / "evaluation.json").read_text())
    # of windows without what came before, so a little worse
    found = min(windows["bits_per_byte"].values())
    assert found == pytest.approx(report["test_bits_per_byte"], rel=0.1)


def _token_size(run: Path, side: str) -> float:
    data = data_of(run, LanguageData, "")
    return data.side(side).bytes_per_token


def test_it_generates_with_its_tokenizer(run, bpe, capsys):
    options = ["generate", "--checkpoint", str(run), "--prompt", "def ", "--max-new-tokens", "12", "--seed", "3"]
    assert seqzoo(options) == 0
    text = capsys.readouterr().out
    assert text.startswith("def ")
    assert seqzoo([*options, "--tokenizer", str(bpe)]) == 0
    assert capsys.readouterr().out == text


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch):
    """Trains up to a step and is then stopped, as by Control-C; returns the run's folder."""
    begin = LanguageModeling.on_train_batch_start

    def train(options: list[str], runs: Path, step: int) -> Path:
        def stopping(module: LanguageModeling, batch: Any, batch_idx: int) -> None:
            if module.trainer.global_step == step:
                os.kill(os.getpid(), signal.SIGINT)
            begin(module, batch, batch_idx)

        with monkeypatch.context() as patched:
            patched.setattr(LanguageModeling, "on_train_batch_start", stopping)
            assert main([*options, "--runs", str(runs)]) == 130
        return next(runs.iterdir())

    return train


def test_it_resumes_and_refuses_another_tokenizer(options, tmp_path, run, interrupted, capsys):
    other = interrupted(options, tmp_path, 5)
    assert (other / "model/tokenizer.json").is_file()
    last = other / "checkpoints/last.safetensors"
    state = read_checkpoint(last)
    write_checkpoint({**state, "tokenizer": "0" * 32}, last)
    assert main(["--resume", str(other)]) == 1
    assert "trained with another tokenizer, of fingerprint 0000" in " ".join(capsys.readouterr().err.split())
    write_checkpoint(state, last)
    assert main(["--resume", str(other)]) == 0
    assert (run / "model/model.safetensors").read_bytes() == (other / "model/model.safetensors").read_bytes()


def test_a_stream_that_is_not_kept_resumes_to_the_same_bits(
    options, interrupted, tmp_path, corpus, monkeypatch, capsys
):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    # so that the place moves in every step
    monkeypatch.setattr("seqzoo.train.data.streams.PART", 256)
    data = tmp_path / "data"
    data.mkdir()
    with (data / "train.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": path.read_text()}) + "\n" for path in sorted(corpus.rglob("*.py")))
    place = options.index("--data.files")
    streamed = [*options[:place], *options[place + 2 :], "--data.dataset", str(data), "--data.streaming", "true"]
    whole = tmp_path / "whole"
    assert main([*streamed, "--runs", str(whole)]) == 0
    assert "a stream to train on" in capsys.readouterr().out
    other = interrupted(streamed, tmp_path / "broken", 5)
    position = read_checkpoint(other / "checkpoints/last.safetensors")["Corpus"]["position"]
    assert position["number"] == 6
    assert position["place"] is not None
    assert main(["--resume", str(other)]) == 0
    one, two = (path / "model/model.safetensors" for path in (next(whole.iterdir()), other))
    assert one.read_bytes() == two.read_bytes()


def test_the_vocabulary_has_to_hold_the_tokens(options, bpe, capsys):
    assert main([*options, "--model.config.vocab_size", "299"]) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert f"the tokens of tokenizer '{bpe}' need model.config.vocab_size of at least 300, got 299" in message


def test_saving_replaces_a_tokenizer_by_another_alone(tmp_path):
    model = LanguageModel(ModelConfig(vocab_size=70, d_model=16, n_layers=1, pattern="min_gru"))
    for k in (1, 2):
        save_pretrained(model, tmp_path / "model", tokenizer=nucleotides(k))
        assert load_tokenizer(tmp_path / "model").digest() == nucleotides(k).digest()
    with pytest.raises(FileExistsError, match=r"holds tokenizer\.json"):
        save_pretrained(model, tmp_path / "model")


@pytest.mark.parametrize("name", CORPORA)
def test_shipped_corpora_say_what_they_need(name, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("SEQZOO_CACHE", str(tmp_path))
    assert main(["--config", f"task/{name}"]) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "download" in message
    comment = shipped()[f"task/{name}"].read_text().partition("model:")[0]
    assert "\n# Needs " in comment
    values = load(f"task/{name}")
    source = values["data"]["init_args"].get("dataset") or values["data"]["init_args"]["files"][0]
    assert source in message or "openai-community/gpt2" in message


def test_sizes_of_shipped_vocabularies():
    assert load("task/genome")["model"]["init_args"]["config"]["vocab_size"] == nucleotides().vocab_size
    assert nucleotides(6).vocab_size == 4102
