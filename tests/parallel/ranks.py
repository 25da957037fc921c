"""What a rank runs: a process of the pool in conftest.py executes this file and answers one case after another."""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from seqzoo import create, testing
from seqzoo.layers import Bidirectional
from seqzoo.models import ClassifierConfig, LanguageModel, ModelConfig, SequenceClassifier
from seqzoo.models.parallel_mixers import ParallelMixers
from seqzoo.ops import checks, linear_scan
from seqzoo.parallel import (
    Plan,
    exchanges_of,
    keep_exchanges,
    next_tokens,
    parallelize,
    payload_bytes,
    sum_gradients,
)
from seqzoo.parallel.exchange import Group
from seqzoo.parallel.ops import ParallelOps, answered_by
from seqzoo.parallel.transports import TRANSPORTS
from seqzoo.testing import boundaries, differentiable, parameters_of, random_state, subjects

# places of a cache that are given cotangents, more than any has
PLACES = 64
CASES: dict[str, Callable[..., Any]] = {}


def case(function: Callable[..., Any]) -> Callable[..., Any]:
    CASES[function.__name__] = function
    return function


def inputs(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 1) -> torch.Tensor:
    """As seqzoo.testing's, on this rank's device."""
    return testing.inputs(shape, dtype, torch.get_default_device(), seed)


def cotangents(state: dict[str, torch.Tensor], spec: dict[str, Any], seed: int) -> dict[str, torch.Tensor]:
    """Weights of a final state, the same whatever the capacity of a cache."""
    found = {}
    for key, value in state.items():
        if differentiable(value):
            shape = [PLACES if want is None else have for have, want in zip(value.shape, spec[key][0], strict=True)]
            weights = inputs(tuple(shape), value.dtype, seed=seed)
            found[key] = weights[tuple(slice(size) for size in value.shape)]
    return found


def one_process(
    label: str, size: int, counts: tuple[int, ...], lengths: tuple[int, ...] | None, given: bool, final: bool
) -> dict[str, torch.Tensor]:
    """The results of one process for the sum of the ranks' losses; ``size`` is the number of ranks."""
    return results(label, None, 0, size, counts, lengths, given, final)


def results(
    label: str,
    mesh: DeviceMesh | None,
    rank: int,
    size: int,
    counts: tuple[int, ...],
    lengths: tuple[int, ...] | None,
    given: bool,
    final: bool,
    **ways: Any,
) -> dict[str, torch.Tensor]:
    """Outputs, final state and gradients of one rank, or with no mesh of one process with all the tokens."""
    mixer = next(one for one in subjects() if one.label == label).make()
    batch, total = (2, sum(counts)) if lengths is None else (1, sum(counts))
    rows = batch if lengths is None else len(lengths)
    x = inputs((batch, total, 16), torch.float64)
    state = random_state(mixer, rows, x) if given else None
    spec = {} if "state" in mixer.limits else mixer.state_spec(rows, torch.float64)
    leaves = {} if state is None else {k: v.requires_grad_() for k, v in state.items() if differentiable(v)}
    weight = inputs((batch, total, 16), torch.float64, seed=5)
    bounds = None if lengths is None else boundaries(lengths)
    if mesh is not None:
        parallelize(mixer, mesh, **ways)
        plan = Plan.of(counts, rank, bounds)
        x, weight = plan.shard(x).contiguous(), plan.shard(weight)
    x.requires_grad_()
    # one process is the measure: a convolution is exact as a scan, which a state asks for, and by transforms less so
    asked = final or (mesh is None and "state" not in mixer.limits)
    y, after, auxiliary = mixer(x, state, cu_seqlens=bounds, return_state=asked, return_auxiliary=True)
    after = after if final else None
    loss = (y * weight).sum()
    if label == "plain()":
        loss = loss + auxiliary
    for other in range(size) if mesh is None else (rank,):
        for key, value in cotangents(after or {}, spec, 6 + other).items():
            loss = loss + (after[key] * value).sum().real
    sources = {"x": x} | {f"initial {k}": v for k, v in leaves.items()} | parameters_of(mixer)
    gradients = torch.autograd.grad(loss, list(sources.values()), allow_unused=True, materialize_grads=True)
    found = {"y": y, "auxiliary": auxiliary} | {f"final {key}": value for key, value in (after or {}).items()}
    found |= {f"gradient of {name}": value for name, value in zip(sources, gradients, strict=True)}
    return {name: value.detach() for name, value in found.items()}


@case
def mixer(mesh: DeviceMesh, rank: int, label: str, cases: list[dict[str, Any]], **ways: Any) -> list[dict[str, Any]]:
    """Each case's results on this rank, as arrays."""
    return [
        {name: value.numpy() for name, value in results(label, mesh, rank, mesh.size(), **one, **ways).items()}
        for one in cases
    ]


# -- models --

MODEL = {
    "vocab_size": 19,
    "d_model": 16,
    "n_layers": 4,
    "pattern": [
        "min_gru",
        {"name": "attention", "n_heads": 2},
        {"name": "gated_deltanet", "n_heads": 2, "d_conv": None},
        {"name": "sliding_window_attention", "n_heads": 2, "window": 4},
    ],
    "max_positions": 40,
    "auxiliary_weight": 0.5,
}


def language_model() -> LanguageModel:
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(**MODEL)).double()
    # what is zero to begin with hides what depends on it
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def tokens(segment: int, lengths: tuple[int, ...], packed: bool) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Ids and labels, some of which do not count, of one segment, and the boundaries of packed sequences."""
    generator = torch.Generator().manual_seed(segment)
    ids = torch.randint(0, 19, (1 if packed else 2, sum(lengths)), generator=generator)
    bounds = boundaries(lengths) if packed else None
    labels = next_tokens(ids, bounds)
    labels[:, ::5] = -100
    return ids, labels, bounds


def train(
    mesh: DeviceMesh | None,
    rank: int,
    counts: list[tuple[int, ...]],
    packed: bool,
    recompute: bool,
    exchange: str = "chain",
) -> Any:
    """The loss of two segments of the same sequences and its gradients."""
    model = language_model()
    if mesh is not None:
        parallelize(model, mesh, exchange=exchange)
    if recompute:
        for block in model.backbone.blocks:
            block.forward = recomputed(block.forward)
    state, total = None, torch.zeros((), dtype=torch.float64)
    for segment, shares in enumerate(counts):
        size = sum(shares)
        lengths = (2, 0, size - 5, 3) if packed else (size,)
        ids, labels, bounds = tokens(segment, lengths, packed)
        if mesh is None:
            loss, state = model.loss(ids, labels, state, cu_seqlens=bounds, return_state=True)
        else:
            plan = Plan.of(shares, rank, bounds)
            given = bounds if segment else plan
            ids, labels = plan.shard(ids), plan.shard(labels)
            loss, state = model.loss(ids, labels, state, cu_seqlens=given, return_state=True)
        total = total + loss
    total.backward()
    if mesh is not None:
        sum_gradients(model)
        dist.all_reduce(total.detach(), group=mesh.get_group())
    return {"loss": total.detach().numpy()} | {
        f"gradient of {name}": parameter.grad.numpy() for name, parameter in model.named_parameters()
    }


def recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(x: torch.Tensor, state: Any = None, **options: Any) -> Any:
        return checkpoint(forward, x, state, use_reentrant=False, context_fn=keep_exchanges, **options)

    return run


@case
def training(mesh: DeviceMesh, rank: int, **options: Any) -> Any:
    return train(mesh, rank, **options)


@case
def sharded_parameters(mesh: DeviceMesh, rank: int) -> Any:
    """One step of two data-parallel replicas of two ranks each, whose parameters FSDP2 shards over all four."""
    names = ("data_parallel", "sequence_parallel")
    both = init_device_mesh(mesh.device_type, (2, 2), mesh_dim_names=names)
    model = parallelize(language_model(), both["sequence_parallel"])
    flat = both._flatten("data_sequence")
    for part in (*model.backbone.blocks, model):
        fully_shard(part, mesh=flat)
        # gradients of shares are added up, not averaged
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(mesh.device_type == "cpu")
    register_fsdp_forward_method(model, "loss")
    ids, labels, _ = tokens(both.get_local_rank(0), (13,), False)
    plan = Plan.of((9, 4), both.get_local_rank(1))
    model.loss(plan.shard(ids), plan.shard(labels)).backward()
    return {f"gradient of {name}": parameter.grad.full_tensor().numpy() for name, parameter in model.named_parameters()}


@case
def logits(mesh: DeviceMesh, rank: int, counts: tuple[int, ...]) -> Any:
    """Without gradients: this rank's logits, then one token more on every rank."""
    model = parallelize(language_model(), mesh)
    ids, _, _ = tokens(0, (sum(counts),), False)
    with torch.no_grad():
        y, state = model(Plan.of(counts, rank).shard(ids), return_state=True)
        after, _ = model.step(ids[:, 0], state)
    return {"y": y.numpy(), "final step": after.numpy()}


@functools.cache
def trained(ranks: int, exchange: str, length: int) -> Any:
    """What takes a training step of a model on one sequence, which ``ranks`` share."""
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(vocab_size=256, d_model=64, n_layers=4, pattern=["mamba", "gated_deltanet"]))
    device = torch.get_default_device().type
    mesh = DeviceMesh(device, list(range(ranks)), mesh_dim_names=("sequence_parallel",))
    plan = Plan.balanced(length, ranks, dist.get_rank())
    ids = torch.randint(0, 256, (1, length))
    ids, labels = plan.shard(ids), plan.shard(next_tokens(ids))
    if ranks > 1:
        parallelize(model, mesh, exchange=exchange)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def step() -> float:
        optimizer.zero_grad()
        loss = model.loss(ids, labels, cu_seqlens=plan if ranks > 1 else None)
        loss.backward()
        if ranks > 1:
            sum_gradients(model)
        optimizer.step()
        return loss.item()

    return step


@case
def measured_step(mesh: DeviceMesh, rank: int, exchange: str, length: int) -> float:
    """The loss of a step, without filling memory, which would be measured too."""
    torch.use_deterministic_algorithms(False)
    try:
        return trained(mesh.size(), exchange, length)()
    finally:
        torch.use_deterministic_algorithms(True, warn_only=True)


# -- exchanges --


@case
def both_ways(
    mesh: DeviceMesh, rank: int, mixer_name: str, options: dict[str, Any], same: bool, cases: list[Any], exchange: str
) -> Any:
    """Bidirectional mixers, of which the suite's subjects have one."""
    return [both(mesh, rank, mixer_name, options, same, *one, exchange=exchange) for one in cases]


def both(
    mesh: DeviceMesh | None,
    rank: int,
    name: str,
    options: dict[str, Any],
    same: bool,
    counts: Any,
    lengths: Any,
    exchange: str = "chain",
) -> dict[str, Any]:
    torch.manual_seed(0)
    one = create(name, d_model=16, **options)
    mixer = Bidirectional(one, one if same else None).double()
    bounds = None if lengths is None else boundaries(lengths)
    x = inputs((2 if lengths is None else 1, sum(counts), 16), torch.float64)
    weight = inputs(tuple(x.shape), torch.float64, seed=5)
    if mesh is not None:
        parallelize(mixer, mesh, exchange=exchange)
        plan = Plan.of(counts, rank, bounds)
        x, weight = plan.shard(x).contiguous(), plan.shard(weight)
    x.requires_grad_()
    y, _ = mixer(x, cu_seqlens=bounds)
    (y * weight).sum().backward()
    sources = {"x": x} | parameters_of(mixer)
    return {"y": y.detach().numpy()} | {
        f"gradient of {key}": (torch.zeros_like(value) if value.grad is None else value.grad).numpy()
        for key, value in sources.items()
    }


def beside(
    mesh: DeviceMesh | None, rank: int, counts: tuple[int, ...], lengths: Any, exchange: str = "chain"
) -> dict[str, Any]:
    """Mixers side by side, of which one exchanges summaries and one does not, from a state to a state."""
    torch.manual_seed(0)
    mixer = ParallelMixers([create("retnet", d_model=16, n_heads=2), create("attention", d_model=16, n_heads=2)])
    mixer = mixer.double()
    bounds = None if lengths is None else boundaries(lengths)
    x = inputs((2 if lengths is None else 1, sum(counts), 16), torch.float64)
    state = random_state(mixer, 2 if lengths is None else len(lengths), x)
    if mesh is not None:
        parallelize(mixer, mesh, exchange=exchange)
        x = Plan.of(counts, rank, bounds).shard(x).contiguous()
    x.requires_grad_()
    y, after = mixer(x, state, cu_seqlens=bounds, return_state=True)
    loss = y.square().sum()
    if rank == 0:
        loss = loss + after["0.S"].square().sum() + after["1.k"].square().sum()
    loss.backward()
    found = {f"gradient of {name}": parameter.grad for name, parameter in parameters_of(mixer).items()}
    found |= {"y": y, "gradient of x": x.grad, "final 0.S": after["0.S"], "final 0.position": after["0.position"]}
    return {name: value.detach().numpy() for name, value in found.items()}


@case
def side_by_side(mesh: DeviceMesh, rank: int, exchange: str, cases: list[Any]) -> Any:
    return [beside(mesh, rank, *one, exchange) for one in cases]


def reverse_scan(
    mesh: DeviceMesh | None, rank: int, counts: tuple[int, ...], lengths: Any, exchange: str = "allgather"
) -> dict[str, Any]:
    """A scan from the last token to the first, which no mixer has."""
    bounds = None if lengths is None else boundaries(lengths)
    rows, batch = (2, 2) if lengths is None else (len(lengths), 1)
    a, b, weight = inputs((3, batch, sum(counts), 4), torch.float64).unbind(0)
    given = inputs((rows, 4), torch.float64, seed=2).requires_grad_()
    a = a / (1 + a.abs())
    if mesh is None:
        a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
        h, final = linear_scan(a, b, given, reverse=True, cu_seqlens=bounds)
    else:
        plan = Plan.of(counts, rank, bounds)
        a, b, weight = (plan.shard(value).clone() for value in (a, b, weight))
        a.requires_grad_()
        b.requires_grad_()
        packing = plan.packing()
        group = Group(mesh.get_group(), rank, mesh.size(), "sequence_parallel")
        with answered_by(ParallelOps(group, plan, packing, "a scan", TRANSPORTS[exchange], True)):
            h, final = linear_scan(a, b, given, reverse=True, cu_seqlens=packing)
    loss = (h * weight).sum() + (final.square().sum() if rank == 0 else 0)
    loss.backward()
    found = {"y": h, "final": final, "gradient of a": a.grad, "gradient of b": b.grad}
    # a rank that no sequence begins on has no share in it
    found["gradient of given"] = torch.zeros_like(given) if given.grad is None else given.grad
    return {name: value.detach().numpy() for name, value in found.items()}


@case
def turned_scan(mesh: DeviceMesh, rank: int, exchange: str, cases: list[Any]) -> Any:
    return [reverse_scan(mesh, rank, *one, exchange) for one in cases]


class Collectives(TorchDispatchMode):
    """Counts what ranks call of torch.distributed.

    As PyTorch's CommDebugMode, whose hooks on modules fail inside a mixer that stands alone, and which knows no
    messages to single ranks.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.calls[str(func.overloadpacket).removeprefix("c10d.")] += 1
        return func(*args, **(kwargs or {}))


@case
def payload(
    mesh: DeviceMesh,
    rank: int,
    mixer_name: str,
    options: dict[str, Any],
    counts: tuple[int, ...],
    lengths: Any,
    final: bool,
    exchange: str,
) -> Any:
    """Calls and bytes that a rank begins to send, forward and backward, what the formula says, and collectives."""
    mixer = create(mixer_name, d_model=16, **options).double()
    bounds = None if lengths is None else boundaries(lengths)
    plan = Plan.of(counts, rank, bounds)
    batch = 2 if lengths is None else 1
    formula = payload_bytes(mixer, plan, exchange, batch_size=batch, final=final)
    parallelize(mixer, mesh, exchange=exchange, strict=True)
    sent: Counter[str] = Counter()
    direction = "forward"

    def weighing(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(group: Group, message: torch.Tensor, *arguments: Any) -> Any:
            sent[f"calls {direction}"] += 1
            sent[f"bytes {direction}"] += message.numel()
            return function(group, message, *arguments)

        return run

    with pytest.MonkeyPatch.context() as patch:
        for method in ("all_gather", "post"):
            patch.setattr(Group, method, weighing(getattr(Group, method)))
        with Collectives() as there:
            y, after = mixer(inputs((batch, counts[rank], 16), torch.float64), cu_seqlens=plan, return_state=final)
        loss = y.sum() + sum(value.sum() for value in (after or {}).values())
        direction = "backward"
        with Collectives() as back:
            loss.backward()
    return dict(sent), formula, [dict(seen.calls) for seen in (there, back)]


@case
def messages(
    mesh: DeviceMesh,
    rank: int,
    gather: bool,
    counts: tuple[int, ...],
    lengths: Any,
    final: bool,
    exchange: str = "chain",
) -> Any:
    """How often a training step of one mixer calls what communicates."""
    mixer = parallelize(create("min_gru", d_model=16).double(), mesh, exchange=exchange)
    bounds = boundaries(lengths)
    given = bounds if gather else Plan.of(counts, rank, bounds)
    calls: Counter[str] = Counter()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("gather", "send", "receive", "broadcast", "add_up", "all_gather", "post", "expect"):
            patch.setattr(Group, name, counted(getattr(Group, name), name, calls))
        y, _ = mixer(inputs((1, counts[rank], 16), torch.float64), cu_seqlens=given, return_state=final)
        y.sum().backward()
    return dict(calls)


def counted(function: Callable[..., Any], name: str, calls: Counter[str]) -> Callable[..., Any]:
    def run(*arguments: Any, **options: Any) -> Any:
        calls[name] += 1
        return function(*arguments, **options)

    return run


@case
def some_gradients(mesh: DeviceMesh, rank: int, counts: tuple[int, ...], frozen: bool, exchange: str) -> Any:
    """Backward where few tensors have gradients: the outputs of one rank, or nothing but the inputs of one."""
    mixer = parallelize(create("mamba", d_model=16, d_state=2).double(), mesh, exchange=exchange)
    if frozen:
        mixer.requires_grad_(False)
    x = inputs((1, sum(counts), 16), torch.float64)
    x = Plan.of(counts, rank).shard(x).contiguous()
    x.requires_grad_(rank == 0)
    y, _ = mixer(x, return_state=True)
    last = rank == mesh.size() - 1
    (y.sum() if last else 0 * y.sum()).backward()
    return None if x.grad is None else x.grad.abs().max().item()


@case
def narrow(mesh: DeviceMesh, rank: int, label: str, autocast: bool, exchange: str) -> dict[str, float]:
    """Errors over the largest exact value, in bfloat16 or under autocast, of this rank and of one process."""
    counts, lengths = (4, 0, 9), (1, 8, 0, 4)
    bounds = boundaries(lengths)
    plan = Plan.of(counts, rank, bounds)
    kind = torch.float32 if autocast else torch.bfloat16
    x = inputs((1, sum(counts), 16), kind)

    def run(dtype: torch.dtype, parallel: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
        mixer = next(one for one in subjects() if one.label == label).make(dtype)
        state = random_state(mixer, len(lengths), x.to(dtype))
        source = x.to(dtype, copy=True).requires_grad_()
        given = plan.shard(source) if parallel else source
        if parallel:
            parallelize(mixer, mesh, exchange=exchange)
        with torch.autocast(mesh.device_type, torch.bfloat16, enabled=autocast and dtype != torch.float64):
            y, after = mixer(given, state, cu_seqlens=bounds, return_state=True)
        # one rank gives the state its cotangent
        loss = y.float().square().sum() + (rank == 0 or not parallel) * sum(v.float().sum() for v in after.values())
        loss.backward()
        gradient = source.grad.double()
        if parallel:
            dist.all_reduce(gradient, group=mesh.get_group())
        return (y if parallel else plan.shard(y)).detach().double(), after, gradient

    exact, alone, together = run(torch.float64, False), run(kind, False), run(kind, True)
    assert [value.dtype for value in together[1].values()] == [value.dtype for value in alone[1].values()]
    found = {}
    for name, (low, high) in {"one process": (alone, exact), "ranks": (together, exact)}.items():
        for part, index in (("y", 0), ("gradient", 2)):
            scale = high[index].abs().max().item() if high[index].numel() else 1.0
            error = (low[index] - high[index]).abs().max().item() if high[index].numel() else 0.0
            found[f"{part} of {name}"] = error / scale
    return found


@case
def without_residuals(mesh: DeviceMesh, rank: int, counts: tuple[int, ...]) -> None:
    """Two layers in a row, whose exchanges are one another's only connection."""
    torch.manual_seed(0)
    first, second = (parallelize(create("attention", d_model=16, n_heads=2), mesh) for _ in range(2))
    x = torch.zeros(1, counts[rank], 16)
    y, _ = first(x, return_state=True)
    z, after = second(y, return_state=True)
    (z.sum() + after["k"].sum()).backward()


@case
def plain_checkpoint(mesh: DeviceMesh, rank: int, exchange: str) -> None:
    mixer = parallelize(create("min_gru", d_model=16).double(), mesh, exchange=exchange)
    x = inputs((1, 3, 16), torch.float64).requires_grad_()
    y, _ = checkpoint(mixer, x, use_reentrant=False)
    y.sum().backward()


@case
def refusals(mesh: DeviceMesh, rank: int) -> None:
    """Errors before anything is sent."""
    with pytest.raises(ValueError, match=r"Attention has no state .* Bidirectional around one"):
        parallelize(create("attention", d_model=16, n_heads=2, causal=False), mesh)
    with pytest.raises(ValueError, match="BatchNorm would take the statistics"):
        parallelize(LanguageModel(ModelConfig(**{**MODEL, "norm": "batch"})), mesh)
    with pytest.raises(ValueError, match="SequenceClassifier pools over tokens"):
        parallelize(
            SequenceClassifier(ClassifierConfig(d_model=16, n_layers=1, pattern="min_gru", n_classes=2, vocab_size=5)),
            mesh,
        )
    with pytest.raises(ValueError, match="Linear has no mixer"):
        parallelize(torch.nn.Linear(2, 2), mesh)
    with pytest.raises(ValueError, match="exchange must be one of"):
        parallelize(create("min_gru", d_model=16), mesh, exchange="ring")
    with pytest.raises(
        ValueError, match=rf"Attention on rank {rank} of 3 cannot exchange by 'allgather': its .* use exchange='chain'"
    ):
        parallelize(language_model(), mesh, exchange="allgather", strict=True)
    with pytest.raises(ValueError, match="MixtureOfMemories cannot exchange by 'pipelined': it takes hard decisions"):
        payload_bytes(create("mixture_of_memories", d_model=16), Plan.of([1], 0), "pipelined")
    with pytest.raises(ValueError, match="MinGRU are on the meta device"), torch.device("meta"):
        payload_bytes(create("min_gru", d_model=16), Plan.of([1], 0))
    with pytest.raises(ValueError, match="exchange must be one of allgather, hillis_steele, pipelined, got 'chain'"):
        payload_bytes(create("min_gru", d_model=16), Plan.of([1], 0), "chain")
    with pytest.raises(TypeError, match="mesh must be a DeviceMesh, got ProcessGroup"):
        parallelize(create("min_gru", d_model=16), mesh.get_group())
    with pytest.raises(ValueError, match="nothing in MinGRU is parallel"):
        sum_gradients(create("min_gru", d_model=16))
    model = parallelize(language_model(), mesh)
    with pytest.raises(ValueError, match="is parallel already"):
        parallelize(model, mesh)
    assert {exchange for exchange, _ in exchanges_of(model).values()} == {"chain"}
    summed = parallelize(language_model(), mesh, exchange="allgather")
    assert [exchange for exchange, _ in exchanges_of(summed).values()] == ["allgather", "chain", "allgather", "chain"]
    assert "earlier ones" in exchanges_of(summed)["backbone.blocks.1.mixer"][1]
    copied = copy.deepcopy(model)
    mixer = copied.backbone.blocks[0].mixer
    assert mixer.forward.__self__.mixer is mixer
    ids = torch.zeros(1, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="lengths speaks of whole sequences"):
        model(ids, lengths=[3])
    with pytest.raises(ValueError, match="attention_mask speaks of whole sequences"):
        model.loss(ids, ids, attention_mask=torch.ones_like(ids))
    with pytest.raises(ValueError, match="labels must have the shape of ids"):
        model.loss(ids, ids[:, 1:])
    with pytest.raises(NotImplementedError, match=r"LanguageModel\.prefill"):
        model.prefill(ids)
    size = mesh.size()
    with pytest.raises(ValueError, match=f"the plan gives rank {rank} 2 tokens, the input has 3"):
        model(ids, cu_seqlens=Plan.of([2] * size, rank))
    with pytest.raises(ValueError, match=f"this is rank {rank} of {size}"):
        model(ids, cu_seqlens=Plan.of([3] * size, (rank + 1) % size))
    with pytest.raises(ValueError, match="a sequence of 60 tokens is longer than max_positions, 40"):
        model(torch.zeros(1, 60 // size, dtype=torch.int64))
    # these all ranks notice, after the counts are gathered
    with pytest.raises(ValueError, match="all ranks must give LanguageModel one batch size"):
        model(torch.zeros(1 + rank, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="cu_seqlens must end at the number of tokens"):
        model(ids, cu_seqlens=torch.tensor([0, 3 * size + 1], dtype=torch.int32))


@case
def fault(mesh: DeviceMesh, rank: int, deed: str, when: str, mixer: str, way: dict[str, Any]) -> None:
    """A training step in which rank 1 dies, stalls or has a token less than the plan says."""
    options = {"n_heads": 4} if mixer == "attention" else {}
    subject = parallelize(create(mixer, d_model=16, **options).double(), mesh, **way)
    plan = Plan.of([3] * mesh.size(), rank)
    x = inputs((1, 2 if rank == 1 and deed == "short" else 3, 16), torch.float64)
    y, final = misbehave(rank == 1 and when == "forward", deed, lambda: subject(x, cu_seqlens=plan, return_state=True))
    loss = y.sum() + sum(value.sum() for value in final.values())
    misbehave(rank == 1 and when == "backward", deed, loss.backward)


def misbehave(guilty: bool, deed: str, run: Callable[[], Any]) -> Any:
    if guilty and deed == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if guilty and deed == "stalled":
        time.sleep(3600)
    return run()


@case
def disagreement(mesh: DeviceMesh, rank: int) -> None:
    """What ranks notice under checks, all of them and before the mixer runs."""
    model = parallelize(language_model(), mesh, exchange="allgather")
    size, ids = mesh.size(), torch.zeros(1, 4, dtype=torch.int64)
    counts = [4] * size
    others = [3, 5, *counts[2:]]
    bounds = [0, 5, 4 * size]
    with checks():
        model(ids, cu_seqlens=Plan.of(counts, rank))
        with pytest.raises(ValueError, match=r"or the same plan, but rank 1 gives .* a plan \(hash .*, rank 0 gives"):
            model(ids[:, : 3 if rank == 0 else 4], cu_seqlens=Plan.of(counts if rank else others, rank))
        with pytest.raises(ValueError, match="rank 2 gives B = 1, 3 boundaries"):
            model(ids, cu_seqlens=Plan.of(counts, rank, bounds if rank == 2 else None))
        with pytest.raises(ValueError, match=r"rank 2 gives .* and no plan, rank 0 gives"):
            model(ids, cu_seqlens=None if rank == 2 else Plan.of(counts, rank))
        with pytest.raises(ValueError, match="the plan gives rank 1 4 tokens, the input of LanguageModel there has 3"):
            model(ids[:, : 3 if rank == 1 else 4], cu_seqlens=Plan.of(counts, rank))


# -- the process --


class OnGPU(TorchFunctionMode):
    """Draws what cases draw with a generator on the CPU, as one process does, and makes arrays there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.numpy:
            return func(args[0].cpu(), **kwargs)
        if kwargs.get("generator") is not None:
            return func(*args, **{**kwargs, "device": "cpu"}).to(torch.get_default_device())
        return func(*args, **kwargs)


def serve(connection: Any, rank: int, size: int, store: str, timeout: float, device: str) -> None:
    """Answers ``(case, ranks that take part, options)`` until told to stop."""
    torch.set_num_threads(1)
    if device == "cuda":
        # a wait that ends in an error here, not in the end of the process
        os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"
        torch.cuda.set_device(rank)
        torch.set_default_device(torch.device("cuda", rank))
    # torch.empty is poisoned
    torch.use_deterministic_algorithms(True, warn_only=True)
    dist.init_process_group(
        "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl",
        init_method=f"file://{store}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout),
    )
    names = ("sequence_parallel",)
    meshes = {ranks: DeviceMesh(device, list(range(ranks)), mesh_dim_names=names) for ranks in range(1, size + 1)}
    for ranks, mesh in meshes.items():
        if rank < ranks:
            dist.barrier(group=mesh.get_group())
    connection.send("ready")
    while True:
        task = connection.recv()
        if task is None:
            break
        name, ranks, options = task
        try:
            with contextlib.nullcontext() if device == "cpu" else OnGPU():
                answer = CASES[name](meshes[ranks], rank, **options)
            connection.send((True, answer))
        except Exception as error:
            connection.send((False, (type(error).__name__, str(error), traceback.format_exc())))
    dist.destroy_process_group()


if __name__ == "rank":
    serve(connection, rank, size, store, timeout, device)  # noqa: F821 - given by the pool  # pyright: ignore
