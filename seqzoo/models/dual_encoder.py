"""The classifier of pairs of sequences: one encoder for both, one score a class out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqzoo.models.classifier import SequenceClassifier
from seqzoo.models.config import ClassifierConfig
from seqzoo.models.registry import register_model
from seqzoo.packing import Packing


class PairHead(nn.Module):
    """Scores of the classes from what was pooled of both sequences, ``MLP([a, b, a * b, a - b])`` with a GELU.

    Args:
        d_model: Width of a and of b, and of the layer between.
        n_classes: Classes.
    """

    def __init__(self, d_model: int, n_classes: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(4 * d_model, d_model)
        self.out = nn.Linear(d_model, n_classes)

    def forward(self, features: Tensor) -> Tensor:
        """Maps ``(B, 4 * d_model)`` to ``(B, n_classes)``."""
        return self.out(F.gelu(self.hidden(features)))

    def reset_parameters(self) -> None:
        """PyTorch's initialisation of linear maps."""
        self.hidden.reset_parameters()
        self.out.reset_parameters()


@register_model("dual_encoder")
class DualEncoder(SequenceClassifier):
    """A :class:`SequenceClassifier` of pairs, as Long Range Arena's retrieval of documents asks for.

    ("Long Range Arena", https://arxiv.org/abs/2011.04006, section 2.2.3, with the features of "Supervised Learning of
    Universal Sentence Representations", https://arxiv.org/abs/1705.02364, section 3.1, their difference with its sign.)
    Both sequences of a pair go through the same embedding and backbone and are pooled, to a and b; the output is
    :class:`PairHead`'s. It tells (a, b) from (b, a).

    ``forward`` and ``loss`` are those of the base class on twice as many sequences, the first ones of all pairs and
    then the second ones: ``x`` is ``(2 B, T)``, as ``torch.cat((first, second))`` makes it, with ``lengths``
    ``(2 B,)``, or ``(1, T)`` with ``cu_seqlens`` of 2 S sequences. Scores and labels are one a pair, ``(B, n_classes)``
    and ``(B,)``, and an odd number of sequences is a ValueError.

    Args:
        config: What to build.
    """

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__(config)
        self.head = PairHead(config.d_model, config.n_classes)

    def _pool(self, hidden: Tensor, packing: Packing | None) -> Tensor:
        pooled = super()._pool(hidden, packing)
        if len(pooled) % 2:
            raise ValueError(
                f"a batch holds the first sequences of all pairs and then the second ones, an even number, got "
                f"{len(pooled)}"
            )
        first, second = pooled.chunk(2)
        return torch.cat((first, second, first * second, first - second), -1)
