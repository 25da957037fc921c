"""Measuring beside the limit of the same machine, and the tables and pictures that come of it, one a file.

Every benchmark belongs to a group (an op or layer at one shape); each group holds a ``limit``, what the machine could
do at best, and peers where they are installed. On the CPU glibc's thresholds are raised for all alike, as the training
command does: with its defaults every large output is mapped and faulted anew, which costs more than the work.
"""

from __future__ import annotations

import itertools
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from seqzoo.train.allocator import keep_freed_memory

RESULTS = Path(".benchmarks")
# bytes; several times what a last-level cache holds
CACHE = 1 << 27


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", default=str(RESULTS), help="folder for the tables and pictures of the benchmarks")


@pytest.fixture(scope="session", autouse=True)
def thresholds(request: pytest.FixtureRequest):
    if request.config.getoption("--device") == "cpu":
        keep_freed_memory()


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Off, in place of the suite's: filling every output with NaN would be measured too."""
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def measure(benchmark, device: torch.device):
    """Measures a callable in a group under a role: ``limit``, ``seqzoo`` or ``peer``.

    Takes what *makes* the callable, with tensors of its own, and what makes the limit's, which is then called before
    every round: the speed of a shared machine's memory changes within seconds, the ratio of neighbours does not.

    As many are made and called in turn as together exceed the CPU's caches: repeated on the same few megabytes an
    addition would run at the speed of the cache, which no layer of a model sees. ``nbytes`` is what one call's tensors
    hold; without it there is a single one, called again and again.
    """

    def run(
        make: Callable[[], Callable[[], object]],
        *,
        group: str,
        name: str,
        role: str,
        limit: Callable[[], Callable[[], object]] | None = None,
        nbytes: int | None = None,
        seconds: float = 2.0,
    ) -> None:
        copies = 1 if nbytes is None or device.type != "cpu" else -(-CACHE // nbytes)

        def rotation(make: Callable[[], Callable[[], object]]) -> Callable[[], float]:
            turn = itertools.cycle([make() for _ in range(copies)])

            def synchronised() -> float:
                call = next(turn)
                started = time.perf_counter()
                call()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                return time.perf_counter() - started

            return synchronised

        measured, beside = rotation(make), None if limit is None else rotation(limit)
        for _ in range(2 * copies):
            once = measured()
        of_limit: list[float] = []

        def measure_limit() -> None:
            if beside is not None:
                of_limit.append(beside())

        benchmark.group = group
        rounds = max(3, min(400, int(seconds / max(once, 1e-9))))
        benchmark.pedantic(measured, setup=measure_limit, rounds=rounds)
        benchmark.extra_info.update(name=name, role=role, limit=statistics.median(of_limit) if of_limit else None)

    return run


@pytest.fixture
def training_step(device: torch.device):
    """What makes forward and backward passes of a module that ``build`` makes, over ``shape``, (B, T, D)."""

    def of(build: Callable[[], torch.nn.Module], shape: tuple[int, int, int]) -> Callable[[], Callable[[], object]]:
        def make() -> Callable[[], object]:
            module = build().to(device)
            x = torch.randn(shape, device=device, requires_grad=True)
            sources = [x, *module.parameters()]
            y = module(x)
            weight = torch.randn_like(y[0] if isinstance(y, tuple) else y)

            def call() -> object:
                y = module(x)
                return torch.autograd.grad(y[0] if isinstance(y, tuple) else y, sources, weight)

            return call

        return make

    return of


def _table(benchmarks: list) -> list[str]:
    groups: dict[str, list] = {}
    for one in benchmarks:
        if "role" in one.extra_info:
            groups.setdefault(one.group, []).append(one)
    lines = ["| what | who | median | of the limit beside it | seqzoo is faster by |", "|---|---|---|---|---|"]
    for group, entries in groups.items():
        ours = next((_ratio(e) or e.stats.median for e in entries if e.extra_info["role"] == "seqzoo"), None)
        for entry in sorted(entries, key=lambda e: e.stats.median):
            ratio, name = _ratio(entry), entry.extra_info["name"]
            times = f"{ratio:.2f}x" if ratio else ""
            faster = (
                f"{(ratio or entry.stats.median) / ours:.1f}x" if ours and entry.extra_info["role"] == "peer" else ""
            )
            lines.append(f"| {group} | {name} | {entry.stats.median * 1e3:.3f} ms | {times} | {faster} |")
    return lines


def _ratio(entry) -> float | None:
    limit = entry.extra_info["limit"]
    return entry.stats.median / limit if limit else None


def _picture(benchmarks: list, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours = {"limit": "#9e9e9e", "seqzoo": "#1565c0", "peer": "#ef6c00"}
    groups: dict[str, list] = {}
    for one in benchmarks:
        if "role" in one.extra_info:
            groups.setdefault(one.group, []).append(one)
    rows = sum(len(entries) + 1 for entries in groups.values())
    figure, axes = pyplot.subplots(figsize=(10, 0.28 * rows + 1))
    place, ticks, labels = 0, [], []
    for group, entries in groups.items():
        axes.text(1.01, place, group, transform=axes.get_yaxis_transform(), va="center", fontsize=8, weight="bold")
        for entry in sorted(entries, key=lambda e: e.stats.median):
            axes.barh(place, entry.stats.median * 1e3, color=colours[entry.extra_info["role"]])
            axes.text(entry.stats.median * 1e3, place, f" {entry.stats.median * 1e3:.2f}", va="center", fontsize=7)
            ticks.append(place)
            labels.append(entry.extra_info["name"])
            place += 1
        place += 1
    axes.set_yticks(ticks, labels, fontsize=8)
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("median, milliseconds (grey: limit, blue: SeqZoo, orange: peers)")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)


def _hardware(device: str) -> str:
    name = torch.cuda.get_device_name() if device == "cuda" else f"{_processor()}, {torch.get_num_threads()} threads"
    return f"{name}; torch {torch.__version__}, Python {platform.python_version()}"


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    session = getattr(config, "_benchmarksession", None)
    benchmarks = [one for one in session.benchmarks if one.stats.data] if session is not None else []
    if not benchmarks:
        return
    device = config.getoption("--device")
    folder = Path(config.getoption("--results")) / device
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, list] = {}
    for one in benchmarks:
        files.setdefault(Path(one.fullname.split("::")[0]).stem.removeprefix("test_"), []).append(one)
    for name, entries in files.items():
        lines = [f"# {name}, {device}", "", _hardware(device), "", *_table(entries)]
        (folder / f"{name}.md").write_text("\n".join(lines) + "\n")
        _picture(entries, folder / f"{name}.png")
        terminalreporter.write_line("\n".join(lines[2:]))
    terminalreporter.write_line(f"tables and pictures are in {folder}")
