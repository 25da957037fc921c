"""The files of a folder as documents of their own lengths, packed into batches of one row."""

from __future__ import annotations

from seqzoo.train.data.folder_bytes import FolderBytes


class FolderDocuments(FolderBytes):
    """Next-byte prediction on the files of a folder, each a document of its own, packed into batches of one row.

    Validation reads its files as :class:`FolderBytes` does, in windows with the state handed on.

    Args:
        folder: Where the files are; "{stdlib}" is the source of the running Python's standard library.
        files: Patterns of the names (or relative paths) of files that are read.
        exclude: Patterns of the names of files and folders that are left out.
        validation_fraction: Share of the files that is held out, chosen by a hash of the path.
        tokens: Bytes of a training batch, at most, in every process, or group of processes that share sequences.
        long: What becomes of a file longer than that: "carry" cuts it into batches that follow one another, from each
            of which the next takes the state, without gradients; "truncate" keeps its beginning, "drop" leaves it out,
            "error" refuses it.
        context: Bytes of a window in validation.
        validation_streams: Streams in which the validation bytes are read, side by side.
        seed: Seed of the order of the documents; the command sets it from its own.
    """

    def __init__(
        self,
        folder: str = "{stdlib}",
        files: list[str] = ["*.py"],  # noqa: B006 the command line shows this default, and nothing changes it
        exclude: list[str] = ["site-packages", "dist-packages", "test", "tests", "__pycache__"],  # noqa: B006
        validation_fraction: float = 0.05,
        tokens: int = 4096,
        long: str = "carry",
        context: int = 512,
        validation_streams: int = 16,
        seed: int = 0,
    ) -> None:
        super().__init__(folder, files, exclude, validation_fraction, context, 1, validation_streams, seed)
        self.pack(tokens, long)
