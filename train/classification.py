"""The Lightning modules that are judged by accuracy: classifiers of sequences, of pairs, and of tokens."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from seqzoo.models import ClassifierConfig, DualEncoder, LanguageModel, ModelConfig, SequenceClassifier
from seqzoo.train.data.diagnostic_data import Diagnostic
from seqzoo.train.data.examples import Batch
from seqzoo.train.data.labelled import LabelledData
from seqzoo.train.data.lra import ClassificationData
from seqzoo.train.data.windows import IGNORED
from seqzoo.train.finite import check_finite
from seqzoo.train.optimisation import OptimisedModule


class LabellingModule(OptimisedModule):
    """A model that is judged by its accuracy. What inherits says how a batch is scored.

    A batch holds the keyword arguments of the model's ``loss``: ``x``, ``labels`` and, where sequences are of unequal
    lengths, ``lengths``.

    Attributes:
        data_kind: The data that it takes.
    """

    data_kind: ClassVar[type[LabelledData]]

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._sums = torch.zeros(3, dtype=torch.float64)

    def loss(self, batch: Batch) -> Tensor:
        """The mean loss of a batch."""
        return self.model.loss(**batch)

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """The mean loss of a batch, ``loss``, and the same as a number to be shown, ``total``.

        Raises:
            NonFiniteLoss: If it is NaN or infinite; names the layer that first made it so.
        """
        loss = self.loss(batch)
        inputs = {name: part for name, part in batch.items() if name not in ("x", "labels")}
        check_finite(loss, self.model, batch["x"], step=self.trainer.global_step, batch=batch_idx, **inputs)
        return {"loss": loss, "total": loss.detach()}

    def on_validation_epoch_start(self) -> None:
        """Forgets what the validation before has counted."""
        self._sums = torch.zeros(3, dtype=torch.float64, device=self.device)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Adds a batch."""
        self._sums += self.score(batch)

    def on_validation_epoch_end(self) -> None:
        """Makes ``validation_accuracy`` and ``validation_loss`` known to callbacks."""
        self._make_known("validation")

    def on_test_epoch_start(self) -> None:
        """Forgets what was counted before."""
        self.on_validation_epoch_start()

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Adds a batch."""
        self._sums += self.score(batch)

    def on_test_epoch_end(self) -> None:
        """Makes ``test_accuracy`` and ``test_loss`` known to callbacks."""
        self._make_known("test")

    def score(self, batch: Batch) -> Tensor:
        """Right answers, summed loss and number of answers, float64 ``(3,)``."""
        raise NotImplementedError(f"{type(self).__name__} must define score")

    @torch.no_grad()
    def judge(self, batches: Iterable[Batch]) -> dict[str, Any]:
        """Accuracy and mean loss over all examples of some batches, and their number, with dropout off."""
        training = self.training
        self.eval()
        sums = torch.zeros(3, dtype=torch.float64)
        for batch in batches:
            sums += self.score({name: _moved(part, self.device) for name, part in batch.items()}).cpu()
        self.train(training)
        right, loss, count = sums.tolist()
        return {"accuracy": right / max(count, 1), "loss": loss / max(count, 1), "examples": int(count)}

    def _make_known(self, split: str) -> None:
        right, loss, count = self.trainer.strategy.reduce(self._sums, reduce_op="sum").tolist()
        self.log(f"{split}_accuracy", right / max(count, 1.0), logger=False)
        self.log(f"{split}_loss", loss / max(count, 1.0), logger=False)


class ClassificationModule(LabellingModule):
    """Classification of sequences with AdamW.

    A batch holds the keyword arguments of :meth:`seqzoo.models.SequenceClassifier.loss`: ``x``, ``labels`` and, where
    sequences are of unequal lengths, ``lengths``; of pairs, ``x`` has all first sequences and then all second ones.

    Args:
        config: The model.
        pairs: Whether an example is two sequences (:class:`seqzoo.models.DualEncoder`).
        lr: Highest learning rate.
        weight_decay: Of matrices; modules may ask for their own.
        beta1: AdamW's average of gradients.
        beta2: AdamW's average of squared gradients.
        warmup_steps: Updates in which the learning rate rises.
        schedule: How it falls: "cosine", "linear", "wsd", "rex", "inverse_sqrt", "constant", "refined" or
            "schedule_free".
        refined_from: For "refined", the folder of the run by whose gradient norms it is.
        seed: Seed of the dropout; the command sets it from its own.
    """

    data_kind = ClassificationData

    def __init__(
        self,
        config: ClassifierConfig,
        pairs: bool = False,
        lr: float = 1e-3,
        weight_decay: float = 0.05,
        beta1: float = 0.9,
        beta2: float = 0.999,
        warmup_steps: int = 1000,
        schedule: str = "cosine",
        refined_from: str | None = None,
        seed: int = 0,
    ) -> None:
        model = DualEncoder(config) if pairs else SequenceClassifier(config)
        super().__init__(model, lr, weight_decay, (beta1, beta2), warmup_steps, schedule, seed, refined_from)
        self.pairs = pairs

    def check_data(self, data: ClassificationData) -> None:
        """Raises ValueError unless the model takes the sequences and tells as many classes as the data have."""
        config = self.model.config
        if self.pairs != data.pairs:
            kind = "pairs" if data.pairs else "single sequences"
            raise ValueError(f"the data are {kind}: model.pairs must be {str(data.pairs).lower()}, got {self.pairs}")
        for name in ("vocab_size", "n_features"):
            wanted, given = getattr(data, name), getattr(config, name)
            # a larger vocabulary has room for all tokens
            if wanted != given and not (name == "vocab_size" and None not in (wanted, given) and given > wanted):
                raise ValueError(f"the data need model.config.{name} {wanted}, got {given}")
        if config.n_classes != data.n_classes:
            raise ValueError(f"the data need model.config.n_classes {data.n_classes}, got {config.n_classes}")
        check_positions(config.max_positions, data.longest)

    def score(self, batch: Batch) -> Tensor:
        """Right answers, summed loss and number of examples, float64 ``(3,)``."""
        scores = self.model(**{name: part for name, part in batch.items() if name != "labels"}).float()
        return score_sums(scores, batch["labels"])


class TokenClassification(LabellingModule):
    """A language model that answers at some tokens, with AdamW; the diagnostics are of this kind.

    A batch holds ``x`` and ``labels``, both int64 ``(B, T)``; labels are -100 where nothing is asked.

    Args:
        config: The model.
        lr: Highest learning rate.
        weight_decay: Of matrices; modules may ask for their own.
        beta1: AdamW's average of gradients.
        beta2: AdamW's average of squared gradients.
        warmup_steps: Updates in which the learning rate rises.
        schedule: How it falls, as of :class:`ClassificationModule`.
        refined_from: For "refined", the folder of the run by whose gradient norms it is.
        seed: Seed of the dropout; the command sets it from its own.
    """

    data_kind = Diagnostic

    def __init__(
        self,
        config: ModelConfig,
        lr: float = 3e-3,
        weight_decay: float = 0.1,
        beta1: float = 0.9,
        beta2: float = 0.95,
        warmup_steps: int = 100,
        schedule: str = "cosine",
        refined_from: str | None = None,
        seed: int = 0,
    ) -> None:
        model = LanguageModel(config)
        super().__init__(model, lr, weight_decay, (beta1, beta2), warmup_steps, schedule, seed, refined_from)

    def check_data(self, data: Diagnostic) -> None:
        """Raises ValueError unless the model has all tokens and positions of the data, which were drawn."""
        config = self.model.config
        if data.vocab_size is not None and config.vocab_size < data.vocab_size:
            raise ValueError(
                f"{data.name} needs model.config.vocab_size of at least {data.vocab_size}, got {config.vocab_size}"
            )
        check_positions(config.max_positions, data.longest)

    def loss(self, batch: Batch) -> Tensor:
        """The mean loss over the tokens that are asked for."""
        return self.model.loss(batch["x"], batch["labels"])

    def score(self, batch: Batch) -> Tensor:
        """Right answers, summed loss and number of answers, float64 ``(3,)``."""
        logits, _ = self.model(batch["x"])
        asked = batch["labels"] != IGNORED
        return score_sums(logits[asked].float(), batch["labels"][asked])


def check_positions(known: int | None, longest: int) -> None:
    """Raises ValueError where a model has fewer positions than the longest sequence."""
    if known is not None and known < longest:
        raise ValueError(f"model.config.max_positions must be at least the longest sequence, {longest}, got {known}")


def score_sums(scores: Tensor, labels: Tensor) -> Tensor:
    """Right answers, summed cross entropy and number of scores ``(n, classes)``, float64 ``(3,)``."""
    right = (scores.argmax(-1) == labels).sum()
    loss = F.cross_entropy(scores, labels, reduction="sum")
    return torch.stack((right.double(), loss.double(), right.new_tensor(len(labels)).double()))


def _moved(part: Any, device: torch.device) -> Any:
    return part.to(device) if isinstance(part, Tensor) else part
