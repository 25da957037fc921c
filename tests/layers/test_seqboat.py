"""SeqBoat: the compacted form against a dense one, its moving average, what it costs and what it learns."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from seqzoo import Packing, create
from seqzoo.modules.compaction import Compaction
from seqzoo.testing import inputs


def build(**options) -> torch.nn.Module:
    torch.manual_seed(0)
    mixer = create("seqboat", d_model=16, **{"window": 4, "d_state": 3, "key_dim": 8, **options}).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return mixer


def attend_densely(mixer, m: torch.Tensor, active: torch.Tensor) -> torch.Tensor:
    """Gated attention of all tokens, masked: the order of active tokens says how far apart they are."""
    z, r, v = F.silu(mixer.a_proj(m)).split((mixer.key_dim, mixer.width, mixer.width), -1)
    q, k = (z * mixer.scale[index] + mixer.shift[index] for index in range(2))
    order = active.cumsum(1)
    gaps = order[:, :, None] - order[:, None]
    seen = active[:, None] & (gaps >= 0) & (gaps < mixer.window)
    seen = seen & torch.ones(m.shape[1], m.shape[1]).tril().bool()
    scores = torch.where(seen, q @ k.mT * mixer.key_dim**-0.5, -torch.inf)
    weights = torch.where(active[..., None], scores, 0.0).softmax(-1)
    return torch.where(active[..., None], mixer.h_proj((weights @ v) * r), 0.0)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.7, 1.0])
def test_compaction_is_the_masked_dense_form(share):
    mixer = build()
    m = inputs((3, 40, 16), torch.float64).requires_grad_()
    active = torch.rand(3, 40, generator=torch.Generator().manual_seed(1)) < share
    results = []
    for h in (mixer.attend(m, active, None, None, False)[0], attend_densely(mixer, m, active)):
        loss = (h * inputs((3, 40, 16), torch.float64, seed=5)).sum()
        sources = [m, *mixer.a_proj.parameters(), mixer.scale, mixer.shift, mixer.h_proj.weight]
        results.append([h, *torch.autograd.grad(loss, sources, allow_unused=True, materialize_grads=True)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_the_moving_average_is_megas():
    mixer = build()
    x = inputs((1, 12, 16), torch.float64)
    a, d = mixer.alpha.sigmoid(), mixer.delta.sigmoid()
    h, expected = torch.zeros(16, 3).double(), []
    for token in x[0]:
        h = (1 - a * d) * h + a * mixer.beta * token[:, None]
        expected.append(F.silu((mixer.gamma * h).sum(1) / 3**0.5 + mixer.omega * token))
    m, after = mixer.average(x, None, None)
    torch.testing.assert_close(m[0], torch.stack(expected))
    torch.testing.assert_close(after[0], h)


def test_nobody_is_active():
    mixer = build()
    with torch.no_grad():
        mixer.m_proj.weight[:2].zero_()
        mixer.m_proj.bias[:2].copy_(torch.tensor([1.0, -1.0]))
    x = inputs((2, 9, 16), torch.float64).requires_grad_()
    y, state = mixer(x, return_state=True)
    m, _ = mixer.average(x, None, None)
    torch.testing.assert_close(y, mixer.out_proj(F.silu(mixer.m_proj(m)[..., 2:] + x)))
    assert state["length"].tolist() == [0, 0]
    assert not state["k"].any()
    assert torch.isfinite(torch.autograd.grad(y.sum(), x)[0]).all()


def test_a_batch_of_no_sequences():
    mixer = build()
    for total in (0, 5):
        x = inputs((0, total, 16), torch.float64).requires_grad_()
        y, state = mixer(x, return_state=True)
        y, state = mixer(y, state, return_state=True)
        assert y.shape == (0, total, 16)
        assert mixer.step(x.new_zeros(0, 16), state)[0].shape == (0, 16)
        y.sum().backward()


def test_only_active_tokens_are_projected():
    mixer = build()
    rows = []
    mixer.a_proj.register_forward_hook(lambda _, given, out: rows.append(out.shape[1]))
    active = torch.zeros(2, 30, dtype=torch.bool)
    active[0, 3] = active[1, :5] = True
    mixer.attend(inputs((2, 30, 16), torch.float64), active, None, None, False)
    assert rows == [6]


@pytest.mark.parametrize("temperature", [0.1, 3.0])
def test_the_weight_is_a_probability_at_the_temperature(temperature):
    mixer = build(temperature=temperature)
    x = inputs((2, 12, 16), torch.float64)
    m, _ = mixer.average(x, None, None)
    logits, skip = mixer.m_proj(m).split((2, 16), -1)
    probabilities = (logits / mixer.log_temperature.exp()).softmax(-1)
    active = probabilities.argmax(-1) == 1
    assert active.any()
    h = attend_densely(mixer, m, active)
    expected = mixer.out_proj(F.silu(skip + probabilities[..., 1:] * h + x))
    torch.testing.assert_close(mixer(x)[0], expected)


def test_the_window_reaches_back_over_what_is_not_active():
    mixer = build()
    m = inputs((1, 200, 16), torch.float64)
    active = torch.zeros(1, 200, dtype=torch.bool)
    active[0, [2, 150, 170, 199]] = True
    changed = m.clone()
    changed[0, 2] += 1
    before, after = (mixer.attend(value, active, None, None, False)[0] for value in (m, changed))
    moved = (before != after).any(-1)[0].nonzero().flatten().tolist()
    assert moved == [2, 150, 170, 199]


def test_the_router_learns():
    mixer = build()
    x = inputs((2, 30, 16), torch.float64)
    y, _ = mixer(x)
    gradient, temperature = torch.autograd.grad(y.square().sum(), [mixer.m_proj.weight, mixer.log_temperature])
    assert gradient[:2].abs().max() > 0
    assert temperature.abs() > 0


def test_compaction_keeps_rows_and_time_apart():
    active = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 1]]).bool()
    found = Compaction.of(active, None)
    assert found.order.tolist() == [1, 2, 4, 7]
    assert found.packing.cu_seqlens.tolist() == [0, 2, 4]
    x = inputs((2, 4, 3), torch.float64)
    assert torch.equal(found.scatter(found.gather(x), active), torch.where(active[..., None], x, 0))
    packed = Compaction.of(active.view(1, 8), Packing.from_lengths([3, 0, 5]))
    assert packed.packing.cu_seqlens.tolist() == [0, 2, 2, 4]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"window": 0}, "window must be a positive integer, got 0"),
        ({"d_state": -1}, "d_state must be a positive integer, got -1"),
        ({"temperature": 0}, "temperature must be a finite number greater than 0, got 0"),
        ({"expand": 0.3}, r"expand \* d_model must be a positive integer"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ValueError, match=words):
        build(**options)
