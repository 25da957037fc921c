"""The zoo: one file an architecture. Importing this package imports, and so registers, every module in it."""

import importlib as _importlib
import pkgutil as _pkgutil

for _module in sorted(info.name for info in _pkgutil.iter_modules(__path__)):
    _importlib.import_module(f"{__name__}.{_module}")

from seqzoo.layers.bidirectional import Bidirectional as Bidirectional  # noqa: E402 - the loop above comes first
from seqzoo.layers.deltanet import DeltaNet as DeltaNet  # noqa: E402
from seqzoo.layers.gated_deltanet import GatedDeltaNet as GatedDeltaNet  # noqa: E402
from seqzoo.layers.gateloop import GateLoop as GateLoop  # noqa: E402
from seqzoo.layers.gla import GLA as GLA  # noqa: E402
from seqzoo.layers.hgrn import HGRN as HGRN  # noqa: E402
from seqzoo.layers.hgrn2 import HGRN2 as HGRN2  # noqa: E402
from seqzoo.layers.kda import KimiDeltaAttention as KimiDeltaAttention  # noqa: E402
from seqzoo.layers.lightning_attention import LightningAttention as LightningAttention  # noqa: E402
from seqzoo.layers.linear_attention import LinearAttention as LinearAttention  # noqa: E402
from seqzoo.layers.longhorn import Longhorn as Longhorn  # noqa: E402
from seqzoo.layers.mamba import Mamba as Mamba  # noqa: E402
from seqzoo.layers.mamba2 import Mamba2 as Mamba2  # noqa: E402
from seqzoo.layers.min_gru import MinGRU as MinGRU  # noqa: E402
from seqzoo.layers.min_lstm import MinLSTM as MinLSTM  # noqa: E402
from seqzoo.layers.mlstm import MLSTM as MLSTM  # noqa: E402
from seqzoo.layers.mom import MixtureOfMemories as MixtureOfMemories  # noqa: E402
from seqzoo.layers.retnet import RetNet as RetNet  # noqa: E402
from seqzoo.layers.rglru import RGLRU as RGLRU  # noqa: E402
