"""``seqzoo train``: trains a model in a folder of its own, and resumes it to the same bits."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from seqzoo.train.arguments import Request, short_help
from seqzoo.train.checkpoints import CheckpointError, read_checkpoint
from seqzoo.train.configuration import ConfigurationError, combine
from seqzoo.train.finite import NonFiniteLoss
from seqzoo.train.options import TrainingCLI, section_help
from seqzoo.train.run_folder import RunFolder, RunFolderError, reason
from seqzoo.train.training import Training, check_data

USAGE_ERROR = 2
FAILED = 1


def main(arguments: Sequence[str]) -> int:
    """Runs ``seqzoo train`` and returns its exit status."""
    console = Console()
    try:
        request = Request.parse(arguments)
        if request.topic is not None:
            text = section_help(request.topic, combine(request.configurations)) if request.topic else short_help()
            console.print(text, markup=False, highlight=False, soft_wrap=True)
            return 0
        with _quiet_lightning():
            return start(request, console) if request.resume is None else resume(Path(request.resume), console)
    except ConfigurationError as error:
        status, message = USAGE_ERROR, str(error)
    except (CheckpointError, NonFiniteLoss, RunFolderError, OSError) as error:
        status, message = FAILED, reason(error)
    except KeyboardInterrupt:
        status, message = 130, "stopped"
    Console(stderr=True).print(f"seqzoo train: {message}", markup=False, highlight=False, soft_wrap=True)
    return status


def start(request: Request, console: Console) -> int:
    """Trains a new model."""
    cli = TrainingCLI(combine(request.configurations), request.overrides)
    check_data(cli)
    run = RunFolder.create(Path(cli.config.runs), cli.config.name)
    with run.lock():
        try:
            training = Training(cli, run, console)
        except (ConfigurationError, RunFolderError):
            run.discard()
            raise
        return training.run_all(request.arguments)


def resume(path: Path, console: Console) -> int:
    """Goes on with a run, from its last checkpoint or the one that is named."""
    run = RunFolder.open(path if path.is_dir() or not path.is_file() else path.resolve().parents[1])
    with run.lock():
        run.sweep()
        finished = run.read_json(run.report)
        if finished is not None:
            console.print(
                f"{run.path} is finished: {finished['steps']} steps, "
                f"{finished['validation_bits_per_byte']:.3f} bits per byte; there is nothing to resume",
                highlight=False,
                soft_wrap=True,
            )
            return 0
        cli = TrainingCLI(combine([str(run.configuration)]), [])
        check_data(cli)
        _check_same_data(run, cli.datamodule.description())
        checkpoint = _readable(run, path if path.is_file() else run.last)
        if checkpoint is None:
            console.print(f"{run.path} has no checkpoint yet: beginning at step 0", highlight=False, soft_wrap=True)
        return Training(cli, run, console, checkpoint).run_all()


def _readable(run: RunFolder, path: Path) -> Path | None:
    """The checkpoint, if it can be read; None where the run has not come to its first."""
    if not path.is_file():
        return None
    try:
        read_checkpoint(path)
    except CheckpointError as error:
        other = run.best if path.resolve() == run.last.resolve() else run.last
        try:
            step = read_checkpoint(other)["global_step"]
        except CheckpointError:
            raise CheckpointError(f"{error}; {run.path} has no other checkpoint that could be used") from error
        raise CheckpointError(f"{error}; {other} of step {step} is complete: seqzoo train --resume {other}") from error
    return path


def _check_same_data(run: RunFolder, now: Mapping[str, Any]) -> None:
    recorded = (run.read_json(run.environment) or {}).get("data", now)
    changed = [name for name in now if name.endswith("_digest") and recorded.get(name) != now[name]]
    if changed:
        raise RunFolderError(
            f"the data below {now['folder']} is not what {run.path} was trained on ({recorded['folder']}): "
            f"{', '.join(changed)} differ; restore it, or start a new run with --config {run.configuration}"
        )


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Keeps Lightning's information, which this command words itself, off the screen; its warnings stay but one."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            # Lightning's own use of torch, of which the user can change nothing
            warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
