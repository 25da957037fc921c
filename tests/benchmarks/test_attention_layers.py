"""Layers with softmax attention: decoding beside the layer's own products, and what sparse activation saves.

The limit of decoding is what the layer cannot do without at each token: its two linear maps, and PyTorch's attention to
the keys so far.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from seqzoo import create
from seqzoo.modules.compaction import Compaction

WIDTH, HEAD = 256, 64


@pytest.mark.parametrize(("batch", "width"), [(1, 256), (4, 256), (1, 1024)])
class TestDecoding:
    """All of 4000 tokens, one after the other, from an empty state. Narrow layers show what a step costs in Python."""

    TOKENS = 4000

    def limit(self, batch: int, width: int, device: torch.device):
        heads = width // HEAD

        def make():
            maps = torch.nn.Linear(width, 3 * width, bias=False), torch.nn.Linear(width, width, bias=False)
            into, out = (one.to(device) for one in maps)
            tokens = torch.randn(self.TOKENS, batch, width, device=device)
            keys, values = torch.randn(2, batch, heads, self.TOKENS, HEAD, device=device)

            @torch.inference_mode()
            def generate():
                for t, token in enumerate(tokens):
                    q = into(token)[:, :width].view(batch, heads, 1, -1)
                    o = F.scaled_dot_product_attention(q, keys[:, :, : t + 1], values[:, :, : t + 1])
                    y = out(o.view(batch, width))
                return y

            return generate

        return make

    def test_seqzoo(self, measure, device, batch, width):
        def make():
            mixer = create("attention", d_model=width, head_dim=HEAD).to(device)
            tokens = torch.randn(self.TOKENS, batch, width, device=device)

            @torch.inference_mode()
            def generate():
                state = mixer.init_state(batch)
                for token in tokens:
                    y, state = mixer.step(token, state)
                return y

            return generate

        limit = self.limit(batch, width, device)
        measure(make, group=self.group(batch, width), name="seqzoo", role="seqzoo", limit=limit, seconds=4.0)

    def test_limit(self, measure, device, batch, width):
        limit = self.limit(batch, width, device)
        name = "its maps and PyTorch's attention"
        measure(limit, group=self.group(batch, width), name=name, role="limit", limit=limit, seconds=4.0)

    def group(self, batch: int, width: int) -> str:
        return f"attention, decoding {self.TOKENS} tokens, ({batch}, {width}), heads of {HEAD}, fp32"


class TestSparseActivation:
    """SeqBoat's attention over 4096 tokens of which one in four is active, forward and backward."""

    TOKENS, WINDOW = 4096, 4096
    GROUP = f"seqboat {TOKENS} tokens, D={WIDTH}, window {WINDOW}, fp32 forward+backward"

    def part(self, device: torch.device, share: float):
        """The attention part, with all of its maps."""

        def make():
            torch.manual_seed(0)
            mixer = create("seqboat", d_model=WIDTH, window=self.WINDOW).to(device)
            m = torch.randn(1, self.TOKENS, WIDTH, device=device, requires_grad=True)
            active = torch.rand(1, self.TOKENS, device=device) < share
            parts = (mixer.a_proj, mixer.h_proj)
            sources = [m, mixer.scale, mixer.shift, *(p for part in parts for p in part.parameters())]

            def call():
                h, _ = mixer.attend(m, active, None, None, False)
                return torch.autograd.grad(h, sources, torch.ones_like(h))

            return call

        return make

    def test_dense(self, measure, device):
        dense = self.part(device, 1.0)
        measure(dense, group=self.GROUP, name="attention, all active", role="limit", limit=dense, seconds=6.0)

    def test_sparse(self, measure, device):
        dense = self.part(device, 1.0)
        sparse = self.part(device, 0.25)
        measure(sparse, group=self.GROUP, name="attention, a quarter active", role="seqzoo", limit=dense, seconds=6.0)

    def test_always_on(self, measure, device):
        dense = self.part(device, 1.0)

        def make():
            mixer = create("seqboat", d_model=WIDTH, window=self.WINDOW).to(device)
            x = torch.randn(1, self.TOKENS, WIDTH, device=device, requires_grad=True)
            sources = [x, mixer.alpha, mixer.delta, mixer.beta, mixer.gamma, mixer.omega, mixer.m_proj.weight]

            def call():
                m, _ = mixer.average(x, None, None)
                y = mixer.m_proj(m)
                return torch.autograd.grad(y, sources, torch.ones_like(y))

            return call

        name = "moving average and router, always on"
        measure(make, group=self.GROUP, name=name, role="peer", limit=dense, seconds=6.0)

    def test_compaction_alone(self, measure, device):
        def make():
            m = torch.randn(1, self.TOKENS, WIDTH, device=device)
            active = torch.rand(1, self.TOKENS, device=device) < 0.25

            def call():
                chosen = Compaction.of(active, None)
                return chosen.scatter(chosen.gather(m), active)

            return call

        measure(make, group=self.GROUP, name="taking tokens out and back", role="peer", limit=self.part(device, 1.0))
