"""What all data for next-token prediction have in common: windows or packed documents of tokens, in two sides."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import lightning.pytorch as lightning
import numpy as np
from numpy.typing import NDArray

from seqzoo.mixer import nearest
from seqzoo.models.tokenizer import ByteTokenizer, Tokenizer
from seqzoo.modules.options import check_count
from seqzoo.train.baselines import OrderTwoModel, compressed_bits_per_byte
from seqzoo.train.data.packed_documents import OPTIONS, PackedDocuments
from seqzoo.train.data.tokenised import Tokens
from seqzoo.train.data.windows import TrainingWindows, ValidationWindows, replica

# of data sets that are larger, baselines are fitted to so many bytes or tokens, and judged on so many
FITTED = 1 << 26
JUDGED = 1 << 24


class LanguageData(lightning.LightningDataModule):
    """Next-token prediction. What inherits says what is read.

    Args:
        context: Tokens of a window.
        batch_size: Windows of a step, in every process, or group of processes that share sequences.
        validation_streams: Streams in which the validation tokens are read, side by side.
        tokens: Where it is given, training reads no windows but documents, packed into batches of so many tokens.
        long: What becomes of a document longer than that.
        seed: Of the order.

    Attributes:
        tokenizer: What made the tokens.
        unit: What a document is, in the plural.
        sides: The tokens, by ``"training"``, ``"validation"`` and, where there is one, ``"test"``; empty before
            ``setup()``.

    Raises:
        ValueError: If a number is out of range.
    """

    unit = "documents"
    # of every token that of the other strand of DNA
    complement: NDArray[Any] | None = None

    def __init__(
        self, context: int, batch_size: int, validation_streams: int, tokens: int | None, long: str, seed: int
    ) -> None:
        super().__init__()
        check_count("context", context)
        check_count("batch_size", batch_size)
        check_count("validation_streams", validation_streams)
        self.context = context
        self.batch_size = batch_size
        self.validation_streams = validation_streams
        self.tokens: int | None = None
        self.long = long
        if tokens is not None:
            self.pack(tokens, long)
        self.seed = seed
        self.tokenizer: Tokenizer = ByteTokenizer()
        self.sides: dict[str, Tokens] = {}

    def pack(self, tokens: int, long: str) -> None:
        """Makes training read documents, packed into batches; arguments as of the class."""
        if check_count("tokens", tokens) < 2:
            raise ValueError(f"tokens must be at least 2, one to read and one to predict, got {tokens}")
        if long not in OPTIONS:
            raise ValueError(f"there is no long={long!r}; {nearest(long, OPTIONS)}")
        self.tokens, self.long = tokens, long

    def read(self) -> dict[str, Tokens]:
        """The tokens of all sides; sets the tokenizer where they are no bytes."""
        raise NotImplementedError

    def source(self) -> str:
        """Where the data lie, in words."""
        raise NotImplementedError

    @property
    def tokenizer_words(self) -> str:
        """What the tokens are, for messages."""
        return "bytes" if isinstance(self.tokenizer, ByteTokenizer) else "the tokens"

    @property
    def longest(self) -> tuple[str, int]:
        """How many tokens a model sees of one sequence, and which option says so."""
        window = ("data.context", self.context)
        if self.tokens is None:
            return window
        lengths = self._documents()[1]
        read = int(lengths.max()) if self.long == "carry" else min(int(lengths.max()), self.tokens)
        return max(window, ("the longest document", read), key=lambda pair: pair[1])

    def setup(self, stage: str | None = None) -> None:
        """Reads the data, once.

        Raises:
            ValueError: If they are missing, damaged or too few; a document is too long where that is an error.
        """
        if self.sides:
            return
        sides = self.read()
        for side, found in sides.items():
            needed = max(self.context + 1, 3) if side == "training" else 2
            if found.ids.size < needed:
                raise ValueError(f"{self.source()} gives {found.ids.size} {side} tokens, at least {needed} are needed")
        self.sides = sides
        if self.tokens is not None:
            self._packed(0, 1, 0)

    def side(self, name: str) -> Tokens:
        """The tokens of a side."""
        if not self.sides:
            raise RuntimeError("the data is read by setup(), which was not called")
        return self.sides[name]

    def train_dataloader(self) -> Iterable[Any]:
        """Batches from the step on at which the trainer stands."""
        trainer = self.trainer
        start = 0 if trainer is None else trainer.global_step * trainer.accumulate_grad_batches
        rank, world_size = replica(trainer)
        if self.tokens is not None:
            return self._packed(rank, world_size, start)
        return TrainingWindows(
            self.side("training").ids,
            context=self.context,
            batch_size=self.batch_size,
            seed=self.seed,
            rank=rank,
            start=start,
            complement=self.complement,
        )

    def val_dataloader(self) -> ValidationWindows:
        """All validation tokens."""
        return self._windows("validation")

    def test_dataloader(self) -> ValidationWindows:
        """All test tokens.

        Raises:
            ValueError: If there are none.
        """
        if "test" not in self.sides:
            raise ValueError(f"{self.source()} has no test side")
        return self._windows("test")

    def description(self) -> dict[str, str | int]:
        """What was read, for the record: sizes, and fingerprints by which a later run knows the same data."""
        found: dict[str, str | int] = {"folder": self.source()}
        for name in ("training", "validation"):
            side = self.side(name)
            found[f"{name}_{self.unit}"] = len(side.bounds) - 1
            found[f"{name}_bytes"] = side.bytes
            found[f"{name}_digest"] = side.digest
        return found

    def words(self, side: str) -> str:
        """How much a side has, in words."""
        # the package of callbacks imports the data
        from seqzoo.train.callbacks.progress import quantity

        found = self.side(side)
        return f"{quantity(float(found.bytes))}B of {len(found.bounds) - 1} {self.unit}"

    def bytes_per_token(self, side: str) -> float:
        """Of the texts of a side."""
        return self.side(side).bytes_per_token

    def text(self, side: str) -> bytes:
        """The bytes of a side's first tokens, of all where they are not many."""
        ids = self.side(side).ids[:JUDGED]
        return (
            ids.tobytes() if isinstance(self.tokenizer, ByteTokenizer) else self.tokenizer.decode(ids.tolist()).encode()
        )

    def baselines(self) -> dict[str, float]:
        """Bits per byte of the validation text without a neural network, the best first."""
        validation = self.side("validation")
        values = compressed_bits_per_byte(self.text("validation"))
        if isinstance(self.tokenizer, ByteTokenizer):
            training = self.side("training").ids[:FITTED]
            values["order-2 model"] = OrderTwoModel(training).bits_per_byte(validation.ids[:JUDGED])
            values["uniform"] = 8.0
        else:
            values |= {name: bits / validation.bytes_per_token for name, bits in self._bits_of_tokens().items()}
        return dict(sorted(values.items(), key=lambda item: item[1]))

    def _bits_of_tokens(self) -> dict[str, float]:
        """Bits of a validation token, by its frequency in training (each token counted once more) and by none."""
        size = self.tokenizer.vocab_size
        counts = np.bincount(self.side("training").ids[:FITTED], minlength=size) + 1
        judged = self.side("validation").ids[:JUDGED]
        bits = math.log2(int(counts.sum())) - float(np.log2(counts)[judged].mean())
        return {"frequencies of tokens": bits, "uniform": math.log2(size)}

    def _windows(self, side: str) -> ValidationWindows:
        return ValidationWindows(self.side(side).ids, context=self.context, streams=self.validation_streams)

    def _packed(self, rank: int, world_size: int, start: int) -> PackedDocuments:
        if self.tokens is None:
            raise RuntimeError("documents are packed where data.tokens is given")
        begins, lengths = self._documents()
        return PackedDocuments(
            self.side("training").ids,
            lengths,
            tokens=self.tokens,
            long=self.long,
            seed=self.seed,
            rank=rank,
            world_size=world_size,
            start=start,
            begins=begins,
            complement=self.complement,
        )

    def _documents(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Begins and lengths of the training documents that have something to predict."""
        bounds = self.side("training").bounds
        lengths = np.diff(bounds)
        kept = lengths > 1
        if not kept.any():
            raise ValueError(f"{self.source()} has no training {self.unit} of at least 2 tokens")
        return bounds[:-1][kept], lengths[kept]
