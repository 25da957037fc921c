"""SeqZoo: a zoo of sequence models behind one interface."""

import importlib as _importlib
from pathlib import Path as _Path
from typing import TYPE_CHECKING

from seqzoo.version import __version__ as __version__

# In a checkout kernels/, train/, eval/ and configs/ lie beside this package and are linked into it; in a wheel they lie
# inside it. Where the links were lost (Windows, some archives), look one directory up.
if not (_Path(__file__).parent / "kernels").is_dir():
    __path__.append(str(_Path(__file__).parents[1]))

from seqzoo import layers as layers
from seqzoo.mixer import LimitError as LimitError
from seqzoo.mixer import SequenceMixer as SequenceMixer
from seqzoo.mixer import State as State
from seqzoo.mixer import create as create
from seqzoo.mixer import fork as fork
from seqzoo.mixer import join as join
from seqzoo.mixer import list_mixers as list_mixers
from seqzoo.mixer import register as register
from seqzoo.packing import Packing as Packing
from seqzoo.parameters import parameter_groups as parameter_groups

if TYPE_CHECKING:
    from seqzoo.models import create_model as create_model
    from seqzoo.models import list_models as list_models


def __getattr__(name: str) -> object:
    """The parts that are imported when they are first named."""
    if name in ("hub", "models", "ops", "parallel"):
        return _importlib.import_module(f"{__name__}.{name}")
    if name in ("create_model", "list_models"):
        return getattr(_importlib.import_module(f"{__name__}.models"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
