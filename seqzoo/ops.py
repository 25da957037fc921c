"""The public ops: ``from seqzoo.ops import linear_scan``."""

from seqzoo.kernels.attention import attention as attention
from seqzoo.kernels.cauchy import cauchy as cauchy
from seqzoo.kernels.causal_conv import causal_conv as causal_conv
from seqzoo.kernels.delta_rule import delta_rule as delta_rule
from seqzoo.kernels.dispatch import backend as backend
from seqzoo.kernels.dispatch import checks as checks
from seqzoo.kernels.gated_scan import gated_scan as gated_scan
from seqzoo.kernels.linear_attention import linear_attention as linear_attention
from seqzoo.kernels.linear_scan import linear_scan as linear_scan
from seqzoo.kernels.long_conv import long_conv as long_conv
from seqzoo.kernels.selective_scan import selective_scan as selective_scan
from seqzoo.kernels.ssm_kernel import ssm_kernel as ssm_kernel
from seqzoo.kernels.ssm_scan import ssm_scan as ssm_scan
from seqzoo.kernels.vandermonde import vandermonde as vandermonde
