"""Lightning modules: a model, its loss, its optimiser and its schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from seqzoo.mixer import State, join
from seqzoo.models import LanguageModel, ModelConfig
from seqzoo.parallel import shard_model
from seqzoo.train.checkpoints import CheckpointError
from seqzoo.train.data.language import LanguageData
from seqzoo.train.data.packed_documents import PackedBatch
from seqzoo.train.data.windows import IGNORED, replica
from seqzoo.train.finite import check_finite
from seqzoo.train.optimisation import OptimisedModule
from seqzoo.train.strategy import SequenceParallelStrategy, own_tokens, total


class LanguageModeling(OptimisedModule):
    """Next-token prediction with AdamW.

    A training batch is integers (B, T + 1), or a :class:`seqzoo.train.data.PackedBatch`, whose documents may go on from
    batch to batch: the state is handed on, without gradients. A validation batch is inputs and labels, both (B, T), the
    next part of the same B streams as the batch before it.

    Under a :class:`seqzoo.train.strategy.SequenceParallelStrategy` the processes of a group have the same batches, of
    which each runs its share of the tokens; groups divide the streams of validation among them.

    Args:
        config: The model.
        lr: Highest learning rate.
        weight_decay: Of matrices; modules may ask for their own.
        beta1: AdamW's average of gradients.
        beta2: AdamW's average of squared gradients.
        warmup_steps: Updates in which the learning rate rises.
        schedule: How it falls: "cosine", "linear", "wsd", "rex", "inverse_sqrt", "constant", "refined" or
            "schedule_free".
        refined_from: For "refined", the folder of the run by whose gradient norms it is.
        carry_state: Whether validation hands the state from window to window; without, every window starts afresh,
            which models whose state grows with the length need.
        sample_prompt: What the sample at the end continues.
        sample_length: Tokens of the sample.
        sample_temperature: Of the sample; 0 always takes the likeliest token.
        seed: Seed of the dropout; the command sets it from its own.
    """

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
        carry_state: bool = True,
        sample_prompt: str = "\n",
        sample_length: int = 600,
        sample_temperature: float = 0.8,
        seed: int = 0,
    ) -> None:
        if sample_length < 1:
            raise ValueError(f"sample_length must be at least 1, got {sample_length}")
        super().__init__(
            LanguageModel(config), lr, weight_decay, (beta1, beta2), warmup_steps, schedule, seed, refined_from
        )
        self.carry_state = carry_state
        self.sample_prompt = sample_prompt
        self.sample_length = sample_length
        self.sample_temperature = sample_temperature
        self._divided = False
        # of documents that go on with the next batch
        self._carried: dict[int, list[State]] = {}
        self._state: list[State] | None = None
        self._nats = 0.0
        self._count = 0

    def check_data(self, data: LanguageData) -> None:
        """Raises ValueError unless the vocabulary holds all tokens of the data, which have been read."""
        needed, size = data.tokenizer.vocab_size, self.model.config.vocab_size
        if size < needed:
            raise ValueError(f"{data.tokenizer_words} need model.config.vocab_size of at least {needed}, got {size}")

    def configure_model(self) -> None:
        """Divides the model among the processes of a mesh, where the strategy has made one."""
        if self.device_mesh is not None and not self._divided:
            strategy = self.trainer.strategy
            ways = strategy.ways if isinstance(strategy, SequenceParallelStrategy) else {}
            shard_model(self.model, self.device_mesh, **ways)
            self._divided = True

    def training_step(self, batch: Tensor | PackedBatch, batch_idx: int) -> dict[str, Tensor]:
        """The mean loss of a batch: ``loss``, of several processes this one's share, and ``total``, that of all.

        Raises:
            NonFiniteLoss: If it is NaN or infinite; names the layer that first made it so.
        """
        packed = isinstance(batch, PackedBatch)
        ids, labels = (batch.ids, batch.labels) if packed else (batch[:, :-1].long(), batch[:, 1:].long())
        bounds: Any = batch.cu_seqlens if packed else None
        if self.device_mesh is not None:
            ids, labels, bounds = own_tokens(self.device_mesh, ids, labels, bounds)
        if packed:
            loss = self._packed_loss(batch, ids, labels, bounds)
        else:
            loss = cast("Tensor", self.model.loss(ids, labels, cu_seqlens=bounds))
        whole = loss if self.device_mesh is None else total(loss, self.device_mesh)
        # of the sum, so that all processes find the same
        check_finite(whole, self.model, ids, step=self.trainer.global_step, batch=batch_idx, cu_seqlens=bounds)
        return {"loss": loss, "total": whole.detach()}

    def _packed_loss(self, batch: PackedBatch, ids: Tensor, labels: Tensor, bounds: Any) -> Tensor:
        """The loss of packed documents; keeps the states of those that the next batch goes on with."""
        state = None
        if any(batch.continues):
            fresh = self.model.init_state(1, device=ids.device)
            rows = [
                self._carried.pop(document) if goes_on else fresh
                for document, goes_on in zip(batch.documents, batch.continues, strict=True)
            ]
            state = [join(layers) for layers in zip(*rows, strict=True)]
        if not any(batch.goes_on):
            return cast("Tensor", self.model.loss(ids, labels, state, cu_seqlens=bounds))
        loss, after = cast(
            "tuple[Tensor, list[State]]",
            self.model.loss(ids, labels, state, cu_seqlens=bounds, return_state=True),
        )
        for row, (document, goes_on) in enumerate(zip(batch.documents, batch.goes_on, strict=True)):
            if goes_on:
                self._carried[document] = [
                    {key: value[row : row + 1].detach().clone() for key, value in layer.items()} for layer in after
                ]
        return loss

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the states of documents that go on, those of every group, and the tokenizer's fingerprint."""
        carried: list[Any] = [self._carried]
        if self.device_mesh is not None:
            group = self.device_mesh["data_parallel"]
            carried = [None] * group.size()
            torch.distributed.all_gather_object(carried, self._carried, group=group.get_group())
        if any(carried):
            checkpoint["carried"] = carried
        data = _data_of(self.trainer)
        if data is not None:
            checkpoint["tokenizer"] = data.tokenizer.digest()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes up the states of documents that go on.

        Raises:
            CheckpointError: If the checkpoint is of another tokenizer than the data.
        """
        data = _data_of(self.trainer)
        before = checkpoint.get("tokenizer")
        if data is not None and before is not None and before != data.tokenizer.digest():
            raise CheckpointError(
                f"the checkpoint was trained with another tokenizer, of fingerprint {before}; the data have "
                f"{data.tokenizer_words}, {data.tokenizer.digest()}: give the tokenizer of the checkpoint"
            )
        rank, groups = replica(self.trainer)
        carried = checkpoint.get("carried", [{}])
        # another number of groups reads other documents
        self._carried = {
            document: [{key: value.to(self.device) for key, value in layer.items()} for layer in layers]
            for document, layers in (carried[rank] if len(carried) == groups else {}).items()
        }

    def on_validation_epoch_start(self) -> None:
        """Forgets what the validation before has left."""
        self._state, self._nats, self._count = None, 0.0, 0

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Adds the next window of every stream."""
        if self.device_mesh is not None:
            ids, labels = batch
            group = self.device_mesh["data_parallel"]
            rows = torch.arange(ids.shape[0], device=ids.device).tensor_split(group.size())[group.get_local_rank()]
            batch = ids[rows], labels[rows]
        nats, count, self._state = self.score(batch, self._state)
        self._nats += nats
        self._count += count

    def on_validation_epoch_end(self) -> None:
        """Makes ``validation_bpb`` and ``validation_perplexity`` known to callbacks.

        Bits per token become bits per byte by the mean length of the tokens of all validation texts.
        """
        sums = torch.tensor([self._nats, float(self._count)], dtype=torch.float64, device=self.device)
        nats, count = (sums if self.device_mesh is None else total(sums, self.device_mesh)).tolist()
        self._state = None
        mean = nats / max(count, 1.0)
        data = _data_of(self.trainer)
        size = 1.0 if data is None else data.bytes_per_token("validation")
        self.log("validation_bpb", mean / math.log(2.0) / size, logger=False)
        # beyond this the number is no finite float
        self.log("validation_perplexity", math.exp(min(mean, 700.0)), logger=False)

    def score(self, batch: tuple[Tensor, Tensor], state: list[State] | None) -> tuple[float, int, list[State] | None]:
        """The summed loss in nats of a window, how many tokens it has, and the state that the next one takes.

        Of several processes both are this one's share, and the state is the same on all of a group.
        """
        ids, labels = batch
        plan = None
        if self.device_mesh is not None:
            ids, labels, plan = own_tokens(self.device_mesh, ids, labels)
        logits, after = self.model(ids, state, cu_seqlens=plan, return_state=self.carry_state)
        nats = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum")
        return float(nats), int((labels != IGNORED).sum()), after

    @torch.no_grad()
    def bits_per_token(self, windows: Iterable[tuple[Tensor, Tensor]]) -> float:
        """The mean over all tokens of validation windows, in bits, with dropout off."""
        training = self.training
        self.eval()
        state: list[State] | None = None
        total, count = 0.0, 0
        for batch in windows:
            ids, labels = (part.to(self.device) for part in batch)
            nats, tokens, state = self.score((ids, labels), state)
            total, count = total + nats, count + tokens
        self.train(training)
        return total / max(count, 1) / math.log(2.0)


def _data_of(trainer: Any) -> LanguageData | None:
    """The texts that a trainer reads, where it has them from a data module of this package."""
    data = getattr(trainer, "datamodule", None)
    return data if isinstance(data, LanguageData) else None
