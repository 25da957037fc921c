"""One run of training, from the first line on the screen to the report."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch.accelerators.cpu import CPUAccelerator
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from rich.console import Console

from seqzoo.hub import save_pretrained
from seqzoo.mixer import nearest
from seqzoo.parameters import parameter_groups
from seqzoo.train import environment, report
from seqzoo.train.allocator import keep_freed_memory
from seqzoo.train.averaging import AveragedWeights, ExponentialAverage, ScheduleFreeWeights
from seqzoo.train.callbacks import Checkpointing, Metering, ProgressDisplay, StepsFromMinutes
from seqzoo.train.callbacks.progress import quantity
from seqzoo.train.checkpoints import SafetensorsIO, check_fits, read_checkpoint
from seqzoo.train.classification import LabellingModule
from seqzoo.train.configuration import ConfigurationError
from seqzoo.train.data.language import LanguageData
from seqzoo.train.groups import describe_groups, groups_table
from seqzoo.train.interruption import Aborted, Interrupted, Interruption
from seqzoo.train.metrics_table import COLUMNS, MetricsTable
from seqzoo.train.modules import LanguageModeling
from seqzoo.train.options import TrainingCLI
from seqzoo.train.processes import Processes
from seqzoo.train.run_folder import RunFolder
from seqzoo.train.sharded_checkpoints import load_into, read_rest, whole_tensors
from seqzoo.train.weights import begin_with_weights

# weights and two averages in each of last, best and the one being written; weights in the model and its predecessor
COPIES = 11
# seconds in which torchrun passes on a signal that the terminal has sent to all processes
ECHO = 5.0


class Training:
    """Assembles trainer and callbacks around what the configuration built, and runs them.

    Args:
        cli: Module, data and configuration.
        run: The folder.
        console: For everything that is shown.
        checkpoint: From which to go on; None begins at step 0.
        processes: Where several train together, of which the first writes what is not a checkpoint.

    Raises:
        ConfigurationError: If the trainer cannot be built, or options exclude one another.
        RunFolderError: If the disk is too full for checkpoints.
    """

    # what another kind of model has otherwise
    metric, greatest, unit = "validation_bpb", False, "B"
    columns: tuple[str, ...] = COLUMNS
    planner: type[StepsFromMinutes] = StepsFromMinutes

    def __init__(
        self,
        cli: TrainingCLI,
        run: RunFolder,
        console: Console,
        checkpoint: Path | None = None,
        processes: Processes | None = None,
    ) -> None:
        _check_options(cli, processes)
        if checkpoint is None:
            weights = sum(parameter.numel() * parameter.element_size() for parameter in cli.model.parameters())
            run.check_space(COPIES * weights)
            begin_with_weights(cli)
        self.cli = cli
        self.run = run
        self.console = console
        self.checkpoint = checkpoint
        self.processes = processes
        self.first = processes is None or processes.rank == 0
        read = read_checkpoint if processes is None else read_rest
        self.state: dict[str, Any] = {} if checkpoint is None else read(checkpoint)
        if checkpoint is not None and processes is None:
            check_fits(checkpoint, self.state, cli.model.state_dict())
        self.step = self.state.get("global_step", 0)
        self.interruption = Interruption(0.0 if processes is None else ECHO)
        config = cli.config
        self.meter, display = self.make_display()
        self.saver = Checkpointing(
            run, config.checkpoint_minutes, config.checkpoint_steps, self.interruption, self.metric, self.greatest
        )
        self.average = _average(cli)
        self.stopper: EarlyStopping | None = None
        if config.early_stopping is not None:
            mode = "max" if self.greatest else "min"
            self.stopper = EarlyStopping(self.metric, patience=config.early_stopping, mode=mode)
        # before the saver: what a checkpoint holds is decided when it is written
        before = [one for one in (self.average, self.stopper) if one is not None]
        callbacks = [self.meter, *before, self.saver, *([display] if self.first else [])]
        if config.trainer.max_steps == -1:
            callbacks.insert(1, self.planner(config.minutes, cli.model.warmup_steps, self._decided))
        if config.compile:
            cli.model.model.backbone.compile(**({} if config.compile is True else {"backend": config.compile}))
        self.trainer = cli.build_trainer(
            loggers=[
                MetricsTable(run.metrics, self.step, self.columns),
                TensorBoardLogger(run.path, name="tensorboard", version="", purge_step=self.step + 1),
            ]
            if self.first
            else [],
            callbacks=callbacks,
            # the strategy of several processes writes its own
            plugins=[SafetensorsIO()] if processes is None else [],
            folder=str(run.path),
            processes=processes,
        )
        if processes is None and self.trainer.world_size != 1:
            raise ConfigurationError(
                f"without sequence_parallel the training command runs one process, trainer.devices and "
                f"trainer.num_nodes ask for {self.trainer.world_size}"
            )

    def make_display(self) -> tuple[Metering, ProgressDisplay]:
        """What measures loss and speed, and what shows it."""
        meter = Metering()
        return meter, ProgressDisplay(self.console, meter)

    def run_all(self, arguments: Sequence[str] = ()) -> int:
        """Trains and reports; returns the exit status.

        Raises:
            Exception: What made training fail, after the run's folder and last checkpoint were printed.
        """
        self._record(arguments)
        self._introduce()
        try:
            if not self._trained():
                self._fit()
            else:
                self._restore()
            self._report()
        except (Interrupted, SIGTERMException):
            module = self._whole()
            if self.first:
                if self.average is not None and self.average.use:
                    self.average.put_into(module)
                report.save_interrupted(self.run, module, self.cli.datamodule)
                self.draw()
            self._part(f"stopped after step {self.saver.saved_step}; the model so far is in {self.run.model}")
            return self.interruption.exit_status
        except Aborted:
            self._part("stopped at once")
            return self.interruption.exit_status
        except BaseException:
            self._part("not finished")
            raise
        return 0

    def _decided(self, steps: int) -> None:
        self.cli.config.trainer.max_steps = steps
        if self.first:
            self.run.write_text(self.run.configuration, self.cli.text())
        speed = quantity(self.meter.recent_bytes_per_second)
        self._say(f"{speed}{self.unit}/s: {steps} steps fit into {self.cli.config.minutes:g} minutes")

    def _record(self, arguments: Sequence[str]) -> None:
        keeps_memory = isinstance(self.trainer.accelerator, CPUAccelerator) and keep_freed_memory()
        now = environment.describe(
            arguments=arguments,
            device=str(self.trainer.strategy.root_device),
            data=self.cli.datamodule.description(),
            keeps_memory=keeps_memory,
            processes=self.trainer.world_size,
        )
        if not self.first:
            return
        before = self.run.read_json(self.run.environment)
        if before is None:
            self._keep_earlier_run()
            self.run.write_text(self.run.configuration, self.cli.text())
            self.run.write_json(self.run.environment, now)
            return
        for difference in environment.differences(before, now):
            self.console.print(f"the bits may differ from an uninterrupted run: {difference}", style="yellow")

    def _keep_earlier_run(self) -> None:
        """Copies what the schedule was refined from, so that the run resumes without the earlier one."""
        earlier = self.cli.model.refined_from
        if earlier is not None:
            self.run.refined_from.mkdir(exist_ok=True)
            shutil.copy(Path(earlier).expanduser() / self.run.metrics.name, self.run.refined_from)
            self.cli.config.model.refined_from = str(self.run.refined_from)

    def _introduce(self) -> None:
        config = self.cli.model.model.config
        parameters = sum(parameter.numel() for parameter in self.cli.model.parameters())
        pattern = config.pattern if isinstance(config.pattern, str) else ", ".join(map(str, config.pattern))
        self._say(f"run    {self.run.path}" + (f"  (from step {self.step})" if self.checkpoint else ""))
        self._say(f"data   {self.data_words()}")
        self._say(
            f"model  {config.n_layers} layers of {pattern}, width {config.d_model}, {parameters / 1e6:.2f} M "
            f"parameters on {self.trainer.strategy.root_device}"
        )
        if self.processes is not None:
            size, shared = self.processes.size, self.processes.sequence_parallel
            self._say(f"       divided among {size} processes, each sequence among {shared}")
        if self.first:
            module = self.cli.model
            groups = describe_groups(module.model, parameter_groups(module.model, module.lr, module.weight_decay))
            self.run.write_json(self.run.groups, groups)
            self.console.print(groups_table(groups))

    def data_words(self) -> str:
        """Where the data lie, and how many there are."""
        data = self.cli.datamodule
        return f"{data.source()}: {data.words('training')} to train on, {data.words('validation')} to validate"

    def _trained(self) -> bool:
        return 0 < self.trainer.max_steps <= self.step or self._stopped_early()

    def _stopped_early(self) -> bool:
        stopper = self.stopper
        if stopper is None:
            return False
        kept = self.state.get("callbacks", {}).get(stopper.state_key, stopper.state_dict())
        return kept["wait_count"] >= stopper.patience

    def _fit(self) -> None:
        checkpoint = None if self.checkpoint is None else str(self.checkpoint)
        self.state = {}
        with self.interruption.listen():
            self.trainer.fit(self.cli.model, datamodule=self.cli.datamodule, ckpt_path=checkpoint)
        self.step = self.trainer.global_step
        if self._stopped_early():
            self._say(f"stopped early: {self.cli.config.early_stopping} validations without a better one")
        if self.processes is None:
            # the trainer hands the module back on the CPU
            self.cli.model.to(self.trainer.strategy.root_device)

    def _restore(self) -> None:
        """What training would leave behind, of a run that was stopped between its last step and its report."""
        if self.processes is None:
            self.cli.model.load_state_dict(self.state["state_dict"])
        elif self.checkpoint is not None:
            load_into(self.checkpoint, self.cli.model, [])
        for callback in (self.meter, self.saver, *([] if self.average is None else [self.average])):
            callback.load_state_dict(self.state["callbacks"][callback.state_key])

    def _whole(self) -> LanguageModeling:
        """The module, of several processes put together again in the first; all of them call this."""
        if self.processes is None:
            return self.cli.model
        weights = whole_tensors(self.cli.model.state_dict(), self.first)
        if not self.first:
            return self.cli.model
        module = cast("LanguageModeling", self.cli.another_module())
        module.load_state_dict(weights)
        return module

    def _report(self) -> None:
        module = self._whole()
        if not self.first:
            return
        facts = {
            "steps": self.step,
            "seconds": round(self.meter.seconds, 3),
            "bytes": self.meter.bytes,
            "bytes_per_second": round(self.meter.bytes_per_second),
            "best_step": self.saver.best_step,
        }
        if self.average is not None and self.average.use:
            self.average.put_into(module)
        use = self.finish(module, facts)
        if self.average is not None and not self.average.use:
            self.average.put_into(module)
            save_pretrained(module.model, self.run.average)
        self._say(f"run    {self.run.path}")
        self._say(f"       {use}")

    def finish(self, module: Any, facts: dict[str, Any]) -> str:
        """Judges a module with the last weights and leaves the report; returns what can be done with the run."""
        report.finish(self.run, module, self.cli.datamodule, facts, self.console)
        return f"seqzoo generate --checkpoint {self.run.path} continues a prompt"

    def draw(self) -> None:
        """Draws the curves so far."""
        report.draw(self.run, {}, None)

    def _say(self, words: str) -> None:
        self.console.print(words, markup=False, highlight=False, soft_wrap=True)

    def _part(self, words: str) -> None:
        """What is said when training ends before its last step."""
        self._say(words)
        self._say(f"run    {self.run.path}")
        if self.run.last.exists():
            self._say(f"       last checkpoint: step {self.saver.saved_step}; go on: {self.run.resume_command()}")


def _average(cli: TrainingCLI) -> AveragedWeights | None:
    """What keeps an average of the weights, where one is asked for."""
    if cli.model.schedule == "schedule_free":
        return ScheduleFreeWeights()
    decay = cli.config.ema_decay
    return None if decay is None else ExponentialAverage(decay, cli.config.ema_use)


def _check_options(cli: TrainingCLI, processes: Processes | None) -> None:
    """Raises ConfigurationError where options exclude one another."""
    config, schedule = cli.config, cli.model.schedule
    if config.early_stopping is not None and config.early_stopping < 1:
        raise ConfigurationError(f"early_stopping must be at least 1 validation, got {config.early_stopping}")
    if not config.ema_use and config.ema_decay is None:
        raise ConfigurationError("ema_use=false says what becomes of an average, which ema_decay asks for; give both")
    if isinstance(config.compile, str):
        known = torch._dynamo.list_backends(exclude_tags=())
        if config.compile not in known:
            raise ConfigurationError(
                f"compile must be true, false or a backend of torch.compile, got {config.compile!r}; "
                f"{nearest(config.compile, known)}"
            )
    if config.ema_decay is not None and schedule == "schedule_free":
        raise ConfigurationError("schedule='schedule_free' averages weights itself; leave ema_decay out")
    if schedule == "refined" and config.trainer.max_steps == -1:
        raise ConfigurationError(
            "schedule='refined' needs the number of steps from the first on; give trainer.max_steps"
        )
    if processes is None:
        return
    alone = {"ema_decay": config.ema_decay is not None, "compile": bool(config.compile)}
    alone["schedule='schedule_free'"] = schedule == "schedule_free"
    for name, given in alone.items():
        if given:
            raise ConfigurationError(f"{name} is for one process; leave it or sequence_parallel out")


def check_data(cli: TrainingCLI, processes: Processes | None = None) -> None:
    """Reads the data, and checks that the model fits it, and that there is enough for all processes.

    Raises:
        ConfigurationError: If there is none, or it does not fit.
    """
    try:
        cli.datamodule.setup()
    except (OSError, ValueError) as error:
        raise ConfigurationError(str(error)) from error
    labelling = isinstance(cli.model, LabellingModule)
    kind = cli.model.data_kind if labelling else LanguageData
    if not isinstance(cli.datamodule, kind):
        raise ConfigurationError(
            f"model.class_path {type(cli.model).__name__} takes data of the kind {kind.__name__}, got "
            f"{type(cli.datamodule).__name__}"
        )
    try:
        cli.model.check_data(cli.datamodule)
    except ValueError as error:
        raise ConfigurationError(str(error)) from error
    if labelling:
        if processes is not None:
            raise ConfigurationError("next-token prediction alone shares out its tokens: leave out sequence_parallel")
        return
    groups = 1 if processes is None else processes.size // processes.sequence_parallel
    if cli.datamodule.validation_streams < groups:
        raise ConfigurationError(
            f"data.validation_streams must be at least the number of groups of processes, {groups}, got "
            f"{cli.datamodule.validation_streams}"
        )
    config = cli.model.model.config
    words, longest = cli.datamodule.longest
    if config.max_positions is not None and config.max_positions < longest:
        raise ConfigurationError(
            f"model.config.max_positions must be at least {words}, {longest}, got {config.max_positions}"
        )
