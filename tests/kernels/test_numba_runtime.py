"""The Numba kernels' surroundings: threads, forks, the cache on disk, and the functions of one number."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqzoo.kernels import dispatch, numba_runtime
from seqzoo.ops import gated_scan, linear_scan
from seqzoo.testing import selective_scan_case

numba = pytest.importorskip("numba")

SECONDS = 240
several = pytest.mark.skipif(numba.config.NUMBA_NUM_THREADS < 2, reason="this machine has one core")

# a scan, on two threads where it may use them; all else in a child is NumPy's, as torch's threads do not survive a fork
PRELUDE = """
import os, threading, warnings
import numpy, torch
from seqzoo.ops import backend, linear_scan
torch.set_num_threads(2)
# forking with threads is what is tested here
warnings.filterwarnings("ignore", message=".*multi-threaded.*fork.*", category=DeprecationWarning)

def scan(seed=0):
    generator = torch.Generator().manual_seed(seed)
    a, b, weight = (torch.rand(4, 300, 64, generator=generator) for _ in range(3))
    a.requires_grad_(), b.requires_grad_()
    with backend("cpu"):
        h, final = linear_scan(a, b)
        return [tensor.detach().numpy() for tensor in (h, final, *torch.autograd.grad(h, (a, b), weight))]

def agree(found, expected):
    return all(numpy.array_equal(one, other) for one, other in zip(found, expected, strict=True))

def in_fork(check, seconds=60):
    \"\"\"Runs check in a forked child, which a blocked lock would keep for ever.\"\"\"
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if check() else 1)
        except BaseException:
            os._exit(2)
    alarm = threading.Timer(seconds, os.kill, (child, 9))
    alarm.start()
    status = os.waitpid(child, 0)[1]
    alarm.cancel()
    assert status == 0, f"the child ended with {status}"
"""

BUSY = """
expected = scan()
failures, done = [], threading.Event()

def work():
    try:
        while not done.is_set():
            if not agree(scan(), expected):
                failures.append("other values")
    except BaseException as error:
        failures.append(repr(error))

workers = [threading.Thread(target=work, daemon=True) for _ in range(3)]
for worker in workers:
    worker.start()
for _ in range(5):
    in_fork(lambda: agree(scan(), expected))
done.set()
for worker in workers:
    worker.join(60)
    assert not worker.is_alive()
assert not failures, failures
"""


def run(script: str, *, prelude: str = PRELUDE, folder: Path | None = None, **environment: str) -> str:
    """Runs a script in a process of its own and returns what it printed; as a file where it has to be importable."""
    command = ["-c", prelude + script]
    if folder is not None:
        path = folder / "script.py"
        path.write_text(prelude + script)
        command = [str(path)]
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
        env={**os.environ, "NUMBA_NUM_THREADS": "2", **environment},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.strip()


@pytest.fixture
def two_threads():
    previous, numbas = torch.get_num_threads(), numba.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(previous)
    numba.set_num_threads(numbas)


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Which compilation of the forward kernel ran, and Numba's number of threads meanwhile."""
    from seqzoo.kernels.linear_scan import cpu

    ran = []
    for name in ("serial", "parallel"):
        compiled = getattr(cpu._forward, name)

        def record(*arguments, name=name, compiled=compiled):
            ran.append((name, numba.get_num_threads()))
            compiled(*arguments)

        monkeypatch.setattr(cpu._forward, name, record)
    return ran


def large() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(4, 300, 64), torch.randn(4, 300, 64)


@several
def test_torchs_number_of_threads_binds_and_numbas_own_is_restored(two_threads, compilations):
    with dispatch.backend("cpu"):
        linear_scan(*large())
        numba.set_num_threads(1)
        linear_scan(*large())
        assert numba.get_num_threads() == 1
        torch.set_num_threads(1)
        numba.set_num_threads(2)
        linear_scan(*large())
        assert numba.get_num_threads() == 2
    assert compilations == [("parallel", 2), ("parallel", 2), ("serial", 2)]


@several
def test_a_new_thread_takes_torchs_number_of_threads(two_threads, compilations):
    def work():
        with dispatch.backend("cpu"):
            linear_scan(*large())

    numba.set_num_threads(1)
    worker = threading.Thread(target=work)
    worker.start()
    worker.join(SECONDS)
    assert not worker.is_alive()
    assert compilations == [("parallel", 2)]
    assert numba.get_num_threads() == 1


@several
def test_small_inputs_take_one_thread(two_threads, compilations):
    with dispatch.backend("cpu"):
        linear_scan(torch.rand(2, 10, 8), torch.rand(2, 10, 8))
    assert [name for name, _ in compilations] == ["serial"]


@several
@pytest.mark.parametrize("time_invariant", [False, True])
def test_the_number_of_threads_changes_no_bit(two_threads, time_invariant):
    found = []
    for threads, batch in itertools.product((1, 2), (1, 3)):
        torch.set_num_threads(threads)
        generator = torch.Generator().manual_seed(0)
        shape = (64,) if time_invariant else (batch, 1000, 64)
        a = torch.rand(shape, generator=generator).requires_grad_()
        b = torch.randn(batch, 1000, 64, generator=generator).requires_grad_()
        with dispatch.backend("cpu"):
            h, final = linear_scan(a, b)
            found.append([h, final, *torch.autograd.grad((h * h).sum() + final.sum(), (a, b))])
    for one, other in ((found[0], found[2]), (found[1], found[3])):
        assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


@several
@pytest.mark.parametrize("transition", ["exponential", "longhorn"])
def test_the_number_of_threads_changes_no_bit_of_a_selective_scan(two_threads, transition):
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        # more columns than one part, more sequences than one slot
        cases = [
            selective_scan_case(torch.float32, (1, 200, 300), size=16, transition=transition),
            selective_scan_case(torch.float32, (0, 0, 64), size=16, lengths=(0, 300, 3, 0, 500, 40), groups=2),
        ]
        found.append([case.run("cpu") for case in cases])
    for one, other in zip(*found, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_forked_child_computes_after_its_parent_ran_on_several_threads():
    run("expected = scan()\nin_fork(lambda: agree(scan(), expected))\nassert agree(scan(), expected)")


def test_threads_and_forks_at_once():
    assert run(BUSY + "from seqzoo.kernels.numba_runtime import threading_layer\nprint(threading_layer())") in (
        "omp",
        "workqueue",
    )


@pytest.mark.parametrize("how", ["missing", "configured"])
def test_without_openmp_numbas_own_threads_serve(how: str):
    prelude = 'import sys\nsys.modules["numba.np.ufunc.omppool"] = None\n' if how == "missing" else ""
    environment = {"NUMBA_THREADING_LAYER": "workqueue"} if how == "configured" else {}
    script = BUSY + "from seqzoo.kernels.numba_runtime import threading_layer\nprint(threading_layer())"
    assert run(script, prelude=prelude + PRELUDE, **environment) == "workqueue"


def test_a_fork_during_the_first_compilation():
    script = """
# a fork in the midst of an import is beyond anyone's help
import numba
import seqzoo.kernels.linear_scan.cpu

worker = threading.Thread(target=scan, daemon=True)
worker.start()
forks = 0
while worker.is_alive():
    in_fork(lambda: numba.njit(lambda x: x + 1)(1) == 2)
    forks += 1
    worker.join(0.3)
assert forks > 1
"""
    run(script, SEQZOO_CACHE=os.devnull)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_of_a_data_loader(method: str, tmp_path: Path):
    script = f"""
class Scans(torch.utils.data.Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, index):
        return [array.sum() for array in scan(index)]

if __name__ == "__main__":
    expected = [Scans()[index] for index in range(6)]
    loader = torch.utils.data.DataLoader(
        Scans(), batch_size=None, num_workers=2, timeout=100, multiprocessing_context="{method}"
    )
    for found, one in zip(loader, expected, strict=True):
        assert agree(found, one)
    print(len(expected))
"""
    assert run(script, folder=tmp_path) == "6"


STATISTICS = """
from seqzoo.kernels.linear_scan import cpu
from seqzoo.kernels.numba_cache import cache_folder
first = scan()
torch.set_num_threads(1)
assert agree(scan(), first)
for one in (cpu._forward, cpu._grade_a):
    for dispatcher in (one.serial, one.parallel):
        print(sum(dispatcher.stats.cache_hits.values()), sum(dispatcher.stats.cache_misses.values()))
print(cache_folder() is not None)
"""


def test_compiled_kernels_are_kept_for_the_next_process(tmp_path: Path):
    cache = {"SEQZOO_CACHE": str(tmp_path / "new" / "cache")}
    assert run(STATISTICS, **cache).split("\n") == [*["0 1"] * 4, "True"]
    assert run(STATISTICS, **cache).split("\n") == [*["1 0"] * 4, "True"]


def test_processes_that_compile_at_once_share_the_cache(tmp_path: Path):
    cache = {"SEQZOO_CACHE": str(tmp_path)}
    outputs = []
    workers = [threading.Thread(target=lambda: outputs.append(run(STATISTICS, **cache))) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(SECONDS)
    assert len(outputs) == 2
    assert run(STATISTICS, **cache).split("\n") == [*["1 0"] * 4, "True"]


COLLISION = """
import itertools
from numba.core.bytecode import FunctionIdentity
# the number that tells functions of one name apart counts what a process has compiled: let all processes agree
FunctionIdentity._unique_ids = itertools.repeat(5000)
for shape in {shapes}:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(size, generator=generator, dtype=torch.float64).requires_grad_() for size in (shape, (2, 9, 8)))
    found = []
    for name in ("cpu", "reference"):
        with backend(name):
            h, _ = linear_scan(a, b)
            found.append(torch.autograd.grad(h.square().sum(), (a, b)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
print("right")
"""


def test_functions_of_one_name_that_processes_have_compiled_apart(tmp_path: Path):
    cache = {"SEQZOO_CACHE": str(tmp_path)}
    for shapes in ([(2, 9, 8)], [(8,)], [(2, 9, 8), (8,)]):
        assert run(COLLISION.format(shapes=shapes), **cache) == "right"


def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path: Path):
    obstacle = tmp_path / "file"
    obstacle.write_text("not a folder")
    assert run(STATISTICS, SEQZOO_CACHE=str(obstacle)).split("\n")[-1] == "False"
    script = """
import shutil
from pathlib import Path
folder = cache_folder()
shutil.rmtree(folder)
folder.write_text("not a folder any more")
"""
    setup, rest = STATISTICS.split("first =")
    assert run(setup + script + "first =" + rest, SEQZOO_CACHE=str(tmp_path / "cache")).split("\n")[-1] == "True"


def test_without_numba_the_chunked_implementation_takes_over_with_one_warning():
    script = """
import sys, warnings
for name in ("numba", "llvmlite"):
    sys.modules[name] = None
import torch
import seqzoo.kernels.numba_runtime
from seqzoo.ops import gated_scan, linear_scan
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        linear_scan(torch.full((1, 3, 1), 0.5), torch.ones(1, 3, 1))
        h, _ = gated_scan(torch.ones(1, 3, 2), cell="min_gru")
print(len(caught), caught[0].message)
"""
    printed = run(script, prelude="")
    assert printed.startswith("1 ")
    assert "install numba" in printed


def test_importing_the_runtime_does_not_import_numba():
    assert run('import sys, seqzoo.kernels.numba_runtime\nprint("numba" in sys.modules)', prelude="") == "False"


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 3000), min_size=1, max_size=40),
    width=st.integers(1, 700),
    threads=st.integers(1, 16),
)
def test_a_plan_covers_everything_once_and_evenly(lengths, width, threads):
    bounds = np.concatenate(([0], np.cumsum(lengths)))
    found, tasks = numba_runtime.plan(torch.from_numpy(bounds.astype(np.int32)), 1, int(bounds[-1]), width, threads)
    assert found.tolist() == bounds.tolist()
    assert 1 <= len(tasks) <= threads
    covered = np.zeros((len(lengths), width), dtype=int)
    for first, count, start, stop in tasks:
        covered[start:stop, first : first + count] += 1
    assert (covered == 1).all()
    # one task for all, or no task above its share by more than a sequence and a block of columns
    longest = max(count * (bounds[stop] - bounds[start]) for _, count, start, stop in tasks)
    share = bounds[-1] * width / threads
    assert longest <= max(share * 2, share + max(lengths) * width)


def test_a_plan_splits_columns_only_where_sequences_are_too_few():
    def tasks(*arguments):
        return numba_runtime.plan(*arguments)[1].tolist()

    assert tasks(None, 4, 4096, 512, 2) == [[0, 512, 0, 2], [0, 512, 2, 4]]
    assert tasks(None, 1, 4096, 4096, 2) == [[0, 2048, 0, 1], [2048, 2048, 0, 1]]
    # half a row is no quicker than a whole one, a quarter is
    assert tasks(None, 1, 4096, 512, 2) == [[0, 512, 0, 1]]
    assert tasks(None, 1, 4096, 512, 4) == [[first, 128, 0, 1] for first in (0, 128, 256, 384)]
    short = torch.arange(0, 10_001, 10, dtype=torch.int32)
    assert tasks(short, 1, 10_000, 512, 2) == [[0, 512, 0, 500], [0, 512, 500, 1000]]
    uneven = torch.tensor([0, 9000, 9010, 10_000], dtype=torch.int32)
    assert tasks(uneven, 1, 10_000, 512, 4) == [[first, 128, 0, 3] for first in (0, 128, 256, 384)]


@pytest.fixture(scope="module")
def loops():
    """Loops over arrays around the functions of one number."""
    from seqzoo.kernels import numba_math, numba_memory

    @numba_runtime.function
    def exp(x, y):
        for i in range(x.size):
            y[i] = numba_math.exp(x[i])

    @numba_runtime.function
    def sigmoid(x, y):
        for i in range(x.size):
            y[i] = numba_math.sigmoid(x[i])

    @numba_runtime.function
    def exp_decay(x, y):
        for i in range(x.size):
            y[i] = numba_math.exp_decay(x[i])

    @numba_runtime.function
    def softplus(x, y):
        for i in range(x.size):
            y[i] = numba_math.softplus(x[i])

    @numba_runtime.function
    def copy(x, y):
        for i in range(x.size):
            numba_memory.write(y, i, numba_memory.read(x, i, 0), 1)

    return {"exp": exp, "sigmoid": sigmoid, "copy": copy, "exp_decay": exp_decay, "softplus": softplus}


def test_exp_in_single_precision_is_within_two_units(loops):
    x = np.linspace(-110, 95, 4_000_001, dtype=np.float32)
    y = np.empty_like(x)
    loops["exp"](x, y)
    with np.errstate(over="ignore", under="ignore"):
        exact = np.exp(x.astype(np.float64))
        rounded = exact.astype(np.float32)
    finite = np.isfinite(rounded)
    assert np.array_equal(np.isinf(y), ~finite)
    assert (np.abs(y - exact)[finite] / np.spacing(rounded[finite])).max() < 2


def test_exp_at_the_ends(loops):
    x = np.array([np.nan, np.inf, -np.inf, 0, -0.0, 1e30, -1e30, -104, 88.75], dtype=np.float32)
    y = np.empty_like(x)
    loops["exp"](x, y)
    assert np.isnan(y[0])
    assert y[1:].tolist() == [np.inf, 0, 1, 1, np.inf, 0, 0, np.inf]


def test_exp_in_double_precision(loops):
    x = np.linspace(-745, 709, 100_001)
    y = np.empty_like(x)
    loops["exp"](x, y)
    np.testing.assert_allclose(y, np.exp(x), rtol=4e-16, atol=0)


def test_sigmoid_in_single_precision_is_within_six_units(loops):
    x = np.linspace(-87, 120, 4_000_001, dtype=np.float32)
    y = np.empty_like(x)
    loops["sigmoid"](x, y)
    exact = 1 / (1 + np.exp(-x.astype(np.float64)))
    assert (np.abs(y - exact) / np.spacing(exact.astype(np.float32))).max() < 6


def test_sigmoid_at_the_ends(loops):
    x = np.array([np.nan, np.inf, -np.inf, 0, -0.0, 1e30, -1e30], dtype=np.float32)
    y = np.empty_like(x)
    loops["sigmoid"](x, y)
    assert np.isnan(y[0])
    assert y[1:].tolist() == [1, 0, 0.5, 0.5, 1, 0]


def test_sigmoid_in_double_precision(loops):
    x = np.linspace(-700, 700, 100_001)
    y = np.empty_like(x)
    loops["sigmoid"](x, y)
    np.testing.assert_allclose(y, 1 / (1 + np.exp(-x)), rtol=1e-15, atol=0)


def test_exp_of_complex_numbers(loops):
    real, imaginary = np.meshgrid(np.linspace(-700, 700, 301), np.linspace(-1000, 1000, 301))
    x = (real + 1j * imaginary).ravel()
    y = np.empty_like(x)
    loops["exp"](x, y)
    np.testing.assert_allclose(y, np.exp(x), rtol=1e-15, atol=0)


def test_the_exp_of_a_decay_keeps_its_bound(loops):
    x = np.concatenate([np.linspace(-87, 88, 2_000_001), np.linspace(-1, 0, 1_000_001)]).astype(np.float32)
    y = np.empty_like(x)
    loops["exp_decay"](x, y)
    exact = np.exp(x.astype(np.float64))
    assert (np.abs(y - exact) <= (1e-7 + 3e-9 * np.abs(x)) * exact).all()
    assert np.abs(y - exact)[x <= 0].max() < np.finfo(np.float32).eps
    ends = np.array([np.nan, 0, -0.0, -88, -1e30, -np.inf, 89, np.inf], dtype=np.float32)
    y = np.empty_like(ends)
    loops["exp_decay"](ends, y)
    assert np.isnan(y[0])
    assert y[1:].tolist() == [1, 1, 0, 0, 0, np.inf, np.inf]


def test_softplus_in_single_precision_is_within_three_units(loops):
    x = np.concatenate([np.linspace(-87, 100, 4_000_001), np.linspace(-2, 2, 1_000_001)]).astype(np.float32)
    y = np.empty_like(x)
    loops["softplus"](x, y)
    exact = np.logaddexp(0, x.astype(np.float64))
    assert (np.abs(y - exact) / np.spacing(exact.astype(np.float32))).max() < 3


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_softplus_at_the_ends(loops, dtype):
    x = np.array([np.nan, np.inf, -np.inf, 1e30, -1e30, 500], dtype=dtype)
    y = np.empty_like(x)
    loops["softplus"](x, y)
    assert np.isnan(y[0])
    assert y[1:].tolist() == [np.inf, 0, dtype(1e30), 0, 500]


def test_softplus_in_double_precision(loops):
    x = np.linspace(-700, 700, 100_001)
    y = np.empty_like(x)
    loops["softplus"](x, y)
    np.testing.assert_allclose(y, np.logaddexp(0, x), rtol=1e-15, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_number_widens_exactly(loops, dtype):
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    found = torch.full((2**16,), -1.0)
    loops["copy"](numba_runtime.array(numbers), found.numpy())
    expected = numbers.float()
    assert torch.equal(found.isnan(), expected.isnan())
    # as bits: the sign of zero counts
    assert torch.equal(found.view(torch.int32)[~found.isnan()], expected.view(torch.int32)[~found.isnan()])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_numbers_narrow_to_the_nearest(loops, dtype):
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).float().view(torch.int32)
    # each 16-bit number, the points half-way to the next one, and the float32 neighbours of both
    half = 1 << (15 if dtype == torch.bfloat16 else 12)
    near = torch.cat([numbers + offset for offset in (0, 1, -1, half, half + 1, half - 1)])
    anything = torch.randint(-(2**31), 2**31, (2_000_000,), generator=torch.Generator().manual_seed(0))
    x = torch.cat([near, anything.to(torch.int32)]).view(torch.float32)
    found = torch.empty(x.shape, dtype=dtype)
    loops["copy"](x.numpy(), numba_runtime.array(found))
    expected = x.to(dtype)
    assert torch.equal(found.isnan(), x.isnan())
    assert torch.equal(expected.isnan(), x.isnan())
    kept = ~x.isnan()
    assert torch.equal(found.view(torch.int16)[kept], expected.view(torch.int16)[kept])


def test_arrays_share_memory_and_need_no_detaching():
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.complex64):
        tensor = torch.zeros(2, 3, dtype=dtype, requires_grad=True)
        numba_runtime.array(tensor)[4] = 1
        assert tensor[1, 1] != 0
        assert tensor.detach().count_nonzero() == 1


def test_conjugated_and_strided_arguments():
    torch.manual_seed(0)
    a, b = (torch.randn(2, 9, 5, dtype=torch.complex128) for _ in range(2))
    x = torch.randn(2, 4, 9, dtype=torch.float64)
    found = []
    for name in ("reference", "cpu"):
        with dispatch.backend(name):
            h, final = linear_scan(a.conj(), b.conj())
            found.append((h, final, *gated_scan(x.mT, cell="min_gru"), *linear_scan(a.mT.conj(), b.mT)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
