"""minLSTM: ``h_t = f'_t h_{t-1} + i'_t value_t`` with normalised gates read from the input alone."""

from __future__ import annotations

from seqzoo.mixer import register
from seqzoo.modules.gated_cell import GatedCell


@register("min_lstm", paper="Were RNNs All We Needed?", arxiv="2410.01201", year=2024)
class MinLSTM(GatedCell):
    """minLSTM, "Were RNNs All We Needed?", https://arxiv.org/abs/2410.01201, section 3.2, in linear space.

    With ``[forget, input, value] = W x``, ``f = sigmoid(forget)``, ``i = sigmoid(input)``, the normalised gates
    ``f' = f / (f + i)`` and ``i' = i / (f + i)``, and ``lo, hi = gate_range``::

        h_t = (lo + (hi - lo) f'_t) h_{t-1} + i'_t value_t
        y_t = W_o h_t

    With ``d_conv`` a causal convolution of each channel with SiLU comes first, and x is its output.

    State: ``{"h": (B, expand * d_model)}``, float32 (float64 for float64 inputs); with ``d_conv`` also the inputs
    ``{"conv": (B, d_conv - 1, d_model)}``, of their own dtype.

    Args:
        d_model: Width of inputs and outputs.
        expand: The recurrence is ``expand * d_model`` wide.
        output_projection: Whether W_o is there; None means where ``expand`` is not 1.
        gate_range: Range of the factor on the previous value, -1 <= lo < hi <= 1; (-1, 1) allows to track a state
            (https://arxiv.org/abs/2411.12537).
        bias: Whether the projections have biases.
        d_conv: Tokens that the convolution sees, from 2 to 8; None means that there is none.
    """

    cell = "min_lstm"
