"""What this rank's tokens do to the state that enters them, for every op whose state is affine in it.

``S_out = A S_in + B``: the pairs (A, B) of neighbours compose to the pair of both, which is all that other ranks need
to know ("LASP-2", https://arxiv.org/abs/2502.07563, section 3, for linear attention). Backward it is
``G_in = A^* G_out + C``, with C the gradient of ``S_in`` through this rank's outputs alone. Nothing here is
differentiated, and nothing communicates: gradients come from the op itself, which runs with the true state.

A, the *transition*, is an integer where it follows from how many tokens there are, which all ranks know, else one
tensor.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from seqzoo.kernels.causal_conv import causal_conv
from seqzoo.kernels.checks import COMPLEX_OF, accumulator
from seqzoo.kernels.delta_rule import delta_rule
from seqzoo.kernels.gated_scan import gated_scan
from seqzoo.kernels.gated_scan.op import CELLS
from seqzoo.kernels.gated_scan.reference import gates
from seqzoo.kernels.linear_attention import linear_attention
from seqzoo.kernels.linear_scan import linear_scan
from seqzoo.kernels.selective_scan import selective_scan
from seqzoo.kernels.selective_scan.reference import coefficients, step_of
from seqzoo.kernels.ssm_kernel.discretise import as_complex, as_real, state_space
from seqzoo.kernels.ssm_scan import ssm_scan
from seqzoo.kernels.ssm_scan.chunked import _Diagonal, _LowRank
from seqzoo.packing import Packing

Transition = int | Tensor
# tokens whose coefficients are in memory at once, where they are made from what is smaller
CHUNK = 64


class Summary(ABC):
    """One call of an op, and what its tokens do to the state.

    All but :meth:`run` take the tokens as those of one dense batch, and expect to be called without gradients.

    Attributes:
        timed: Names of the tensors that have tokens in dimension 1; one of fewer than 2 dimensions has none after all.
        axis: Dimension of a state in whose parts a transition acts independently.
        tensors: The op's tensors by name, without the initial state.
        options: Its other arguments.
    """

    timed: ClassVar[tuple[str, ...]]
    axis: ClassVar[int] = -1

    def __init__(self, tensors: dict[str, Tensor | None], **options: Any) -> None:
        self.tensors, self.options = tensors, options

    def __getitem__(self, name: str) -> Tensor:
        value = self.tensors[name]
        if value is None:
            raise ValueError(f"this call was given no {name}")
        return value

    def bound(self, tensors: list[Tensor | None]) -> Summary:
        """The same call on other tensors, in the order of :attr:`tensors`."""
        return type(self)(dict(zip(self.tensors, tensors, strict=True)), **self.options)

    def part(self, tokens: slice) -> Summary:
        """The same call on some of the tokens, detached."""
        found = {}
        for name, value in self.tensors.items():
            value = None if value is None else value.detach()
            found[name] = value[:, tokens] if value is not None and self._is_timed(name, value) else value
        return type(self)(found, **self.options)

    def _is_timed(self, name: str, value: Tensor) -> bool:
        return name in self.timed and value.dim() > 1

    @property
    def tokens(self) -> Tensor:
        """A tensor that all tokens are in, whose first two dimensions are B and T."""
        return self[self.timed[0]]

    def outputs(self) -> Tensor:
        """A tensor like the op's outputs."""
        return self.tokens

    def turned(self) -> Summary:
        """The same call on the tokens in the opposite order."""
        found = {
            name: value.flip(1) if value is not None and self._is_timed(name, value) else value
            for name, value in self.tensors.items()
        }
        return type(self)(found, **self.options)

    @property
    def rows(self) -> int:
        """B."""
        return self.tokens.shape[0]

    @property
    def length(self) -> int:
        """T."""
        return self.tokens.shape[1]

    # -- what an op defines --

    @abstractmethod
    def run(self, given: Tensor | None, packing: Packing | None) -> tuple[Tensor, Tensor]:
        """The op: outputs and final states, from the initial states."""

    @abstractmethod
    def shape(self) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape of one sequence's state, and its dtype."""

    @abstractmethod
    def gradient(self, grad_o: Tensor, given: Tensor | None) -> Tensor:
        """C, of gradients of the outputs and the initial states of the rows."""

    @abstractmethod
    def apply(self, transition: Transition, state: Tensor) -> Tensor:
        """``A S``."""

    @abstractmethod
    def adjoint(self, transition: Transition, gradient: Tensor) -> Tensor:
        """``A^* G``, by PyTorch's convention for complex numbers."""

    def transition(self) -> Transition:
        """A of all tokens."""
        return self.length

    def transition_form(self) -> tuple[tuple[int, ...], torch.dtype] | None:
        """Shape and dtype of A for one sequence; None where it is an integer."""
        return None

    # -- what follows --

    def state(self, given: Tensor | None) -> Tensor:
        """``A S_in + B``, zero for an ``S_in`` that is not given."""
        return self.run(given, None)[1]

    def pair(self) -> tuple[Tensor, Transition]:
        """B and A of all tokens."""
        return self.state(None), self.transition()

    def identity(self) -> Transition:
        """A of no tokens."""
        form = self.transition_form()
        if form is None:
            return 0
        shape, dtype = form
        return self.tokens.new_ones((self.rows, *shape), dtype=dtype)

    def compose(self, later: Transition, earlier: Transition) -> Transition:
        """A of the earlier tokens and those behind them."""
        if isinstance(later, int):
            return later + earlier
        return later * earlier

    def cut(self, transition: Transition, place: slice) -> Transition:
        """What A does to a part of the state, along :attr:`axis`."""
        return transition

    def narrowed(self, place: slice) -> Summary:
        """The call by whose :meth:`apply` the transitions of :meth:`cut` act."""
        return self


class _Elementwise(Summary):
    """A scan of numbers; a transition is the product of their factors."""

    @abstractmethod
    def factors(self) -> Tensor:
        """``(B, T, D)``, or ``(D,)`` where they do not depend on time."""

    def transition(self) -> Transition:
        factors = self.factors()
        return self.length if factors.dim() == 1 else factors.prod(1)

    def _power(self, count: int) -> Tensor:
        # by squaring: a complex power by logarithms has none at zero
        base = self.factors()
        found = torch.ones_like(base)
        while count:
            if count & 1:
                found = found * base
            base, count = base * base, count >> 1
        return found

    def apply(self, transition: Transition, state: Tensor) -> Tensor:
        return (self._power(transition) if isinstance(transition, int) else transition) * state

    def adjoint(self, transition: Transition, gradient: Tensor) -> Tensor:
        return (self._power(transition) if isinstance(transition, int) else transition).conj() * gradient

    def gradient(self, grad_o: Tensor, given: Tensor | None) -> Tensor:
        factors = self.factors().conj().resolve_conj()
        return linear_scan(factors, factors * grad_o.to(factors.dtype), reverse=True)[1]

    def cut(self, transition: Transition, place: slice) -> Transition:
        return transition if isinstance(transition, int) else transition[..., place]


class LinearScan(_Elementwise):
    """Of :func:`seqzoo.ops.linear_scan`: ``a``, ``b``. A factor without time sends no transition."""

    timed = ("b", "a")

    def run(self, given: Tensor | None, packing: Packing | None) -> tuple[Tensor, Tensor]:
        return linear_scan(self["a"], self["b"], given, cu_seqlens=packing)

    def shape(self) -> tuple[tuple[int, ...], torch.dtype]:
        return (self["b"].shape[2],), accumulator(self["b"].dtype)

    def transition_form(self) -> tuple[tuple[int, ...], torch.dtype] | None:
        return None if self["a"].dim() == 1 else self.shape()

    def factors(self) -> Tensor:
        return self["a"].to(accumulator(self["b"].dtype))

    def narrowed(self, place: slice) -> Summary:
        return LinearScan({"a": self["a"][..., place], "b": self["b"][..., place]}) if self["a"].dim() == 1 else self


class GatedScan(_Elementwise):
    """Of :func:`seqzoo.ops.gated_scan`: ``x``; options ``cell`` and ``gate_range``."""

    timed = ("x",)

    def run(self, given: Tensor | None, packing: Packing | None) -> tuple[Tensor, Tensor]:
        return gated_scan(self["x"], given, cu_seqlens=packing, **self.options)

    def shape(self) -> tuple[tuple[int, ...], torch.dtype]:
        return (self["x"].shape[2] // CELLS[self.options["cell"]],), accumulator(self["x"].dtype)

    def transition_form(self) -> tuple[tuple[int, ...], torch.dtype]:
        return self.shape()

    def outputs(self) -> Tensor:
        return self["x"][..., : self.shape()[0][0]]

    def factors(self) -> Tensor:
        return gates(self["x"], self.options["cell"], *self.options["gate_range"])[0]


class SelectiveScan(Summary):
    """Of :func:`seqzoo.ops.selective_scan`: all its tensors; options ``transition`` and ``delta_softplus``.

    A transition is the sum of the steps, from which A makes the factors of all N values; Longhorn's is their product.
    """

    timed = ("u", "delta", "B", "C", "z")
    axis = -2

    def run(self, given: Tensor | None, packing: Packing | None) -> tuple[Tensor, Tensor]:
        names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
        return selective_scan(*(self.tensors[name] for name in names), given, cu_seqlens=packing, **self.options)  # pyright: ignore - the first ones are given

    def shape(self) -> tuple[tuple[int, ...], torch.dtype]:
        return (self["u"].shape[2], self["B"].shape[-1]), accumulator(self["B"].dtype)

    def transition_form(self) -> tuple[tuple[int, ...], torch.dtype]:
        if self.tensors["A"] is None:
            return self.shape()
        return (self["u"].shape[2],), accumulator(self["u"].dtype)

    def state(self, given: Tensor | None) -> Tensor:
        # neither the skip nor the gate reaches the state
        return self.bound([None if n in ("D", "z") else v for n, v in self.tensors.items()]).run(given, None)[1]

    def _steps(self) -> Tensor:
        bias, dtype = self.tensors["delta_bias"], accumulator(self["u"].dtype)
        return step_of(self["delta"], bias, self.options["delta_softplus"], dtype)

    def transition(self) -> Transition:
        if self.tensors["A"] is not None:
            return self._steps().sum(1)
        shape, dtype = self.shape()
        # without inputs the state is what the factors leave of it
        idle = self.bound([torch.zeros_like(v) if n == "u" else v for n, v in self.tensors.items()])  # pyright: ignore - u is given
        return idle.state(self["u"].new_ones((self.rows, *shape), dtype=dtype))

    def identity(self) -> Transition:
        shape, dtype = self.transition_form()
        return self["u"].new_full((self.rows, *shape), 1.0 if self.tensors["A"] is None else 0.0, dtype=dtype)

    def compose(self, later: Transition, earlier: Transition) -> Transition:
        return later * earlier if self.tensors["A"] is None else later + earlier

    def _factors(self, transition: Transition) -> Tensor:
        A = self.tensors["A"]
        if A is None:
            return torch.as_tensor(transition)
        return torch.exp(torch.as_tensor(transition)[..., None] * A.to(self.shape()[1]))

    def apply(self, transition: Transition, state: Tensor) -> Tensor:
        return self._factors(transition) * state

    def adjoint(self, transition: Transition, gradient: Tensor) -> Tensor:
        return self._factors(transition).conj() * gradient

    def gradient(self, grad_o: Tensor, given: Tensor | None) -> Tensor:
        (width, size), dtype = self.shape()
        A, z = self.tensors["A"], self.tensors["z"]
        kind = accumulator(self["u"].dtype)
        steps, grads = self._steps(), grad_o.to(kind)
        if z is not None:
            grads = grads * F.silu(z.to(kind))
        found = grads.new_zeros((self.rows, width, size), dtype=dtype)
        for start in reversed(range(0, self.length, CHUNK)):
            here = slice(start, start + CHUNK)
            B, C = (self._of_channels(self[name][:, here].to(dtype)) for name in ("B", "C"))
            factors, _ = coefficients(
                self["u"][:, here].to(kind), steps[:, here], None if A is None else A.to(dtype), B
            )
            since = factors.cumprod(1)
            found = (since * C).conj().mul(grads[:, here, :, None]).sum(1) + since[:, -1].conj() * found
        return found

    def _of_channels(self, value: Tensor) -> Tensor:
        """B or C ``(B, T, [G,] N)`` as ``(B, T, D, N)``."""
        value = value.unsqueeze(2) if value.dim() == 3 else value
        return value.repeat_interleave(self["u"].shape[2] // value.shape[2], dim=2)

    def cut(self, transition: Transition, place: slice) -> Transition:
        return torch.as_tensor(transition)[:, place]

    def narrowed(self, place: slice) -> Summary:
        A = self.tensors["A"]
        return self.bound([A[place] if n == "A" and A is not None else v for n, v in self.tensors.items()])


class LinearAttention(Summary):
    """Of :func:`seqzoo.ops.linear_attention`: ``q``, ``k``, ``v``, ``log_decay``; option ``scale``.

    A transition is the sum of the log decays. Decays that are fixed send none, nor do there where is no decay.
    """

    timed = ("v", "q", "k", "log_decay")

    def run(self, given: Tensor | None, packing: Packing | None) -> tuple[Tensor, Tensor]:
        return linear_attention(
            self["q"], self["k"], self["v"], self.tensors["log_decay"], given, cu_seqlens=packing, **self.options
        )

    def shape(self) -> tuple[tuple[int, ...], torch.dtype]:
        return (self["v"].shape[2], self["q"].shape[3], self["v"].shape[3]), accumulator(self["q"].dtype)

    def transition_form(self) -> tuple[tuple[int, ...], torch.dtype] | None:
        decay = self.tensors["log_decay"]
        return None if decay is None or decay.dim() == 1 else (tuple(decay.shape[2:]), self.shape()[1])

    def transition(self) -> Transition:
        return self.length if self.transition_form() is None else self["log_decay"].to(self.shape()[1]).sum(1)

    def identity(self) -> Transition:
        form = self.transition_form()
        return 0 if form is None else self["v"].new_zeros((self.rows, *form[0]), dtype=form[1])

    def compose(self, later: Transition, earlier: Transition) -> Transition:
        return later + earlier

    def apply(self, transition: Transition, state: Tensor) -> Tensor:
        if self.tensors["log_decay"] is None:
            return state
        logarithms = self["log_decay"].to(state.dtype) * transition if isinstance(transition, int) else transition
        # beside a state of heads, keys and values
        missing = 1 if logarithms.dim() == 3 else 2
        return logarithms.exp()[(..., *[None] * missing)] * state

    def adjoint(self, transition: Transition, gradient: Tensor) -> Tensor:
        return self.apply(transition, gradient)

    def state(self, given: Tensor | None) -> Tensor:
        dtype = self.shape()[1]
        # what is left of a token's addition behind the last: sums over just the tokens between
        found = self._products(self["k"].to(dtype), self["v"].to(dtype), self._sums(behind=True))
        return found if given is None else found + self.apply(self.transition(), given.to(dtype))

    def gradient(self, grad_o: Tensor, given: Tensor | None) -> Tensor:
        dtype, scale = self.shape()[1], self.options["scale"]
        found = self._products(self["q"].to(dtype), grad_o.to(dtype), self._sums(behind=False))
        return found * (max(self["q"].shape[3], 1) ** -0.5 if scale is None else scale)

    def _sums(self, behind: bool) -> Tensor | None:
        """The log decays of the tokens behind each, or of those up to each: ``(B or 1, T, H)`` or with keys."""
        decay, total = self.tensors["log_decay"], self.length
        if decay is None:
            return None
        decay = decay.to(self.shape()[1])
        if decay.dim() == 1:
            count = torch.arange(total, device=decay.device, dtype=decay.dtype)
            return ((total - 1 - count if behind else count + 1)[:, None] * decay)[None]
        if not behind:
            return decay.cumsum(1)
        return F.pad(decay[:, 1:].flip(1).cumsum(1).flip(1), (*[0, 0] * (decay.dim() - 2), 0, 1))

    def _products(self, keys: Tensor, values: Tensor, sums: Tensor | None) -> Tensor:
        """Of keys ``(B, T, G, K)`` and values ``(B, T, H, V)`` the weighted sum of outer products, ``(B, H, K, V)``."""
        if sums is not None and sums.dim() == 4:
            keys = keys.repeat_interleave(values.shape[2] // keys.shape[2], dim=2) * sums.exp()
        elif sums is not None:
            values = values * sums.exp()[..., None]
        return torch.einsum("btgk,btgmv->bgmkv", keys, values.unflatten(2, (keys.shape[2], -1))).flatten(1, 2)


class DeltaRule(Summary):
    """Of :func:`seqzoo.ops.delta_rule`: its tensors; option ``scale``.

    A transition is the product of ``(I - beta k k^T) diag(decay)``, a matrix for every head: what the op makes of the
    identity where no values are written.
    """

    timed = ("v", "q", "k", "beta", "log_decay")

    def run(self, given: Tensor | None, packing: Packing | None) -> tuple[Tensor, Tensor]:
        q, k, v, beta, decay = (self.tensors[name] for name in ("q", "k", "v", "beta", "log_decay"))
        return delta_rule(q, k, v, beta, decay, given, cu_seqlens=packing, **self.options)  # pyright: ignore - all but the decay are given

    def shape(self) -> tuple[tuple[int, ...], torch.dtype]:
        return (self["v"].shape[2], self["q"].shape[3], self["v"].shape[3]), accumulator(self["q"].dtype)

    def transition_form(self) -> tuple[tuple[int, ...], torch.dtype]:
        (heads, size, _), dtype = self.shape()
        return (heads, size, size), dtype

    def transition(self) -> Transition:
        return self._of_identity(self.tensors)[1]

    def pair(self) -> tuple[Tensor, Transition]:
        v, (_, size, width) = self["v"], self.shape()[0]
        values = F.pad(v, (0, size))
        given = F.pad(torch.as_tensor(self.identity()), (width, 0))
        final = DeltaRule({**self.tensors, "v": values}, **self.options).run(given, None)[1]
        return final[..., :width].contiguous(), final[..., width:].contiguous()

    def _of_identity(self, tensors: dict[str, Tensor | None]) -> tuple[Tensor, Tensor]:
        """``scale * q_t M_t`` and M, of the products M of transitions."""
        batch, total, heads = self["v"].shape[:3]
        size = self["q"].shape[3]
        none = torch.zeros_like(self["v"][..., :1], dtype=tensors["q"].dtype).expand(batch, total, heads, size)  # pyright: ignore - q is given
        return DeltaRule({**tensors, "v": none}, **self.options).run(torch.as_tensor(self.identity()), None)

    def identity(self) -> Transition:
        shape, dtype = self.transition_form()
        return torch.eye(shape[1], dtype=dtype, device=self["v"].device).expand(self.rows, *shape).contiguous()

    def compose(self, later: Transition, earlier: Transition) -> Transition:
        return torch.as_tensor(later) @ earlier

    def apply(self, transition: Transition, state: Tensor) -> Tensor:
        return torch.as_tensor(transition) @ state

    def adjoint(self, transition: Transition, gradient: Tensor) -> Tensor:
        return torch.as_tensor(transition).mT @ gradient

    def gradient(self, grad_o: Tensor, given: Tensor | None) -> Tensor:
        dtype = self.shape()[1]
        # wide, because the outputs of the op are rounded to the dtype of its inputs
        read, _ = self._of_identity({n: None if v is None else v.to(dtype) for n, v in self.tensors.items()})
        return torch.einsum("bthk,bthv->bhkv", read, grad_o.to(dtype))


class CausalConv(Summary):
    """Of :func:`seqzoo.ops.causal_conv`: ``x``, ``weight``, ``bias``; option ``activation``.

    The state, the last inputs, moves up by a place a token: a shard of fewer tokens hands older inputs on.
    """

    timed = ("x",)

    def run(self, given: Tensor | None, packing: Packing | None) -> tuple[Tensor, Tensor]:
        return causal_conv(self["x"], self["weight"], self.tensors["bias"], given, cu_seqlens=packing, **self.options)

    def shape(self) -> tuple[tuple[int, ...], torch.dtype]:
        return (self["weight"].shape[1] - 1, self["x"].shape[2]), self["x"].dtype

    def state(self, given: Tensor | None) -> Tensor:
        shape, dtype = self.shape()
        before = self["x"].new_zeros((self.rows, *shape)) if given is None else given.to(dtype)
        return torch.cat((before, self["x"]), 1)[:, -shape[0] :]

    def apply(self, transition: Transition, state: Tensor) -> Tensor:
        gone = min(int(transition), state.shape[1])
        return F.pad(state[:, gone:], (0, 0, 0, gone))

    def adjoint(self, transition: Transition, gradient: Tensor) -> Tensor:
        gone = min(int(transition), gradient.shape[1])
        return F.pad(gradient[:, : gradient.shape[1] - gone], (0, 0, gone, 0))

    def gradient(self, grad_o: Tensor, given: Tensor | None) -> Tensor:
        reach, kind = self.shape()[0][0], accumulator(self["x"].dtype)
        bias = self.tensors["bias"]
        weight = self["weight"].to(kind)
        first = self["x"][:, :reach].to(kind)
        grads = grad_o[:, :reach].to(kind)
        if self.options["activation"] == "silu":
            before = None if given is None else given.to(kind)
            raw, _ = causal_conv(first, weight, None if bias is None else bias.to(kind), before)
            open_ = torch.sigmoid(raw)
            grads = grads * open_ * (1 + raw * (1 - open_))
        # an input before the first token is read by those up to W - 1 places behind it: the taps from the oldest on
        grads = F.pad(grads, (0, 0, 0, reach - grads.shape[1]))
        return causal_conv(grads, weight.flip(1))[0].to(self["x"].dtype)


class SsmScan(Summary):
    """Of :func:`seqzoo.ops.ssm_scan`: its tensors, those of a low rank as ``p`` and ``q``; its options.

    Powers of the transition are made in float64 from the parameters, and none is sent.
    """

    timed = ("u",)
    axis = -2

    def run(self, given: Tensor | None, packing: Packing | None) -> tuple[Tensor, Tensor]:
        u, poles, b, c, step = (self[name] for name in ("u", "poles", "b", "c", "step"))
        return ssm_scan(u, poles, b, c, step, given, low_rank=self._low_rank(), cu_seqlens=packing, **self.options)

    def _low_rank(self) -> tuple[Tensor, Tensor] | None:
        return None if self.tensors["p"] is None else (self["p"], self["q"])

    def shape(self) -> tuple[tuple[int, ...], torch.dtype]:
        return tuple(self["poles"].shape), COMPLEX_OF[accumulator(self["u"].dtype)]

    @cached_property
    def _steps(self) -> _Diagonal | _LowRank:
        poles, b, c, step = (self[name] for name in ("poles", "b", "c", "step"))
        space = state_space(poles, b, c, step, self._low_rank(), **self.options)
        return (_Diagonal if space.low_rank is None else _LowRank)(space, self.shape()[1])

    def apply(self, transition: Transition, state: Tensor) -> Tensor:
        steps = torch.full((len(state),), int(transition), device=state.device)
        return self._steps.skip(state, steps, int(transition))

    def adjoint(self, transition: Transition, gradient: Tensor) -> Tensor:
        steps, count = self._steps, int(transition)
        if isinstance(steps, _Diagonal):
            return (steps.exponents * count).exp().conj().to(gradient.dtype) * gradient
        real = as_real(gradient).permute(1, 2, 0)
        for doublings in range(count.bit_length()):
            if count >> doublings & 1:
                real = torch.bmm(steps.power(doublings).mT.to(real.dtype), real)
        return as_complex(real.permute(2, 0, 1))

    def gradient(self, grad_o: Tensor, given: Tensor | None) -> Tensor:
        kind = accumulator(self["u"].dtype)
        # a chunk of tokens is a product with the rows that read the state before it
        reads = self._steps.tables(CHUNK)[1].to(kind)
        shape, dtype = self.shape()
        found = torch.zeros((self.rows, *shape), dtype=dtype, device=reads.device)
        for start in reversed(range(0, self.length, CHUNK)):
            grads = grad_o[:, start : start + CHUNK].to(kind)
            own = torch.einsum("dcs,bcd->bds", reads[:, : grads.shape[1]], grads)
            found = as_complex(own) + self.adjoint(grads.shape[1], found)
        return found

    def narrowed(self, place: slice) -> Summary:
        return self.bound([v if v is None or n == "u" else v[place] for n, v in self.tensors.items()])
