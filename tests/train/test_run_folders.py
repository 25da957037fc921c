"""Folders of runs that are of another version, damaged or none, and released data that are: one message each."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from seqzoo.train.checkpoints import read_checkpoint, write_checkpoint
from seqzoo.train.command import main
from seqzoo.train.data import GreyImage, ListOps, Retrieval, Text
from seqzoo.train.data.listops import read_official


@pytest.fixture
def unfinished(whole, tmp_path: Path) -> Path:
    run = Path(shutil.copytree(whole[0], tmp_path / "run"))
    (run / "report.json").unlink()
    return run


def resumed(run: Path, capsys) -> str:
    """What is said; a traceback would have come through."""
    assert main(["--resume", str(run)]) in (1, 2)
    return " ".join(capsys.readouterr().err.split())


class TestRunsOfAnotherVersion:
    @pytest.mark.parametrize(
        ("old", "new", "words"),
        [
            ("model:\n", "model: [\n", "is not YAML"),
            ("lr: 0.02", "lr: fast", "lr"),
            ("warmup_steps:", "warm_steps:", "there is no option 'model.warm_steps'; did you mean"),
            ("seqzoo.train.modules.LanguageModeling", "seqzoo.train.modules.Gone", "cannot be imported"),
            ("pattern: min_gru", "pattern: min_gro", "there is no mixer 'min_gro'; did you mean"),
        ],
    )
    def test_a_configuration(self, unfinished, capsys, old, new, words):
        path = unfinished / "config.yaml"
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))
        assert words in resumed(unfinished, capsys)

    def test_a_model_of_another_size(self, unfinished, capsys):
        path = unfinished / "config.yaml"
        path.write_text(path.read_text().replace("d_model: 16", "d_model: 32"))
        said = resumed(unfinished, capsys)
        assert "last.safetensors does not fit" in said
        assert "embedding.weight" in said
        assert (unfinished / "metrics.csv").read_text().count("\n") > 5

    @pytest.mark.parametrize("lacking", ["callbacks", "optimizer_states", "loops", "state_dict"])
    def test_a_checkpoint_that_lacks_something(self, unfinished, capsys, lacking):
        for name in ("last", "best"):
            path = unfinished / "checkpoints" / f"{name}.safetensors"
            state = read_checkpoint(path)
            del state[lacking]
            write_checkpoint(state, path)
        said = resumed(unfinished, capsys)
        assert "last.safetensors" in said
        assert lacking in said

    def test_a_report(self, whole, tmp_path, capsys):
        run = Path(shutil.copytree(whole[0], tmp_path / "run"))
        for text, words in (
            ("{", "report.json is damaged"),
            ("[1]", "does not tell steps and score"),
            ('{"steps": 3}', "does not tell steps and score"),
        ):
            (run / "report.json").write_text(text)
            assert words in resumed(run, capsys)

    def test_a_weights_file_for_a_checkpoint(self, unfinished, capsys):
        shutil.copy(unfinished / "model" / "model.safetensors", unfinished / "checkpoints" / "last.safetensors")
        assert "is no training checkpoint" in resumed(unfinished, capsys)

    def test_the_record_of_the_data(self, unfinished, capsys):
        path = unfinished / "environment.json"
        path.write_text(path.read_text()[:50])
        assert "environment.json is damaged" in resumed(unfinished, capsys)


class TestReleasedFiles:
    def write(self, folder: Path, name: str, data: bytes) -> Path:
        path = folder / name
        path.write_bytes(b"Source\tTarget\n( ( ( [MAX 3 ) 4 ) ] )\t4\n" + data)
        return path

    @pytest.mark.parametrize(
        ("data", "words"),
        [
            (b"( ( ( [MAX \xff ) 4 ) ] )\t4\n", r"row 3: unknown token '\\xff'"),
            (b"[MAX 3\x004 ]\t4\n", r"row 3: unknown token '3\x004'"),
            (b"[MAX " + b"3" * 200_000, "row 3: expected 2 columns"),
            (b"[MAX 3 4 ]\t4\t5\n", "row 3: expected 2 columns, source and target, got 3"),
            (b"\n", "row 3: expected 2 columns"),
            (b"( ( ( [MAX 3 ) 4", "row 3: expected 2 columns"),
        ],
    )
    def test_bytes_that_are_no_text(self, data, words, tmp_path):
        path = self.write(tmp_path, "basic_train.tsv", data)
        with pytest.raises(ValueError) as error:  # noqa: PT011 the words are looked for below
            read_official(path)
        assert str(path) in str(error.value)
        assert words in str(error.value)

    def test_line_ends_of_other_systems(self, tmp_path):
        path = tmp_path / "basic_train.tsv"
        path.write_bytes(b"Source\tTarget\r\n[MAX 3 4 ]\t4\r\n")
        assert read_official(path).labels.tolist() == [4]

    def test_articles(self, tmp_path):
        for split in ("train", "eval", "test"):
            (tmp_path / f"new_aan_pairs.{split}.tsv").write_bytes(b"1.0\t1\t2\tsome text\tother text\n")
        path = tmp_path / "new_aan_pairs.test.tsv"
        for data, words in (
            (b"", "the test split of .* is empty"),
            (b"1.0\t1\t2\tsome text\tother text\n1.0\t1\t2\tsome te", "test.tsv, row 2: expected 5 columns"),
            (b"\xff\t1\t2\tsome text\tother text\n", "test.tsv, row 1: the label must be 0 or 1"),
        ):
            path.write_bytes(data)
            with pytest.raises(ValueError, match=words):
                Retrieval(str(tmp_path)).setup()

    def test_splits_without_examples(self, tmp_path):
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        none = pyarrow.table({"text": pyarrow.array([], pyarrow.string()), "label": pyarrow.array([], pyarrow.int64())})
        for side in ("train", "test"):
            parquet.write_table(none, tmp_path / f"{side}.parquet")
        with pytest.raises(ValueError, match=r"the training split of .* is empty; expected labelled examples"):
            Text(folder=str(tmp_path)).setup()

    def test_a_class_that_is_none(self, tmp_path):
        rows = [bytes([3, 7 * number]) + bytes(3071) for number in range(20)]
        for number in range(5):
            (tmp_path / f"data_batch_{number + 1}.bin").write_bytes(b"".join(rows[4 * number : 4 * number + 4]))
        (tmp_path / "test_batch.bin").write_bytes(rows[0] + bytes([77]) + bytes(3072))
        with pytest.raises(ValueError, match=r"example 1 of the test split of .* has the label 77; expected 0 to 9"):
            GreyImage(folder=str(tmp_path)).setup()

    def test_it_is_one_message_of_the_command(self, tmp_path, capsys):
        for name in ("train", "val", "test"):
            self.write(tmp_path, f"basic_{name}.tsv", b"[MAX 3 4 ]\t3\n")
        options = ["--config", "task/listops", "--config", "model/s4d", "--data.folder", str(tmp_path)]
        assert main([*options, "--runs", str(tmp_path / "runs")]) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert "basic_train.tsv, row 3: the target is 3, but the source's value is 4" in said
        assert not (tmp_path / "runs").exists()


def test_generated_data_that_are_cut_short_are_made_again(tmp_path):
    options = {"above": 5, "below": 40, "max_depth": 4, "max_args": 4, "cache": str(tmp_path)}
    options |= {"training_examples": 30, "validation_examples": 10, "test_examples": 10}
    first = ListOps(**options)
    first.setup()
    described, labels = first.description(), first.examples("training").labels.copy()
    path = next(Path(first.folder).glob("tokens-00000.npy"))
    path.write_bytes(path.read_bytes()[:-7])
    again = ListOps(**options)
    with pytest.warns(UserWarning, match="it is made again"):
        again.setup()
    assert again.description() == described
    np.testing.assert_array_equal(again.examples("training").labels, labels)
    manifest = Path(first.folder) / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": 0}))
    with pytest.raises(ValueError, match="choose another folder or delete it"):
        ListOps(**options).setup()
