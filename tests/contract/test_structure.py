"""G5, G7 and what a module of PyTorch is expected to do: devices, dtypes, copies, construction, clear errors."""

from __future__ import annotations

import copy

import pytest
import torch

from seqzoo import create, fork, list_mixers, parameter_groups
from seqzoo.kernels import dispatch
from seqzoo.kernels.dispatch import implementation
from seqzoo.mixer import registration
from seqzoo.testing import (
    FEW_LENGTHS,
    OP_CASES,
    SPEAKERS,
    Subject,
    boundaries,
    differentiable,
    excess,
    fourier_leak,
    inputs,
    parameters_of,
    random_state,
)


def test_same_bits_twice(subject: Subject, dtype, device):
    torch.use_deterministic_algorithms(False)
    mixer = subject.make(dtype, device)
    x = inputs((1, sum(FEW_LENGTHS), 16), dtype, device).requires_grad_()
    results = []
    for _ in range(2):
        y, _ = mixer(x, cu_seqlens=boundaries(FEW_LENGTHS).to(device))
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *mixer.parameters()])])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_gradient_reaches_every_parameter_and_the_initial_state(subject: Subject, dtype, device):
    mixer = subject.make(dtype, device)
    x = inputs((2, 6, 16), dtype, device).requires_grad_()
    sources = {"x": x} | parameters_of(mixer)
    state = None
    if "state" not in mixer.limits:
        state = random_state(mixer, 2, x)
        sources |= {key: value.requires_grad_() for key, value in state.items() if differentiable(value)}
    y, final = mixer(x, state, return_state=state is not None)
    # not every tensor of a state shows in every output: mLSTM's sum of keys does where it exceeds a bound
    loss = y.square().sum() + sum(v.abs().square().sum() for v in (final or {}).values() if differentiable(v))
    for (name, source), gradient in zip(
        sources.items(), torch.autograd.grad(loss, list(sources.values())), strict=True
    ):
        assert torch.isfinite(gradient).all(), name
        assert gradient.abs().max() > 0, name
        assert gradient.shape == source.shape


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(subject: Subject, device, half):
    mixer, wide = subject.make(half, device), subject.make(torch.float32, device)
    wide.load_state_dict(mixer.state_dict())
    x = inputs((2, 40, 16), half, device)
    y, _ = mixer(x)
    assert y.dtype == half
    expected, _ = wide(x.float())
    assert (y.float() - expected).abs().max() <= 8 * torch.finfo(half).eps * expected.abs().max()
    if "state" not in mixer.limits:
        _, state = mixer(x, return_state=True)
        assert {key: value.dtype for key, value in state.items()} == {
            key: kind for key, (_, kind) in mixer.state_spec(2, half).items()
        }


def test_autocast(subject: Subject, device):
    mixer = subject.make(torch.float32, device)
    x = inputs((2, 40, 16), torch.float32, device).requires_grad_()
    with torch.autocast(device.type, torch.bfloat16):
        y, _ = mixer(x)
        state = None if "state" in mixer.limits else mixer(x, return_state=True)[1]
    assert all(value.dtype != torch.bfloat16 for value in (state or {}).values() if value.is_floating_point())
    expected, _ = mixer(x)
    assert (y.float() - expected).abs().max() <= 8 * torch.finfo(torch.bfloat16).eps * expected.abs().max()
    gradients = torch.autograd.grad(y.float().square().sum(), [x, *mixer.parameters()])
    assert all(torch.isfinite(gradient).all() and gradient.dtype == torch.float32 for gradient in gradients)


def test_agrees_with_the_reference_in_float32(subject: Subject, device):
    x = inputs((2, 70, 16), torch.float32, device)
    mixer = subject.make(torch.float32, device)
    actual = mixer(x)[0].cpu()
    with_reference = {}
    for dtype in (torch.float32, torch.float64):
        from seqzoo.ops import backend

        with backend("reference"):
            with_reference[dtype] = subject.make(dtype)(x.cpu().to(dtype))[0]
    leak = fourier_leak(mixer, x, roundings=24)
    assert excess(actual, with_reference[torch.float32], with_reference[torch.float64], leak) <= 1


def test_copies_and_state_dicts(subject: Subject, device):
    mixer = subject.make(torch.float32, device)
    x = inputs((2, 6, 16), torch.float32, device)
    expected = mixer(x)[0]
    assert torch.equal(copy.deepcopy(mixer)(x)[0], expected)
    other = subject.build().to(device)
    other.load_state_dict(mixer.state_dict(), strict=True)
    assert torch.equal(other(x)[0], expected)
    assert not any(p.is_complex() for p in mixer.state_dict().values())


def test_meta_construction(subject: Subject, device):
    with torch.device("meta"):
        mixer = subject.build()
    assert all(p.is_meta for p in mixer.state_dict().values())
    mixer.to_empty(device=device)
    torch.manual_seed(0)
    mixer.reset_parameters()
    assert all(torch.isfinite(p).all() for p in mixer.state_dict().values())
    torch.manual_seed(0)
    again = subject.build().to(device)
    torch.manual_seed(0)
    again.reset_parameters()
    for name, value in mixer.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_the_constructor_initialises(subject: Subject):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        mixer = subject.build()
    constant = {name for name, value in mixer.state_dict().items() if value.unique().numel() == 1}
    values = {name: mixer.state_dict()[name].clone() for name in constant}
    mixer.reset_parameters()
    again = mixer.state_dict()
    assert constant == {name for name, value in again.items() if value.unique().numel() == 1}
    assert all(torch.equal(again[name], value) for name, value in values.items())


def test_dtype_follows_double_and_spares_fp32_parameters(subject: Subject):
    mixer = subject.make(torch.float32)
    kept = set(mixer.fp32_parameters)
    for name, parameter in mixer.to(torch.bfloat16).named_parameters():
        assert parameter.dtype == (torch.float32 if name in kept else torch.bfloat16), name
    assert all(p.dtype == torch.float64 for p in mixer.double().parameters())


def test_state_size_is_what_a_state_holds(subject: Subject):
    mixer = subject.make(torch.float32)
    if "state" in mixer.limits:
        assert mixer.state_size(9) == 0
        return
    _, state = mixer(inputs((1, 9, 16), torch.float32), return_state=True)
    assert mixer.state_size(9) == sum(value.numel() for value in state.values())
    # what is kept and saved is the state, not a tensor of all tokens of which it is a part
    storages = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in state.values()}
    assert sum(storages.values()) == sum(value.nbytes for value in state.values())
    assert mixer.flops(20) > mixer.flops(10) > 0


def test_states_are_data(subject: Subject):
    mixer = subject.make(torch.float64)
    if "state" in mixer.limits:
        pytest.skip("test_limits asserts the error")
    x = inputs((3, 6, 16), torch.float64)
    _y, state = mixer(x[:, :4], return_state=True)
    order = torch.tensor([2, 0, 1])
    turned, _ = mixer(x[order, 4:], {key: value[order] for key, value in state.items()})
    torch.testing.assert_close(turned, mixer(x[:, 4:], state)[0][order])
    twice, _ = mixer(x[:, 4:].repeat_interleave(2, 0), fork(state, 2))
    torch.testing.assert_close(twice[::2], mixer(x[:, 4:], state)[0])


def test_auxiliary_loss(subject: Subject):
    mixer = subject.make(torch.float32)
    x = inputs((1, sum(FEW_LENGTHS), 16), torch.float32)
    *_, loss = mixer(x, return_auxiliary=True)
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)
    *_, packed = mixer(x, cu_seqlens=boundaries(FEW_LENGTHS), return_auxiliary=True)
    alone = [
        (mixer(one, return_auxiliary=True)[2], one.shape[1]) for one in x.split(FEW_LENGTHS, dim=1) if one.shape[1]
    ]
    # a mean over tokens, whatever the lengths
    torch.testing.assert_close(packed, sum(loss * length for loss, length in alone) / x.shape[1])


def test_parameter_options_name_parameters(subject: Subject):
    mixer = subject.make(torch.float32)
    groups = parameter_groups(mixer, 1e-3, 0.1)
    assert sum(len(group["params"]) for group in groups) == len(list(mixer.parameters()))


@pytest.mark.parametrize("name", list_mixers())
def test_every_mixer_builds_at_any_width_divisible_by_16(name: str):
    for width in (16, 48, 80, 208):
        mixer = create(name, d_model=width)
        mixer.reset_parameters()
        assert mixer(inputs((1, 3, width), torch.float32))[0].shape == (1, 3, width)


@pytest.mark.parametrize("op", [op for op in OP_CASES if hasattr(torch.ops.seqzoo, f"{op}_forward")])
def test_a_mixer_speaks_for_every_op(op: str, monkeypatch):
    called = set()
    monkeypatch.setattr(
        dispatch, "implementation", lambda name, backend: called.add(name) or implementation(name, backend)
    )
    create(SPEAKERS[op], d_model=16)(inputs((1, 3, 16), torch.float32))
    assert op in called


@pytest.mark.parametrize("name", list_mixers())
def test_every_mixer_names_its_paper(name: str):
    entry = registration(name)
    assert entry.paper
    assert entry.year > 1980
    assert entry.mixer.__doc__
    assert entry.arxiv == "" or f"arxiv.org/abs/{entry.arxiv}" in entry.mixer.__doc__


def test_bad_input(subject: Subject):
    mixer = subject.make(torch.float32)
    x = inputs((2, 4, 16), torch.float32)
    one = x[:1]
    name = type(mixer).__name__
    calls = [
        (lambda: mixer(x[0]), ValueError, rf"input of {name} must have shape \(B, T, D\) with D = 16, got \(4, 16\)"),
        (lambda: mixer(x[..., :15]), ValueError, r"D = 16, got \(2, 4, 15\)"),
        (lambda: mixer(x.double()), TypeError, r"the input is torch.float64, the parameters of .* torch.float32"),
        (lambda: mixer(x.to("meta")), ValueError, r"the input is on meta, .* on cpu"),
        (lambda: mixer([1.0]), TypeError, r"must be a Tensor, got list"),
        (lambda: mixer(x, cu_seqlens=boundaries([4])), ValueError, r"batch of 1, got a batch of 2"),
        (lambda: mixer(one, cu_seqlens=boundaries([3])), ValueError, r"end at the number of tokens, 4, got 3"),
        (lambda: mixer(one, cu_seqlens=boundaries([5, -1])), ValueError, r"must not descend, got 5 then 4"),
        (lambda: mixer(one, cu_seqlens=boundaries([4]).long()), TypeError, r"must be int32, got torch.int64"),
        (lambda: mixer(one, cu_seqlens=boundaries([4])[:1]), ValueError, r"at least 2 entries, got shape \(1,\)"),
    ]
    for call, error, words in calls:
        with pytest.raises(error, match=words):
            call()


def test_bad_states(subject: Subject):
    mixer = subject.make(torch.float32)
    if "state" in mixer.limits:
        pytest.skip("test_limits asserts the error")
    x = inputs((2, 4, 16), torch.float32)
    state = random_state(mixer, 2, x)
    key = next(iter(state))
    name = type(mixer).__name__
    for wrong, error, words in (
        ({}, ValueError, f"a state of {name} has the keys"),
        (state | {"foreign": x}, ValueError, "foreign"),
        ({k: v[:1] for k, v in state.items()}, ValueError, rf"state\['{key}'\] of {name} must have shape .* got \(1,"),
        (
            {k: v.to(torch.complex128 if v.is_complex() else torch.float16) for k, v in state.items()},
            TypeError,
            "got torch",
        ),
        ({k: v.to("meta") for k, v in state.items()}, ValueError, "is on meta, the input on cpu"),
        ([state], TypeError, "dict of Tensors, got list"),
    ):
        with pytest.raises(error, match=words):
            mixer(x, wrong)
        with pytest.raises(error, match=words):
            mixer.step(x[:, 0], wrong)
