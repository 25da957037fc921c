"""The recurrence of ``block_recurrence`` on CPUs: matrix products, which PyTorch has."""

from seqzoo.kernels.block_recurrence.chunked import backward as backward
from seqzoo.kernels.block_recurrence.chunked import forward as forward
