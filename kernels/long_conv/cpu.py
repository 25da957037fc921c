"""``long_conv`` on CPUs: the PyTorch implementation, in blocks that stay in the caches. Numba has nothing to add."""

from seqzoo.kernels.long_conv.chunked import backward as backward
from seqzoo.kernels.long_conv.chunked import forward as forward
