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
from seqzoo.train.data.state_tracking import cycle_navigation, group_words

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


def diagnostic(name: str, **options: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    """A diagnostic with options: what makes its batches from ``seed``, ``index`` and ``batch_size=``.

    Raises:
        ValueError: If there is no diagnostic of that name.
        TypeError: If it has no such option, or lacks one.
    """
    if name not in DIAGNOSTICS:
        raise ValueError(f"there is no diagnostic {name!r}; {nearest(name, DIAGNOSTICS)}")
    known = inspect.signature(DIAGNOSTICS[name]).parameters
    for option in options:
        if option not in known:
            raise TypeError(f"the diagnostic {name} has no option {option!r}; {nearest(option, known)}")
    own = ("seed", "index", "batch_size")
    lacking = [
        word for word, one in known.items() if one.default is inspect.Parameter.empty and word not in (*own, *options)
    ]
    if lacking:
        raise TypeError(f"the diagnostic {name} needs {', '.join(lacking)}")
    return partial(DIAGNOSTICS[name], **options)
