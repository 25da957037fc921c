"""G6: one graph, no recompilation when only lengths change, exportable with dynamic B and T."""

from __future__ import annotations

import shutil

import pytest
import torch

from seqzoo import Packing, join
from seqzoo.testing import Subject, inputs, parameters_of, random_state


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def agree(actual, expected, dtype):
    tolerance = 1e-12 if dtype is torch.float64 else 1e-5
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_fullgraph_with_gradients_and_without_recompilation(subject: Subject, dtype, device, packed):
    mixer = subject.make(dtype, device)
    if packed and not mixer.packs:
        pytest.skip("test_a_bare_cu_seqlens_compiles asserts the error")
    stateful = "state" not in mixer.limits

    def call(x, state, packing):
        y, final = mixer(x, state, cu_seqlens=packing, return_state=stateful)
        return y, final

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    # Dynamo takes dimensions that are equal in the first call for the same: no mixer here has one of 10, 11 or 13
    first = [1, 0, 2, 1, 0, 3, 1, 2, 0, 3]
    for number, lengths in enumerate((first, [4, 6, 2], [2, 9, 4, 1], [7, 1, 0, 3, 6, 1])):
        total = sum(lengths)
        x = inputs((1, total, 16) if packed else (2, total, 16), dtype, device).requires_grad_()
        packing = Packing.from_lengths(lengths).to(device) if packed else None
        state = random_state(mixer, len(lengths) if packed else 2, x) if stateful else None
        with torch._dynamo.config.patch(error_on_recompile=number > 0):
            y, final = compiled(x, state, packing)
        expected, expected_final = call(x, state, packing)
        agree(y, expected, dtype)
        if stateful:
            # side by side, since compiled code gives a cache more room
            pair = {key: value.tensor_split(2) for key, value in join([final, expected_final]).items()}
            for actual, wanted in pair.values():
                agree(actual, wanted, dtype)
        sources = [x, *parameters_of(mixer).values()]
        agree(torch.autograd.grad(y.sum(), sources), torch.autograd.grad(expected.sum(), sources), dtype)


def test_a_bare_cu_seqlens_compiles(subject: Subject, device):
    mixer = subject.make(torch.float32, device)
    cu_seqlens = torch.tensor([0, 3, 3, 8], dtype=torch.int32, device=device)
    x = inputs((1, 8, 16), torch.float32, device)
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    if not mixer.packs:
        with pytest.raises(torch._dynamo.exc.Unsupported, match="set packs = True"):
            compiled(x, cu_seqlens=cu_seqlens)
        return
    agree(compiled(x, cu_seqlens=cu_seqlens)[0], mixer(x, cu_seqlens=cu_seqlens)[0], torch.float32)


def test_step_compiles(subject: Subject, device):
    mixer = subject.make(torch.float32, device)
    if "step" in mixer.limits:
        pytest.skip("test_limits asserts the error")
    x = inputs((2, 16), torch.float32, device)
    state = mixer.init_state(2)
    compiled = torch.compile(mixer.step, fullgraph=True, backend="aot_eager")
    agree(compiled(x, state), mixer.step(x, state), torch.float32)


def test_export_with_dynamic_batch_and_length(subject: Subject, device):
    mixer = subject.make(torch.float32, device)
    shapes = ({0: torch.export.Dim("B"), 1: torch.export.Dim("T")},)
    program = torch.export.export(mixer, (inputs((2, 9, 16), torch.float32, device),), dynamic_shapes=shapes)
    for shape in ((3, 17, 16), (2, 4, 16)):
        x = inputs(shape, torch.float32, device)
        agree(program.module()(x)[0], mixer(x)[0], torch.float32)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler on the CPU")
def test_inductor(subject: Subject, device):
    mixer = subject.make(torch.float32, device)
    x = inputs((2, 33, 16), torch.float32, device).requires_grad_()
    y, _ = torch.compile(mixer, fullgraph=True)(x)
    agree(y, mixer(x)[0], torch.float32)
    agree(torch.autograd.grad(y.sum(), x), torch.autograd.grad(mixer(x)[0].sum(), x), torch.float32)
