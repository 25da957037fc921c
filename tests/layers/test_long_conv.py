"""LongConv against the sum that it stands for, token by token too; its schedule's cost; its kernels."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from seqzoo import create, fork
from seqzoo.layers import Bidirectional, LongConv
from seqzoo.models import LanguageModel, ModelConfig, generate
from seqzoo.modules import future_fill
from seqzoo.testing import boundaries, fourier_leak, inputs

WIDTH, LENGTH = 16, 300
OPTIONS = ({}, {"chunk_size": 1}, {"chunk_size": 8, "squash": 0.01}, {"chunk_size": 16, "kernel": "implicit"})


def build(**options) -> LongConv:
    """A convolution in float64, without a map."""
    torch.manual_seed(0)
    return LongConv(WIDTH, **({"kernel_length": LENGTH, "output": "none"} | options)).double()


def direct(mixer: LongConv, x: Tensor) -> Tensor:
    """``y_t = sum_{s <= t} k_{t - s} u_s + D u_t``."""
    taps = mixer.kernel(x.shape[1])
    sums = [(x[:, : t + 1] * taps[:, : t + 1].flip(1).t()).sum(1) for t in range(x.shape[1])]
    return torch.stack(sums, 1) + mixer.D * x


def stepped(mixer: LongConv, x: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    outputs = []
    for token in x.unbind(1):
        y, state = mixer.step(token, state)
        outputs.append(y)
    return torch.stack(outputs, 1), state


def equal(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@torch.no_grad()
def test_every_step_is_the_direct_sum(options: dict):
    mixer, x = build(**options), inputs((2, LENGTH, WIDTH), torch.float64)
    expected = direct(mixer, x)
    equal(mixer(x)[0], expected)
    equal(stepped(mixer, x, mixer.init_state(2))[0], expected)
    for prompt in (1, 64, 143):
        y, state = mixer(x[:, :prompt], return_state=True)
        equal(y, expected[:, :prompt])
        y, state = stepped(mixer, x[:, prompt:], state)
        equal(y, expected[:, prompt:])
        for key, value in mixer(x, return_state=True)[1].items():
            equal(state[key], value)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@torch.no_grad()
def test_rows_of_unequal_lengths(options: dict):
    mixer, lengths, more = build(**options), [70, 3, 0, 128, 64], 140
    prompts = inputs((1, sum(lengths), WIDTH), torch.float64)
    later = inputs((len(lengths), more, WIDTH), torch.float64, seed=7)
    y, state = mixer(prompts, cu_seqlens=boundaries(lengths), return_state=True)
    whole = [torch.cat((one, rest[None]), 1) for one, rest in zip(prompts.split(lengths, 1), later, strict=True)]
    expected = [direct(mixer, one) for one in whole]
    equal(y, torch.cat([one[:, :length] for one, length in zip(expected, lengths, strict=True)], 1))
    afterwards = torch.cat([one[:, length:] for one, length in zip(expected, lengths, strict=True)])
    piece, _ = mixer(later, state, return_state=True)
    equal(piece, afterwards)
    equal(stepped(mixer, later, state)[0], afterwards)


@torch.no_grad()
def test_a_forked_state_continues_several_times():
    mixer, x = build(chunk_size=4), inputs((3, 100, WIDTH), torch.float64)
    x[1:, :50] = x[0, :50]
    _, state = mixer(x[:1, :50], return_state=True)
    copies = fork(state, 2)
    equal(stepped(mixer, x[:1, 50:], state)[0], direct(mixer, x)[:1, 50:])
    equal(stepped(mixer, x[1:, 50:], copies)[0], direct(mixer, x)[1:, 50:])


def test_a_step_consumes_its_state_only_without_gradients():
    mixer, x = build(chunk_size=1), inputs((1, 4, WIDTH), torch.float64)
    _, state = mixer(x, return_state=True)
    state = {key: value.detach() for key, value in state.items()}
    kept = fork(state, 1)
    _, after = mixer.step(x[:, 0], state)
    assert all(torch.equal(state[key], kept[key]) for key in state)
    assert not any(after[key] is state[key] for key in state)
    with torch.no_grad():
        _, after = mixer.step(x[:, 0], state)
    assert all(after[key] is state[key] for key in state)
    with torch.inference_mode():
        _, state = mixer(x, return_state=True)
    with torch.no_grad():  # where what was made in inference mode must not be written to
        assert not mixer.step(x[:, 0], state)[1]["cache"].is_inference()


def test_compiled_steps_are_those_of_the_schedule():
    mixer, x = build(chunk_size=2, kernel_length=40), inputs((2, 40, WIDTH), torch.float64)
    step = torch.compile(mixer.step, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        lengths = boundaries([5, 2])
        _, state = mixer(x[:1, :7], cu_seqlens=lengths, return_state=True)
        other = fork(state, 1)
        for token in x[:, 7:].unbind(1):
            y, state = mixer.step(token, state)
            again, other = step(token, other)
            equal(again, y)
        for key, value in state.items():
            equal(other[key], value)


# -- what it costs --


def work(size: int) -> float:
    """Multiplications and additions of three real transforms of ``2 size`` positions and a product of spectra."""
    return 3 * 2.5 * 2 * size * math.log2(2 * size) + 8 * size


@pytest.mark.parametrize("chunk", [1, 64])
def test_the_schedule_grows_little_faster_than_the_sequence(monkeypatch, chunk: int):
    most = 32 * 1024
    mixer = LongConv(1, kernel_length=most, chunk_size=chunk, output="none")
    done = 0.0

    def ahead(u: Tensor, kernel: Tensor) -> Tensor:
        nonlocal done
        done += work(u.shape[1])
        return u.new_zeros(u.shape)

    monkeypatch.setattr(future_fill, "ahead", ahead)
    inside, outside = torch.zeros(1, most, 1), torch.zeros(1, most, 1)
    kernel, totals = torch.zeros(1, most), {}
    for count in range(1, most + 1):
        done += 2 * ((count - 1) % chunk + 1)
        future_fill.refill(inside, outside, [count], kernel, mixer.chunk_size)
        if count >= 1024 and count & (count - 1) == 0:
            totals[count] = done
    growth = [math.log2(totals[2 * count] / totals[count]) for count in totals if 2 * count in totals]
    assert max(growth) < 1.3
    assert totals[most] < 0.1 * most**2  # of the direct sum


def test_a_step_does_what_is_counted(monkeypatch):
    sizes, ahead = [], future_fill.ahead

    def counted(u: Tensor, kernel: Tensor) -> Tensor:
        sizes.append((u.shape[0], u.shape[1]))
        return ahead(u, kernel)

    monkeypatch.setattr(future_fill, "ahead", counted)
    mixer, x = build(chunk_size=2, kernel_length=16), inputs((3, 16, WIDTH), torch.float64)
    with torch.no_grad():
        stepped(mixer, x, mixer.init_state(3))
        assert sizes == [(3, size) for size in (2, 4, 2, 8, 2, 4, 2)]
        # rows of one size share a product
        _, state = mixer(x[:1, :12], cu_seqlens=boundaries([5, 1, 6]), return_state=True)
        sizes.clear()
        stepped(mixer, x[:, :3], state)
        assert sorted(sizes) == [(1, 4), (1, 8), (1, 8), (2, 2)]


# -- kernels --


def test_an_implicit_kernel_is_its_formula():
    mixer = build(kernel="implicit", filter_width=6, filter_bands=2, filter_frequency=3.0, kernel_length=20)
    first, second, last = mixer.filter.first, mixer.filter.second, mixer.filter.last
    taps = mixer.kernel(20)
    for lag in (0, 7, 19):
        turn = 2 * math.pi * lag / 20
        features = torch.tensor(
            [lag / 20, math.cos(turn), math.cos(2 * turn), math.sin(turn), math.sin(2 * turn)], dtype=torch.float64
        )
        values = torch.sin(3 * second(torch.sin(3 * first(features))))
        rates = mixer.log_rate.exp()
        window = (2 * rates / 20).sqrt() * torch.exp(-rates * lag / 20)
        torch.testing.assert_close(taps[:, lag], window * last(values))


@pytest.mark.parametrize("kernel", ["free", "implicit"])
def test_windows_fall_as_asked_and_kernels_keep_the_scale(kernel: str):
    torch.manual_seed(0)
    mixer = LongConv(64, kernel_length=2000, kernel=kernel, decay=(0.1, 0.8), output="none")
    taps = mixer.kernel(2000).detach()
    assert 0.1 < taps.square().sum(1).mean() < 2
    for channel, share in ((0, 0.1), (63, 0.8)):
        place = round(share * 2000)
        ends = taps[channel, :50].square().mean().sqrt(), taps[channel, place : place + 50].square().mean().sqrt()
        assert 0.002 < ends[1] / ends[0] < 0.05
    torch.testing.assert_close(mixer.kernel(700), taps[:, :700])


@pytest.mark.parametrize("kernel", ["free", "implicit"])
def test_it_learns_to_look_back(kernel: str):
    torch.manual_seed(0)
    mixer = LongConv(WIDTH, kernel_length=64, kernel=kernel, filter_width=16, decay=(0.3, 1.5))
    optimiser = torch.optim.Adam(mixer.parameters(), lr=5e-3)
    losses = []
    for _ in range(200):
        x = torch.randn(8, 64, WIDTH)
        loss = F.mse_loss(mixer(x)[0][:, 5:], x[:, :-5])  # 1 where nothing is learned
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) / 10 < 0.6


@pytest.mark.parametrize("kernel", ["free", "implicit"])
def test_bfloat16(kernel: str):
    torch.manual_seed(0)
    mixer = LongConv(WIDTH, kernel_length=200, kernel=kernel, chunk_size=8).to(torch.bfloat16)
    wide = LongConv(WIDTH, kernel_length=200, kernel=kernel, chunk_size=8)
    wide.load_state_dict(mixer.state_dict())
    x = inputs((2, 200, WIDTH), torch.bfloat16)
    with torch.no_grad():
        expected, y = wide(x.float())[0], mixer(x)[0]
        first, state = mixer(x[:, :100], return_state=True)
        assert state["inputs"].dtype == torch.bfloat16
        assert state["cache"].dtype == torch.float32
        rest, _ = stepped(mixer, x[:, 100:], state)
    tolerance = 8 * torch.finfo(torch.bfloat16).eps * expected.abs().max()
    assert y.dtype == rest.dtype == torch.bfloat16
    assert (y - expected).abs().max() <= tolerance
    assert (torch.cat((first, rest), 1) - expected).abs().max() <= tolerance


def test_two_directions_are_one_convolution():
    mixer = Bidirectional(build(), build())
    x = inputs((2, 50, WIDTH), torch.float64)
    there, back = direct(mixer.mixer, x), direct(mixer.mixer_reverse, x.flip(1)).flip(1)
    equal(mixer(x)[0], there + back)
    packed = inputs((1, 50, WIDTH), torch.float64)
    y, _ = mixer(packed, cu_seqlens=boundaries([20, 0, 30]))
    alone = [mixer(one)[0] for one in packed.split([20, 30], 1)]
    equal(y, torch.cat(alone, 1))


def test_the_leak_is_small_and_is_there():
    mixer, x = create("long_conv", d_model=WIDTH), inputs((2, 256, WIDTH), torch.float32)
    changed = x.clone()
    changed[:, 128:] *= -1
    moved = (mixer(x)[0] - mixer(changed)[0])[:, :128].abs().max().item()
    assert 0 < moved <= fourier_leak(mixer, x) < 1e-2
    assert fourier_leak(create("min_gru", d_model=WIDTH), x) == 0


# -- a model of it --


def test_generation_is_reading_the_whole_sequence_again():
    torch.manual_seed(0)
    options = {"name": "long_conv", "kernel_length": 96, "chunk_size": 4}
    patterns = [options, options | {"kernel": "implicit"}]
    model = LanguageModel(ModelConfig(vocab_size=23, d_model=WIDTH, n_layers=2, pattern=patterns)).double().eval()
    with torch.no_grad():
        model.embedding.weight.mul_(20)  # far from ties
    prompts = [torch.randint(23, (length,)) for length in (30, 1, 8)]
    new = generate(model, prompts, max_new_tokens=60, temperature=0)
    for row, prompt in enumerate(prompts):
        read = torch.cat((prompt, new[row]))[None]
        logits, _ = model(read)
        assert torch.equal(logits[0, len(prompt) - 1 : -1].argmax(-1), new[row])


# -- what it refuses --


def test_sequences_that_are_too_long():
    mixer = build(kernel_length=10)
    words = r"a sequence has 11 tokens .*, LongConv has kernel_length=10; build it with a greater kernel_length"
    x = inputs((1, 11, WIDTH), torch.float64)
    _, state = mixer(x[:, :10], return_state=True)
    calls = (
        lambda: mixer(x),
        lambda: mixer(x, return_state=True),
        lambda: mixer(x[:, :1], state),
        lambda: mixer.step(x[:, 0], state),
        lambda: mixer(torch.cat((x, x), 1), cu_seqlens=boundaries([4, 11, 7])),
        lambda: Bidirectional(mixer)(x),
    )
    for call in calls:
        with pytest.raises(ValueError, match=words):
            call()
    assert mixer(torch.cat((x, x), 1), cu_seqlens=boundaries([10, 10, 2]))[0].shape == (1, 22, WIDTH)


def test_compiled_sequences_that_are_too_long():
    mixer = build(kernel_length=10)
    x = inputs((1, 11, WIDTH), torch.float64)
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager", dynamic=True)
    for bounds in (None, boundaries([0, 11])):
        with pytest.raises(RuntimeError, match="a sequence is longer than LongConv's kernel_length=10"):
            compiled(x, cu_seqlens=bounds)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kernel": "dense"}, "kernel must be free or implicit, got 'dense'"),
        ({"kernel_length": 0}, "kernel_length must be a positive integer, got 0"),
        ({"chunk_size": 12}, "chunk_size must be a power of two, got 12"),
        ({"output": "relu"}, "output must be glu or none, got 'relu'"),
        ({"decay": (0.3, 0.0)}, "decay must be a finite number greater than 0"),
        ({"squash": -1.0}, "squash must not be negative, got -1.0"),
        ({"squash": 0.1, "kernel": "implicit"}, "squash moves the values of a free kernel"),
        ({"filter_width": 0}, "filter_width must be a positive integer"),
    ],
)
def test_bad_options(options: dict, words: str):
    with pytest.raises(ValueError, match=words):
        LongConv(WIDTH, **options)


def test_state_size():
    mixer = LongConv(WIDTH, kernel_length=100)
    assert mixer.state_size(7) == mixer.state_size(100) == 2 * 100 * WIDTH + 1
    assert mixer.state_size(7) == sum(value.numel() for value in mixer.init_state(1).values())
    assert mixer.parameter_options()["taps"] == {"weight_decay": 0.0}
