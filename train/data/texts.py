"""Texts of files and of data sets as documents, in pieces of which each can be read alone."""

from __future__ import annotations

import glob
import gzip
import io
import json
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol, cast

from seqzoo.train.data.shards import file_digest

# bytes of a piece, which is tokenised in memory, and of a part, which a tokenizer gets in one call
PIECE = 1 << 26
PART = 1 << 20
# bytes in which the end of a line is looked for, where a text has to be cut
LINE = 1 << 16
ROWS = (".jsonl", ".ndjson")
FASTA = (".fa", ".fasta", ".fna")
PACKED = (".gz", ".zip")
# small and capital letters of the nucleic acids; what stands for several nucleotides becomes N, uracil thymine
LETTERS = b"ACGTURYSWKMBDHVN"
READ = bytes.maketrans(LETTERS + LETTERS.lower(), b"ACGTTNNNNNNNNNNN" * 2)


class Missing(FileNotFoundError):
    """Raised where data are not there; says what to download, and where to put it."""


class Part(NamedTuple):
    """A document, or a part of one.

    Attributes:
        text: UTF-8, or any bytes.
        key: What decides on which side of a split the document is, the same for all of its parts.
        where: File and row, for messages.
        begins: Whether the document begins with it.
        ends: Whether it ends with it.
    """

    text: bytes
    key: bytes
    where: str
    begins: bool = True
    ends: bool = True


class Source(Protocol):
    """Documents in an order, in numbered pieces.

    Attributes:
        pieces: How many there are.
    """

    pieces: int

    def identity(self) -> Any:
        """Plain data that differ where the documents do."""
        ...

    def parts(self, piece: int) -> Iterator[Part]:
        """What a piece holds, in order; always the same."""
        ...


class _Unit(NamedTuple):
    """What is read of a file in one go: bytes from ``start`` to below ``stop``, or those row groups."""

    path: Path
    start: int
    stop: int
    size: int


def find(patterns: Sequence[str], download: str = "") -> list[Path]:
    """The files that match any of some patterns (``*``, ``?``, ``**``), each once, by pattern and name.

    Args:
        patterns: Paths, which may hold wildcards.
        download: What to do where there is none, for the error.

    Raises:
        Missing: If a pattern has no match.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        matches = glob.glob(str(Path(pattern).expanduser()), recursive=True)  # noqa: PTH207 absolute ones as well
        files = [path for path in map(Path, sorted(matches)) if path.is_file()]
        if not files:
            raise Missing(f"there is no file {pattern}; {download or 'name files that exist, or patterns as *.txt'}")
        found.update(dict.fromkeys(files))
    return list(found)


class Files:
    """Local files: JSON lines, parquet, FASTA or plain text by the ends of their names, also in ``.gz`` and ``.zip``.

    A file of text is one document; of other kinds a row or a record is. A long text is read in parts, which end at ends
    of lines where it has any, else between characters.

    Args:
        paths: The files.
        column: Which column or key of a row is the text.
        joined: Whether all rows are parts of one document.
        span: First byte that is read, and the one behind the last, of a single file of plain text.

    Raises:
        ValueError: If a file is damaged, or is no plain text where a span is given; names it.
    """

    def __init__(
        self, paths: Sequence[Path], column: str = "text", joined: bool = False, span: tuple[int, int] | None = None
    ) -> None:
        self.paths, self.column, self.joined, self.span = list(paths), column, joined, span
        if span is not None and (len(self.paths) != 1 or _kind(self.paths[0]) != "text"):
            raise ValueError(f"only a single file of plain text can be cut at bytes, got {', '.join(map(str, paths))}")
        self.grouped: list[list[_Unit]] = []
        room = 0
        for unit in (unit for path in self.paths for unit in self._units(path)):
            if unit.size > room or not self.grouped:
                self.grouped.append([])
                room = PIECE
            self.grouped[-1].append(unit)
            room -= unit.size
        self.pieces = len(self.grouped)

    def identity(self) -> Any:
        """Names and contents."""
        contents = []
        for path in self.paths:
            with path.open("rb") as file:
                contents.append([path.name, file_digest(file)])
        return {"files": contents, "column": self.column, "joined": self.joined, "span": self.span, "piece": PIECE}

    def parts(self, piece: int) -> Iterator[Part]:
        """The documents of some files, or of a part of one."""
        units = self.grouped[piece]
        read = {"rows": _json_rows, "fasta": _records, "parquet": _parquet_rows}
        for number, unit in enumerate(units):
            kind = _kind(unit.path)
            if kind == "text":
                yield from self._text(unit)
                continue
            parts = read[kind](unit, self.column)
            if not self.joined or kind == "fasta":
                yield from parts
                continue
            last = piece == self.pieces - 1 and number == len(units) - 1
            yield from joined(parts, first=piece == 0 and number == 0, last=last)

    def _units(self, path: Path) -> Iterator[_Unit]:
        kind, size = _kind(path), path.stat().st_size
        if kind == "parquet":
            groups = _parquet(path).metadata
            for group in range(groups.num_row_groups):
                yield _Unit(path, group, group + 1, groups.row_group(group).total_byte_size)
            return
        if path.suffix in PACKED:
            # of unknown length, and read from its begin alone
            yield _Unit(path, 0, -1, PIECE)
            return
        first, last = (0, size) if self.span is None else self.span
        for start in range(first, last, PIECE):
            yield _Unit(path, start, min(start + PIECE, last), min(PIECE, last - start))

    def _text(self, unit: _Unit) -> Iterator[Part]:
        with _opened(unit.path) as opened:
            packed = unit.stop < 0
            # going back in a packed file would unpack it from its begin
            file = io.BytesIO(opened.read()) if packed else opened
            size = file.seek(0, io.SEEK_END)
            first, last = self.span or (0, size)
            if last > size:
                raise ValueError(f"{unit.path} has {size} bytes and cannot be cut at byte {last}; it may be cut short")
            unit = unit._replace(start=first, stop=last) if packed else unit
            at, stop = (_cut(file, place, first, last) for place in (unit.start, unit.stop))
            while at < stop:
                end = min(_cut(file, at + PART, first, last), stop)
                file.seek(at)
                where = f"{unit.path}, from byte {at} on"
                # the name of a file, and not where the folder lies
                yield Part(file.read(end - at), unit.path.name.encode(), where, at == first, end == last)
                at = end


def joined(parts: Iterator[Part], *, first: bool, last: bool) -> Iterator[Part]:
    """Rows as parts of one document, which begins with the first of them, or ends with the last, or neither."""
    before = None
    for part in parts:
        if before is not None:
            yield before
            first = False
        before = part._replace(begins=first, ends=False)
    if before is not None:
        yield before._replace(ends=last)


class Rows:
    """The rows of a data set of the package datasets, which lies on the disk.

    Args:
        data: ``datasets.Dataset``.
        name: What it is, for messages.
        column: Which column is the text.
        joined: Whether all rows are parts of one document.

    Raises:
        ValueError: If there is no such column, or no row.
    """

    def __init__(self, data: Any, name: str, column: str, joined: bool) -> None:
        if column not in data.column_names:
            raise ValueError(
                f"{name} has no column {column!r}, it has {', '.join(data.column_names)}; name --data.column"
            )
        self.data, self.name, self.column, self.joined = data.select_columns([column]), name, column, joined
        self.rows = max(1, PIECE * max(len(data), 1) // max(self.data.data.nbytes, 1))
        self.fingerprint = data._fingerprint
        self.pieces = -(-len(data) // self.rows)

    def identity(self) -> Any:
        """What the package knows the contents by."""
        return {"rows": self.fingerprint, "column": self.column, "joined": self.joined, "piece": self.rows}

    def parts(self, piece: int) -> Iterator[Part]:
        """The documents of a range of rows."""
        first, last = piece * self.rows, min((piece + 1) * self.rows, len(self.data))
        found = (
            row_part(text, f"{self.name}, row {row}", self.column)
            for row, text in zip(range(first, last), self.data[first:last][self.column], strict=True)
        )
        return joined(found, first=piece == 0, last=piece == self.pieces - 1) if self.joined else found


def row_part(text: Any, where: str, column: str) -> Part:
    """A row's text as a document.

    Raises:
        ValueError: If it is no text.
    """
    if not isinstance(text, str):
        raise ValueError(f"{where}: {column!r} must be text, got {type(text).__name__}; name --data.column")
    encoded = text.encode("utf-8", "surrogatepass")
    return Part(encoded, encoded, where)


def _kind(path: Path) -> str:
    suffixes = [suffix for suffix in path.suffixes if suffix not in PACKED]
    last = suffixes[-1] if suffixes else ""
    return "rows" if last in ROWS else "fasta" if last in FASTA else "parquet" if last == ".parquet" else "text"


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """A file, unpacked where it is packed; what is wrong with it is a ValueError that names it."""
    try:
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
                if len(names) != 1:
                    raise ValueError(f"{path} must hold one file, it holds {len(names)}; unpack it")
                with archive.open(names[0]) as file:
                    yield file
        else:
            with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
                yield cast("IO[bytes]", file)
    except (EOFError, zlib.error, zipfile.BadZipFile, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is damaged or cut short: {error}; download it again") from error


def _cut(file: IO[bytes], place: int, first: int, last: int) -> int:
    """Where a text from ``first`` to ``last`` can be cut at ``place`` or soon behind it."""
    if not first < place < last:
        return min(max(place, first), last)
    file.seek(place - 1)
    after = file.read(min(LINE, last - place + 1))
    end = after.find(b"\n")
    if end < 0:
        # continuation bytes of UTF-8, of which a character has three at most; the last one's may end the text
        rest = after[1:5] + b" "
        end = next((index for index in range(min(4, len(rest))) if rest[index] & 0xC0 != 0x80), 0)
    return place + end


def _lines(unit: _Unit) -> Iterator[tuple[int, int, bytes]]:
    """The lines that begin in a unit or behind it: offset in the file, number since the unit's begin, content."""
    with _opened(unit.path) as file:
        at = unit.start
        if at > 0:
            # what began before belongs to the unit before
            file.seek(at - 1)
            at += len(file.readline()) - 1
        for number, line in enumerate(file, start=1):
            yield at, number, line
            at += len(line)


def _line(unit: _Unit, number: int) -> str:
    """File and line, for messages: lines of the units before are counted where it is needed."""
    before, at, piece = 0, 0, b"\n"
    with unit.path.open("rb") as file:
        while at < unit.start:
            piece = file.read(min(PART, unit.start - at))
            before, at = before + piece.count(b"\n"), at + len(piece)
    # a line that goes on here is not the unit's
    before += not piece.endswith(b"\n")
    return f"{unit.path}, line {before + number}"


def _json_rows(unit: _Unit, column: str) -> Iterator[Part]:
    for at, number, line in _lines(unit):
        if 0 <= unit.stop <= at:
            return
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            short = "" if line.endswith(b"\n") else "; the file may be cut short"
            raise ValueError(f"{_line(unit, number)} is no JSON: {error}{short}") from error
        if not isinstance(row, dict) or column not in row:
            known = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            raise ValueError(f"{_line(unit, number)} has no {column!r}, it has {known}; name --data.column")
        text = row[column]
        # lines are counted for an error alone
        where = f"{unit.path}, byte {at}" if isinstance(text, str) else _line(unit, number)
        yield row_part(text, where, column)


def _records(unit: _Unit, column: str) -> Iterator[Part]:
    """The sequences of FASTA, in capital letters; a record belongs to where its ``>`` stands.

    The format is that of W. R. Pearson and D. J. Lipman, "Improved tools for biological sequence comparison" (1988):
    a line of a ``>`` and a name, then lines of letters.
    """
    name, lines, size, begins = None, [], 0, True

    def part(ends: bool) -> Part:
        where = f"{unit.path}, record {name.decode(errors='replace')}" if name is not None else ""
        return Part(b"".join(lines), unit.path.name.encode() + b"\0" + (name or b""), where, begins, ends)

    number = 0
    for at, number, line in _lines(unit):
        line = line.strip()
        if line.startswith(b">"):
            if name is not None:
                if begins and not size:
                    raise ValueError(
                        f"{_line(unit, number)}: the record {name.decode(errors='replace')!r} before it is empty"
                    )
                yield part(True)
            if 0 <= unit.stop <= at:
                return
            name, lines, size, begins = line[1:].strip(), [], 0, True
            continue
        if name is None and unit.start > 0:
            continue
        if name is None and line:
            raise ValueError(f"{_line(unit, number)}: FASTA begins with a line of '>' and a name, got {line[:20]!r}")
        wrong = line.translate(None, LETTERS + LETTERS.lower())
        if wrong:
            found = wrong[:1].decode("latin-1")
            raise ValueError(f"{_line(unit, number)}: a sequence has the letters {LETTERS.decode()}, got {found!r}")
        if size >= PART:
            yield part(False)
            lines, size, begins = [], 0, False
        lines.append(line.translate(READ))
        size += len(line)
    if name is not None:
        if begins and not size:
            raise ValueError(f"{_line(unit, number)}: the last record is empty; the file may be cut short")
        yield part(True)


def _parquet(path: Path) -> Any:
    # it comes with datasets
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"{path} is damaged, cut short, or no parquet file: {error}; download it again") from error


def _parquet_rows(unit: _Unit, column: str) -> Iterator[Part]:
    import pyarrow

    opened = _parquet(unit.path)
    names = opened.schema_arrow.names
    if column not in names:
        raise ValueError(f"{unit.path} has no column {column!r}, it has {', '.join(names)}; name --data.column")
    first = sum(opened.metadata.row_group(group).num_rows for group in range(unit.start))
    try:
        texts = opened.read_row_group(unit.start, columns=[column]).column(0).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        last = first + opened.metadata.row_group(unit.start).num_rows - 1
        raise ValueError(f"{unit.path}, rows {first} to {last}, is damaged: {error}; download it again") from error
    for row, text in enumerate(texts, start=first):
        yield row_part(text, f"{unit.path}, row {row}", column)
