"""Norms, MLPs and the chunked cross entropy."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from seqzoo import ops
from seqzoo.modules.linear_cross_entropy import _op, linear_cross_entropy
from seqzoo.modules.mlp import GatedMLP, hidden_units
from seqzoo.modules.norm import NORMS, BatchNorm, RMSNorm


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_rms_norm_computes_in_at_least_float32(dtype: torch.dtype):
    norm = RMSNorm(64).to(dtype)
    # squares of these leave float16's range
    x = (torch.randn(5, 7, 64, generator=torch.Generator().manual_seed(0)) * 300).to(dtype)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, 64))
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight.double()
    torch.testing.assert_close(norm(x).double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_batch_norm_normalises_over_batch_and_time():
    x = torch.randn(3, 5, 8, dtype=torch.float64) * 4 + 1
    y = BatchNorm(8).double()(x)
    torch.testing.assert_close(y.mean((0, 1)), torch.zeros(8, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(y.var((0, 1), unbiased=False), torch.ones(8, dtype=torch.float64), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", NORMS)
def test_norms_initialise_from_the_meta_device(name: str):
    with torch.device("meta"):
        norm = NORMS[name](8)
    norm.to_empty(device="cpu")
    norm.reset_parameters()
    assert torch.equal(norm.weight, torch.ones(8))


@pytest.mark.parametrize("name", NORMS)
def test_norms_have_the_epsilon_and_answer_in_their_own_dtype(name: str):
    x = torch.full((1, 2, 8), 1e-3, dtype=torch.float64)
    x[..., ::2] *= -1
    x[:, 1] *= -1
    for eps in (1e-5, 1e-6):
        norm = NORMS[name](8, eps).double()
        # mean 0 and mean square 1e-6, over the features as over the tokens
        torch.testing.assert_close(norm(x).abs(), torch.full_like(x, 1e-3 * (1e-6 + eps) ** -0.5))
    assert NORMS[name](8).bfloat16()(x.float()).dtype == torch.bfloat16


def test_hidden_units_are_rounded_up():
    assert hidden_units(256, 8 / 3) == 688
    assert hidden_units(16, 0.01) == 16
    assert GatedMLP(16, 48).in_proj.out_features == 96
    with pytest.raises(ValueError, match="hidden must be at least 1, got 0"):
        GatedMLP(16, 0)


@pytest.fixture
def case() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(29, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(13, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(13, (29,), generator=generator)
    labels[[0, 7, 28]] = -100
    return x, weight, labels


@pytest.mark.parametrize("chunk_size", [1, 4, 29, 1000, None])
def test_cross_entropy_in_chunks(case: tuple[torch.Tensor, ...], chunk_size: int | None):
    x, weight, labels = case
    loss = linear_cross_entropy(x, weight, labels, chunk_size)
    expected = F.cross_entropy(F.linear(x, weight), labels)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    # a factor on the loss reaches the gradients
    got = torch.autograd.grad(3 * loss, (x, weight))
    for one, other in zip(got, torch.autograd.grad(3 * expected, (x, weight)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("frozen", [0, 1])
def test_cross_entropy_with_one_gradient(case: tuple[torch.Tensor, ...], frozen: int):
    tensors = [one.detach().requires_grad_(index != frozen) for index, one in enumerate(case[:2])]
    (got,) = torch.autograd.grad(linear_cross_entropy(*tensors, case[2], 5), tensors[1 - frozen])
    expected = F.cross_entropy(F.linear(*tensors), case[2])
    torch.testing.assert_close(got, torch.autograd.grad(expected, tensors[1 - frozen])[0], rtol=1e-12, atol=1e-15)


def test_cross_entropy_where_nothing_counts(case: tuple[torch.Tensor, ...]):
    x, weight, labels = case
    loss = linear_cross_entropy(x, weight, torch.full_like(labels, -100), 4)
    assert loss.item() == 0.0
    assert all(not gradient.any() for gradient in torch.autograd.grad(loss, (x, weight)))
    assert linear_cross_entropy(x[:0], weight, labels[:0]).item() == 0.0


def test_cross_entropy_of_half_precision():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 16, generator=generator).half().requires_grad_()
    weight = torch.randn(40, 16, generator=generator).half().requires_grad_()
    labels = torch.randint(40, (300,), generator=generator)
    # a loss scale as trainers use it: unscaled, these gradients would partly vanish in float16
    loss = linear_cross_entropy(x, weight, labels, 64)
    assert loss.dtype == torch.float32
    got = torch.autograd.grad(loss * 2.0**12, (x, weight))
    wide = [one.detach().double().requires_grad_() for one in (x, weight)]
    reference = F.cross_entropy(F.linear(*wide), labels)
    assert abs(loss.item() - reference.item()) < 1e-2 * reference.item()
    for one, other in zip(got, torch.autograd.grad(reference * 2.0**12, wide), strict=True):
        assert one.dtype == torch.float16
        # logits are rounded to float16 before the softmax, gradients of the logits after it
        assert (one.double() - other).norm() < 8 * torch.finfo(torch.float16).eps * other.norm()


def test_cross_entropy_refuses(case: tuple[torch.Tensor, ...]):
    x, weight, labels = case
    for size in (0, 2.5, True):
        with pytest.raises(ValueError, match=f"chunk_size must be a positive integer, got {size}"):
            linear_cross_entropy(x, weight, labels, size)  # pyright: ignore - that is refused
    for wrong in (13, -1):
        with pytest.raises(ValueError, match=f"between 0 and 12, or be -100, got {wrong}"):
            linear_cross_entropy(x, weight, labels.clamp(min=0).index_fill(0, torch.tensor([4]), wrong))
    loss = linear_cross_entropy(x, weight, labels)
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(gradient.sum(), weight)


def test_cross_entropy_of_the_reference_has_second_derivatives(case: tuple[torch.Tensor, ...]):
    x, weight, labels = case
    # three tokens of two features, a vocabulary of three
    labels = labels[:3].clamp(max=2)
    with ops.backend("reference"):
        assert torch.autograd.gradgradcheck(
            lambda *one: linear_cross_entropy(*one, labels),
            [one.detach()[:3, :2].requires_grad_() for one in (x, weight)],
        )


def test_cross_entropy_never_holds_all_logits(monkeypatch: pytest.MonkeyPatch, case: tuple[torch.Tensor, ...]):
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    x, weight, labels = case
    with Watch():
        linear_cross_entropy(x, weight, labels, 4).backward()
    assert largest <= max(4 * 13, x.numel(), weight.numel())


def test_cross_entropy_is_a_proper_operator(case: tuple[torch.Tensor, ...]):
    x, weight, labels = (one.detach() for one in case)
    for wanted in ((True, True), (False, True), (False, False)):
        torch.library.opcheck(_op, (x, weight, labels.clamp(min=0), 4, *wanted))
