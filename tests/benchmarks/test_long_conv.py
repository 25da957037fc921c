"""``long_conv`` on each implementation, beside the bare transforms that it must make and beside S4's convolution."""

from __future__ import annotations

import pytest
import torch

from seqzoo.kernels import dispatch
from seqzoo.kernels.long_conv.op import transform_length
from seqzoo.ops import long_conv

SHAPES = ((4, 4096, 256), (16, 1024, 256), (1, 65536, 128))
MODES = ("forward", "forward+backward", "forward+backward, recompute")


def calling(convolve, shape, device, backward, arrange=lambda value: value):
    """What makes calls of ``convolve(u, kernel)``, with their backward pass if that is measured."""

    def make():
        u, grad = (arrange(torch.randn(shape, device=device)) for _ in range(2))
        kernel = torch.randn(shape[2], shape[1], device=device)
        if not backward:
            return lambda: convolve(u, kernel)
        sources = u.requires_grad_(), kernel.requires_grad_()
        return lambda: torch.autograd.grad(convolve(*sources), sources, grad)

    return make


def s4(u, kernel):
    """As S4 writes it: u (B, D, T)."""
    total = u.shape[2]
    spectrum = torch.fft.rfft(u, n=2 * total) * torch.fft.rfft(kernel, n=2 * total)
    return torch.fft.irfft(spectrum, n=2 * total)[..., :total]


def natural(device: torch.device) -> str:
    return dispatch.choose(device, False)[0]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
class TestLongConv:
    @pytest.fixture
    def place(self, device, shape, mode):
        """The group, the bytes of u, y and the kernel, and the limit: transforms of padded rows, one behind another."""
        batch, total, width = shape
        length = transform_length(2 * total - 1)

        def transforming():
            of_u, of_kernel = (torch.randn(rows * width, length, device=device) for rows in (batch, 1))
            spectra, spectra_kernel = torch.fft.rfft(of_u), torch.fft.rfft(of_kernel)

            def forward():
                return torch.fft.rfft(of_u), torch.fft.rfft(of_kernel), torch.fft.irfft(spectra, n=length)

            def backward():
                inverses = (torch.fft.irfft(one, n=length) for one in (spectra, spectra_kernel))
                return torch.fft.rfft(of_u), *inverses

            return forward if mode == "forward" else lambda: (forward(), backward())

        return {
            "group": f"long_conv {shape} fp32 {mode}",
            "nbytes": 4 * (2 * batch + 1) * total * width,
            "limit": transforming,
        }

    def test_limit(self, measure, place, mode):
        measure(place["limit"], name=f"{3 if mode == 'forward' else 6} bare transforms", role="limit", **place)

    @pytest.mark.parametrize("backend", ["cpu", "gpu"])
    def test_seqzoo(self, measure, place, device, shape, mode, backend):
        if backend != natural(device):
            pytest.skip(f"{backend} is not for {device}")
        recompute = mode.endswith("recompute")
        measure(
            calling(lambda *values: long_conv(*values, recompute=recompute), shape, device, mode != "forward"),
            name=f"seqzoo {backend}",
            role="seqzoo",
            **place,
        )

    def test_s4(self, measure, place, device, shape, mode):
        # its layout is (B, D, T), given to it as it likes it
        measure(
            calling(s4, shape, device, mode != "forward", lambda value: value.transpose(1, 2).contiguous()),
            name="PyTorch as S4 writes it, (B, D, T)",
            role="peer",
            **place,
        )

    def test_s4_between_transpositions(self, measure, place, device, shape, mode):
        def convolve(u, kernel):
            return s4(u.transpose(1, 2), kernel).transpose(1, 2).contiguous()

        measure(
            calling(convolve, shape, device, mode != "forward"),
            name="PyTorch as S4 writes it, (B, T, D)",
            role="peer",
            **place,
        )
