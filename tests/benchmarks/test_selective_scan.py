"""``selective_scan`` on each implementation, beside the exponentials of its decays and beside peers."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from seqzoo.kernels import dispatch
from seqzoo.ops import selective_scan

# B, T, D, N
SHAPES = ((1, 2048, 512, 16), (4, 1024, 256, 16))


def arguments(shape: tuple[int, int, int, int], device: torch.device, gated: bool) -> dict[str, torch.Tensor]:
    batch, total, width, size = shape
    drawn = {
        "u": torch.randn(batch, total, width, device=device),
        "delta": 0.1 * torch.rand(batch, total, width, device=device),
        "A": -torch.arange(1.0, size + 1, device=device).repeat(width, 1),
        "B": torch.randn(batch, total, size, device=device),
        "C": torch.randn(batch, total, size, device=device),
        "D": torch.ones(width, device=device),
    }
    if gated:
        drawn["z"] = torch.randn(batch, total, width, device=device)
    return drawn


def calling(scan, shape, device, backward, gated):
    """What makes calls of ``scan(**arguments)``, with their backward pass if that is measured."""

    def make():
        drawn = arguments(shape, device, gated)
        if not backward:
            return lambda: scan(**drawn)
        weight = torch.randn_like(drawn["u"])
        sources = [value.requires_grad_() for value in drawn.values()]
        return lambda: torch.autograd.grad(scan(**drawn), sources, weight)

    return make


def loop(u, delta, A, B, C, D, z=None):
    """Token by token, with the decays of all tokens made at once."""
    factors, addends = torch.exp(delta[..., None] * A), (delta * u)[..., None] * B[:, :, None]
    h, found = torch.zeros_like(factors[:, 0]), []
    # unbound once: indexing would cost the backward pass a full-sized gradient a token
    for factor, addend, weight in zip(factors.unbind(1), addends.unbind(1), C.unbind(1), strict=True):
        h = torch.addcmul(addend, factor, h)
        found.append((h @ weight[..., None]).squeeze(-1))
    y = torch.stack(found, 1) + D * u
    return y if z is None else y * torch.nn.functional.silu(z)


def natural(device: torch.device) -> str:
    return dispatch.choose(device, False)[0]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
class TestSelectiveScan:
    @pytest.fixture
    def place(self, device, shape, gated, backward):
        """The group, and the limit: the exponentials, of which the decays need as many."""

        def exponentials():
            x = torch.randn(shape, device=device)
            out = torch.empty_like(x)
            return lambda: torch.exp(x, out=out)

        words = "forward+backward" if backward else "forward"
        name = f"selective_scan {shape} fp32 {'gated ' if gated else ''}{words}"
        return {"group": name, "limit": exponentials}

    def test_limit(self, measure, place):
        measure(place["limit"], name="torch.exp(out=) of B T D N", role="limit", **place)

    @pytest.mark.parametrize("backend", ["cpu", "gpu", "chunked"])
    def test_seqzoo(self, measure, place, device, shape, gated, backward, backend):
        if backend != natural(device) and (backend != "chunked" or dispatch.obstacle(backend, device, False)):
            pytest.skip(f"{backend} is not for {device}")
        with dispatch.backend(backend):
            measure(
                calling(lambda **drawn: selective_scan(**drawn)[0], shape, device, backward, gated),
                name=f"seqzoo {backend}",
                role="seqzoo" if backend == natural(device) else "peer",
                **place,
            )

    def test_loop(self, measure, place, device, shape, gated, backward):
        measure(calling(loop, shape, device, backward, gated), name="PyTorch loop", role="peer", **place)

    @pytest.mark.skipif(importlib.util.find_spec("mambapy") is None, reason="mambapy is missing")
    def test_mambapy(self, measure, place, device, shape, gated, backward):
        from mambapy.pscan import pscan

        def scan(u, delta, A, B, C, D, z=None):
            h = pscan(torch.exp(delta[..., None] * A), (delta * u)[..., None] * B[:, :, None])
            y = (h @ C[..., None]).squeeze(-1) + D * u
            return y if z is None else y * torch.nn.functional.silu(z)

        measure(calling(scan, shape, device, backward, gated), name="mambapy pscan", role="peer", **place)


@pytest.mark.parametrize("batch", [1, 64])
class TestDecodeStep:
    @pytest.fixture
    def place(self, device, batch):
        def exponentials():
            x = torch.randn(batch, 512, 16, device=device)
            out = torch.empty_like(x)
            return lambda: torch.exp(x, out=out)

        return {"group": f"selective_scan ({batch}, 1, 512, 16) fp32 decode step", "limit": exponentials}

    def test_limit(self, measure, place):
        measure(place["limit"], name="torch.exp(out=) of B T D N", role="limit", **place)

    def test_seqzoo(self, measure, place, device, batch):
        state = torch.zeros(batch, 512, 16, device=device)

        def make():
            u, delta, A, B, C, D, z = arguments((batch, 1, 512, 16), device, True).values()
            return lambda: selective_scan(u, delta, A, B, C, D, z, initial_state=state)

        measure(make, name=f"seqzoo {natural(device)}", role="seqzoo", **place)
