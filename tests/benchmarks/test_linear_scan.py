"""``linear_scan`` on each implementation, beside ``torch.add`` on the same bytes and beside peers."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from seqzoo.kernels import dispatch
from seqzoo.ops import linear_scan

SHAPES = ((4, 4096, 512), (1, 16384, 512), (8, 2048, 64))


def tensors(shape: tuple[int, int, int], device: torch.device, grad: bool) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    a, b = torch.rand(shape, device=device), torch.randn(shape, device=device)
    return a.requires_grad_(grad), b.requires_grad_(grad), torch.randn(shape, device=device)


def with_backward(forward, sources, weight):
    def call():
        torch.autograd.grad(forward(), sources, weight)

    return call


def natural(device: torch.device) -> str:
    return dispatch.choose(device, False)[0]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
class TestLinearScan:
    @staticmethod
    def group(shape, backward):
        return f"linear_scan {shape} fp32 {'forward+backward' if backward else 'forward'}"

    def test_limit(self, measure, device, shape, backward):
        a, b, out = tensors(shape, device, False)
        measure(
            lambda: torch.add(a, b, out=out),
            group=self.group(shape, backward),
            name="torch.add(a, b, out=z)",
            role="limit",
        )

    @pytest.mark.parametrize("backend", ["cpu", "gpu", "chunked"])
    def test_seqzoo(self, measure, device, shape, backward, backend):
        if backend != natural(device) and (backend != "chunked" or dispatch.obstacle(backend, device, False)):
            pytest.skip(f"{backend} is not for {device}")
        a, b, weight = tensors(shape, device, backward)
        call = lambda: linear_scan(a, b)[0]  # noqa: E731
        with dispatch.backend(backend):
            measure(
                with_backward(call, (a, b), weight) if backward else call,
                group=self.group(shape, backward),
                name=f"seqzoo {backend}",
                role="seqzoo" if backend == natural(device) else "peer",
            )

    def test_loop(self, measure, device, shape, backward):
        a, b, weight = tensors(shape, device, backward)

        def call():
            h, found = torch.zeros_like(b[:, 0]), []
            # unbound once: indexing a[:, t] would cost its backward pass a full-sized gradient a token
            for factor, addend in zip(a.unbind(1), b.unbind(1), strict=True):
                h = torch.addcmul(addend, factor, h)
                found.append(h)
            return torch.stack(found, 1)

        measure(
            with_backward(call, (a, b), weight) if backward else call,
            group=self.group(shape, backward),
            name="PyTorch loop",
            role="peer",
        )

    def test_associative_scan(self, measure, device, shape, backward):
        from torch._higher_order_ops.associative_scan import associative_scan

        a, b, weight = tensors(shape, device, backward)

        def combine(first, second):
            return first[0] * second[0], second[0] * first[1] + second[1]

        call = lambda: associative_scan(combine, (a, b), dim=1, combine_mode="generic")[1]  # noqa: E731
        measure(
            with_backward(call, (a, b), weight) if backward else call,
            group=self.group(shape, backward),
            name="PyTorch associative_scan",
            role="peer",
        )

    @pytest.mark.skipif(importlib.util.find_spec("accelerated_scan") is None, reason="accelerated_scan is missing")
    def test_accelerated_scan(self, measure, device, shape, backward):
        if device.type == "cuda":
            from accelerated_scan.scalar import scan
        else:
            from accelerated_scan.ref import scan
        # its layout is (B, C, T), given to it as it likes it
        a, b, weight = (value.detach().transpose(1, 2).contiguous() for value in tensors(shape, device, backward))
        a, b = a.requires_grad_(backward), b.requires_grad_(backward)
        call = lambda: scan(a, b)  # noqa: E731
        measure(
            with_backward(call, (a, b), weight) if backward else call,
            group=self.group(shape, backward),
            name="accelerated_scan",
            role="peer",
        )
