"""Switches a model to sequence parallel: every mixer runs on its rank's tokens and hands its state on."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast, get_args
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from seqzoo.kernels.checks import accumulator
from seqzoo.kernels.dispatch import slot
from seqzoo.layers.bidirectional import Bidirectional
from seqzoo.mixer import Mixed, SequenceMixer, State, join
from seqzoo.models.backbone import Backbone
from seqzoo.models.classifier import SequenceClassifier
from seqzoo.models.language_model import LanguageModel
from seqzoo.models.parallel_mixers import ParallelMixers
from seqzoo.models.positions import LearnedPositions
from seqzoo.modules.attention import AttentionMixer
from seqzoo.modules.convolution import ConvolutionMixer
from seqzoo.modules.positions import count_positions
from seqzoo.packing import Packing, check_form
from seqzoo.parallel.attention import head_ranks_of, parallel_attention, parallel_state
from seqzoo.parallel.exchange import Group, Wire, anchor_of, keeping, once_a_forward
from seqzoo.parallel.loss import ParallelLoss, refuse_padding
from seqzoo.parallel.ops import ParallelOps, answered_by, try_out
from seqzoo.parallel.plan import Plan
from seqzoo.parallel.transports import TRANSPORTS, Extent

Exchange = Literal["chain", "allgather", "hillis_steele", "pipelined"]
Attention = Literal["chain", "allgather", "ulysses", "ring", "usp"]
EXCHANGES = ("chain", *TRANSPORTS)
ATTENTION = get_args(Attention)
# x, state, packing, whether the state is wanted
Run = Callable[[Tensor, State | None, Packing | None, bool], Mixed]


def parallelize(
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    exchange: Exchange = "chain",
    attention: Attention = "chain",
    head_ranks: int | None = None,
    strict: bool = False,
) -> nn.Module:
    """Switches every mixer of a model to sequences that lie on several ranks, in place.

    The layers' code stays as it is. The exchanges give the same results:

    * ``"chain"`` hands the true state from rank to rank, and its gradient back: LASP's ring
      (https://arxiv.org/abs/2404.02882), for whatever has a state. Ranks wait for those before them, so a single layer
      takes as long as on one rank; it divides the memory of activations, and successive layers overlap.
    * ``"allgather"``: every rank sums up what its tokens do to the state, one gather tells all, and all run at the same
      time ("LASP-2", https://arxiv.org/abs/2502.07563, for every op whose state is affine in it). One gather an op
      forward, one backward, whose size does not depend on the length; see :func:`payload_bytes`. Making the summary
      costs up to one forward pass of the op's more. While the gather runs, a rank whose first token begins a sequence
      computes; the others wait for it, for their ops read the state from the first token on. A pass from a state of
      zero meanwhile, corrected afterwards, is more work than it hides: forward and backward 1.3 times that of linear
      attention and 2.4 times that of a scan (4096 tokens, one thread).
    * ``"hillis_steele"``: the same summaries in ``ceil(log2 P)`` rounds to single ranks, for many ranks.
    * ``"pipelined"``: summaries likewise, and the state goes from rank to rank in parts ("ZeCO",
      https://arxiv.org/abs/2507.01004), each rank receiving just its own.

    A mixer exchanges summaries if its tokens meet one another in such ops alone, which a trial on a few tokens shows
    when it is first called; softmax attention, kernels of any form and running maxima are none, and such mixers take
    the chain. :func:`exchanges_of` says which one each mixer has, and why. Attention and SlidingWindowAttention have
    ways of their own, of :func:`parallel_attention`: keys and values gathered (LASP-2H), heads divided (Ulysses), a
    ring, or heads and ring; with one of these attention may also see later tokens.

    Afterwards, in every outermost call, on all ranks alike:

    * the input is this rank's tokens, any number, none included;
    * ``cu_seqlens`` are the boundaries over all ranks, as a Tensor, a Packing or a :class:`Plan`. Unless a Plan is
      given the call gathers the ranks' token counts once. Under ``seqzoo.ops.checks`` it does so beside a Plan too,
      with a hash of it: where one rank's plan or number of tokens is another, all raise ValueError;
    * ``state`` is the whole sequences' initial state, equal on all ranks, and its gradient each rank's share, which add
      up to the whole one; the returned state is the whole sequences', on every rank, and takes gradients from all;
    * an auxiliary loss is each rank's share, which add up to the mean over tokens. A mixture of memories counts what of
      a sequence lies on a rank as a sequence of its own;
    * the gradients of parameters are each rank's share: sum them over the ranks by FSDP2 or DDP over the flattened
      data and sequence mesh, or by :func:`sum_gradients`;
    * backward runs on every rank, from a loss that depends on the outputs, also where they have no tokens.

    ``model.loss`` of a language model is then each rank's share, and the shares add up to the loss of all tokens. Every
    rank calls ``backward`` on its own; to log the loss add up ``loss.detach()``, and never reduce it before::

        labels = next_tokens(ids, cu_seqlens)  # of whole sequences
        plan = Plan.balanced(ids.shape[1], size, rank, cu_seqlens)
        loss = model.loss(plan.shard(ids), plan.shard(labels), cu_seqlens=plan)
        loss.backward()
        sum_gradients(model)

    Decoding is not parallel: ``step`` works on every rank alike with the returned state.

    Args:
        model: A mixer, a :class:`Backbone`, a :class:`LanguageModel`, or any module that hands ``cu_seqlens`` and
            states through to the mixers in it.
        mesh: One dimension, ``mesh["sequence_parallel"]``.
        exchange: How states come to the ranks.
        attention: How softmax attention runs.
        head_ranks: For ``"usp"``, how many ranks share the heads; None means as many as can.
        strict: Whether a mixer that would take the chain instead is an error. The trial is then at once, so parameters
            must not be on the meta device.

    Returns:
        The model.

    Raises:
        TypeError: If the mesh is no DeviceMesh.
        ValueError: If the mesh has several dimensions; if the model has no mixer, is parallel already, or has one that
            cannot be: a mixer that neither is causal nor Bidirectional around one that is, batch norm, or a head that
            pools over tokens; if so many ranks cannot share the heads; under ``strict`` if a mixer cannot do the
            exchange.
    """
    choices = Choices(exchange, attention, head_ranks)
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"mesh must be a DeviceMesh, got {type(mesh).__name__}")
    if mesh.ndim != 1:
        names = mesh.mesh_dim_names
        raise ValueError(f"mesh must have one dimension, as mesh['sequence_parallel'] has, got {mesh.ndim}: {names}")
    handle = mesh.get_group()
    name = mesh.mesh_dim_names[0] if mesh.mesh_dim_names else "sequence"
    group = Group(handle, dist.get_rank(handle), dist.get_world_size(handle), name)
    mixers = check_model(model, choices, group.size, group.rank)
    if strict:
        for part in itertools.chain.from_iterable(map(parts_of, mixers)):
            reason = None if choices.attends(part) else choices.obstacle(part, None)
            if reason is not None:
                raise ValueError(
                    f"{type(part).__name__} on rank {group.rank} of {group.size} cannot exchange by {exchange!r}: "
                    f"{reason}; use exchange='chain', or strict=False, with which it takes the chain while others do "
                    "not"
                )
    scope = Scope(group, choices)
    # a shared mixer occurs once
    for mixer in mixers:
        wrapper = ParallelBidirectional if isinstance(mixer, Bidirectional) else ParallelMixer
        mixer.forward = wrapper(mixer, scope).forward
    for part in model.modules():
        if isinstance(part, ParallelMixers) and part not in mixers:
            part.forward = ParallelParts(part, scope).forward
        if isinstance(part, LearnedPositions):
            part.forward = ParallelPositions(part, scope).forward
        if isinstance(part, Backbone | LanguageModel):
            part.forward = ParallelCall(part, "forward", scope).call
        if isinstance(part, LanguageModel):
            part.loss = ParallelLoss(part, scope.group).loss
            part.prefill = Refusal(part).prefill
    return model


def outermost_mixers(model: nn.Module, apart: bool = False) -> list[SequenceMixer]:
    """The mixers of a model that are not part of others, in order; ``apart`` those of ParallelMixers each by itself."""
    if isinstance(model, SequenceMixer) and not (apart and isinstance(model, ParallelMixers)):
        return [model]
    found: dict[int, SequenceMixer] = {}
    for child in model.children():
        found |= {id(mixer): mixer for mixer in outermost_mixers(child, apart)}
    return list(found.values())


def parts_of(mixer: SequenceMixer) -> tuple[SequenceMixer, ...]:
    """The mixers whose states are exchanged: both of a Bidirectional, else the mixer itself."""
    return (mixer.mixer, mixer.mixer_reverse) if isinstance(mixer, Bidirectional) else (mixer,)


def exchanges_of(model: nn.Module) -> dict[str, tuple[str, str]]:
    """By the name of every parallel mixer in a model the exchange that it has, and why.

    Without communication. Of a mixer that has not been called yet the trial is made, so its parameters must not be on
    the meta device.

    Raises:
        ValueError: If nothing in the model is parallel.
    """
    choices = scope_of(model).choices
    names = {id(part): name for name, part in model.named_modules()}
    found = {}
    for mixer in outermost_mixers(model, apart=choices.apart):
        for part in parts_of(mixer):
            if part is mixer and choices.attends(part):
                found[names[id(part)]] = choices.attention, "asked for"
                continue
            reason = "asked for" if choices.exchange == "chain" else choices.obstacle(part, None)
            exchange = choices.exchange if reason is None else "chain"
            found[names[id(part)]] = exchange, reason or "its tokens meet in ops whose state is affine"
    return found


def payload_bytes(
    mixer: SequenceMixer,
    plan: Plan,
    exchange: str = "allgather",
    *,
    batch_size: int = 1,
    dtype: torch.dtype | None = None,
    final: bool = False,
) -> tuple[int, int]:
    """The bytes that a rank sends in one forward and in one backward pass of a mixer, whatever their receivers.

    For every op a state, and forward a transition where a rank lies inside a sequence, each padded to 16 bytes: for an
    elementwise scan a number a channel, for a selective one the sum of the steps, a sum of log decays of linear
    attention (fixed ones none), a matrix a head of the delta rule, nothing for convolutions and state spaces that do
    not depend on time. Nothing at all where no sequence goes over a cut. With ``final`` the states of all sequences
    besides, and their gradients. In an all-gather a rank receives ``P - 1`` such messages.

    Args:
        mixer: With parameters that are not on the meta device; parallel or not.
        plan: Of the tokens and this rank.
        exchange: Any but the chain.
        batch_size: Of dense sequences.
        dtype: Of the inputs; the parameters' when omitted.
        final: Whether the final state is asked for.

    Raises:
        ValueError: If the mixer cannot do the exchange, or there is none of that name.
    """
    if exchange not in TRANSPORTS:
        raise ValueError(f"exchange must be one of {', '.join(TRANSPORTS)}, got {exchange!r}")
    reason, calls = try_out(mixer, probe(mixer, batch_size if plan.bounds is None else 1, dtype))
    if reason is not None:
        raise ValueError(f"{type(mixer).__name__} cannot exchange by {exchange!r}: {reason}")
    sizes = [TRANSPORTS[exchange].sent_bytes(Extent(plan, summary, final)) for summary in calls]
    return sum(forward for forward, _ in sizes), sum(backward for _, backward in sizes)


def probe(mixer: SequenceMixer, batch_size: int, dtype: torch.dtype | None) -> Tensor:
    """An input without tokens, on the device of a mixer's parameters."""
    weight = mixer._weight()
    device = torch.device("cpu") if weight is None else weight.device
    if device.type == "meta":
        raise ValueError(f"the parameters of {type(mixer).__name__} are on the meta device; materialise them first")
    kind = dtype or (torch.get_default_dtype() if weight is None else weight.dtype)
    return torch.empty((batch_size, 0, mixer.d_model), dtype=kind, device=device)


class Choices:
    """Which mixers exchange summaries, by trial, and how attention runs.

    Raises:
        ValueError: If an option has an unknown value, or ``head_ranks`` none of ``"usp"``.
    """

    def __init__(self, exchange: Exchange, attention: str = "chain", head_ranks: int | None = None) -> None:
        if exchange not in EXCHANGES:
            raise ValueError(f"exchange must be one of {', '.join(EXCHANGES)}, got {exchange!r}")
        if attention not in ATTENTION:
            raise ValueError(f"attention must be one of {', '.join(ATTENTION)}, got {attention!r}")
        if head_ranks is not None and attention != "usp":
            raise ValueError(f"head_ranks is for attention 'usp', got {head_ranks!r} with {attention!r}")
        self.exchange: Exchange = exchange
        self.attention, self.head_ranks = attention, head_ranks
        self.reasons: dict[int, str | None] = {}

    @property
    def apart(self) -> bool:
        """Whether mixers that stand beside one another in a block may have different exchanges."""
        return (self.exchange, self.attention) != ("chain", "chain")

    def attends(self, mixer: SequenceMixer) -> bool:
        """Whether a mixer runs as attention over all ranks."""
        return self.attention != "chain" and isinstance(mixer, AttentionMixer)

    def check_heads(self, mixers: list[SequenceMixer], size: int, rank: int) -> None:
        """Raises ValueError unless so many ranks can share the heads of all attention."""
        for mixer in mixers:
            if isinstance(mixer, AttentionMixer) and self.attends(mixer):
                try:
                    head_ranks_of(self.attention, self.head_ranks, size, mixer.n_heads)
                except ValueError as error:
                    raise ValueError(
                        f"{type(mixer).__name__} on rank {rank} of {size} cannot run by {self.attention!r}: {error}"
                    ) from error

    def obstacle(self, mixer: SequenceMixer, x: Tensor | None) -> str | None:
        """Why a mixer takes the chain, or None.

        Args:
            mixer: The mixer.
            x: Its input, if there is one.
        """
        if self.exchange == "chain":
            return "asked for"
        if id(mixer) not in self.reasons:
            self.reasons[id(mixer)] = try_out(mixer, probe(mixer, 1, None) if x is None else x[:1, :0])[0]
        return self.reasons[id(mixer)]


def check_model(model: nn.Module, choices: Choices, size: int, rank: int) -> list[SequenceMixer]:
    """The mixers that :func:`parallelize` switches, after it is known that so many ranks can run them so.

    Raises:
        ValueError: If they cannot.
    """
    mixers = outermost_mixers(model, apart=choices.apart)
    check_parts(model, mixers, choices)
    choices.check_heads(mixers, size, rank)
    return mixers


def check_parts(model: nn.Module, mixers: list[SequenceMixer], choices: Choices) -> None:
    """Raises ValueError if a part of a model has no parallel form."""
    if not mixers:
        raise ValueError(f"{type(model).__name__} has no mixer to be run in parallel")
    for mixer in mixers:
        if "forward" in vars(mixer):
            raise ValueError(f"{type(mixer).__name__} is parallel already; parallelize the outermost module once")
        parts = (mixer.mixer, mixer.mixer_reverse) if isinstance(mixer, Bidirectional) else (mixer,)
        for part in parts:
            if "state" in part.limits and not (part is mixer and choices.attends(part)):
                ways = ", attention='allgather' or another" if isinstance(part, AttentionMixer) else ""
                raise ValueError(
                    f"{type(part).__name__} has no state that could go from rank to rank: {part.limits['state']}. Use "
                    f"a causal mixer, or Bidirectional around one{ways}"
                )
    for part in model.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            raise ValueError(
                f"{type(part).__name__} would take the statistics of one rank's tokens; use norm='rms' or 'layer'"
            )
        if isinstance(part, SequenceClassifier):
            raise ValueError(
                f"{type(part).__name__} pools over tokens that lie on other ranks; parallelize its backbone and add up "
                "over the ranks what is pooled"
            )


class Scope:
    """What the parts of one parallel model share: the ranks, and the plan of the outermost call that is running."""

    def __init__(self, group: Group, choices: Choices) -> None:
        self.group, self.choices = group, choices
        self.plan: Plan | None = None
        self.packing: Packing | None = None

    @contextmanager
    def planned(self, name: str, x: Tensor, cu_seqlens: Tensor | Packing | Plan | None) -> Iterator[Plan]:
        """The plan of the running outermost call, or of this one, which then is the outermost.

        Args:
            name: Of the part that is called.
            x: This rank's tokens, ``(B, T, ...)``.
            cu_seqlens: As the part was given it.
        """
        plan = self.plan
        if plan is None or keeping():
            # a part may be recomputed whose outermost call is over
            plan = once_a_forward(lambda: self.plan or self._plan(name, x, cu_seqlens))
        if self.plan is not None:
            yield plan
            return
        self.plan, self.packing = plan, plan.packing(x.device)
        try:
            yield plan
        finally:
            self.plan = self.packing = None

    def _plan(self, name: str, x: Tensor, given: Tensor | Packing | Plan | None) -> Plan:
        if not isinstance(given, Plan):
            return self._gathered(name, x, given)
        plan, group = given, self.group
        if slot.checks:
            found = self._compared(name, x, plan.bounds or (), plan.counts)
            for rank, (have, want) in enumerate(zip(found, plan.counts, strict=False)):
                if have != want:
                    raise ValueError(f"the plan gives rank {rank} {want} tokens, the input of {name} there has {have}")
        if (plan.size, plan.rank) != (group.size, group.rank):
            raise ValueError(
                f"the plan is that of rank {plan.rank} of {plan.size}, this is rank {group.rank} of {group.size} of "
                f"the group {group.name!r}"
            )
        if x.shape[1] != plan.length:
            raise ValueError(f"the plan gives rank {plan.rank} {plan.length} tokens, the input has {x.shape[1]}")
        if plan.bounds is not None and x.shape[0] != 1:
            raise ValueError(f"packed sequences lie in a batch of 1, got a batch of {x.shape[0]}")
        return plan

    def _gathered(self, name: str, x: Tensor, cu_seqlens: Tensor | Packing | None) -> Plan:
        bounds: list[int] = []
        if cu_seqlens is not None:
            bare = cu_seqlens.cu_seqlens if isinstance(cu_seqlens, Packing) else cu_seqlens
            check_form(bare, x.shape[0], x.device)
            if isinstance(cu_seqlens, Packing) and cu_seqlens.prefix_lengths is not None:
                raise ValueError("a Packing with prefix_lengths cannot be run in parallel: a prefix is not causal")
            bounds = cu_seqlens.bounds() if isinstance(cu_seqlens, Packing) else cu_seqlens.tolist()
        return Plan.of(self._compared(name, x, bounds), self.group.rank, bounds or None)

    def _compared(self, name: str, x: Tensor, bounds: Sequence[int], counts: Sequence[int] = ()) -> list[int]:
        """The tokens of every rank, after it is known that all give the same but for these.

        Args:
            name: Of the part that is called.
            x: This rank's tokens.
            bounds: Of packed sequences.
            counts: Of the plan that was given, if any.
        """
        digests = [crc32(",".join(map(str, some)).encode()) for some in (bounds, counts)]
        found = self.group.gather([x.shape[1], x.shape[0], len(bounds), *digests], x.device, name)
        for rank, (_, *others) in enumerate(found):
            if others != found[0][1:]:
                said = [
                    f"rank {one} gives B = {found[one][1]}, {found[one][2]} boundaries (hash {found[one][3]:08x}) and "
                    f"{f'a plan (hash {found[one][4]:08x})' if found[one][4] else 'no plan'}"
                    for one in (rank, 0)
                ]
                raise ValueError(
                    f"all ranks must give {name} one batch size and the same cu_seqlens over all ranks, or the same "
                    f"plan, but {', '.join(said)}"
                )
        return [row[0] for row in found]


class ParallelMixer:
    """A mixer's forward on this rank's tokens."""

    def __init__(self, mixer: SequenceMixer, scope: Scope) -> None:
        self.mixer, self.scope = mixer, scope

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        *,
        cu_seqlens: Tensor | Packing | Plan | None = None,
        return_state: bool = False,
        return_auxiliary: bool = False,
    ) -> tuple[Tensor, State | None] | tuple[Tensor, State | None, Tensor]:
        """As :meth:`SequenceMixer.forward`, but for what :func:`parallelize` says."""
        mixer = self.mixer
        mixer._check_input(x, 3, "(B, T, D)")
        if cu_seqlens is not None:
            mixer._refuse("packing")
        if state is not None or return_state:
            mixer._refuse("state")
        with self.scope.planned(type(mixer).__name__, x, cu_seqlens) as plan:
            if state is not None:
                mixer._check_state(state, x.shape[0] if plan.bounds is None else plan.n_sequences, x)
            mixed = self.mix(plan, x, state, return_state)
        result = mixed.y, mixed.state
        return (*result, cast("Tensor", mixed.auxiliary)) if return_auxiliary else result

    def mix(self, plan: Plan, x: Tensor, state: State | None, return_state: bool) -> Mixed:
        """Runs the mixer between the ranks before and behind; the auxiliary loss is this rank's share."""
        if self.scope.choices.attends(self.mixer):
            mixed = self.attended(cast("AttentionMixer", self.mixer), plan, x, state, return_state)
        elif self.scope.choices.obstacle(self.mixer, x) is None:
            mixed = self.summed_up(self.mixer, bare(self.mixer), plan, x, state, return_state)
        else:
            mixed = self.chain(self.mixer, ordinary(self.mixer), plan, x, state, return_state)
        return mixed._replace(auxiliary=share(mixed.auxiliary, plan, x))

    def attended(self, mixer: AttentionMixer, plan: Plan, x: Tensor, state: State | None, return_state: bool) -> Mixed:
        """Runs softmax attention over the tokens of all ranks."""
        packing = self.scope.packing
        rows = x.shape[0] if plan.bounds is None else plan.n_sequences
        before = torch.zeros(rows, dtype=torch.int64, device=x.device) if state is None else state["length"]
        q, k, v = mixer.project(x, count_positions(x, seen_before(plan, before), packing)[0])
        if state is not None:
            q, k, v = (one.to(x.dtype) for one in (q, k, v))
        group, name = self.scope.group, type(mixer).__name__
        choices, window = self.scope.choices, getattr(mixer, "window", None)
        o, _ = parallel_attention(
            group,
            plan,
            q,
            k,
            v,
            state,
            method=cast("Any", choices.attention),
            head_ranks=choices.head_ranks,
            causal=getattr(mixer, "causal", True),
            window=window,
            mixer=name,
            **mixer.options(),
        )
        after = None
        if return_state:
            o, after = parallel_state(group, plan, o, k, v, state, window=window, mixer=name)
            after = {key: value if key == "length" else value.to(x.dtype) for key, value in after.items()}
        return Mixed(mixer.out_proj(o.flatten(2)), after)

    def summed_up(
        self,
        mixer: SequenceMixer,
        run: Run,
        plan: Plan,
        x: Tensor,
        state: State | None = None,
        return_state: bool = False,
        *,
        reverse: bool = False,
    ) -> Mixed:
        """Runs a mixer whose ops exchange summaries; ``reverse`` on tokens, sequences and ranks turned round."""
        group, packing = self.scope.group, self.scope.packing
        if reverse:
            group, plan = group.mirrored(), plan.mirrored()
            packing = plan.packing(x.device)
        rows = x.shape[0] if plan.bounds is None else plan.n_sequences
        spec = mixer.state_spec(rows, x.dtype)
        counts = {key for key, (_, dtype) in spec.items() if not (dtype.is_floating_point or dtype.is_complex)}
        given, after = state, {}
        if counts:
            # these count tokens, which the plan does too
            given = dict(mixer.init_state(rows, device=x.device, dtype=x.dtype) if state is None else state)
            for key in counts:
                before = given[key]
                after[key] = before + torch.tensor(plan.extent, device=x.device).diff()
                given[key] = seen_before(plan, before)
        transport = TRANSPORTS[self.scope.choices.exchange]
        with answered_by(ParallelOps(group, plan, packing, type(mixer).__name__, transport, return_state)):
            mixed = run(x, given, packing, True)
        if not return_state:
            return mixed._replace(state=None)
        return mixed._replace(state=select(mixed.state, slice(None), mixer) | after)

    def chain(
        self,
        mixer: SequenceMixer,
        run: Run,
        plan: Plan,
        x: Tensor,
        state: State | None = None,
        return_state: bool = False,
        *,
        reverse: bool = False,
    ) -> Mixed:
        """Runs a mixer from the state of the rank before, and hands its own on.

        Args:
            mixer: Whose state it is.
            run: What runs it on tokens of one rank.
            plan: Of the tokens.
            x: This rank's tokens ``(B, T, D)``, for ``reverse`` those of every sequence turned round.
            state: The initial state of all sequences.
            return_state: Whether the final state of all sequences is wanted.
            reverse: Whether it runs from the last rank to the first.
        """
        dense, here = plan.bounds is None, plan.sequences
        rows = x.shape[0] if dense else 1
        spec = mixer.state_spec(rows, x.dtype)
        ways = (plan.following, plan.previous) if reverse else (plan.previous, plan.following)
        shared = ()
        if return_state:
            holders = [(rank, len(plan.held(rank))) for rank in range(plan.size) if plan.held(rank)]
            shared = tuple((rank, mixer.state_spec(rows if dense else count, x.dtype)) for rank, count in holders)
        wire = Wire(self.scope.group, type(mixer).__name__, *ways, spec, shared)
        given = state
        if state is not None and not dense:
            given = {key: value[here.start : here.stop] for key, value in state.items()} if here else None
        if wire.source is not None:
            x, received = wire.enter(x, anchor_of(x))
            given = received if dense else self._among_others(mixer, received, given, x, reverse)
        holds = return_state and len(plan.held(plan.rank)) > 0
        mixed = run(x, given, self.scope.packing, wire.target is not None or holds)
        if plan.length == 0:
            # an op may leave inputs without tokens out of the graph, in which earlier exchanges wait for this rank
            mixed = mixed._replace(y=(mixed.y + x).to(mixed.y.dtype))
        if wire.target is None and not shared:
            return mixed._replace(state=None)
        sent = held = None
        if wire.target is not None:
            place = slice(None) if dense else slice(0, 1) if reverse else slice(-1, None)
            sent = select(mixed.state, place, mixer)
        if holds:
            held = select(mixed.state, slice(None) if dense else slice(0, len(plan.held(plan.rank))), mixer)
        y, states = wire.leave(mixed.y, anchor_of(x), sent, held)
        return mixed._replace(y=y, state=join(states) if shared else None)

    def _among_others(
        self, mixer: SequenceMixer, received: State, given: State | None, x: Tensor, reverse: bool
    ) -> State:
        """The received state in its place among those of the other sequences of this rank."""
        packing = self.scope.packing
        count = 0 if packing is None else packing.n_sequences - 1
        if count == 0:
            return received
        if given is None:
            others = mixer.init_state(count, device=x.device, dtype=x.dtype)
        else:
            others = {key: value[:-1] if reverse else value[1:] for key, value in given.items()}
        return join([others, received] if reverse else [received, others])


class ParallelBidirectional(ParallelMixer):
    """Both directions on this rank's tokens: one from the first rank to the last, the other back."""

    def mix(self, plan: Plan, x: Tensor, state: State | None, return_state: bool) -> Mixed:
        """Two chains, one after the other, and what merges them."""
        both = cast("Bidirectional", self.mixer)
        first, second = both.mixer, both.mixer_reverse
        if both.joint and isinstance(first, ConvolutionMixer) and isinstance(second, ConvolutionMixer):
            forward = self._there(first, convolution(first), plan, x)
            back = self._back(second, convolution(second), plan, x)
            return Mixed(first.map(x, forward.y + back.y, first.D + second.D), None, share(None, plan, x))
        forward = self._there(first, ordinary(first), plan, x)
        back = self._back(second, ordinary(second), plan, x)
        losses = [share(one.auxiliary, plan, x) for one in (forward, back)]
        return Mixed(both._merge(forward.y, back.y), None, losses[0] + losses[1])

    def _there(self, mixer: SequenceMixer, run: Run, plan: Plan, x: Tensor) -> Mixed:
        if self.scope.choices.obstacle(mixer, x) is None:
            return self.summed_up(mixer, run if cast("Bidirectional", self.mixer).joint else bare(mixer), plan, x)
        return self.chain(mixer, run, plan, x)

    def _back(self, mixer: SequenceMixer, run: Run, plan: Plan, x: Tensor) -> Mixed:
        packing = self.scope.packing
        if self.scope.choices.obstacle(mixer, x) is None:
            mixed = self.summed_up(
                mixer, run if cast("Bidirectional", self.mixer).joint else bare(mixer), plan, x.flip(1), reverse=True
            )
            return mixed._replace(y=mixed.y.flip(1))
        turn = x.flip(1) if packing is None else x[:, packing.reversal()]
        mixed = self.chain(mixer, run, plan, turn, reverse=True)
        y = mixed.y.flip(1) if packing is None else mixed.y[:, packing.reversal()]
        return mixed._replace(y=y)


class ParallelParts(ParallelMixer):
    """Mixers side by side, of which each exchanges in its own way."""

    def mix(self, plan: Plan, x: Tensor, state: State | None, return_state: bool) -> Mixed:
        """Runs the mixer as it is: its parts are parallel, and their auxiliary losses this rank's shares."""
        return self.mixer.mix(x, state, self.scope.packing, return_state)


class ParallelPositions:
    """Learned positions of this rank's tokens; the state counts those of all ranks."""

    def __init__(self, positions: LearnedPositions, scope: Scope) -> None:
        self.positions, self.scope = positions, scope

    def forward(self, x: Tensor, state: State | None, packing: Packing | None) -> tuple[Tensor, State]:
        """As :meth:`LearnedPositions.forward`, with the state of all sequences."""
        positions, plan = self.positions, self.scope.plan
        if plan is None:  # a step, which every rank takes alike
            return LearnedPositions.forward(positions, x, state, packing)
        rows = x.shape[0] if plan.bounds is None else plan.n_sequences
        before = positions.init_state(rows, x.device)["position"] if state is None else positions._start(state, rows)
        after = before + torch.tensor(plan.extent, device=x.device).diff()
        # on every rank, also where the sequence that is too long does not end
        if rows:
            positions._check(after.amax())
        y, _ = LearnedPositions.forward(positions, x, {"position": seen_before(plan, before)}, packing)
        return y, {"position": after}


class ParallelCall:
    """An entry of a model: makes the plan, and hands this rank's packing in."""

    def __init__(self, model: nn.Module, name: str, scope: Scope) -> None:
        self.model, self.scope = model, scope
        self.method = getattr(type(model), name)
        self.signature = inspect.signature(self.method)

    def call(self, *arguments: Any, **options: Any) -> Any:
        """As the model's own, but for what :func:`parallelize` says."""
        bound = self.signature.bind(self.model, *arguments, **options)
        given = bound.arguments
        refuse_padding(**{name: given.get(name) for name in ("lengths", "attention_mask")})
        x = bound.args[1]
        if not isinstance(x, Tensor) or x.dim() < 2:
            raise TypeError(f"{type(self.model).__name__} takes this rank's tokens as a Tensor (B, T, ...), got {x!r}")
        with self.scope.planned(type(self.model).__name__, x, given.get("cu_seqlens")):
            given["cu_seqlens"] = self.scope.packing
            return self.method(*bound.args, **bound.kwargs)


class Refusal:
    """What a model cannot do while it is parallel."""

    def __init__(self, model: nn.Module) -> None:
        self.name = type(model).__name__

    def prefill(self, *arguments: Any, **options: Any) -> Any:
        """Raises NotImplementedError."""
        raise NotImplementedError(
            f"{self.name}.prefill needs the last token of every prompt, which another rank may hold; call forward with "
            "return_state=True and go on with step, or generate with a model that is not parallel"
        )


def seen_before(plan: Plan, before: Tensor) -> Tensor:
    """How many tokens the sequences of this rank have seen before its own, int64, one at least.

    Args:
        plan: Of the tokens.
        before: int64, what all sequences have seen before the call: one a row of a dense batch, or a packed sequence.
    """
    if plan.bounds is None:
        return before + plan.offset
    here = plan.sequences
    start = before[here.start : here.stop] if here else before.new_zeros(1)
    # the first alone may have begun on another rank
    return start + plan.offset * (torch.arange(len(start), device=before.device) == 0)


def ordinary(mixer: SequenceMixer) -> Run:
    """A mixer's own forward."""

    def run(x: Tensor, state: State | None, packing: Packing | None, return_state: bool) -> Mixed:
        y, after, *losses = type(mixer).forward(
            mixer, x, state, cu_seqlens=packing, return_state=return_state, return_auxiliary=True
        )
        return Mixed(y, after, *losses)

    return run


def bare(mixer: SequenceMixer) -> Run:
    """A mixer's own mixing, without the checks, which know one sort of states."""

    def run(x: Tensor, state: State | None, packing: Packing | None, return_state: bool) -> Mixed:
        return mixer.mix(x, state, packing, return_state)

    return run


def convolution(mixer: ConvolutionMixer) -> Run:
    """A convolution without the skip and the map that follow it."""

    def run(x: Tensor, state: State | None, packing: Packing | None, return_state: bool) -> Mixed:
        return Mixed(*mixer.recur(x, state, packing, return_state))

    return run


def select(state: State | None, rows: slice, mixer: SequenceMixer) -> State:
    """Some sequences of a state that was asked for."""
    if state is None:
        raise RuntimeError(f"{type(mixer).__name__} returned no state although it was asked for one")
    return {key: value[rows] for key, value in state.items()}


def share(auxiliary: Tensor | None, plan: Plan, x: Tensor) -> Tensor:
    """This rank's part of a mean over all tokens, of its mean over its own."""
    if auxiliary is None or plan.length == 0:
        return x.new_zeros((), dtype=accumulator(x.dtype))
    return auxiliary * (plan.length / plan.total)


def scope_of(model: nn.Module) -> Scope:
    """What :func:`parallelize` made for a model or a part of it.

    Raises:
        ValueError: If nothing in the model is parallel.
    """
    for part in model.modules():
        wrapper = getattr(vars(part).get("forward"), "__self__", None)
        if isinstance(wrapper, ParallelMixer):
            return wrapper.scope
    raise ValueError(f"nothing in {type(model).__name__} is parallel; call seqzoo.parallel.parallelize first")


def sum_gradients(model: nn.Module) -> None:
    """Adds up the gradients of all parameters over the ranks, in place; a missing one counts as zero.

    For models whose parameters are whole on every rank and that neither FSDP2 nor DDP reduces over the sequence mesh.
    Call it on every rank, after the last backward pass before the optimiser's step.

    Raises:
        ValueError: If nothing in the model is parallel.
    """
    group = scope_of(model).group
    alike: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            alike.setdefault((parameter.dtype, parameter.device), []).append(parameter)
    for parameters in alike.values():
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        total = torch.cat([gradient.flatten() for gradient in gradients])
        with group.guard(type(model).__name__, "add up the gradients of the parameters"):
            dist.all_reduce(total, group=group.handle)
        for parameter, part in zip(parameters, total.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = part.view_as(parameter).clone()
