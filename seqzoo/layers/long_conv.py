"""LongConv: a convolution with a kernel as long as the sequence, which decodes by FutureFill."""

from __future__ import annotations

import itertools
import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqzoo.kernels.checks import accumulator
from seqzoo.kernels.dispatch import uncast
from seqzoo.kernels.long_conv import long_conv
from seqzoo.kernels.long_conv.op import transform_length
from seqzoo.mixer import State, StateSpec, register
from seqzoo.modules import future_fill
from seqzoo.modules.convolution import ConvolutionMixer, Output, convolve_packed
from seqzoo.modules.future_fill import Place
from seqzoo.modules.options import check_count, check_number, check_pair
from seqzoo.packing import Packing

# what is left of a kernel's window where it counts as over, in Hyena's code
TARGET = 1e-2


class Filter(nn.Module):
    """The network of an implicit kernel, from time to its values before the window.

    Computed in float32 (float64 in a mixer of that) whatever the parameters' dtype, under autocast too.
    """

    def __init__(self, d_model: int, width: int, bands: int, frequency: float) -> None:
        super().__init__()
        self.bands, self.frequency = bands, frequency
        self.first, self.second = nn.Linear(1 + 2 * bands, width), nn.Linear(width, width)
        self.last = nn.Linear(width, d_model, bias=False)

    def forward(self, time: Tensor) -> Tensor:
        """``(T,)``, in units of the kernel's length, to ``(D, T)``."""
        angles = 2 * math.pi * time[:, None] * torch.arange(1, self.bands + 1, device=time.device)
        values = torch.cat((time[:, None], angles.cos(), angles.sin()), dim=-1)
        with uncast(time.device):
            for layer in (self.first, self.second):
                values = F.linear(values, layer.weight.to(time.dtype), layer.bias.to(time.dtype))
                values = torch.sin(self.frequency * values)
            return F.linear(values, self.last.weight.to(time.dtype)).t()

    def reset_parameters(self) -> None:
        """PyTorch's initialisation of linear layers."""
        for layer in (self.first, self.second, self.last):
            layer.reset_parameters()


@register(
    "long_conv",
    paper="FutureFill: Fast Generation from Convolutional Sequence Models",
    arxiv="2410.03766",
    year=2024,
)
class LongConv(ConvolutionMixer):
    """A long convolution that has a kernel and no small state.

    With L lags of each channel's kernel, then GELU, a linear map to twice the width and a gated linear unit::

        y_t = sum_{s <= t} k_{t - s} u_s + D u_t

    ``kernel="free"``: the L values are parameters, drawn from a normal distribution under an exponential window, as in
    "Simple Hardware-Efficient Long Convolutions" (https://arxiv.org/abs/2302.06646, sections 3.1 and 3.2), whose
    squash they may pass, ``sign(k) max(|k| - squash, 0)``. ``kernel="implicit"``: Hyena's
    (https://arxiv.org/abs/2302.10866, section 3.3)::

        k_l = window_l W_3 sin(f (W_2 sin(f (W_1 features_l + b_1)) + b_2))
        features_l = [l / L, cos(2 pi n l / L), sin(2 pi n l / L)], n from 1 to filter_bands
        window_l = sqrt(2 r / L) exp(-r l / L), whose squares add up to about 1, r a parameter for each channel

    Whole sequences are convolved by Fourier transforms, which mix all positions: an output moves with later inputs by
    what rounding makes of them, at most ``8 eps max|u| |k|_1``, and what is not finite reaches its whole channel.

    :meth:`step` follows FutureFill (https://arxiv.org/abs/2410.03766, section 3): after i tokens the last ``2^m`` of
    them are convolved into the next ``2^m`` outputs, ``2^m`` the greatest power of two that divides i, so that T tokens
    take O(T log^2 T) operations. Powers below ``chunk_size`` are replaced by a direct sum over the inputs of the chunk
    of ``chunk_size`` tokens that is being written. The schedule is read on the host, which waits for a GPU at every
    token; compiled, or captured in a CUDA graph, a step does the work of the greatest block and does not wait.

    State: ``{"inputs": (B, L, d_model), "cache": (B, L, d_model), "length": (B,)}``. The inputs so far are of their own
    dtype, and zero from ``length`` on. The cache is float32 (float64 for float64 inputs): what the inputs contribute
    to outputs to come, as far as the schedule has gone, and zero where the output has been made. ``length`` is int64
    and may differ from row to row.

    Without gradients a step writes into the tensors of the state that it is given, which is consumed: to continue a
    state several times, ``seqzoo.fork`` it first. With gradients it copies them.

    Args:
        d_model: Width of inputs and outputs.
        kernel_length: L, the tokens of the longest sequence, those generated among them.
        kernel: ``"free"`` or ``"implicit"``.
        output: ``"glu"``, or ``"none"`` for the convolution and its skip alone.
        chunk_size: Below how many tokens a step sums directly, a power of two.
        decay: The shares of L at which the windows of the first and of the last channel fall to 0.01 at the beginning
            of training, those between in equal ratios. Hyena's are 0.3 and 1.5, which leave the nearest tokens, the
            first few of 1024 lags, a small part of every kernel.
        squash: How far the values of a free kernel are moved towards zero.
        filter_width: Width of the network that makes an implicit kernel.
        filter_bands: Its frequencies.
        filter_frequency: f, in front of each sine.

    Raises:
        ValueError: If an option is out of range or has no effect; when called, if a sequence is longer than L.
    """

    fp32_parameters = ("log_rate",)
    # long enough for the suite
    variants = (
        {"kernel_length": 72, "chunk_size": 4},
        {"kernel_length": 75, "chunk_size": 1, "kernel": "implicit", "filter_width": 8, "filter_bands": 3},
        {"kernel_length": 80, "chunk_size": 2, "output": "none", "squash": 0.01},
    )

    def __init__(
        self,
        d_model: int,
        *,
        kernel_length: int = 1024,
        kernel: Literal["free", "implicit"] = "free",
        output: Output = "glu",
        chunk_size: int = 64,
        decay: tuple[float, float] = (0.02, 1.5),
        squash: float = 0.0,
        filter_width: int = 64,
        filter_bands: int = 16,
        filter_frequency: float = 10.0,
    ) -> None:
        super().__init__(d_model, output=output)
        if kernel not in ("free", "implicit"):
            raise ValueError(f"kernel must be free or implicit, got {kernel!r}")
        self.kernel_length = check_count("kernel_length", kernel_length)
        self.chunk_size = check_count("chunk_size", chunk_size)
        if self.chunk_size & (self.chunk_size - 1):
            raise ValueError(f"chunk_size must be a power of two, got {chunk_size}")
        self.decay = check_pair("decay", decay)
        for share in self.decay:
            check_number("decay", share, above=0.0)
        if check_number("squash", squash) < 0:
            raise ValueError(f"squash must not be negative, got {squash!r}")
        if squash > 0 and kernel == "implicit":
            raise ValueError(f"squash moves the values of a free kernel, got {squash!r} for an implicit one")
        self.squash = squash
        for name, value in (("filter_width", filter_width), ("filter_bands", filter_bands)):
            check_count(name, value)
        check_number("filter_frequency", filter_frequency, above=0.0)
        if kernel == "free":
            self.taps = nn.Parameter(torch.empty(d_model, self.kernel_length))
            self.filter = None
        else:
            self.filter = Filter(d_model, filter_width, filter_bands, filter_frequency)
            self.log_rate = nn.Parameter(torch.empty(d_model))
        self.reset_parameters()

    # -- the kernel --

    def kernel(self, length: int) -> Tensor:
        """The first taps, ``(D, length)``, float32 (float64 in a mixer of that).

        Raises:
            ValueError: If ``length`` exceeds ``kernel_length``; when compiled, RuntimeError when it is run.
        """
        self._check_longest(length)
        dtype = accumulator(self.D.dtype)
        if self.filter is None:
            # a slice would tie compiled code to lengths up to L
            taps = self.taps[:, self._lags(length)] if torch.compiler.is_compiling() else self.taps[:, :length]
            return F.softshrink(taps.to(dtype), self.squash) if self.squash else taps.to(dtype)
        time = self._lags(length).to(dtype) / self.kernel_length
        return self.filter(time) * self._window(self.log_rate.to(dtype).exp(), time)

    def _lags(self, length: int) -> Tensor:
        return torch.arange(length, device=self.D.device)

    def _window(self, rates: Tensor, time: Tensor) -> Tensor:
        """``(D, length)``, over times in units of L."""
        return (2 * rates / self.kernel_length).sqrt()[:, None] * torch.exp(-rates[:, None] * time)

    def _check_longest(self, length: int) -> None:
        if torch.compiler.is_compiling():
            self._assert_longest(torch.scalar_tensor(length, dtype=torch.int64, device=self.D.device))
        elif length > self.kernel_length:
            raise ValueError(
                f"a sequence has {length} tokens (those of the state included), LongConv has kernel_length="
                f"{self.kernel_length}; build it with a greater kernel_length, or split the sequence"
            )

    def _assert_longest(self, lengths: Tensor) -> None:
        torch.ops.aten._assert_async.msg(
            (lengths <= self.kernel_length).all(),
            f"a sequence is longer than LongConv's kernel_length={self.kernel_length}; build it with a greater one",
        )

    # -- sequences --

    def recur(
        self, u: Tensor, state: State | None, packing: Packing | None, return_state: bool
    ) -> tuple[Tensor, State | None]:
        """Convolves packed sequences, or what continues a state; the state is not consumed."""
        if state is None and not return_state:
            return self._convolve(u, packing), None
        rows = u.shape[0] if packing is None else packing.n_sequences
        given = self.init_state(rows, device=u.device, dtype=u.dtype) if state is None else state
        before, after, spans = self._spans(u, given, packing)
        # new tokens, where they lie in the buffers
        index = self._places(before, u, packing)
        inputs = given["inputs"].index_put(index, u if packing is None else u[0])
        cache = given["cache"].clone()
        longest = self.kernel_length if spans is None else max((end for _, end in spans), default=0)
        kernel = self.kernel(min(self.kernel_length, 2 * longest))
        chunk = self.chunk_size
        levels = future_fill.all_levels(chunk, self.kernel_length)
        if state is None:
            y = self._convolve(u, packing, kernel)
        else:
            opened = levels if spans is None else future_fill.open_levels(spans, chunk)
            future_fill.open_blocks(inputs, cache, before, after, kernel, chunk, opened)
            y = self._continue(inputs, cache, before, spans, kernel, u, packing).to(u.dtype)
        if not return_state:
            return y, None
        cache.index_put_(index, cache.new_zeros(()))
        closed = levels if spans is None else future_fill.closed_levels(spans, chunk, self.kernel_length)
        future_fill.closed_blocks(inputs, cache, before, after, kernel, closed)
        lengths = packing.lengths if packing is not None else u.shape[1]
        return y, {"inputs": inputs, "cache": cache, "length": given["length"] + lengths}

    def _spans(
        self, u: Tensor, state: State, packing: Packing | None
    ) -> tuple[Place, Place, list[tuple[int, int]] | None]:
        """How many tokens each row has before and after these, and both as the host knows them, if it may."""
        if _unreadable(u):
            before = state["length"]
            after = before + (u.shape[1] if packing is None else packing.lengths)
            self._assert_longest(after)
            return before, after, None
        starts = state["length"].tolist()
        sizes = [u.shape[1]] * len(starts) if packing is None else [b - a for a, b in _pairs(packing)]
        spans = [(start, start + size) for start, size in zip(starts, sizes, strict=True)]
        self._check_longest(max((end for _, end in spans), default=0))
        if len(set(spans)) <= 1:
            before, after = spans[0] if spans else (0, u.shape[1])
        else:
            before, after = (torch.tensor(ends, device=u.device) for ends in zip(*spans, strict=True))
        return before, after, spans

    def _places(self, before: Place, u: Tensor, packing: Packing | None) -> tuple[Tensor, Tensor]:
        """Rows and positions of the tokens in a buffer, ``(B, T)``, or ``(T,)`` of packed ones."""
        if packing is not None:
            rows = packing.sequence_index
            return rows, packing.positions + (before if isinstance(before, int) else before[rows])
        at = future_fill.positions(before, u.shape[1], u)
        return torch.arange(u.shape[0], device=u.device)[:, None], at.expand(u.shape[0], -1)

    def _continue(
        self,
        inputs: Tensor,
        cache: Tensor,
        before: Place,
        spans: list[tuple[int, int]] | None,
        kernel: Tensor,
        u: Tensor,
        packing: Packing | None,
    ) -> Tensor:
        """The outputs of the new tokens: what the cache has, and the inputs from the running chunk on."""
        chunk = self.chunk_size
        start = before - before % chunk
        if spans is None:
            size: Any = torch.sym_min(u.shape[1] + chunk - 1, self.kernel_length)
        else:
            size = max((end - begin + begin % chunk for begin, end in spans), default=0)
        recent = long_conv(future_fill.read(inputs, start, size).to(cache.dtype), kernel)
        rows, at = self._places(before, u, packing)
        y = cache[rows, at] + recent[rows, self._places(before - start, u, packing)[1]]
        return y if packing is None else y[None]

    def _convolve(self, u: Tensor, packing: Packing | None, kernel: Tensor | None = None) -> Tensor:
        """The convolution of whole sequences, packed ones of unknown lengths in rows as long as the longest may be."""
        if packing is None:
            return long_conv(u, self.kernel(u.shape[1]) if kernel is None else kernel)
        if u.shape[1] == 0:
            return u
        if not _unreadable(u):
            return convolve_packed(
                u, torch.tensor(packing.bounds()), self.kernel if kernel is None else lambda _: kernel
            )
        self._assert_longest(packing.lengths)
        width: Any = torch.sym_min(u.shape[1], self.kernel_length)
        place = width * packing.sequence_index + packing.positions
        rows = u.new_zeros(packing.n_sequences * width, u.shape[2]).index_put((place,), u[0])
        y = long_conv(
            rows.view(packing.n_sequences, width, u.shape[2]),
            self.kernel(self.kernel_length) if kernel is None else kernel,
        )
        return y.flatten(0, 1)[place][None]

    # -- tokens --

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Decodes one token by the schedule; without gradients the state is consumed.

        Raises:
            ValueError: If a row has ``kernel_length`` tokens already; when compiled, RuntimeError.
        """
        self._check_input(x, 2, "(B, D)")
        self._check_state(state, x.shape[0], x)
        inputs, cache, length = state["inputs"], state["cache"], state["length"]
        counts = None if _unreadable(x) else [count + 1 for count in length.tolist()]
        if counts is None:
            self._assert_longest(length + 1)
        else:
            self._check_longest(max(counts, default=0))
        if counts is None or not self._consumes(x, state):
            inputs, cache, length = inputs.clone(), cache.clone(), length.clone()
        place = counts[0] - 1 if counts is not None and len(set(counts)) == 1 else length
        rows = slice(None) if isinstance(place, int) else torch.arange(x.shape[0], device=x.device)
        chunk = self.chunk_size
        needed = self.kernel_length if counts is None else future_fill.due_length(counts, chunk)
        kernel = self.kernel(min(needed, self.kernel_length))
        inputs[rows, place] = x
        y = cache[rows, place] + future_fill.present(inputs, place, kernel, chunk)
        cache[rows, place] = 0
        length += 1
        if counts is None:
            future_fill.refill_anywhere(inputs, cache, length, kernel, chunk)
        else:
            future_fill.refill(inputs, cache, counts, kernel, chunk)
        return self.map(x, y.to(x.dtype)), {"inputs": inputs, "cache": cache, "length": length}

    def _consumes(self, x: Tensor, state: State) -> bool:
        if not torch.is_inference_mode_enabled() and any(value.is_inference() for value in state.values()):
            return False  # which PyTorch would refuse to write to
        if not torch.is_grad_enabled():
            return True
        return not any(source.requires_grad for source in (x, *state.values(), *self.parameters()))

    def state_spec(self, batch_size: int, dtype: torch.dtype) -> StateSpec:
        """Inputs, cache and number of tokens."""
        shape = (batch_size, self.kernel_length, self.d_model)
        return {
            "inputs": (shape, dtype),
            "cache": (shape, accumulator(dtype)),
            "length": ((batch_size,), torch.int64),
        }

    def flops(self, length: int) -> int:
        """Three transforms a channel, the linear maps, and the network that makes the kernel."""
        n = transform_length(2 * length)
        total = int(3 * 2.5 * n * math.log2(n)) * self.d_model
        maps = [] if self.filter is None else [self.filter.first, self.filter.second, self.filter.last]
        maps += [self.out_proj] if self.output == "glu" else []
        return total + sum(2 * length * one.weight.numel() for one in maps)

    def parameter_options(self) -> dict[str, dict[str, float]]:
        """Neither the values of a kernel nor its rates decay."""
        names = ("taps",) if self.filter is None else ("log_rate",)
        return super().parameter_options() | {name: {"weight_decay": 0.0} for name in names}

    def reset_parameters(self) -> None:
        """Normal values under the window, or PyTorch's initialisation of the network and the windows' rates."""
        super().reset_parameters()
        first, last = (math.log(math.log(1 / TARGET) / share) for share in self.decay)
        dtype = accumulator(self.D.dtype)
        log_rates = torch.linspace(first, last, self.d_model, device=self.D.device, dtype=dtype)
        with torch.no_grad():
            if self.filter is None:
                time = self._lags(self.kernel_length).to(dtype) / self.kernel_length
                nn.init.normal_(self.taps)
                self.taps.mul_(self._window(log_rates.exp(), time))
            else:
                self.log_rate.copy_(log_rates)
                self.filter.reset_parameters()


def _unreadable(x: Tensor) -> bool:
    """Whether the host must not look at values on x's device: what it sees now would be there for good."""
    return torch.compiler.is_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing())


def _pairs(packing: Packing) -> list[tuple[int, int]]:
    return list(itertools.pairwise(packing.bounds()))
