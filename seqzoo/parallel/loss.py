"""The loss of a language model whose sequences lie on several ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from seqzoo.mixer import State
from seqzoo.models.language_model import LanguageModel
from seqzoo.models.padding import check_ids, embed
from seqzoo.modules.linear_cross_entropy import IGNORED, linear_cross_entropy
from seqzoo.packing import Packing
from seqzoo.parallel.exchange import Group, once_a_forward
from seqzoo.parallel.plan import Plan


def next_tokens(ids: Tensor, cu_seqlens: Tensor | Packing | None = None) -> Tensor:
    """The labels of whole sequences: each token's successor, -100 at the last of a sequence.

    To be made before the tokens are sharded: the label of a rank's last token is the next rank's first.

    Args:
        ids: int64 or int32 ``(B, T)``.
        cu_seqlens: Boundaries of packed sequences, int32 ``(S + 1,)``, or a Packing; B is then 1.
    """
    check_ids("ids", ids, 2, "(B, T)")
    labels = ids.roll(-1, 1)
    if cu_seqlens is None:
        labels[:, -1:] = IGNORED
        return labels
    ends = Packing.from_cu_seqlens(cu_seqlens, ids.shape[1]).cu_seqlens[1:].to(torch.int64) - 1
    labels[:, ends[ends >= 0]] = IGNORED
    return labels


def refuse_padding(**given: object) -> None:
    """Raises ValueError if a padded batch is described."""
    for name, value in given.items():
        if value is not None:
            raise ValueError(
                f"{name} speaks of whole sequences, of which a rank has a part; pack the batch first "
                "(seqzoo.models.padding), shard it, and pass cu_seqlens"
            )


class ParallelLoss:
    """The loss of a language model on this rank's tokens."""

    def __init__(self, model: LanguageModel, group: Group) -> None:
        self.model, self.group = model, group

    def loss(
        self,
        ids: Tensor,
        labels: Tensor,
        state: Sequence[State] | None = None,
        *,
        cu_seqlens: Tensor | Packing | Plan | None = None,
        lengths: Sequence[int] | Tensor | None = None,
        attention_mask: Tensor | None = None,
        return_state: bool = False,
        chunk_size: int | None = None,
    ) -> Tensor | tuple[Tensor, list[State] | None]:
        """This rank's share of :meth:`LanguageModel.loss`: the shares of all ranks add up to the loss of all tokens.

        The tokens that count are counted over all ranks once a call.

        Args:
            ids: This rank's tokens, int64 or int32 ``(B, T)``.
            labels: The token that each of them is to predict, as :func:`next_tokens` makes them of whole sequences;
                -100 where none counts.
            state: The initial state of all sequences.
            cu_seqlens: Boundaries over all ranks, or a Plan.
            lengths: None, like the mask: padding is taken out before tokens are sharded.
            return_state: Whether to return the state after the last token of every sequence.
            chunk_size: Tokens whose logits exist at once; None chooses by the size of the vocabulary.

        Returns:
            A scalar, float32 (float64 for float64 models); with ``return_state`` the scalar and the state.

        Raises:
            ValueError: If the labels have another shape than ``ids``, a padded batch is described, or as the model's
                forward does.
        """
        model = self.model
        refuse_padding(lengths=lengths, attention_mask=attention_mask)
        check_ids("ids", ids, 2, "(B, T)")
        check_ids("labels", labels)
        if labels.shape != ids.shape:
            raise ValueError(f"labels must have the shape of ids, {tuple(ids.shape)}, got {tuple(labels.shape)}")
        counted = (labels != IGNORED).sum()
        total = once_a_forward(lambda: self._over_all_ranks(counted))
        x = embed(model.embedding, ids)
        hidden, after, auxiliary = model.backbone(x, state, cu_seqlens=cu_seqlens, return_state=return_state)
        weight = model.embedding.weight if model.head is None else model.head.weight
        targets = labels.flatten().to(torch.int64)
        mean = linear_cross_entropy(hidden.flatten(0, 1), weight, targets, chunk_size)
        # in the dtype of the loss: the quotient of integers would be float32
        loss = mean * counted.to(mean.dtype) / total.clamp(min=1) + model.config.auxiliary_weight * auxiliary
        return (loss, after) if return_state else loss

    def _over_all_ranks(self, counted: Tensor) -> Tensor:
        total = counted.clone()
        with self.group.guard(type(self.model).__name__, "count the labels of all ranks"):
            dist.all_reduce(total, group=self.group.handle)
        return total
