"""``linear_scan`` on each implementation, beside ``torch.add`` on the same bytes and beside peers."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from seqzoo.kernels import dispatch
from seqzoo.ops import linear_scan

SHAPES = ((4, 4096, 512), (1, 16384, 512), (8, 2048, 64))


def tensors(shape: tuple[int, int, int], device: torch.device) -> tuple[torch.Tensor, ...]:
    return torch.rand(shape, device=device), torch.randn(shape, device=device), torch.randn(shape, device=device)


def calling(scan, shape, device, backward, arrange=lambda value: value):
    """What makes calls of ``scan(a, b)``, with their backward pass if that is measured; tensors laid out by arrange."""

    def make():
        a, b, weight = map(arrange, tensors(shape, device))
        if not backward:
            return lambda: scan(a, b)
        sources = a.requires_grad_(), b.requires_grad_()
        return lambda: torch.autograd.grad(scan(*sources), sources, weight)

    return make


def natural(device: torch.device) -> str:
    return dispatch.choose(device, False)[0]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
class TestLinearScan:
    @pytest.fixture
    def place(self, device, shape, backward):
        """The group, the bytes of a, b and h, and the limit: an addition of as many."""

        def adding():
            a, b, out = tensors(shape, device)
            return lambda: torch.add(a, b, out=out)

        batch, total, width = shape
        name = f"linear_scan {shape} fp32 {'forward+backward' if backward else 'forward'}"
        return {"group": name, "nbytes": 3 * 4 * batch * total * width, "limit": adding}

    def test_limit(self, measure, place):
        measure(place["limit"], name="torch.add(a, b, out=z)", role="limit", **place)

    @pytest.mark.parametrize("backend", ["cpu", "gpu", "chunked"])
    def test_seqzoo(self, measure, place, device, shape, backward, backend):
        if backend != natural(device) and (backend != "chunked" or dispatch.obstacle(backend, device, False)):
            pytest.skip(f"{backend} is not for {device}")
        with dispatch.backend(backend):
            measure(
                calling(lambda a, b: linear_scan(a, b)[0], shape, device, backward),
                name=f"seqzoo {backend}",
                role="seqzoo" if backend == natural(device) else "peer",
                **place,
            )

    def test_loop(self, measure, place, device, shape, backward):
        def scan(a, b):
            h, found = torch.zeros_like(b[:, 0]), []
            # unbound once: indexing a[:, t] would cost its backward pass a full-sized gradient a token
            for factor, addend in zip(a.unbind(1), b.unbind(1), strict=True):
                h = torch.addcmul(addend, factor, h)
                found.append(h)
            return torch.stack(found, 1)

        measure(calling(scan, shape, device, backward), name="PyTorch loop", role="peer", **place)

    def test_associative_scan(self, measure, place, device, shape, backward):
        from torch._higher_order_ops.associative_scan import associative_scan

        def combine(first, second):
            return first[0] * second[0], second[0] * first[1] + second[1]

        measure(
            calling(
                lambda a, b: associative_scan(combine, (a, b), dim=1, combine_mode="generic")[1],
                shape,
                device,
                backward,
            ),
            name="PyTorch associative_scan",
            role="peer",
            **place,
        )

    @pytest.mark.skipif(importlib.util.find_spec("accelerated_scan") is None, reason="accelerated_scan is missing")
    def test_accelerated_scan(self, measure, place, device, shape, backward):
        if device.type == "cuda":
            from accelerated_scan.scalar import scan
        else:
            from accelerated_scan.ref import scan
        # its layout is (B, C, T), given to it as it likes it
        measure(
            calling(scan, shape, device, backward, lambda value: value.transpose(1, 2).contiguous()),
            name="accelerated_scan",
            role="peer",
            **place,
        )
