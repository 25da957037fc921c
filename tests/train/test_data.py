"""The data: which files, which side of the split, which bytes in which batch."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from seqzoo.train.data import FolderBytes
from seqzoo.train.data.files import digest, find_files, read_bytes, resolve_folder, split_files
from seqzoo.train.data.windows import IGNORED, TrainingWindows, ValidationWindows


def data_module(folder: Path, **options) -> FolderBytes:
    return FolderBytes(**{"folder": str(folder), "validation_fraction": 0.25, "context": 32, **options})


def test_standard_library_is_on_every_machine():
    folder = resolve_folder("{stdlib}")
    files = find_files(folder, ["*.py"], ["site-packages", "dist-packages", "test", "tests", "__pycache__"])
    assert "os.py" in files
    assert not any(part in ("site-packages", "test") for path in files for part in path.split("/"))
    training, validation = split_files(files, 0.05)
    assert sorted(training + validation) == files
    assert 0.02 < len(validation) / len(files) < 0.09


def test_files_match_by_name_or_path(tmp_path):
    for name in ("a.py", "b.txt", "sub/c.py", "sub/skip/d.py", "skip/e.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert find_files(tmp_path, ["*.py"], ["skip"]) == ["a.py", "sub/c.py"]
    assert find_files(tmp_path, ["sub/*"], []) == ["sub/c.py", "sub/skip/d.py"]
    assert read_bytes(tmp_path, ["b.txt", "a.py"]).tobytes() == b"b.txta.py"
    assert digest(read_bytes(tmp_path, ["a.py"])) != digest(read_bytes(tmp_path, ["b.txt"]))


def test_split_depends_on_each_path_alone():
    files = [f"folder/file{number}.py" for number in range(400)]
    _, few = split_files(files, 0.1)
    _, more = split_files(files, 0.3)
    _, half = split_files(files[::2], 0.1)
    assert set(few) < set(more)
    assert half == [path for path in few if path in files[::2]]


def test_split_is_the_same_for_ever():
    files = [f"folder/file{number}.py" for number in range(20)]
    assert split_files(files, 0.3)[1] == ["folder/file13.py", "folder/file14.py"]


def test_batches_depend_on_seed_rank_and_number_alone():
    data = np.random.default_rng(0).integers(0, 256, 5000, dtype=np.uint8)
    windows = TrainingWindows(data, context=16, batch_size=8, seed=3)
    batches = list(itertools.islice(windows, 5))
    assert batches[0].dtype == torch.uint8
    assert batches[0].shape == (8, 17)
    later = next(iter(TrainingWindows(data, context=16, batch_size=8, seed=3, start=4)))
    assert torch.equal(later, batches[4])
    for other in ({"seed": 4}, {"seed": 3, "rank": 1}):
        assert not torch.equal(TrainingWindows(data, context=16, batch_size=8, **other).batch(0), batches[0])
    whole = data.tobytes()
    assert all(bytes(row.tolist()) in whole for row in batches[2])


def test_every_place_is_drawn():
    data = np.arange(20, dtype=np.uint8)
    windows = TrainingWindows(data, context=4, batch_size=64, seed=0)
    starts = {int(row[0]) for number in range(10) for row in windows.batch(number)}
    assert starts == set(range(16))


@pytest.mark.parametrize(
    ("size", "context", "streams"), [(2, 4, 3), (50, 7, 1), (101, 8, 3), (64, 64, 4), (1000, 13, 16)]
)
def test_validation_scores_every_byte_but_the_first_once(size, context, streams):
    data = np.random.default_rng(1).integers(0, 256, size, dtype=np.uint8)
    windows = ValidationWindows(data, context=context, streams=streams)
    assert len(list(windows)) == len(windows)
    ids = torch.cat([part for part, _ in windows], dim=1)
    labels = torch.cat([part for _, part in windows], dim=1)
    scored = labels[labels != IGNORED]
    assert scored.tolist() == data[1:].tolist()
    # within a stream the input is the byte before the label
    counted = labels != IGNORED
    assert ids[counted].tolist() == data[:-1].tolist()


def test_module_reads_once_and_describes(corpus):
    module = data_module(corpus)
    module.setup()
    read = module.side("training").ids
    module.setup("fit")
    assert module.side("training").ids is read
    facts = module.description()
    assert facts["training_files"] + facts["validation_files"] == 24
    assert facts["training_bytes"] + facts["validation_bytes"] == sum(p.stat().st_size for p in corpus.rglob("*.py"))
    again = data_module(corpus)
    again.setup()
    assert again.description() == facts


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("/nowhere/at/all", "'/nowhere/at/all' does not exist"),
        ("{stdlb}", "did you mean stdlib"),
        ("{stdlib", "braces hold one of"),
        (__file__, "is a file; expected a folder"),
    ],
)
def test_wrong_folder_is_named(folder, message):
    with pytest.raises(ValueError, match=message):
        FolderBytes(folder=folder).setup()


def test_empty_and_small_folders_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"has no file that matches \*\.py"):
        data_module(tmp_path).setup()
    (tmp_path / "a.py").write_text("x = 1\n" * 100)
    with pytest.raises(ValueError, match=r"of its 1 files \d fell to training and \d to validation"):
        data_module(tmp_path).setup()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 0}, "context must be a positive integer"),
        ({"batch_size": 0}, "batch_size must be a positive integer"),
        ({"validation_fraction": 1.0}, "validation_fraction must lie between 0 and 1"),
        ({"files": []}, "files must name at least one pattern"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        FolderBytes(**options)
