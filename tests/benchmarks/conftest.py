"""Measuring beside the limit of the same machine, and the table and picture that come of it.

Every benchmark belongs to a group (an op or layer at one shape); each group holds a ``limit``, what the machine could
do at best, and peers where they are installed. On the CPU glibc's thresholds are raised for all alike, as the training
command does: with its defaults every large output is mapped and faulted anew, which costs more than the work.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from seqzoo.train.allocator import keep_freed_memory

RESULTS = Path(".benchmarks")
# float32 numbers, 128 MB: more than the last-level cache holds
CACHE = 1 << 25


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", default=str(RESULTS), help="folder for the table and the picture of the benchmarks")


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

    On the CPU, unless ``warm``, the caches are emptied before every round: repeated on the same few megabytes an
    addition would run at the speed of the cache, which no layer of a model sees.
    """
    sweep = torch.zeros(CACHE if device.type == "cpu" else 0)

    def run(
        call: Callable[[], object], *, group: str, name: str, role: str, seconds: float = 2.0, warm: bool = False
    ) -> None:
        def synchronised() -> None:
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()

        for _ in range(2):
            synchronised()
        started = time.perf_counter()
        synchronised()
        once = time.perf_counter() - started
        benchmark.group = group
        benchmark.extra_info.update(name=name, role=role)

        def empty_caches() -> None:
            sweep.sum()  # read alone: lines that were written would be written back during the round

        rounds = max(3, min(200, int(seconds / max(once, 1e-9))))
        benchmark.pedantic(synchronised, setup=None if warm else empty_caches, rounds=rounds)

    return run


def _table(benchmarks: list) -> list[str]:
    groups: dict[str, list] = {}
    for one in benchmarks:
        if "role" in one.extra_info:
            groups.setdefault(one.group, []).append(one)
    lines = ["| what | who | median | of the limit | seqzoo is faster by |", "|---|---|---|---|---|"]
    for group, entries in groups.items():
        limit = next((e.stats.median for e in entries if e.extra_info["role"] == "limit"), None)
        ours = next((e.stats.median for e in entries if e.extra_info["role"] == "seqzoo"), None)
        for entry in sorted(entries, key=lambda e: e.stats.median):
            median, role = entry.stats.median, entry.extra_info["role"]
            times = f"{median / limit:.2f}x" if limit else ""
            faster = f"{median / ours:.1f}x" if ours and role == "peer" else ""
            lines.append(f"| {group} | {entry.extra_info['name']} | {median * 1e3:.3f} ms | {times} | {faster} |")
    return lines


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
    folder = Path(config.getoption("--results"))
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"# Benchmarks, {device}", "", _hardware(device), "", *_table(benchmarks)]
    (folder / f"{device}.md").write_text("\n".join(lines) + "\n")
    _picture(benchmarks, folder / f"{device}.png")
    terminalreporter.write_line("\n".join(lines[2:]))
    terminalreporter.write_line(f"written to {folder / device}.md and .png")
