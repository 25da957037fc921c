"""Reading the data sets that cannot be generated: reviews of films, pairs of articles, small photographs.

From a local folder in the form in which they are released, or from the Hugging Face Hub through ``datasets``. Where
neither is there, the error says what to download and where to put it; nothing takes their place.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from seqzoo.train.data.ragged import Ragged

PAIR_COLUMNS = 5
# folders of reviews, in the order of their labels
KINDS = ("neg", "pos")
# bytes of a row of CIFAR-10's binary version: the label, then 32 x 32 pixels of each colour
CIFAR_ROW = 1 + 3 * 32 * 32
CIFAR_FILES = [f"data_batch_{number}.bin" for number in range(1, 6)]
CIFAR_FILES_OF_TEST = ["test_batch.bin"]
# how a file says of how many it is one
ONE_OF = re.compile(r".*-of-0*([1-9][0-9]*)\.parquet")


class Source(NamedTuple):
    """A data set of the Hub, and the words that tell how to get it.

    Attributes:
        name: What it is.
        hub_id: Its repository, or None where it has none.
        columns: What an example holds, then its label.
        files: Which files a local folder must have.
    """

    name: str
    hub_id: str | None
    columns: tuple[str, str]
    files: str

    def missing(self, where: str) -> FileNotFoundError:
        """The error that says what to download."""
        if self.hub_id is None:
            how = (
                "download lra_release.gz of Long Range Arena (github.com/google-research/long-range-arena), unpack it "
                "and give the folder tsv_data in it as --data.folder"
            )
        else:
            how = (
                f"download it with `hf download {self.hub_id} --repo-type dataset --local-dir FOLDER` and give "
                "--data.folder FOLDER"
            )
        return FileNotFoundError(f"{self.name}: {where}; {how}. The folder holds {self.files}")


REVIEWS = Source(
    "the film reviews of IMDb",
    "stanfordnlp/imdb",
    ("text", "label"),
    "train-*.parquet and test-*.parquet, at any depth, or as first released train/pos, train/neg, test/pos and "
    "test/neg with a text file a review",
)
ARTICLES = Source(
    "the pairs of articles of the ACL Anthology Network",
    None,
    ("text", "label"),
    "new_aan_pairs.train.tsv, new_aan_pairs.eval.tsv and new_aan_pairs.test.tsv",
)
PHOTOGRAPHS = Source(
    "the photographs of CIFAR-10",
    "uoft-cs/cifar10",
    ("img", "label"),
    "train-*.parquet and test-*.parquet, at any depth, or those of the binary version, data_batch_1.bin to "
    "data_batch_5.bin and test_batch.bin",
)


class _Row(NamedTuple):
    """An example as it is stored: a text or an image, its label, and file and row for messages."""

    content: Any
    label: int
    where: str


class _Articles(NamedTuple):
    label: int
    first: NDArray[np.uint8]
    second: NDArray[np.uint8]


class Photographs(NamedTuple):
    """Grey images: uint8 ``(n, 32, 32)`` and int64 ``(n,)``."""

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]


def read_reviews(folder: str | None) -> dict[str, Ragged]:
    """The reviews as UTF-8 bytes, label 1 where they praise; ``"train"`` and ``"test"``.

    Raises:
        FileNotFoundError: If they are not there; says what to download.
        ValueError: If a file is damaged; names it.
    """
    sides = {}
    for side in ("train", "test"):
        root = None if folder is None else _existing(REVIEWS, folder)
        if root is not None and any((root / side / name).is_dir() for name in KINDS):
            rows = list(_reviews_of_folder(root / side))
        else:
            rows = [(_text(row), row.label) for row in _table(REVIEWS, root, side)]
        sides[side] = Ragged.join([np.frombuffer(text, dtype=np.uint8) for text, _ in rows], [row[1] for row in rows])
    return sides


def read_articles(folder: str | None, longest: int) -> dict[str, tuple[Ragged, Ragged]]:
    """The pairs as UTF-8 bytes, cut to ``longest``, label 1 where one cites the other; both sides of all splits.

    Raises:
        FileNotFoundError: If they are not there; says what to download.
        ValueError: If a row is damaged; names file and row.
    """
    if folder is None:
        raise ARTICLES.missing("no folder is given, and the Hub has none")
    root = _existing(ARTICLES, folder)
    splits = {}
    for split in ("train", "eval", "test"):
        path = root / f"new_aan_pairs.{split}.tsv"
        if not path.is_file():
            raise ARTICLES.missing(f"there is no file {path}")
        rows = list(_article_rows(path, longest))
        labels = [row.label for row in rows]
        splits[split] = (
            Ragged.join([row.first for row in rows], labels),
            Ragged.join([row.second for row in rows], labels),
        )
    return splits


def read_photographs(folder: str | None) -> dict[str, Photographs]:
    """The photographs in grey, by the luma of ITU-R BT.601; ``"train"`` and ``"test"``.

    Raises:
        FileNotFoundError: If they are not there; says what to download.
        ValueError: If a file is damaged; names it.
    """
    root = None if folder is None else _existing(PHOTOGRAPHS, folder)
    return {"train": _photographs(root, "train", CIFAR_FILES), "test": _photographs(root, "test", CIFAR_FILES_OF_TEST)}


def _photographs(root: Path | None, side: str, names: Sequence[str]) -> Photographs:
    binary = [] if root is None else [path for name in names for path in sorted(root.rglob(name))[:1]]
    if root is None or not binary:
        rows = _table(PHOTOGRAPHS, root, side)
        pixels = np.zeros((len(rows), 32, 32), dtype=np.uint8)
        for place, row in enumerate(rows):
            pixels[place] = _decoded(row)
        return Photographs(pixels, np.array([row.label for row in rows], dtype=np.int64))
    if len(binary) < len(names):
        raise PHOTOGRAPHS.missing(f"{root} has {len(binary)} of the {len(names)} files {', '.join(names)}")
    values = np.concatenate([_cifar_rows(path) for path in binary])
    colours = values[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return Photographs(_grey(colours), values[:, 0].astype(np.int64))


def _existing(source: Source, folder: str) -> Path:
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise source.missing(f"there is no folder {path}")
    return path


def _reviews_of_folder(folder: Path) -> Iterator[tuple[bytes, int]]:
    for label, name in enumerate(KINDS):
        paths = sorted((folder / name).glob("*.txt"))
        if not paths:
            raise REVIEWS.missing(f"{folder} has no {name}/*.txt")
        for path in paths:
            yield path.read_bytes(), label


def _text(row: _Row) -> bytes:
    if not isinstance(row.content, str):
        raise ValueError(f"{row.where}: 'text' must be text, got {type(row.content).__name__}")
    return row.content.encode()


def _article_rows(path: Path, longest: int) -> Iterator[_Articles]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            columns = line.rstrip(b"\r\n").split(b"\t")
            if len(columns) != PAIR_COLUMNS:
                raise ValueError(
                    f"{path}, row {number}: expected {PAIR_COLUMNS} columns, label, two numbers and two texts, got "
                    f"{len(columns)}; the file may be cut short"
                )
            # the release writes labels as numbers with a point
            if columns[0] not in (b"0", b"1", b"0.0", b"1.0"):
                found = columns[0].decode(errors="replace")
                raise ValueError(f"{path}, row {number}: the label must be 0 or 1, got {found!r}")
            first, second = (np.frombuffer(text[:longest], dtype=np.uint8) for text in columns[3:])
            yield _Articles(int(columns[0][:1]), first, second)


def _cifar_rows(path: Path) -> NDArray[np.uint8]:
    values = np.fromfile(path, dtype=np.uint8)
    if values.size == 0 or values.size % CIFAR_ROW:
        raise ValueError(f"{path} has {values.size} bytes, expected a multiple of {CIFAR_ROW}; it may be cut short")
    return values.reshape(-1, CIFAR_ROW)


def _grey(colours: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """0.299 R + 0.587 G + 0.114 B, in 65536ths, rounded."""
    return ((colours.astype(np.int64) @ np.array([19595, 38470, 7471]) + 32768) >> 16).astype(np.uint8)


def _decoded(row: _Row) -> NDArray[np.uint8]:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(row.content["bytes"])) as opened:
            colours = np.asarray(opened.convert("RGB"))
    except (OSError, TypeError, LookupError) as error:
        raise ValueError(f"{row.where}: the image cannot be read: {error}; download the file again") from error
    if colours.shape != (32, 32, 3):
        raise ValueError(f"{row.where}: the image is {colours.shape[:2]}, expected (32, 32)")
    return _grey(colours)


def _table(source: Source, root: Path | None, side: str) -> list[_Row]:
    """The rows of a split, from parquet files below a folder or from the Hub."""
    return _parquet(source, root, side) if root is not None else _hub(source, side)


def _parquet(source: Source, root: Path, side: str) -> list[_Row]:
    # they come with datasets
    import pyarrow
    import pyarrow.parquet

    paths = sorted([*root.rglob(f"{side}-*.parquet"), *root.rglob(f"{side}.parquet")])
    if not paths:
        raise source.missing(f"{root} has no {side}-*.parquet")
    for folder in {path.parent for path in paths}:
        parts = [match for path in paths if path.parent == folder and (match := ONE_OF.fullmatch(path.name))]
        if parts and len(parts) < int(parts[0][1]):
            raise source.missing(f"{folder} has {len(parts)} of the {int(parts[0][1])} files {side}-*.parquet")
    rows: list[_Row] = []
    for path in paths:
        try:
            opened = pyarrow.parquet.ParquetFile(path)
            _check_columns(source, opened.schema_arrow.names, str(path))
            table = opened.read(columns=list(source.columns))
        except (OSError, pyarrow.ArrowException) as error:
            raise ValueError(f"{path} is damaged or no parquet file: {error}; download it again") from error
        rows += _rows(source, [table[name].to_pylist() for name in source.columns], str(path))
    return rows


def _hub(source: Source, side: str) -> list[_Row]:
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        found: Any = datasets.load_dataset(str(source.hub_id), split=side)
    # a missing network, a missing repository and a damaged cache raise errors of many classes below these
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        words = str(error).partition("\n")[0]
        raise source.missing(f"the Hub did not give {source.hub_id}: {words}") from error
    where = f"{source.hub_id} {side}"
    _check_columns(source, found.column_names, where)
    if source.columns[0] == "img":
        found = found.cast_column("img", datasets.Image(decode=False))
    return _rows(source, [list(found[name]) for name in source.columns], where)


def _check_columns(source: Source, names: Sequence[str], where: str) -> None:
    lacking = [name for name in source.columns if name not in names]
    if lacking:
        raise ValueError(f"{where} has no column {lacking[0]!r}, it has {', '.join(names)}")


def _rows(source: Source, columns: Sequence[Sequence[Any]], where: str) -> list[_Row]:
    """The rows of two columns, with labels that are integers."""
    rows = [
        _Row(content, label, f"{where}, row {row}") for row, (content, label) in enumerate(zip(*columns, strict=True))
    ]
    for row in rows:
        if not isinstance(row.label, int) or isinstance(row.label, bool):
            raise ValueError(f"{row.where}: {source.columns[1]!r} must be an integer, got {row.label!r}")
    return rows
