"""The zoo: one file an architecture. Importing this package imports, and so registers, every module in it."""

# the loop comes before the names
# ruff: noqa: E402

import importlib as _importlib
import pkgutil as _pkgutil

for _module in sorted(info.name for info in _pkgutil.iter_modules(__path__)):
    _importlib.import_module(f"{__name__}.{_module}")

from seqzoo.layers.aaren import Aaren as Aaren
from seqzoo.layers.attention import Attention as Attention
from seqzoo.layers.bidirectional import Bidirectional as Bidirectional
from seqzoo.layers.block_recurrent import BlockRecurrent as BlockRecurrent
from seqzoo.layers.deltanet import DeltaNet as DeltaNet
from seqzoo.layers.dss import DSS as DSS
from seqzoo.layers.gated_deltanet import GatedDeltaNet as GatedDeltaNet
from seqzoo.layers.gateloop import GateLoop as GateLoop
from seqzoo.layers.gla import GLA as GLA
from seqzoo.layers.hgrn import HGRN as HGRN
from seqzoo.layers.hgrn2 import HGRN2 as HGRN2
from seqzoo.layers.kda import KimiDeltaAttention as KimiDeltaAttention
from seqzoo.layers.lightning_attention import LightningAttention as LightningAttention
from seqzoo.layers.linear_attention import LinearAttention as LinearAttention
from seqzoo.layers.long_conv import LongConv as LongConv
from seqzoo.layers.longhorn import Longhorn as Longhorn
from seqzoo.layers.lru import LRU as LRU
from seqzoo.layers.mamba import Mamba as Mamba
from seqzoo.layers.mamba2 import Mamba2 as Mamba2
from seqzoo.layers.min_gru import MinGRU as MinGRU
from seqzoo.layers.min_lstm import MinLSTM as MinLSTM
from seqzoo.layers.mlstm import MLSTM as MLSTM
from seqzoo.layers.mom import MixtureOfMemories as MixtureOfMemories
from seqzoo.layers.prefix_linear_attention import PrefixLinearAttention as PrefixLinearAttention
from seqzoo.layers.retnet import RetNet as RetNet
from seqzoo.layers.rglru import RGLRU as RGLRU
from seqzoo.layers.s4 import S4 as S4
from seqzoo.layers.s4d import S4D as S4D
from seqzoo.layers.s5 import S5 as S5
from seqzoo.layers.seqboat import SeqBoat as SeqBoat
from seqzoo.layers.sliding_window_attention import SlidingWindowAttention as SlidingWindowAttention
from seqzoo.layers.transmamba import TransMamba as TransMamba
