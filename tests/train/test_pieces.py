"""The smaller parts: module, loss check, pictures, allocator, run folders, signals, the record of the machine."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from seqzoo.models import ModelConfig
from seqzoo.train import environment
from seqzoo.train.curves import draw_curves
from seqzoo.train.data.windows import ValidationWindows
from seqzoo.train.finite import NonFiniteLoss, check_finite
from seqzoo.train.interruption import Aborted, Interruption
from seqzoo.train.modules import LanguageModeling
from seqzoo.train.optimisation import step_seed
from seqzoo.train.run_folder import RunFolder, RunFolderError


def module(**options) -> LanguageModeling:
    torch.manual_seed(0)
    return LanguageModeling(ModelConfig(vocab_size=256, d_model=16, n_layers=1, pattern="min_gru", **options))


def test_validation_with_the_state_handed_on_is_the_whole_sequence():
    data = torch.randint(0, 256, (301,), dtype=torch.uint8).numpy()
    model = module(dropout=0.5)
    found = model.bits_per_token(ValidationWindows(data, context=17, streams=1))
    assert model.training, "left as it was"
    model.eval()
    ids = torch.from_numpy(data).long()[None]
    with torch.no_grad():
        nats = model.model.loss(ids[:, :-1], ids[:, 1:])
    assert found == pytest.approx(float(nats) / 0.6931471805599453, rel=1e-5)


def test_validation_without_the_state_starts_every_window_afresh():
    data = torch.randint(0, 256, (65,), dtype=torch.uint8).numpy()
    model = module()
    model.carry_state = False
    apart = model.bits_per_token(ValidationWindows(data, context=16, streams=1))
    assert apart == pytest.approx(model.bits_per_token(ValidationWindows(data, context=16, streams=4)), rel=1e-6)
    model.carry_state = True
    assert apart != pytest.approx(model.bits_per_token(ValidationWindows(data, context=16, streams=1)), rel=1e-6)


def test_a_step_has_its_own_seed():
    assert step_seed(0, 0, 5, 0) == step_seed(0, 0, 5, 0)
    assert len({step_seed(seed, 0, step, 0) for seed in range(10) for step in range(10)}) == 100
    assert 0 <= step_seed(1, 2, 3) < 2**63


def test_a_nan_is_traced_to_its_origin():
    model = module().model
    ids = torch.zeros(1, 8, dtype=torch.int64)
    check_finite(torch.tensor(1.0), model, ids, step=3, batch=3)
    with torch.no_grad():
        model.backbone.blocks[0].mixer.in_proj.weight[0, 0] = float("inf")
    with pytest.raises(
        NonFiniteLoss, match=r"loss of step 4 is nan; the parameter backbone\.blocks\.0\.mixer\.in_proj"
    ):
        check_finite(torch.tensor(float("nan")), model, ids, step=3, batch=3)

    class Breaks(torch.nn.Module):
        def forward(self, x):
            return x / 0.0

    with pytest.raises(NonFiniteLoss, match=r"loss of step 1 is inf; the first layer whose output .* is 1 \(Breaks\)"):
        check_finite(
            torch.tensor(float("inf")), torch.nn.Sequential(torch.nn.Tanh(), Breaks()), torch.ones(2), step=0, batch=0
        )


def test_the_picture_is_a_png():
    rows = [
        {"step": float(step), "train_bpb": 8.0 - step / 20, "validation_bpb": 5.0 if step == 50 else None}
        for step in range(10, 100, 10)
    ]
    picture = draw_curves(rows, {"xz -9e": 1.6, "gzip -9": 1.9}, (90, 3.5), "a run")
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    assert picture.endswith(b"IEND\xaeB`\x82")
    width, height = (int.from_bytes(picture[place : place + 4], "big") for place in (16, 20))
    assert width > 600
    assert height > 400
    assert len(picture) > 10_000
    assert draw_curves([], {}, None, "nothing yet").startswith(b"\x89PNG")


def test_importing_leaves_the_allocator_alone():
    code = """
import ctypes, json, sys
calls = []
real = ctypes.CDLL.__getattr__
def watch(self, name):
    calls.append(name)
    return real(self, name)
ctypes.CDLL.__getattr__ = watch
import seqzoo, seqzoo.train.command
before = "mallopt" in calls
from seqzoo.train.allocator import keep_freed_memory
took = keep_freed_memory()
print(json.dumps([before, took, "mallopt" in calls]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    before, took, after = json.loads(done.stdout.splitlines()[-1])
    assert not before
    assert took == after
    assert took or not sys.platform.startswith("linux")


def test_run_folders_are_unique_and_locked(tmp_path):
    one, other = RunFolder.create(tmp_path / "runs", "a"), RunFolder.create(tmp_path / "runs", "a")
    assert one.path != other.path
    with one.lock():
        with pytest.raises(RunFolderError, match="another process is training"), RunFolder(one.path).lock():
            pass
        with other.lock():
            pass
    with one.lock():
        pass
    (one.checkpoints / ".last.safetensors.1.abc.tmp").write_text("half")
    (one.path / ".model.1.abc.tmp").mkdir()
    one.sweep()
    assert not list(one.path.glob(".*.tmp"))
    assert not list(one.checkpoints.iterdir())
    other.discard()
    assert not other.path.exists()


def test_what_is_no_run_folder_is_said(tmp_path):
    with pytest.raises(RunFolderError, match="there is no run folder"):
        RunFolder.open(tmp_path / "none")
    with pytest.raises(RunFolderError, match=r"it has no config\.yaml"):
        RunFolder.open(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="cannot be made"):
        RunFolder.create(tmp_path / "file", "a")
    run = RunFolder(tmp_path)
    assert run.read_json(run.report) is None
    run.report.write_text("{")
    with pytest.raises(RunFolderError, match=r"report\.json is damaged"):
        run.read_json(run.report)


def test_the_first_signal_asks_and_the_second_aborts(capfd):
    interruption = Interruption()
    before = signal.getsignal(signal.SIGINT)
    with interruption.listen():
        assert not interruption.requested
        signal.raise_signal(signal.SIGINT)
        assert interruption.requested
        assert "once more" in capfd.readouterr().err
        with pytest.raises(Aborted):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    assert interruption.exit_status == 130


def test_the_record_of_the_machine():
    facts = environment.describe(arguments=["--seed", "1"], device="cpu", data={"folder": "x"}, keeps_memory=False)
    json.dumps(facts)
    assert facts["torch"] == torch.__version__
    assert facts["threads"] == torch.get_num_threads()
    assert environment.differences(facts, facts) == []
    assert environment.differences({**facts, "threads": -1}, facts) == [f"threads: -1 then, {facts['threads']} now"]
    assert environment.git_state(Path("/")) is None
