"""Pipeline parallel: a language model in stages, which torch.distributed.pipelining schedules."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from seqzoo.kernels.checks import accumulator
from seqzoo.models.language_model import LanguageModel
from seqzoo.models.padding import check_ids, embed
from seqzoo.models.positions import LearnedPositions
from seqzoo.modules.linear_cross_entropy import IGNORED, linear_cross_entropy
from seqzoo.modules.options import check_count
from seqzoo.parallel.parallelize import outermost_mixers


class Section(nn.Module):
    """What a stage has of a backbone."""

    def __init__(self, positions: LearnedPositions | None, blocks: nn.ModuleDict, norm: nn.Module | None) -> None:
        super().__init__()
        self.positions, self.blocks, self.norm = positions, blocks, norm


class Stage(nn.Module):
    """Successive blocks of a language model; the first stage embeds, the last one norms and has the output's weights.

    Parts are the model's own and keep their names, so a stage's ``state_dict`` is a part of the model's.

    Attributes:
        first: Whether it takes tokens.
        last: Whether its outputs are the model's.
    """

    def __init__(self, model: LanguageModel, start: int, stop: int) -> None:
        super().__init__()
        own, depth = model.backbone, len(model.backbone.order)
        self.config = model.config
        self.first, self.last = start == 0, stop == depth
        self.order = [str(place) for place in own.order[start:stop]]
        self.tied = model.head is None and self.first != self.last
        self.embedding = model.embedding if self.first or (self.last and model.head is None) else None
        self.head = model.head if self.last else None
        self.backbone = Section(
            own.positions if self.first else None,
            nn.ModuleDict({place: own.blocks[int(place)] for place in self.order}),
            own.norm if self.last else None,
        )

    def forward(self, x: Tensor, auxiliary: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Runs the blocks of this stage on whole sequences.

        Args:
            x: Of the first stage tokens, int64 or int32 ``(B, T)``; of others what the stage before returned.
            auxiliary: Likewise, from the second stage on.

        Returns:
            ``(B, T, D)``, and ``(1,)``, the sum of the auxiliary losses so far.
        """
        if self.embedding is not None and self.first:
            check_ids("ids", x, 2, "(B, T)")
            x = embed(self.embedding, x)
            if self.backbone.positions is not None:
                x, _ = self.backbone.positions(x, None, None)
            x = x.to(accumulator(x.dtype)) if self.config.residual_in_fp32 else x
        # a stage that waits for a gradient gets one, also where no block has an auxiliary loss
        total = 0 * x[:1, :1, :1].flatten() if auxiliary is None else auxiliary
        for place in self.order:
            block = self.backbone.blocks[place]
            again = self.config.checkpoint_blocks and self.training and torch.is_grad_enabled()
            run = functools.partial(checkpoint, block, use_reentrant=False) if again else block
            x, _, loss = run(x)
            total = total + loss
        return (x if self.backbone.norm is None else self.backbone.norm(x)), total

    def output_weight(self) -> Tensor:
        """The matrix of the output layer, ``(V, D)``, of the last stage.

        Raises:
            RuntimeError: If this is another one.
        """
        layer = self.embedding if self.head is None else self.head
        if not self.last or layer is None:
            raise RuntimeError("the last stage alone has the output layer; this is another one")
        return layer.weight


class PipelineLoss:
    """The ``loss_fn`` of a schedule: the loss of micro-batches, whose sum is that of the whole batch.

    That is the mean over all tokens that count, whatever each micro-batch has of them, if the schedule is built with
    ``scale_grads=False``. Auxiliary losses are the mean of the micro-batches'.

    Args:
        stage: The last one.
        n_microbatches: As the schedule's.
    """

    def __init__(self, stage: Stage, n_microbatches: int) -> None:
        self.stage, self.n_microbatches = stage, check_count("n_microbatches", n_microbatches)
        self.total = 0

    def expect(self, labels: Tensor) -> None:
        """Counts the labels of the whole batch, before ``schedule.step``."""
        self.total = int((labels != IGNORED).sum())

    def __call__(self, output: tuple[Tensor, Tensor], labels: Tensor) -> Tensor:
        """The share of a micro-batch.

        Args:
            output: Of the last stage.
            labels: int64 or int32 ``(B, T)``, shifted already, -100 where none counts.

        Raises:
            RuntimeError: If more labels count than :meth:`expect` was told.
        """
        check_ids("labels", labels, 2, "(B, T)")
        hidden, auxiliary = output
        counted = (labels != IGNORED).sum()
        if int(counted) > self.total:
            raise RuntimeError(
                f"{int(counted)} labels of a micro-batch count, of {self.total} of the batch; call expect(labels) with "
                "those of the whole batch before every step"
            )
        targets = labels.flatten().to(torch.int64)
        mean = linear_cross_entropy(hidden.flatten(0, 1), self.stage.output_weight(), targets)
        share = mean * counted.to(mean.dtype) / max(self.total, 1)
        return share + self.stage.config.auxiliary_weight * auxiliary.sum() / self.n_microbatches


def split_stages(model: LanguageModel, n_stages: int) -> list[Stage]:
    """Cuts a model into stages of equally many blocks, for ``torch.distributed.pipelining``.

    Every process builds the whole model (on the meta device, or with the same weights), cuts it, and keeps its own::

        stages = split_stages(model, n_stages)
        own = [PipelineStage(stages[i].to(device), i, n_stages, device, group=group) for i in indices]
        loss = PipelineLoss(stages[-1], n_microbatches)
        schedule = Schedule1F1B(own[0], n_microbatches, loss_fn=loss, scale_grads=False)
        # first process                # last process
        schedule.step(ids)             loss.expect(labels); schedule.step(target=labels, losses=losses)
        sum_tied_gradients([stages[i] for i in indices], group)

    Batches are dense and begin without a state. Schedules that compute the gradients of inputs and of weights apart
    (the zero-bubble ones) run the backward of an op that takes both twice.

    Args:
        model: With at least as many blocks.
        n_stages: Stages, over all processes.

    Raises:
        TypeError: If it is no LanguageModel.
        ValueError: If there are fewer blocks than stages, blocks that are shared lie in two stages, norms are batch
            norms, or the model is sequence-parallel.
    """
    if not isinstance(model, LanguageModel):
        raise TypeError(f"split_stages takes a LanguageModel, got {type(model).__name__}")
    order = model.backbone.order
    if check_count("n_stages", n_stages) > len(order):
        raise ValueError(f"n_stages must be at most the number of blocks, {len(order)}, got {n_stages}")
    if model.config.norm == "batch":
        raise ValueError("norm='batch' would take the statistics of one micro-batch; use norm='rms' or 'layer'")
    for mixer in outermost_mixers(model):
        if "forward" in vars(mixer):
            raise ValueError(
                f"{type(mixer).__name__} is sequence-parallel, whose exchanges a schedule cannot interleave; split a "
                "model that is not"
            )
    cuts = [index * len(order) // n_stages for index in range(n_stages + 1)]
    spans = list(itertools.pairwise(cuts))
    stage_of: dict[int, tuple[int, int]] = {}
    for index, (start, stop) in enumerate(spans):
        for depth in range(start, stop):
            before, other = stage_of.setdefault(order[depth], (depth, index))
            if other != index:
                raise ValueError(
                    f"the shared block of depths {before} and {depth} would lie in the stages {other} and {index}, "
                    "each with weights of its own; choose another number of stages, or do not share it"
                )
    return [Stage(model, start, stop) for start, stop in spans]


def sum_tied_gradients(stages: Sequence[Stage], group: dist.ProcessGroup | None = None) -> None:
    """Adds up the gradients of the embedding, where the first and the last stage have a copy each; else does nothing.

    Every process of the pipeline calls it after the schedule's step and before the optimiser's. Copies that begin as
    equals stay equal.

    Args:
        stages: Those of this process.
        group: The processes of the pipeline.
    """
    if stages[0].config.tie_embeddings is False:
        return
    config = stages[0].config
    own = {id(stage.embedding): stage.embedding for stage in stages if stage.tied and stage.embedding is not None}
    reference = next(iter(stages[0].parameters()))
    total = reference.new_zeros(config.vocab_size, config.d_model)
    for embedding in own.values():
        if embedding.weight.grad is not None:
            total += embedding.weight.grad
    dist.all_reduce(total, group=group)
    for embedding in own.values():
        embedding.weight.grad = total.clone()
