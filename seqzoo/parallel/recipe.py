"""Training over data and sequences at once: one call on a model and a mesh, after which its loss is all there is."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from seqzoo.mixer import State
from seqzoo.models.backbone import Backbone
from seqzoo.models.block import Block
from seqzoo.models.language_model import LanguageModel
from seqzoo.modules.linear_cross_entropy import IGNORED
from seqzoo.parallel.exchange import Group, keep_exchanges, once_a_forward
from seqzoo.parallel.parallelize import Attention, Exchange, parallelize

DIMENSIONS = ("data_parallel", "sequence_parallel")
PARAMETERS = ("sharded", "replicated")


def training_mesh(sequence_parallel: int, device_type: str = "cpu") -> DeviceMesh:
    """The mesh of all processes: ``sequence_parallel`` neighbours share sequences, the groups of them share the data.

    Args:
        sequence_parallel: Ranks that share a sequence; it divides the number of processes.
        device_type: ``"cpu"`` or ``"cuda"``.

    Returns:
        A mesh with the dimensions ``"data_parallel"`` and ``"sequence_parallel"``.

    Raises:
        RuntimeError: If the process group is not initialised.
        ValueError: If the number of processes is no multiple of ``sequence_parallel``.
    """
    if not dist.is_initialized():
        raise RuntimeError(
            "a mesh needs processes that know of one another: start them with torchrun --nproc-per-node N and call "
            "torch.distributed.init_process_group() first"
        )
    size = dist.get_world_size()
    check_sizes(size, sequence_parallel)
    return init_device_mesh(device_type, (size // sequence_parallel, sequence_parallel), mesh_dim_names=DIMENSIONS)


def check_sizes(processes: int, sequence_parallel: int) -> None:
    """Raises ValueError unless so many processes can be divided into groups that share sequences."""
    if isinstance(sequence_parallel, bool) or not isinstance(sequence_parallel, int) or sequence_parallel < 1:
        raise ValueError(f"sequence_parallel must be a positive integer, got {sequence_parallel!r}")
    if processes % sequence_parallel:
        raise ValueError(
            f"sequence_parallel must divide the number of processes, got {sequence_parallel} for {processes}; start a "
            f"multiple of {sequence_parallel}"
        )


def shard_model(
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    parameters: Literal["sharded", "replicated"] = "sharded",
    exchange: Exchange = "chain",
    attention: Attention = "chain",
    head_ranks: int | None = None,
) -> nn.Module:
    """Makes a model train on several sequences at once, each of which lies on several ranks, in place.

    What :func:`seqzoo.parallel.parallelize` does on ``mesh["sequence_parallel"]``, and over all ranks of the mesh what
    the gradients need: FSDP2 (https://arxiv.org/abs/2304.11277), which keeps of every block and of the rest a share of
    the parameters, their gradients and the optimiser's state on each rank, or DistributedDataParallel, which keeps them
    whole. Parameters begin as those of the first rank. Make the optimiser afterwards.

    Every rank then calls ``model.loss`` on its share of its group's sequences, ``backward`` and the optimiser's step,
    and nothing else::

        mesh = training_mesh(sequence_parallel=4)
        model = shard_model(LanguageModel(config), mesh)
        optimizer = torch.optim.AdamW(model.parameters())
        rank, size = mesh.get_local_rank("sequence_parallel"), mesh["sequence_parallel"].size()
        for ids in batches_of(mesh.get_local_rank("data_parallel")):  # the same on all ranks of a group
            plan = Plan.balanced(ids.shape[1], size, rank)
            labels = next_tokens(ids)  # before the tokens are divided
            loss = model.loss(plan.shard(ids), plan.shard(labels), cu_seqlens=plan)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    The loss is this rank's share of the mean over all tokens that count, those of all groups, so that the shares add up
    to what one process would give for all sequences together, and gradients are its gradients. Auxiliary losses are the
    groups' means, weighted by the tokens of each that count; for a mean over tokens that is the whole batch's where
    groups have equally many. To log the loss add up ``loss.detach()`` over all ranks.

    Gradients of several backward passes add up, each the gradient of its own loss. Blocks of a model with
    ``checkpoint_blocks`` are recomputed without communicating. Random numbers (dropout) are each rank's own: seed the
    ranks differently once the model is built.

    Args:
        model: A :class:`LanguageModel`, or a :class:`Backbone` alone, whose outputs the caller makes a loss of; all of
            its parameters have one dtype.
        mesh: Two dimensions, ``"data_parallel"`` and ``"sequence_parallel"``, as :func:`training_mesh` makes it; either
            may be of size 1.
        parameters: ``"sharded"`` (FSDP2) or ``"replicated"`` (DistributedDataParallel; a LanguageModel's loss alone).
        exchange: As of :func:`parallelize`, like ``attention`` and ``head_ranks``.

    Returns:
        The model.

    Raises:
        TypeError: If the mesh is no DeviceMesh, or the model neither of the two.
        ValueError: If the mesh has other dimensions, the parameters several dtypes, an option an unknown value, or as
            :func:`parallelize` does.
    """
    if parameters not in PARAMETERS:
        raise ValueError(f"parameters must be one of {', '.join(PARAMETERS)}, got {parameters!r}")
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"mesh must be a DeviceMesh, got {type(mesh).__name__}")
    if mesh.mesh_dim_names != DIMENSIONS:
        raise ValueError(f"mesh must have the dimensions {DIMENSIONS}, as training_mesh makes it, got {mesh}")
    accepted = LanguageModel if parameters == "replicated" else LanguageModel | Backbone
    if not isinstance(model, accepted):
        names = "a LanguageModel" if parameters == "replicated" else "a LanguageModel or a Backbone"
        raise TypeError(f"parameters={parameters!r} takes {names}, got {type(model).__name__}")
    check_dtypes(model)
    parallelize(model, mesh["sequence_parallel"], exchange=exchange, attention=attention, head_ranks=head_ranks)
    backbone = model.backbone if isinstance(model, LanguageModel) else model
    for block in backbone.blocks:
        copied = parameters == "sharded" and mesh.device_type == "cpu"
        call = BlockCall(cast("Block", block), backbone.config.checkpoint_blocks, copied)
        block.forward, block.step = call.forward, call.step  # pyright: ignore[reportArgumentType] - instance's own
    flat = mesh[DIMENSIONS]._flatten("data_and_sequence")
    if mesh.device_type != "cpu":
        model.to(torch.device(mesh.device_type, torch.get_device_module(mesh.device_type).current_device()))
    broadcast(model, flat)
    if isinstance(model, LanguageModel):
        handle = flat.get_group()
        everyone = Group(handle, dist.get_rank(handle), dist.get_world_size(handle), "data_and_sequence")
        model.loss = WeightedLoss(model, everyone, mesh).loss
    if parameters == "sharded":
        shard_parameters(model, backbone, flat)
    else:
        replicate_parameters(cast("LanguageModel", model), flat)
    return model


def check_dtypes(model: nn.Module) -> None:
    """Raises ValueError if parameters have several dtypes, which FSDP2 cannot bring into one buffer."""
    first: dict[torch.dtype, str] = {}
    for name, parameter in model.named_parameters():
        first.setdefault(parameter.dtype, name)
    if len(first) > 1:
        found = ", ".join(f"{name} of {dtype}" for dtype, name in first.items())
        raise ValueError(
            f"the parameters must have one dtype, got {found}; keep them in float32 and compute under torch.autocast"
        )


def broadcast(model: nn.Module, mesh: DeviceMesh) -> None:
    """Gives every rank the parameters and buffers of the first."""
    for tensor in (*model.parameters(), *model.buffers()):
        dist.broadcast(tensor.detach(), group=mesh.get_group(), group_src=0)


def shard_parameters(model: nn.Module, backbone: Backbone, mesh: DeviceMesh) -> None:
    """FSDP2 on every block and on the rest, with gradients that are summed."""
    parts = (*backbone.blocks, model)
    for part in parts:
        sharded = cast("FSDPModule", fully_shard(part, mesh=mesh))
        # the ranks' gradients are shares already; the default divides by their number
        sharded.set_gradient_divide_factor(1.0)
        if mesh.device_type == "cpu":
            # a factor other than the number of ranks is a kind of reduction that gloo does not have
            sharded.set_force_sum_reduction_for_comms(True)
        register_fsdp_forward_method(part, "step")
    if isinstance(model, LanguageModel):
        register_fsdp_forward_method(model, "loss")


def replicate_parameters(model: LanguageModel, mesh: DeviceMesh) -> None:
    """DistributedDataParallel around the model's loss, with gradients that are summed."""
    whole = DistributedDataParallel(LossCall(model, mesh.size()), process_group=mesh.get_group(), init_sync=False)
    model.loss = cast("Any", whole.forward)


class BlockCall:
    """A block's forward that leaves every parameter a gradient, also on a rank without tokens.

    FSDP2 and DDP reduce what has a gradient: ranks that differ in that wait for one another forever.

    Args:
        block: The block.
        recompute: Whether the backward pass computes it anew.
        copied: Whether it runs on copies of its parameters. What was viewed as a NumPy array, as ops on the CPU do,
            keeps its memory for good, and FSDP2 has to give back that of the parameters it gathers.
    """

    def __init__(self, block: Block, recompute: bool, copied: bool) -> None:
        self.block, self.recompute, self.copied = block, recompute, copied

    def forward(self, x: Tensor, *arguments: Any, **options: Any) -> Any:
        """As the block's own."""
        run: Callable[..., Any] = self._run
        grad = torch.is_grad_enabled()
        if self.recompute and self.block.training and grad:
            # around it the backbone's own checkpoint finds nothing saved that it would have to recompute
            run = functools.partial(checkpoint, run, use_reentrant=False, context_fn=keep_exchanges)
        # of the inputs: FSDP2 warns of outputs that are views
        return run(Touch.apply(x, *trained(self.block)) if grad else x, *arguments, **options)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """As the block's own."""
        return self._run(x, state, method="step")

    def _run(self, *arguments: Any, method: str = "forward", **options: Any) -> Any:
        own = Own(self.block, method)
        if not self.copied:
            return own(*arguments, **options)
        copies = {name: parameter.clone() for name, parameter in own.named_parameters()}
        return functional_call(own, copies, arguments, options)


class Own(nn.Module):
    """A method of a block as its class defines it, which runs as a module's forward."""

    def __init__(self, block: nn.Module, method: str) -> None:
        super().__init__()
        self.block, self.method = block, method

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """As the class's method."""
        return getattr(type(self.block), self.method)(self.block, *arguments, **options)


class Touch(torch.autograd.Function):
    """Returns its first input; the others get a gradient of zero."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, *parameters: Tensor) -> Tensor:
        ctx.parameters = [(parameter.shape, parameter.dtype) for parameter in parameters]
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore - torch types no arity
        return grad, *(grad.new_zeros((), dtype=dtype).expand(shape) for shape, dtype in ctx.parameters)


def trained(module: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters that are trained."""
    return (parameter for parameter in module.parameters() if parameter.requires_grad)


class WeightedLoss:
    """The loss of a parallel language model as this rank's share of the mean over all groups' tokens."""

    def __init__(self, model: LanguageModel, everyone: Group, mesh: DeviceMesh) -> None:
        self.model, self.everyone, self.own = model, everyone, model.loss
        self.n_groups, self.group = mesh.size(0), mesh.get_local_rank(DIMENSIONS[0])

    def loss(self, ids: Tensor, labels: Tensor, *arguments: Any, **options: Any) -> Any:
        """As the parallel model's own, weighted by what its group has of the labels that count."""
        result = self.own(ids, labels, *arguments, **options)
        counts = once_a_forward(lambda: self._counted(labels))
        loss = result[0] if isinstance(result, tuple) else result
        loss = loss * (counts[self.group].to(loss.dtype) / counts.sum().clamp(min=1))
        return (loss, result[1]) if isinstance(result, tuple) else loss

    def _counted(self, labels: Tensor) -> Tensor:
        """The labels that count, of every group."""
        counts = torch.zeros(self.n_groups, dtype=torch.int64, device=labels.device)
        counts[self.group] = (labels != IGNORED).sum()
        with self.everyone.guard(type(self.model).__name__, "count the labels of all groups"):
            dist.all_reduce(counts, group=self.everyone.handle)
        return counts


class LossCall(nn.Module):
    """A module whose forward is a model's loss, of which DDP's mean of the gradients is the sum.

    Gradients that were summed before, in the passes of one step, are left as they are by a mean.
    """

    def __init__(self, model: LanguageModel, size: int) -> None:
        super().__init__()
        self.model, self.own, self.size = model, model.loss, size

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """The loss, whose gradient is multiplied by the number of ranks."""
        result = self.own(*arguments, **options)
        loss = result[0] if isinstance(result, tuple) else result
        # the values cancel, the gradients do not
        loss = loss + (self.size - 1) * (loss - loss.detach())
        return (loss, result[1]) if isinstance(result, tuple) else loss
