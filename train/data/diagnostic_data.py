"""A synthetic diagnostic as data: every step of training has new sequences, and judging its own."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from seqzoo.modules.options import check_count
from seqzoo.train.data.diagnostics import diagnostic, vocabulary
from seqzoo.train.data.examples import Batch, Examples, fingerprint
from seqzoo.train.data.labelled import VERBS, LabelledData
from seqzoo.train.data.windows import IGNORED

Draw = Callable[..., tuple[Tensor, Tensor]]
# batches of training are numbered from 2^40 times the seed on, which never comes to these
NUMBERS = {"validation": 2**120, "test": 2**120 + 1}


class Diagnostic(LabelledData):
    """Sequences with a label at every token that is asked for, drawn by :mod:`seqzoo.train.data.diagnostics`.

    No sequence of training comes twice. Test sequences may be other ones than those of training, longer for instance,
    which is what tells whether a model has learned the rule.

    Args:
        name: Of the diagnostic: mqar, selective-copying, induction-heads, parity, modular-sum, group-words,
            cycle-navigation, set-disjointness, or MAD's.
        options: Of the diagnostic, as its function has them: ``{"length": 64, "n_tokens": 4}``.
        test_options: Those of them that test sequences have otherwise.
        validation_examples: Sequences to validate.
        test_examples: To test.
        data_seed: Of all sequences.
        batch_size: Sequences of a step, in every process.
        seed: Which of the endless sequences are trained on; the command sets it from its own.

    Raises:
        TypeError: If the diagnostic has no such option, or lacks one.
        ValueError: If there is no such diagnostic, or a value is out of range.
    """

    def __init__(
        self,
        name: str = "selective-copying",
        options: dict[str, Any] = {"length": 64},  # noqa: B006 the command line shows this default
        test_options: dict[str, Any] = {},  # noqa: B006
        validation_examples: int = 500,
        test_examples: int = 1000,
        data_seed: int = 0,
        batch_size: int = 64,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, seed)
        self.name = name
        self.counts = {
            "validation": check_count("validation_examples", validation_examples),
            "test": check_count("test_examples", test_examples),
        }
        self.data_seed = data_seed
        self.judged: dict[str, Drawn] = {}
        self.draws = {
            "training": diagnostic(name, **options),
            "validation": diagnostic(name, **options),
            "test": diagnostic(name, **{**options, **test_options}),
        }
        self._sizes = [vocabulary(name, **given) for given in (options, {**options, **test_options})]
        words = ", ".join(f"{word} {value}" for word, value in options.items())
        longer = ", ".join(f"{word} {value}" for word, value in test_options.items())
        self.folder = f"{name} ({words}{f'; test: {longer}' if longer else ''})"

    def read(self) -> dict[str, Examples]:
        """Draws what is judged."""
        for split, count in self.counts.items():
            ids, labels = self.draws[split](self.data_seed, NUMBERS[split], batch_size=count)
            if ids.shape != labels.shape:
                raise ValueError(
                    f"{self.name} wants answers that its tokens do not have a place for, {tuple(labels.shape)} for "
                    f"{tuple(ids.shape)}; train it with a model of its own (seqzoo.train.data.mad.Decompressor)"
                )
            self.judged[split] = Drawn(ids, labels)
        return dict(self.judged)

    def setup(self, stage: str | None = None) -> None:
        """Draws what is judged, once.

        Raises:
            ValueError: If an option of the diagnostic is out of range.
        """
        super().setup(stage)
        # of all that can be drawn: few sequences need not have the last id
        self.vocab_size = max(self._sizes)
        self.longest = max(one.ids.shape[1] for one in self.judged.values())

    def train_dataloader(self) -> Iterator[Batch]:
        """Endless batches from the step on at which the trainer stands."""
        place = self._place()
        for number in itertools.count(self._start()):
            index = (self.seed << 40) + number * place["world_size"] + place["rank"]
            ids, labels = self.draws["training"](self.data_seed, index, batch_size=self.batch_size)
            yield {"x": ids, "labels": labels}

    def words(self) -> str:
        """Which diagnostic it is, and how many sequences are judged."""
        sizes = ", ".join(f"{count} to {VERBS[split]}" for split, count in self.counts.items())
        return f"{self.folder}: new sequences to train on, {sizes}"

    def baselines(self) -> dict[str, float]:
        """The accuracy of the commonest label, and of a guess among the labels that occur, on the test sequences."""
        counts = [np.unique(self.asked(split), return_counts=True) for split in ("validation", "test")]
        common = counts[0][0][counts[0][1].argmax()]
        return {"chance": 1 / len(counts[1][0]), "most frequent label": float((self.asked("test") == common).mean())}

    def asked(self, split: str) -> NDArray[np.int64]:
        """All labels of a split, without those of tokens that are not asked for, int64 ``(n,)``."""
        labels = self.judged[split].labels
        return labels[labels != IGNORED]


class Drawn:
    """Sequences with labels at their tokens, both int64 ``(n, T)``; batches hold them as ``x`` and ``labels``.

    Args:
        ids: The tokens.
        labels: What is asked for; -100 where nothing is.
    """

    def __init__(self, ids: Tensor, labels: Tensor) -> None:
        self._ids, self._labels = ids, labels
        self.ids: NDArray[np.int64] = ids.numpy()
        self.labels: NDArray[np.int64] = labels.numpy()

    @property
    def digest(self) -> str:
        """A fingerprint of both."""
        return fingerprint(self.ids, self.labels)

    def batch(self, indices: NDArray[np.int64]) -> Batch:
        """The sequences of some indices."""
        return {"x": self._ids[indices], "labels": self._labels[indices]}
