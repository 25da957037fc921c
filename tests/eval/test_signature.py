"""The signature matrix: its table and command, and one cell of each verdict in full."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("sklearn")

from seqzoo.cli import main
from seqzoo.eval.brief import RATE, accuracy
from seqzoo.eval.signature import ROWS, TASKS, LongShortTermMemory, build, holds, markdown, medians, run
from seqzoo.train.data.windows import IGNORED


@pytest.mark.parametrize(("name", "task"), [(name, task) for name, row in ROWS.items() for task in row.expected])
def test_every_cell_builds_and_steps(name, task):
    model, (x, labels) = build(ROWS[name], task), TASKS[task].training(0)(3)
    before = accuracy(model, TASKS[task].judging())
    assert 0 <= before < 0.7
    model.loss(x[:4], labels[:4]).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_seeds_draw_different_batches_and_none_that_are_judged():
    for task in TASKS.values():
        first = task.training(0)(3)
        assert torch.equal(first[0], task.training(0)(3)[0])
        assert not torch.equal(first[0], task.training(1)(3)[0])
        assert not torch.equal(first[0], task.training(0)(4)[0])
    x, held = TASKS["digits"].trained()[0], TASKS["digits"].judging()[0]
    assert len(x) + len(held) == 1797
    # two pictures of the set are alike by themselves
    assert sum(bool((x == one).all(-1).all(-1).any()) for one in held) <= 1
    assert (TASKS["parity"].judging()[1] != IGNORED).all()


def test_the_lstm_hands_its_state_on():
    torch.manual_seed(0)
    mixer, x = LongShortTermMemory(8), torch.randn(2, 9, 8)
    first, state = mixer(x[:, :5], return_state=True)
    second, _ = mixer(x[:, 5:], state)
    torch.testing.assert_close(torch.cat((first, second), 1), mixer(x)[0])


def test_the_table():
    cell = {"row": "minGRU", "task": "parity", "seconds": 60.0}
    text = markdown([{**cell, "accuracy": value} for value in (0.5, 0.6, 0.75)])
    assert "| minGRU |  |  |  | 0.600 (0.50 to 0.75; <= 0.7: holds, 1 of 3 miss it) |" in text
    assert "3 runs, 3 minutes" in text
    text = markdown([{**cell, "accuracy": value} for value in (0.5, 0.71, 0.75)])
    assert "| minGRU |  |  |  | 0.710 (0.50 to 0.75; <= 0.7: **fails**, 2 of 3 miss it) |" in text
    short = medians([{**cell, "accuracy": 0.5}, {**cell, "task": "copying", "accuracy": 0.994}])
    assert short.splitlines()[0] == "| | digits | copying | recall | parity |"
    # what has to be solved is bold
    assert "| minGRU |  | **0.99** |  | 0.50 |" in short.splitlines()
    assert [holds((sign, 0.5), value) for sign in (">=", "<=") for value in (0.4, 0.5, 0.6)] == [
        *(False, True, True),
        *(True, True, False),
    ]


def test_the_command_does_what_is_missing(tmp_path: Path, capsys):
    arguments = [
        "signature",
        "--output",
        str(tmp_path),
        "--rows",
        "LSTM",
        "--tasks",
        "parity",
        "recall",
        "--steps",
        "2",
    ]
    assert main([*arguments, "--seeds", "2", "--part", "1/2"]) == 1
    assert sorted(path.name for path in tmp_path.glob("*.json")) == ["LSTM-parity-0.json", "LSTM-parity-1.json"]
    kept = json.loads((tmp_path / "LSTM-parity-0.json").read_text())
    (tmp_path / "LSTM-parity-0.json").write_text(json.dumps({**kept, "accuracy": 1.0}))
    capsys.readouterr()
    assert main([*arguments, "--seeds", "1"]) == 1
    printed = capsys.readouterr().out
    # one more run, and the one that was there
    assert printed.count('"row"') == 1
    table = (tmp_path / "signature.md").read_text()
    results = [json.loads(line) for line in (tmp_path / "signature.jsonl").read_text().splitlines()]
    assert [one["seed"] for one in results] == [0, 1, 0]
    assert markdown(results) == table
    assert table in printed
    assert "to 1.00" in table
    for name in ("LSTM-parity-1", "LSTM-recall-0"):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "accuracy": 1.0 if "parity" in name else 0.1}))
    assert main([*arguments, "--seeds", "1"]) == 0


def test_a_row_has_its_own_steps_and_rate(monkeypatch):
    given = {}

    def train(model, draw, steps, *, rate, learned):
        given[rate] = steps
        return steps

    monkeypatch.setattr("seqzoo.eval.signature.train_briefly", train)
    assert run("LSTM", "parity", 0)["steps"] == 2000
    assert run("minGRU", "parity", 0)["steps"] == TASKS["parity"].steps == 1500
    assert given == {2e-2: 2000, RATE: 1500}
    assert run("LSTM", "parity", 0, steps=3)["steps"] == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rows", "LSTN"], "no row 'LSTN'"),
        (["--tasks", "digit"], "no task 'digit'"),
        (["--part", "3/2"], "--part i/n"),
        (["--seeds", "0"], "--seeds must be at least 1"),
    ],
)
def test_bad_options(arguments, words, tmp_path: Path, capsys):
    assert main(["signature", "--output", str(tmp_path / "new"), *arguments]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("name", "task"),
    [("minGRU", "parity"), ("minGRU in (-1, 1)", "parity"), ("LSTM", "parity"), ("DeltaNet", "recall")],
)
def test_a_part_of_it(name, task, record_property):
    found = run(name, task, 0)
    record_property("accuracy", found["accuracy"])
    assert holds(ROWS[name].expected[task], found["accuracy"]), found
