"""minGRU: ``h_t = (1 - z_t) h_{t-1} + z_t value_t`` with gate and value read from the input alone."""

from __future__ import annotations

from seqzoo.mixer import register
from seqzoo.modules.gated_cell import GatedCell


@register("min_gru", paper="Were RNNs All We Needed?", arxiv="2410.01201", year=2024)
class MinGRU(GatedCell):
    """minGRU, "Were RNNs All We Needed?", https://arxiv.org/abs/2410.01201, section 3.1, in linear space.

    With ``[gate, value] = W x``, ``z = sigmoid(gate)`` and ``lo, hi = gate_range``::

        h_t = (lo + (hi - lo) (1 - z_t)) h_{t-1} + z_t value_t
        y_t = W_o h_t

    z weighs the new value (in ``torch.nn.GRU`` it weighs the old one). The paper's log-space form restricts the
    values to be positive and loses accuracy with length; linear space does neither. With the default range the
    factors lie in (0, 1) and the cell cannot track a state such as parity; ``gate_range=(-1, 1)`` allows it
    (https://arxiv.org/abs/2411.12537).

    With ``d_conv`` a causal convolution of each channel with SiLU comes first, and x is its output.

    State: ``{"h": (B, expand * d_model)}``, float32 (float64 for float64 inputs); with ``d_conv`` also the inputs
    ``{"conv": (B, d_conv - 1, d_model)}``, of their own dtype.

    Args:
        d_model: Width of inputs and outputs.
        expand: The recurrence is ``expand * d_model`` wide.
        output_projection: Whether W_o is there; None means where ``expand`` is not 1.
        gate_range: Range of the factor on the previous value, -1 <= lo < hi <= 1.
        bias: Whether the projections have biases.
        d_conv: Tokens that the convolution sees, from 2 to 8; None means that there is none.
    """

    cell = "min_gru"
