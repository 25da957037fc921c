"""``causal_conv`` with SiLU on each implementation, beside ``torch.add`` on the same bytes and beside PyTorch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from seqzoo.kernels import dispatch
from seqzoo.ops import causal_conv

SHAPES = ((8, 2048, 512), (1, 16384, 512), (8, 2048, 64))
TAPS = 4


def calling(convolve, shape, device, backward, arrange=lambda value: value):
    """What makes calls of ``convolve(x, weight, bias)``, with their backward pass if that is measured."""

    def make():
        x, grad = (arrange(torch.randn(shape, device=device)) for _ in range(2))
        weight, bias = torch.randn(shape[2], TAPS, device=device), torch.randn(shape[2], device=device)
        if not backward:
            return lambda: convolve(x, weight, bias)
        sources = x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()
        return lambda: torch.autograd.grad(convolve(*sources), sources, grad)

    return make


def natural(device: torch.device) -> str:
    return dispatch.choose(device, False)[0]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
class TestCausalConv:
    @pytest.fixture
    def place(self, device, shape, backward):
        """The group, the bytes of three tensors, and the limit: an addition of as many."""

        def adding():
            a, b, out = (torch.randn(shape, device=device) for _ in range(3))
            return lambda: torch.add(a, b, out=out)

        batch, total, width = shape
        name = f"causal_conv W={TAPS} silu {shape} fp32 {'forward+backward' if backward else 'forward'}"
        return {"group": name, "nbytes": 3 * 4 * batch * total * width, "limit": adding}

    def test_limit(self, measure, place):
        measure(place["limit"], name="torch.add(a, b, out=z)", role="limit", **place)

    @pytest.mark.parametrize("backend", ["cpu", "gpu", "chunked"])
    def test_seqzoo(self, measure, place, device, shape, backward, backend):
        if backend != natural(device) and (backend != "chunked" or dispatch.obstacle(backend, device, False)):
            pytest.skip(f"{backend} is not for {device}")
        with dispatch.backend(backend):
            measure(
                calling(lambda *values: causal_conv(*values, activation="silu")[0], shape, device, backward),
                name=f"seqzoo {backend}",
                role="seqzoo" if backend == natural(device) else "peer",
                **place,
            )

    def test_conv1d(self, measure, place, device, shape, backward):
        total, width = shape[1:]

        def convolve(x, weight, bias):
            return F.silu(F.conv1d(x, weight[:, None], bias, padding=TAPS - 1, groups=width)[..., :total])

        # its layout is (B, D, T), given to it as it likes it
        measure(
            calling(convolve, shape, device, backward, lambda value: value.transpose(1, 2).contiguous()),
            name="PyTorch conv1d, silu",
            role="peer",
            **place,
        )

    def test_conv2d_channels_last(self, measure, place, device, shape, backward):
        total, width = shape[1:]

        def convolve(x, weight, bias):
            y = F.conv2d(x, weight[:, None, None], bias, padding=(0, TAPS - 1), groups=width)
            return F.silu(y[..., :total])

        # (B, D, 1, T) with the channels last in memory, which is the layout of ours
        measure(
            calling(convolve, shape, device, backward, lambda value: value.transpose(1, 2)[:, :, None]),
            name="PyTorch conv2d channels last, silu",
            role="peer",
            **place,
        )
