"""The zoo: one file an architecture. Importing this package imports, and so registers, every module in it."""

import importlib as _importlib
import pkgutil as _pkgutil

for _module in sorted(info.name for info in _pkgutil.iter_modules(__path__)):
    _importlib.import_module(f"{__name__}.{_module}")

from seqzoo.layers.bidirectional import Bidirectional as Bidirectional  # noqa: E402 - the loop above comes first
from seqzoo.layers.longhorn import Longhorn as Longhorn  # noqa: E402
from seqzoo.layers.mamba import Mamba as Mamba  # noqa: E402
from seqzoo.layers.min_gru import MinGRU as MinGRU  # noqa: E402
from seqzoo.layers.min_lstm import MinLSTM as MinLSTM  # noqa: E402
