"""What a rank runs for the recipe and the pipelines: cases of its own beside those of ranks.py."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)
from torch.distributed.tensor import DTensor

from seqzoo.models import LanguageModel, ModelConfig
from seqzoo.parallel import (
    PipelineLoss,
    Plan,
    next_tokens,
    shard_model,
    split_stages,
    sum_tied_gradients,
    training_mesh,
)
from seqzoo.testing import boundaries

common = runpy.run_path(str(Path(__file__).with_name("ranks.py")))
case: Callable[..., Any] = common["case"]

# every way to hand on a state, a block at two depths, experts, learned positions
MODEL = {
    "vocab_size": 19,
    "d_model": 16,
    "n_layers": 6,
    "pattern": [
        "mamba",
        {"name": "attention", "n_heads": 2, "shared": "global"},
        {"name": "gated_deltanet", "n_heads": 2, "d_conv": None},
        {"name": "min_gru", "mlp": "none"},
        {"name": "attention", "n_heads": 2, "shared": "global"},
        {"parallel": [{"name": "sliding_window_attention", "n_heads": 2, "window": 4}, "s4d"], "mlp": "experts"},
    ],
    "n_experts": 3,
    "max_positions": 40,
    # a mean over each group's tokens alone is that of the whole batch; a balance loss is not
    "auxiliary_weight": 0.0,
}
# tokens of every rank of a group, in turn
COUNTS = {1: [(13,), (9,)], 2: [(9, 4), (0, 9)], 4: [(3, 0, 6, 4), (0, 2, 0, 7)]}
STEPS = 2


def language_model(**options: Any) -> LanguageModel:
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(**{**MODEL, **options})).double()
    # what is zero to begin with hides what depends on it
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def sample(step: int, replica: int, packed: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """A group's sequences of one step, their labels, of which the second group has fewer, and boundaries."""
    total = sum(COUNTS[2][step])
    generator = torch.Generator().manual_seed(10 * step + replica)
    ids = torch.randint(0, 19, (1 if packed else 2, total), generator=generator)
    bounds = boundaries((2, 0, total - 5, 3)) if packed else None
    labels = next_tokens(ids, bounds)
    labels[:, :: 2 + 3 * replica] = -100
    if replica and step:
        labels[:] = -100
    return ids, labels, bounds


def optimizer_of(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)


def one_process(replicas: int, packed: bool, **options: Any) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and weights after two steps on the sequences of all groups."""
    model = language_model(**options)
    optimizer, losses = optimizer_of(model), []
    for step in range(STEPS):
        batches = [sample(step, replica, packed) for replica in range(replicas)]
        total = sum(int((labels != -100).sum()) for _, labels, _ in batches)
        loss = torch.zeros((), dtype=torch.float64)
        for ids, labels, bounds in batches:
            loss = loss + model.loss(ids, labels, cu_seqlens=bounds) * (int((labels != -100).sum()) / total)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, {name: value.detach() for name, value in model.state_dict().items()}


def two_dimensions(mesh: DeviceMesh, sequence_parallel: int) -> DeviceMesh:
    sizes = mesh.size() // sequence_parallel, sequence_parallel
    return init_device_mesh(mesh.device_type, sizes, mesh_dim_names=("data_parallel", "sequence_parallel"))


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@case
def recipe(
    mesh: DeviceMesh,
    rank: int,
    sequence_parallel: int,
    packed: bool,
    parameters: str,
    way: dict[str, Any],
    **options: Any,
) -> Any:
    """Losses and weights after two steps of a model that the recipe has divided."""
    both = two_dimensions(mesh, sequence_parallel)
    model = language_model(**options)
    if rank:
        # the first rank's count
        with torch.no_grad():
            next(iter(model.parameters())).zero_()
    shard_model(model, both, parameters=parameters, **way)
    optimizer, losses, runs = optimizer_of(model), [], [0]

    def count(*_: Any) -> None:
        runs[0] += 1

    model.backbone.blocks[0].mixer_norm.register_forward_hook(count)
    for step in range(STEPS):
        ids, labels, bounds = sample(step, both.get_local_rank(0), packed)
        plan = Plan.of(COUNTS[sequence_parallel][step], both.get_local_rank(1), bounds)
        loss = model.loss(plan.shard(ids), plan.shard(labels), cu_seqlens=plan)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total.item())
    forwards = runs[0]
    held = sum(parameter.to_local().numel() for parameter in model.parameters() if isinstance(parameter, DTensor))
    with torch.no_grad():
        ids, _, _ = sample(0, 0, False)
        own = Plan.of(COUNTS[sequence_parallel][0], both.get_local_rank(1)).shard(ids)
        _, state = model.eval()(own, return_state=True)
        logits, _ = model.step(ids[:, 0], state)
    weights = {name: whole(value).detach().numpy() for name, value in model.state_dict().items()}
    return {"losses": losses, "weights": weights, "step": logits.numpy(), "held": held, "forwards": forwards}


@case
def compiled(mesh: DeviceMesh, rank: int, parameters: str, way: dict[str, Any]) -> Any:
    """Losses of two steps, compiled (with breaks of the graph where ranks communicate) and not."""
    both = two_dimensions(mesh, 2)
    found = []
    for backend in ("aot_eager", None):
        pattern = ["min_gru", {"name": "attention", "n_heads": 2}]
        model = shard_model(language_model(n_layers=2, pattern=pattern), both, parameters=parameters, **way)
        loss_of = model.loss if backend is None else torch.compile(model.loss, backend=backend)
        optimizer, losses = optimizer_of(model), []
        for step in range(STEPS):
            ids, labels, _ = sample(step, both.get_local_rank(0), False)
            plan = Plan.of(COUNTS[2][step], both.get_local_rank(1))
            loss = loss_of(plan.shard(ids), plan.shard(labels), cu_seqlens=plan)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        found.append(losses)
    return found


@case
def accumulation(mesh: DeviceMesh, rank: int, parameters: str) -> Any:
    """Gradients of two passes that add up."""
    both = two_dimensions(mesh, 2)
    model = shard_model(language_model(), both, parameters=parameters)
    for step in range(STEPS):
        ids, labels, _ = sample(step, both.get_local_rank(0), False)
        plan = Plan.of(COUNTS[2][step], both.get_local_rank(1))
        model.loss(plan.shard(ids), plan.shard(labels), cu_seqlens=plan).backward()
    return {name: whole(parameter.grad).numpy() for name, parameter in model.named_parameters()}


@case
def recipe_refusals(mesh: DeviceMesh, rank: int) -> None:
    """Errors before anything is sent."""
    both = two_dimensions(mesh, 2)
    with pytest.raises(ValueError, match="sequence_parallel must divide the number of processes, got 3 for 4; start a"):
        training_mesh(3, mesh.device_type)
    with pytest.raises(ValueError, match="sequence_parallel must be a positive integer, got 0"):
        training_mesh(0, mesh.device_type)
    assert training_mesh(4, mesh.device_type).shape == (1, 4)
    with pytest.raises(ValueError, match="mesh must have the dimensions"):
        shard_model(language_model(), mesh)
    with pytest.raises(TypeError, match="mesh must be a DeviceMesh, got ProcessGroup"):
        shard_model(language_model(), mesh.get_group())
    with pytest.raises(ValueError, match="parameters must be one of sharded, replicated, got 'halved'"):
        shard_model(language_model(), both, parameters="halved")
    with pytest.raises(TypeError, match="takes a LanguageModel or a Backbone, got Linear"):
        shard_model(torch.nn.Linear(2, 2), both)
    with pytest.raises(TypeError, match="takes a LanguageModel, got Backbone"):
        shard_model(language_model().backbone, both, parameters="replicated")
    with pytest.raises(ValueError, match=r"must have one dtype, got embedding\.weight of torch\.bfloat16, .*float32"):
        shard_model(language_model().float().bfloat16(), both)


# -- pipelines --

SCHEDULES = {
    "GPipe": ScheduleGPipe,
    "1F1B": Schedule1F1B,
    "Interleaved1F1B": ScheduleInterleaved1F1B,
    "InterleavedZeroBubble": ScheduleInterleavedZeroBubble,
    "ZBVZeroBubble": ScheduleZBVZeroBubble,
}
MICROBATCHES = 4


def pipeline_model(**options: Any) -> LanguageModel:
    """No block at two depths, and auxiliary losses that are means over tokens."""
    pattern = [
        {name: value for name, value in one.items() if name != "shared"} if isinstance(one, dict) else one
        for one in MODEL["pattern"]
    ]
    pattern[-1] = {**pattern[-1], "mlp": "gated"}
    return language_model(**{"pattern": pattern, **options})


def pipeline_batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 19, (2 * MICROBATCHES, 11), generator=generator)
    labels = next_tokens(ids)
    # micro-batches have unequally many labels, one has none
    labels[0, 3:] = -100
    labels[2:4] = -100
    return ids, labels


@case
def pipeline(mesh: DeviceMesh, rank: int, schedule: str, **options: Any) -> Any:
    """The loss, and the gradients of this rank's stages, of a step of a schedule on two ranks."""
    size, group = mesh.size(), mesh.get_group()
    several = schedule not in ("GPipe", "1F1B")
    n_stages = (2 if several else 1) * size
    stages = split_stages(pipeline_model(**options), n_stages)
    indices = [rank]
    if several:
        indices.append(2 * size - 1 - rank if schedule == "ZBVZeroBubble" else size + rank)
    parts = [
        PipelineStage(stages[index], index, n_stages, torch.get_default_device(), group=group) for index in indices
    ]
    loss = PipelineLoss(stages[-1], MICROBATCHES)
    run = SCHEDULES[schedule](parts if several else parts[0], MICROBATCHES, loss_fn=loss, scale_grads=False)
    ids, labels = pipeline_batch()
    losses: list[Tensor] = []
    loss.expect(labels)
    given = {"target": labels, "losses": losses} if n_stages - 1 in indices else {}
    run.step(*([ids] if 0 in indices else []), **given)
    own = [stages[index] for index in indices]
    sum_tied_gradients(own, group)
    gradients = {
        key: parameter.grad.numpy()
        for stage in own
        for key, parameter in stage.named_parameters()
        if parameter.grad is not None
    }
    return {"loss": sum(losses).item() if losses else None, "gradients": gradients}


if __name__ == "rank":
    common["serve"](connection, rank, size, store, timeout, device)  # noqa: F821 - given by the pool  # pyright: ignore
