"""The options of ``seqzoo train``: a LightningCLI over the classes that the configurations name."""

from __future__ import annotations

import contextlib
import importlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import lightning.pytorch as lightning
from jsonargparse import ArgumentError, ArgumentParser
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from seqzoo.mixer import nearest
from seqzoo.parallel.parallelize import Attention, Choices, Exchange, check_model
from seqzoo.train.configuration import ConfigurationError, flatten, merge, to_yaml
from seqzoo.train.processes import Processes
from seqzoo.train.strategy import SequenceParallelStrategy

# the sections that are built from a class, and what the class must be
SECTIONS = {"model": lightning.LightningModule, "data": lightning.LightningDataModule}
# how processes share a sequence
WAYS: dict[str, Any] = {"exchange": "chain", "attention": "chain", "head_ranks": None}
TRAINER_DEFAULTS = {
    "max_epochs": -1,
    "max_steps": -1,
    "check_val_every_n_epoch": None,
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 10,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "use_distributed_sampler": False,
}


class TrainingCLI(LightningCLI):
    """Builds module, data and trainer from the merged configuration and the options that override it.

    The trainer is built later, by :meth:`build_trainer`, when the folder of the run is known.

    Args:
        configuration: Merged configurations.
        overrides: Options, ``["--model.lr", "1e-3"]``.

    Raises:
        ConfigurationError: If an option does not exist or a value does not fit.
    """

    def __init__(self, configuration: Mapping[str, Any], overrides: Sequence[str]) -> None:
        self.classes = {section: _named_class(configuration, section) for section in SECTIONS}
        flat = dict(configuration)
        for section in SECTIONS:
            flat[section] = dict(configuration[section].get("init_args") or {})
        known = known_options(self.classes)
        check_names([name for name, _ in flatten(flat)], known)
        given = [
            argument.replace(".init_args.", ".") if argument.startswith("--") else argument for argument in overrides
        ]
        check_names([argument[2:].split("=")[0].rstrip("+") for argument in given if argument.startswith("--")], known)
        with _one_message():
            super().__init__(
                self.classes["model"],
                self.classes["data"],
                save_config_callback=None,
                trainer_defaults=TRAINER_DEFAULTS,
                seed_everything_default=False,
                parser_kwargs={"exit_on_error": False},
                run=False,
                auto_configure_optimizers=False,
                load_from_checkpoint_support=False,
                args=["--config", to_yaml(flat), *given],
            )

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the options of a run, ``--seed`` in place of the base class's ``--seed_everything``."""
        add_run_options(parser)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Gives the seed to the classes that take one."""
        for section in SECTIONS:
            seed = f"{section}.seed"
            if seed in _options(self.classes[section], section):
                parser.link_arguments("seed", seed)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses; what the base class warns of, arguments beside ``sys.argv``, is how a subcommand works."""
        self.config = parser.parse_args(args)

    def _set_seed(self) -> None:
        """Left to :meth:`before_instantiate_classes`."""

    def before_instantiate_classes(self) -> None:
        """Seeds the initialisation of the model."""
        lightning.seed_everything(self.config.seed, verbose=False)

    def instantiate_classes(self) -> None:
        """Builds module and data."""
        self.config_init = self.parser.instantiate(self.config)
        self.model = self.config_init["model"]
        self.datamodule = self.config_init["data"]

    def another_module(self) -> lightning.LightningModule:
        """A second module of the same configuration, with weights of its own."""
        return self.parser.instantiate(self.config)["model"]

    def build_trainer(
        self,
        *,
        loggers: Sequence[Any],
        callbacks: Sequence[lightning.Callback],
        plugins: Sequence[Any],
        folder: str,
        processes: Processes | None = None,
    ) -> lightning.Trainer:
        """Builds the trainer, with what the configuration names behind what the command needs.

        Raises:
            ConfigurationError: If it cannot be built, or names a strategy of its own beside several processes.
        """
        own = self.config_init["trainer"]
        several: dict[str, Any] = {}
        if processes is not None:
            if own.strategy != "auto":
                raise ConfigurationError(
                    f"sequence_parallel brings its own strategy; leave trainer.strategy out, got {own.strategy!r}"
                )
            several["strategy"] = SequenceParallelStrategy(processes.sequence_parallel, **self.ways())
            several["devices"], several["num_nodes"] = processes.local_size, processes.machines
        with _one_message():
            return self.instantiate_trainer(
                **several,
                logger=[*loggers, *_several(own.logger)],
                callbacks=[*callbacks, *_several(own.callbacks)],
                plugins=[*plugins, *_several(own.plugins)],
                default_root_dir=folder,
            )

    def ways(self) -> dict[str, Any]:
        """How states come from process to process, as :class:`SequenceParallelStrategy` takes it."""
        return {name: getattr(self.config, name) for name in WAYS}

    def check_ways(self, processes: Processes | None) -> None:
        """Raises ConfigurationError unless the processes can run the model so."""
        ways = self.ways()
        changed = [name for name, default in WAYS.items() if ways[name] != default]
        if processes is None:
            if changed:
                raise ConfigurationError(
                    f"{changed[0]} says how processes share a sequence; give --sequence_parallel N too, got "
                    f"{changed[0]}={ways[changed[0]]!r} alone"
                )
            return
        try:
            check_model(self.model.model, Choices(**ways), processes.sequence_parallel, processes.rank)
        except ValueError as error:
            raise ConfigurationError(str(error)) from error

    def text(self) -> str:
        """The exact configuration, every default written out, as YAML that ``--config`` takes."""
        dumped = self.parser.dump(self.config, skip_unset=False, format="json")
        values = json.loads(dumped)
        for section, of in self.classes.items():
            values[section] = {"class_path": class_path(of), "init_args": values.get(section, {})}
        return to_yaml(values)


def add_run_options(parser: ArgumentParser) -> None:
    """Adds the options that belong to the run itself."""
    parser.add_argument(
        "--minutes", type=float, default=5.0, help="time in which to train; trainer.max_steps overrides it"
    )
    parser.add_argument("--seed", type=int, default=0, help="of initialisation, data and dropout")
    parser.add_argument(
        "--weights", type=str | None, default=None, help="folder of a model, or of its run, with whose weights to begin"
    )
    parser.add_argument("--name", type=str, default="run", help="first part of the name of the run's folder")
    parser.add_argument("--runs", type=str, default="runs", help="folder in which the run's folder is made")
    parser.add_argument("--checkpoint_minutes", type=float, default=1.0, help="time between two checkpoints")
    parser.add_argument("--checkpoint_steps", type=int | None, default=None, help="steps between two, additionally")
    parser.add_argument(
        "--sequence_parallel", type=int | None, default=None, help="processes of torchrun that share a sequence"
    )
    parser.add_argument(
        "--exchange", type=Exchange, default=WAYS["exchange"], help="how states come from process to process"
    )
    parser.add_argument(
        "--attention", type=Attention, default=WAYS["attention"], help="how attention over several processes runs"
    )
    parser.add_argument("--head_ranks", type=int | None, default=WAYS["head_ranks"], help="of usp, share the heads")
    parser.add_argument(
        "--ema_decay", type=float | None, default=None, help="of an exponential moving average of the weights"
    )
    parser.add_argument(
        "--ema_use",
        type=bool,
        default=True,
        help="whether validation and the model take that average; else it lies in a model of its own",
    )
    parser.add_argument(
        "--early_stopping", type=int | None, default=None, help="validations without a better one that end training"
    )
    parser.add_argument("--compile", type=bool | str, default=False, help="torch.compile; true, or a backend's name")


def class_path(of: type) -> str:
    """The name under which a class is written into a configuration."""
    return f"{of.__module__}.{of.__qualname__}"


def known_options(classes: Mapping[str, type]) -> list[str]:
    """The dotted names of all options, for the given classes of the sections."""
    parser = ArgumentParser()
    add_run_options(parser)
    parser.add_class_arguments(lightning.Trainer, "trainer", fail_untyped=False, instantiate=False)
    names = list(parser.get_defaults().keys())
    for section, of in classes.items():
        names += [name for name in _options(of, section) if name != f"{section}.seed"]
    return names


def check_names(names: Iterable[str], known: Sequence[str]) -> None:
    """Raises ConfigurationError with the nearest known names unless every name is an option, or a part of one."""
    for name in names:
        if not any(name == one or name.startswith(f"{one}.") or one.startswith(f"{name}.") for one in known):
            hint = nearest(name, known)
            hint = hint if hint.startswith("did you mean") else "seqzoo train --help lists them"
            raise ConfigurationError(f"there is no option {name!r}; {hint}")


def section_help(topic: str, configuration: Mapping[str, Any]) -> str:
    """The options of one section, ``model``, ``data`` or ``trainer``, with what they mean.

    Raises:
        ConfigurationError: If there is no such section.
    """
    if topic not in (*SECTIONS, "trainer"):
        raise ConfigurationError(f"there is no help on {topic!r}; known are {', '.join([*SECTIONS, 'trainer'])}")
    of = lightning.Trainer if topic == "trainer" else _named_class(configuration, topic)
    parser = ArgumentParser(prog="seqzoo train", usage="seqzoo train [OPTIONS]", add_help=False)
    parser.add_class_arguments(of, topic, fail_untyped=False, instantiate=False)
    if topic in SECTIONS:
        values = {topic: configuration[topic].get("init_args") or {}}
    else:
        values = {topic: merge(TRAINER_DEFAULTS, configuration.get(topic, {}))}
    parser.set_defaults({name: value for name, value in flatten(values) if name != "trainer.logger"})
    return parser.format_help()


def _named_class(configuration: Mapping[str, Any], section: str) -> type:
    values = configuration.get(section)
    name = values.get("class_path") if isinstance(values, Mapping) else None
    if not isinstance(name, str) or "." not in name:
        raise ConfigurationError(f"the configuration must name a class as {section}.class_path, got {name!r}")
    module, _, attribute = name.rpartition(".")
    try:
        of = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigurationError(f"{section}.class_path {name!r} cannot be imported: {error}") from error
    if not isinstance(of, type) or not issubclass(of, SECTIONS[section]):
        raise ConfigurationError(f"{section}.class_path {name!r} must be a {SECTIONS[section].__name__}")
    return of


def _options(of: type, section: str) -> list[str]:
    parser = ArgumentParser()
    parser.add_class_arguments(of, section, fail_untyped=False, instantiate=False)
    return list(parser.get_defaults().keys())


def _several(value: Any) -> list[Any]:
    if value is None or isinstance(value, bool):
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


@contextlib.contextmanager
def _one_message() -> Iterator[None]:
    """Turns whatever parsing and building raise about a value into one error without their frames."""
    try:
        yield
    except ConfigurationError:
        raise
    except (ArgumentError, TypeError, ValueError, MisconfigurationException) as error:
        raise ConfigurationError(" ".join(str(error).split())) from error
