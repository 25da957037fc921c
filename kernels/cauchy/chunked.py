"""``cauchy`` in PyTorch operations, and the form that all fast implementations share.

With ``z = exp(-2i t)``, ``s = sin t`` and ``c = cos t`` the denominator is ``2 exp(-i t) (i s - p c)``, free of
cancellation but for the pole's own. A pole ``p = a + i b`` has two rows over the nodes, which the real and imaginary
parts of any sum's weight ``w = u + i v`` multiply: the sum is ``sum_n (u_n P_n + v_n Q_n)``. With ``f = exp(i t) / 2``:

    alone           P = f r                              Q = i f r                        r = 1 / (i s - p c)
    with its        P = f (r + r')                       Q = i f (r - r')                 r' = 1 / (i s - conj(p) c)
    conjugate         = 2 f (i s - a c) / E                = -2 f b c / E                 E = |p|^2 c^2 - s^2 - 2i a s c

so that a pair costs what one term does. Beside a pole ``|p|^2 c^2 - s^2`` has lost as much as ``s - b c`` would have.

Of a sum's gradient g, u and v receive ``Re(conj(g) P)`` and ``Re(conj(g) Q)``. In both forms ``dP/da = -dQ/db = k A``
and ``dP/db = dQ/da = k B`` with ``A = (P^2 - Q^2) / 2``, ``B = P Q`` and ``k = c / f``. So with U and V, u g and v g
added up over the sums, a receives ``Re(k (conj(U) A + conj(V) B))`` and b ``Re(k (conj(U) B - conj(V) A))``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from seqzoo.kernels.cauchy.op import n_nodes

# values of rows held at once, of which all temporaries together take about 150 bytes each
VALUES = 1 << 18


def half_angles(length: int, device: torch.device) -> Tensor:
    """Of half the nodes' angles s, c, s^2, c^2 and s c, float64 ``(5, F)``."""
    index = torch.arange(n_nodes(length), dtype=torch.float64, device=device)
    # the cosine as a sine is exactly 0 at z = -1
    s, c = torch.sin(math.pi / length * index), torch.sin(math.pi / (2 * length) * (length - 2 * index))
    return torch.stack((s, c, s * s, c * c, s * c))


def forward(weights: Tensor, poles: Tensor, length: int, conjugate_pairs: bool) -> Tensor:
    """As the op ``cauchy_forward``."""
    tables = half_angles(length, weights.device)
    sums = weights.new_empty((*weights.shape[:2], n_nodes(length)))
    for channels, nodes in _blocks(sums, poles):
        rows = torch.view_as_real(_rows(poles[channels], tables[:, nodes], conjugate_pairs).to(weights.dtype))
        found = torch.view_as_real(weights[channels]).flatten(2) @ rows.flatten(3).flatten(1, 2)
        sums[channels, :, nodes] = torch.view_as_complex(found.unflatten(2, (-1, 2)))
    return sums


def backward(
    grad_sums: Tensor, weights: Tensor, poles: Tensor, length: int, conjugate_pairs: bool
) -> tuple[Tensor, Tensor]:
    """As the op ``cauchy_backward``."""
    tables = half_angles(length, weights.device)
    grad_weights = torch.zeros((*weights.shape, 2), dtype=torch.float64, device=weights.device)
    grad_poles = torch.zeros_like(poles)
    for channels, nodes in _blocks(grad_sums, poles):
        wide = _rows(poles[channels], tables[:, nodes], conjugate_pairs)
        rows = torch.view_as_real(wide.to(weights.dtype)).flatten(3).flatten(1, 2)
        arriving = torch.view_as_real(grad_sums[channels, :, nodes]).flatten(2)
        grad_weights[channels] += (arriving @ rows.mT).unflatten(2, (-1, 2))
        both = torch.view_as_real(weights[channels]).flatten(2).mT @ arriving
        both = torch.view_as_complex(both.unflatten(2, (-1, 2))).to(wide.dtype)
        # not conj(), which is put off: AOTAutograd calls operators where nothing makes up for it
        (P, Q), (U, V) = wide.unbind(2), both.conj_physical().unflatten(1, (-1, 2)).unbind(2)
        A, B = (P * P - Q * Q) / 2, P * Q
        k = 2 * torch.complex(tables[3, nodes], -tables[4, nodes])
        grad_poles[channels] += torch.complex(((U * A + V * B) @ k).real, ((U * B - V * A) @ k).real)
    return torch.view_as_complex(grad_weights).to(weights.dtype), grad_poles


def _blocks(sums: Tensor, poles: Tensor) -> Iterator[tuple[slice, slice]]:
    """Channels and nodes that are treated at once."""
    width, number, total = sums.shape
    each = max(2 * poles.shape[1], number, 1)
    nodes = max(1, min(total, VALUES // each))
    channels = max(1, VALUES // (each * nodes))
    for first in range(0, width, channels):
        for start in range(0, total, nodes):
            yield slice(first, first + channels), slice(start, start + nodes)


def _rows(poles: Tensor, tables: Tensor, conjugate_pairs: bool) -> Tensor:
    """P and Q of some channels at some nodes, complex128 ``(D, N, 2, nodes)``."""
    a, b = poles.real[:, :, None], poles.imag[:, :, None]
    s, c, s2, c2, sc = tables
    if not conjugate_pairs:
        P = 0.5 * torch.complex(c, s) * torch.complex(-a * c, s - b * c).reciprocal_()
        return torch.stack((P, 1j * P), 2)
    quotient = torch.complex((a * a + b * b) * c2 - s2, -2 * a * sc).reciprocal_()
    P = torch.complex(-a * c2 - s2, (1 - a) * sc) * quotient
    return torch.stack((P, -b * (torch.complex(c2, sc) * quotient)), 2)
