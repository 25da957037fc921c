"""The inverse transform at the end of ``ssm_kernel`` on GPUs: PyTorch's."""

from seqzoo.kernels.ssm_kernel.chunked import transform_backward as transform_backward
from seqzoo.kernels.ssm_kernel.chunked import transform_forward as transform_forward
