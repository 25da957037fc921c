"""The command line of ``seqzoo train`` before it reaches the options: which configurations, which run, which help."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from seqzoo.train.configuration import QUICKSTART, ConfigurationError, combine, shipped

HELP = """\
seqzoo train: train a model in a folder of its own; without arguments the quickstart, {minutes} minutes on a CPU

usage: seqzoo train [--config NAME]... [OPTION VALUE]...
       seqzoo train --resume RUN

  --config NAME              a configuration, by short name or path; several lie one over the other
                             shipped: {shipped}
                             default: {quickstart}
  --resume RUN               go on with a run that was stopped or killed, to the same bits as if it had not been
  --help [SECTION]           this text, or all options of a section: model, data, trainer

of the run
  --minutes M                train this long: the first steps are measured and turned into a number of steps
  --trainer.max_steps N      train this many steps, measuring nothing
  --seed N                   of initialisation, data and dropout (0)
  --weights FOLDER           begin with the weights of a model, or of a run's model, of the same configuration
  --name NAME                first part of the name of the run's folder
  --runs FOLDER              where run folders are made (runs)
  --checkpoint_minutes M     time between two checkpoints (1)
  --checkpoint_steps N       steps between two, additionally
  --sequence_parallel N      of the processes that torchrun has started, N share each sequence, and the model's
                             parameters lie on all of them; each such group has batches of its own
  --exchange NAME            how states come from process to process: chain (the default), allgather, hillis_steele or
                             pipelined; what cannot do it takes the chain
  --attention NAME           how attention runs: chain (the default), allgather, ulysses, ring or usp, of which
                             --head_ranks N share the heads
  --ema_decay D              average the weights over about 1 / (1 - D) steps; validation and model take the average
  --ema_use false            they do not, and the average is left as a second model
  --early_stopping N         end after N validations of which none was better than the best before
  --compile true|BACKEND     torch.compile for the stack of layers

often wanted
  --model.config.d_model N   --model.config.n_layers N   --model.config.pattern NAME   --model.lr X
  --data.folder FOLDER       --data.files '["*.txt"]'    --data.context N              --data.batch_size N
  --trainer.accelerator cpu|gpu                          --trainer.val_check_interval STEPS
  --trainer.accumulate_grad_batches N                    --trainer.gradient_clip_val X
  --trainer.precision bf16-mixed                         --trainer.logger CLASS, beside CSV and TensorBoard
  --model.schedule cosine|linear|wsd|rex|inverse_sqrt|constant|schedule_free|refined (--model.refined_from RUN)

Ctrl-C leaves a checkpoint and a model; a second one stops at once.

examples
  seqzoo train
  seqzoo train --config model/min_lstm --minutes 60
  seqzoo train --data.folder ~/notes --data.files '["*.md"]' --model.config.d_model 128
  torchrun --nproc-per-node 4 -m seqzoo.cli train --sequence_parallel 4 --data.context 16384 --data.batch_size 1
  seqzoo train --resume runs/stdlib-min_gru-20250101-120000"""


@dataclass
class Request:
    """What the command line asks for.

    Attributes:
        configurations: Names and paths.
        overrides: All other options, as they were given.
        resume: The folder of a run, or one of its checkpoints.
        topic: Of the help that is asked for; empty for the short one, None for no help.
        arguments: All of them, for the record.
    """

    configurations: list[str] = field(default_factory=list)
    overrides: list[str] = field(default_factory=list)
    resume: str | None = None
    topic: str | None = None
    arguments: list[str] = field(default_factory=list)

    @classmethod
    def parse(cls, arguments: Sequence[str]) -> Request:
        """Takes the command line apart.

        Raises:
            ConfigurationError: If an option lacks its value, or ``--resume`` comes with others.
        """
        request = cls(arguments=list(arguments))
        rest = list(arguments)
        while rest:
            word = rest.pop(0)
            name, equals, value = word.partition("=")
            if name in ("-h", "--help"):
                request.topic = value if equals else (rest.pop(0) if rest and not rest[0].startswith("-") else "")
            elif name in ("-c", "--config", "--resume"):
                if not equals:
                    if not rest or rest[0].startswith("--"):
                        raise ConfigurationError(f"{name} needs a value")
                    value = rest.pop(0)
                if name == "--resume":
                    request.resume = value
                else:
                    request.configurations.append(value)
            elif name.startswith("--"):
                request.overrides.append(f"--{name[2:].replace('-', '_')}{equals}{value}")
            else:
                request.overrides.append(word)
        request._check()
        return request

    def _check(self) -> None:
        if self.resume is not None and (self.configurations or self.overrides):
            raise ConfigurationError(
                "--resume goes on with the run's own configuration and takes no other option; to change one, start a "
                "new run with --config RUN/config.yaml"
            )
        if self.overrides and not self.overrides[0].startswith("--"):
            raise ConfigurationError(
                f"options begin with --, got {self.overrides[0]!r}; seqzoo train --help lists them"
            )


def short_help() -> str:
    """The text of ``seqzoo train --help``."""
    kinds: dict[str, list[str]] = {}
    for name in shipped():
        kinds.setdefault(name.partition("/")[0], []).append(name)
    names = f"\n{' ' * 29}".join(", ".join(kind) for kind in kinds.values())
    return HELP.format(minutes=combine([])["minutes"], shipped=names, quickstart=" ".join(QUICKSTART))
