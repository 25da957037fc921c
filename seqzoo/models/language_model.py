"""The language model: tokens in, a distribution over the next token out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqzoo.mixer import State
from seqzoo.models.backbone import Backbone
from seqzoo.models.config import ModelConfig
from seqzoo.models.padding import Inputs, check_ids, embed, unpad
from seqzoo.models.registry import register_model
from seqzoo.modules.linear_cross_entropy import linear_cross_entropy
from seqzoo.packing import Packing


@register_model("language_model")
class LanguageModel(nn.Module):
    """An embedding, a backbone and a linear output over the vocabulary, tied to the embedding or of its own.

    The state is the backbone's: the list of the mixers' states, and that of the positions where there are any.

    Args:
        config: What to build.
    """

    config_class = ModelConfig

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.backbone = Backbone(config)
        self.head = None if config.tie_embeddings else nn.Linear(config.d_model, config.vocab_size, bias=False)
        if not self.embedding.weight.is_meta:
            self._reset_vocabulary()

    def forward(
        self,
        ids: Tensor,
        state: Sequence[State] | None = None,
        *,
        cu_seqlens: Tensor | Packing | None = None,
        lengths: Sequence[int] | Tensor | None = None,
        attention_mask: Tensor | None = None,
        return_state: bool = False,
    ) -> tuple[Tensor, list[State] | None]:
        """Maps tokens ``(B, T)`` to the logits of their successors ``(B, T, V)``.

        At most one of ``cu_seqlens``, ``lengths`` and ``attention_mask`` may be given. With one of the latter two the
        batch runs packed: the padding costs nothing, its logits are zero, and states have one row a sequence. Counting
        the tokens needs the host, so under ``torch.compile`` pass ``cu_seqlens``.

        Args:
            ids: int64 or int32 ``(B, T)``.
            state: The state before the first token, as an earlier call or :meth:`init_state` made it.
            cu_seqlens: Boundaries of packed sequences, int32 ``(S + 1,)`` from 0 to T, or a Packing; B is then 1.
            lengths: Tokens of each row ``(B,)``, padding behind them.
            attention_mask: ``(B, T)``, true or 1 at tokens, which are contiguous in each row (left or right padding).
            return_state: Whether to return the state after the last token.

        Returns:
            The logits, and the state or None.

        Raises:
            TypeError: If a dtype is wrong.
            ValueError: If ids lie outside the vocabulary (on the CPU), the mask has holes, or shapes do not fit.
        """
        inputs = self._inputs(ids, cu_seqlens, lengths, attention_mask)
        hidden, after, _ = self._hidden(inputs, state, return_state)
        logits = self.logits(hidden)
        return logits if inputs.padding is None else inputs.padding.pad(logits), after

    def loss(
        self,
        ids: Tensor,
        labels: Tensor,
        state: Sequence[State] | None = None,
        *,
        cu_seqlens: Tensor | Packing | None = None,
        lengths: Sequence[int] | Tensor | None = None,
        attention_mask: Tensor | None = None,
        return_state: bool = False,
        chunk_size: int | None = None,
    ) -> Tensor | tuple[Tensor, list[State] | None]:
        """The mean cross entropy over the tokens that count, and ``auxiliary_weight`` times the auxiliary ones.

        The logits exist for ``chunk_size`` tokens at a time. Other arguments are those of :meth:`forward`.

        Args:
            ids: int64 or int32 ``(B, T)``.
            labels: The token that each position is to predict (shifted already), of the shape of ``ids``; -100 where
                none counts. Padding never counts.
            chunk_size: Tokens whose logits exist at once; None chooses by the size of the vocabulary.

        Returns:
            A scalar, float32 (float64 for float64 models), zero where no token counts; with ``return_state`` the
            scalar and the state.

        Raises:
            ValueError: If the labels have another shape than ``ids``, or as :meth:`forward` does.
        """
        inputs = self._inputs(ids, cu_seqlens, lengths, attention_mask)
        check_ids("labels", labels)
        if labels.shape != ids.shape:
            raise ValueError(f"labels must have the shape of ids, {tuple(ids.shape)}, got {tuple(labels.shape)}")
        hidden, after, auxiliary = self._hidden(inputs, state, return_state)
        targets = labels if inputs.padding is None else inputs.padding.pack(labels)
        loss = self.cross_entropy(hidden, targets, chunk_size)
        loss = loss + self.config.auxiliary_weight * auxiliary
        return (loss, after) if return_state else loss

    def step(self, ids: Tensor, state: Sequence[State]) -> tuple[Tensor, list[State]]:
        """Decodes one token: ids ``(B,)`` and a state to logits ``(B, V)`` and the next state."""
        check_ids("ids", ids, 1, "(B,)")
        hidden, after = self.backbone.step(embed(self.embedding, ids), state)
        return self.logits(hidden), after

    def prefill(self, ids: Tensor, cu_seqlens: Tensor | Packing | None = None) -> tuple[Tensor, list[State]]:
        """Reads prompts ``(B, T)``, or packed ones ``(1, T)``, none of them empty.

        Returns:
            The logits after the last token of each, ``(B, V)`` or ``(S, V)``, and the state.
        """
        inputs = self._inputs(ids, cu_seqlens, None, None)
        bounds = None if inputs.packing is None else inputs.packing.host
        if ids.shape[1] == 0 or (bounds is not None and bool((bounds.diff() == 0).any())):
            raise ValueError("a prompt must have at least one token, got an empty one")
        hidden, after, _ = self._hidden(inputs, None, True)
        if after is None:
            raise RuntimeError("the backbone returned no state although it was asked for one")
        last = hidden[:, -1] if inputs.packing is None else hidden[0, inputs.packing.cu_seqlens[1:].long() - 1]
        return self.logits(last), after

    def init_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> list[State]:
        """The state before the first token; device and dtype (of the embeddings) are the parameters' when omitted."""
        weight = self.embedding.weight
        return self.backbone.init_state(batch_size, device=device or weight.device, dtype=dtype or weight.dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """The output layer, ``(..., D)`` to ``(..., V)``."""
        return F.linear(hidden, self._output_weight())

    def cross_entropy(self, hidden: Tensor, labels: Tensor, chunk_size: int | None = None) -> Tensor:
        """The mean cross entropy of the output layer on ``(B, T, D)`` over the labels ``(B, T)`` that count."""
        return linear_cross_entropy(
            hidden.flatten(0, 1), self._output_weight(), labels.flatten().to(torch.int64), chunk_size
        )

    def state_size(self, length: int) -> int:
        """Numbers that a sequence carries after ``length`` tokens."""
        return self.backbone.state_size(length)

    def reset_parameters(self) -> None:
        """Initialises every parameter and buffer; embedding and output layer normal of deviation 0.02."""
        self._reset_vocabulary()
        self.backbone.reset_parameters()

    def _reset_vocabulary(self) -> None:
        nn.init.normal_(self.embedding.weight, std=0.02)
        if self.head is not None:
            nn.init.normal_(self.head.weight, std=0.02)

    def _output_weight(self) -> Tensor:
        return self.embedding.weight if self.head is None else self.head.weight

    def _inputs(
        self,
        ids: Tensor,
        cu_seqlens: Tensor | Packing | None,
        lengths: Sequence[int] | Tensor | None,
        attention_mask: Tensor | None,
    ) -> Inputs:
        check_ids("ids", ids, 2, "(B, T)")
        return unpad(ids, cu_seqlens, lengths, attention_mask)

    def _hidden(
        self, inputs: Inputs, state: Sequence[State] | None, return_state: bool
    ) -> tuple[Tensor, list[State] | None, Tensor]:
        return self.backbone(
            embed(self.embedding, inputs.tokens), state, cu_seqlens=inputs.packing, return_state=return_state
        )
