"""``selective_scan`` on the CPU never holds (B, T, D, N): what forward and backward take beside what they must."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("numba")

# in a process of its own, where large blocks are mapped and given back, so the peak is what lives at once. A first call
# at a small size compiles, which takes the most memory of all, and touches the memory of the libraries
SCRIPT = """
import ctypes, sys
import torch
from seqzoo.ops import selective_scan

torch.set_num_threads(2)

def tensors(total, width, size, groups, dtype):
    def drawn(*shape):
        return torch.randn(shape, dtype=dtype)
    delta = torch.rand(1, total, width, dtype=dtype)
    A = -torch.rand(width, size)
    given = [drawn(1, total, width), delta, A, drawn(1, total, groups, size), drawn(1, total, groups, size)]
    given += [torch.ones(width), drawn(1, total, width), torch.zeros(width)]
    return [value.requires_grad_() for value in given]

def run(given, weight):
    y, final = selective_scan(*given, transition="exponential", delta_softplus=True)
    return y.detach(), final.detach(), torch.autograd.grad(y, given, weight)

def bytes_of(values):
    return sum(value.numel() * value.element_size() for value in values)

def status(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name)) * 1024

dtype, width, size, groups = getattr(torch, sys.argv[1]), *map(int, sys.argv[2:])
small = tensors(300, width, size, groups, dtype)
run(small, torch.ones_like(small[0]))
given = tensors(8192, width, size, groups, dtype)
weight = torch.ones_like(given[0])
ctypes.CDLL(None).malloc_trim(0)
before = status("VmRSS")
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # resets the peak
y, final, gradients = run(given, weight)
print((status("VmHWM") - before + bytes_of([*given, weight])) / bytes_of([*given, weight, y, final, *gradients]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the process's memory as Linux tells it")
@pytest.mark.parametrize(
    ("dtype", "width", "size", "groups"),
    [
        ("float32", 1024, 16, 1),
        ("float32", 1024, 16, 4),
        ("float32", 1024, 64, 1),
        pytest.param("bfloat16", 1024, 16, 1, marks=pytest.mark.slow),
    ],
)
def test_forward_and_backward_take_at_most_half_as_much_again(dtype: str, width: int, size: int, groups: int):
    command = [sys.executable, "-c", SCRIPT, dtype, str(width), str(size), str(groups)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert float(done.stdout) <= 1.5
