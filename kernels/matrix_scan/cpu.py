"""The recurrences of ``matrix_scan`` on CPUs: matrix products, which PyTorch has."""

from seqzoo.kernels.matrix_scan.chunked import backward as backward
from seqzoo.kernels.matrix_scan.chunked import forward as forward
from seqzoo.kernels.matrix_scan.chunked import power_backward as power_backward
from seqzoo.kernels.matrix_scan.chunked import power_forward as power_forward
