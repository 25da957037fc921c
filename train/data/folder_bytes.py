"""The bytes of a folder of files."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import lightning.pytorch as lightning

from seqzoo.train.baselines import Bytes
from seqzoo.train.data.files import digest, find_files, joined, read_bytes, read_parts, resolve_folder, split_files
from seqzoo.train.data.windows import TrainingWindows, ValidationWindows, replica


class FolderBytes(lightning.LightningDataModule):
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
        super().__init__()
        for name, value in (
            ("context", context),
            ("batch_size", batch_size),
            ("validation_streams", validation_streams),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0.0 < validation_fraction < 1.0:
            raise ValueError(f"validation_fraction must lie between 0 and 1, got {validation_fraction}")
        if not files:
            raise ValueError("files must name at least one pattern, got none")
        self.folder = folder
        self.files = files
        self.exclude = exclude
        self.validation_fraction = validation_fraction
        self.context = context
        self.batch_size = batch_size
        self.validation_streams = validation_streams
        self.seed = seed
        self.training_bytes: Bytes | None = None
        self.validation_bytes: Bytes | None = None
        self.training_lengths: list[int] = []
        self.counts: tuple[int, int] = (0, 0)

    @property
    def longest(self) -> tuple[str, int]:
        """How many bytes a model sees of one sequence, and which option says so."""
        return "data.context", self.context

    def setup(self, stage: str | None = None) -> None:
        """Reads the files, once.

        Raises:
            ValueError: If the folder is missing or empty, or one side of the split has too few bytes.
        """
        if self.training_bytes is not None:
            return
        folder = resolve_folder(self.folder)
        found = find_files(folder, self.files, self.exclude)
        training, validation = split_files(found, self.validation_fraction)
        parts = read_parts(folder, training)
        sides = {"training": joined(parts), "validation": read_bytes(folder, validation)}
        for name, needed in (("training", max(self.context + 1, 3)), ("validation", 2)):
            if sides[name].size < needed:
                raise ValueError(
                    f"the data folder {str(folder)!r} gives {sides[name].size} {name} bytes, at least {needed} are "
                    f"needed: of its {len(found)} files {len(training)} fell to training and {len(validation)} to "
                    f"validation (validation_fraction {self.validation_fraction}); add files or change the fraction"
                )
        self.counts = (len(training), len(validation))
        self.training_lengths = [part.size for part in parts]
        self.training_bytes, self.validation_bytes = sides["training"], sides["validation"]

    def train_dataloader(self) -> Iterable[Any]:
        """Batches from the step on at which the trainer stands."""
        training = _loaded(self.training_bytes)
        trainer = self.trainer
        return TrainingWindows(
            training,
            context=self.context,
            batch_size=self.batch_size,
            seed=self.seed,
            rank=replica(trainer)[0],
            start=0 if trainer is None else trainer.global_step * trainer.accumulate_grad_batches,
        )

    def val_dataloader(self) -> ValidationWindows:
        """All validation bytes."""
        return ValidationWindows(_loaded(self.validation_bytes), context=self.context, streams=self.validation_streams)

    def description(self) -> dict[str, str | int]:
        """What was read, for the record: sizes, and fingerprints by which a later run knows the same data."""
        training, validation = _loaded(self.training_bytes), _loaded(self.validation_bytes)
        return {
            "folder": str(resolve_folder(self.folder)),
            "training_files": self.counts[0],
            "training_bytes": training.size,
            "training_digest": digest(training),
            "validation_files": self.counts[1],
            "validation_bytes": validation.size,
            "validation_digest": digest(validation),
        }


def _loaded(data: Bytes | None) -> Bytes:
    if data is None:
        raise RuntimeError("the data is read by setup(), which was not called")
    return data
