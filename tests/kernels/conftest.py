"""Fixtures of the kernels' tests."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode


class _Forbid(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        forbidden = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        assert function not in forbidden, f"{function} synchronises"
        return function(*arguments, **(options or {}))


@pytest.fixture
def unsynchronised(device: torch.device):
    """Makes contexts that forbid reading a value of a tensor on the host."""

    @contextmanager
    def forbid():
        with ExitStack() as stack:
            if device.type == "cuda":
                previous = torch.cuda.get_sync_debug_mode()
                stack.callback(torch.cuda.set_sync_debug_mode, previous)
                torch.cuda.set_sync_debug_mode("error")
            stack.enter_context(_Forbid())
            yield

    return forbid
