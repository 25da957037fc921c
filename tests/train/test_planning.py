"""Minutes to steps, the schedule, and the table of metrics: functions of numbers."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch

from seqzoo.models import ModelConfig
from seqzoo.train.callbacks.planning import MARGIN, REPORT_SECONDS, SKIPPED, StepsFromMinutes, plan_steps
from seqzoo.train.callbacks.progress import duration, quantity
from seqzoo.train.metrics_table import COLUMNS, MetricsTable, read_metrics
from seqzoo.train.modules import LanguageModeling
from seqzoo.train.schedule import SCHEDULES, rate_factor


def test_steps_fill_the_time():
    steps = plan_steps(budget=300, elapsed=10, done=40, step=0.25, validation=2.0, every=200, final=8.0)
    spent = 10 + (steps - 40) * (0.25 + 2.0 / 200) + 8.0
    assert 300 * MARGIN - 0.3 < spent <= 300 * MARGIN
    assert plan_steps(budget=1, elapsed=5, done=7, step=0.25, validation=2.0, every=0, final=8.0) == 8


@pytest.mark.parametrize(("first", "tested"), [(0, 0), (20, 0), (0, 100)])
def test_the_callback_decides_once_from_the_steps_after_the_first(first, tested, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    decided = []
    callback = StepsFromMinutes(1.0, 50, decided.append)
    loop = SimpleNamespace(max_steps=-1)
    windows = type("Windows", (), {"context": 32, "starts": range(4), "__len__": lambda self: 10})()
    sides = {"training": None, "validation": None, **({"test": None} if tested else {})}
    trainer = SimpleNamespace(
        max_steps=-1,
        global_step=first,
        accumulate_grad_batches=1,
        limit_val_batches=4,
        val_check_interval=100,
        fit_loop=SimpleNamespace(epoch_loop=loop),
        strategy=SimpleNamespace(reduce_boolean_decision=lambda one, all: one, broadcast=lambda one: one),
        datamodule=SimpleNamespace(val_dataloader=lambda: windows, test_dataloader=lambda: [0] * tested, sides=sides),
    )
    batch = torch.zeros(8, 33)
    callback.on_train_start(trainer, None)
    while not decided:
        trainer.global_step += 1
        # the first steps compile, and later ones what only they meet; they must not count
        stalls = trainer.global_step - first <= SKIPPED or trainer.global_step - first == SKIPPED + 5
        now[0] += 2.0 if stalls else 0.2
        callback.on_train_batch_end(trainer, None, None, batch, trainer.global_step - 1)
    assert trainer.global_step == first + SKIPPED + 10, "8 steady steps are too short a time, 9 are 3 % of the minute"
    assert loop.max_steps == decided[0]
    # a window of 4 * 32 tokens takes half of what they take in a step of 8 * 32
    judged = (10 + tested) * 0.2 * 0.5 / 2
    remaining = 60 * MARGIN - (now[0] - 1000.0) - REPORT_SECONDS - judged
    assert decided[0] == pytest.approx(trainer.global_step + remaining / 0.2, rel=0.02)
    trainer.max_steps = decided[0]
    callback.on_train_batch_end(trainer, None, None, batch, 60)
    assert len(decided) == 1


@pytest.mark.parametrize("schedule", [name for name in SCHEDULES if name != "refined"])
def test_schedules(schedule):
    total, warmup = 200, 20
    values = [rate_factor(step, warmup, total, schedule) for step in range(total)]
    assert max(values) == pytest.approx(1.0, abs=1e-2)
    assert values[:warmup] == sorted(values[:warmup])
    assert values[warmup:] == sorted(values[warmup:], reverse=True)
    assert values[:warmup] == [rate_factor(step, warmup, -1, schedule) for step in range(warmup)]
    if schedule in ("constant", "schedule_free"):
        assert set(values[warmup:]) == {1.0}
    elif schedule == "inverse_sqrt":
        assert values[4 * 21 - 1] == pytest.approx(0.5)
        assert rate_factor(500, warmup, -1, schedule) == rate_factor(500, warmup, 900, schedule)
    else:
        assert 0 < values[-1] < 0.02
        assert rate_factor(500, warmup, -1, schedule) == 1.0
        assert rate_factor(total + 5, warmup, total, schedule) == pytest.approx(0.0, abs=1e-12)
    assert rate_factor(0, 0, 1, "cosine") == pytest.approx(0.5)


def test_the_shapes_of_schedules():
    # half way between the end of the warm-up and the run's
    half = {schedule: rate_factor(99, 0, 199, schedule) for schedule in SCHEDULES if schedule != "refined"}
    falling = {"cosine": 0.5, "linear": 0.5, "wsd": 1.0, "rex": 2 / 3, "inverse_sqrt": 0.1}
    assert half == pytest.approx(falling | {"constant": 1.0, "schedule_free": 1.0})
    # a quarter into the last fifth
    assert rate_factor(169, 0, 199, "wsd") == pytest.approx(0.5)


def test_a_schedule_that_is_none():
    config = ModelConfig(vocab_size=256, d_model=16, n_layers=1, pattern="min_gru")
    with pytest.raises(ValueError, match=r"no schedule 'cosin'.*cosine"):
        LanguageModeling(config, schedule="cosin")


def test_metrics_lose_and_repeat_nothing(tmp_path):
    path = tmp_path / "metrics.csv"
    table = MetricsTable(path)
    table.log_metrics({"train_loss": 2.5, "train_bpb": 3.6, "lr": 1e-4, "unknown": 1.0}, 10)
    table.log_metrics({"validation_bpb": 3.0, "seconds": 12.0}, 20)
    table.log_metrics({"unknown": 1.0}, 30)
    table.log_metrics({"train_loss": 2.25}, 30)
    assert path.read_text().splitlines()[0] == ",".join(COLUMNS)
    assert [row["step"] for row in read_metrics(path)] == [10, 20, 30]
    before = path.read_text()
    with path.open("a") as file:
        file.write("40,1.2")
    assert len(read_metrics(path)) == 3, "a line that a kill cut short does not count"
    MetricsTable(path, keep=30)
    assert path.read_text() == before
    MetricsTable(path, keep=20)
    assert path.read_text() == "".join(before.splitlines(keepends=True)[:3])
    MetricsTable(path)
    assert read_metrics(path) == []


def test_words_for_numbers():
    assert [quantity(value) for value in (0.0, 999.0, 1234.0, 41.2e6)] == ["0 ", "999 ", "1.23 k", "41.2 M"]
    assert [duration(value) for value in (-1.0, 59.6, 3661.0)] == ["0:00", "1:00", "1:01:01"]
