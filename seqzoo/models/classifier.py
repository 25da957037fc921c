"""The classifier of sequences: tokens or numbers in, one score a class out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqzoo.kernels.checks import REAL, accumulator
from seqzoo.models.backbone import Backbone
from seqzoo.models.config import ClassifierConfig
from seqzoo.models.padding import Inputs, check_ids, embed, unpad
from seqzoo.models.registry import register_model
from seqzoo.packing import Packing


@register_model("sequence_classifier")
class SequenceClassifier(nn.Module):
    """An embedding of tokens or a linear map of numbers, a backbone, and a linear output over classes.

    What is classified is the mean of a sequence's outputs, its last or its first: of true tokens alone, for padding is
    taken out before the backbone. A sequence without tokens has zeros there, and so the output's bias.

    Args:
        config: What to build.
    """

    config_class = ClassifierConfig

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = None if config.vocab_size is None else nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = None if config.n_features is None else nn.Linear(config.n_features, config.d_model)
        self.backbone = Backbone(config)
        self.head = nn.Linear(config.d_model, config.n_classes)
        if not self.head.weight.is_meta:
            self._reset_ends()

    def forward(
        self,
        x: Tensor,
        *,
        cu_seqlens: Tensor | Packing | None = None,
        lengths: Sequence[int] | Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Maps sequences to the scores of the classes.

        At most one of ``cu_seqlens``, ``lengths`` and ``attention_mask`` may be given.

        Args:
            x: int64 or int32 ``(B, T)``, or numbers ``(B, T, F)`` of the parameters' dtype.
            cu_seqlens: Boundaries of packed sequences, int32 ``(S + 1,)`` from 0 to T, or a Packing; B is then 1.
            lengths: Tokens of each row ``(B,)``, padding behind them.
            attention_mask: ``(B, T)``, true or 1 at tokens, which are contiguous in each row (left or right padding).

        Returns:
            ``(B, n_classes)``, packed ``(S, n_classes)``.

        Raises:
            TypeError: If a dtype is wrong.
            ValueError: If ids lie outside the vocabulary (on the CPU), the mask has holes, or shapes do not fit.
        """
        return self._scores(self._inputs(x, cu_seqlens, lengths, attention_mask))[0]

    def loss(
        self,
        x: Tensor,
        labels: Tensor,
        *,
        cu_seqlens: Tensor | Packing | None = None,
        lengths: Sequence[int] | Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """The mean cross entropy over the sequences, and ``auxiliary_weight`` times the mixers' own losses.

        Args:
            x: As of :meth:`forward`, like all but the next.
            labels: The class of each sequence, int64 or int32 ``(B,)``, packed ``(S,)``.

        Returns:
            A scalar.

        Raises:
            ValueError: If there is not one label a sequence, or as :meth:`forward` does.
        """
        inputs = self._inputs(x, cu_seqlens, lengths, attention_mask)
        check_ids("labels", labels, 1, "(sequences,)")
        scores, auxiliary = self._scores(inputs)
        if len(labels) != len(scores):
            raise ValueError(f"labels must be one for each of the {len(scores)} sequences, got {len(labels)}")
        return F.cross_entropy(scores, labels.to(torch.int64)) + self.config.auxiliary_weight * auxiliary

    def reset_parameters(self) -> None:
        """Initialises every parameter and buffer; the embedding normal of deviation 1, PyTorch's for linear maps."""
        self._reset_ends()
        self.backbone.reset_parameters()

    def _reset_ends(self) -> None:
        for part in (self.embedding, self.encoder, self.head):
            if part is not None:
                part.reset_parameters()

    def _inputs(
        self,
        x: Tensor,
        cu_seqlens: Tensor | Packing | None,
        lengths: Sequence[int] | Tensor | None,
        attention_mask: Tensor | None,
    ) -> Inputs:
        if self.embedding is not None:
            check_ids("x", x, 2, "(B, T)")
        elif not isinstance(x, Tensor) or x.dtype not in REAL:
            raise TypeError(f"x must be a Tensor of numbers, got {x.dtype if isinstance(x, Tensor) else type(x)}")
        elif x.dim() != 3 or x.shape[2] != self.config.n_features:
            raise ValueError(f"x must have shape (B, T, F) with F = {self.config.n_features}, got {tuple(x.shape)}")
        return unpad(x, cu_seqlens, lengths, attention_mask)

    def _scores(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        tokens = inputs.tokens
        x = self._encode(tokens) if self.embedding is None else embed(self.embedding, tokens)
        hidden, _, auxiliary = self.backbone(x, cu_seqlens=inputs.packing)
        return self.head(self._pool(hidden, inputs.packing)), auxiliary

    def _encode(self, x: Tensor) -> Tensor:
        if self.encoder is None:
            raise RuntimeError("a classifier of tokens has no encoder of numbers")
        return self.encoder(x)

    def _pool(self, hidden: Tensor, packing: Packing | None) -> Tensor:
        pooling = self.config.pooling
        if packing is None:
            if hidden.shape[1] == 0:
                return hidden.sum(1)
            return hidden.mean(1) if pooling == "mean" else hidden[:, -1 if pooling == "last" else 0]
        bounds = packing.cu_seqlens.to(torch.int64)
        lengths = bounds.diff()
        if hidden.shape[1] == 0:
            return hidden.sum(1).expand(len(lengths), -1)
        if pooling == "mean":
            # each sequence's sum is one thread's: no atomic additions, whose order varies. In float32, as it is added
            # up in the dtype given; unsafe is not to read the lengths on the host again
            wide = hidden[0].to(accumulator(hidden.dtype))
            total = torch.segment_reduce(wide, "sum", lengths=lengths, axis=0, unsafe=True, initial=0)
            return (total / lengths.clamp(min=1)[:, None]).to(hidden.dtype)
        found = hidden[0][(bounds[1:] - 1 if pooling == "last" else bounds[:-1]).clamp(0, hidden.shape[1] - 1)]
        return torch.where((lengths > 0)[:, None], found, 0)
