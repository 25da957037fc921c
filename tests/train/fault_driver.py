"""Runs ``seqzoo train`` commands one after the other in a process of its own, with a fault injected into the first.

Usage: python fault_driver.py JSON, a list of ``{"arguments": [...], "fault": null or {...}}``. The last line of its
output is a JSON list of the exit statuses. Faults: ``{"at": NAME, "step": N, "does": "kill" | "interrupt" | "abort" |
"full" | "nan"}``, where NAME is the place: ``step``, ``validation``, ``save``, ``start``, ``report``.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from typing import Any

from seqzoo.cli import main
from seqzoo.hub import files
from seqzoo.train import report
from seqzoo.train.callbacks import Checkpointing, Metering
from seqzoo.train.modules import LanguageModeling


def strike(does: str) -> None:
    if does == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif does == "interrupt":
        os.kill(os.getpid(), signal.SIGINT)
    elif does == "abort":
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
    else:
        raise ValueError(does)


def inject(at: str, does: str, step: int = 0) -> None:
    """Makes the fault happen when the run gets to its place."""
    if at == "save":
        fill_disk(step) if does == "full" else kill_in_write(step)
    elif at == "start":
        before(Checkpointing, "on_train_start", lambda trainer: True, does)
    elif at == "report":
        before(report, "measure_baselines", lambda data: True, does)
    elif at == "step" and does == "nan":
        spoil_weights(step)
    elif at == "step":
        before(Metering, "on_train_batch_end", lambda trainer: trainer.global_step == step, does)
    elif at == "validation":
        before(LanguageModeling, "on_validation_epoch_end", None, does, step)


def before(owner: Any, name: str, when: Any, does: str, step: int = 0) -> None:
    original = getattr(owner, name)

    def wrapped(*arguments: Any) -> Any:
        if when is None:
            now = arguments[0].trainer.global_step == step
        else:
            now = when(arguments[-1] if owner is report else arguments[1])
        if now:
            strike(does)
        return original(*arguments)

    setattr(owner, name, wrapped)


def at_save(step: int, fault: Any) -> None:
    original = Checkpointing._save

    def save(self: Checkpointing, trainer: Any, path: Any) -> None:
        sync = os.fsync
        if trainer.global_step == step:
            files.os.fsync = fault
        try:
            original(self, trainer, path)
        finally:
            files.os.fsync = sync

    Checkpointing._save = save


def fill_disk(step: int) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    at_save(step, full)


def kill_in_write(step: int) -> None:
    at_save(step, lambda descriptor: strike("kill"))


def spoil_weights(step: int) -> None:
    import torch

    original = LanguageModeling.training_step

    def spoiled(self: LanguageModeling, batch: Any, batch_idx: int) -> Any:
        if self.trainer.global_step == step:
            with torch.no_grad():
                self.model.backbone.blocks[0].mixer.in_proj.weight[0, 0] = float("nan")
        return original(self, batch, batch_idx)

    LanguageModeling.training_step = spoiled


if __name__ == "__main__":
    commands = json.loads(sys.argv[1])
    if commands[0].get("fault"):
        inject(**commands[0]["fault"])
    print(json.dumps([main(["train", *command["arguments"]]) for command in commands]), flush=True)
