"""Generating T tokens by LongConv's steps, which follow FutureFill, beside the dot products over the whole past."""

from __future__ import annotations

import math

import pytest
import torch

from seqzoo import create

WIDTH, BATCH = 64, 1
LENGTHS = tuple(1024 << doubling for doubling in range(6))
# from here on the dot products take minutes
LAST_NAIVE = 8192
medians: dict[str, dict[int, float]] = {}


def steps(length: int, device: torch.device):
    def make():
        mixer = create("long_conv", d_model=WIDTH, kernel_length=length, output="none").to(device)
        tokens = torch.randn(length, BATCH, WIDTH, device=device)

        @torch.inference_mode()
        def generate():
            state = mixer.init_state(BATCH)
            for token in tokens:
                y, state = mixer.step(token, state)
            return y

        return generate

    return make


def dot_products(length: int, device: torch.device):
    """Each output as one product of the inputs so far with the kernel, turned once and for all."""

    def make():
        mixer = create("long_conv", d_model=WIDTH, kernel_length=length, output="none").to(device)
        tokens = torch.randn(length, BATCH, WIDTH, device=device)

        @torch.inference_mode()
        def generate():
            taps = mixer.kernel(length).flip(1).contiguous()[None]
            inputs = torch.zeros(BATCH, WIDTH, length, device=device)
            for t, token in enumerate(tokens):
                inputs[..., t] = token
                y = (inputs[..., : t + 1] * taps[..., length - 1 - t :]).sum(-1) + mixer.D * token
            return y

        return generate

    return make


def named(benchmark, who: str, length: int) -> None:
    """Adds the exponent of T that a line through the medians so far has, on logarithmic scales."""
    found = medians.setdefault(who, {})
    found[length] = benchmark.stats.stats.median
    points = [(math.log2(one), math.log2(median)) for one, median in found.items()]
    if len(points) > 2:
        centre = [sum(values) / len(points) for values in zip(*points, strict=True)]
        across = sum((x - centre[0]) * (y - centre[1]) for x, y in points)
        exponent = across / sum((x - centre[0]) ** 2 for x, _ in points)
        benchmark.extra_info["name"] = f"{who}; T^{exponent:.2f} from {min(found)} on"


@pytest.mark.parametrize("length", LENGTHS)
class TestGeneration:
    def test_seqzoo(self, measure, benchmark, device, length):
        group = f"{length} tokens, d_model {WIDTH}, batch {BATCH}"
        measure(steps(length, device), group=group, name="seqzoo step", role="seqzoo", seconds=3.0)
        named(benchmark, "seqzoo step", length)

    def test_dot_products(self, measure, benchmark, device, length):
        if length > LAST_NAIVE:
            pytest.skip("quadratic")
        group = f"{length} tokens, d_model {WIDTH}, batch {BATCH}"
        measure(dot_products(length, device), group=group, name="dot products", role="peer", seconds=3.0)
        named(benchmark, "dot products", length)
