"""``seqzoo train``: trains a model in a folder of its own, and resumes it to the same bits."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from rich.console import Console

from seqzoo.train.arguments import Request, short_help
from seqzoo.train.checkpoints import CheckpointError, read_checkpoint
from seqzoo.train.classification import LabellingModule
from seqzoo.train.classification_training import ClassificationTraining
from seqzoo.train.configuration import ConfigurationError, combine
from seqzoo.train.finite import NonFiniteLoss
from seqzoo.train.options import TrainingCLI, section_help
from seqzoo.train.processes import Processes
from seqzoo.train.run_folder import RunFolder, RunFolderError, reason
from seqzoo.train.sharded_checkpoints import is_sharded, read_rest
from seqzoo.train.training import Training, check_data
from seqzoo.version import __version__

USAGE_ERROR = 2
FAILED = 1
# what a report holds of one kind of run or the other
SCORES = {"test_accuracy", "validation_bits_per_byte"}


def main(arguments: Sequence[str]) -> int:
    """Runs ``seqzoo train`` and returns its exit status.

    Of several processes the first one speaks; the others do when they fail in what they do apart.
    """
    first = os.environ.get("RANK", "0") == "0"
    console = Console(quiet=not first)
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
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    Console(stderr=True, quiet=not first).print(
        f"seqzoo train: {message}", markup=False, highlight=False, soft_wrap=True
    )
    return status


def start(request: Request, console: Console) -> int:
    """Trains a new model."""
    cli = TrainingCLI(combine(request.configurations), request.overrides)
    processes = Processes.started(cli.config.sequence_parallel)
    check_data(cli, processes)
    cli.check_ways(processes)
    if processes is None:
        run = RunFolder.create(Path(cli.config.runs), cli.config.name)
    else:
        processes.connect(cli.config.trainer.accelerator)
        run = processes.first(lambda: RunFolder.create(Path(cli.config.runs), cli.config.name, sharded=True))
    with held(run, processes):
        try:
            training = training_of(cli)(cli, run, console, processes=processes)
        except (ConfigurationError, RunFolderError):
            run.discard()
            raise
        return training.run_all(request.arguments)


def resume(path: Path, console: Console) -> int:
    """Goes on with a run, from its last checkpoint or the one that is named."""
    named = path.is_file() or is_sharded(path)
    folder = path.resolve().parents[1] if named else path
    opened = RunFolder.open(folder)
    opened.check_version()
    cli = _configured(opened)
    processes = Processes.started(cli.config.sequence_parallel)
    run = RunFolder.open(folder, sharded=processes is not None)
    if processes is not None:
        processes.connect(cli.config.trainer.accelerator)
    with held(run, processes):
        finished = run.read_json(run.report)
        if finished is not None:
            if not isinstance(finished, dict) or "steps" not in finished or not SCORES & finished.keys():
                raise RunFolderError(
                    f"{run.report} is damaged: it does not tell steps and score of a finished run; delete it, and the "
                    "run is judged again from its last checkpoint"
                )
            console.print(
                f"{run.path} is finished: {finished['steps']} steps, {_score(finished)}; there is nothing to resume",
                highlight=False,
                soft_wrap=True,
            )
            return 0
        check_data(cli, processes)

        def choose() -> Path | None:
            run.sweep()
            _check_same_data(run, cli.datamodule.description())
            return _readable(run, path if named else run.last)

        checkpoint = choose() if processes is None else processes.first(choose)
        if checkpoint is None:
            console.print(f"{run.path} has no checkpoint yet: beginning at step 0", highlight=False, soft_wrap=True)
        return training_of(cli)(cli, run, console, checkpoint, processes).run_all()


def _configured(run: RunFolder) -> TrainingCLI:
    """What the configuration of a run builds.

    Raises:
        ConfigurationError: If this version does not understand it; names the version that did.
    """
    try:
        return TrainingCLI(combine([str(run.configuration)]), [])
    except ConfigurationError as error:
        made = (run.read_json(run.environment) or {}).get("seqzoo", __version__)
        if made == __version__:
            raise
        raise ConfigurationError(
            f"{run.path} was made by seqzoo {made}, and seqzoo {__version__} cannot build what it configures: {error}; "
            f"pip install seqzoo=={made}, or start a new run"
        ) from error


@contextmanager
def held(run: RunFolder, processes: Processes | None) -> Iterator[None]:
    """Holds the folder of a run, for all processes by the first."""
    if processes is None:
        with run.lock():
            yield
        return
    with ExitStack() as stack:
        processes.first(lambda: stack.enter_context(run.lock()))
        yield


def training_of(cli: TrainingCLI) -> type[Training]:
    """What trains a module of this kind."""
    return ClassificationTraining if isinstance(cli.model, LabellingModule) else Training


def _score(report: Mapping[str, Any]) -> str:
    if "test_accuracy" in report:
        return f"accuracy {report['test_accuracy']:.4f}"
    return f"{report['validation_bits_per_byte']:.3f} bits per byte"


def _readable(run: RunFolder, path: Path) -> Path | None:
    """The checkpoint, if it can be read; None where the run has not come to its first."""
    if not path.exists():
        return None
    read = read_rest if run.sharded else read_checkpoint
    try:
        read(path)
    except CheckpointError as error:
        other = run.best if path.resolve() == run.last.resolve() else run.last
        try:
            step = read(other)["global_step"]
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
            # it is summed over all processes before
            warnings.filterwarnings("ignore", message=r".*self\.log\('validation_bpb', \.\.\., sync_dist=True\)")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
