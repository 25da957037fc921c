"""A run that is stopped, killed or fails goes on to the bits of one that was not. Real processes, real signals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from seqzoo.train.checkpoints import read_checkpoint
from seqzoo.train.command import main
from seqzoo.train.metrics_table import read_metrics

# place, step and kind of the fault; what the process ends with; the step of the checkpoint that it leaves
FAULTS = {
    "interrupted in a step": ({"at": "step", "step": 13, "does": "interrupt"}, 130, 13),
    "interrupted in validation": ({"at": "validation", "step": 16, "does": "interrupt"}, 130, 16),
    "aborted by a second signal": ({"at": "step", "step": 13, "does": "abort"}, 130, 10),
    "killed between checkpoints": ({"at": "step", "step": 13, "does": "kill"}, -9, 10),
    "killed before the first": ({"at": "start", "does": "kill"}, -9, None),
    "killed in writing one": ({"at": "save", "step": 15, "does": "kill"}, -9, 10),
    "killed in validation": ({"at": "validation", "step": 16, "does": "kill"}, -9, 15),
    "killed in the report": ({"at": "report", "does": "kill"}, -9, 24),
    "disk full": ({"at": "save", "step": 15, "does": "full"}, 1, 10),
    "not a number": ({"at": "step", "step": 13, "does": "nan"}, 1, 10),
}
QUICK = ("interrupted in a step", "killed between checkpoints", "killed before the first", "disk full")


def without_clock(path: Path) -> list[tuple]:
    return [
        tuple(value for name, value in row.items() if name not in ("seconds", "bytes_per_second"))
        for row in read_metrics(path)
    ]


@pytest.fixture(scope="module")
def faulty(request, tmp_path_factory, train, tiny):
    """The folders of disturbed runs before and after they were resumed, with what their processes said."""
    names = list(FAULTS) if request.config.getoption("--slow") else list(QUICK)
    parent = tmp_path_factory.mktemp("faulty")
    left = {}
    for name in names:
        runs = parent / name.replace(" ", "-")
        done = train(([*tiny, "--runs", runs], FAULTS[name][0]))
        run = next(runs.iterdir())
        shutil.copytree(run, parent / "before" / name)
        left[name] = (run, done)
    resumed = train(*[(["--resume", run], None) for run, _ in left.values()], deadline=400.0)
    assert resumed.statuses == [0] * len(names), resumed.err
    return parent / "before", left


def cases(faulty, name):
    before, left = faulty
    if name not in left:
        pytest.skip("slow; run with --slow")
    return before / name, *left[name]


@pytest.mark.parametrize("name", FAULTS)
def test_the_process_ends_as_it_should_and_leaves_a_checkpoint(faulty, name):
    before, run, done = cases(faulty, name)
    _, status, step = FAULTS[name]
    assert (done.returncode if status < 0 else done.statuses) == (status if status < 0 else [status]), done.err
    last = before / "checkpoints" / "last.safetensors"
    if step is None:
        assert not last.exists()
    else:
        assert read_checkpoint(last)["global_step"] == step
    if status > 0:
        assert f"seqzoo train --resume {run}" in done.out
        assert "Traceback" not in done.out + done.err
    if status == 130 and step != 10:
        assert (before / "model" / "model.safetensors").exists()
        assert "once more to stop at once" in done.err
    if name == "disk full":
        assert "last.safetensors: No space left on device" in done.err
        assert [entry.name for entry in (before / "checkpoints").iterdir() if entry.name.startswith(".")] == []
    if name == "not a number":
        assert "the loss of step 14 is nan; the parameter backbone.blocks.0.mixer.in_proj.weight" in done.err


@pytest.mark.parametrize("name", FAULTS)
def test_it_resumes_to_the_same_bits(faulty, whole, name):
    _, run, _ = cases(faulty, name)
    reference, _ = whole
    assert (run / "model/model.safetensors").read_bytes() == (reference / "model/model.safetensors").read_bytes()
    one, other = (read_checkpoint(path / "checkpoints/last.safetensors") for path in (run, reference))
    assert repr(one["optimizer_states"]) == repr(other["optimizer_states"])
    assert (
        one["loops"]["fit_loop"]["epoch_loop.batch_progress"] == other["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    )
    assert without_clock(run / "metrics.csv") == without_clock(reference / "metrics.csv")
    assert (run / "sample.txt").read_text() == (reference / "sample.txt").read_text()
    scores = [json.loads((path / "report.json").read_text())["validation_bits_per_byte"] for path in (run, reference)]
    assert scores[0] == scores[1]
    assert not list(run.rglob(".*.tmp"))


def test_a_finished_run_says_so(whole, capsys):
    run, _ = whole
    before = (run / "metrics.csv").read_text()
    assert main(["--resume", str(run)]) == 0
    assert "is finished: 24 steps" in " ".join(capsys.readouterr().out.split())
    assert (run / "metrics.csv").read_text() == before


@pytest.fixture
def unfinished(whole, tmp_path) -> Path:
    run = Path(shutil.copytree(whole[0], tmp_path / "run"))
    (run / "report.json").unlink()
    return run


def test_a_truncated_checkpoint_is_named_and_the_other_offered(unfinished, capsys):
    last, best = (unfinished / "checkpoints" / f"{name}.safetensors" for name in ("last", "best"))
    last.write_bytes(last.read_bytes()[:-100])
    assert main(["--resume", str(unfinished)]) == 1
    message = " ".join(capsys.readouterr().err.split())
    assert f"{last} " in message
    assert "truncated" in message
    assert f"seqzoo train --resume {best}" in message
    best.write_bytes(b"")
    assert main(["--resume", str(unfinished)]) == 1
    assert "no other checkpoint that could be used" in " ".join(capsys.readouterr().err.split())


def test_other_data_is_refused(unfinished, capsys):
    environment = unfinished / "environment.json"
    environment.write_text(environment.read_text().replace('"training_digest": "', '"training_digest": "0'))
    assert main(["--resume", str(unfinished)]) == 1
    assert "is not what" in " ".join(capsys.readouterr().err.split())


def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys):
    assert main(["--resume", str(tmp_path)]) == 1
    assert "it has no config.yaml" in " ".join(capsys.readouterr().err.split())
    assert main(["--resume", str(tmp_path / "none")]) == 1
    assert "there is no run folder" in " ".join(capsys.readouterr().err.split())
