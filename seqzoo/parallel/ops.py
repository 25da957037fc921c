"""The ops of a mixer whose sequences lie on several ranks: what the dispatch slot holds while it runs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from seqzoo.kernels.derivatives import once
from seqzoo.kernels.dispatch import checks, slot, uncast
from seqzoo.mixer import SequenceMixer
from seqzoo.packing import Packing
from seqzoo.parallel.exchange import Group, anchor_of, differentiable
from seqzoo.parallel.plan import Plan
from seqzoo.parallel.summaries import (
    CausalConv,
    DeltaRule,
    GatedScan,
    LinearAttention,
    LinearScan,
    SelectiveScan,
    SsmScan,
    Summary,
)
from seqzoo.parallel.transports import Call, Transport

# tokens of a trial, and by what those of its first and of its second half are multiplied
TRIAL = 64
VARIANTS = ((1.0, 1.0), (torch.nan, 1.0), (8.0, 1.0), (-8.0, 1.0), (0.0, 1.0), (torch.nan, torch.nan), (1.0, -3.0))


class ForeignSequencesError(RuntimeError):
    """Raised when a mixer calls an op on other sequences than its own, or in a way that has no summary."""


@contextmanager
def answered_by(parallel: Any) -> Iterator[None]:
    """Lets an object answer the ops with a state inside the block, None for the ops themselves."""
    previous, slot.parallel = slot.parallel, parallel
    try:
        yield
    finally:
        slot.parallel = previous


class Ops(ABC):
    """The ops by name, as their public functions call them: of each a :class:`Summary`, which :meth:`run` takes."""

    @abstractmethod
    def run(self, summary: Summary, initial_state: Tensor | None, cu_seqlens: Any, reverse: bool) -> Any:
        """Outputs, and the final states.

        Args:
            summary: The call.
            initial_state: Of all sequences, over all ranks.
            cu_seqlens: As the mixer passes it.
            reverse: Whether tokens run from the last to the first.
        """

    def linear_scan(self, a: Tensor, b: Tensor, initial_state: Any, reverse: bool, cu_seqlens: Any) -> Any:
        """As :func:`seqzoo.ops.linear_scan`, like the others."""
        return self.run(LinearScan({"b": b, "a": a}), initial_state, cu_seqlens, reverse)

    def gated_scan(
        self, x: Tensor, initial_state: Any, cell: str, gate_range: Any, reverse: bool, cu_seqlens: Any
    ) -> Any:
        """As the op."""
        return self.run(GatedScan({"x": x}, cell=cell, gate_range=gate_range), initial_state, cu_seqlens, reverse)

    def causal_conv(
        self, x: Tensor, weight: Tensor, bias: Any, initial_state: Any, activation: Any, cu_seqlens: Any
    ) -> Any:
        """As the op."""
        summary = CausalConv({"x": x, "weight": weight, "bias": bias}, activation=activation)
        return self.run(summary, initial_state, cu_seqlens, False)

    def linear_attention(
        self, q: Tensor, k: Tensor, v: Tensor, log_decay: Any, initial_state: Any, scale: Any, causal: bool, bounds: Any
    ) -> Any:
        """As the op."""
        if not causal:
            raise ForeignSequencesError("it calls linear_attention with causal=False, which reads later ranks")
        summary = LinearAttention({"v": v, "q": q, "k": k, "log_decay": log_decay}, scale=scale)
        return self.run(summary, initial_state, bounds, False)

    def delta_rule(
        self, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Any, initial_state: Any, scale: Any, bounds: Any
    ) -> Any:
        """As the op."""
        summary = DeltaRule({"v": v, "q": q, "k": k, "beta": beta, "log_decay": log_decay}, scale=scale)
        return self.run(summary, initial_state, bounds, False)

    def selective_scan(
        self, u: Tensor, delta: Tensor, A: Any, B: Tensor, C: Tensor, D: Any, z: Any, delta_bias: Any, *others: Any
    ) -> Any:
        """As the op."""
        initial_state, steps, cu_seqlens = others
        tensors = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": delta_bias}
        return self.run(SelectiveScan(tensors, **steps), initial_state, cu_seqlens, False)

    def ssm_scan(
        self, u: Tensor, poles: Tensor, b: Tensor, c: Tensor, step: Tensor, initial_state: Any, space: Any, bounds: Any
    ) -> Any:
        """As the op."""
        p, q = space["low_rank"] or (None, None)
        tensors = {"u": u, "poles": poles, "b": b, "c": c, "step": step, "p": p, "q": q}
        options = {name: value for name, value in space.items() if name != "low_rank"}
        return self.run(SsmScan(tensors, **options), initial_state, bounds, False)


class ParallelOps(Ops):
    """Ops on this rank's tokens of sequences that lie on all.

    Args:
        group: The ranks.
        plan: Of the tokens.
        packing: Of this rank's tokens, None for a dense batch.
        mixer: Name of the mixer, for errors.
        transport: How states come to the ranks.
        final: Whether the final states of all sequences are wanted; else this rank's are returned, without a gradient.
    """

    def __init__(
        self,
        group: Group,
        plan: Plan,
        packing: Packing | None,
        mixer: str,
        transport: type[Transport],
        final: bool,
    ) -> None:
        self.group, self.plan, self.packing = group, plan, packing
        self.mixer, self.transport, self.final = mixer, transport, final

    def run(self, summary: Summary, initial_state: Tensor | None, cu_seqlens: Any, reverse: bool) -> Any:
        """Exchanges what is needed, and runs the op from the state that enters this rank.

        Raises:
            ForeignSequencesError: If the tokens or boundaries are not those of the mixer's input.
        """
        if cu_seqlens is not self.packing or summary.length != self.plan.length:
            raise ForeignSequencesError(
                f"{self.mixer} calls {type(summary).__name__} on sequences that are not those of its input; "
                "parallelize it with exchange='chain'"
            )
        with answered_by(None):
            if not reverse:
                return self._run(summary, initial_state)
            # the same from the other end: sequences, tokens and ranks in the opposite order
            plan, packed = self.plan.mirrored(), self.packing is not None
            there = ParallelOps(
                self.group.mirrored(),
                plan,
                plan.packing(summary.tokens.device),
                self.mixer,
                self.transport,
                self.final,
            )
            turned = summary.turned()
            if initial_state is not None and packed:
                initial_state = initial_state.flip(0)
            o, final = there._run(turned, initial_state)
            return o.flip(1), final.flip(0) if packed else final

    def _run(self, summary: Summary, initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
        plan, here = self.plan, self.plan.sequences
        given = initial_state
        if initial_state is not None:
            given = initial_state = initial_state.to(summary.shape()[1])
            if plan.bounds is not None:
                given = initial_state[here.start : here.stop] if here else None
        if not plan.crosses and not self.final:
            return summary.run(given, self.packing)
        whole = None if initial_state is None else initial_state.detach()
        call = Call(plan, summary.part(slice(None)), self.final, self.group, self.packing, self.mixer, whole)
        transport = self.transport(call)
        with torch.no_grad(), uncast(summary.tokens.device):
            entering = transport.enter()
        if entering is not None:
            others = len(here) - 1
            if plan.bounds is None or others == 0:
                given = entering
            else:
                behind = call.zeros(others) if given is None else given[1:]
                given = torch.cat((entering, behind))
        o, state = summary.run(given, self.packing)
        o, final = _Exchanged.apply(transport, anchor_of(o), o, state, entering, *summary.tensors.values())
        return o, state.detach() if final is None else final


class _Exchanged(torch.autograd.Function):
    """Stands behind an op: in backward the gradients of the states that left this rank come back before it runs."""

    @staticmethod
    def forward(
        ctx: Any,
        transport: Transport,
        anchor: Tensor,
        o: Tensor,
        state: Tensor,
        entering: Tensor | None,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        with uncast(o.device):
            final = transport.leave(state)
        # the graph keeps what the op keeps, through hooks on saved tensors
        ctx.save_for_backward(entering, *tensors)
        call = transport.call
        call.summary, call.given = call.summary.bound([None] * len(tensors)), None
        ctx.transport = transport
        return o.view_as(o), final

    @staticmethod
    @once
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:  # pyright: ignore - torch types no arity
        grad_o, grad_final = gradients
        # once: a checkpoint gives every saved tensor back a single time
        entering, *tensors = ctx.saved_tensors
        transport = ctx.transport
        call, shell = transport.call, transport.call.summary
        call.summary = summary = shell.bound(tensors).part(slice(None))
        with torch.no_grad(), answered_by(None), uncast(grad_o.device):
            if call.plan.continues_before:
                tokens = call.first()
                gradient = summary.part(tokens).gradient(grad_o[:, tokens], entering).to(call.form()[1])
            else:
                gradient = call.zeros()
            grad_state = transport.back(gradient, grad_final if call.final else None)
        call.summary = shell
        # an op may leave inputs without tokens out of the graph, in which earlier exchanges wait for this rank
        rest = [torch.zeros_like(v) if v is not None and v.numel() == 0 else None for v in tensors]
        return None, None, grad_o, grad_state, None, *rest


# -- what a mixer can do --


class Trial(Ops):
    """Answers ops token by token, with nothing that one token learns from another.

    Attributes:
        calls: What the mixer has called.
    """

    def __init__(self, rows: int, length: int) -> None:
        self.rows, self.length = rows, length
        self.calls: list[Summary] = []

    def run(self, summary: Summary, initial_state: Tensor | None, cu_seqlens: Any, reverse: bool) -> Any:
        """Outputs between 0 and 2 that change with any input of the token, NaN with NaN; final states of 1."""
        if cu_seqlens is not None or (summary.rows, summary.length) != (self.rows, self.length):
            raise ForeignSequencesError(f"it calls {type(summary).__name__} on sequences that it makes itself")
        self.calls.append(summary)
        timed = [v for n, v in summary.tensors.items() if v is not None and n in summary.timed and v.dim() > 1]
        seen = torch.zeros((self.rows, self.length), device=summary.tokens.device)
        for index, value in enumerate(timed):
            real = torch.view_as_real(value.resolve_conj()) if value.is_complex() else value
            seen = seen + (index + 1) * real.to(seen.dtype).flatten(2).mean(2)
        shape, dtype = summary.shape()
        like = summary.outputs()
        # other weights for all features: what is common to them vanishes in quotients and norms
        weights = torch.arange(1.0, like[0, 0].numel() + 1, device=seen.device).cos()
        o = (1 + (seen[..., None] * weights).tanh()).view(like.shape).to(like.dtype)
        return o, o.new_ones((self.rows, *shape), dtype=dtype)


def try_out(mixer: SequenceMixer, x: Tensor) -> tuple[str | None, list[Summary]]:
    """Whether a mixer's tokens meet one another nowhere but in ops that have a summary.

    The mixer runs with ops that know one token at a time, several times with other first tokens and another initial
    state. The outputs of the tokens that remain the same must keep every bit, and so must all of the final state. One
    time what changes is NaN, which goes through weights of zero; the other times it is greater or smaller than what
    remains, which decisions notice.

    Args:
        mixer: The mixer, with parameters that are finite.
        x: Any tensor of the dtype and device of its inputs, whose first dimension is B.

    Returns:
        Why it cannot exchange summaries, or None; and the calls of ops.
    """
    if mixer.discontinuous:
        return "it takes hard decisions, which may depend on other tokens", []
    if not mixer.packs:
        return "it takes packed sequences one after the other", []
    rows, half, width = x.shape[0], TRIAL // 2, mixer.d_model
    start = mixer.init_state(rows, device=x.device, dtype=x.dtype)
    # not random: every rank must come to the same conclusion, and nobody's generator move
    angles = torch.arange(rows * TRIAL * width, device=x.device, dtype=torch.float64).square()
    tokens = angles.cos().view(rows, TRIAL, width)
    first, calls = None, []
    try:
        with torch.no_grad(), checks(False):
            for before, behind in VARIANTS:
                trial = Trial(rows, TRIAL)
                changed = torch.cat((before * tokens[:, :half], behind * tokens[:, half:]), 1).to(x.dtype)
                given = {k: v + before * tokens.mean() if differentiable(v) else v for k, v in start.items()}
                with answered_by(trial):
                    found = mixer.mix(changed, given, None, True)
                after = {"": found.y[:, half:], **(found.state or {})}
                if first is None:
                    first, calls = after, trial.calls
                for key, value in after.items():
                    if key in start and not differentiable(value):
                        if not torch.equal(value, start[key] + TRIAL):
                            return f"its state {key!r} counts something else than tokens", []
                    elif (key or behind == 1.0) and not torch.equal(value, first[key]):
                        if key:
                            return f"its state {key!r} is none of an op that has a summary", []
                        return "its tokens depend on earlier ones by more than calls of ops that have a summary", []
    except (ForeignSequencesError, ValueError, NotImplementedError) as error:
        return str(error), []
    return None, calls
