"""S4D and S4 layers: a training step beside the layer's map and transforms, its growth with length, and generation.

The peer is S4D as its authors' shortest code writes it: the powers of all poles at all positions, and an FFT.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from seqzoo import create

WIDTH, STATES = 256, 64


class Parts(nn.Module):
    """What the layer cannot do without: its map, and the transforms of its convolution."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.out_proj = nn.Linear(WIDTH, 2 * WIDTH)
        self.kernel = nn.Parameter(torch.randn(WIDTH, length))

    def forward(self, x):
        total = x.shape[1]
        spectrum = torch.fft.rfft(x.mT, n=2 * total) * torch.fft.rfft(self.kernel, n=2 * total)
        return F.glu(self.out_proj(torch.fft.irfft(spectrum, n=2 * total)[..., :total].mT), dim=-1)


class Minimal(nn.Module):
    """S4D that stores the powers of all poles at all positions."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = create("s4d", d_model=WIDTH, d_state=STATES)

    def forward(self, u):
        layer, total = self.layer, u.shape[1]
        exponents = layer.poles() * layer.log_dt.exp()[:, None]
        c = torch.view_as_complex(layer.C) * torch.view_as_complex(layer.B) * (exponents.exp() - 1) / layer.poles()
        powers = torch.exp(exponents[..., None] * torch.arange(total, device=u.device))
        kernel = 2 * torch.einsum("dn,dnl->dl", c, powers).real
        spectrum = torch.fft.rfft(u.mT, n=2 * total) * torch.fft.rfft(kernel, n=2 * total)
        y = torch.fft.irfft(spectrum, n=2 * total)[..., :total].mT + u * layer.D
        return F.glu(layer.out_proj(F.gelu(y)), dim=-1)


@pytest.mark.parametrize("shape", [(8, 1024, WIDTH), (8, 4096, WIDTH), (2, 16384, WIDTH), (1, 65536, WIDTH)], ids=str)
class TestTraining:
    @pytest.fixture
    def place(self, training_step, shape):
        return {
            "group": f"s4d layer {shape} N={STATES} fp32 forward+backward",
            "limit": training_step(lambda: Parts(shape[1]), shape),
            "seconds": 4.0,
        }

    def test_limit(self, measure, place):
        measure(place["limit"], name="its map and transforms", role="limit", **place)

    @pytest.mark.parametrize("name", ["s4d", "s4"])
    def test_seqzoo(self, measure, place, training_step, shape, name):
        def build():
            return create(name, d_model=WIDTH, d_state=STATES)

        measure(training_step(build, shape), name=f"seqzoo {name}", role="seqzoo" if name == "s4d" else "peer", **place)

    def test_minimal(self, measure, place, training_step, shape):
        if shape[1] > 4096:
            pytest.skip("the powers of all positions take gigabytes")
        measure(training_step(Minimal, shape), name="S4D's shortest code", role="peer", **place)


class TestGeneration:
    """A token after 4096, by the recurrence and by convolving everything again."""

    TOKENS = 4096

    def test_step(self, measure, device):
        def make():
            mixer = create("s4d", d_model=WIDTH, d_state=STATES).to(device)
            with torch.inference_mode():
                _, state = mixer(torch.randn(1, self.TOKENS, WIDTH, device=device), return_state=True)
            x = torch.randn(1, WIDTH, device=device)

            def call():
                with torch.inference_mode():
                    return mixer.step(x, state)

            return call

        measure(make, group=f"s4d token {self.TOKENS} (1, {WIDTH}) fp32", name="seqzoo step", role="seqzoo")

    def test_convolution(self, measure, device):
        def make():
            mixer = create("s4d", d_model=WIDTH, d_state=STATES).to(device)
            x = torch.randn(1, self.TOKENS, WIDTH, device=device)

            def call():
                with torch.inference_mode():
                    return mixer(x)

            return call

        measure(make, group=f"s4d token {self.TOKENS} (1, {WIDTH}) fp32", name="convolving again", role="peer")


@pytest.mark.parametrize("lengths", [(1024,) * 8, (64,) * 128], ids=["8 of 1024", "128 of 64"])
@pytest.mark.parametrize("name", ["s4d", "s4"])
def test_packed(measure, device, lengths, name):
    def make():
        mixer = create(name, d_model=WIDTH, d_state=STATES).to(device)
        x = torch.randn(1, sum(lengths), WIDTH, device=device, requires_grad=True)
        bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(device)
        sources = [x, *mixer.parameters()]

        def call():
            y, _ = mixer(x, cu_seqlens=bounds)
            return torch.autograd.grad(y, sources, torch.ones_like(y))

        return call

    group = f"packed layer, {len(lengths)} of {lengths[0]}, D={WIDTH} N={STATES} fp32 forward+backward"
    measure(make, group=group, name=f"seqzoo {name}", role="seqzoo" if name == "s4d" else "peer", seconds=4.0)
