"""What is peculiar to ``cauchy``: oracles of its own, poles beside the nodes, state spaces, memory, and lengths."""

from __future__ import annotations

import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad

from seqzoo.kernels import dispatch
from seqzoo.kernels.cauchy import chunked, cpu
from seqzoo.kernels.numba_runtime import Kernel
from seqzoo.ops import cauchy
from seqzoo.testing import backends, cauchy_case, compare

FAST = ("chunked", "cpu", "gpu")


def drawn(width: int = 2, sums: int = 3, size: int = 4, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(2, width, sums + 1, size, generator=generator, dtype=torch.float64)
    weights = torch.complex(values[0, :, :sums], values[1, :, :sums])
    return weights, torch.complex(-values[0, :, sums].abs() - 0.05, 2 * values[1, :, sums])


def oracle(weights: torch.Tensor, poles: torch.Tensor, length: int, pairs: bool) -> np.ndarray:
    w, p = weights.numpy(), poles.numpy()
    sums = np.zeros((*w.shape[:2], length // 2 + 1), complex)
    for j in range(length // 2 + 1):
        z = np.exp(-2j * np.pi * j / length)
        for n in range(w.shape[2]):
            sums[:, :, j] += w[:, :, n] / ((1 - z) - p[:, None, n] * (1 + z))
            if pairs:
                sums[:, :, j] += w[:, :, n].conj() / ((1 - z) - p[:, None, n].conj() * (1 + z))
    return sums


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("length", [1, 2, 3, 8, 9, 64])
def test_it_is_the_sum_of_the_quotients(length: int, pairs: bool, device: torch.device):
    weights, poles = drawn()
    expected = torch.from_numpy(oracle(weights, poles, length, pairs))
    for name in backends(device, True):
        with dispatch.backend(name):
            sums = cauchy(weights.to(device), poles.to(device), length, conjugate_pairs=pairs).cpu()
        torch.testing.assert_close(sums, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.complex128, torch.complex64], ids=str)
def test_pairs_are_the_call_with_the_conjugates(dtype: torch.dtype, device: torch.device):
    weights, poles = (value.to(device) for value in drawn(size=5))
    weights = weights.to(dtype)
    doubled = torch.cat((weights, weights.conj()), 2), torch.cat((poles, poles.conj()), 1)
    tolerance = 1e-12 if dtype == torch.complex128 else 4e-6
    for name in backends(device, dtype == torch.complex128):
        with dispatch.backend(name):
            sums, expected = cauchy(weights, poles, 37, conjugate_pairs=True), cauchy(*doubled, 37)
        assert (sums - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("where", ["near", "far"])
def test_poles_beside_the_nodes_and_far_from_them(where: str, pairs: bool, device: torch.device):
    size, length = 6, 48
    weights, _ = drawn(1, 2, size)
    if where == "near":
        # at the nodes but for 1e-6: what is left of a denominator has the rounding of its two parts, 1e-10 of it
        at = torch.arange(size, dtype=torch.float64)[None]
        poles = torch.complex(torch.full_like(at, -1e-6), torch.tan(torch.pi / length * at))
        tolerance = 4 * 2.2e-16 / 1e-6
    else:
        poles = 50 * torch.polar(torch.ones(1, size), torch.linspace(1.6, 4.7, size)[None]).to(torch.complex128)
        tolerance = 1e-12
    expected = oracle(weights, poles, length, pairs)
    for name in backends(device, True):
        with dispatch.backend(name):
            sums = cauchy(weights.to(device), poles.to(device), length, conjugate_pairs=pairs).cpu().numpy()
        assert np.abs(sums - expected).max() <= tolerance * np.abs(expected).max(), name
    options = {"length": length, "conjugate_pairs": pairs, "poles": where, "poles_dtype": torch.complex128}
    case = cauchy_case(torch.complex64, (1, 2, size), **options)
    for name in backends(device, False)[1:]:
        worst = compare(case.to(device), name)
        assert max(worst.values()) <= 1, (name, worst)


def bilinear_taps(c: torch.Tensor, poles: torch.Tensor, length: int) -> torch.Tensor:
    factor = (1 + poles) / (1 - poles)
    return torch.einsum("dn,dnl->dl", c, factor[:, :, None] ** torch.arange(length)).real


@pytest.mark.parametrize("length", [1, 2, 9, 64])
def test_the_taps_of_a_diagonal_state_space(length: int, device: torch.device):
    """sum_l A**l z**l over ``length`` taps is (1 - A**length) / (1 - A z) where z**length is 1."""
    c, poles = drawn(3, 1, 4)
    c = c[:, 0]
    weights = (c * (1 - ((1 + poles) / (1 - poles)) ** length) * (1 - poles) / 2)[:, None]
    expected = bilinear_taps(c, poles, length)
    for name in backends(device, True):
        with dispatch.backend(name):
            sums = cauchy(weights.to(device), poles.to(device), length, conjugate_pairs=True)
        taps = torch.fft.irfft(sums[:, 0], n=length).cpu()
        torch.testing.assert_close(taps, expected, rtol=1e-12, atol=1e-12)


def test_the_taps_of_a_state_space_of_low_rank(device: torch.device):
    """Section 3 and appendix C of S4: four sums and one division a node, against powers of the dense matrix."""
    size, length, step = 4, 16, 0.3
    weights, rates = drawn(1, 3, size)
    rates, (p, b, c) = rates[0], weights[0]
    # stored halves: the whole has every entry's conjugate too, so its taps are real
    whole = [torch.cat((value, value.conj())) for value in (rates, p, b, c)]
    transition = torch.diag(whole[0]) - torch.outer(whole[1], whole[1].conj())
    identity = torch.eye(2 * size, dtype=torch.complex128)
    backwards = torch.linalg.inv(identity - step / 2 * transition)
    discrete, entry = backwards @ (identity + step / 2 * transition), step * backwards @ whole[2]
    powers = [torch.linalg.matrix_power(discrete, l) for l in range(length)]
    expected = torch.stack([whole[3] @ power @ entry for power in powers])
    assert expected.imag.abs().max() < 1e-12
    # C (1 - A^length), whose second half is the conjugate of its first
    left = (whole[3] @ (identity - torch.linalg.matrix_power(discrete, length)))[:size]
    products = torch.stack((left * b, left * p, p.conj() * b, p.conj() * p))[None]
    for name in backends(device, True):
        with dispatch.backend(name):
            found = cauchy(products.to(device), step / 2 * rates[None].to(device), length, conjugate_pairs=True).cpu()
        cb, cp, pb, pp = (step / 2 * found[0]).unbind()
        z = torch.exp(-2j * torch.pi / length * torch.arange(length // 2 + 1, dtype=torch.float64))
        # (1 + z) / 2 of the paper's sums, so that z = -1 is regular
        taps = torch.fft.irfft(2 * (cb - cp * (1 + z) * pb / (1 + (1 + z) * pp)), n=length)
        torch.testing.assert_close(taps, expected.real, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", FAST)
def test_the_precision_is_the_weights(name: str, device: torch.device):
    """Poles of complex128 beside weights of complex64 do not count as float64, which a GPU's kernels have not."""
    if dispatch.obstacle(name, device, False) is not None:
        pytest.skip("cannot run here")
    weights, poles = (value.to(device) for value in drawn())
    for dtype in (torch.complex64, torch.complex128):
        narrow = poles.to(dtype).requires_grad_()
        with dispatch.backend(name):
            sums = cauchy(weights.to(torch.complex64), narrow, 9)
            (grad,) = torch.autograd.grad(sums.abs().sum(), narrow)
        assert (sums.dtype, grad.dtype) == (torch.complex64, dtype)
    assert dispatch.choose(torch.device("cuda"), False)[0] == "gpu"


@pytest.mark.parametrize("shape", [(0, 2, 3), (2, 0, 3), (2, 3, 0)])
def test_nothing_to_sum(shape: tuple[int, int, int], device: torch.device):
    width, sums, size = shape
    weights = torch.ones(shape, dtype=torch.complex64, device=device, requires_grad=True)
    poles = -torch.ones((width, size), dtype=torch.complex64, device=device).requires_grad_()
    for name in backends(device, False):
        with dispatch.backend(name):
            found = cauchy(weights, poles, 6)
            gradients = torch.autograd.grad(found.real.sum(), (weights, poles))
        assert found.shape == (width, sums, 4)
        assert (found == 0).all()
        assert all((gradient == 0).all() for gradient in gradients)


@pytest.mark.parametrize("name", FAST)
def test_a_conjugated_view_is_what_it_says(name: str, device: torch.device):
    if dispatch.obstacle(name, device, False) is not None:
        pytest.skip("cannot run here")
    weights, poles = (value.to(device) for value in drawn())
    weights = weights.to(torch.complex64).requires_grad_()

    def lazy(weights, poles):
        return cauchy(weights.conj(), poles.conj(), 9).conj() * 2

    torch._dynamo.reset()
    with dispatch.backend(name):
        expected = 2 * cauchy(weights.conj_physical(), poles.conj_physical(), 9).conj_physical()
        (of_expected,) = torch.autograd.grad(expected.abs().square().sum(), weights)
        for call in (lazy, torch.compile(lazy, fullgraph=True, backend="aot_eager")):
            actual = call(weights, poles)
            torch.testing.assert_close(actual, expected)
            torch.testing.assert_close(torch.autograd.grad(actual.abs().square().sum(), weights)[0], of_expected)


@contextmanager
def dividing(monkeypatch: pytest.MonkeyPatch, tasks: int):
    """Divides the work as for so many threads, on one."""
    with monkeypatch.context() as patch:
        patch.setattr(cpu, "threads_for", lambda elements: tasks)
        patch.setattr(Kernel, "__call__", lambda kernel, threads, *arguments: kernel.serial(*arguments))
        yield


def test_the_number_of_threads_changes_no_bit(monkeypatch: pytest.MonkeyPatch):
    case = cauchy_case(torch.complex64, (3, 3, 7), length=2 * cpu.CHUNK + 9, poles_dtype=torch.complex128)
    found = []
    for tasks in (1, 2, 5, 40):
        with dividing(monkeypatch, tasks):
            found.append(case.run("cpu"))
    assert all(torch.equal(one[name], found[0][name]) for one in found for name in one)


@pytest.mark.parametrize("pairs", [False, True])
def test_blocks_and_segments_join(pairs: bool, monkeypatch: pytest.MonkeyPatch, device: torch.device):
    case = cauchy_case(torch.complex64, (3, 3, 5), length=600, conjugate_pairs=pairs, poles_dtype=torch.complex128).to(
        device
    )
    for values in (70, 700, 3000):
        monkeypatch.setattr(chunked, "VALUES", values)
        worst = compare(case, "chunked")
        assert max(worst.values()) <= 1, (values, worst)
    if dispatch.obstacle("gpu", device, False) is None:
        from seqzoo.kernels.cauchy import gpu

        with gpu.forced_segment(1):
            worst = compare(case, "gpu")
        assert max(worst.values()) <= 1, worst
        with pytest.raises(ValueError, match="steps must be positive, got 0"), gpu.forced_segment(0):
            pass


@pytest.mark.parametrize("name", FAST)
def test_it_compiles_for_any_length(name: str, device: torch.device):
    if dispatch.obstacle(name, device, False) is not None:
        pytest.skip("cannot run here")
    weights, poles = (value.to(device) for value in drawn())
    weights, graphs = weights.to(torch.complex64).requires_grad_(), []

    def counting(module, inputs):
        graphs.append(module)
        return module.forward

    def call(weights, poles, length):
        return 2 * cauchy(weights, poles, length, conjugate_pairs=True)

    torch._dynamo.reset()
    with dispatch.backend(name):
        whole = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
        counted = torch.compile(call, fullgraph=True, backend=counting, dynamic=True)
        for length in (12, 9, 30):
            expected, actual = call(weights, poles, length), whole(weights, poles, length)
            torch.testing.assert_close(actual, expected)
            torch.testing.assert_close(counted(weights, poles, length), expected)
            (one,), (other,) = (torch.autograd.grad(value.abs().sum(), weights) for value in (actual, expected))
            torch.testing.assert_close(one, other)
    assert len(graphs) == 1


@pytest.mark.parametrize("name", FAST)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # PyTorch's own, in forward mode
def test_other_derivatives_raise_and_the_reference_has_them(name: str, device: torch.device):
    if dispatch.obstacle(name, device, True) is not None:
        pytest.skip("cannot run here")
    weights, poles = (value.to(device) for value in drawn(1, 1, 2))

    def penalty():
        leaf = poles.clone().requires_grad_()
        (first,) = torch.autograd.grad(cauchy(weights, leaf, 4).abs().square().sum(), leaf, create_graph=True)
        return torch.autograd.grad(first.abs().square().sum(), leaf)[0]

    def dual():
        with forward_ad.dual_level():
            value = forward_ad.make_dual(poles, torch.ones_like(poles))
            return forward_ad.unpack_dual(cauchy(weights, value, 4)).tangent

    for derivative in (penalty, dual, lambda: torch.func.vmap(lambda p: cauchy(weights, p, 4))(poles[None])):
        with dispatch.backend("reference"):
            assert derivative().abs().max() > 0
        with dispatch.backend(name), pytest.raises(RuntimeError, match=r'run inside seqzoo.ops.backend\("reference"\)'):
            derivative()


# in a process of its own, where large blocks are mapped and given back, so the peak is what lives at once. A first call
# at a small size compiles, which takes the most memory of all, and touches the memory of the libraries
SCRIPT = """
import ctypes, sys
import torch
from seqzoo.ops import backend, cauchy

torch.set_num_threads(1)

def status(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name)) * 1024

def run(weights, poles, length, grad):
    sums = cauchy(weights, poles, length, conjugate_pairs=True)
    return sums.detach(), torch.autograd.grad(sums, (weights, poles), grad)

def tensors(width, length):
    weights = torch.randn(width, 4, 32, dtype=torch.complex64)
    poles = torch.complex(-torch.rand(width, 32).double(), torch.rand(width, 32).double())
    grad = torch.randn(width, 4, length // 2 + 1, dtype=torch.complex64)
    return weights.requires_grad_(), poles.requires_grad_(), length, grad

with backend(sys.argv[1]):
    run(*tensors(128, 2000))
    given = tensors(128, 8192)
    ctypes.CDLL(None).malloc_trim(0)
    before = status("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets the peak
    run(*given)
    sums = 128 * 4 * (8192 // 2 + 1) * 8
    print((status("VmHWM") - before - sums) / 2**20)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the process's memory as Linux tells it")
@pytest.mark.parametrize(("name", "most"), [("cpu", 8), ("chunked", 64)])
def test_no_quotient_is_held(name: str, most: int):
    """All quotients of this call are 128 MB in float32; beyond the sums themselves it may take so many MB."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, name], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert float(done.stdout) <= most
