"""A language model that reads a long sequence in segments, with a few vectors of memory from one to the next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from seqzoo.mixer import State
from seqzoo.models.config import ModelConfig
from seqzoo.models.language_model import LanguageModel
from seqzoo.models.padding import check_ids, embed
from seqzoo.models.registry import register_model


@dataclass(frozen=True, kw_only=True)
class RecurrentMemoryConfig(ModelConfig):
    """What a model with recurrent memory is built from: :class:`ModelConfig`, and

    Attributes:
        segment_length: Tokens of a segment.
        n_memory: Vectors of memory; 0 means independent segments.
        detach_every: Segments that gradients go back through at most, counted from the first of a call; None means all.
    """

    segment_length: int
    n_memory: int = 10
    detach_every: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("segment_length", 1), ("n_memory", 0), ("detach_every", 1)):
            value = getattr(self, name)
            if value is None and name == "detach_every":
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an integer, got {value!r}")
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        needed = self.segment_length + 2 * self.n_memory
        if self.max_positions is not None and self.max_positions < needed:
            raise ValueError(
                f"max_positions must be at least {needed}, a segment and its memory at both ends, got "
                f"{self.max_positions}"
            )


@register_model("recurrent_memory")
class RecurrentMemory(nn.Module):
    """Recurrent Memory Transformer, https://arxiv.org/abs/2207.06881, section 3, around a model of any mixers.

    The tokens are read in segments of L, each a sequence of its own between two copies of the memory M (m vectors)::

        [_, H_t, M_{t+1}] = backbone([M_t, E(segment t), M_t])        logits_t = H_t W_o

    All is causal: the segment reads the first copy, and the second reads all and becomes the next memory. M_1 is
    learned. The mixers begin every segment afresh, so nothing but the memory goes from one to the next, and L and m
    bound what attention costs.

    State: ``{"memory": (B, m, D)}``, of the embeddings' dtype. A call begins a segment, and its last one may be shorter
    than L: calls are one whole where those before the last end with a segment.

    Args:
        config: What to build.

    Attributes:
        model: The language model; its ``forward``, state and ``generate`` know nothing of the memory.
        memory: M_1, ``(m, D)``.
    """

    config_class = RecurrentMemoryConfig

    def __init__(self, config: RecurrentMemoryConfig) -> None:
        super().__init__()
        self.config = config
        self.model = LanguageModel(config)
        self.memory = nn.Parameter(torch.empty(config.n_memory, config.d_model))
        if not self.memory.is_meta:
            self._reset_memory()

    @classmethod
    def around(cls, model: LanguageModel, **options: Any) -> RecurrentMemory:
        """Puts a memory around a model, whose parameters are taken, not copied.

        Args:
            model: The model.
            options: What :class:`RecurrentMemoryConfig` has beside the model's configuration.

        Raises:
            TypeError: If it is no language model, or an option is missing or has the wrong type.
            ValueError: If an option is not known, or out of range.
        """
        if not isinstance(model, LanguageModel):
            raise TypeError(f"a memory goes around a LanguageModel, got {type(model).__name__}")
        config = RecurrentMemoryConfig.from_dict({**model.config.to_dict(), **options})
        with torch.device("meta"):
            made = cls(config)
        made.model = model
        made.memory = nn.Parameter(model.embedding.weight.new_empty(config.n_memory, config.d_model))
        made._reset_memory()
        return made.train(model.training)

    def forward(
        self, ids: Tensor, state: State | None = None, *, return_state: bool = False
    ) -> tuple[Tensor, State | None]:
        """Maps tokens ``(B, T)`` of any length to the logits of their successors ``(B, T, V)``.

        Args:
            ids: int64 or int32 ``(B, T)``.
            state: The memory that an earlier call left; M_1 when omitted.
            return_state: Whether to return the memory after the last segment.

        Returns:
            The logits, and the state or None.

        Raises:
            TypeError: If a dtype is wrong.
            ValueError: If ids lie outside the vocabulary (on the CPU), or the state does not fit.
        """
        hidden, after, _ = self._hidden(ids, state)
        return self.model.logits(hidden), after if return_state else None

    def loss(
        self,
        ids: Tensor,
        labels: Tensor,
        state: State | None = None,
        *,
        return_state: bool = False,
        chunk_size: int | None = None,
    ) -> Tensor | tuple[Tensor, State]:
        """The mean cross entropy over the tokens that count, and ``auxiliary_weight`` times the auxiliary losses.

        The auxiliary losses are the mean of the segments', weighted by their tokens.

        Args:
            ids: As of :meth:`forward`, like ``state`` and ``return_state``.
            labels: The token that each position is to predict (shifted already), of the shape of ``ids``; -100 where
                none counts.
            chunk_size: Tokens whose logits exist at once; None chooses by the size of the vocabulary.

        Returns:
            A scalar; with ``return_state`` the scalar and the state.

        Raises:
            ValueError: If the labels have another shape than ``ids``, or as :meth:`forward` does.
        """
        check_ids("labels", labels)
        hidden, after, auxiliary = self._hidden(ids, state)
        if labels.shape != ids.shape:
            raise ValueError(f"labels must have the shape of ids, {tuple(ids.shape)}, got {tuple(labels.shape)}")
        loss = self.model.cross_entropy(hidden, labels, chunk_size) + self.config.auxiliary_weight * auxiliary
        return (loss, after) if return_state else loss

    def init_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """The memory before the first segment, through which gradients reach M_1."""
        return {"memory": self.memory.to(device=device, dtype=dtype).expand(batch_size, -1, -1)}

    def reset_parameters(self) -> None:
        """Initialises every parameter and buffer; the memory as large as the embeddings."""
        self.model.reset_parameters()
        self._reset_memory()

    def _reset_memory(self) -> None:
        nn.init.normal_(self.memory, std=0.02)

    def _hidden(self, ids: Tensor, state: State | None) -> tuple[Tensor, State, Tensor]:
        """The outputs of the backbone on all tokens, the memory after them, the auxiliary loss."""
        check_ids("ids", ids, 2, "(B, T)")
        batch, total = ids.shape
        memory = self.init_state(batch)["memory"] if state is None else self._memory(state, batch)
        m, length, every = self.config.n_memory, self.config.segment_length, self.config.detach_every
        outputs, losses = [], []
        for index, segment in enumerate(ids.split(length, dim=1)):
            if every is not None and index > 0 and index % every == 0:
                memory = memory.detach()
            x = embed(self.model.embedding, segment)
            hidden, _, auxiliary = self.model.backbone(torch.cat((memory, x, memory), dim=1))
            outputs.append(hidden[:, m : m + segment.shape[1]])
            losses.append(auxiliary * (segment.shape[1] / max(total, 1)))
            if segment.shape[1] > 0:
                # under autocast the outputs may be of another dtype than the embeddings
                memory = hidden[:, m + segment.shape[1] :].to(memory.dtype)
        return torch.cat(outputs, dim=1), {"memory": memory}, torch.stack(losses).sum()

    def _memory(self, state: State, batch: int) -> Tensor:
        if not isinstance(state, dict) or state.keys() != {"memory"}:
            given = sorted(state) if isinstance(state, dict) else type(state).__name__
            raise ValueError(f"the state must be {{'memory': Tensor}}, got {given}")
        memory, expected = state["memory"], (batch, *self.memory.shape)
        if not isinstance(memory, Tensor):
            raise TypeError(f"state['memory'] must be a Tensor, got {type(memory).__name__}")
        if tuple(memory.shape) != expected:
            raise ValueError(f"state['memory'] must have shape {expected}, got {tuple(memory.shape)}")
        if memory.dtype != self.memory.dtype:
            raise TypeError(f"state['memory'] must be {self.memory.dtype}, got {memory.dtype}")
        if memory.device != self.memory.device:
            raise ValueError(
                f"state['memory'] is on {memory.device}, the model on {self.memory.device}; move one of them"
            )
        return memory
