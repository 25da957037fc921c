"""How the state of a sequence comes from rank to rank, and its gradient back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from seqzoo.kernels.checks import accumulator
from seqzoo.mixer import State, StateSpec

# of the tensors in a message, so that each can be viewed in its dtype
ALIGNMENT = 16
_Result = TypeVar("_Result")


class SequenceParallelError(RuntimeError):
    """Raised when ranks fail to exchange what a mixer hands on: one has died, stalled, or does something else.

    Under NCCL, whose waits do not stop a process, its watchdog ends the process instead; with the environment's
    ``TORCH_NCCL_BLOCKING_WAIT=1`` it is this error there too.
    """


# -- recomputation --


class _Recomputation:
    """What is recorded at present, or replayed: plain attributes."""

    tape: list[Any] | None = None
    # the next entry to be replayed; None where the tape is being written
    place: int | None = None


_recomputation = _Recomputation()


def keep_exchanges() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The ``context_fn`` with which activation checkpointing recomputes without communicating.

    ``torch.utils.checkpoint.checkpoint(run, x, use_reentrant=False, context_fn=keep_exchanges)`` keeps what ranks have
    exchanged in the forward pass (states and counts, small beside activations) and computes everything else again. A
    recomputation that had to communicate would wait for ranks that are in their backward pass already, and is an
    error.
    """
    tape: list[Any] = []

    @contextmanager
    def use(place: int | None) -> Iterator[None]:
        before = _recomputation.tape, _recomputation.place
        _recomputation.tape, _recomputation.place = tape, place
        try:
            yield
        finally:
            _recomputation.tape, _recomputation.place = before

    return use(None), _Replay(use)


class _Replay(AbstractContextManager[None]):
    """Replays a tape from its beginning every time that it is entered: a graph may be run backward twice."""

    def __init__(self, use: Callable[[int], AbstractContextManager[None]]) -> None:
        self.use = use

    def __enter__(self) -> None:
        self.current = self.use(0)
        self.current.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.current.__exit__(*error)


def keeping() -> bool:
    """Whether exchanges are kept at present, or come from what was kept."""
    return _recomputation.tape is not None


def once_a_forward(compute: Callable[[], _Result]) -> _Result:
    """Runs what communicates, or takes its result from the forward pass that is being recomputed.

    Raises:
        SequenceParallelError: If a recomputation has kept nothing.
    """
    return begin_once(lambda: compute)()


def begin_once(start: Callable[[], Callable[[], _Result]]) -> Callable[[], _Result]:
    """As :func:`once_a_forward`, for what goes on while something else is computed.

    Args:
        start: Begins to communicate, and returns what waits for the result. Between the two nothing else communicates.

    Returns:
        What waits for the result, to be called once.
    """
    active = _recomputation
    if active.tape is not None and active.place is not None:
        active.place += 1
        kept = _detached(active.tape[active.place - 1])
        return lambda: kept
    if torch._C._current_graph_task_id() != -1:  # pyright: ignore - not declared
        raise SequenceParallelError(
            "activation checkpointing recomputes a mixer inside the backward pass, where other ranks do not answer; "
            "pass use_reentrant=False and context_fn=seqzoo.parallel.keep_exchanges to torch.utils.checkpoint"
        )
    finish, tape = start(), active.tape

    def wait() -> _Result:
        result = finish()
        if tape is not None:
            tape.append(_detached(result))
        return result

    return wait


def _detached(result: Any) -> Any:
    """Tensors without their history: what autograd returns it writes its own to."""
    if isinstance(result, Tensor):
        return result.detach()
    return [_detached(one) for one in result] if isinstance(result, list) else result


# -- messages --


@dataclass(frozen=True, eq=False)
class Group:
    """The ranks that share sequences; errors of its calls say who could not do what.

    Attributes:
        handle: The process group.
        rank: This rank in it.
        size: Its ranks.
        name: Of the mesh dimension.
        mirror: Whether rank 0 is the last of the process group.
    """

    handle: dist.ProcessGroup
    rank: int
    size: int
    name: str
    mirror: bool = False

    def mirrored(self) -> Group:
        """The same ranks in the opposite order."""
        return replace(self, rank=self.size - 1 - self.rank, mirror=not self.mirror)

    def _true(self, rank: int) -> int:
        return self.size - 1 - rank if self.mirror else rank

    def __deepcopy__(self, memo: dict[int, Any]) -> Group:
        return self

    @contextmanager
    def guard(self, mixer: str, deed: str) -> Iterator[None]:
        """Turns errors of the transport into a SequenceParallelError."""
        try:
            yield
        except RuntimeError as error:
            raise SequenceParallelError(
                f"{mixer} on rank {self._true(self.rank)} of {self.size} of the group {self.name!r} could not {deed}: "
                f"{error}. "
                "Every rank must run the same calls, forward and backward, also one without tokens"
            ) from error

    def gather(self, numbers: list[int], device: torch.device, mixer: str) -> list[list[int]]:
        """Integers of every rank, of which all have equally many."""
        own = torch.tensor(numbers, device=device)
        found = [torch.empty_like(own) for _ in range(self.size)]
        with self.guard(mixer, "gather the ranks' token counts"):
            dist.all_gather(found, own, group=self.handle)
        return torch.stack(found).tolist()

    def all_gather(self, message: Tensor, mixer: str, what: str) -> Callable[[], list[Tensor]]:
        """Begins to gather the messages of all ranks, equally long ones; returns what waits for them."""
        found = [torch.empty_like(message) for _ in range(self.size)]
        with self.guard(mixer, f"gather {what}"):
            work = dist.all_gather(found, message, group=self.handle, async_op=True)
        finish = self._waiting(work, mixer, f"gather {what}")

        def wait() -> list[Tensor]:
            finish()
            return found[::-1] if self.mirror else found

        return wait

    def post(self, message: Tensor, target: int, mixer: str, what: str) -> Callable[[], None]:
        """Begins to send a message; returns what waits until its memory may be written to."""
        with self.guard(mixer, f"send {what} to rank {target}"):
            work = dist.isend(message, group=self.handle, group_dst=self._true(target))
        return self._waiting(work, mixer, f"send {what} to rank {target}")

    def expect(self, message: Tensor, source: int, mixer: str, what: str) -> Callable[[], None]:
        """Begins to receive a message into memory for it; returns what waits until it is there."""
        with self.guard(mixer, f"receive {what} from rank {source}"):
            work = dist.irecv(message, group=self.handle, group_src=self._true(source))
        return self._waiting(work, mixer, f"receive {what} from rank {source}")

    def _waiting(self, work: dist.Work | None, mixer: str, deed: str) -> Callable[[], None]:
        def wait() -> None:
            if work is not None:
                with self.guard(mixer, deed):
                    work.wait()

        return wait

    def send(self, values: Sequence[Tensor], forms: Sequence[Form], target: int, mixer: str, what: str) -> None:
        """Sends tensors of the given forms as one message of bytes; where a form is open, its sizes go before."""
        with self.guard(mixer, f"send {what} to rank {target}"):
            sizes = open_sizes(values, forms)
            if sizes:
                dist.send(torch.tensor(sizes, device=values[0].device), group=self.handle, group_dst=target)
            dist.send(pack(values), group=self.handle, group_dst=target)

    def receive(self, forms: Sequence[Form], device: torch.device, source: int, mixer: str, what: str) -> list[Tensor]:
        """Receives what :meth:`send` sends."""
        with self.guard(mixer, f"receive {what} from rank {source}"):
            count = n_open(forms)
            if count:
                sizes = torch.empty(count, dtype=torch.int64, device=device)
                dist.recv(sizes, group=self.handle, group_src=source)
                forms = closed(forms, sizes.tolist())
            message = torch.empty(message_bytes(forms), dtype=torch.uint8, device=device)
            dist.recv(message, group=self.handle, group_src=source)
        return unpack(message, forms)

    def broadcast(
        self, values: Sequence[Tensor] | None, forms: Sequence[Form], device: torch.device, owner: int, mixer: str
    ) -> list[Tensor]:
        """Gives one rank's tensors to all; the others give None."""
        with self.guard(mixer, f"share the final states of rank {owner}"):
            count = n_open(forms)
            if count:
                sizes = torch.tensor([0] * count if values is None else open_sizes(values, forms), device=device)
                dist.broadcast(sizes, group=self.handle, group_src=owner)
                forms = closed(forms, sizes.tolist())
            if values is None:
                message = torch.empty(message_bytes(forms), dtype=torch.uint8, device=device)
            else:
                message = pack(values)
            dist.broadcast(message, group=self.handle, group_src=owner)
        return unpack(message, forms)

    def add_up(self, values: Sequence[Tensor], owner: int, mixer: str) -> list[Tensor] | None:
        """The sums over all ranks of tensors, on one rank; None on the others."""
        if not values:
            return []
        with self.guard(mixer, f"add up the gradients of the final states of rank {owner}"):
            parts = [torch.view_as_real(value) if value.is_complex() else value for value in values]
            wide = accumulator(parts[0].dtype)
            total = torch.cat([part.flatten().to(wide) for part in parts])
            dist.reduce(total, group=self.handle, group_dst=owner)
        if self.rank != owner:
            return None
        sums = total.split([part.numel() for part in parts])
        found = []
        for value, part, one in zip(values, parts, sums, strict=True):
            one = one.to(part.dtype).view(part.shape)
            found.append(torch.view_as_complex(one) if value.is_complex() else one)
        return found


# shape, None where only the sender knows it, and dtype
Form = tuple[tuple[int | None, ...], torch.dtype]


def forms_of(spec: StateSpec) -> list[Form]:
    """The forms of a state's tensors."""
    return list(spec.values())


def n_open(forms: Sequence[Form]) -> int:
    """How many sizes only the sender knows."""
    return sum(size is None for shape, _ in forms for size in shape)


def open_sizes(values: Sequence[Tensor], forms: Sequence[Form]) -> list[int]:
    """The sizes that the forms leave open.

    Raises:
        RuntimeError: If the tensors have other forms: ranks that disagree about a message end without a word.
    """
    found = []
    for value, (shape, dtype) in zip(values, forms, strict=True):
        fits = len(shape) == value.dim() and all(
            want is None or have == want for have, want in zip(value.shape, shape, strict=True)
        )
        if not fits or value.dtype != dtype:
            raise RuntimeError(
                f"state_spec promises shape {shape} and {dtype}, mix returned {tuple(value.shape)} and {value.dtype}"
            )
        found += [have for have, want in zip(value.shape, shape, strict=True) if want is None]
    return found


def closed(forms: Sequence[Form], sizes: Sequence[int]) -> list[Form]:
    """The forms with the open sizes filled in."""
    remaining = iter(sizes)
    return [(tuple(next(remaining) if size is None else size for size in shape), dtype) for shape, dtype in forms]


def padded_bytes(form: Form) -> int:
    """Bytes of one tensor in a message."""
    shape, dtype = form
    size = dtype.itemsize
    for extent in shape:
        size *= extent or 0
    return -(-size // ALIGNMENT) * ALIGNMENT


def message_bytes(forms: Sequence[Form]) -> int:
    """Bytes of a message."""
    return sum(map(padded_bytes, forms))


def pack(values: Sequence[Tensor]) -> Tensor:
    """Tensors of any dtypes as one of bytes, bit by bit."""
    parts = []
    for value in values:
        raw = value.detach().resolve_conj().resolve_neg().contiguous().flatten().view(torch.uint8)
        parts.append(F.pad(raw, (0, -raw.numel() % ALIGNMENT)))
    return torch.cat(parts)


def unpack(message: Tensor, forms: Sequence[Form]) -> list[Tensor]:
    """What :func:`pack` has packed, in memory of its own."""
    found = []
    for raw, (shape, dtype) in zip(message.split([padded_bytes(form) for form in forms]), forms, strict=True):
        value = torch.empty([size or 0 for size in shape], dtype=dtype, device=message.device)
        value.flatten().view(torch.uint8).copy_(raw[: value.numel() * dtype.itemsize])
        found.append(value)
    return found


# -- a mixer's exchange --


@dataclass(frozen=True, eq=False)
class Wire:
    """What one call of a mixer hands on and receives.

    Attributes:
        group: The ranks.
        mixer: Name of the mixer, for errors.
        source: The rank whose state this one continues, if any.
        target: The rank that continues this one's, if any.
        spec: Of the state that goes from rank to rank.
        shared: Ranks that hold final states, and the spec of each, where all want them.
    """

    group: Group
    mixer: str
    source: int | None
    target: int | None
    spec: StateSpec
    shared: tuple[tuple[int, StateSpec], ...] = ()

    def enter(self, x: Tensor, anchor: Tensor) -> tuple[Tensor, State]:
        """x and the state of the source; in backward its gradient goes there, before any that x depends on."""
        x, *received = _Enter.apply(self, anchor, x)
        return x, dict(zip(self.spec, received, strict=True))

    def leave(self, y: Tensor, anchor: Tensor, sent: State | None, held: State | None) -> tuple[Tensor, list[State]]:
        """y, and the holders' final states, after the state has gone to the target.

        In backward the gradients of the final states go to their holders, and the target's comes back. All that comes
        through y, so on every rank the loss must depend on it, of zero tokens too.
        """
        values = [*(sent or {}).values(), *(held or {}).values()]
        y, *blocks = _Leave.apply(self, anchor, y, *values)
        keys = list(self.spec)
        states = [dict(zip(keys, blocks[at : at + len(keys)], strict=True)) for at in range(0, len(blocks), len(keys))]
        return y, states


def anchor_of(x: Tensor) -> Tensor:
    """What makes an exchange part of the graph whatever else requires a gradient, for other ranks will call for it."""
    return x.new_zeros((), requires_grad=torch.is_grad_enabled())


def form_of(value: Tensor) -> Form:
    """A tensor's shape and dtype."""
    return tuple(value.shape), value.dtype


def _is_differentiable(form: Form) -> bool:
    return form[1].is_floating_point or form[1].is_complex


def differentiable(value: Tensor) -> bool:
    """Whether gradients exist for a tensor's dtype."""
    return _is_differentiable(form_of(value))


def _spread(gradients: Sequence[Tensor], kinds: Sequence[bool]) -> list[Tensor | None]:
    """Gradients of all values, None for those that have none."""
    remaining = iter(gradients)
    return [next(remaining) if kind else None for kind in kinds]


def filled(gradients: Sequence[Tensor | None], forms: Sequence[Form], device: torch.device) -> list[Tensor]:
    """Gradients of what is differentiable, zero where autograd has none."""
    return [
        torch.zeros([size or 0 for size in shape], dtype=dtype, device=device) if gradient is None else gradient
        for gradient, (shape, dtype) in zip(gradients, forms, strict=True)
        if _is_differentiable((shape, dtype))
    ]


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, wire: Wire, anchor: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        source = wire.source
        if source is None:
            raise RuntimeError("a rank without a source has no state to receive")
        received = once_a_forward(
            lambda: wire.group.receive(forms_of(wire.spec), x.device, source, wire.mixer, "the state")
        )
        ctx.wire, ctx.forms, ctx.x = wire, [form_of(value) for value in received], (form_of(x), x.device)
        ctx.mark_non_differentiable(*(value for value in received if not _is_differentiable(form_of(value))))
        return x.view_as(x), *received

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor | None, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore - torch types no arity
        wire, (form, device) = ctx.wire, ctx.x
        values = filled(gradients, ctx.forms, device)
        if values:
            what = "the gradient of the state"
            wire.group.send(values, [form_of(value) for value in values], wire.source, wire.mixer, what)
        return None, None, *filled([grad_x], [form], device)


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, wire: Wire, anchor: Tensor, y: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        n_sent = len(wire.spec) if wire.target is not None else 0
        sent, held = values[:n_sent], values[n_sent:]
        blocks = once_a_forward(lambda: _hand_on(wire, sent, held, y.device))
        ctx.wire, ctx.y = wire, (form_of(y), y.device)
        ctx.sent, ctx.n_held = [form_of(value) for value in sent], len(held)
        ctx.blocks = [form_of(value) for value in blocks]
        ctx.mark_non_differentiable(*(value for value in blocks if not _is_differentiable(form_of(value))))
        return y.view_as(y), *blocks

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore - torch types no arity
        wire, (form, device) = ctx.wire, ctx.y
        count = len(wire.spec)
        held: list[Tensor | None] = [None] * ctx.n_held
        for index, (owner, _) in enumerate(wire.shared):
            part = slice(index * count, (index + 1) * count)
            sums = wire.group.add_up(filled(gradients[part], ctx.blocks[part], device), owner, wire.mixer)
            if sums is not None and owner == wire.group.rank:
                held = _spread(sums, [_is_differentiable(one) for one in ctx.blocks[part]])
        sent: list[Tensor | None] = [None] * len(ctx.sent)
        forms = [one for one in ctx.sent if _is_differentiable(one)]
        if forms:
            what = "the gradient of the state"
            received = wire.group.receive(forms, device, wire.target, wire.mixer, what)
            sent = _spread(received, [_is_differentiable(one) for one in ctx.sent])
        return None, None, *filled([grad_y], [form], device), *sent, *held


def _hand_on(wire: Wire, sent: Sequence[Tensor], held: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Sends the state to the target, and gives all ranks the final states."""
    if wire.target is not None:
        wire.group.send(sent, forms_of(wire.spec), wire.target, wire.mixer, "the state")
    blocks: list[Tensor] = []
    for owner, spec in wire.shared:
        own = held if owner == wire.group.rank else None
        blocks += wire.group.broadcast(own, forms_of(spec), device, owner, wire.mixer)
    return blocks
