"""Sequence parallel under Lightning: processes in two dimensions, one over the data and one over each sequence."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor

from seqzoo.parallel import Plan, training_mesh
from seqzoo.parallel.parallelize import Attention, Choices, Exchange
from seqzoo.parallel.recipe import check_sizes
from seqzoo.train.processes import TIMEOUT
from seqzoo.train.sharded_checkpoints import load_into, write_shards


class SequenceParallelStrategy(ModelParallelStrategy):
    """Trains with neighbours of ``sequence_parallel`` processes sharing each sequence, and their groups the data.

    A module's ``configure_model`` finds the mesh as ``self.device_mesh`` and calls
    :func:`seqzoo.parallel.shard_model` with the strategy's :attr:`ways`; its ``training_step`` takes its share of a
    batch by :func:`own_tokens` and returns its share of the loss, as :class:`seqzoo.train.modules.LanguageModeling`
    does. Samplers divide the data among groups, not processes: all processes of a group get the same batches. Start the
    script with torchrun, and give the trainer as many ``devices`` as there are processes on a machine::

        trainer = Trainer(accelerator="cpu", devices=4, strategy=SequenceParallelStrategy(sequence_parallel=2))

    Checkpoints are folders to which every process writes its share, and that any number of processes can load; a disk
    that all processes see is needed for that.

    Args:
        sequence_parallel: Processes that share a sequence; it divides their number.
        exchange: As of :func:`seqzoo.parallel.parallelize`, like the next two.
        attention: How softmax attention runs.
        head_ranks: For ``"usp"``.
        process_group_backend: As torch.distributed names it; None means gloo on a CPU, NCCL on GPUs.
        timeout: After which a process that waits for another gives up.

    Raises:
        ValueError: If ``sequence_parallel`` is no positive integer, or another option has an unknown value.
    """

    def __init__(
        self,
        sequence_parallel: int,
        *,
        exchange: Exchange = "chain",
        attention: Attention = "chain",
        head_ranks: int | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta = TIMEOUT,
    ) -> None:
        check_sizes(0, sequence_parallel)
        Choices(exchange, attention, head_ranks)
        super().__init__(process_group_backend=process_group_backend, timeout=timeout)
        self.sequence_parallel = sequence_parallel
        self.exchange: Exchange = exchange
        self.attention, self.head_ranks = attention, head_ranks

    @property
    def ways(self) -> dict[str, Any]:
        """How states come from process to process: options of :func:`seqzoo.parallel.shard_model`."""
        return {"exchange": self.exchange, "attention": self.attention, "head_ranks": self.head_ranks}

    def _configure_launcher(self) -> None:
        """Nothing to launch.

        Raises:
            RuntimeError: If no launcher has started the processes.
            ValueError: If their number is no multiple of ``sequence_parallel``.
        """
        environment = self.cluster_environment
        if environment is None or not environment.creates_processes_externally:
            raise RuntimeError(
                f"SequenceParallelStrategy needs processes that torchrun has started: torchrun --nproc-per-node "
                f"{self.sequence_parallel} SCRIPT"
            )
        check_sizes(environment.world_size(), self.sequence_parallel)

    def setup_environment(self) -> None:
        """Connects the processes and arranges them in a mesh, which the module gets."""
        self._setup_distributed()
        self._device_mesh = training_mesh(self.sequence_parallel, self.root_device.type)
        if self.lightning_module is None:
            raise RuntimeError("the strategy has no module yet; it is set up by the trainer")
        self.lightning_module._device_mesh = self._device_mesh

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The module's state, tensors divided among the processes."""
        return {} if self.lightning_module is None else self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """The optimiser's own state, tensors divided among the processes."""
        return getattr(optimizer, "_optimizer", optimizer).state_dict()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Every process writes its share into one folder, which appears whole or not at all."""
        if storage_options is not None:
            raise TypeError(
                f"SequenceParallelStrategy writes to a disk and takes no storage_options, got {storage_options}"
            )
        write_shards(checkpoint, Path(self.broadcast(filepath)))

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Puts a checkpoint into module and optimisers; returns what else it holds."""
        if self.lightning_module is None:
            raise RuntimeError("the strategy has no module yet; it is set up by the trainer")
        return load_into(Path(self.broadcast(checkpoint_path)), self.lightning_module, self.optimizers)


def own_tokens(mesh: Any, ids: Tensor, labels: Tensor, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor, Plan]:
    """This process's share of sequences that its group has whole.

    Args:
        mesh: The module's ``device_mesh``.
        ids: ``(B, T)``.
        labels: Alike, shifted already: that of a share's last token is the next share's first token.
        cu_seqlens: Boundaries of packed sequences.

    Returns:
        Both for this process's tokens, and the plan, which ``model.loss`` takes as ``cu_seqlens``.
    """
    group = mesh["sequence_parallel"]
    plan = Plan.balanced(ids.shape[1], group.size(), group.get_local_rank(), cu_seqlens)
    return plan.shard(ids).contiguous(), plan.shard(labels).contiguous(), plan


def total(value: Tensor, mesh: Any) -> Tensor:
    """The sum of the shares of all processes of a mesh."""
    value = value.detach().clone()
    for name in mesh.mesh_dim_names:
        torch.distributed.all_reduce(value, group=mesh.get_group(name))
    return value
