"""Every registered mixer, in each of its variants, on each implementation that can run."""

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


@pytest.fixture(params=subjects(), ids=lambda subject: subject.label)
def subject(request: pytest.FixtureRequest) -> Subject:
    return request.param


@pytest.fixture(params=COMBINATIONS, ids=lambda pair: f"{pair[0]}-{str(pair[1]).split('.')[1]}")
def dtype(request: pytest.FixtureRequest, device: torch.device):
    """The dtype of a test that runs on every implementation; the implementation is switched on around the test."""
    name, dtype = request.param
    if name == "gpu" and device.type == "cpu" and not request.config.getoption("--slow") and not _telling(request):
        pytest.skip("slow: the interpreter takes seconds a test; run with --slow")
    if name == "reference" and "compile" in request.node.nodeid:
        pytest.skip("the reference is a Python loop over time: tracing it would unroll the loop for one length")
    reason = dispatch.obstacle(name, device, dtype in dispatch.WIDE)
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    with dispatch.backend(name):
        yield dtype


def _telling(request: pytest.FixtureRequest) -> bool:
    """Whether a test says much about a mixer's GPU kernels: packing, with their states and gradients, of each once."""
    label = request.getfixturevalue("subject").label
    return "test_packing" in request.node.nodeid and label.endswith("()") and not label.startswith("plain")
