"""The data modules of Long Range Arena: splits, batches, files in the released formats, what is on the disk."""

from __future__ import annotations

import errno
import io
import itertools
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from seqzoo.hub.files import WriteError
from seqzoo.train.data import GeneratedPathfinder, GreyImage, ListOps, Retrieval, Text, listops, pathfinder
from seqzoo.train.data.examples import EvaluationBatches, Sequences, TrainingBatches, split_by_content
from seqzoo.train.data.ragged import Ragged
from seqzoo.train.data.shards import Shards, data_folder

LITE = {"above": 20, "below": 80, "max_depth": 4, "max_args": 5}


def lite(tmp_path, **options) -> ListOps:
    counts = {"training_examples": 60, "validation_examples": 20, "test_examples": 30}
    return ListOps(**{"cache": str(tmp_path), "batch_size": 8, **LITE, **counts, **options})


def images(tmp_path, **options) -> GeneratedPathfinder:
    counts = {"training_examples": 25, "validation_examples": 10, "test_examples": 7, "shard_examples": 10}
    return GeneratedPathfinder(**{"cache": str(tmp_path), "batch_size": 4, "contour_length": 6, **counts, **options})


def rows(data, split: str) -> list[bytes]:
    """What every example of a split holds."""
    found = []
    for batch in EvaluationBatches(data.examples(split), batch_size=7):
        lengths = batch.get("lengths", [batch["x"].shape[1]] * len(batch["x"]))
        found += [row[:length].numpy().tobytes() for row, length in zip(batch["x"], lengths, strict=True)]
    return found


@pytest.mark.parametrize("make", [lite, images])
def test_no_example_is_in_two_splits(make, tmp_path):
    data = make(tmp_path)
    data.setup()
    found = {split: rows(data, split) for split in ("training", "validation", "test")}
    for one, other in itertools.combinations(found.values(), 2):
        assert not set(one) & set(other)
    sizes = [data.description()[f"{split}_examples"] for split in found]
    assert [len(part) for part in found.values()] == sizes == ([60, 20, 30] if make is lite else [25, 10, 7])


def test_generated_trees_are_those_of_the_generator(tmp_path):
    data = lite(tmp_path, data_seed=3)
    data.setup()
    trees = listops.generate(3, 110, listops.Law(**LITE))
    batch = EvaluationBatches(data.examples("validation"), batch_size=20).examples.batch(np.arange(20))
    assert batch["labels"].tolist() == trees.labels[60:80].tolist()
    for row, length in enumerate(batch["lengths"]):
        first = trees.bounds[60 + row]
        assert batch["x"][row, :length].tolist() == trees.tokens[first : first + length].tolist()
        assert (batch["x"][row, length:] == 0).all()


def test_generated_images_are_those_of_the_generator(tmp_path):
    data = images(tmp_path)
    data.setup()
    drawn = pathfinder.draw(0, 0, 42, 32, pathfinder.drawing(32, contour_length=6))
    for split, first in (("training", 0), ("validation", 25), ("test", 35)):
        size = len(data.examples(split).labels)
        batch = data.examples(split).batch(np.arange(size)[::-1].copy())
        assert batch["x"].dtype == torch.float32
        assert batch["x"].shape == (size, 1024, 1)
        expected = drawn.pixels[first : first + size][::-1].reshape(size, 1024, 1) / 255
        np.testing.assert_allclose(batch["x"].numpy(), expected, rtol=1e-6)
        assert batch["labels"].tolist() == drawn.labels[first : first + size][::-1].tolist()
    tokens = images(tmp_path, tokens=True)
    tokens.setup()
    assert tokens.examples("test").batch(np.arange(7))["x"].tolist() == drawn.pixels[35:].reshape(7, -1).tolist()
    assert (tokens.vocab_size, tokens.n_features) == (256, None)


def numbered(size: int) -> Sequences:
    return Sequences(Ragged.join([np.full(1, number, np.uint8) for number in range(size)], [0] * size), 5)


def test_training_takes_every_example_once_an_epoch_in_another_order():
    batches = TrainingBatches(numbered(10), batch_size=4, seed=3)
    taken = [int(one) for number in range(5) for one in batches.batch(number)["x"].flatten()]
    assert sorted(taken[:10]) == sorted(taken[10:]) == list(range(10))
    assert taken[:10] != taken[10:]
    assert taken == [int(one) for batch in itertools.islice(batches, 5) for one in batch["x"].flatten()]
    later = TrainingBatches(numbered(10), batch_size=4, seed=3, start=3)
    assert next(iter(later))["x"].flatten().tolist() == taken[12:16]
    assert taken[:4] != TrainingBatches(numbered(10), batch_size=4, seed=4).batch(0)["x"].flatten().tolist()


def test_the_order_is_the_same_for_ever():
    assert TrainingBatches(numbered(10), batch_size=10, seed=3).indices(0).tolist() == [0, 4, 9, 7, 1, 5, 6, 3, 8, 2]


def test_ranks_share_the_examples_of_a_step():
    whole = TrainingBatches(numbered(30), batch_size=6, seed=1)
    ranks = [TrainingBatches(numbered(30), batch_size=2, seed=1, rank=rank, world_size=3) for rank in range(3)]
    for number in range(7):
        parts = [rank.indices(number).tolist() for rank in ranks]
        assert [one for part in parts for one in part] == whole.indices(number).tolist()
    parts = [EvaluationBatches(numbered(11), batch_size=2, rank=rank, world_size=3) for rank in range(3)]
    assert [len(list(part)) for part in parts] == [len(part) for part in parts] == [2, 2, 2]
    assert sorted(int(one) for part in parts for batch in part for one in batch["x"].flatten()) == list(range(11))


def test_a_batch_smaller_than_an_epoch_or_greater():
    batches = TrainingBatches(numbered(3), batch_size=8)
    taken = [one for number in range(3) for one in batches.indices(number).tolist()]
    assert np.bincount(taken).tolist() == [8, 8, 8]


def test_copies_come_to_one_side():
    texts = [b"%d" % (number // 3) for number in range(300)]
    training, validation = split_by_content(texts, 0.1, 42)
    assert sorted([*training, *validation]) == list(range(300))
    assert 30 <= len(validation) <= 32
    assert not {texts[one] for one in training} & {texts[one] for one in validation}
    assert not np.array_equal(split_by_content(texts, 0.1, 43)[1], validation)


# what lies on the disk


def test_shards_are_made_once_and_again_where_damaged(tmp_path):
    made = []

    def make(number: int):
        made.append(number)
        return {"values": np.full(4, number)}

    def shards() -> Shards:
        return Shards(tmp_path, {"task": "test"}, 3, make)

    shards().complete()
    assert made == [0, 1, 2]
    again = shards()
    again.complete()
    assert made == [0, 1, 2]
    assert again.load(2)["values"].tolist() == [2] * 4
    (tmp_path / "values-00001.npy").write_bytes((tmp_path / "values-00000.npy").read_bytes())
    (tmp_path / "values-00002.npy").unlink()
    damaged = shards()
    with pytest.warns(UserWarning, match="it is made again") as warned:
        damaged.complete()
    assert [str(one.message).split(": ", 1)[1] for one in warned] == [
        "values-00001.npy has another checksum than manifest.json says; it is made again",
        "values-00002.npy is missing; it is made again",
    ]
    assert made == [0, 1, 2, 1, 2]
    assert damaged.load(1)["values"].tolist() == [1] * 4
    assert damaged.digest(0, 3) == again.digest(0, 3) != again.digest(0, 2)


def test_shards_that_were_finished_outlive_the_process(tmp_path):
    made = []

    def make(number: int):
        if number == 2 and len(made) < 4:
            made.append("killed")
            raise KeyboardInterrupt
        made.append(number)
        return {"values": np.full(4, number)}

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            Shards(tmp_path, {}, 4, make).complete()
    Shards(tmp_path, {}, 4, make).complete()
    assert made == [0, 1, "killed", "killed", 2, 3]
    assert not list(tmp_path.glob("*.tmp"))


def test_whole_shards_are_read_where_nothing_can_be_written(tmp_path, monkeypatch):
    def shards(count: int) -> Shards:
        return Shards(tmp_path / "data", {}, count, lambda number: {"values": np.full(4, number)})

    shards(2).complete()
    before, whole = Path.open, {path.name: path.read_bytes() for path in (tmp_path / "data").iterdir()}

    # the superuser, who may run the tests, can write wherever the file system can
    def read_only(self: Path, mode: str = "r", *arguments, **options):
        if mode[0] in "wa":
            raise OSError(errno.EROFS, "Read-only file system", str(self))
        return before(self, mode, *arguments, **options)

    monkeypatch.setattr(Path, "open", read_only)
    found = shards(2)
    found.complete()
    assert found.load(1)["values"].tolist() == [1] * 4
    with pytest.raises(WriteError, match=r"could not write generated data to .*values-00002\.npy: Read-only file sys"):
        shards(3).complete()
    assert whole == {path.name: path.read_bytes() for path in (tmp_path / "data").iterdir()}
    monkeypatch.undo()
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match=r"could not make the folder .*file/data: Not a directory"):
        Shards(tmp_path / "file" / "data", {}, 1, lambda number: {}).complete()


def test_two_that_begin_together_make_each_shard_once(tmp_path):
    """Threads stand for processes here: the lock is of an open file, of which each has its own."""
    made = []

    def make(number: int):
        made.append(number)
        time.sleep(0.02)
        return {"values": np.full(4, number)}

    def prepared() -> list[int]:
        shards = Shards(tmp_path, {}, 6, make)
        shards.complete()
        return [int(shards.load(number)["values"][0]) for number in range(6)]

    with ThreadPoolExecutor(3) as pool:
        found = [pool.submit(prepared) for _ in range(3)]
        assert [one.result(60) for one in found] == [list(range(6))] * 3
    assert made == list(range(6))


def test_other_data_in_the_folder_are_refused(tmp_path):
    def make(number: int):
        return {"values": np.zeros(1)}

    Shards(tmp_path, {"seed": 0}, 1, make).complete()
    with pytest.raises(ValueError, match=r"is of other data, \{'seed': 0\}, not \{'seed': 1\}; choose another folder"):
        Shards(tmp_path, {"seed": 1}, 1, make).complete()
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json is damaged: .*; delete .*, it will be made again"):
        Shards(tmp_path, {"seed": 0}, 1, make).complete()


def test_other_options_lie_in_another_folder_and_the_same_are_found_again(tmp_path, monkeypatch):
    data = images(tmp_path)
    data.setup()
    monkeypatch.setattr(pathfinder, "draw", lambda *arguments: pytest.fail("drawn again"))
    again = images(tmp_path)
    again.setup()
    assert again.description() == data.description()
    assert "pathfinder-generated" in data.folder
    assert len({images(tmp_path, data_seed=1).folder, images(tmp_path, legacy_seeding=True).folder, data.folder}) == 3
    assert lite(tmp_path).folder != lite(tmp_path, data_seed=1).folder


def test_where_data_lie(monkeypatch, tmp_path):
    monkeypatch.setenv("SEQZOO_CACHE", str(tmp_path))
    assert data_folder() == tmp_path / "data"
    assert ListOps().folder.startswith(str(tmp_path / "data" / "listops-"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SEQZOO_CACHE", "~/kept")
    assert data_folder() == tmp_path / "home" / "kept" / "data"


# released files


def write_listops(folder):
    for name, value in (("train", 3), ("val", 4), ("test", 5)):
        (folder / f"basic_{name}.tsv").write_text(f"Source\tTarget\n( ( ( [MAX {value} ) 1 ) ] )\t{value}\n")
    return folder


def test_released_listops(tmp_path):
    data = ListOps(folder=str(write_listops(tmp_path)), batch_size=2)
    data.setup()
    assert [int(data.examples(split).labels[0]) for split in ("training", "validation", "test")] == [3, 4, 5]
    with pytest.raises(ValueError, match=r"an expression of 4 tokens; --data.below must be greater, got 4"):
        ListOps(folder=str(tmp_path), above=1, below=4).setup()
    (tmp_path / "basic_val.tsv").unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no file .*basic_val\.tsv.*lra_release\.gz"):
        ListOps(folder=str(tmp_path)).setup()


def test_the_longest_trees_are_whole(tmp_path):
    data = lite(tmp_path, above=10, below=14)
    data.setup()
    lengths = [length for batch in data.test_dataloader() for length in batch["lengths"]]
    assert set(lengths) == {11, 12, 13}
    whole = listops.generate(0, 110, listops.Law(**{**LITE, "above": 10, "below": 14}))
    assert lengths == np.diff(whole.bounds)[80:].tolist()


def test_baselines_know_the_training_labels_alone(tmp_path):
    """The test's own most frequent class, or what its trees come to below an operator, would be no guess."""
    for name, values in (("train", (3, 3, 4)), ("val", (5,)), ("test", (5, 5, 3))):
        # the last argument makes trees of one value different ones
        lines = [f"( ( ( [MAX {value} ) {number % 3} ) ] )\t{value}" for number, value in enumerate(values)]
        (tmp_path / f"basic_{name}.tsv").write_text("\n".join(["Source\tTarget", *lines]) + "\n")
    data = ListOps(folder=str(tmp_path))
    data.setup()
    found = data.baselines()
    assert found["most frequent class"] == found["0 levels"] == pytest.approx(1 / 3)
    assert found["1 levels"] == 1.0


REVIEWS = [("bad, very bad", 0), ("good", 1), ("so bad", 0), ("wow, größer", 1)] + [
    (f"film {n}", n % 2) for n in range(36)
]


def write_reviews_as_files(folder):
    for side in ("train", "test"):
        for number, (text, label) in enumerate(REVIEWS):
            path = folder / side / ("pos" if label else "neg") / f"{number:03}_7.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{side} {text}", encoding="utf-8")
        (folder / side / "unsup").mkdir()
        (folder / side / "unsup" / "0_0.txt").write_text("not labelled")
    return folder


def write_parquet(path, **columns):
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def write_reviews_as_parquet(folder):
    for side in ("train", "test"):
        texts = [f"{side} {text}" for text, _ in REVIEWS]
        write_parquet(
            folder / "plain_text" / f"{side}-00000-of-00001.parquet", text=texts, label=[label for _, label in REVIEWS]
        )
    write_parquet(folder / "plain_text" / "unsupervised-00000-of-00001.parquet", text=["x"], label=[-1])
    return folder


@pytest.mark.parametrize("write", [write_reviews_as_files, write_reviews_as_parquet])
def test_reviews(write, tmp_path):
    data = Text(folder=str(write(tmp_path)), longest=14, validation_fraction=0.25)
    data.setup()
    expected = {
        side: sorted((f"{side} {text}".encode()[:14], label) for text, label in REVIEWS) for side in ("train", "test")
    }
    found = {}
    for split in ("training", "validation", "test"):
        texts = [bytes(np.frombuffer(row, np.int64).astype(np.uint8)) for row in rows(data, split)]
        found[split] = list(zip(texts, data.examples(split).labels.tolist(), strict=True))
    assert len(found["validation"]) == 10
    assert sorted(found["training"] + found["validation"]) == expected["train"]
    assert sorted(found["test"]) == expected["test"]
    paper = Text(folder=str(tmp_path), longest=14, paper_split=True)
    paper.setup()
    assert len(paper.examples("training").labels) == len(REVIEWS)
    assert rows(paper, "validation") == rows(paper, "test")


@pytest.mark.parametrize(
    ("kind", "write"), [(Text, write_reviews_as_files), (GreyImage, lambda path: write_photographs_as_binary(path))]
)
def test_another_seed_holds_out_others(kind, write, tmp_path):
    folder = str(write(tmp_path))
    held = []
    for seed in (42, 42, 43):
        data = kind(folder=folder, validation_fraction=0.3, validation_seed=seed)
        data.setup()
        held.append(rows(data, "validation"))
        assert not set(held[-1]) & set(rows(data, "training"))
    assert held[0] == held[1]
    assert set(held[0]) != set(held[2])


def write_articles(folder, **lines):
    for split in ("train", "eval", "test"):
        text = lines.get(split, f'1.0\t7\t8\t"{split} a\tb\n0\t1\t2\tc\t\n')
        (folder / f"new_aan_pairs.{split}.tsv").write_text(text)
    return folder


def test_articles(tmp_path):
    data = Retrieval(folder=str(write_articles(tmp_path)), longest=5)
    data.setup()
    batch = data.examples("test").batch(np.array([1, 0]))
    assert batch["labels"].tolist() == [0, 1]
    assert batch["lengths"] == [1, 5, 0, 1]
    texts = [bytes(row[:length].tolist()) for row, length in zip(batch["x"], batch["lengths"], strict=True)]
    assert texts == [b"c", b'"test', b"", b"b"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("1\t7\t8\ta\tb\n1\t7\t8\ta\n", r"eval\.tsv, row 2: expected 5 columns, .* got 4; the file may be cut short"),
        ("2\t7\t8\ta\tb\n", r"eval\.tsv, row 1: the label must be 0 or 1, got '2'"),
        ("", "the validation split of .* is empty"),
    ],
)
def test_damaged_articles_are_named(lines, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        Retrieval(folder=str(write_articles(tmp_path, eval=lines))).setup()


PHOTOGRAPHS = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)


def write_photographs_as_parquet(folder):
    from PIL import Image

    images = []
    for pixels in PHOTOGRAPHS:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "png")
        images.append({"bytes": file.getvalue(), "path": None})
    labels = [number % 10 for number in range(40)]
    write_parquet(folder / "plain_text" / "train-00000-of-00001.parquet", img=images[:30], label=labels[:30])
    write_parquet(folder / "plain_text" / "test-00000-of-00001.parquet", img=images[30:], label=labels[30:])
    return folder


def write_photographs_as_binary(folder):
    rows = [bytes([number % 10]) + pixels.transpose(2, 0, 1).tobytes() for number, pixels in enumerate(PHOTOGRAPHS)]
    inner = folder / "cifar-10-batches-bin"
    inner.mkdir()
    for number in range(5):
        (inner / f"data_batch_{number + 1}.bin").write_bytes(b"".join(rows[6 * number : 6 * number + 6]))
    (inner / "test_batch.bin").write_bytes(b"".join(rows[30:]))
    return folder


@pytest.mark.parametrize("write", [write_photographs_as_parquet, write_photographs_as_binary])
def test_photographs(write, tmp_path):
    from PIL import Image

    grey = np.stack([np.asarray(Image.fromarray(pixels).convert("L")) for pixels in PHOTOGRAPHS])
    data = GreyImage(folder=str(write(tmp_path)), tokens=True)
    data.setup()
    assert data.examples("test").batch(np.arange(10))["x"].tolist() == grey[30:].reshape(10, -1).tolist()
    held = [row for split in ("training", "validation") for row in rows(data, split)]
    assert sorted(held) == sorted(row.astype(np.int64).tobytes() for row in grey[:30])
    assert len(rows(data, "validation")) == 3
    paper = GreyImage(folder=str(tmp_path), paper_split=True, mean=0.5, deviation=0.25)
    paper.setup()
    x = paper.examples("validation").batch(np.arange(3))["x"].numpy()
    np.testing.assert_allclose(x[..., 0], (grey[27:30].reshape(3, -1) / 255 - 0.5) / 0.25, atol=1e-6)
    assert paper.examples("validation").labels.tolist() == [7, 8, 9]


def test_a_cut_photograph_file_is_named(tmp_path):
    write_photographs_as_binary(tmp_path)
    path = tmp_path / "cifar-10-batches-bin" / "data_batch_3.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"data_batch_3\.bin has 18437 bytes, expected a multiple of 3073"):
        GreyImage(folder=str(tmp_path)).setup()
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"has 4 of the 5 files data_batch_1\.bin"):
        GreyImage(folder=str(tmp_path)).setup()


def test_labels_out_of_range_are_named(tmp_path):
    write_reviews_as_parquet(tmp_path)
    path = tmp_path / "plain_text" / "test-00000-of-00001.parquet"
    write_parquet(path, text=["a", "b"], label=[1, -1])
    with pytest.raises(ValueError, match=r"example 1 of the test split of .* has the label -1; expected 0 to 1"):
        Text(folder=str(tmp_path)).setup()
    write_parquet(path, text=["a", "b", "c"], label=[1, 0, 2])
    with pytest.raises(ValueError, match=r"example 2 of the test split of .* has the label 2; expected 0 to 1"):
        Text(folder=str(tmp_path)).setup()
    path.write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"test-00000.*\.parquet is damaged or no parquet file"):
        Text(folder=str(tmp_path)).setup()


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"words": ["a"], "label": [1]}, "has no column 'text', it has words, label"),
        ({"text": ["a"], "mark": [1]}, "has no column 'label', it has text, mark"),
        ({"text": ["a", None], "label": [1, 0]}, "row 1: 'text' must be text, got NoneType"),
        ({"text": ["a", "b"], "label": [1, None]}, "row 1: 'label' must be an integer, got None"),
        ({"text": ["a"], "label": ["pos"]}, "row 0: 'label' must be an integer, got 'pos'"),
        # which would be cut to 0
        ({"text": ["a"], "label": [0.5]}, "row 0: 'label' must be an integer, got 0.5"),
    ],
)
def test_rows_of_parquet_that_are_no_reviews_are_named(columns, message, tmp_path):
    write_parquet(write_reviews_as_parquet(tmp_path) / "plain_text" / "test-00000-of-00001.parquet", **columns)
    with pytest.raises(ValueError, match=rf"test-00000-of-00001\.parquet,? {message}"):
        Text(folder=str(tmp_path)).setup()


def test_columns_are_found_in_any_order(tmp_path):
    write_parquet(tmp_path / "train.parquet", label=[0, 1], more=[1, 2], text=["a", "b"])
    write_parquet(tmp_path / "test.parquet", label=[1], text=["c"])
    data = Text(folder=str(tmp_path), paper_split=True)
    data.setup()
    assert data.examples("training").labels.tolist() == [0, 1]


def test_half_of_the_files_are_not_taken_for_all(tmp_path):
    """What a download or an unpacking that was stopped leaves behind."""
    write_reviews_as_parquet(tmp_path)
    whole = tmp_path / "plain_text" / "train-00000-of-00001.parquet"
    whole.rename(whole.with_name("train-00000-of-00003.parquet"))
    with pytest.raises(FileNotFoundError, match=r"has 1 of the 3 files train-\*\.parquet; download it"):
        Text(folder=str(tmp_path)).setup()
    files = tmp_path / "files"
    files.mkdir()
    for path in (write_reviews_as_files(files) / "train" / "pos").iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"train has no pos/\*\.txt; download it"):
        Text(folder=str(files)).setup()
    (files / "train" / "pos").rmdir()
    with pytest.raises(FileNotFoundError, match=r"train has no pos/\*\.txt; download it"):
        Text(folder=str(files)).setup()


@pytest.mark.parametrize(
    ("image", "message"),
    [({"bytes": b"\x89PNG", "path": None}, "cannot be read"), (None, "cannot be read"), ((3, 4), r"is \(3, 4\), exp")],
)
def test_a_damaged_photograph_is_named_by_file_and_row(image, message, tmp_path):
    from PIL import Image

    write_photographs_as_parquet(tmp_path)
    whole = io.BytesIO()
    Image.fromarray(PHOTOGRAPHS[0]).save(whole, "png")
    if isinstance(image, tuple):
        file = io.BytesIO()
        Image.fromarray(np.zeros((*image, 3), np.uint8)).save(file, "png")
        image = {"bytes": file.getvalue(), "path": None}
    path = tmp_path / "plain_text" / "test-00000-of-00001.parquet"
    write_parquet(path, img=[{"bytes": whole.getvalue(), "path": None}, image], label=[0, 1])
    with pytest.raises(ValueError, match=rf"test-00000-of-00001\.parquet, row 1: the image {message}"):
        GreyImage(folder=str(tmp_path)).setup()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: Text(folder=folder), "hf download stanfordnlp/imdb --repo-type dataset --local-dir FOLDER"),
        (lambda folder: GreyImage(folder=folder), "hf download uoft-cs/cifar10 --repo-type dataset"),
        (lambda folder: Retrieval(folder=folder), "lra_release.gz of Long Range Arena"),
    ],
)
@pytest.mark.parametrize("missing", [False, True])
def test_what_is_not_there_is_asked_for(make, words, missing, tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        make(str(tmp_path / "nowhere" if missing else tmp_path)).setup()
    assert words in str(error.value)
    assert "--data.folder" in str(error.value)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("make", [Text, GreyImage, Retrieval])
def test_without_network_and_folder_nothing_takes_the_place_of_data(make, monkeypatch):
    import datasets

    def unreachable(*arguments, **options):
        raise ConnectionError("no route to the Hub\nmore words")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(FileNotFoundError, match=r"(no route to the Hub|no folder is given).*--data.folder"):
        make().setup()


def test_the_hub_gives_what_a_folder_would(monkeypatch, tmp_path):
    import datasets

    folder = write_photographs_as_parquet(tmp_path)

    def local(name, split):
        assert name == "uoft-cs/cifar10"
        file = str(folder / "plain_text" / f"{split}-00000-of-00001.parquet")
        table = datasets.Dataset.from_parquet(file, cache_dir=str(tmp_path / "cache"))
        return table.cast_column("img", datasets.Image())

    monkeypatch.setattr(datasets, "load_dataset", local)
    hub, disk = GreyImage(), GreyImage(folder=str(folder))
    for data in (hub, disk):
        data.setup()
    digests = [{name: value for name, value in data.description().items() if name != "folder"} for data in (hub, disk)]
    assert digests[0] == digests[1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ListOps(batch_size=0), "batch_size must be a positive integer, got 0"),
        (lambda: ListOps(training_examples=0), "training_examples must be a positive integer, got 0"),
        (lambda: ListOps(max_depth=3), "has at most 122 tokens"),
        (lambda: GeneratedPathfinder(size=100), "size must be one of 32, 64, 128, 256, got 100"),
        (lambda: GeneratedPathfinder(shard_examples=0), "shard_examples must be a positive integer"),
        (lambda: Text(validation_fraction=1.0), "validation_fraction must lie between 0 and 1, got 1.0"),
        (lambda: GreyImage(deviation=0), "deviation must be positive, got 0"),
    ],
)
def test_bad_options(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_unread_data_have_no_batches():
    with pytest.raises(RuntimeError, match="setup"):
        ListOps().train_dataloader()
