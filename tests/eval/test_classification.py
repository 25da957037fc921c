"""Accuracy of classifiers: groups and baselines against counting by hand, the command, folders that do not fit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("lightning")

from seqzoo.cli import main
from seqzoo.eval import classification
from seqzoo.eval.classification import baselines, depths, groups, judge, linear_accuracy, predictions
from seqzoo.hub import save_pretrained
from seqzoo.models import ClassifierConfig, DualEncoder, LanguageModel, ModelConfig, SequenceClassifier
from seqzoo.train.data import GeneratedPathfinder, ListOps, Retrieval, listops
from seqzoo.train.data.listops import TOKENS
from seqzoo.train.data.ragged import Ragged

LAW = {"above": 5, "below": 40, "max_depth": 4, "max_args": 4}
COUNTS = {"training_examples": 300, "validation_examples": 10, "test_examples": 70}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv("SEQZOO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def trees(**options) -> ListOps:
    data = ListOps(**{**LAW, **COUNTS, "batch_size": 8, **options})
    data.setup()
    return data


def classifier(kind=SequenceClassifier, **options):
    torch.manual_seed(0)
    values = {"n_classes": 10, "vocab_size": 15, "d_model": 16, "n_layers": 1, "pattern": "min_gru", **options}
    return kind(ClassifierConfig(**values)).eval()


def tokens(words: str) -> np.ndarray:
    return np.array([TOKENS.index(word) for word in words.split()], dtype=np.uint8)


class TestGroups:
    def test_depths(self):
        given = ["3", "[MAX 1 2 ]", "[SM [MIN 1 2 ] 3 [MED 4 [MAX 1 1 ] ] ]", "[MIN [MIN 1 1 ] 2 ]"]
        ragged = Ragged.join([tokens(one) for one in given], [0] * len(given))
        assert depths(ragged).tolist() == [1, 2, 4, 3]

    def test_they_divide_the_examples(self):
        data = trees()
        for count in (70, 31):
            found = groups(data, count)
            assert set(found) == {"length", "depth", "root operator"}
            for of in found.values():
                assert sorted(index for indices in of.values() for index in indices.tolist()) == list(range(count))
        ragged = data.examples("test").data
        lengths = np.diff(ragged.bounds)
        for name, indices in groups(data, 70)["length"].items():
            low, _, high = name.partition(" to ")
            assert (lengths[indices].min(), lengths[indices].max()) == (int(low), int(high or low))
        for name, indices in groups(data, 70)["root operator"].items():
            assert {int(ragged.tokens[ragged.bounds[one]]) for one in indices} == {TOKENS.index(name)}

    def test_sequences_of_one_length_have_none(self, tmp_path: Path):
        images = GeneratedPathfinder(
            contour_length=6, training_examples=20, validation_examples=4, test_examples=4, cache=str(tmp_path)
        )
        images.setup()
        assert groups(images, 4) == {}


class TestJudging:
    def test_accuracies_are_counted_one_by_one(self):
        data, model = trees(), classifier()
        ragged, labels = data.examples("test").data, data.examples("test").labels
        by_hand = []
        for index in range(70):
            ids = torch.from_numpy(ragged.tokens[ragged.bounds[index] : ragged.bounds[index + 1]].astype(np.int64))
            with torch.no_grad():
                by_hand.append(int(model(ids[None]).argmax()))
        assert predictions(model, data).tolist() == by_hand
        right = np.array(by_hand) == labels
        found = judge(model, data)
        assert found["accuracy"] == pytest.approx(right.mean())
        assert found["standard_error"] == pytest.approx(np.sqrt(right.mean() * (1 - right.mean()) / 70))
        for kind, of in groups(data, 70).items():
            for row, indices in zip(found["groups"][kind], of.values(), strict=True):
                assert row["accuracy"] == pytest.approx(right[indices].mean())
                most = np.unique(labels[indices], return_counts=True)[1].max() / len(indices)
                assert row["most frequent class"] == pytest.approx(most)
        few = judge(model, data, limit=20)
        assert few["examples"] == 20
        assert few["accuracy"] == pytest.approx(right[:20].mean())
        assert few["baselines_accuracy"] == found["baselines_accuracy"]

    def test_bad_input(self):
        with pytest.raises(ValueError, match="--limit must be at least 1, got 0"):
            judge(classifier(), trees(), limit=0)
        with pytest.raises(ValueError, match="have 10 classes, the model tells 3 apart"):
            judge(classifier(n_classes=3), trees())


class TestBaselines:
    def test_the_oracle_is_that_of_the_law_at_hand(self):
        data = trees()
        found = baselines(data)
        oracle = listops.depth_oracle(data.examples("training").data, data.examples("test").data, 4)
        assert [f"{k} levels" in found for k in range(5)] == [True] * 4 + [False]
        for name in ("0 levels", "1 levels", "2 levels", "3 levels"):
            assert found[name] == oracle[name]
        assert found["3 levels"] == 1.0
        other = baselines(trees(max_depth=3, above=2))
        assert "3 levels" not in other
        assert other["1 levels"] != found["1 levels"]

    def test_they_are_found_once(self, monkeypatch, cache: Path):
        found = baselines(trees())
        calls = []
        monkeypatch.setattr(classification, "linear_accuracy", lambda data: calls.append(data) or 0.5)
        assert baselines(trees()) == found
        assert not calls
        (kept,) = (cache / "baselines").iterdir()
        kept.write_text(kept.read_text()[:40])
        assert baselines(trees())["linear on counts of tokens"] == 0.5
        assert baselines(trees(data_seed=1))["linear on counts of tokens"] == 0.5
        assert len(calls) == 2

    def test_a_linear_classifier_finds_what_counts_tell_and_nothing_else(self, monkeypatch):
        random = np.random.default_rng(0)
        data = trees()

        def given(label):
            rows = [random.integers(0, 10, 12).astype(np.uint8) for _ in range(400)]
            return Ragged.join(rows, [label(row) for row in rows])

        for label, low, high in (
            (lambda row: int((row == 3).sum() > 1), 0.95, 1.0),
            (lambda row: row[0] < 5, 0.0, 0.7),
        ):
            for split in ("training", "test"):
                data.splits[split] = type(data.splits[split])(given(label), 40)
            assert low <= linear_accuracy(data) <= high

    def test_pairs_and_numbers(self, tmp_path: Path):
        rows = [(str(i % 2), "x", "y", "ab" * 4, ("ab" if i % 2 else "cd") * (1 + i % 3)) for i in range(40)]
        for split in ("train", "eval", "test"):
            (tmp_path / f"new_aan_pairs.{split}.tsv").write_text("\n".join("\t".join(row) for row in rows) + "\n")
        pairs = Retrieval(str(tmp_path), longest=16)
        pairs.setup()
        assert linear_accuracy(pairs) == 1.0
        found = judge(classifier(DualEncoder, n_classes=2, vocab_size=256), pairs)
        assert found["examples"] == 40
        images = GeneratedPathfinder(
            contour_length=6, training_examples=30, validation_examples=4, test_examples=20, cache=str(tmp_path)
        )
        images.setup()
        assert 0 <= linear_accuracy(images) <= 1


class TestCommand:
    @pytest.fixture
    def run(self, tmp_path: Path) -> Path:
        run = tmp_path / "run"
        save_pretrained(classifier(), run / "model")
        options = "".join(f"    {name}: {value}\n" for name, value in {**LAW, **COUNTS}.items())
        (run / "config.yaml").write_text(f"data:\n  class_path: seqzoo.train.data.lra.ListOps\n  init_args:\n{options}")
        return run

    def test_a_run(self, run: Path, capsys):
        assert main(["eval", str(run)]) == 0
        printed = capsys.readouterr().out
        found = json.loads((run / "evaluation.json").read_text())
        assert (run / "evaluation.md").read_text() == printed
        assert f"| **this model**, 70 test examples | {100 * found['accuracy']:.2f} ±" in printed
        for words in ("root operator only", "oracle: one level", "oracle: 3 levels | 100.00", "| length | examples |"):
            assert words in printed
        values = [float(line.split("|")[2].split("±")[0]) for line in printed.splitlines()[2:10]]
        assert values == sorted(values, reverse=True)
        assert (run / "accuracy.png").read_bytes().startswith(b"\x89PNG")

    @pytest.mark.parametrize(
        ("old", "new", "words"),
        [
            ("data:\n", "data: [", "is damaged"),
            ("data:\n", "other:\n", "has no section data"),
            ("seqzoo.train.data.lra.ListOps", "os.system", "trained on 'os.system', not on ClassificationData"),
            ("seqzoo.train.data.lra.ListOps", "seqzoo.train.data.lra.Gone", "'seqzoo.train.data.lra.Gone'"),
            ("seqzoo.train.data.lra.ListOps", "seqzoo.nothing.X", "'seqzoo.nothing.X'"),
            ("max_args: 4", "arguments: 4", "is of another version: ListOps does not take its options"),
            ("max_args: 4", "folder: /nowhere", "there is no file /nowhere/basic_train.tsv"),
            ("max_depth: 4", "max_depth: 99", "max_depth must be from 1 to"),
        ],
    )
    def test_a_configuration_that_does_not_fit(self, run: Path, capsys, old, new, words):
        path = run / "config.yaml"
        path.write_text(path.read_text().replace(old, new))
        assert main(["eval", str(run)]) == 1
        assert words in capsys.readouterr().err

    def test_folders_that_are_no_run(self, run: Path, tmp_path: Path, capsys):
        model = LanguageModel(ModelConfig(vocab_size=9, d_model=16, n_layers=1, pattern="min_gru"))
        save_pretrained(model, tmp_path / "language")
        (run / "config.yaml").unlink()
        for arguments, words in (
            ([str(run)], "has no config.yaml"),
            ([str(tmp_path / "nothing")], "no folder"),
            ([str(tmp_path)], "holds a checkpoint"),
            ([str(run), str(run)], "one run is judged at a time, got 2"),
        ):
            assert main(["eval", *arguments]) == 1
            assert words in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("name", "change", "words"),
        [
            ("model.safetensors", lambda data: data[:-50], "model.safetensors"),
            ("model.safetensors", lambda data: b"", "model.safetensors"),
            ("config.json", lambda data: data[:30], "config.json"),
            ("config.json", lambda data: data.replace(b"sequence_classifier", b"sequence_writer"), "sequence_writer"),
            ("config.json", lambda data: data.replace(b'"d_model": 16', b'"d_model": 32'), "embedding.weight"),
            ("config.json", lambda data: data.replace(b'"format": ', b'"format": 99'), "format"),
        ],
    )
    def test_a_damaged_checkpoint(self, run: Path, capsys, name, change, words):
        path = run / "model" / name
        path.write_bytes(change(path.read_bytes()))
        assert main(["eval", str(run)]) == 1
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1
