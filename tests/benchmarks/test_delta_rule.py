"""``delta_rule`` on each implementation, beside the matrix products of its chunked form and beside peers."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize, scaled_dot_product_attention

from seqzoo.kernels import dispatch
from seqzoo.ops import delta_rule

# (B, T, H, K), with V = K
SHAPES = ((2, 2048, 4, 64), (2, 4096, 4, 64))
CHUNK = 64
# k k^T, q k^T, what these give with k, v and u, and the state read by keys, read by queries and written
PRODUCTS = 8


def tensors(shape, decay, device):
    """q, k, v, beta, log_decay and the gradient in the output."""
    batch, total, heads, size = shape
    q, k, v, weight = (torch.randn(shape, device=device) for _ in range(4))
    log_decay = -torch.rand((batch, total, heads, size) if decay == "key" else (batch, total, heads), device=device)
    return q, normalize(k, dim=-1), v, torch.rand((batch, total, heads), device=device), log_decay, weight


def calling(op, shape, decay, device, backward, used=5):
    """What makes calls of ``op`` on the first of the tensors, with their backward pass if that is measured."""

    def make():
        *inputs, weight = tensors(shape, decay, device)
        inputs = inputs[:used]
        if not backward:
            return lambda: op(*inputs)
        sources = [value.requires_grad_() for value in inputs]
        return lambda: torch.autograd.grad(op(*sources), sources, weight)

    return make


def natural(device: torch.device) -> str:
    return dispatch.choose(device, False)[0]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("decay", ["token", "key"])
class TestDeltaRule:
    @pytest.fixture
    def place(self, device, shape, backward, decay):
        """The group, the bytes of q, k, v and o, and the limit: the products of the forward pass."""
        batch, total, heads, size = shape

        def multiplying():
            tiles = batch * heads * total // CHUNK
            a, b = (torch.randn(tiles, CHUNK, size, device=device) for _ in range(2))
            out = torch.empty(tiles, CHUNK, CHUNK, device=device)

            def run():
                for _ in range(PRODUCTS):
                    torch.bmm(a, b.mT, out=out)

            return run

        name = f"delta_rule {shape} {decay} decay fp32 {'forward+backward' if backward else 'forward'}"
        return {"group": name, "nbytes": 4 * 4 * batch * total * heads * size, "limit": multiplying}

    def test_limit(self, measure, place):
        measure(place["limit"], name=f"{PRODUCTS} batched products of chunks", role="limit", **place)

    @pytest.mark.parametrize("backend", ["cpu", "gpu", "chunked"])
    def test_seqzoo(self, measure, place, device, shape, backward, decay, backend):
        if backend != natural(device) and (backend != "chunked" or dispatch.obstacle(backend, device, False)):
            pytest.skip(f"{backend} is not for {device}")
        with dispatch.backend(backend):
            measure(
                calling(lambda *inputs: delta_rule(*inputs)[0], shape, decay, device, backward),
                name=f"seqzoo {backend}",
                role="seqzoo" if backend == natural(device) else "peer",
                **place,
            )

    def test_loop(self, measure, place, device, shape, backward, decay):
        def loop(q, k, v, beta, log_decay):
            scale, factors = q.shape[3] ** -0.5, log_decay.exp()
            if decay == "token":
                factors = factors[..., None]
            S, found = q.new_zeros(*q.shape[:1], *q.shape[2:], v.shape[3]), []
            # unbound once: indexing q[:, t] would cost its backward pass a full-sized gradient a token
            for query, key, value, rate, factor in zip(*(x.unbind(1) for x in (q, k, v, beta, factors)), strict=True):
                S = S * factor[..., None]
                written = rate[..., None] * (value - (key[..., None, :] @ S)[..., 0, :])
                S = S + key[..., None] * written[..., None, :]
                found.append(scale * (query[..., None, :] @ S)[..., 0, :])
            return torch.stack(found, 1)

        measure(calling(loop, shape, decay, device, backward), name="PyTorch loop", role="peer", **place)

    def test_attention(self, measure, place, device, shape, backward, decay):
        """The attention that it replaces."""

        def attend(q, k, v):
            return scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True).transpose(1, 2)

        measure(
            calling(attend, shape, decay, device, backward, used=3),
            name="PyTorch scaled_dot_product_attention, causal",
            role="peer",
            **place,
        )
