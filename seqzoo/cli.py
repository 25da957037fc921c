"""The command line ``seqzoo``: finds the module of a command and imports it when it is called."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from seqzoo.mixer import nearest
from seqzoo.version import __version__

# command -> (module with main(arguments) -> exit status, what it does, the extra that holds its packages)
COMMANDS = {
    "list": ("seqzoo.zoo", "print the zoo as a table", ""),
    "train": ("seqzoo.train.command", "train a model; without arguments the quickstart", "train"),
    "generate": ("seqzoo.models.command", "continue a prompt with a trained model", ""),
    "plan": ("seqzoo.parallel.simulator", "bytes and time of sequence parallel on any number of ranks", ""),
    "eval": ("seqzoo.eval.command", "judge a trained model", "train"),
    "report": ("seqzoo.eval.report", "compare runs: a page of curves and tables", "train"),
    "signature": ("seqzoo.eval.signature", "train every kind of mixer on small tasks that tell them apart", "train"),
    "doctor": ("seqzoo.doctor", "check every op on this machine against the float64 reference", ""),
}


def usage() -> str:
    """The text of ``seqzoo --help``."""
    lines = [f"seqzoo {__version__}: a zoo of sequence models", "", "usage: seqzoo COMMAND [OPTIONS]", ""]
    lines += [f"  {name:<10}{words}" for name, (_, words, _) in COMMANDS.items()]
    return "\n".join([*lines, "", "seqzoo COMMAND --help tells its options."])


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0
    if arguments[0] in ("-V", "--version"):
        print(__version__)
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        print(f"seqzoo: there is no command {name!r}; {nearest(name, COMMANDS)}", file=sys.stderr)
        return 2
    module, _, extra = COMMANDS[name]
    try:
        command = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("seqzoo") or not extra:
            raise
        print(f"seqzoo {name} needs the package {error.name}; pip install 'seqzoo[{extra}]'", file=sys.stderr)
        return 1
    return command.main(rest)


if __name__ == "__main__":
    sys.exit(main())
