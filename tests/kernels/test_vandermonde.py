"""What is peculiar to ``vandermonde``: NumPy as a second oracle, long phases, mixed precision, cuts between blocks."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqzoo.kernels import dispatch
from seqzoo.kernels.numba_runtime import Kernel
from seqzoo.kernels.vandermonde import chunked, cpu
from seqzoo.ops import backend, vandermonde
from seqzoo.testing import backends, compare, vandermonde_case

FAST = ("chunked", "cpu")


def by_numpy(exponents: torch.Tensor, weights: torch.Tensor, length: int) -> np.ndarray:
    """The definition, position by position."""
    x, w = (value.numpy().astype(np.complex128) for value in (exponents, weights))
    return np.stack([(w * np.exp(x * l)).sum(1).real for l in range(length)], axis=1)


@pytest.mark.parametrize("weights_dtype", [torch.complex128, torch.complex64], ids=str)
@pytest.mark.parametrize("exponents_dtype", [torch.complex128, torch.complex64], ids=str)
@pytest.mark.parametrize("length", [1, 2, 5, 100])
def test_it_is_the_sum_of_exponentials(weights_dtype, exponents_dtype, length: int, device: torch.device):
    dtype = torch.float64 if weights_dtype == torch.complex128 else torch.float32
    case = vandermonde_case(dtype, (3, 4), length, exponents_dtype=exponents_dtype)
    expected = by_numpy(*case.tensors.values(), length)
    case = case.to(device)
    for name in backends(device, case.wide):
        with backend(name):
            (kernel,) = case.call()
        assert kernel.dtype == dtype
        tolerance = 1e-13 if dtype == torch.float64 else 1e-6
        np.testing.assert_allclose(kernel.cpu().numpy(), expected, rtol=0, atol=tolerance * np.abs(expected).max())


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 12)),
    length=st.integers(0, 300),
    decay=st.sampled_from([0.0, 0.01, 1.0]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    seed=st.integers(0, 1000),
)
def test_any_shape_and_length(shape, length, decay, dtype, seed):
    # many numbers: of few the reference's error may be small by chance
    case = vandermonde_case(dtype, (shape[0] + 40, shape[1]), length, decay=decay, seed=seed)
    for name in FAST:
        worst = compare(case, name)
        assert max(worst.values()) <= 1, (name, worst)


@pytest.mark.parametrize("length", [65536, 50000])
@pytest.mark.parametrize("name", FAST)
def test_a_long_kernel_is_as_exact_as_a_short_one(length: int, name: str):
    exponents = torch.complex(torch.full((2, 1), -1e-5), torch.tensor([[3.0], [2.9]])).to(torch.complex128)
    weights = torch.ones(2, 1, dtype=torch.complex64)
    positions = torch.arange(length, dtype=torch.float64)
    x, w = exponents.clone().requires_grad_(), weights.clone().requires_grad_()
    with backend(name):
        kernel = vandermonde(x, w, length)
    exact = torch.exp(exponents * positions)
    torch.testing.assert_close(kernel.double(), exact.real, rtol=0, atol=4e-7)
    # a gradient that does not cancel: l g_l summed over all positions
    (2 * kernel * exact.real.float()).sum().backward()
    expected = 2 * (exact.real * positions * exact.conj()).sum(1, keepdim=True)
    assert (x.grad - expected).abs().max() <= 1e-6 * expected.abs().max()
    expected = 2 * (exact.real * exact.conj()).sum(1, keepdim=True)
    assert (w.grad - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize("real", [0.0, -1e-3, -1.0, -700.0, -1e4])
@pytest.mark.parametrize("imaginary", [0.0, 1e3])
def test_no_decay_and_underflow_are_finite(real: float, imaginary: float, device: torch.device):
    for name in backends(device, False):
        exponents = torch.full((1, 2), complex(real, imaginary), dtype=torch.complex128, device=device)
        weights = torch.ones(1, 2, dtype=torch.complex64, device=device)
        x, w = exponents.requires_grad_(), weights.requires_grad_()
        with backend(name):
            kernel = vandermonde(x, w, 700)
            kernel.sum().backward()
        assert kernel[0, 0] == 2
        assert kernel.isfinite().all()
        assert x.grad.isfinite().all()
        assert w.grad.isfinite().all()
        if real <= -700:
            assert not kernel[:, 1:].any()
            assert x.grad.abs().max() <= 1e-30
        elif real == 0 and imaginary == 0:
            assert torch.equal(kernel, torch.full_like(kernel, 2))
            assert torch.equal(x.grad, torch.full_like(x.grad, 700 * 699 / 2))


def test_no_positions_no_channels_and_no_terms(device: torch.device):
    for name in backends(device, False):
        for shape, length in (((2, 3), 0), ((0, 3), 5), ((2, 0), 5)):
            case = vandermonde_case(torch.float32, shape, length).to(device)
            found = case.run(name)
            assert found["output 0"].shape == (shape[0], length)
            assert not any(value.any() for value in found.values())


def test_gradients_have_the_dtypes_of_their_tensors(device: torch.device):
    for exponents_dtype in (torch.complex128, torch.complex64):
        for dtype, weights_dtype in ((torch.float64, torch.complex128), (torch.float32, torch.complex64)):
            case = vandermonde_case(dtype, exponents_dtype=exponents_dtype).to(device)
            for name in backends(device, case.wide):
                found = case.run(name)
                assert found["gradient of exponents"].dtype == exponents_dtype
                assert found["gradient of weights"].dtype == weights_dtype


def test_only_the_weights_say_whether_it_is_computed_in_double_precision(monkeypatch: pytest.MonkeyPatch):
    asked = []

    def chosen(requested, *tensors):
        asked.append(any(tensor.dtype in dispatch.WIDE for tensor in tensors))
        return "chunked"

    monkeypatch.setattr(dispatch, "chosen", chosen)
    for dtype in (torch.float32, torch.float64):
        case = vandermonde_case(dtype)
        case.run()
        assert case.wide == (dtype == torch.float64)
    assert asked == [False, False, True, True]


@pytest.mark.parametrize("name", FAST)
def test_conjugate_views_and_autocast_change_nothing(name: str):
    case = vandermonde_case(torch.float32, (3, 20), 300)
    exponents, weights = case.tensors.values()
    with backend(name):
        expected = vandermonde(exponents.conj().resolve_conj(), weights.conj().resolve_conj(), 300)
        assert torch.equal(vandermonde(exponents.conj(), weights.conj(), 300), expected)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(vandermonde(exponents.conj(), weights.conj(), 300), expected)


def test_blocks_of_channels_change_nothing(monkeypatch: pytest.MonkeyPatch):
    case = vandermonde_case(torch.float32, (40, 16), 4096)
    for name in FAST:
        expected = case.run(name)
        monkeypatch.setattr(chunked, "CACHED", 3 * (2 * 16 * 128 + 4096))  # three channels
        found = case.run(name)
        monkeypatch.undo()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-5 * value.abs().max().item())


@pytest.mark.parametrize("tasks", [2, 3, 7])
def test_the_number_of_threads_changes_no_bit_of_a_table(tasks: int, monkeypatch: pytest.MonkeyPatch):
    case = vandermonde_case(torch.float32, (5, 9), 1000)
    monkeypatch.setattr(cpu, "threads_for", lambda elements: 1)
    expected = case.run("cpu")
    monkeypatch.setattr(cpu, "threads_for", lambda elements: tasks)
    monkeypatch.setattr(Kernel, "__call__", lambda kernel, threads, *arguments: kernel.serial(*arguments))
    found = case.run("cpu")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("length", [0, 1, 2, 3, 4, 5, 63, 64, 65, 4096, 5000, 65536])
def test_a_kernel_is_cut_into_about_as_many_rows_as_columns(length: int):
    rows, columns = chunked.cut(length)
    assert (rows - 1) * columns < max(length, 1) <= max(rows * columns, 1)
    assert rows + columns <= 3 * max(length, 1) ** 0.5
    assert columns.bit_count() == 1


@pytest.mark.parametrize("name", [None, "reference"])
def test_it_compiles_once_for_all_lengths(name: str | None):
    def call(x, w, u):
        return vandermonde(x, w, u.shape[0]) * u

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    case = vandermonde_case(torch.float32)
    leaves = [value.requires_grad_() for value in case.tensors.values()]
    with backend(name):
        for index, length in enumerate((50, 33, 1000)):
            u = torch.linspace(-1, 1, length)
            with torch._dynamo.config.patch(error_on_recompile=index > 0):
                actual = compiled(*leaves, u)
            expected = call(*leaves, u)
            assert torch.equal(actual, expected)
            for one, other in zip(
                torch.autograd.grad(actual.sum(), leaves), torch.autograd.grad(expected.sum(), leaves), strict=True
            ):
                torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("shape", "length"), [((1, 1), 1600), ((1, 20), 1100), ((2, 17), 513), ((3, 16), 512)], ids=str
)
def test_tiles_and_segments_of_the_gpu_kernels(shape: tuple[int, int], length: int, device: torch.device):
    pytest.importorskip("triton")
    worst = compare(vandermonde_case(torch.float32, shape, length).to(device), "gpu")
    assert max(worst.values()) <= 1, worst


def test_segments_are_long_where_the_device_is_full_and_short_where_it_is_not():
    pytest.importorskip("triton")
    from seqzoo.kernels.launch import Device
    from seqzoo.kernels.vandermonde import gpu

    device = Device(processors=132, warp=32)
    assert gpu.tiles_of_segment(2048, 128, device) == 128
    assert gpu.tiles_of_segment(1, 128, device) == 1
    assert gpu.tiles_of_segment(256, 128, device) == 43
    assert gpu.tiles_of_segment(0, 0, device) == 1


# in a process of its own, where large blocks are mapped and given back, so the peak is what lives at once. A first call
# at a small size compiles, which takes the most memory of all, and touches the memory of the libraries
MEMORY = """
import ctypes, sys
import torch
from seqzoo.ops import backend, vandermonde

torch.set_num_threads(2)

def tensors(length, size):
    exponents = torch.complex(-torch.rand(256, size, dtype=torch.float64), torch.rand(256, size, dtype=torch.float64))
    given = [exponents.requires_grad_(), torch.ones(256, size, dtype=torch.complex64).requires_grad_()]
    return given, torch.ones(256, length)

def run(given, weight):
    kernel = vandermonde(*given, weight.shape[1])
    return kernel.detach(), torch.autograd.grad(kernel, given, weight)

def bytes_of(values):
    return sum(value.numel() * value.element_size() for value in values)

def status(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name)) * 1024

length, size = int(sys.argv[2]), int(sys.argv[3])
with backend(sys.argv[1]):
    run(*tensors(1000, size))
    given, weight = tensors(length, size)
    ctypes.CDLL(None).malloc_trim(0)
    before = status("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets the peak
    kernel, gradients = run(given, weight)
print((status("VmHWM") - before) / bytes_of([kernel, *gradients]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the process's memory as Linux tells it")
@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize(("length", "size"), [(65536, 64), (50001, 4)])
def test_forward_and_backward_take_little_beside_the_kernel(name: str, length: int, size: int):
    # all powers at once would take 16 bytes a term where the kernel takes 4
    command = [sys.executable, "-c", MEMORY, name, str(length), str(size)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert float(done.stdout) <= 1.5
