"""Transports among threads, of more ranks than there are processes, against one call of the op on all tokens."""

from __future__ import annotations

import itertools
import threading
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from queue import Queue
from typing import Any

import pytest
import torch
from torch import Tensor

from seqzoo.packing import Packing
from seqzoo.parallel import Plan
from seqzoo.parallel.summaries import CausalConv, DeltaRule, Summary
from seqzoo.parallel.transports import TRANSPORTS, Call

TOLERANCE = 1e-12
SECONDS = 60


class Wires:
    """What the ranks of one test share."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size)
        self.gathered: list[Any] = [None] * size
        self.queues: defaultdict[tuple[int, int], Queue[Tensor]] = defaultdict(Queue)


class Threaded:
    """A Group whose ranks are threads."""

    def __init__(self, wires: Wires, rank: int) -> None:
        self.wires, self.rank = wires, rank

    def all_gather(self, message: Tensor, mixer: str, what: str) -> Callable[[], list[Tensor]]:
        def wait() -> list[Tensor]:
            self.wires.gathered[self.rank] = message
            self.wires.barrier.wait(SECONDS)
            found = list(self.wires.gathered)
            self.wires.barrier.wait(SECONDS)
            return found

        return wait

    def post(self, message: Tensor, target: int, mixer: str, what: str) -> Callable[[], None]:
        self.wires.queues[self.rank, target].put(message.clone())
        return lambda: None

    def expect(self, message: Tensor, source: int, mixer: str, what: str) -> Callable[[], None]:
        def wait() -> None:
            message.copy_(self.wires.queues[source, self.rank].get(timeout=SECONDS))

        return wait


def delta_rule(batch: int, total: int) -> Summary:
    k = torch.nn.functional.normalize(torch.randn(batch, total, 1, 3, dtype=torch.float64), dim=-1)
    q, v = torch.randn(2, batch, total, 1, 3, dtype=torch.float64).unbind(0)
    beta = 2 * torch.rand(batch, total, 1, dtype=torch.float64)
    return DeltaRule({"v": v, "q": q, "k": k, "beta": beta, "log_decay": -0.1 * beta}, scale=1.0)


def causal_conv(batch: int, total: int) -> Summary:
    x, weight = torch.randn(batch, total, 3, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    return CausalConv({"x": x, "weight": weight, "bias": None}, activation="silu")


# counts and boundaries: transitions that do not commute over up to eight ranks, resets on each, empty ranks
LAYOUTS: list[tuple[tuple[int, ...], tuple[int, ...] | None]] = [
    ((5,), None),
    ((1, 2, 1, 3, 1, 2, 1, 1, 4), None),
    ((0, 2, 0, 3, 1, 0, 0, 1, 4), None),
    ((2, 0, 1, 1, 1, 3, 1, 0), None),
    ((0, 0, 0), None),
    ((1, 2, 1, 3, 1, 2, 1, 1, 4), (0, 3, 3, 9, 16)),
    ((1, 2, 1, 3, 1, 2, 1, 1, 4), (0, 0, 1, 15, 16, 16)),
    ((0, 2, 0, 3, 1, 0, 0, 1, 4), (0, 1, 2, 3, 11)),
    ((3, 3, 3), (0, 3, 6, 9)),
    ((3, 0, 3, 3), (0, 4, 4, 9)),
    ((2, 2, 2, 2, 2), (0, 9, 10)),
    ((0, 0), (0, 0, 0)),
]


def run_ranks(size: int, rank_of: Callable[[int, Threaded], Any]) -> list[Any]:
    wires = Wires(size)
    with ThreadPoolExecutor(size) as pool:
        jobs = [pool.submit(rank_of, rank, Threaded(wires, rank)) for rank in range(size)]
        return [job.result(SECONDS) for job in jobs]


def close(found: Tensor, exact: Tensor) -> bool:
    assert found.shape == exact.shape
    if not exact.numel():
        return True
    return bool((found - exact).abs().max() <= TOLERANCE * exact.abs().max().clamp(min=1.0))


@pytest.mark.parametrize("final", [False, True], ids=["", "final"])
@pytest.mark.parametrize("given", [False, True], ids=["", "given"])
@pytest.mark.parametrize("make", [delta_rule, causal_conv])
@pytest.mark.parametrize("exchange", TRANSPORTS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_states_and_gradients_are_those_of_one_call(
    layout: tuple[tuple[int, ...], tuple[int, ...] | None],
    exchange: str,
    make: Callable[[int, int], Summary],
    given: bool,
    final: bool,
):
    counts, bounds = layout
    torch.manual_seed(0)
    plans = Plan.of(counts, 0, bounds).views
    total, rows = plans[0].total, 2 if bounds is None else plans[0].n_sequences
    summary = make(2 if bounds is None else 1, total)
    shape, dtype = summary.shape()
    initial = torch.randn(rows, *shape, dtype=dtype) if given else None
    o, _ = summary.run(initial, None if bounds is None else Packing.from_lengths(torch.tensor(bounds).diff()))
    grad_o, grad_final = torch.randn_like(o), torch.randn(len(counts), rows, *shape, dtype=dtype)
    packings = [plan.packing() for plan in plans]

    def states_at(rank: int) -> tuple[Tensor, Tensor]:
        """The states that enter and leave a rank, one call of the op on all tokens before."""
        plan, found = plans[rank], []
        for cut in (plan.start, plan.end):
            if bounds is None:
                found.append(summary.part(slice(0, cut)).run(initial, None)[1])
                continue
            lengths = [min(end, cut) - min(start, cut) for start, end in itertools.pairwise(bounds)]
            found.append(summary.part(slice(0, cut)).run(initial, Packing.from_lengths(lengths))[1])
        return found[0], found[1]

    def rank_of(rank: int, group: Threaded) -> Any:
        plan = plans[rank]
        with torch.no_grad():
            own = summary.part(slice(plan.start, plan.end))
            call = Call(plan, own, final, group, packings[rank], "a mixer", initial)  # pyright: ignore - threads
            transport = TRANSPORTS[exchange](call)
            entering = transport.enter()
            here = plan.sequences
            start, end = states_at(rank)
            local = end if bounds is None else end[here.start : here.stop] if here else end.new_zeros(1, *shape)
            finals = transport.leave(local)
            gradient = call.zeros()
            if plan.continues_before:
                first = call.first()
                gradient = own.part(first).gradient(grad_o[:, plan.start : plan.end][:, first], entering)
            back = transport.back(gradient, grad_final[rank] if final else None)
        return entering, start, finals, back

    total_gradient = grad_final.sum(0) if final else torch.zeros_like(grad_final[0])
    exact_finals = states_at(len(counts) - 1)[1]
    for rank, (entering, start, finals, back) in enumerate(run_ranks(len(counts), rank_of)):
        plan = plans[rank]
        assert (entering is None) == (not plan.continues_before)
        if entering is not None:
            place = slice(None) if bounds is None else slice(plan.sequences.start, plan.sequences.start + 1)
            assert close(entering, start[place])
        assert (finals is None) == (not final)
        if finals is not None:
            assert close(finals, exact_finals)
        if plan.continues_after:
            # what the rest of the sequence makes of the state that leaves this rank
            sequence = plan.sequences[-1]
            rest = slice(plan.end, plan.extent[sequence + 1])
            place = slice(None) if bounds is None else slice(sequence, sequence + 1)
            leaving = states_at(rank)[1][place].detach().requires_grad_()
            y, last = summary.part(rest).run(leaving, None)
            loss = (y * grad_o[:, rest]).sum() + (last * total_gradient[place]).sum()
            (exact,) = torch.autograd.grad(loss, leaving)
            assert close(back if bounds is None else back[-1:], exact)
        held = plan.held(rank)
        if final and held:
            found = back if bounds is None else back[: len(held)]
            assert close(found, total_gradient if bounds is None else total_gradient[held.start : held.stop])
