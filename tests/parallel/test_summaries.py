"""Summaries against the ops that they sum up, without ranks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from seqzoo.kernels.dispatch import backend
from seqzoo.parallel.summaries import (
    CausalConv,
    DeltaRule,
    GatedScan,
    LinearAttention,
    LinearScan,
    SelectiveScan,
    SsmScan,
    Summary,
)

B, T, D = 2, 21, 6
TOLERANCE = 1e-12


def drawn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype)


def linear_scan(complex_: bool, timed: bool) -> Summary:
    kind = torch.complex128 if complex_ else torch.float64
    a = drawn(B, T, D, dtype=kind) if timed else drawn(D, dtype=kind)
    a = 1.2 * a / (1 + a.abs())
    if timed:
        # a reset, which has no logarithm
        a[:, T // 3, :2] = 0
    else:
        a[0] = 0
    return LinearScan({"b": drawn(B, T, D, dtype=kind), "a": a})


def gated_scan(cell: str) -> Summary:
    return GatedScan({"x": drawn(B, T, (2 if cell == "min_gru" else 3) * D)}, cell=cell, gate_range=(-1.0, 1.0))


def causal_conv(taps: int, activation: str | None) -> Summary:
    return CausalConv({"x": drawn(B, T, D), "weight": drawn(D, taps), "bias": drawn(D)}, activation=activation)


def selective_scan(transition: str, groups: int, complex_: bool = False) -> Summary:
    size, kind = 3, torch.complex128 if complex_ else torch.float64
    shape = (B, T, size) if groups == 0 else (B, T, groups, size)
    A = None if transition == "longhorn" else torch.complex(-torch.rand(D, size).double(), drawn(D, size))
    if A is not None and not complex_:
        A = A.real.contiguous()
    tensors = {"u": drawn(B, T, D), "delta": drawn(B, T, D).abs(), "A": A, "B": drawn(*shape, dtype=kind)}
    tensors |= {"C": drawn(*shape, dtype=kind), "D": drawn(D), "z": drawn(B, T, D), "delta_bias": drawn(D).abs()}
    return SelectiveScan(tensors, transition=transition, delta_softplus=groups == 0)


def decays(kind: str, heads: int, size: int, strength: float = 0.1) -> Tensor | None:
    shapes = {"head": (heads,), "token": (B, T, heads), "key": (B, T, heads, size)}
    return None if kind == "none" else -strength * drawn(*shapes[kind]).abs()


def linear_attention(kind: str, groups: int, strength: float = 0.1) -> Summary:
    q, k = drawn(2, B, T, groups, 5).unbind(0)
    tensors = {"v": drawn(B, T, 4, 3), "q": q, "k": k, "log_decay": decays(kind, 4, 5, strength)}
    return LinearAttention(tensors, scale=None if groups == 4 else 0.3)


def delta_rule(kind: str, groups: int) -> Summary:
    q, k = drawn(2, B, T, groups, 5).unbind(0)
    k = torch.nn.functional.normalize(k, dim=-1)
    tensors = {"v": drawn(B, T, 4, 3), "q": q, "k": k, "beta": 2 * torch.rand(B, T, 4).double()}
    return DeltaRule({**tensors, "log_decay": decays(kind, 4, 5)}, scale=None if groups == 4 else 0.3)


def ssm_scan(low_rank: bool, pairs: bool) -> Summary:
    poles = torch.complex(-torch.rand(D, 2).double() - 0.1, drawn(D, 2))
    b, c, p, q = drawn(4, D, 2, dtype=torch.complex128).unbind(0)
    tensors = {"u": drawn(B, T, D), "poles": poles, "b": b, "c": c, "step": torch.rand(D).double() / 5 + 0.01}
    p, q = (0.1 * p, 0.1 * q) if low_rank else (None, None)
    options = {"discretisation": "bilinear" if low_rank else "zoh", "conjugate_pairs": pairs}
    return SsmScan({**tensors, "p": p, "q": q}, **options)


CASES: dict[str, Callable[[], Summary]] = {
    "linear_scan": lambda: linear_scan(False, True),
    "linear_scan complex": lambda: linear_scan(True, True),
    "linear_scan without time": lambda: linear_scan(False, False),
    "linear_scan complex without time": lambda: linear_scan(True, False),
    "min_gru": lambda: gated_scan("min_gru"),
    "min_lstm": lambda: gated_scan("min_lstm"),
    "causal_conv": lambda: causal_conv(4, "silu"),
    "causal_conv wide": lambda: causal_conv(8, None),
    "selective_scan": lambda: selective_scan("exponential", 0),
    "selective_scan groups": lambda: selective_scan("exponential", 2),
    "selective_scan complex": lambda: selective_scan("exponential", 0, True),
    "longhorn": lambda: selective_scan("longhorn", 0),
    **{
        f"linear_attention {kind} {groups}": lambda kind=kind, groups=groups: linear_attention(kind, groups)
        for kind in ("none", "head", "token", "key")
        for groups in (2, 4)
    },
    "linear_attention strong": lambda: linear_attention("key", 4, 50.0),
    **{
        f"delta_rule {kind} {groups}": lambda kind=kind, groups=groups: delta_rule(kind, groups)
        for kind, groups in (("none", 4), ("token", 2), ("key", 4))
    },
    "ssm_scan": lambda: ssm_scan(False, False),
    "ssm_scan pairs": lambda: ssm_scan(False, True),
    "ssm_scan low rank": lambda: ssm_scan(True, False),
    "ssm_scan low rank pairs": lambda: ssm_scan(True, True),
}


@pytest.fixture(params=CASES)
def summary(request: pytest.FixtureRequest) -> Summary:
    torch.manual_seed(0)
    return CASES[request.param]()


def random_state(summary: Summary) -> Tensor:
    shape, dtype = summary.shape()
    return drawn(summary.rows, *shape, dtype=dtype)


def close(found: Tensor, exact: Tensor, tolerance: float = TOLERANCE) -> bool:
    assert found.shape == exact.shape
    assert found.dtype == exact.dtype
    return bool((found - exact).abs().max() <= tolerance * exact.abs().max().clamp(min=1e-300))


def inner(a: Tensor, b: Tensor) -> Tensor:
    return (a.conj() * b).sum().real


# lengths of neighbouring shards, of none, one and several tokens, and more than a chunk of 64
SHARDS = [(1, 20), (7, 14), (20, 1)]


@pytest.mark.parametrize("shards", SHARDS, ids=str)
def test_a_state_is_affine_in_the_one_before(summary: Summary, shards: tuple[int, int]):
    given = random_state(summary)
    with backend("reference"):
        _, exact = summary.run(given, None)
    assert close(summary.state(given), exact)
    first, second = summary.part(slice(0, shards[0])), summary.part(slice(shards[0], None))
    between = first.apply(first.transition(), given) + first.state(None)
    assert close(second.apply(second.transition(), between) + second.state(None), exact)
    state, transition = second.pair()
    assert close(second.apply(transition, between) + state, exact)
    whole = summary.compose(second.transition(), first.transition())
    assert close(summary.apply(whole, given) + summary.state(None), exact)
    for other in (summary.compose(whole, summary.identity()), summary.compose(summary.identity(), whole)):
        assert close(summary.apply(other, given), summary.apply(whole, given))


def test_transitions_have_the_form_that_is_announced(summary: Summary):
    form, transition = summary.transition_form(), summary.transition()
    for value in (transition, summary.identity()):
        if form is None:
            assert isinstance(value, int)
        else:
            assert (tuple(value.shape), value.dtype) == ((B, *form[0]), form[1])
    assert summary.outputs().shape == summary.run(None, None)[0].shape


def test_the_adjoint_is_that_of_the_transition(summary: Summary):
    transition = summary.part(slice(0, 3)).transition()
    state, gradient = random_state(summary), random_state(summary)
    left = inner(gradient, summary.apply(transition, state))
    right = inner(summary.adjoint(transition, gradient), state)
    scale = gradient.abs().max() * summary.apply(transition, state).abs().sum()
    assert (left - right).abs() <= TOLERANCE * scale


@pytest.mark.parametrize("length", [1, 2, T])
def test_the_gradient_is_that_through_the_outputs(summary: Summary, length: int):
    part = summary.part(slice(0, length))
    given = random_state(summary).requires_grad_()
    with backend("reference"):
        o, _ = part.run(given, None)
    grad_o = drawn(*o.shape, dtype=o.dtype)
    (exact,) = torch.autograd.grad(o, given, grad_o)
    assert close(part.gradient(grad_o, given.detach()), exact)


def test_transitions_act_on_parts_of_a_state_alone(summary: Summary):
    state, transition = random_state(summary), summary.part(slice(0, 3)).transition()
    for act in ("apply", "adjoint"):
        whole = getattr(summary, act)(transition, state)
        size = state.shape[summary.axis]
        for place in (slice(0, 1), slice(1, size)):
            here = state.narrow(summary.axis, place.start, place.stop - place.start)
            exact = whole.narrow(summary.axis, place.start, place.stop - place.start)
            found = getattr(summary.narrowed(place), act)(summary.cut(transition, place), here)
            assert close(found, exact)


@pytest.mark.parametrize("name", ["ssm_scan", "ssm_scan low rank pairs", "selective_scan", "longhorn"])
def test_long_shards_are_summed_up_in_chunks(name: str, monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    # not a multiple of the chunk, and several of them
    monkeypatch.setitem(globals(), "T", 150)
    summary = CASES[name]()
    given = random_state(summary).requires_grad_()
    with backend("chunked"):
        o, _ = summary.run(given, None)
    grad_o = drawn(*o.shape)
    (exact,) = torch.autograd.grad(o, given, grad_o)
    assert close(summary.gradient(grad_o, given.detach()), exact)
