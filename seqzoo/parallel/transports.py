"""How the ranks learn the states that enter their tokens, and in backward the gradients of those that leave.

Three ways to the same result, of an op whose tokens a :class:`Summary` sums up:

* ``allgather``: one gather of all summaries, which every rank folds ("LASP-2", https://arxiv.org/abs/2502.07563,
  section 3.2). The final states of all sequences lie in the same message where they are wanted.
* ``hillis_steele``: a scan over ranks by doubling in ``ceil(log2 P)`` rounds (https://doi.org/10.1145/7902.7903).
* ``pipelined``: the true state from rank to rank, in parts, so that one travels while the next one is made ("ZeCO",
  https://arxiv.org/abs/2507.01004, section 3).

What a plan says is not sent: where sequences begin and end, and transitions that follow from the number of tokens. A
rank without tokens takes part in every collective. All results are those of a fixed order of additions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from seqzoo.packing import Packing
from seqzoo.parallel.exchange import Form, Group, begin_once, message_bytes, once_a_forward, pack, unpack
from seqzoo.parallel.plan import Plan
from seqzoo.parallel.summaries import Summary, Transition

# parts in which a state travels
PIECES = 8


@dataclass(eq=False)
class Extent:
    """What of one call of an op says how much is sent.

    Attributes:
        plan: Of the tokens.
        summary: What this rank's tokens do, detached.
        final: Whether all ranks want the final states of all sequences.
    """

    plan: Plan
    summary: Summary
    final: bool

    @property
    def rows(self) -> int:
        """States that enter together: those of a dense batch, or that of one packed sequence."""
        return self.summary.rows

    def form(self, rows: int | None = None) -> Form:
        """Of so many states, or of those that enter together."""
        shape, dtype = self.summary.shape()
        return (self.rows if rows is None else rows, *shape), dtype

    def transition_form(self) -> list[Form]:
        """Of the transition on the wire."""
        form = self.summary.transition_form()
        return [] if form is None else [((self.rows, *form[0]), form[1])]

    def all_rows(self) -> int:
        """The number of the states of all sequences."""
        return self.rows if self.plan.bounds is None else self.plan.n_sequences

    def sends_transition(self, plan: Plan) -> bool:
        """Whether any rank needs a rank's transition: where its first sequence goes on, or its end is wanted."""
        return plan.length > 0 and plan.continues_before and (self.final or plan.passes)


@dataclass(eq=False)
class Call(Extent):
    """One call of an op on this rank's tokens.

    Attributes:
        group: The ranks.
        packing: Of this rank's tokens, None for a dense batch.
        mixer: Name of the mixer, for errors.
        given: The initial states of all sequences, detached, or None for zero.
    """

    group: Group
    packing: Packing | None
    mixer: str
    given: Tensor | None

    def zeros(self, rows: int | None = None) -> Tensor:
        """States of zero."""
        shape, dtype = self.form(rows)
        return self.summary.tokens.new_zeros([size or 0 for size in shape], dtype=dtype)

    def place(self, sequence: int) -> slice:
        """Where a sequence is among all states."""
        return slice(None) if self.plan.bounds is None else slice(sequence, sequence + 1)

    def first(self) -> slice:
        """This rank's tokens of its first sequence."""
        return slice(0, self.plan.lengths[0])

    def last(self) -> slice:
        """This rank's tokens of its last sequence."""
        return slice(self.plan.length - self.plan.lengths[-1], self.plan.length)

    def transition(self) -> Transition:
        """Of this rank's first sequence where another needs it, else that of no tokens."""
        if not self.sends_transition(self.plan):
            return self.summary.identity()
        return self.summary.part(self.first()).transition()

    def element(self) -> tuple[Tensor, Transition]:
        """What leaves this rank for the next, of a state of zero or its sequence's own; and its transition."""
        if self.plan.length and self.plan.passes:
            return self.summary.part(self.last()).pair()
        state = self.zeros()
        if self.plan.continues_after:
            given = None if self.given is None else self.given[self.place(self.plan.sequences[-1])]
            state = self.summary.part(self.last()).state(given)
        return state, self.transition()

    def open_gradient(self, carry: Tensor | None, total: Tensor | None) -> Tensor | None:
        """The gradient of this rank's last states: of those that leave it for the next, and of final ones."""
        if carry is None and total is None:
            return None
        if self.plan.bounds is None:
            if self.plan.continues_after:
                return carry
            return total if self.plan.held(self.plan.rank) else None
        held = self.plan.held(self.plan.rank)
        found = self.zeros(max(1, len(self.plan.sequences)))
        if total is not None:
            found[: len(held)] = total[held.start : held.stop]
        if carry is not None:
            found[-1:] = carry
        return found


class Transport(ABC):
    """What one call sends and receives. Every method is called by all ranks, in the order in which they stand."""

    def __init__(self, call: Call) -> None:
        self.call = call

    @abstractmethod
    def enter(self) -> Tensor | None:
        """The states that enter this rank's first sequence, None where it begins here."""

    @abstractmethod
    def leave(self, state: Tensor) -> Tensor | None:
        """The final states of all sequences, where they are wanted, after those of this rank's are known."""

    @abstractmethod
    def back(self, gradient: Tensor, total: Tensor | None) -> Tensor | None:
        """The gradient of this rank's last states.

        Args:
            gradient: Of the state that enters, through this rank's outputs; zero where none does.
            total: Of the final states of all sequences, this rank's share, where they are wanted.
        """

    @classmethod
    @abstractmethod
    def sent_bytes(cls, extent: Extent) -> tuple[int, int]:
        """What a rank sends forward and backward, each message once."""


class AllGather(Transport):
    """One gather each way."""

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        self.wait: Callable[[], list[Tensor]] | None = None
        self.slots, self.transitions = self._contents(call)

    @classmethod
    def sent_bytes(cls, extent: Extent) -> tuple[int, int]:
        if not extent.plan.crosses and not extent.final:
            return 0, 0
        return message_bytes(cls._forms(extent)), message_bytes(cls._backward_forms(extent))

    @staticmethod
    def _contents(extent: Extent) -> tuple[int | None, bool]:
        """The most states that a rank has to tell of, None for those that enter together; whether of transitions."""
        views = extent.plan.views
        several = extent.final and extent.plan.bounds is not None
        return max(len(v.sequences) for v in views) if several else None, any(map(extent.sends_transition, views))

    @classmethod
    def _forms(cls, extent: Extent) -> list[Form]:
        """Of the forward message."""
        slots, transitions = cls._contents(extent)
        return [extent.form(slots), *(extent.transition_form() if transitions else [])]

    @staticmethod
    def _backward_forms(extent: Extent) -> list[Form]:
        return [extent.form(), *([extent.form(extent.all_rows())] if extent.final else [])]

    def enter(self) -> Tensor | None:
        plan = self.call.plan
        self.wait = begin_once(self._start)
        if not plan.continues_before:
            return None
        self._receive()
        return self._fold(plan.sequences[0], plan.rank)

    def _start(self) -> Callable[[], list[Tensor]]:
        call = self.call
        state, transition = self._own_states() if call.final else call.element()
        values = [state]
        if self.transitions and isinstance(transition, Tensor):
            values.append(transition)
        return call.group.all_gather(pack(values), call.mixer, "what all ranks' tokens do to the state")

    def _own_states(self) -> tuple[Tensor, Transition]:
        """The states behind all of this rank's sequences, of a first that begins elsewhere for a state of zero."""
        call, plan = self.call, self.call.plan
        here, count = plan.sequences, len(plan.sequences)
        state, transition = call.zeros(self.slots), call.summary.identity()
        if not count:
            return state, transition
        given = call.given
        if given is not None and plan.bounds is not None:
            given = given[here.start : here.stop].clone()
            if plan.continues_before:
                given[0] = 0
        if count == 1 and plan.length:
            part = call.summary.part(call.first())
            found, transition = part.pair() if plan.continues_before else (part.state(given), transition)
        else:
            found, transition = call.summary.run(given, call.packing)[1], call.transition()
        state[: len(found)] = found
        return state, transition

    def _receive(self) -> None:
        """Waits for the states and transitions of all ranks, where that is still to be done."""
        if self.wait is None:
            return
        messages, self.wait = self.wait(), None
        found = [unpack(message, self._forms(self.call)) for message in messages]
        self.states = [one[0] for one in found]
        # the backward pass needs these too; an integer is of the tokens of a rank's first sequence
        views = self.call.plan.views
        self.known: list[Transition] = [
            one[1] if len(one) > 1 else view.lengths[0] if view.lengths else 0
            for one, view in zip(found, views, strict=True)
        ]

    def _state_of(self, sequence: int, rank: int) -> Tensor:
        if self.slots is None:
            return self.states[rank]
        index = sequence - self.call.plan.views[rank].sequences.start
        return self.states[rank][index : index + 1]

    def _fold(self, sequence: int, upto: int) -> Tensor:
        """The state of a sequence that enters a rank."""
        summary, plan = self.call.summary, self.call.plan
        first, *later = [rank for rank in plan.shares(sequence) if rank < upto]
        carry = self._state_of(sequence, first)
        for rank in later:
            carry = summary.apply(self.known[rank], carry) + self._state_of(sequence, rank)
        return carry

    def leave(self, state: Tensor) -> Tensor | None:
        call, plan = self.call, self.call.plan
        self._receive()
        found = None
        if call.final:
            blocks = []
            for rank, view in enumerate(plan.views):
                held = view.held(rank)
                if not held:
                    continue
                block = self.states[rank] if plan.bounds is None else self.states[rank][: len(held)]
                if view.continues_before:
                    entering = call.summary.apply(self.known[rank], self._fold(held[0], rank))
                    block = torch.cat((block[: call.rows] + entering, block[call.rows :]))
                blocks.append(block)
            found = torch.cat(blocks)
        # of no use in the backward pass
        self.states = []
        return found

    def back(self, gradient: Tensor, total: Tensor | None) -> Tensor | None:
        call, plan = self.call, self.call.plan
        values = [gradient] if total is None else [gradient, total]
        messages = call.group.all_gather(pack(values), call.mixer, "the gradients of the states")()
        found = [unpack(message, self._backward_forms(call)) for message in messages]
        if total is not None:
            total = torch.stack([own[1] for own in found]).sum(0)
        carry = None
        if plan.continues_after:
            sequence = plan.sequences[-1]
            carry = None if total is None else total[call.place(sequence)]
            for rank in reversed([rank for rank in plan.shares(sequence) if rank > plan.rank]):
                own = found[rank][0]
                carry = own if carry is None else call.summary.adjoint(self.known[rank], carry) + own
        return call.open_gradient(carry, total)


class _PointToPoint(Transport):
    """What passes from rank to rank; final states are gathered after they are known."""

    own: Transition

    @classmethod
    def sent_bytes(cls, extent: Extent) -> tuple[int, int]:
        forward, backward = cls._passed_bytes(extent) if extent.plan.crosses else (0, 0)
        if extent.final:
            forward += message_bytes([extent.form(cls._slots(extent))])
            backward += message_bytes([extent.form(extent.all_rows())])
        return forward, backward

    @classmethod
    @abstractmethod
    def _passed_bytes(cls, extent: Extent) -> tuple[int, int]:
        """What goes from rank to rank."""

    @staticmethod
    def _slots(extent: Extent) -> int:
        """The most final states that a rank has."""
        if extent.plan.bounds is None:
            return extent.rows
        return max(len(view.held(rank)) for rank, view in enumerate(extent.plan.views))

    def leave(self, state: Tensor) -> Tensor | None:
        call, plan = self.call, self.call.plan
        if not call.final:
            return None
        counts = [len(view.held(rank)) for rank, view in enumerate(plan.views)]
        slots = self._slots(call)

        def start() -> Callable[[], list[Tensor]]:
            held = call.zeros(slots)
            if counts[plan.rank]:
                size = slots if plan.bounds is None else counts[plan.rank]
                held[:size] = state.detach()[:size]
            return call.group.all_gather(pack([held]), call.mixer, "the final states")

        found = [unpack(message, [call.form(slots)])[0] for message in begin_once(start)()]
        if plan.bounds is None:
            return found[plan.holder(0)]
        return torch.cat([states[:count] for states, count in zip(found, counts, strict=True)])

    def back(self, gradient: Tensor, total: Tensor | None) -> Tensor | None:
        call, plan = self.call, self.call.plan
        if total is not None:
            messages = call.group.all_gather(pack([total]), call.mixer, "the gradients of the final states")()
            total = torch.stack([unpack(one, [call.form(call.all_rows())])[0] for one in messages]).sum(0)
        if not plan.crosses:
            return call.open_gradient(None, total)
        if total is not None and plan.continues_before and not plan.passes:
            gradient = gradient + call.summary.adjoint(self.own, total[call.place(plan.sequences[0])])
        carry = self.hand_back(gradient)
        return call.open_gradient(carry if plan.continues_after else None, total)

    @abstractmethod
    def hand_back(self, gradient: Tensor) -> Tensor | None:
        """The gradient of the state that leaves this rank, after that of the state that enters is handed back."""

    def _own(self, element: tuple[Tensor, Transition]) -> Tensor:
        """The state of this rank's element; its transition is kept for the backward pass."""
        state, self.own = element
        if isinstance(self.own, int):
            self.own = self.call.plan.lengths[0] if self.call.plan.length else 0
        return state

    def _kept(self, entering: Tensor | None) -> list[Tensor]:
        """What a recomputation needs of the exchange."""
        own = [self.own] if isinstance(self.own, Tensor) else []
        return [*own, *([] if entering is None else [entering])]

    def _restored(self, kept: list[Tensor]) -> Tensor | None:
        if self.call.transition_form():
            self.own, *kept = kept
        else:
            self.own = self.call.plan.lengths[0] if self.call.plan.length else 0
        return kept[0] if kept else None


class HillisSteele(_PointToPoint):
    """A scan by doubling, in rounds of which each joins neighbouring stretches of ranks."""

    @classmethod
    def _passed_bytes(cls, extent: Extent) -> tuple[int, int]:
        rounds = [1 << power for power in range((extent.plan.size - 1).bit_length())]
        size = message_bytes([extent.form(), *extent.transition_form()])
        rank, behind = extent.plan.rank, extent.plan.size - 1 - extent.plan.rank
        return size * sum(reach <= behind for reach in rounds), size * sum(reach <= rank for reach in rounds)

    def enter(self) -> Tensor | None:
        plan = self.call.plan
        if not plan.crosses:
            return None

        def run() -> list[Tensor]:
            state = self._own(self.call.element())
            entering = self._scan(state, forward=True)
            return self._kept(entering if plan.continues_before else None)

        return self._restored(once_a_forward(run))

    def hand_back(self, gradient: Tensor) -> Tensor | None:
        return self._scan(gradient, forward=False)

    def _scan(self, value: Tensor, forward: bool) -> Tensor | None:
        """What the ranks before this one make of their values, from the first on; backward, those behind it."""
        call, plan = self.call, self.call.plan
        sign = 1 if forward else -1
        what = "the state" if forward else "the gradient of the state"
        forms = [call.form(), *call.transition_form()]
        before: tuple[Tensor, Transition] | None = None
        window = value, self.own
        reach = 1
        while reach < plan.size:
            target, source = plan.rank + sign * reach, plan.rank - sign * reach
            waits = []
            if 0 <= target < plan.size:
                sent = pack([part for part in window if isinstance(part, Tensor)])
                waits.append(call.group.post(sent, target, call.mixer, what))
            if 0 <= source < plan.size:
                message = torch.empty(message_bytes(forms), dtype=torch.uint8, device=value.device)
                call.group.expect(message, source, call.mixer, what)()
                state, *transition = unpack(message, forms)
                # of a stretch whose tokens are all inside one sequence; of no other is the transition asked for
                stretch = [rank for rank in range(source, source - sign * reach, -sign) if 0 <= rank < plan.size]
                far = state, transition[0] if transition else sum(plan.counts[rank] for rank in stretch)
                between = range(source + sign, plan.rank, sign)
                before = far if before is None else self._join(before, far, between, forward)
                window = self._join(window, far, [*between, plan.rank], forward)
            for wait in waits:
                wait()
            reach *= 2
        return None if before is None else before[0]

    def _join(
        self, near: tuple[Tensor, Transition], far: tuple[Tensor, Transition], ranks: Sequence[int], forward: bool
    ) -> tuple[Tensor, Transition]:
        """What two stretches of ranks do together, of which ``ranks`` are the nearer one's."""
        summary, views = self.call.summary, self.call.plan.views
        if not all(views[rank].passes for rank in ranks):
            return near
        if forward:
            return summary.apply(near[1], far[0]) + near[0], summary.compose(near[1], far[1])
        return summary.adjoint(near[1], far[0]) + near[0], summary.compose(far[1], near[1])


class Pipelined(_PointToPoint):
    """The state from rank to rank, in parts."""

    @classmethod
    def _passed_bytes(cls, extent: Extent) -> tuple[int, int]:
        shape, dtype = extent.form()
        axis = extent.summary.axis % len(shape)
        parts = [(*shape[:axis], place.stop - place.start, *shape[axis + 1 :]) for place in _places(shape[axis] or 0)]
        size = sum(message_bytes([(part, dtype)]) for part in parts)
        return size * (extent.plan.following is not None), size * (extent.plan.previous is not None)

    def enter(self) -> Tensor | None:
        call, plan = self.call, self.call.plan
        if not plan.crosses:
            return None

        def run() -> list[Tensor]:
            state = self._own(call.element())
            return self._kept(self._pass(state, plan.previous, plan.following, type(call.summary).apply, "the state"))

        return self._restored(once_a_forward(run))

    def hand_back(self, gradient: Tensor) -> Tensor | None:
        plan, adjoint = self.call.plan, type(self.call.summary).adjoint
        return self._pass(gradient, plan.following, plan.previous, adjoint, "the gradient of the state")

    def _pass(
        self,
        value: Tensor,
        source: int | None,
        target: int | None,
        act: Callable[[Summary, Transition, Tensor], Tensor],
        what: str,
    ) -> Tensor | None:
        """Receives part after part, and sends each on as soon as this rank's tokens have acted on it."""
        call, summary = self.call, self.call.summary
        places = _places(value.shape[summary.axis])
        parts = [value.narrow(summary.axis, place.start, place.stop - place.start).contiguous() for place in places]
        forms: list[Form] = [(tuple(part.shape), part.dtype) for part in parts]
        buffers, arrivals = [], []
        if source is not None:
            buffers = [torch.empty(message_bytes([form]), dtype=torch.uint8, device=value.device) for form in forms]
            arrivals = [call.group.expect(buffer, source, call.mixer, what) for buffer in buffers]
        received, waits = [], []
        for index, (place, part) in enumerate(zip(places, parts, strict=True)):
            if source is not None:
                arrivals[index]()
                received.append(unpack(buffers[index], [forms[index]])[0])
                if call.plan.passes:
                    part = part + act(summary.narrowed(place), summary.cut(self.own, place), received[-1])
            if target is not None:
                message = pack([part])
                # the message must live until it is sent
                waits.append((call.group.post(message, target, call.mixer, what), message))
        for wait, _ in waits:
            wait()
        return torch.cat(received, summary.axis) if received else None


def _places(size: int) -> list[slice]:
    """The parts of a state along an axis of this size."""
    count = min(PIECES, size)
    cuts = [index * size // count for index in range(count + 1)]
    return [slice(start, end) for start, end in pairwise(cuts)]


TRANSPORTS: dict[str, type[Transport]] = {
    "allgather": AllGather,
    "hillis_steele": HillisSteele,
    "pipelined": Pipelined,
}
