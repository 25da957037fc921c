"""The interface that every mixer keeps, and the registry through which a mixer is found.

One contract, *the whole sequence = its pieces with the state handed on*, carries everything else: from it this base
class gives each mixer decoding, truncated backpropagation and packing.
"""

from __future__ import annotations

import difflib
import inspect
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from seqzoo.kernels.checks import HALF, REAL, accumulator
from seqzoo.modules.options import check_count
from seqzoo.packing import Packing, check_form

State = dict[str, Tensor]
# shape (batch first; None where any length will do) and dtype of each tensor of a state
StateSpec = dict[str, tuple[tuple[int | None, ...], torch.dtype]]

GUARANTEES = {
    "G1": "modes agree",
    "G2": "state in and out, with gradients",
    "G3": "packing",
    "G4": "sequence parallel",
    "G5": "CPU and GPU",
    "G6": "compiles",
    "G7": "deterministic",
    "G8": "causal",
}
# what a mixer may be unable to do by its mathematics, and the guarantee that falls with it
LIMITS = {"step": "G1", "state": "G2", "packing": "G3", "causal": "G8"}


class LimitError(NotImplementedError):
    """Raised when a mixer is asked for what its mathematics rules out."""


class Mixed(NamedTuple):
    """What :meth:`SequenceMixer.mix` returns: the outputs, the state after the last token, an auxiliary loss."""

    y: Tensor
    state: State | None = None
    auxiliary: Tensor | None = None


class SequenceMixer(nn.Module):
    """Maps a sequence ``(B, T, D)`` to a sequence ``(B, T, D)``.

    A mixer defines :meth:`mix` and :meth:`state_spec`, and :meth:`reset_parameters`, with which its constructor ends; a
    linear layer that comes last is called ``out_proj``, so that deep models can scale it. The rest follows:
    :meth:`forward` checks its arguments and runs packed sequences, natively where ``packs`` says so and else one after
    the other; :meth:`step` decodes.

    Attributes:
        limits: What this mixer cannot do by its mathematics (a key of ``LIMITS``), with the reason.
        packs: Whether :meth:`mix` takes a Packing.
        discontinuous: Whether hard decisions make the outputs jump, so that fp32 comparisons need a margin.
        fp32_parameters: Names of parameters that stay float32 under ``.to(bfloat16)`` and ``.half()``.
        variants: Sets of options under which the contract suite runs this mixer, small enough for a loop over time.
    """

    limits: ClassVar[dict[str, str]] = {}
    packs: ClassVar[bool] = False
    discontinuous: ClassVar[bool] = False
    fp32_parameters: ClassVar[tuple[str, ...]] = ()
    variants: ClassVar[tuple[dict[str, Any], ...]] = ({},)

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.d_model = check_count("d_model", d_model)

    # -- what a mixer defines --

    def mix(self, x: Tensor, state: State | None, packing: Packing | None, return_state: bool) -> Mixed:
        """Runs the mixer on checked arguments.

        Args:
            x: ``(B, T, D)``.
            state: The state before the first token, or None for the initial one; packed, one row a sequence.
            packing: None unless ``packs``.
            return_state: Whether the state is wanted; a mixer that has it for nothing may return it anyway.
        """
        raise NotImplementedError(f"{type(self).__name__} must define mix()")

    def state_spec(self, batch_size: int, dtype: torch.dtype) -> StateSpec:
        """Shape and dtype of each tensor of the state, for ``batch_size`` sequences of inputs of ``dtype``."""
        raise NotImplementedError(f"{type(self).__name__} must define state_spec()")

    def reset_parameters(self) -> None:
        """Initialises every parameter and buffer of this mixer, so that meta -> ``to_empty`` -> this works."""
        raise NotImplementedError(f"{type(self).__name__} must define reset_parameters()")

    def parameter_options(self) -> dict[str, dict[str, float]]:
        """Optimiser options by parameter name, ``{"A_log": {"weight_decay": 0.0, "lr_scale": 0.1}}``."""
        return {}

    # -- what follows --

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        *,
        cu_seqlens: Tensor | Packing | None = None,
        return_state: bool = False,
        return_auxiliary: bool = False,
    ) -> tuple[Tensor, State | None] | tuple[Tensor, State | None, Tensor]:
        """Maps ``(B, T, D)`` to ``(B, T, D)``.

        Args:
            x: ``(B, T, D)``, of the parameters' dtype and device.
            state: The state before the first token, as :meth:`init_state` or an earlier call made it; zero when
                omitted. With ``cu_seqlens`` one row a sequence.
            cu_seqlens: Boundaries of packed sequences, int32 ``(S + 1,)`` from 0 to T, or a Packing; B is then 1.
            return_state: Whether to return the state after the last token.
            return_auxiliary: Whether to return the auxiliary loss too, a scalar, zero where the mixer has none.

        Returns:
            ``(y, state or None)``, with ``return_auxiliary`` ``(y, state or None, loss)``.

        Raises:
            TypeError: If a dtype is wrong.
            ValueError: If shapes, devices, boundaries or the state do not fit.
            LimitError: If the mixer's mathematics rules out what is asked for.
        """
        self._check_input(x, 3, "(B, T, D)")
        packing = None
        if cu_seqlens is not None:
            self._refuse("packing")
            bare = cu_seqlens.cu_seqlens if isinstance(cu_seqlens, Packing) else cu_seqlens
            check_form(bare, x.shape[0], x.device)
            packing = Packing.from_cu_seqlens(cu_seqlens, x.shape[1])
        if state is not None or return_state:
            self._refuse("state")
        if state is not None:
            self._check_state(state, x.shape[0] if packing is None else packing.n_sequences, x)
        if packing is None or self.packs:
            mixed = self.mix(x, state, packing, return_state)
        else:
            mixed = self._mix_one_by_one(x, state, packing, return_state)
        result = (mixed.y, mixed.state if return_state else None)
        if not return_auxiliary:
            return result
        auxiliary = mixed.auxiliary
        return *result, x.new_zeros((), dtype=accumulator(x.dtype)) if auxiliary is None else auxiliary

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Decodes one token: ``(B, D)`` and a state to ``(B, D)`` and the next state."""
        self._refuse("step")
        self._check_input(x, 2, "(B, D)")
        self._check_state(state, x.shape[0], x)
        mixed = self.mix(x[:, None], state, None, True)
        if mixed.state is None:
            raise RuntimeError(f"{type(self).__name__}.mix returned no state although it was asked for one")
        return mixed.y[:, 0], mixed.state

    def init_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """The state before the first token.

        Args:
            batch_size: Sequences.
            device: Where; the parameters' device when omitted.
            dtype: Dtype of the inputs (not of the state, whose accumulators are at least float32); the parameters' when
                omitted.
        """
        self._refuse("state")
        weight = self._weight()
        if device is None:
            device = weight.device if weight is not None else "cpu"
        if dtype is None:
            dtype = weight.dtype if weight is not None else torch.get_default_dtype()
        spec = self.state_spec(batch_size, dtype)
        return {
            key: torch.zeros([size or 0 for size in shape], dtype=kind, device=device)
            for key, (shape, kind) in spec.items()
        }

    def state_size(self, length: int) -> int:
        """Numbers that a sequence carries after ``length`` tokens."""
        total = 0
        for shape, _ in self.state_spec(1, torch.float32).values():
            size = 1
            for extent in shape:
                size *= length if extent is None else extent
            total += size
        return total

    def flops(self, length: int) -> int:
        """Floating-point operations of a forward pass over ``length`` tokens: 2 a matrix weight and token."""
        return 2 * length * sum(p.numel() for p in self.parameters() if p.dim() >= 2)

    def _mix_one_by_one(self, x: Tensor, state: State | None, packing: Packing, return_state: bool) -> Mixed:
        if torch.compiler.is_compiling():
            raise NotImplementedError(
                f"{type(self).__name__} runs packed sequences one by one, by lengths that a compiled graph does not "
                "know; give it a mix() that takes a Packing and set packs = True, or call it uncompiled"
            )
        outputs, states, losses = [], [], []
        bounds = packing.bounds()
        for index, (start, end) in enumerate(itertools.pairwise(bounds)):
            given = None if state is None else {key: value[index : index + 1] for key, value in state.items()}
            if end > start:
                mixed = self.mix(x[:, start:end], given, None, return_state)
                outputs.append(mixed.y)
                given = mixed.state
                if mixed.auxiliary is not None:
                    losses.append(mixed.auxiliary * (end - start))
            if return_state:
                states.append(self.init_state(1, device=x.device, dtype=x.dtype) if given is None else given)
        merged = join(states) if states else None
        auxiliary = torch.stack(losses).sum() / x.shape[1] if losses else None
        return Mixed(torch.cat(outputs, dim=1) if outputs else x, merged, auxiliary)

    def _refuse(self, ability: str) -> None:
        if ability in self.limits:
            raise LimitError(f"{type(self).__name__} has no {ability}: {self.limits[ability]}")

    def _weight(self) -> Tensor | None:
        """The parameter that tells device and dtype: the first that is not kept in float32, if there is one."""
        # every token that is decoded asks: no list of all parameters first
        found = _first_parameter(self, set())
        return next(self.parameters(), None) if found is None else found

    def _check_input(self, x: Tensor, rank: int, letters: str) -> None:
        name = type(self).__name__
        if not isinstance(x, Tensor):
            raise TypeError(f"the input of {name} must be a Tensor, got {type(x).__name__}")
        if x.dim() != rank or x.shape[-1] != self.d_model:
            raise ValueError(
                f"the input of {name} must have shape {letters} with D = {self.d_model}, got {tuple(x.shape)}"
            )
        weight = self._weight()
        if weight is None:
            return
        if x.device != weight.device:
            raise ValueError(f"the input is on {x.device}, {name} on {weight.device}; move one of them")
        # the parameters of a mixer that has no others stay float32 beside narrower inputs
        only_fp32 = any(weight is parameter for parameter in self.wide_parameters().values())
        narrower = only_fp32 and x.dtype in HALF and weight.dtype == torch.float32
        if x.dtype != weight.dtype and not narrower and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"the input is {x.dtype}, the parameters of {name} are {weight.dtype}; convert one of them")
        if x.dtype not in REAL:
            raise TypeError(f"the input of {name} must be one of {', '.join(map(str, REAL))}, got {x.dtype}")

    def _check_state(self, state: State, batch_size: int, x: Tensor) -> None:
        name = type(self).__name__
        if not isinstance(state, dict):
            raise TypeError(f"a state of {name} is a dict of Tensors, got {type(state).__name__}")
        spec = self.state_spec(batch_size, x.dtype)
        if state.keys() != spec.keys():
            raise ValueError(f"a state of {name} has the keys {sorted(spec)}, got {sorted(state)}")
        for key, (shape, dtype) in spec.items():
            value = state[key]
            fits = len(value.shape) == len(shape) and all(
                want is None or have == want for have, want in zip(value.shape, shape, strict=True)
            )
            if not fits:
                raise ValueError(
                    f"state[{key!r}] of {name} must have shape {shape} for {batch_size} sequences, got "
                    f"{tuple(value.shape)}"
                )
            if value.dtype != dtype:
                raise TypeError(f"state[{key!r}] of {name} must be {dtype} for inputs of {x.dtype}, got {value.dtype}")
            if value.device != x.device:
                raise ValueError(f"state[{key!r}] is on {value.device}, the input on {x.device}; move one of them")

    def wide_parameters(self) -> dict[str, Tensor]:
        """The ``fp32_parameters`` by name, without those that something else stands for, as in a pruned layer.

        Plain tensors where ``torch.func.functional_call`` put them.
        """
        found = {}
        for name in self.fp32_parameters:
            *path, leaf = name.split(".")
            owner: nn.Module | None = self
            for part in path:
                owner = None if owner is None else owner._modules.get(part)
            parameter = None if owner is None else owner._parameters.get(leaf)
            if parameter is not None:
                found[name] = parameter
        return found

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        # what was made under a narrow default dtype
        if isinstance(value, (nn.Parameter, nn.Module)):
            self._widen()

    def _widen(self) -> None:
        for parameter in self.wide_parameters().values():
            if parameter.dtype in HALF:
                parameter.data = parameter.data.float()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SequenceMixer:
        kept = {name: parameter.data for name, parameter in self.wide_parameters().items()}
        super()._apply(fn, recurse)
        for name, parameter in self.wide_parameters().items():
            before = kept[name]
            if parameter.dtype in HALF:
                parameter.data = before.to(parameter.device, torch.float32)
                if parameter.grad is not None:
                    parameter.grad = parameter.grad.float()
        return self

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        super()._load_from_state_dict(*arguments, **options)
        # assign=True takes the stored tensors as they are
        self._widen()


def _first_parameter(module: nn.Module, kept: set[int]) -> Tensor | None:
    """The first parameter that is none of ``kept``, to which the mixers on the way add theirs."""
    if isinstance(module, SequenceMixer):
        kept |= {id(parameter) for parameter in module.wide_parameters().values()}
    for parameter in module._parameters.values():
        if parameter is not None and id(parameter) not in kept:
            return parameter
    for child in module._modules.values():
        found = None if child is None else _first_parameter(child, kept)
        if found is not None:
            return found
    return None


def fork(state: State | list[State] | tuple[State, ...], n: int) -> Any:
    """Continues every sequence of a state ``n`` times: row i becomes rows ``i * n`` to ``i * n + n - 1``, copied.

    Takes a mixer's state or a model's list of them.
    """
    if n < 1:
        raise ValueError(f"a state is forked into at least 1, got {n}")
    if isinstance(state, list | tuple):
        return [fork(one, n) for one in state]
    return {key: value.repeat_interleave(n, dim=0) for key, value in state.items()}


def join(states: Sequence[State]) -> State:
    """The states of several sequences as one, a row each: what ``{key: value[i : i + 1]}`` takes apart.

    A cache shorter than another is filled up with zeros, as caches are behind their tokens.
    """
    joined = {}
    for key in states[0]:
        values = [state[key] for state in states]
        sizes = [max(extents) for extents in zip(*(value.shape[1:] for value in values), strict=True)]
        joined[key] = torch.cat([_filled(value, sizes) for value in values])
    return joined


def _filled(value: Tensor, sizes: list[int]) -> Tensor:
    missing = [size - have for size, have in zip(sizes, value.shape[1:], strict=True)]
    if not any(missing):
        return value
    return torch.nn.functional.pad(value, [end for count in reversed(missing) for end in (0, count)])


@dataclass(frozen=True)
class Registration:
    """A registered mixer: its name, its class, and the paper that it comes from."""

    name: str
    mixer: type[SequenceMixer]
    paper: str
    arxiv: str
    year: int

    @property
    def keeps(self) -> tuple[str, ...]:
        """The guarantees that it keeps; the others are ruled out by ``mixer.limits``."""
        lost = {LIMITS[ability] for ability in self.mixer.limits}
        return tuple(name for name in GUARANTEES if name not in lost)


_registry: dict[str, Registration] = {}
_Mixer = TypeVar("_Mixer", bound=type[SequenceMixer])


def register(name: str, *, paper: str, arxiv: str, year: int) -> Callable[[_Mixer], _Mixer]:
    """Class decorator under which a mixer enters the zoo, and with it every test, table and command.

    Args:
        name: Lower case, as the field writes it.
        paper: Title.
        arxiv: Identifier on arXiv, ``"2410.01201"``; empty when it has none.
        year: Of first publication.
    """

    def enter(mixer: _Mixer) -> _Mixer:
        if name in _registry:
            raise ValueError(f"the name {name!r} is taken by {_registry[name].mixer.__qualname__}")
        unknown = set(mixer.limits) - set(LIMITS)
        if unknown:
            raise ValueError(f"{mixer.__qualname__}.limits names {sorted(unknown)}; known are {sorted(LIMITS)}")
        _registry[name] = Registration(name, mixer, paper, arxiv, year)
        return mixer

    return enter


def list_mixers() -> list[str]:
    """Names of all registered mixers, sorted."""
    return sorted(_registry)


def registration(name: str) -> Registration:
    """The entry of a registered mixer.

    Raises:
        ValueError: If there is none of that name; the message gives the nearest.
    """
    if name not in _registry:
        raise ValueError(f"there is no mixer {name!r}; {nearest(name, _registry)}")
    return _registry[name]


def create(name: str, **options: Any) -> SequenceMixer:
    """Builds a mixer by name: ``create("min_gru", d_model=256)``.

    Raises:
        ValueError: If there is no mixer of that name.
        TypeError: If it has no such option.
    """
    mixer = registration(name).mixer
    known = inspect.signature(mixer).parameters
    for option in options:
        if option not in known:
            raise TypeError(f"{name} has no option {option!r}; {nearest(option, known)}")
    return mixer(**options)


def nearest(name: str, known: Iterable[str]) -> str:
    """Words for an error message: the names nearest to a mistaken one, or all where none is near."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"known are {', '.join(known)}"
