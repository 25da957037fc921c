"""What a rank runs for the tests of attention: a process of the pool in conftest.py executes this file."""

from __future__ import annotations

import functools
import runpy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.checkpoint import checkpoint

from seqzoo.modules.key_values import attend_to_cache, attend_to_ring
from seqzoo.ops import attention, backend
from seqzoo.packing import Packing
from seqzoo.parallel import Layout, Plan, attention_payload, keep_exchanges, parallel_attention, zigzag
from seqzoo.parallel.attention import Method, parallel_state
from seqzoo.parallel.exchange import Group
from seqzoo.testing import boundaries

ranks = runpy.run_path(str(Path(__file__).with_name("ranks.py")))
case, inputs = ranks["case"], ranks["inputs"]


@dataclass(frozen=True)
class Case:
    """One call of attention on all tokens.

    Attributes:
        counts: Tokens of every rank, or one number, which zigzag shares out.
        lengths: Of packed sequences, or None for a dense batch of two.
        heads: Of queries, and of keys and values.
        held: Tokens that the state has of every row, or None for no state.
        final: Whether the state after all tokens takes part in the loss.
    """

    counts: tuple[int, ...]
    lengths: tuple[int, ...] | None = None
    heads: tuple[int, int] = (4, 2)
    causal: bool = True
    window: int | None = None
    scale: float | None = None
    sinks: bool = False
    logit_cap: float | None = None
    held: tuple[int, ...] | None = None
    final: bool = False

    @property
    def total(self) -> int:
        return sum(self.counts)

    @property
    def bounds(self) -> Tensor | None:
        return None if self.lengths is None else boundaries(self.lengths)

    def options(self) -> dict[str, Any]:
        return {"causal": self.causal, "window": self.window, "scale": self.scale, "logit_cap": self.logit_cap}

    def tensors(self, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        """q, k, v of all tokens, sinks, keys and values of the state, weights of the loss."""
        batch, (heads, groups) = 2 if self.lengths is None else 1, self.heads
        found = {
            "q": 2 * inputs((batch, self.total, heads, 4), dtype, seed=1),
            "k": inputs((batch, self.total, groups, 4), dtype, seed=2),
            "v": inputs((batch, self.total, groups, 3), dtype, seed=3),
            "of_o": inputs((batch, self.total, heads, 3), dtype, seed=4),
            "of_lse": inputs((batch, self.total, heads), dtype, seed=5),
        }
        if self.sinks:
            found["sinks"] = inputs((heads,), dtype, seed=6)
        if self.held is not None:
            # a cache has room behind its tokens, in which are zeros
            room = self.window or max(self.held) + 2
            for name, size in (("state_k", 4), ("state_v", 3)):
                value = inputs((len(self.held), room, groups, size), dtype, seed=7)
                free = torch.arange(room) >= torch.tensor(self.held)[:, None]
                found[name] = value.masked_fill(free[..., None, None], 0.0)
        return found

    def state(self, tensors: dict[str, Tensor]) -> dict[str, Tensor] | None:
        if self.held is None:
            return None
        return {"k": tensors["state_k"], "v": tensors["state_v"], "length": torch.tensor(self.held)}

    def sources(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.requires_grad_() for name, value in tensors.items() if not name.startswith("of_")}


def of_state(state: dict[str, Tensor], rank: int) -> Tensor:
    """The share that a rank's loss has of the final state, whatever the room in a cache."""
    total = torch.zeros((), dtype=torch.float64)
    for seed, name in enumerate(("k", "v")):
        value = state[name]
        weights = inputs((value.shape[0], 64, *value.shape[2:]), torch.float64, seed=10 * rank + seed)
        total = total + (weights[:, : value.shape[1]] * value).sum()
    return total


def exact(one: Case, size: int) -> dict[str, Tensor]:
    """The results of one process, for the sum of the losses of all ranks, one sequence after the other."""
    tensors = one.tensors()
    sources, state = one.sources(tensors), one.state(tensors)
    q, k, v = (tensors[name] for name in "qkv")
    rows = range(q.shape[0]) if one.lengths is None else [0] * len(one.lengths)
    extent = [0, one.total] if one.bounds is None else one.bounds.tolist()
    parts: list[list[Tensor]] = [[], []]
    for index, row in enumerate(rows):
        start, end = (0, one.total) if one.lengths is None else list(pairwise(extent))[index]
        keys = [k[row, start:end], v[row, start:end]]
        if state is not None:
            seen, room = int(state["length"][index]), state["k"].shape[1]
            places = torch.arange(seen) if one.window is None else torch.arange(max(0, seen - room), seen) % room
            keys = [torch.cat((state[name][index, places], new)) for name, new in zip("kv", keys, strict=True)]
        sinks = tensors.get("sinks")
        found = attention(q[row, start:end][None], keys[0][None], keys[1][None], sinks=sinks, **one.options())
        for part, value in zip(parts, found, strict=True):
            part.append(value)
    o, lse = (torch.cat(part, 0 if one.lengths is None else 1) for part in parts)
    loss = (o * tensors["of_o"]).sum() + (lse * tensors["of_lse"]).sum()
    results = {"o": o, "lse": lse}
    if one.final:
        packing = None if one.bounds is None else Packing.from_cu_seqlens(one.bounds, one.total)
        attend = attend_to_cache if one.window is None else attend_to_ring
        extra = {} if one.window is None else {"window": one.window}
        _, after = attend(q, k, v, state, packing, True, **extra)
        assert after is not None
        loss = loss + sum(of_state(after, rank) for rank in range(size))
        results |= {f"final {name}": value for name, value in after.items()}
    return results | gradients(loss, sources)


def gradients(loss: Tensor, sources: dict[str, Tensor]) -> dict[str, Tensor]:
    found = torch.autograd.grad(loss, list(sources.values()), allow_unused=True, materialize_grads=True)
    return {f"gradient of {name}": value for name, value in zip(sources, found, strict=True)}


def group_of(mesh: DeviceMesh, rank: int) -> Group:
    return Group(mesh.get_group(), rank, mesh.size(), "sequence_parallel")


def layout_of(one: Case, size: int, rank: int, zigzags: bool) -> Layout:
    if zigzags:
        return zigzag(one.total, size, rank, one.bounds)
    return Layout.of(Plan.of(one.counts, rank, one.bounds))


def results(
    mesh: DeviceMesh,
    rank: int,
    one: Case,
    method: Method,
    head_ranks: int | None = None,
    zigzags: bool = False,
    recompute: bool = False,
) -> dict[str, Tensor]:
    """Those of one rank."""
    group, layout = group_of(mesh, rank), layout_of(one, mesh.size(), rank, zigzags)
    whole = one.tensors()
    tensors = {
        name: value if name in ("sinks", "state_k", "state_v") else layout.shard(value) for name, value in whole.items()
    }
    sources, state = one.sources(tensors), one.state(tensors)
    q, k, v = (tensors[name] for name in "qkv")

    def run(q: Tensor, k: Tensor, v: Tensor) -> Any:
        o, lse = parallel_attention(
            group,
            layout,
            q,
            k,
            v,
            state,
            method=method,
            head_ranks=head_ranks,
            sinks=tensors.get("sinks"),
            **one.options(),
        )
        if not one.final:
            return o, lse, None
        o, after = parallel_state(group, layout, o, k, v, state, window=one.window)
        return o, lse, after

    if recompute:
        o, lse, after = checkpoint(run, q, k, v, use_reentrant=False, context_fn=keep_exchanges)
    else:
        o, lse, after = run(q, k, v)
    loss = (o * tensors["of_o"]).sum() + (lse * tensors["of_lse"]).sum()
    found = {"o": o, "lse": lse}
    if after is not None:
        loss = loss + of_state(after, rank)
        found |= {f"final {name}": value for name, value in after.items()}
    return found | gradients(loss, sources)


def arrays(found: dict[str, Tensor]) -> dict[str, Any]:
    return {name: value.detach().numpy() for name, value in found.items()}


@case
def twice(mesh: DeviceMesh, rank: int, one: dict[str, Any], ways: list[dict[str, Any]]) -> list[bool]:
    """Whether a second run gives the same bits."""
    found = [[results(mesh, rank, Case(**one), **way) for _ in range(2)] for way in ways]
    return [all(torch.equal(first[name], second[name]) for name in first) for first, second in found]


@case
def no_gradients(mesh: DeviceMesh, rank: int, one: dict[str, Any], way: dict[str, Any]) -> Any:
    """Outputs and the final state where autograd records nothing, and a cache is written in place."""
    whole, group = Case(**one), group_of(mesh, rank)
    layout, tensors = layout_of(whole, mesh.size(), rank, False), whole.tensors()
    q, k, v = (layout.shard(tensors[name]) for name in "qkv")
    state = whole.state(tensors)
    with torch.no_grad():
        o, lse = parallel_attention(group, layout, q, k, v, state, **way, **whole.options())
        o, after = parallel_state(group, layout, o, k, v, state, window=whole.window)
    return arrays({"o": o, "lse": lse} | {f"final {name}": value for name, value in after.items()})


@case
def some_gradients(mesh: DeviceMesh, rank: int, counts: tuple[int, ...], method: Method) -> Any:
    """The gradient of the first rank's keys, which alone require one, from the last rank's outputs, the only loss."""
    one = Case(counts, heads=(12, 4))
    layout = layout_of(one, mesh.size(), rank, False)
    q, k, v = (layout.shard(one.tensors()[name]) for name in "qkv")
    k.requires_grad_(rank == 0)
    group = group_of(mesh, rank)
    o, _ = parallel_attention(group, layout, q, k, v, method=method)
    o, _ = parallel_state(group, layout, o, k, v)
    last = rank == mesh.size() - 1
    (o.sum() if last else 0 * o.sum()).backward()
    return None if k.grad is None else k.grad.abs().max().item()


@case
def attend(mesh: DeviceMesh, rank: int, cases: list[dict[str, Any]], ways: list[dict[str, Any]]) -> Any:
    """Of each case and way this rank's results, as arrays."""
    return [[arrays(results(mesh, rank, Case(**one), **way)) for way in ways] for one in cases]


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Bytes that this rank sends to and receives from others, and calls, of what attention communicates by."""
    seen: Counter[str] = Counter()
    swap, start = dist.all_to_all_single, dist.batch_isend_irecv

    def count_swap(output: Tensor, given: Tensor, into: list[int], out: list[int], **options: Any) -> Any:
        rank = dist.get_rank(options["group"])
        assert into[rank] == out[rank] == 0
        seen["sent"] += sum(out) * given.element_size()
        seen["received"] += sum(into) * output.element_size()
        seen["all-to-all"] += 1
        return swap(output, given, into, out, **options)

    def count_start(operations: list[Any]) -> Any:
        for one in operations:
            name = "sent" if one.op is dist.isend else "received"
            seen[name] += one.tensor.numel() * one.tensor.element_size()
            seen["message"] += 1
        return start(operations)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_to_all_single", count_swap)
        patch.setattr(dist, "batch_isend_irecv", count_start)
        yield seen


@case
def traffic(mesh: DeviceMesh, rank: int, dtype: str, cases: list[Any], recompute: bool = False) -> Any:
    """What was counted and what was foretold: bytes forward and backward, and calls."""
    found = []
    for options, method, head_ranks, zigzags in cases:
        one, kind = Case(**options), getattr(torch, dtype)
        layout = layout_of(one, mesh.size(), rank, zigzags)
        q, k, v = (layout.shard(one.tensors(kind)[name]).requires_grad_() for name in "qkv")
        way = {"method": method, "head_ranks": head_ranks}
        call = functools.partial(parallel_attention, group_of(mesh, rank), layout, **way, **one.options())
        with counted() as forward:
            if recompute:
                o, _ = checkpoint(call, q, k, v, use_reentrant=False, context_fn=keep_exchanges)
            else:
                o, _ = call(q, k, v)
        with counted() as backward:
            o.sum().backward()
        told = attention_payload(
            layout,
            n_heads=one.heads[0],
            n_groups=one.heads[1],
            key_size=4,
            value_size=3,
            dtype=kind,
            batch_size=q.shape[0],
            causal=one.causal,
            window=one.window,
            **way,
        )
        bytes_seen = [seen[name] for seen in (forward, backward) for name in ("sent", "received")]
        calls = [seen[name] for seen in (forward, backward) for name in ("all-to-all", "message")]
        found.append((bytes_seen, list(told), calls))
    return found


@case
def by_reference(mesh: DeviceMesh, rank: int, one: dict[str, Any]) -> Any:
    with backend("reference"):
        return arrays(results(mesh, rank, Case(**one), "ring"))


@case
def narrow_attention(mesh: DeviceMesh, rank: int, one: dict[str, Any], way: dict[str, Any]) -> dict[str, float]:
    """Errors in bfloat16 over the largest exact value, of this rank and of one process."""
    whole = Case(**one)
    layout = layout_of(whole, mesh.size(), rank, False)

    def run(dtype: torch.dtype, alone: bool) -> list[Tensor]:
        tensors = {name: value.to(torch.bfloat16).to(dtype) for name, value in whole.tensors().items()}
        part = (lambda x: x) if alone else layout.shard
        q, k, v = (part(tensors[name]).clone().requires_grad_() for name in "qkv")
        if alone:
            o, _ = attention(q, k, v, cu_seqlens=whole.bounds, **whole.options())
        else:
            o, _ = parallel_attention(group_of(mesh, rank), layout, q, k, v, **way, **whole.options())
        assert o.dtype == dtype
        (o * part(tensors["of_o"])).sum().backward()
        found = [o.detach(), *(x.grad for x in (q, k, v))]
        return [(layout.shard(x) if alone else x).double() for x in found]

    high, alone, together = run(torch.float64, True), run(torch.bfloat16, True), run(torch.bfloat16, False)
    found = {}
    for index, name in enumerate(("o", "dq", "dk", "dv")):
        if high[index].numel():
            scale = high[index].abs().max()
            for who, low in (("one", alone), ("ranks", together)):
                found[f"{name} {who}"] = ((low[index] - high[index]).abs().max() / scale).item()
    return found


@case
def refused(mesh: DeviceMesh, rank: int) -> None:
    """Errors before anything is sent."""
    group, size = group_of(mesh, rank), mesh.size()
    plan = Plan.of([3] * size, rank)
    q, k, v = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 2, 4), torch.zeros(2, 3, 2, 4)
    state = {"k": torch.zeros(2, 5, 2, 4), "v": torch.zeros(2, 5, 2, 4), "length": torch.zeros(2, dtype=torch.int64)}

    def call(words: str, *changed: Any, error: type[Exception] = ValueError, **options: Any) -> None:
        given = [plan, q, k, v]
        for index, value in enumerate(changed):
            given[index] = given[index] if value is None else value
        with pytest.raises(error, match=words):
            parallel_attention(group, *given, **options)

    with counted() as seen:
        call("method must be one of allgather, ulysses, ring, usp, got 'chain'", method="chain")
        call(r"3 of 3 ranks cannot share 4 heads evenly.* head_ranks one of \[1\], or .*'allgather'", method="ulysses")
        call(r"2 of 3 ranks cannot share 4 heads", method="usp", head_ranks=2)
        call("head_ranks is for method 'usp', got 2 with 'ring'", method="ring", head_ranks=2)
        call(f"this is rank {rank} of {size} of the group", Plan.of([3] * size, (rank + 1) % size))
        call(f"the plan gives rank {rank} 3 tokens, k has 2", None, None, k[:, :2], v[:, :2])
        call("packed sequences lie in a batch of 1, got a batch of 2 of q", Plan.of([3] * size, rank, [0, 3 * size]))
        call("the heads of k must divide the 4 of q", None, None, k[:, :, :0], v[:, :, :0])
        call("k must be float32 beside q", None, None, k.double(), error=TypeError)
        call("window must be a positive integer", window=0)
        call("only causal queries can go on", state=state, causal=False)
        call(r"state\['k'\] must have shape \(2, 3, 2, 4\).* a window of 3, got \(2, 5, 2, 4\)", state=state, window=3)
        call(r"state\['v'\] must have shape \(2, 5, 2, 4\)", state={**state, "v": state["v"][:1]})
        call(r"state\['length'\] must have shape \(2,\) and torch.int64", state={**state, "length": torch.zeros(2)})
        with pytest.raises(ValueError, match=f"the plan gives rank {rank} 3 tokens, o has 2"):
            parallel_state(group, plan, q[:, :2], k, v)
    assert not seen


if __name__ == "rank":
    ranks["serve"](connection, rank, size, store, timeout, device)  # noqa: F821 - given by the pool  # pyright: ignore
