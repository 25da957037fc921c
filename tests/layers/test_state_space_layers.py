"""S4, S4D, DSS, S5 and LRU against dense state spaces, SciPy and each other; what they begin with; what they learn."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from seqzoo import create
from seqzoo.kernels.ssm_kernel.discretise import LowRankSteps
from seqzoo.layers import DSS, LRU, S4, S4D, S5, Bidirectional
from seqzoo.models import ClassifierConfig, SequenceClassifier
from seqzoo.modules.hippo import LEAST_DECAY, MEASURES, diagonalise, hippo
from seqzoo.ops import backend, ssm_kernel, ssm_scan
from seqzoo.packing import Packing
from seqzoo.parameters import parameter_groups
from seqzoo.testing import inputs
from seqzoo.train.schedule import rate_factor

signal = pytest.importorskip("scipy.signal", reason="scipy is missing; install seqzoo[dev]")


def lssl_reference(A, B, C, u, dt, alpha=0.5):
    """A dense state space by the generalised bilinear rule, https://arxiv.org/abs/2110.13985, one token after another.

    ``alpha`` 0 is Euler's rule, 1/2 the bilinear one, 1 the backward Euler rule.
    """
    identity = torch.eye(len(A), dtype=A.dtype)
    below = identity - alpha * dt * A
    step, enter = torch.linalg.solve(below, identity + (1 - alpha) * dt * A), torch.linalg.solve(below, dt * B)
    x, y = torch.zeros(len(A), dtype=A.dtype), []
    for value in u:
        x = step @ x + enter * value
        y.append(C @ x)
    return torch.stack(y)


def test_the_step_size_of_backward_euler_is_a_gate():
    u = inputs((20,), torch.float64)
    one, dt = torch.ones(1, dtype=torch.float64), 0.7
    y = lssl_reference(-one[:, None], one, one, u, dt, alpha=1)
    gate, h = 1 / (1 + math.exp(-math.log(dt))), 0.0
    for value, found in zip(u, y, strict=True):
        h = (1 - gate) * h + gate * value
        assert abs(found - h) < 1e-12


def dense(layer, channel: int = 0):
    """A, B and C of one channel in complex numbers, both of every conjugate pair."""
    (poles, b, c, step), options = layer.space()
    poles, b, c = (torch.cat((value[channel], value[channel].conj())) for value in (poles, b, c))
    A = torch.diag(poles)
    if options["low_rank"] is not None:
        p = torch.cat((options["low_rank"][0][channel], options["low_rank"][0][channel].conj()), -1)
        A = A - p.mT @ p.conj()
    return A, b, c, step[channel]


@pytest.mark.parametrize("measure", MEASURES)
def test_s4_begins_as_hippo_and_is_the_dense_state_space(measure):
    layer = S4(16, d_state=8, measure=measure, output="none").double()
    layer.reset_parameters()  # float32 rounded them
    matrices = hippo(measure, 8)
    V = diagonalise(matrices).V
    # what C reads in HiPPO's own basis
    c = torch.view_as_complex(layer.C)[0]
    readout = 2 * (c @ V.mH).real
    u = inputs((1, 40, 16), torch.float64)
    decayless = torch.eye(8, dtype=torch.float64) * (0 if measure == "legs" else LEAST_DECAY)
    dt = layer.log_dt.exp()[0].item()
    expected = lssl_reference(matrices.A - decayless, matrices.B, readout, u[0, :, 0], dt)
    y = layer(u)[0] - u * layer.D
    torch.testing.assert_close(y[0, :, 0], expected.detach(), rtol=1e-9, atol=1e-10)
    A, b, c, step = dense(layer)
    y_dense = lssl_reference(A, b, c, u[0, :, 0].to(A.dtype), step)
    torch.testing.assert_close(y[0, :, 0], y_dense.real, rtol=1e-9, atol=1e-10)
    assert y_dense.imag.abs().max() < 1e-10


@pytest.mark.parametrize("name", ["s4", "s4d", "dss"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-6)], ids=str)
def test_the_kernel_is_the_dense_recurrence(name, dtype, tolerance):
    torch.manual_seed(0)
    layer = create(name, d_model=16, d_state=16, output="none").to(dtype)
    wide = create(name, d_model=16, d_state=16, output="none").double()
    wide.load_state_dict(layer.double().state_dict())
    found = layer.to(dtype).kernel(300)
    A, b, c, step = dense(wide, 3)
    if name == "s4":
        impulse = F.one_hot(torch.tensor(0), 300).to(A.dtype)
        expected = lssl_reference(A, b, c, impulse, step).real
    else:
        discrete, poles = torch.matrix_exp(step * A), A.diagonal()
        state = (torch.exp(step * poles) - 1) / poles * b
        taps = []
        for _ in range(300):
            taps.append((c * state).sum().real)
            state = discrete @ state
        expected = torch.stack(taps)
    error = (found[3].double() - expected).abs().max() / expected.abs().max()
    assert error < tolerance


@pytest.mark.parametrize("discretisation", ["zoh", "bilinear"])
def test_scipy_agrees_on_the_discretisation_and_the_response(discretisation):
    poles = torch.complex(-torch.rand(1, 3) - 0.1, 3 * torch.randn(1, 3)).to(torch.complex128)
    b, c = (torch.randn(1, 3, dtype=torch.complex128) for _ in range(2))
    step = torch.tensor([0.3], dtype=torch.float64)
    system = [np.diag(poles[0].numpy()), b[0, :, None].numpy(), c.numpy(), np.zeros((1, 1))]
    A, B, C, *_ = signal.cont2discrete(system, 0.3, method=discretisation)
    u = inputs((1, 50, 1), torch.float64)
    # SciPy's bilinear rule changes C and D with the states' basis: its outputs are those between two tokens
    options = {"discretisation": discretisation}
    y, _ = ssm_scan(u, poles, b, c, step, **options)
    if discretisation == "zoh":
        _, states = np.zeros(0), np.zeros(3, complex)
        expected = []
        for value in u[0, :, 0].numpy():
            states = A @ states + B[:, 0] * value
            expected.append((C @ states)[0].real)
        np.testing.assert_allclose(y[0, :, 0].numpy(), expected, rtol=1e-9, atol=1e-10)
    kernel = ssm_kernel(poles, b, c, step, 50, **options)
    power = np.linalg.matrix_power
    expected = [(c.numpy() @ power(A, n) @ _entering(system, discretisation, B))[0].real for n in range(50)]
    np.testing.assert_allclose(kernel[0].numpy(), expected, rtol=1e-8, atol=1e-10)


def _entering(system, discretisation, B):
    """What an input of 1 adds to the states: for the bilinear rule ``(I - dt / 2 A)^-1 dt B``."""
    if discretisation == "zoh":
        return B[:, 0]
    A, b = system[0], system[1][:, 0]
    return np.linalg.solve(np.eye(len(A)) - 0.15 * A, 0.3 * b)


def test_a_pole_at_zero_sums_its_inputs_up():
    poles = torch.tensor([[0.0, -1e-9, -1e-3, -50.0]]).to(torch.complex128).requires_grad_()
    b = torch.ones_like(poles)

    def kernel(poles):
        return ssm_kernel(poles, b, b, torch.ones(1, dtype=torch.float64), 3)

    assert torch.autograd.gradcheck(kernel, poles)
    exact = torch.expm1(poles.detach().real[0, 1:]) / poles.detach().real[0, 1:]
    torch.testing.assert_close(kernel(poles)[0, 0], 1 + exact.sum(), rtol=1e-14, atol=0)


def test_the_output_of_scipy_s_simulation():
    poles = torch.complex(-torch.rand(1, 3) - 0.1, 3 * torch.randn(1, 3)).to(torch.complex128)
    b, c = (torch.randn(1, 3, dtype=torch.complex128) for _ in range(2))
    # as a real system of twice the size
    A = np.block([[np.diag(poles[0].real), -np.diag(poles[0].imag)], [np.diag(poles[0].imag), np.diag(poles[0].real)]])
    B = np.concatenate((b[0].real, b[0].imag))[:, None]
    C = np.concatenate((c[0].real, -c[0].imag))[None]
    u = inputs((1, 50, 1), torch.float64)
    discrete = signal.cont2discrete((A, B, C, np.zeros((1, 1))), 0.2, method="zoh")
    _, expected, _ = signal.dlsim(discrete, u[0].numpy())
    y, _ = ssm_scan(u, poles, b, c, torch.tensor([0.2], dtype=torch.float64))
    # SciPy's outputs are read before the input of their time enters
    np.testing.assert_allclose(y[0, :-1, 0].numpy(), expected[1:, 0], rtol=1e-9, atol=1e-11)


def test_s4d_s_parameters_are_the_authors():
    """The kernel as the paper's shortest code has it, from tensors of those names and shapes."""
    layer = S4D(16, d_state=8, train_B=False)
    dt, A = layer.log_dt.exp(), -torch.exp(layer.log_A_real) + 1j * layer.A_imag
    dtA = A * dt[:, None]
    K = dtA[..., None] * torch.arange(50)
    C = torch.view_as_complex(layer.C) * (torch.exp(dtA) - 1.0) / A
    expected = 2 * torch.einsum("hn,hnl->hl", C, torch.exp(K)).real
    torch.testing.assert_close(layer.kernel(50), expected, rtol=1e-4, atol=1e-5)
    assert {name: tuple(value.shape) for name, value in layer.named_parameters(recurse=False)} == {
        "D": (16,),
        "log_dt": (16,),
        "log_A_real": (16, 4),
        "A_imag": (16, 4),
        "C": (16, 4, 2),
    }


@pytest.mark.parametrize(
    ("initialisation", "imag"),
    [
        ("lin", [0, math.pi, 2 * math.pi, 3 * math.pi]),
        ("inv", [8 / math.pi * (8 / (2 * n + 1) - 1) for n in range(4)]),
        ("legs", None),
    ],
)
def test_s4d_begins_as_the_paper_says(initialisation, imag):
    layer = S4D(16, d_state=8, initialisation=initialisation)
    if imag is None:
        imag = sorted(np.linalg.eigvals((hippo("legs", 8).A + hippo("legs", 8).P.T @ hippo("legs", 8).P).numpy()).imag)[
            4:
        ]
    poles = layer.poles()[5]
    torch.testing.assert_close(poles.real, torch.full((4,), -0.5))
    torch.testing.assert_close(
        poles.imag.sort().values, torch.tensor(sorted(imag), dtype=torch.float32), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("kernel_length", [None, 30])
def test_the_kernel_of_dss_is_a_softmax(kernel_length):
    layer = DSS(16, d_state=8, kernel_length=kernel_length).double()
    poles, length = layer.poles(), kernel_length or 20000
    scores = layer.log_dt.exp()[:, None, None] * poles[..., None] * torch.arange(length)
    softmax = scores.exp() / scores.exp().sum(-1, keepdim=True)
    expected = 2 * (torch.view_as_complex(layer.C) / poles)[..., None] * softmax
    torch.testing.assert_close(layer.kernel(30), expected.sum(1).real[:, :30], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["s4", "s4d", "dss", "s5", "lru"])
def test_no_parameters_make_it_unstable(name):
    layer = create(name, d_model=16, d_state=8).double()
    for _ in range(20):
        with torch.no_grad():
            for key, value in layer.named_parameters():
                value.copy_(3 * torch.randn_like(value) - (3 if key == "log_dt" else 0))
        if name == "s4":
            A, *_, step = dense(layer)
            identity = torch.eye(len(A))
            factors = torch.linalg.eigvals(torch.linalg.solve(identity - step / 2 * A, identity + step / 2 * A))
        elif name in ("s4d", "dss"):
            factors = torch.exp(layer.log_dt.exp()[:, None] * layer.poles())
        else:
            factors = layer.recurrence()[0]
        assert factors.abs().max() <= 1


def test_rounding_keeps_factors_inside_the_unit_circle():
    for layer, name in ((LRU(16), "nu_log"), (S5(16), "log_A_real")):
        with torch.no_grad():
            getattr(layer, name).fill_(-20)
        factors = layer.recurrence()[0]
        assert factors.dtype == torch.complex64
        assert factors.to(torch.complex128).abs().max() < 1


@pytest.mark.parametrize("measure", MEASURES)
def test_float32_gradients_of_s4_s_kernel(measure):
    """Poles of windows lie on the unit circle, but for rounding, where nodes are: what cancels must not be rounded."""
    torch.manual_seed(0)
    layer = S4(16, d_state=64, measure=measure, output="none")
    wide = S4(16, d_state=64, measure=measure, output="none").double()
    wide.load_state_dict(layer.double().state_dict())
    layer.float()
    for length in (64, 1000):
        gradient = inputs((16, length), torch.float64)
        found, expected = (
            torch.autograd.grad(one.kernel(length), list(one.parameters())[1:], gradient.to(kind))
            for one, kind in ((layer, torch.float32), (wide, torch.float64))
        )
        for (name, _), one, other in zip(list(layer.named_parameters())[1:], found, expected, strict=True):
            assert (one.double() - other).norm() <= 2e-5 * other.norm(), (name, length)


@pytest.mark.parametrize("measure", MEASURES)
def test_gradients_of_s4_s_kernel_are_those_of_its_recurrence(measure):
    torch.manual_seed(0)
    layer = S4(8, d_state=64, measure=measure, output="none").double()
    parameters = [parameter for name, parameter in layer.named_parameters() if name != "D"]
    for length in (1, 96, 257):
        impulse = torch.zeros(1, length, 8, dtype=torch.float64)
        impulse[:, 0] = 1
        gradient = inputs((8, length), torch.float64)
        with backend("reference"):
            by_steps = (layer(impulse)[0] - layer.D * impulse)[0].mT
            expected = torch.autograd.grad(by_steps, parameters, gradient)
        found = torch.autograd.grad(layer.kernel(length), parameters, gradient)
        for one, other in zip(found, expected, strict=True):
            assert (one - other).norm() <= 1e-12 * other.norm(), length


def test_a_step_of_s4_makes_no_dense_matrix(monkeypatch):
    layer = S4(16, d_state=8)
    _, state = layer(torch.randn(2, 5, 16), return_state=True)
    monkeypatch.setattr(LowRankSteps, "real_transition", lambda self: pytest.fail("a dense transition was made"))
    layer.step(torch.randn(2, 16), state)


def test_s5_of_one_block_is_a_sum_of_s4d_channels():
    layer = S5(16, d_state=6, output="none").double()
    u = inputs((1, 30, 16), torch.float64)
    poles = torch.complex(-torch.exp(layer.log_A_real), layer.A_imag)
    B, C, steps = torch.view_as_complex(layer.B), torch.view_as_complex(layer.C), layer.log_dt.exp()
    expected = u * layer.D
    for state in range(3):
        for channel in range(16):
            # one pole of one input channel, read by all output channels
            one = [poles[state].expand(16, 1), B[state, channel].expand(16, 1), C[:, state, None]]
            y, _ = ssm_scan(
                u[:, :, channel, None].expand(-1, -1, 16), *one, steps[state].expand(16), conjugate_pairs=True
            )
            expected = expected + y
    torch.testing.assert_close(layer(u)[0], expected, rtol=1e-9, atol=1e-9)


def test_s5_s_blocks_are_hippo_s():
    layer = S5(16, d_state=16, n_blocks=2)
    poles = torch.complex(-torch.exp(layer.log_A_real), layer.A_imag)
    torch.testing.assert_close(poles[:4], poles[4:])
    torch.testing.assert_close(poles[:4], diagonalise(hippo("legs", 8)).poles.to(poles.dtype))


@torch.no_grad()
def test_lru_keeps_the_variance_of_a_stationary_input():
    torch.manual_seed(0)
    layer = LRU(64, d_state=128, r_min=0.9, r_max=0.99, output="none")
    _, state = layer(torch.randn(8, 2000, 64), return_state=True)
    # each part of B u has half the variance 1
    assert 0.9 < state["x"].abs().square().mean().item() < 1.1


@torch.no_grad()
def test_lru_begins_on_its_ring():
    layer = LRU(16, d_state=4000, r_min=0.5, r_max=0.8, max_phase=0.3)
    a = layer.recurrence()[0]
    assert 0.5 <= a.abs().min() <= 0.51
    assert 0.79 <= a.abs().max() <= 0.8
    # uniform by area
    assert abs((a.abs().square() < (0.25 + 0.64) / 2).float().mean() - 0.5) < 0.03
    assert 0 <= a.angle().min() <= 0.01
    assert 0.29 <= a.angle().max() <= 0.3


@pytest.mark.parametrize("measure", ["legt", "fourier"])
def test_hippo_s_windows_remember_what_passed_them(measure):
    """The states are coefficients of the last unit of time in the measure's basis."""
    size, dt, length = 32, 1e-3, 3000
    matrices = hippo(measure, size)
    time_ = torch.arange(length, dtype=torch.float64) * dt
    u = torch.sin(2.1 * time_) + 0.5 * torch.cos(5 * time_ + 1)
    identity = torch.eye(size, dtype=torch.float64)
    below = identity - dt / 2 * matrices.A
    step, enter = torch.linalg.solve(below, identity + dt / 2 * matrices.A), torch.linalg.solve(below, dt * matrices.B)
    x = torch.zeros(size, dtype=torch.float64)
    for value in u:
        x = step @ x + enter * value
    ago = torch.linspace(0.1, 0.9, 50, dtype=torch.float64)
    if measure == "legt":
        basis = np.stack(
            [np.sqrt(2 * n + 1) * np.polynomial.legendre.Legendre.basis(n)(1 - 2 * ago.numpy()) for n in range(size)]
        )
        found = torch.from_numpy(basis).T @ x
    else:
        index = torch.arange(size)
        phase = 2 * math.pi * (index // 2) * ago[:, None]
        basis = torch.where(index % 2 == 0, phase.cos(), phase.sin()) * math.sqrt(2)
        basis[:, 0] = 1
        found = basis @ x
    expected = torch.sin(2.1 * (time_[-1] - ago)) + 0.5 * torch.cos(5 * (time_[-1] - ago) + 1)
    assert (found - expected).abs().max() < (0.01 if measure == "legt" else 0.15)


def refuse(*arguments, **options):
    raise AssertionError("this recurs")


@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize("name", ["s4", "s4d", "dss", "long_conv"])
def test_packed_sequences_are_convolved_side_by_side(name, two_sided, monkeypatch):
    torch.manual_seed(0)
    layer = create(name, d_model=8, **({"kernel_length": 64} if name == "long_conv" else {"d_state": 8})).double()
    mixer = Bidirectional(layer) if two_sided else layer
    lengths = [5, 0, 1, 64, 63, 9, 2, 32]
    x = inputs((1, sum(lengths), 8), torch.float64).requires_grad_()
    weight = inputs(tuple(x.shape), torch.float64, seed=1)
    sources = [x, *mixer.parameters()]
    expected = torch.cat([mixer(part)[0] for part in x.split(lengths, 1) if part.shape[1]], 1)
    gradients = torch.autograd.grad((expected * weight).sum(), sources)
    monkeypatch.setattr(type(layer), "recur", refuse)
    y = mixer(x, cu_seqlens=Packing.from_lengths(lengths))[0]
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    found = torch.autograd.grad((y * weight).sum(), sources)
    for one, other in zip(found, gradients, strict=True):
        assert (one - other).norm() <= 1e-11 * other.norm()
    # what the host does not know, and states, are for the recurrence
    with pytest.raises(AssertionError, match="this recurs"):
        layer(x, cu_seqlens=Packing.from_lengths(lengths), return_state=True)


@pytest.mark.parametrize("name", ["s4", "s4d", "dss"])
def test_two_directions_are_one_convolution(name, monkeypatch):
    forward = create(name, d_model=16, d_state=8).double()
    both = Bidirectional(forward)
    x = inputs((2, 40, 16), torch.float64)
    calls = []
    monkeypatch.setattr(torch.fft, "irfft", lambda *a, f=torch.fft.irfft, **k: calls.append("back") or f(*a, **k))
    with torch.no_grad():
        found = both(x)[0]
        inverse = len(calls) - (2 if name == "s4" else 0)  # the kernels of S4 are transforms themselves
        assert inverse == 1
        one, other = (
            mixer.recur(value, None, None, False)[0] for mixer, value in ((forward, x), (both.mixer_reverse, x.flip(1)))
        )
        summed = one + other.flip(1) + x * (forward.D + both.mixer_reverse.D)
        expected = F.glu(forward.out_proj(F.gelu(summed)), dim=-1)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="output='none', got 'glu', or choose another merge"):
        Bidirectional(forward, create(name, d_model=16, d_state=8))


def test_the_state_space_learns_at_a_rate_of_its_own():
    layer = S4(16, lr_scale=0.2)
    groups = {
        name: (group["lr"], group["weight_decay"])
        for group in parameter_groups(layer, 1e-2, 0.05)
        for name in [id(p) for p in group["params"]]
    }
    for name, parameter in layer.named_parameters():
        own = name in ("log_dt", "log_A_real", "A_imag", "B", "P")
        expected = (2e-3, 0.0) if own else (1e-2, 0.05 if name in ("C", "out_proj.weight") else 0.0)
        assert groups[id(parameter)] == pytest.approx(expected), name


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: S4(16, d_state=7), "d_state must be even, for states come in conjugate pairs, got 7"),
        (lambda: S4D(16, initialisation="lagt"), "initialisation must be one of lin, inv, legs, got 'lagt'"),
        (lambda: S4(16, measure="lin"), "measure must be one of legs, legt, fourier, got 'lin'"),
        (lambda: S4D(16, dt_min=-0.1), "dt_min must be a finite number greater than 0, got -0.1"),
        (lambda: S5(16, dt_min=0.2), "dt_min must not be above dt_max, got 0.2 and 0.1"),
        (lambda: S5(16, d_state=12, n_blocks=4), "d_state must be a multiple of 2 n_blocks = 8"),
        (lambda: DSS(16, kernel_length=0), "kernel_length must be a positive integer, got 0"),
        (lambda: LRU(16, r_min=0.9, r_max=0.5), "radii must be 0 <= r_min < r_max < 1, got 0.9 and 0.5"),
        (lambda: LRU(16, output="gelu"), "output must be glu or none, got 'gelu'"),
        (lambda: S4D(16, output="gelu"), "output must be glu or none, got 'gelu'"),
    ],
)
def test_bad_options(build, words):
    with pytest.raises(ValueError, match=words):
        build()


def digits(seed: int):
    """Scikit-learn's handwritten digits as sequences of 64 pixels: training and test."""
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn is missing; install seqzoo[dev]")
    data = datasets.load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(seed))
    x = torch.from_numpy(data.data).float()[order, :, None] / 16 - 0.3
    y = torch.from_numpy(data.target).long()[order]
    return (x[:1437], y[:1437]), (x[1437:], y[1437:])


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_sequential_digits(seed, record_property):
    (x, y), (x_test, y_test) = digits(seed)
    torch.manual_seed(seed)
    config = ClassifierConfig(
        n_features=1, n_classes=10, d_model=64, n_layers=2, pattern=[{"name": "s4d", "d_state": 32}], mlp="none"
    )
    model = SequenceClassifier(config)
    steps, batch = 900, 64
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-2, 0.05))
    peaks = [group["lr"] for group in optimizer.param_groups]
    started = time.perf_counter()
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * rate_factor(step, 90, steps)
        rows = torch.randint(0, len(x), (batch,), generator=generator)
        loss = model.loss(x[rows], y[rows])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    with torch.inference_mode():
        found = (model(x_test).argmax(-1) == y_test).float().mean().item()
    record_property("accuracy", found)
    print(f"seed {seed}: {found:.3f} in {time.perf_counter() - started:.0f} s")
    assert found >= 0.93


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_lru_recalls_the_first_of_256_tokens(record_property):
    """One of eight symbols, then 255 tokens of noise, which are others: what is asked for at the end is the first."""
    torch.manual_seed(0)

    def batch(rows: int) -> torch.Tensor:
        ids = torch.randint(8, 16, (rows, 256), generator=generator)
        ids[:, 0] -= 8
        return ids

    config = ClassifierConfig(
        vocab_size=16,
        n_classes=8,
        d_model=32,
        n_layers=1,
        pattern=[{"name": "lru", "d_state": 64, "r_min": 0.99, "r_max": 0.9999, "max_phase": 0.1}],
        pooling="last",
    )
    model = SequenceClassifier(config)
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-2, 0.0))
    generator = torch.Generator().manual_seed(0)
    found = 0.0
    for step in range(2000):
        ids = batch(64)
        loss = model.loss(ids, ids[:, 0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 99:
            ids = batch(512)
            with torch.inference_mode():
                found = (model(ids).argmax(-1) == ids[:, 0]).float().mean().item()
            print(step + 1, f"{loss.item():.3f} {found:.3f}", flush=True)
            if found > 0.99:
                break
    record_property("accuracy", found)
    assert found > 0.99
