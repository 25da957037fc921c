"""``long_conv`` on GPUs: the PyTorch implementation, whose transforms are cuFFT's or hipFFT's; no Triton kernel."""

from seqzoo.kernels.long_conv.chunked import backward as backward
from seqzoo.kernels.long_conv.chunked import forward as forward
