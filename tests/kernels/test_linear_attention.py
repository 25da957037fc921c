"""What the solvers of ``linear_attention`` keep beyond the parity of all ops: blocks, threads, boundaries, groups."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from seqzoo.kernels import dispatch
from seqzoo.kernels.linear_attention import chunked, cpu
from seqzoo.testing import LENGTHS, boundaries, compare, linear_attention_case

DECAYS = (None, "head", "token", "key")
FORMS = [(decay, True) for decay in DECAYS] + [(None, False)]
SOLVERS = ("chunked", "cpu")


@pytest.mark.parametrize(("decay", "causal"), FORMS)
@pytest.mark.parametrize("backend", SOLVERS)
@pytest.mark.parametrize("elements", [1, 20_000])
def test_blocks_of_any_size_give_the_same(backend, decay, causal, elements, monkeypatch):
    monkeypatch.setattr(chunked, "BLOCK", elements)
    monkeypatch.setattr(cpu, "TILES", elements)
    for shape, lengths in (((2, 150), None), ((1, 0), (70, 0, 3, 200, 64))):
        options = {"heads": 6, "groups": 2, "decay": decay, "causal": causal, "lengths": lengths}
        worst = compare(linear_attention_case(torch.float32, shape, **options), backend)
        assert max(worst.values()) <= 1, worst


@pytest.mark.parametrize(("decay", "causal"), FORMS)
def test_threads_change_nothing(decay, causal):
    case = linear_attention_case(
        torch.float32, (2, 400), heads=4, groups=2, key=32, value=24, decay=decay, causal=causal
    )
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = case.run("cpu")
        torch.set_num_threads(2)
        two, again = case.run("cpu"), case.run("cpu")
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(two[name], again[name]) for name in two)
    torch.testing.assert_close(two, one)


@pytest.mark.parametrize(("decay", "causal"), FORMS)
@pytest.mark.parametrize("backend", SOLVERS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_nothing_crosses_a_boundary(backend, decay, causal, poison):
    names = ["q", "k", "v"] + (["log_decay"] if decay in ("token", "key") else [])
    for poisoned in names:
        case = linear_attention_case(torch.float32, lengths=(3, 70, 5), heads=4, groups=2, decay=decay, causal=causal)
        present = {name: value.requires_grad_() for name, value in case.tensors.items() if value is not None}
        present[poisoned].data[:, 3:73] = poison
        with dispatch.backend(backend):
            o, final = case.call()
            outside = torch.cat((o[:, :3], o[:, 73:]), 1)
            assert torch.isfinite(outside).all()
            assert torch.isfinite(final[[0, 2]]).all()
            grads = torch.autograd.grad(outside.sum() + final[[0, 2]].sum(), list(present.values()))
        for name, grad in zip(present, grads, strict=True):
            if name == "log_decay" and decay == "head":
                continue  # a sum over all sequences
            kept = grad[[0, 2]] if name == "initial_state" else torch.cat((grad[:, :3], grad[:, 73:]), 1)
            assert torch.isfinite(kept).all(), (poisoned, name)


@pytest.mark.parametrize(("decay", "causal"), FORMS)
@pytest.mark.parametrize("backend", SOLVERS)
def test_packed_is_what_separate_sequences_give(backend, decay, causal):
    case = linear_attention_case(torch.float64, lengths=LENGTHS, heads=4, groups=2, decay=decay, causal=causal)
    initial = case.tensors["initial_state"]
    assert initial is not None
    with dispatch.backend(backend):
        o, final = case.call()
        for index, (start, end) in enumerate(itertools.pairwise(boundaries(LENGTHS).tolist())):
            tensors = {name: x if x is None or x.dim() == 1 else x[:, start:end] for name, x in case.tensors.items()}
            tensors["initial_state"] = initial[index : index + 1]
            one_o, one_final = replace(case, options=case.options | {"cu_seqlens": None}).call(tensors)
            torch.testing.assert_close(o[:, start:end], one_o)
            torch.testing.assert_close(final[index : index + 1], one_final)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("backend", SOLVERS)
def test_one_token_is_a_sequence_of_one(backend, decay):
    for dtype, state in itertools.product((torch.float32, torch.bfloat16), (False, True)):
        case = linear_attention_case(
            dtype, (3, 1), heads=6, groups=2, key=16, value=24, decay=decay, state=state, decay_dtype=torch.float32
        )
        worst = compare(case, backend)
        assert max(worst.values()) <= 1, worst


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("backend", SOLVERS)
def test_gradcheck(backend, decay):
    for options in ({}, {"lengths": (2, 0, 3), "groups": 1}):
        case = linear_attention_case(torch.float64, (2, 5), key=2, value=2, decay=decay, **options)
        present = {name: value.clone().requires_grad_() for name, value in case.tensors.items() if value is not None}

        def call(*values, case=case, names=tuple(present)):
            return case.call({**case.tensors, **dict(zip(names, values, strict=True))})

        with dispatch.backend(backend):
            assert torch.autograd.gradcheck(call, list(present.values()))


def test_a_long_sequence_keeps_its_slow_decay():
    """Rounding in a decay near 1 would grow with the length."""
    for decay in ("head", "key"):
        case = linear_attention_case(torch.float32, (1, 1500), decay=decay, strength=1e-3)
        for backend in SOLVERS:
            worst = compare(case, backend)
            assert max(worst.values()) <= 1, (backend, worst)


@pytest.mark.parametrize(("decay", "causal"), FORMS)
def test_the_chunked_solver_reads_no_values(decay, causal):
    """Tensors without values, of which a read on the host is an error, stand for those on a device."""
    case = linear_attention_case(torch.float32, lengths=LENGTHS, heads=4, groups=2, decay=decay, causal=causal)
    tensors = case.to("meta").tensors
    inputs = tuple(tensors.get(name) for name in ("q", "k", "v", "log_decay", "initial_state"))
    arguments: Any = *inputs, case.options["cu_seqlens"].to("meta"), 1.0, causal
    o, final = chunked.forward(*arguments)
    gradients = chunked.backward(o, final, *arguments)
    for gradient, like in zip(gradients, inputs, strict=True):
        assert like is None or gradient.shape == like.shape
