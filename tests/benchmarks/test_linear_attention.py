"""``linear_attention`` beside matrix products of as many multiplications, the loop, and softmax attention."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from seqzoo.kernels import dispatch
from seqzoo.ops import linear_attention

HEADS, SIZE, CHUNK = 4, 64, 64
# products of CHUNK tokens a head: q k^T, k^T v, and two for o; backward those of which o is not made again, the
# gradients of both of their operands
PRODUCTS = {False: 4, True: 14}
SHAPES = ((2, 2048), (2, 4096), (1, 16384), (1, 32768))


def drawn(shape, device, *last):
    return torch.randn(*shape, HEADS, *last, device=device)


def decay_of(decay, shape, device):
    sizes = {"none": None, "token": (), "key": (SIZE,)}[decay]
    return None if sizes is None else -0.1 * torch.rand(*shape, HEADS, *sizes, device=device)


def calling(attend, shape, device, decay, backward):
    """What makes calls of ``attend(q, k, v, log_decay)``, with their backward pass if that is measured."""

    def make():
        q, k, v, weight = (drawn(shape, device, SIZE) for _ in range(4))
        log_decay = decay_of(decay, shape, device)
        if not backward:
            return lambda: attend(q, k, v, log_decay)
        sources = [x.requires_grad_() for x in (q, k, v, log_decay) if x is not None]
        return lambda: torch.autograd.grad(attend(q, k, v, log_decay), sources, weight, allow_unused=True)

    return make


def loop(q, k, v, log_decay):
    state = q.new_zeros(q.shape[0], HEADS, SIZE, SIZE)
    factors = None if log_decay is None else log_decay.exp().view(*q.shape[:3], -1, 1)
    found = []
    for t in range(q.shape[1]):
        state = state if factors is None else factors[:, t] * state
        state = state + k[:, t, :, :, None] * v[:, t, :, None]
        found.append((q[:, t, :, None] @ state)[:, :, 0])
    return torch.stack(found, 1) * SIZE**-0.5


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("decay", ["none", "token", "key"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
class TestLinearAttention:
    @pytest.fixture
    def place(self, device, shape, decay, backward):
        """The group, the bytes of q, k, v and o, and the limit."""
        tiles = shape[0] * HEADS * shape[1] // CHUNK

        def multiplying():
            a, b = (torch.randn(tiles, CHUNK, SIZE, device=device) for _ in range(2))
            out = torch.empty_like(a)
            return lambda: [torch.bmm(a, b, out=out) for _ in range(PRODUCTS[backward])]

        name = f"linear_attention {(*shape, HEADS, SIZE)} decay: {decay}, fp32"
        return {
            "group": f"{name} {'forward+backward' if backward else 'forward'}",
            "nbytes": 4 * 4 * shape[0] * shape[1] * HEADS * SIZE,
            "limit": multiplying,
        }

    def test_limit(self, measure, place, backward):
        measure(place["limit"], name=f"{PRODUCTS[backward]} torch.bmm", role="limit", **place)

    @pytest.mark.parametrize("backend", ["cpu", "gpu", "chunked"])
    def test_seqzoo(self, measure, place, device, shape, decay, backward, backend):
        natural = dispatch.choose(device, False)[0]
        if backend != natural and (backend != "chunked" or dispatch.obstacle(backend, device, False)):
            pytest.skip(f"{backend} is not for {device}")
        with dispatch.backend(backend):
            measure(
                calling(lambda *tensors: linear_attention(*tensors)[0], shape, device, decay, backward),
                name=f"seqzoo {backend}",
                role="seqzoo" if backend == natural else "peer",
                **place,
            )

    def test_softmax(self, measure, place, device, shape, decay, backward):
        if device.type == "cpu" and shape[1] > 4096:
            pytest.skip("its time is quadratic in the length: minutes")

        def attend(q, k, v, log_decay):
            heads_first = (x.transpose(1, 2) for x in (q, k, v))
            return scaled_dot_product_attention(*heads_first, is_causal=True).transpose(1, 2)

        make = calling(attend, shape, device, decay, backward)
        measure(make, name="scaled_dot_product_attention, causal", role="peer", **place)

    def test_loop(self, measure, place, device, shape, decay, backward):
        if shape[1] > 2048:
            pytest.skip("its backward pass keeps several states a token: gigabytes")
        measure(calling(loop, shape, device, decay, backward), name="PyTorch loop", role="peer", **place)
