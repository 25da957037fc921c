"""``cauchy`` on each implementation, beside PyTorch with all quotients at once, and beside the least it could compute.

The limit is one float64 reciprocal for every pole and node and the real products of the sums, on the numbers of a few
channels in the cache; with the backward pass two reciprocals, and the products of the sums and of both gradients.
"""

from __future__ import annotations

import pytest
import torch

from seqzoo.kernels import dispatch
from seqzoo.ops import cauchy

# channels whose numbers the limit takes at once
BLOCK = 8
# D, M, N, length: a layer of S4 with 64 states, half of them stored, and its four sums
SHAPES = ((256, 4, 32, 4096), (256, 4, 32, 1024))


def calling(sums, shape, device, backward):
    """What makes calls of ``sums(weights, poles, length)``, with their backward pass if that is measured."""
    width, number, size, length = shape

    def make():
        weights = torch.randn(width, number, size, dtype=torch.complex64, device=device)
        real, imaginary = torch.rand(2, width, size, dtype=torch.float64, device=device)
        poles = torch.complex(-0.1 * real - 1e-3, 3 * imaginary)
        if not backward:
            return lambda: sums(weights, poles, length)
        grad = torch.randn(width, number, length // 2 + 1, dtype=torch.complex64, device=device)
        sources = weights.requires_grad_(), poles.requires_grad_()
        return lambda: torch.autograd.grad(sums(*sources, length), sources, grad)

    return make


def at_once(weights, poles, length):
    """The sums of pairs by broadcasting, as they are written."""
    index = torch.arange(length // 2 + 1, dtype=torch.float64, device=weights.device)
    z = torch.polar(torch.ones_like(index), -2 * torch.pi / length * index)
    sums = torch.zeros((), dtype=weights.dtype, device=weights.device)
    for w, p in ((weights, poles), (weights.conj(), poles.conj())):
        quotients = (1 / ((1 - z) - p[:, :, None] * (1 + z))).to(w.dtype)
        sums = sums + torch.einsum("dmn,dnf->dmf", w, quotients)
    return sums


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
class TestCauchy:
    @pytest.fixture
    def place(self, device, shape, backward):
        """The group and the limit."""
        width, number, size, length = shape
        nodes = length // 2 + 1

        def computing():
            squares = torch.rand(BLOCK, size, nodes, dtype=torch.float64, device=device)
            weights = torch.randn(BLOCK, number, 2 * size, device=device)
            rows = torch.randn(BLOCK, 2 * size, 2 * nodes, device=device)
            grad, inverse = torch.randn(BLOCK, number, 2 * nodes, device=device), torch.empty_like(squares)
            sums, of_weights, of_rows = torch.empty_like(grad), torch.empty_like(weights), torch.empty_like(rows)

            def call():
                for _ in range(width // BLOCK):
                    torch.reciprocal(squares, out=inverse)
                    torch.bmm(weights, rows, out=sums)
                    if backward:
                        torch.reciprocal(squares, out=inverse)
                        torch.bmm(grad, rows.mT, out=of_weights)
                        torch.bmm(weights.mT, grad, out=of_rows)

            return call

        name = f"cauchy (D, M, N, length) = {shape} pairs fp32 {'forward+backward' if backward else 'forward'}"
        return {"group": name, "limit": computing}

    def test_limit(self, measure, place):
        measure(place["limit"], name="reciprocals and products in the cache", role="limit", **place)

    @pytest.mark.parametrize("backend", ["cpu", "gpu", "chunked"])
    def test_seqzoo(self, measure, place, device, shape, backward, backend):
        natural = dispatch.choose(device, False)[0]
        if backend != natural and (backend != "chunked" or dispatch.obstacle(backend, device, False)):
            pytest.skip(f"{backend} is not for {device}")
        with dispatch.backend(backend):
            measure(
                calling(lambda *values: cauchy(*values, conjugate_pairs=True), shape, device, backward),
                name=f"seqzoo {backend}",
                role="seqzoo" if backend == natural else "peer",
                **place,
            )

    def test_at_once(self, measure, place, device, shape, backward):
        measure(calling(at_once, shape, device, backward), name="PyTorch, all quotients at once", role="peer", **place)
