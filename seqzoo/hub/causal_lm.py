"""Language models as transformers has them: the Auto classes, ``generate``, ``Trainer``, ``pipeline``.

Importing this module registers both classes::

    import seqzoo.hub.causal_lm
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from seqzoo.mixer import SequenceMixer, State
from seqzoo.models.config import ModelConfig
from seqzoo.models.language_model import LanguageModel
from seqzoo.models.padding import embed, unpad
from seqzoo.modules.linear_cross_entropy import IGNORED
from seqzoo.packing import Packing
from seqzoo.parallel.loss import next_tokens

try:
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
    from transformers.modeling_outputs import CausalLMOutputWithPast
except ImportError as error:
    raise ImportError(
        'seqzoo.hub.causal_lm needs transformers, version 5 or later: pip install "seqzoo[eval]"'
    ) from error


class SeqZooConfig(PreTrainedConfig):
    """A :class:`ModelConfig` in the form of transformers.

    Attributes:
        seqzoo: The values of the ModelConfig, ``ModelConfig.to_dict()``.
        use_cache: Whether the model returns its state where it is not asked.
    """

    model_type = "seqzoo"

    seqzoo: dict[str, Any] | None = None
    use_cache: bool = True

    def __post_init__(self, **others: Any) -> None:
        """Checks the values, and shows those that transformers asks for under its own names."""
        super().__post_init__(**others)
        # transformers builds one without values to compare others with
        if self.seqzoo is not None:
            self.seqzoo = self.model_config().to_dict()

    @classmethod
    def of(cls, config: ModelConfig, **options: Any) -> SeqZooConfig:
        """Of a model's configuration; options are those of ``PreTrainedConfig``, as ``eos_token_id``."""
        return cls(seqzoo=config.to_dict(), **options)

    def model_config(self) -> ModelConfig:
        """The configuration of the model.

        Raises:
            ValueError: If there is none, or as :meth:`ModelConfig.from_dict` does.
        """
        if self.seqzoo is None:
            raise ValueError("a SeqZooConfig needs seqzoo=, the values of a ModelConfig; SeqZooConfig.of makes one")
        return ModelConfig.from_dict(self.seqzoo)

    @property
    def vocab_size(self) -> int | None:
        """Tokens of the vocabulary."""
        return self._value("vocab_size")

    @property
    def hidden_size(self) -> int | None:
        """D."""
        return self._value("d_model")

    @property
    def num_hidden_layers(self) -> int | None:
        """Blocks."""
        return self._value("n_layers")

    @property
    def max_position_embeddings(self) -> int | None:
        """Longest sequence; None means any."""
        return self._value("max_positions")

    def _value(self, name: str) -> Any:
        return None if self.seqzoo is None else self.seqzoo.get(name)


class SeqZooCache:
    """The state of a language model between the calls of ``generate``.

    What holds keys and values is written in place: a cache that was given to a call must not be used again.

    Attributes:
        state: The model's state, one row a sequence.
        length: Columns that were read so far, padding included.
    """

    is_compileable: ClassVar[bool] = False

    def __init__(self, state: list[State], length: int) -> None:
        self.state, self.length = state, length

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns that were read so far, padding included."""
        return self.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Takes other rows, as beam search does."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Takes other rows."""
        self.state = [{key: value[indices.to(value.device)] for key, value in one.items()} for one in self.state]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Takes every row so many times."""
        self.state = [
            {key: value.repeat_interleave(repeats, dim=0) for key, value in one.items()} for one in self.state
        ]

    def crop(self, max_length: int) -> None:
        """Raises NotImplementedError."""
        raise NotImplementedError(
            "a recurrent state cannot be cropped to an earlier token, as assisted and contrastive decoding ask for; "
            "use greedy decoding, sampling or beam search"
        )


class SeqZooForCausalLM(PreTrainedModel, GenerationMixin):
    """A :class:`LanguageModel` under the interface of transformers.

    Padded batches, on either side, run packed: unequal prompts give what each gives alone. Its tensors are those of the
    LanguageModel, :attr:`model`, under the prefix ``model.``.

    Args:
        config: What to build.
        model: The LanguageModel to take instead of a new one; :meth:`of` is shorter.
    """

    config_class = SeqZooConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    # which refuses assisted decoding
    _is_stateful = True
    _supports_context_parallel = False

    def __init__(self, config: SeqZooConfig, model: LanguageModel | None = None) -> None:
        super().__init__(config)
        self.model = LanguageModel(config.model_config()) if model is None else model
        mixers = [(path, part) for path, part in self.named_modules() if isinstance(part, SequenceMixer)]
        self._keep_in_fp32_modules_strict = {f"{path}.{name}" for path, one in mixers for name in one.wide_parameters()}
        self.post_init()

    @classmethod
    def of(cls, model: LanguageModel, **options: Any) -> SeqZooForCausalLM:
        """Around a model, whose parameters it shares; options are those of ``PreTrainedConfig``, as ``eos_token_id``.

        Raises:
            TypeError: If it is no LanguageModel.
        """
        if not isinstance(model, LanguageModel):
            raise TypeError(f"model must be a LanguageModel, got {type(model).__name__}")
        return cls(SeqZooConfig.of(model.config, **options), model)

    @classmethod
    def from_pretrained(cls, *arguments: Any, output_loading_info: bool = False, **options: Any) -> Any:
        """As ``PreTrainedModel.from_pretrained``, but a tensor that is missing is an error.

        Raises:
            ValueError: If the checkpoint lacks a tensor, or has one too many or of another shape.
        """
        found: Any = super().from_pretrained(*arguments, output_loading_info=True, **options)
        model, report = found
        for what in ("missing", "unexpected", "mismatched"):
            names = report[f"{what}_keys"]
            if names:
                shown = ", ".join(sorted(str(name) for name in names)[:5])
                raise ValueError(f"the checkpoint does not fit its configuration, {len(names)} tensors {what}: {shown}")
        return (model, report) if output_loading_info else model

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: SeqZooCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        seq_idx: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        return_dict: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits of the successors, and the loss where there are labels.

        Packed sequences, a batch of 1 without a mask, are told by ``cu_seq_lens_q``, by ``seq_idx`` or by
        ``position_ids`` that start anew, as ``DataCollatorWithFlattening`` makes them. Otherwise positions follow from
        the mask, and ``position_ids`` are not read.

        Args:
            input_ids: int64 ``(B, T)``.
            attention_mask: ``(B, T)``, 1 at tokens, without holes in a row; with a cache as many columns more as it has
                read. A single token after a cache counts as a token whatever the mask says.
            position_ids: int64 ``(1, T)``.
            past_key_values: Where an earlier call ended.
            inputs_embeds: ``(B, T, D)`` in place of ``input_ids``.
            labels: ``(B, T)``, ``input_ids`` or -100; what each token is to predict is the next one's.
            use_cache: Whether to return the state after the last token; None means as the configuration says, and not
                where there are labels.
            logits_to_keep: How many last columns have logits, 0 means all; or which.
            cu_seq_lens_q: int32 ``(S + 1,)``.
            cu_seq_lens_k: Must be ``cu_seq_lens_q`` where it is given.
            max_length_q: Not needed, as the next.
            max_length_k: Not needed.
            seq_idx: int32 ``(1, T)``, the number of every token's sequence.
            num_items_in_batch: What to divide the sum of the losses by, where gradients are accumulated.
            return_dict: Whether the result is no tuple.
            output_attentions: Not to be had.
            output_hidden_states: Not to be had.

        Returns:
            ``loss``, ``logits`` and ``past_key_values``. In training mode with labels the logits are made in chunks and
            are None.

        Raises:
            ValueError: If arguments contradict one another, or as :meth:`LanguageModel.forward` does.
        """
        for name, value in (("output_attentions", output_attentions), ("output_hidden_states", output_hidden_states)):
            if value:
                raise ValueError(f"{name} is not to be had of a SeqZooForCausalLM")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, one of them")
        model = self.model
        tokens = embed(model.embedding, input_ids) if input_ids is not None else inputs_embeds
        if not isinstance(tokens, Tensor) or tokens.dim() != 3:
            raise ValueError("input_ids must have shape (B, T), inputs_embeds (B, T, D)")
        total, state = tokens.shape[1], None
        seen = 0 if past_key_values is None else past_key_values.length
        if past_key_values is not None:
            state = past_key_values.state
            if total == 1:
                attention_mask = None
            elif attention_mask is not None:
                attention_mask = attention_mask[:, -total:]
        packing = None
        if attention_mask is None and state is None:
            packing = _packing(tokens, position_ids, cu_seq_lens_q, cu_seq_lens_k, seq_idx)
        keep = use_cache if use_cache is not None else self.config.use_cache and labels is None
        inputs = unpad(tokens, packing, None, _mask(attention_mask))
        if state is not None and total == 1 and labels is None and keep:
            hidden, after = model.backbone.step(tokens[:, 0], state)
            hidden, auxiliary = hidden[:, None], hidden.new_zeros(())
        else:
            hidden, after, auxiliary = model.backbone(
                inputs.tokens, state, cu_seqlens=inputs.packing, return_state=keep
            )
        loss = None
        if labels is not None:
            own = labels if inputs.padding is None else inputs.padding.pack(labels)
            targets = next_tokens(own, inputs.packing)
            loss = model.cross_entropy(hidden, targets) + model.config.auxiliary_weight * auxiliary
            if num_items_in_batch is not None:
                loss = loss * (targets != IGNORED).sum() / num_items_in_batch
        logits = None
        if labels is None or not self.training:
            padded = hidden if inputs.padding is None else inputs.padding.pad(hidden)
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = model.logits(padded[:, kept])
        # its own kind of cache, of which generate asks no more than this one has
        cache: Any = None if after is None else SeqZooCache(list(after), seen + total)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)
        return output if return_dict or return_dict is None else output.to_tuple()

    def get_input_embeddings(self) -> nn.Module:
        """The embedding of tokens."""
        return self.model.embedding

    def get_output_embeddings(self) -> nn.Module | None:
        """The output layer, None where it is the embedding's matrix."""
        return self.model.head

    def resize_token_embeddings(self, *arguments: Any, **options: Any) -> Any:
        """Raises NotImplementedError."""
        raise NotImplementedError(
            "the vocabulary of a SeqZooForCausalLM is that of its ModelConfig; build the model with another vocab_size"
        )

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether blocks are computed anew in the backward pass."""
        return self.model.config.checkpoint_blocks

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = None, every_n_layers: int = 1
    ) -> None:
        """What all ways to switch it come to: ``checkpoint_blocks``.

        Raises:
            ValueError: If the re-entrant kind is asked for, which has no gradients for states, or not every block.
        """
        if getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant"):
            raise ValueError("SeqZoo's blocks are checkpointed with use_reentrant=False; leave use_reentrant out")
        if every_n_layers != 1:
            raise ValueError(f"either all blocks are checkpointed or none, got every_n_layers={every_n_layers}")
        values = {**self.model.config.to_dict(), "checkpoint_blocks": enable}
        self.model.config = self.model.backbone.config = ModelConfig.from_dict(values)
        self.config.seqzoo = values

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: a LanguageModel initialises itself."""

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False


def _mask(mask: Tensor | None) -> Tensor | None:
    """None where there is no padding: a dense batch is faster."""
    return None if mask is None or bool((mask == 1).all()) else mask


def _packing(
    tokens: Tensor,
    position_ids: Tensor | None,
    cu_seq_lens_q: Tensor | None,
    cu_seq_lens_k: Tensor | None,
    seq_idx: Tensor | None,
) -> Packing | None:
    """What tells of packed sequences, where anything does."""
    if cu_seq_lens_q is not None:
        if cu_seq_lens_k is not None and not torch.equal(cu_seq_lens_q, cu_seq_lens_k):
            raise ValueError("cu_seq_lens_k must be cu_seq_lens_q: the keys of a language model are its queries'")
        return Packing.from_cu_seqlens(cu_seq_lens_q, tokens.shape[1])
    if seq_idx is not None:
        return Packing.from_seq_idx(seq_idx)
    if position_ids is None or tokens.shape[:2] != position_ids.shape or tokens.shape[0] != 1:
        return None
    packing = Packing.from_position_ids(position_ids)
    return packing if packing.n_sequences > 1 else None


AutoConfig.register(SeqZooConfig.model_type, SeqZooConfig, exist_ok=True)
AutoModelForCausalLM.register(SeqZooConfig, SeqZooForCausalLM, exist_ok=True)
