"""The synthetic diagnostics by name: what the field asks small models to tell what their dynamics can do."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from seqzoo.mixer import nearest
from seqzoo.train.data.induction_heads import induction_heads
from seqzoo.train.data.mad import compression, fuzzy_recall, in_context_recall, memorisation
from seqzoo.train.data.mqar import mqar
from seqzoo.train.data.selective_copying import selective_copying
from seqzoo.train.data.set_disjointness import set_disjointness
from seqzoo.train.data.state_tracking import cycle_navigation, group_words, product_table

# each takes seed, index, batch_size and options of its own, and returns ids and labels, both (B, T)
DIAGNOSTICS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "mqar": mqar,
    "selective-copying": selective_copying,
    "induction-heads": induction_heads,
    "parity": partial(group_words, group="Z2"),
    "modular-sum": partial(group_words, group="Z5"),
    "group-words": group_words,
    "cycle-navigation": cycle_navigation,
    "set-disjointness": set_disjointness,
    "mad-in-context-recall": in_context_recall,
    "mad-noisy-recall": partial(in_context_recall, noise=0.2, n_noise=16),
    "mad-fuzzy-recall": fuzzy_recall,
    "mad-selective-copying": partial(selective_copying, length=240, n_tokens=16, n_symbols=14),
    "mad-compression": compression,
    "mad-memorisation": memorisation,
}

# how many ids a diagnostic's tokens and labels have, where its options do not say it as vocab_size
SIZES: dict[Callable[..., Any], Callable[[dict[str, Any]], int]] = {
    selective_copying: lambda options: options["n_symbols"] + 2,
    group_words: lambda options: len(product_table(options["group"])),
    cycle_navigation: lambda options: max(3, options["size"]),
    in_context_recall: lambda options: options["vocab_size"] + options["n_noise"],
}
# what a batch is asked for with, which no option is
OWN = ("seed", "index", "batch_size")


def diagnostic(name: str, **options: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    """A diagnostic with options: what makes its batches from ``seed``, ``index`` and ``batch_size=``.

    Raises:
        ValueError: If there is no diagnostic of that name.
        TypeError: If it has no such option, lacks one, or has one of another type.
    """
    known = _options(name)
    for option, value in options.items():
        if option not in known:
            raise TypeError(f"the diagnostic {name} has no option {option!r}; {nearest(option, known)}")
        # annotations are text
        kind, given = known[option].annotation, type(value).__name__
        if given != kind and (given, kind) != ("int", "float"):
            raise TypeError(f"the diagnostic {name} takes {option} as {kind}, got {value!r}")
    lacking = [word for word, one in known.items() if one.default is inspect.Parameter.empty and word not in options]
    if lacking:
        raise TypeError(f"the diagnostic {name} needs {', '.join(lacking)}")
    return partial(DIAGNOSTICS[name], **options)


def vocabulary(name: str, **options: Any) -> int:
    """How many ids the tokens and labels of a diagnostic with these options can have."""
    values = {word: one.default for word, one in _options(name).items()} | options
    found = DIAGNOSTICS[name]
    size = SIZES.get(found.func if isinstance(found, partial) else found)
    return values["vocab_size"] if size is None else size(values)


def _options(name: str) -> dict[str, inspect.Parameter]:
    if name not in DIAGNOSTICS:
        raise ValueError(f"there is no diagnostic {name!r}; {nearest(name, DIAGNOSTICS)}")
    known = inspect.signature(DIAGNOSTICS[name]).parameters
    return {word: one for word, one in known.items() if word not in OWN}
