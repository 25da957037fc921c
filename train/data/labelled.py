"""What all data that are judged by accuracy have in common: labelled examples in three splits."""

from __future__ import annotations

from collections.abc import Iterable

import lightning.pytorch as lightning

from seqzoo.modules.options import check_count
from seqzoo.train.data.examples import Batch, EvaluationBatches, Examples, TrainingBatches

SPLITS = ("training", "validation", "test")


class LabelledData(lightning.LightningDataModule):
    """Labelled examples in three splits; batches are the arguments of a model's ``loss``.

    Args:
        batch_size: Examples of a step, in every process.
        seed: Of the order; the command sets it from its own.

    Attributes:
        vocab_size: Tokens, or None where positions hold numbers.
        n_features: Numbers of a position, or None where they hold tokens.
        longest: Positions of a sequence, at most.
        folder: Where the data lie, or what makes them.
    """

    vocab_size: int | None = None
    n_features: int | None = None
    longest: int
    folder: str

    def __init__(self, batch_size: int, seed: int) -> None:
        super().__init__()
        self.batch_size = check_count("batch_size", batch_size)
        self.seed = seed
        self.splits: dict[str, Examples] = {}

    def read(self) -> dict[str, Examples]:
        """The examples of training, validation and test."""
        raise NotImplementedError(f"{type(self).__name__} must define read")

    def check_split(self, name: str, examples: Examples) -> None:
        """Raises ValueError where there is no example."""
        if len(examples.labels) == 0:
            raise ValueError(f"the {name} split of {self.folder} is empty; expected labelled examples")

    def setup(self, stage: str | None = None) -> None:
        """Reads or generates the data, once.

        Raises:
            FileNotFoundError: If released data are not there; says what to download.
            ValueError: If a split is empty or a label out of range; names the split.
        """
        if self.splits:
            return
        splits = self.read()
        for name, examples in splits.items():
            self.check_split(name, examples)
        self.splits = splits

    def train_dataloader(self) -> Iterable[Batch]:
        """Batches from the step on at which the trainer stands."""
        return TrainingBatches(
            self.examples("training"), batch_size=self.batch_size, seed=self.seed, start=self._start(), **self._place()
        )

    def val_dataloader(self) -> EvaluationBatches:
        """All validation examples."""
        return EvaluationBatches(self.examples("validation"), batch_size=self.batch_size, **self._place())

    def test_dataloader(self) -> EvaluationBatches:
        """All test examples."""
        return EvaluationBatches(self.examples("test"), batch_size=self.batch_size, **self._place())

    def examples(self, split: str) -> Examples:
        """The examples of a split.

        Raises:
            RuntimeError: If they were not read.
        """
        if not self.splits:
            raise RuntimeError("the data is read by setup(), which was not called")
        return self.splits[split]

    def description(self) -> dict[str, str | int]:
        """What was read, for the record: sizes, and fingerprints by which a later run knows the same data."""
        found: dict[str, str | int] = {"folder": self.folder}
        for name, examples in self.splits.items():
            found[f"{name}_examples"] = len(examples.labels)
            found[f"{name}_digest"] = examples.digest
        return found

    def words(self) -> str:
        """Where the data lie, and how many examples there are."""
        sizes = [f"{len(self.examples(split).labels)} to {verb}" for split, verb in VERBS.items()]
        return f"{self.folder}: {', '.join(sizes)}"

    def baselines(self) -> dict[str, float]:
        """Accuracies on the test examples that need no model."""
        raise NotImplementedError(f"{type(self).__name__} must define baselines")

    def _start(self) -> int:
        trainer = self.trainer
        return 0 if trainer is None else trainer.global_step * trainer.accumulate_grad_batches

    def _place(self) -> dict[str, int]:
        trainer = self.trainer
        return {
            "rank": 0 if trainer is None else trainer.global_rank,
            "world_size": 1 if trainer is None else trainer.world_size,
        }


VERBS = {"training": "train on", "validation": "validate", "test": "test"}
