"""``attention`` beside matrix products of as many multiplications, and PyTorch's own attention."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from seqzoo.kernels import dispatch
from seqzoo.ops import attention

HEADS, SIZE, TILE = 4, 64, 128
WINDOW, DOCUMENT, CACHE = 256, 512, 4000
# products for every tile of queries and keys: scores and sums of values; backward those, and the gradients of both
# operands of either
PRODUCTS = {False: 2, True: 7}
SHAPES = {"causal": (1, 2048), "window": (1, 4096), "packed": (8, DOCUMENT)}


def pairs(form: str) -> int:
    """Pairs of a query and a key that it sees, of all sequences."""
    batch, total = SHAPES[form]
    inside = min(total, WINDOW) if form == "window" else total
    return batch * (inside * (inside + 1) // 2 + (total - inside) * inside)


def drawn(form: str, device: torch.device) -> list[torch.Tensor]:
    return [torch.randn(*SHAPES[form], HEADS, SIZE, device=device) for _ in range(4)]


def calling(attend, form, device, backward, packed=False):
    """What makes calls of ``attend(q, k, v)``, with their backward pass if that is measured."""

    def make():
        tensors = drawn(form, device)
        *inputs, weight = (x.flatten(0, 1)[None] for x in tensors) if packed else tensors
        if not backward:
            return lambda: attend(*inputs)
        sources = [x.requires_grad_() for x in inputs]
        return lambda: torch.autograd.grad(attend(*sources), sources, weight)

    return make


def sdpa(q, k, v, **options):
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(*heads_first, **options).transpose(1, 2)


@pytest.mark.parametrize("form", ["causal", "window", "packed"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
class TestAttention:
    @pytest.fixture
    def place(self, device, form, backward):
        """The group, the bytes of q, k, v and o, and the limit."""
        tiles = -(-HEADS * pairs(form) // TILE**2)

        def multiplying():
            a, b = torch.randn(tiles, TILE, SIZE, device=device), torch.randn(tiles, SIZE, TILE, device=device)
            out = a.new_empty(tiles, TILE, TILE)
            return lambda: [torch.bmm(a, b, out=out) for _ in range(PRODUCTS[backward])]

        words = {"window": f" of the last {WINDOW}", "packed": f" in sequences of {DOCUMENT}"}.get(form, "")
        batch, total = SHAPES[form]
        return {
            "group": f"attention {(1, batch * total, HEADS, SIZE)} causal{words}, fp32 "
            + ("forward+backward" if backward else "forward"),
            "nbytes": 4 * 4 * batch * total * HEADS * SIZE,
            "limit": multiplying,
        }

    def test_limit(self, measure, place, backward):
        measure(place["limit"], name=f"{PRODUCTS[backward]} torch.bmm", role="limit", **place)

    @pytest.mark.parametrize("backend", ["cpu", "gpu", "chunked"])
    def test_seqzoo(self, measure, place, device, form, backward, backend):
        natural = dispatch.choose(device, False)[0]
        if backend != natural and (backend != "chunked" or dispatch.obstacle(backend, device, False)):
            pytest.skip(f"{backend} is not for {device}")
        batch, total = SHAPES[form]
        options = {
            "causal": {},
            "window": {"window": WINDOW},
            "packed": {"cu_seqlens": torch.arange(batch + 1, dtype=torch.int32, device=device) * total},
        }[form]
        with dispatch.backend(backend):
            measure(
                calling(lambda *x: attention(*x, **options)[0], form, device, backward, form == "packed"),
                name=f"seqzoo {backend}",
                role="seqzoo" if backend == natural else "peer",
                **place,
            )

    def test_pytorch(self, measure, place, device, form, backward):
        def attend(q, k, v):
            return sdpa(q, k, v, is_causal=True)

        words = {"window": ", of all keys", "packed": ", as a batch"}.get(form, "")
        make = calling(attend, form, device, backward)
        measure(make, name=f"scaled_dot_product_attention{words}", role="peer", **place)

    def test_pytorch_with_a_mask(self, measure, place, device, form, backward):
        if form != "window":
            pytest.skip("no mask is needed")
        distance = torch.arange(SHAPES[form][1], device=device)[:, None] - torch.arange(SHAPES[form][1], device=device)
        mask = (distance >= 0) & (distance < WINDOW)
        make = calling(lambda *x: sdpa(*x, attn_mask=mask), form, device, backward)
        measure(make, name="scaled_dot_product_attention, by a mask", role="peer", **place)


@pytest.mark.parametrize("groups", [HEADS, 1])
class TestDecoding:
    @pytest.fixture
    def place(self, device, groups):
        """The group, the bytes that are read, and the limit: keys and values read once by a product with a vector."""

        def reading():
            cache = torch.randn(2 * CACHE * groups, SIZE, device=device)
            vector, out = torch.randn(SIZE, device=device), torch.empty(2 * CACHE * groups, device=device)
            return lambda: torch.mv(cache, vector, out=out)

        return {
            "group": f"attention, a token beside {CACHE}, {HEADS} heads of {SIZE}, {groups} of keys, fp32",
            "nbytes": 2 * 4 * CACHE * groups * SIZE,
            "limit": reading,
        }

    @staticmethod
    def decoding(attend, device, groups):
        def make():
            q = torch.randn(1, 1, HEADS, SIZE, device=device)
            cache = (torch.randn(1, CACHE + 96, groups, SIZE, device=device) for _ in range(2))
            k, v = (x[:, :CACHE] for x in cache)
            return lambda: attend(q, k, v)

        return make

    def test_limit(self, measure, place):
        measure(place["limit"], name="torch.mv", role="limit", **place)

    def test_seqzoo(self, measure, place, device, groups):
        measure(self.decoding(attention, device, groups), name="seqzoo", role="seqzoo", **place)

    def test_pytorch(self, measure, place, device, groups):
        def attend(q, k, v):
            return sdpa(q, k, v, enable_gqa=groups < HEADS)

        measure(self.decoding(attend, device, groups), name="scaled_dot_product_attention", role="peer", **place)
