"""What layers have in common whose mixing is a convolution with a kernel of their own: S4, S4D, DSS, LongConv."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqzoo.kernels.long_conv import long_conv
from seqzoo.mixer import Mixed, SequenceMixer, State
from seqzoo.packing import Packing

Output = Literal["glu", "none"]


class ConvolutionMixer(SequenceMixer):
    """``y = k * u + D u``, then GELU, a linear map to twice the width, and a gated linear unit.

    A whole sequence without a state is convolved by Fourier transforms, which mix all positions: an output moves with
    later inputs by what rounding makes of them, at most ``8 eps max|u| |k|_1``. So are packed sequences whose lengths
    the host knows, those of similar lengths side by side; in compiled code they recur.

    Args:
        d_model: Width of inputs and outputs.
        output: ``"glu"``, or ``"none"`` for the convolution alone.
    """

    packs = True

    def __init__(self, d_model: int, *, output: Output) -> None:
        super().__init__(d_model)
        if output not in ("glu", "none"):
            raise ValueError(f"output must be glu or none, got {output!r}")
        self.output: Output = output
        self.D = nn.Parameter(torch.empty(d_model))
        if output == "glu":
            self.out_proj = nn.Linear(d_model, 2 * d_model)

    # -- what a layer defines --

    def kernel(self, length: int) -> Tensor:
        """The convolution's first taps, ``(D, length)``."""
        raise NotImplementedError(f"{type(self).__name__} must define kernel()")

    def recur(
        self, u: Tensor, state: State | None, packing: Packing | None, return_state: bool
    ) -> tuple[Tensor, State | None]:
        """The convolution where there is a state, or packed sequences cannot be laid side by side."""
        raise NotImplementedError(f"{type(self).__name__} must define recur()")

    # -- what follows --

    def mix(self, x: Tensor, state: State | None, packing: Packing | None, return_state: bool) -> Mixed:
        """Convolves in the way that fits, adds the skip, maps."""
        if state is None and not return_state and (packing is None or _fits_side_by_side(x, packing)):
            return Mixed(self.map(x, _convolved(x, packing, self.kernel, None)))
        y, after = self.recur(x, state, packing, return_state)
        return Mixed(self.map(x, y), after)

    def mix_both(self, reverse: ConvolutionMixer, x: Tensor, packing: Packing | None) -> Tensor:
        """The convolutions from both ends, this one's and another's from the last token on, under this one's map.

        Where they are not recurrences, one convolution with a kernel of two sides.
        """
        if packing is None or _fits_side_by_side(x, packing):
            y = _convolved(x, packing, self.kernel, reverse.kernel)
        else:
            places = packing.reversal()
            turned, _ = reverse.recur(x[:, places], None, packing, False)
            y = self.recur(x, None, packing, False)[0] + turned[:, places]
        return self.map(x, y, self.D + reverse.D)

    def map(self, x: Tensor, y: Tensor, skip: Tensor | None = None) -> Tensor:
        """What follows the convolution."""
        y = (y + x * (self.D if skip is None else skip)).to(y.dtype)
        return y if self.output == "none" else F.glu(self.out_proj(F.gelu(y)), dim=-1)

    def remove_map(self) -> None:
        """Leaves the convolution and its skip alone, as built with ``output="none"``."""
        if self.output == "glu":
            self.output = "none"
            del self.out_proj

    def parameter_options(self) -> dict[str, dict[str, float]]:
        """The skip does not decay."""
        return {"D": {"weight_decay": 0.0}}

    def reset_parameters(self) -> None:
        """Skips drawn from a normal distribution, PyTorch's initialisation of the map."""
        nn.init.normal_(self.D)
        if self.output == "glu":
            self.out_proj.reset_parameters()


class SideBySide(NamedTuple):
    """Packed sequences as rows of dense batches, each of lengths of which none is twice another's.

    Attributes:
        tokens: Of each batch, int64 ``(rows, longest)``, the token at every place; T where a row has ended.
        places: int64 ``(T,)``, the place of every token among those of all batches, one behind the other.
    """

    tokens: list[Tensor]
    places: Tensor

    @classmethod
    def of(cls, bounds: Tensor, device: torch.device) -> SideBySide:
        """Lays out sequences of boundaries on the host, ``(S + 1,)`` with a token at least."""
        starts, lengths, total = bounds[:-1].to(torch.int64), bounds.diff().to(torch.int64), int(bounds[-1])
        sizes = torch.frexp(lengths.double())[1]
        tokens, places, seen = [], torch.empty(total, dtype=torch.int64), 0
        for size in sizes[lengths > 0].unique().tolist():
            of_size = sizes == size
            begin, length = starts[of_size, None], lengths[of_size, None]
            index = torch.arange(int(length.max()))
            batch = torch.where(index < length, begin + index, total)
            held = batch.flatten() < total
            places[batch.flatten()[held]] = seen + torch.nonzero(held)[:, 0]
            tokens.append(batch.to(device))
            seen += batch.numel()
        return cls(tokens, places.to(device))


def convolve_packed(
    x: Tensor, bounds: Tensor, kernel: Callable[[int], Tensor], reverse: Callable[[int], Tensor] | None = None
) -> Tensor:
    """The convolutions of packed sequences ``(1, T, D)``, those of similar lengths side by side.

    Args:
        x: The sequences, a token at least.
        bounds: Their boundaries, on the host.
        kernel: Makes a kernel of that many taps or more.
        reverse: Likewise, of the tokens that follow.
    """
    layout = SideBySide.of(bounds, x.device)
    longest = max(batch.shape[1] for batch in layout.tokens)
    taps, taps_reverse = kernel(longest), None if reverse is None else reverse(longest)
    padded, parts = F.pad(x[0], (0, 0, 0, 1)), []
    for batch in layout.tokens:
        rows, length = padded.index_select(0, batch.flatten()).unflatten(0, batch.shape), batch.shape[1]
        other = None if taps_reverse is None else taps_reverse[:, :length]
        parts.append(long_conv(rows, taps[:, :length], kernel_reverse=other).flatten(0, 1))
    return torch.cat(parts).index_select(0, layout.places)[None]


def _fits_side_by_side(x: Tensor, packing: Packing) -> bool:
    """Whether the host may know the lengths of packed sequences, and they have tokens."""
    known = packing.host is not None and not torch.compiler.is_compiling() and not x.is_meta
    return known and x.shape[1] > 0


def _convolved(
    x: Tensor, packing: Packing | None, kernel: Callable[[int], Tensor], reverse: Callable[[int], Tensor] | None
) -> Tensor:
    """The convolutions of dense sequences, or of packed ones that fit side by side."""
    if packing is not None:
        return convolve_packed(x, torch.tensor(packing.bounds()), kernel, reverse)
    length = x.shape[1]
    return long_conv(x, kernel(length), kernel_reverse=None if reverse is None else reverse(length))
