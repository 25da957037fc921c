"""torch.compile without graph breaks, torch.export with dynamic sizes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from seqzoo import Packing
from seqzoo.models import LanguageModel

Build = Callable[..., LanguageModel]
Tokens = Callable[..., torch.Tensor]


@pytest.fixture
def mixer() -> list[str]:
    """One hybrid: the contract suite compiles every mixer by itself."""
    return ["min_gru", "min_lstm"]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_forward_compiles_once(mixer: list[str], build: Build, tokens: Tokens):
    model = build(mixer)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=False):
        got = compiled(tokens(2, 9))[0]
    torch.testing.assert_close(got, model(tokens(2, 9))[0], rtol=1e-9, atol=1e-11)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch, total in ((3, 14), (5, 6)):
            ids = tokens(batch, total)
            torch.testing.assert_close(compiled(ids)[0], model(ids)[0], rtol=1e-9, atol=1e-11)


def test_packed_loss_compiles_once(build: Build, tokens: Tokens):
    model = build(n_layers=1, max_positions=20)
    compiled = torch.compile(model.loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for index, lengths in enumerate(([4, 6, 3], [2, 5, 8, 1])):
        total = sum(lengths)
        ids, labels, packing = tokens(1, total), tokens(1, total, seed=1), Packing.from_lengths(lengths)
        with torch._dynamo.config.patch(error_on_recompile=index > 0):
            loss = compiled(ids, labels, cu_seqlens=packing, chunk_size=4)
        got = torch.autograd.grad(loss, list(model.parameters()))
        expected = model.loss(ids, labels, cu_seqlens=packing)
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-11)
        for one, other in zip(got, torch.autograd.grad(expected, list(model.parameters())), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def test_step_compiles(mixer: list[str], build: Build, tokens: Tokens):
    model = build(mixer)
    state = model.init_state(2)
    got = torch.compile(model.step, fullgraph=True, backend="aot_eager")(tokens(2), state)
    expected = model.step(tokens(2), model.init_state(2))
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


def test_export_with_dynamic_sizes(mixer: list[str], build: Build, tokens: Tokens):
    model = build(mixer)
    shapes = ((torch.export.Dim("B"), torch.export.Dim("T")),)
    exported = torch.export.export(model, (tokens(2, 9),), dynamic_shapes=shapes).module()
    for batch, total in ((1, 4), (3, 17)):
        ids = tokens(batch, total)
        torch.testing.assert_close(exported(ids)[0], model(ids)[0], rtol=1e-9, atol=1e-11)
