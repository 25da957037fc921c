"""Every registered mixer, in each of its variants, on each implementation that can run.

What runs without ``--slow`` is what tells something new:

* a mixer that speaks for an op (:func:`seqzoo.testing.subjects`): everything but float32 on interpreted GPU kernels,
  which the ops' own tests run packed, with states and gradients;
* the first variant of any other: the chunked implementation in float64, the CPU's in float32, one compiled graph;
* further variants: the chunked implementation in float64, and what does not depend on the implementation.
"""

from __future__ import annotations

import pytest
import torch

from seqzoo.kernels import dispatch
from seqzoo.testing import Subject, subjects

# the interpreted GPU kernels are slow and have no use for float64
COMBINATIONS = [
    ("reference", torch.float64),
    ("chunked", torch.float64),
    ("cpu", torch.float64),
    ("cpu", torch.float32),
    ("gpu", torch.float32),
]
# by rank of the subject: what speaks for an op, first variants, further ones
TELLING = (
    COMBINATIONS[:4],
    [("chunked", torch.float64), ("cpu", torch.float32)],
    [("chunked", torch.float64)],
)


@pytest.fixture(params=subjects(), ids=lambda subject: subject.label)
def subject(request: pytest.FixtureRequest) -> Subject:
    return request.param


@pytest.fixture(params=COMBINATIONS, ids=lambda pair: f"{pair[0]}-{str(pair[1]).split('.')[1]}")
def dtype(request: pytest.FixtureRequest, device: torch.device):
    """The dtype of a test that runs on every implementation; the implementation is switched on around the test."""
    name, dtype = request.param
    if name == "reference" and "compile" in request.node.nodeid:
        pytest.skip("the reference is a Python loop over time: tracing it would unroll the loop for one length")
    reason = dispatch.obstacle(name, device, dtype in dispatch.WIDE)
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    with dispatch.backend(name):
        yield dtype


def pytest_itemcollected(item: pytest.Item) -> None:
    """Marks as slow what the fast suite leaves out."""
    chosen = getattr(getattr(item, "callspec", None), "params", {})
    if "subject" in chosen and not _tells(item, chosen):
        item.add_marker(pytest.mark.slow)


def _tells(item: pytest.Item, chosen: dict) -> bool:
    rank, combination = chosen["subject"].rank, chosen.get("dtype")
    if item.config.getoption("--device") != "cpu":
        return True
    if combination is not None and combination[0] == "gpu":
        return False  # the interpreter takes up to a minute a test
    if "test_compile" in item.nodeid:
        # tracing does too: one dtype, and of what speaks for no op one graph, that of packed sequences
        natural = combination == ("cpu", torch.float32)
        return (rank == 0 and (natural or combination is None)) or (rank == 1 and natural and chosen["packed"])
    if "test_gradcheck" in item.nodeid:
        return rank < 2
    return combination is None or combination in TELLING[rank]
