"""Rotary position embedding."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from seqzoo.kernels.checks import accumulator
from seqzoo.mixer import nearest
from seqzoo.modules.options import check_number

# what each way of scaling needs beside its factor, with the values that its authors use
SCALINGS: dict[str, dict[str, float]] = {
    "linear": {},
    "ntk": {},
    "llama3": {"original": 8192, "low": 1.0, "high": 4.0},
    "yarn": {"original": 4096, "fast": 32.0, "slow": 1.0},
}


class Rotary(nn.Module):
    """Rotates the two halves of every head by angles that grow with the position, https://arxiv.org/abs/2104.09864.

    Beyond the lengths that a model was trained with, the angles grow more slowly, ``scaling["factor"]`` times where
    wavelengths are long:

    * ``"linear"``, all of them (https://arxiv.org/abs/2306.15595);
    * ``"ntk"``, by a base that makes the longest wavelength ``factor`` times as long and keeps the shortest;
    * ``"llama3"``, those that fit fewer than ``low`` times into the ``original`` length, the ones that fit more than
      ``high`` times not, and those between in proportion (https://arxiv.org/abs/2407.21783);
    * ``"yarn"``, alike from ``slow`` to ``fast`` times, in proportion to their index; queries and keys also grow by
      ``0.1 log(factor) + 1`` (https://arxiv.org/abs/2309.00071, section 3).

    Args:
        size: K, even.
        base: Wavelengths are ``2 pi base ** (2 i / K)``.
        scaling: ``{"kind": "yarn", "factor": 4.0, "original": 4096}``, or None for none.

    Raises:
        TypeError: If the scaling is no mapping.
        ValueError: If K is odd, a number is not positive, or there is no such kind or option of scaling.
    """

    def __init__(self, size: int, *, base: float = 10000.0, scaling: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        if size % 2:
            raise ValueError(f"rotary positions need an even head_dim, got {size}")
        check_number("rotary_base", base, above=1)
        self.size, self.base, self.scaling = size, base, _check_scaling(scaling)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotates ``(B, T, H, K)``; computed in float32 at least.

        Args:
            x: ``(B, T, H, K)``.
            positions: int64 ``(B, T)``, or ``(1, T)`` for all rows.

        Returns:
            ``(B, T, H, K)``, of x's dtype.
        """
        # float64: in float32 the angle of position 100,000 is off by 0.004
        angles = positions[..., None, None].to(torch.float64) * self.rates(x.device)
        dtype = accumulator(x.dtype)
        cosine, sine = angles.cos(), angles.sin()
        if self.scaling:
            cosine, sine = self.growth() * cosine, self.growth() * sine
        cosine, sine = cosine.to(dtype), sine.to(dtype)
        first, second = x.to(dtype).chunk(2, dim=-1)
        turned = torch.addcmul(first * cosine, second, sine, value=-1), torch.addcmul(first * sine, second, cosine)
        return torch.cat(turned, dim=-1).to(x.dtype)

    def rates(self, device: torch.device) -> Tensor:
        """Angles a position, float64 ``(K / 2,)``."""
        half, base, scaling = self.size // 2, self.base, self.scaling
        kind, factor = scaling.get("kind"), scaling.get("factor", 1.0)
        if kind == "ntk" and half > 1:
            base = base * factor ** (half / (half - 1))
        index = torch.arange(half, dtype=torch.float64, device=device)
        rates = base ** (-index / half)
        if kind == "linear":
            return rates / factor
        if kind == "llama3":
            turns = scaling["original"] * rates / (2 * math.pi)
            kept = ((turns - scaling["low"]) / (scaling["high"] - scaling["low"])).clamp(0, 1)
            return rates * (kept + (1 - kept) / factor)
        if kind == "yarn":
            first, last = (self._index_of(scaling[name]) for name in ("fast", "slow"))
            first, last = max(math.floor(first), 0), min(math.ceil(last), self.size - 1)
            slowed = ((index - first) / max(last - first, 1e-3)).clamp(0, 1)
            return rates * (1 - slowed + slowed / factor)
        return rates

    def growth(self) -> float:
        """What a rotation multiplies lengths by."""
        return 0.1 * math.log(self.scaling["factor"]) + 1 if self.scaling.get("kind") == "yarn" else 1.0

    def _index_of(self, turns: float) -> float:
        """The index whose angle makes so many turns over the original length."""
        return self.size * math.log(self.scaling["original"] / (2 * math.pi * turns)) / (2 * math.log(self.base))

    def extra_repr(self) -> str:
        """The options, as ``print`` shows them."""
        return f"{self.size}, base={self.base}" + (f", scaling={self.scaling}" if self.scaling else "")


def _check_scaling(scaling: Mapping[str, Any] | None) -> dict[str, Any]:
    if scaling is None:
        return {}
    if not isinstance(scaling, Mapping):
        raise TypeError(f"rotary_scaling must be a mapping or None, got {scaling!r}")
    options = dict(scaling)
    kind = options.pop("kind", None)
    if kind not in SCALINGS:
        raise ValueError(f"rotary_scaling needs a kind, got {kind!r}; {nearest(str(kind), SCALINGS)}")
    known = {"factor": None, **SCALINGS[kind]}
    for name, value in options.items():
        if name not in known:
            raise ValueError(f"rotary_scaling of kind {kind!r} has no {name!r}; {nearest(name, known)}")
        check_number(f"{name} of rotary_scaling", value, above=0)
    if options.get("factor", 0) < 1:
        raise ValueError(f"rotary_scaling needs a factor of at least 1, got {options.get('factor')!r}")
    found = {**known, **options, "kind": kind}
    low, high = found.get("low", found.get("slow", 0)), found.get("high", found.get("fast", 1))
    if low >= high:
        raise ValueError(f"rotary_scaling of kind {kind!r} needs bounds that ascend, got {low} and {high}")
    return found
