"""The convolution kernel of a diagonal state space, beside one complex matrix product and beside S4D's minimal code."""

from __future__ import annotations

import pytest
import torch

from seqzoo.kernels import dispatch
from seqzoo.ops import vandermonde

# channels, stored conjugate pairs, length
SHAPES = ((256, 32, 4096), (256, 2, 2048), (64, 32, 16384))


def calling(compute, shape, device, backward):
    """What makes calls of ``compute(exponents, weights)``, with their backward pass if that is measured."""

    def make():
        width, size, length = shape
        real, imaginary = torch.rand(2, width, size, dtype=torch.float64, device=device)
        exponents = torch.complex(-0.05 * real, 3 * imaginary)
        weights = torch.randn(width, size, dtype=torch.complex64, device=device)
        if not backward:
            return lambda: compute(exponents, weights)
        grad = torch.randn(width, length, device=device)
        sources = exponents.requires_grad_(), weights.requires_grad_()
        return lambda: torch.autograd.grad(compute(*sources), sources, grad)

    return make


def natural(device: torch.device) -> str:
    return dispatch.choose(device, False)[0]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
class TestVandermonde:
    @pytest.fixture
    def place(self, device, shape, backward):
        """The group, the bytes of the kernel, and the limit: a complex matrix product of as many multiply-adds."""
        width, size, length = shape
        rows = 1 << (length - 1).bit_length() // 2

        def multiplying():
            left = torch.randn(width, rows, size, dtype=torch.complex64, device=device)
            right = torch.randn(width, size, length // rows, dtype=torch.complex64, device=device)
            return lambda: torch.bmm(left, right)

        name = f"vandermonde D={width} N={size} length={length} fp32 {'forward+backward' if backward else 'forward'}"
        return {"group": name, "nbytes": 4 * width * length, "limit": multiplying}

    def test_limit(self, measure, place):
        measure(place["limit"], name="torch.bmm, complex64", role="limit", **place)

    @pytest.mark.parametrize("backend", ["cpu", "gpu", "chunked"])
    def test_seqzoo(self, measure, place, device, shape, backward, backend):
        if backend != natural(device) and (backend != "chunked" or dispatch.obstacle(backend, device, False)):
            pytest.skip(f"{backend} is not for {device}")
        with dispatch.backend(backend):
            measure(
                calling(lambda *values: vandermonde(*values, shape[2]), shape, device, backward),
                name=f"seqzoo {backend}",
                role="seqzoo" if backend == natural(device) else "peer",
                **place,
            )

    def test_all_powers_at_once(self, measure, place, device, shape, backward):
        def s4d(exponents, weights):
            steps = torch.arange(shape[2], device=device)
            powers = torch.exp(exponents.to(torch.complex64)[..., None] * steps)
            return torch.einsum("hn, hnl -> hl", weights, powers).real

        # one set of tensors: the powers alone exceed the caches
        place["nbytes"] *= 8 * shape[1]
        measure(calling(s4d, shape, device, backward), name="S4D's minimal code", role="peer", **place)
