"""The bytes of a folder of files."""

from __future__ import annotations

import numpy as np

from seqzoo.train.data.files import digest, find_files, joined, read_parts, resolve_folder, split_files
from seqzoo.train.data.language import LanguageData
from seqzoo.train.data.tokenised import Tokens


class FolderBytes(LanguageData):
    """Next-byte prediction on the files of a folder, split by file into training and validation.

    Args:
        folder: Where the files are; "{stdlib}" is the source of the running Python's standard library.
        files: Patterns of the names (or relative paths) of files that are read.
        exclude: Patterns of the names of files and folders that are left out.
        validation_fraction: Share of the files that is held out, chosen by a hash of the path.
        context: Bytes of a window.
        batch_size: Windows of a step, in every process, or group of processes that share sequences.
        validation_streams: Streams in which the validation bytes are read, side by side.
        seed: Seed of the order of the windows; the command sets it from its own.
    """

    unit = "files"

    def __init__(
        self,
        folder: str = "{stdlib}",
        files: list[str] = ["*.py"],  # noqa: B006 the command line shows this default, and nothing changes it
        exclude: list[str] = ["site-packages", "dist-packages", "test", "tests", "__pycache__"],  # noqa: B006
        validation_fraction: float = 0.05,
        context: int = 512,
        batch_size: int = 16,
        validation_streams: int = 16,
        seed: int = 0,
    ) -> None:
        super().__init__(context, batch_size, validation_streams, None, "carry", seed)
        if not 0.0 < validation_fraction < 1.0:
            raise ValueError(f"validation_fraction must lie between 0 and 1, got {validation_fraction}")
        if not files:
            raise ValueError("files must name at least one pattern, got none")
        self.folder = folder
        self.files = files
        self.exclude = exclude
        self.validation_fraction = validation_fraction

    def read(self) -> dict[str, Tokens]:
        """Reads the files.

        Raises:
            ValueError: If the folder is missing or empty, or one side of the split has too few bytes.
        """
        folder = resolve_folder(self.folder)
        found = find_files(folder, self.files, self.exclude)
        training, validation = split_files(found, self.validation_fraction)
        sides = {}
        wanted = (("training", training, max(self.context + 1, 3)), ("validation", validation, 2))
        for side, names, needed in wanted:
            parts = read_parts(folder, names)
            ids = joined(parts)
            if ids.size < needed:
                raise ValueError(
                    f"the data folder {str(folder)!r} gives {ids.size} {side} bytes, at least {needed} are needed: of "
                    f"its {len(found)} files {len(training)} fell to training and {len(validation)} to validation "
                    f"(validation_fraction {self.validation_fraction}); add files or change the fraction"
                )
            bounds = np.cumsum([0, *(part.size for part in parts)])
            sides[side] = Tokens(ids, bounds, ids.size, digest(ids))
        return sides

    def source(self) -> str:
        """The folder."""
        return str(resolve_folder(self.folder))
