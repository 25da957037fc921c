"""Files and folders appear whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from seqzoo.hub import files
from seqzoo.hub.files import WriteError, atomic_file, atomic_folder


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def fill(folder: Path, text: str) -> None:
    (folder / "inner").mkdir()
    (folder / "a.txt").write_text(text)
    (folder / "inner" / "b.txt").write_text(text)


def test_a_file_appears_at_the_end(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with atomic_file(path) as file:
        file.write("é\n")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_bytes() == "é\n".encode()
    with atomic_file(path, "wb") as file:
        file.write(b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert names(tmp_path) == ["a.txt"]


def test_a_file_keeps_its_content_when_the_block_raises(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write() -> None:
        with atomic_file(path) as file:
            file.write("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(*((os, "fsync") if call == "fsync" else (Path, "replace")), full)
    with (
        pytest.raises(WriteError, match=r"could not write the log to .*a.txt: No space left") as caught,
        atomic_file(path, what="the log") as file,
    ):
        file.write("new")
    assert caught.value.errno == errno.ENOSPC
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_a_missing_folder_is_named(tmp_path: Path):
    with (
        pytest.raises(WriteError, match=r"could not write a file to .*none.*No such file"),
        atomic_file(tmp_path / "none" / "a.txt"),
    ):
        pass
    with pytest.raises(ValueError, match="mode must be 'w' or 'wb', got 'a'"), atomic_file(tmp_path / "a", "a"):
        pass


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_is_replaced_as_a_whole(exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    path = tmp_path / "new" / "model"
    for text in ("first", "second"):
        with atomic_folder(path) as folder:
            fill(folder, text)
            if text == "first":
                (folder / "only first").touch()
            else:
                assert (path / "a.txt").read_text() == "first"
        assert (path / "a.txt").read_text() == (path / "inner" / "b.txt").read_text() == text
    assert names(path) == ["a.txt", "inner"]
    assert names(path.parent) == ["model"]


def test_linux_exchanges_in_one_step(tmp_path: Path):
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    other.mkdir()
    (one / "a").touch()
    if not files._exchange(one, other):
        pytest.skip("no renameat2 on this system or file system")
    assert names(other) == ["a"]
    assert names(one) == []
    with pytest.raises(FileNotFoundError):
        files._exchange(one, tmp_path / "none")


def test_a_folder_keeps_its_content_when_the_block_raises(tmp_path: Path):
    path = tmp_path / "model"
    path.mkdir()
    (path / "a.txt").write_text("old")

    def write(error: BaseException) -> None:
        with atomic_folder(path, what="a model") as folder:
            fill(folder, "new")
            raise error

    with pytest.raises(WriteError, match=r"could not write a model to .*model: No space left.*untouched"):
        write(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    with pytest.raises(RuntimeError, match=r"^mine$"):
        write(RuntimeError("mine"))
    assert (path / "a.txt").read_text() == "old"
    assert names(tmp_path) == ["model"]


def test_the_last_rename_may_fail_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "model"
    path.mkdir()
    (path / "a.txt").write_text("old")
    monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.suffix == ".tmp":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(WriteError, match="Input/output error"), atomic_folder(path) as folder:
        fill(folder, "new")
    assert names(path) == ["a.txt"]
    assert names(tmp_path) == ["model"]


def test_a_replacement_that_died_between_its_moves_is_undone(tmp_path: Path):
    path = tmp_path / "model"
    aside = files.previous(path)
    aside.mkdir()
    (aside / "a.txt").write_text("old")

    def look() -> None:
        with atomic_folder(path):
            raise KeyError((path / "a.txt").read_text())

    with pytest.raises(KeyError, match="old"):
        look()
    assert names(tmp_path) == ["model"]
    aside.mkdir()
    with atomic_folder(path) as folder:
        fill(folder, "new")
    assert names(tmp_path) == ["model"]


def test_links_are_followed(tmp_path: Path):
    (tmp_path / "step_1").mkdir()
    (tmp_path / "last").symlink_to("step_1")
    with atomic_folder(tmp_path / "last") as folder:
        fill(folder, "new")
    assert (tmp_path / "last").is_symlink()
    assert names(tmp_path / "step_1") == ["a.txt", "inner"]


def test_a_file_in_the_way_is_not_removed(tmp_path: Path):
    (tmp_path / "model").write_text("precious")
    with pytest.raises(WriteError, match="a file of that name is in the way"), atomic_folder(tmp_path / "model"):
        pass
    assert (tmp_path / "model").read_text() == "precious"
