"""What ``attention`` keeps beyond the parity of all ops: merging, oracles, tiles, packing, caches, Flex."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import flex_attention as flex_module

from seqzoo.kernels import dispatch
from seqzoo.kernels.attention import chunked, cpu, gpu
from seqzoo.ops import attention
from seqzoo.packing import Packing
from seqzoo.testing import (
    LENGTHS,
    LENGTHS_K,
    AttentionCase,
    attention_case,
    attention_cases,
    boundaries,
    compare,
    inputs,
    widen,
)

SOLVERS = ("chunked", "cpu")
CLOSE = {"rtol": 1e-11, "atol": 1e-12}


def drawn(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64, gradients: bool = False) -> list[Tensor]:
    return [inputs(shape, dtype, seed=seed).requires_grad_(gradients) for seed, shape in enumerate(shapes)]


def gradients_of(outputs: tuple[Tensor, ...], sources: list[Tensor]) -> tuple[Tensor, ...]:
    cotangents = [inputs(tuple(out.shape), out.dtype, seed=50 + index) for index, out in enumerate(outputs)]
    return torch.autograd.grad(outputs, sources, cotangents)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch):
    for name, value in (("QUERIES", 8), ("KEYS", 8), ("TILES_CPU", 100)):
        monkeypatch.setattr(chunked, name, value)


# -- oracles --


@pytest.mark.parametrize("backend", ["reference", *SOLVERS])
@pytest.mark.parametrize("causal", [False, True])
def test_parts_merge_by_lse_with_all_gradients(backend: str, causal: bool):
    tensors = drawn((2, 9, 4, 8), (2, 15, 2, 8), (2, 15, 2, 5), (4,), gradients=True)
    q, k, v, sinks = tensors
    with dispatch.backend(backend):
        whole = attention(q, k, v, causal=causal, sinks=sinks)
        # the last nine keys are beside the queries
        first, lse_first = attention(q, k[:, :6], v[:, :6], causal=False, sinks=sinks)
        second, lse_second = attention(q, k[:, 6:], v[:, 6:], causal=causal)
        lse = torch.logaddexp(lse_first, lse_second)
        parts = ((first, lse_first), (second, lse_second))
        merged = sum((one_lse - lse).exp()[..., None] * one for one, one_lse in parts), lse
        torch.testing.assert_close(merged, whole, **CLOSE)
        torch.testing.assert_close(gradients_of(merged, tensors), gradients_of(whole, tensors), **CLOSE)


@pytest.mark.parametrize("backend", ["reference", *SOLVERS])
def test_scores_that_depend_on_keys_alone_make_prefix_sums(backend: str):
    k, v = drawn((2, 150, 2, 4), (2, 150, 2, 3))
    q = torch.ones(2, 150, 2, 4, dtype=torch.float64)
    with dispatch.backend(backend):
        o, lse = attention(q, k, v, scale=0.5)
    weights = (0.5 * k.sum(-1)).exp()
    torch.testing.assert_close(lse, weights.cumsum(1).log(), **CLOSE)
    expected = (weights[..., None] * v).cumsum(1) / weights.cumsum(1)[..., None]
    torch.testing.assert_close(o, expected, **CLOSE)


def seen(total: int, total_k: int, causal: bool, window: int | None) -> Tensor:
    distance = torch.arange(total)[:, None] + (total_k - total) - torch.arange(total_k)[None]
    found = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    return found if window is None else found & (distance.abs() < window)


def by_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """PyTorch's attention in plain operations, on whole heads; lse beside it."""
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        o = functional.scaled_dot_product_attention(*heads_first, attn_mask=mask)
    scores = heads_first[0] @ heads_first[1].transpose(-1, -2) * q.shape[3] ** -0.5
    return o.transpose(1, 2), scores.masked_fill(~mask, -torch.inf).logsumexp(-1).transpose(1, 2)


@pytest.mark.parametrize("backend", SOLVERS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 1, 7, 40, 500])
@pytest.mark.parametrize(("total", "total_k"), [(40, 40), (40, 61), (1, 61)])
def test_masked_dense_attention_agrees(backend, causal, window, total, total_k, small_tiles):
    tensors = drawn((2, total, 4, 8), (2, total_k, 2, 8), (2, total_k, 2, 8), gradients=True)
    expected = by_mask(*tensors, seen(total, total_k, causal, window))
    with dispatch.backend(backend):
        actual = attention(*tensors, causal=causal, window=window)
        torch.testing.assert_close(actual, expected, **CLOSE)
        for outputs, others in ((actual, expected), (actual[:1], expected[:1]), (actual[1:], expected[1:])):
            sources = tensors if len(outputs) == 2 or outputs[0].dim() == 4 else tensors[:2]
            options: dict[str, Any] = {"retain_graph": True}
            cotangents = [inputs(tuple(out.shape), out.dtype, seed=60) for out in outputs]
            found = torch.autograd.grad(outputs, sources, cotangents, **options)
            torch.testing.assert_close(found, torch.autograd.grad(others, sources, cotangents, **options), **CLOSE)


@pytest.mark.parametrize("backend", ["reference", *SOLVERS])
def test_what_sees_nothing_is_zero_and_passes_nothing_on(backend: str):
    bias = torch.zeros(2, 1, 1, 5, dtype=torch.float64)
    bias[0] = -torch.inf
    q, k, v = drawn((2, 7, 2, 4), (2, 5, 2, 4), (2, 5, 2, 4), gradients=True)
    bias.requires_grad_()
    with dispatch.backend(backend):
        # of a causal query beside no key, and of one from which all keys are hidden
        for o, lse in (attention(q, k, v), attention(q, k, v, causal=False, bias=bias)):
            blind = lse == -torch.inf
            assert blind.any()
            assert not blind.all()
            assert (o[blind] == 0).all()
            # merging two parts of which neither has a key has no derivative
            merged = torch.logaddexp(lse, lse)
            grads = torch.autograd.grad(o.sum() + merged.sum(), [q, k, v, bias], allow_unused=True)
            assert all(grad is None or grad.isfinite().all() for grad in grads)
            assert grads[0] is not None
            assert (grads[0][blind] == 0).all()


@pytest.mark.parametrize("backend", SOLVERS)
@pytest.mark.parametrize("causal", [False, True])
def test_what_sees_nothing_passes_not_even_nan_on(backend: str, causal: bool):
    q, k, v = drawn((2, 7, 2, 4), (2, 5, 2, 4), (2, 5, 2, 4), gradients=True)
    bias = torch.zeros(2, 1, 1, 5, dtype=torch.float64)
    bias[0] = -torch.inf
    with dispatch.backend(backend):
        outputs = attention(q, k, v, causal=causal, bias=bias)
        blind = outputs[1] == -torch.inf
        zeros, broken = (
            [torch.ones_like(x).masked_fill(blind.view(*blind.shape, *[1] * (x.dim() - 3)), value) for x in outputs]
            for value in (0.0, torch.nan)
        )
        expected = torch.autograd.grad(outputs, [q, k, v], zeros, retain_graph=True)
        actual = torch.autograd.grad(outputs, [q, k, v], broken)
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", SOLVERS)
def test_a_bias_is_not_rounded_to_half_precision(backend: str, dtype: torch.dtype):
    # far from zero neighbours of bfloat16 are 0.5 apart, which is much between two scores
    (bias,) = drawn((2, 4, 9, 14), dtype=torch.float32)
    case = attention_case(dtype, (2, 9), keys=14, causal=False)
    case = replace(case, tensors=case.tensors | {"bias": 30 * bias})
    worst = compare(case, backend)
    assert max(worst.values()) <= 1, worst
    q, k, v = (case.tensors[name] for name in ("q", "k", "v"))
    assert q is not None
    assert k is not None
    assert v is not None
    with dispatch.backend(backend):
        # beyond float16's range
        o, lse = attention(q, k, v, causal=False, bias=bias + 1e5)
        expected, lse_expected = attention(q, k, v, causal=False, bias=bias + 1e5 - 1e5)
    torch.testing.assert_close(o, expected, rtol=0.0, atol=4 * torch.finfo(dtype).eps)
    torch.testing.assert_close(lse - 1e5, lse_expected, rtol=0.0, atol=0.02)


# -- tiles --


TILED = (
    {},
    {"causal": False, "value": 5},
    {"window": 11, "sinks": True},
    {"window": 3, "causal": False, "groups": 1},
    {"keys": 90, "logit_cap": 1.0},
    {"keys": 40, "window": 20},
    {"bias": (True, False, False), "causal": False, "value": 5},
    {"bias": (False, True, True), "logit_cap": 1.0},
    {"lengths": LENGTHS, "lengths_k": LENGTHS_K, "window": 13},
)


@pytest.mark.parametrize("options", TILED, ids=str)
def test_tiles_of_any_size_give_the_same(options: dict, monkeypatch: pytest.MonkeyPatch):
    for queries, keys, elements in ((1, 3, 1), (16, 16, 600), (7, 1, 10**6)):
        for name, value in (("QUERIES", queries), ("KEYS", keys), ("TILES_CPU", elements)):
            monkeypatch.setattr(chunked, name, value)
        worst = compare(attention_case(torch.float64, **options), "chunked")
        assert max(worst.values()) <= 1, worst


def elements_of_tiles(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    counts, scores = [], chunked.Tiles.scores

    def counted(*arguments):
        found = scores(*arguments)
        counts.append(found[0].numel())
        return found

    monkeypatch.setattr(chunked.Tiles, "scores", counted)
    return counts


@pytest.mark.parametrize("backward", [False, True])
def test_only_tiles_that_are_seen_are_visited(backward: bool, monkeypatch: pytest.MonkeyPatch):
    counts = elements_of_tiles(monkeypatch)
    q, k, v = drawn((1, 2048, 1, 4), (1, 2048, 1, 4), (1, 2048, 1, 4), gradients=backward)
    passes = 2 if backward else 1
    with dispatch.backend("chunked"):
        for options, most in (
            ({"window": 64}, 2048 * (64 + 32)),
            ({"window": 64, "causal": False}, 2048 * (128 + 32)),
            ({}, 2048 * (1024 + 128)),
            ({"cu_seqlens": boundaries([128] * 16)}, 2048 * 128),
            # keys without queries
            ({"cu_seqlens": boundaries([0, 2048, 0]), "cu_seqlens_k": boundaries([1000, 48, 1000])}, 2048 * 48),
        ):
            counts.clear()
            o, lse = attention(q, k, v, **options)
            if backward:
                (o.sum() + lse.nan_to_num(neginf=0).sum()).backward()
            assert 0 < sum(counts) <= passes * most, options


@pytest.mark.parametrize("options", [{}, {"causal": False, "window": 5}, {"logit_cap": 1.0}], ids=str)
@pytest.mark.parametrize("backend", SOLVERS)
@pytest.mark.parametrize("at", [1, 130, 290])
def test_later_tokens_leave_every_bit_before_them(options, backend, at):
    q, k, v = drawn((2, 300, 4, 8), (2, 300, 2, 8), (2, 300, 2, 8), dtype=torch.float32)
    changed = [x.clone() for x in (q, k, v)]
    for x in changed:
        x[:, at:] = 3.0
    window = options.get("window", 1)
    with dispatch.backend(backend):
        before, after = attention(q, k, v, **options), attention(*changed, **options)
    upto = at if options.get("causal", True) else max(0, at - window + 1)
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one[:, :upto], other[:, :upto])
        assert not torch.equal(one, other)


@pytest.mark.parametrize("options", [*TILED, {"groups": 1}, {"shape": (2, 1), "keys": 300, "causal": False}], ids=str)
def test_threads_and_repetition_keep_every_bit(options: dict):
    torch.use_deterministic_algorithms(False)
    case = attention_case(torch.float32, **{"shape": (2, 300), **options})
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        first, second = case.run("cpu"), case.run("cpu")
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(first[name], second[name]) for name in first)


# -- packed sequences --


PACKED = (
    {},
    {"causal": False},
    {"window": 3, "sinks": True},
    {"value": 5, "logit_cap": 1.0},
    {"lengths_k": LENGTHS_K},
    {"lengths_k": LENGTHS_K, "causal": False, "window": 4},
)


def sequences(case: AttentionCase):
    """Slices of queries and keys, and the case of every sequence alone."""
    assert case.lengths is not None
    bounds, bounds_k = (
        itertools.pairwise(boundaries(lengths).tolist()) for lengths in (case.lengths, case.lengths_k or case.lengths)
    )
    for (start, end), (start_k, end_k) in zip(bounds, bounds_k, strict=True):
        cut = {"q": slice(start, end), "k": slice(start_k, end_k), "v": slice(start_k, end_k)}
        tensors = {n: x if x is None or n not in cut else x[:, cut[n]] for n, x in case.tensors.items()}
        yield cut, replace(case, tensors=tensors, lengths=None, lengths_k=None)


@pytest.mark.parametrize("options", PACKED, ids=str)
@pytest.mark.parametrize("backend", SOLVERS)
def test_packed_is_what_separate_sequences_give(options: dict, backend: str):
    case = attention_case(torch.float64, lengths=LENGTHS, **options)
    with dispatch.backend(backend):
        together = case.call()
        for cut, one in sequences(case):
            torch.testing.assert_close(tuple(x[:, cut["q"]] for x in together), one.call(), **CLOSE)


@pytest.mark.parametrize("options", PACKED, ids=str)
@pytest.mark.parametrize("backend", [*SOLVERS, "gpu"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_nothing_crosses_a_boundary(options, backend, poison, device):
    if dispatch.obstacle(backend, device, False) is not None:
        pytest.skip("cannot run here; test_parity asserts its error")
    # two of equal lengths, which are computed together
    lengths = (0, 5, 70, 5, 1, 0)
    if "lengths_k" in options:
        options = options | {"lengths_k": (3, 5, 80, 5, 0, 9)}
    case = attention_case(torch.float32, lengths=lengths, **options).to(device)
    cuts = [cut for cut, _ in sequences(case)]
    for poisoned, names in itertools.product((2, 3), (("q",), ("k", "v"))):
        tensors = {name: None if x is None else x.clone() for name, x in case.tensors.items()}
        for name in names:
            x = tensors[name]
            assert x is not None
            x[:, cuts[poisoned][name]] = poison
        with dispatch.backend(backend), torch.no_grad():
            expected, actual = case.call(), case.call(tensors)
        rows = torch.ones(sum(lengths), dtype=torch.bool)
        rows[cuts[poisoned]["q"]] = False
        assert all(torch.equal(one[:, rows], other[:, rows]) for one, other in zip(expected, actual, strict=True))
        if backend == "gpu" and device.type == "cpu":
            continue  # PyTorch has no gradients of Flex there
        leaves = {name: x.requires_grad_() for name, x in tensors.items() if x is not None}
        with dispatch.backend(backend):
            o, lse, _ = case.call(tensors | leaves)
            grads = torch.autograd.grad(o[:, rows].sum() + lse[:, rows].sum(), list(leaves.values()))
        for name, grad in zip(leaves, grads, strict=True):
            if name == "sinks":
                continue  # a sum over all sequences
            kept = torch.ones(grad.shape[1], dtype=torch.bool)
            kept[cuts[poisoned][name]] = False
            assert grad[:, kept].isfinite().all(), (name, poisoned)


@pytest.mark.parametrize("backend", SOLVERS)
def test_many_documents_are_a_few_batches(backend: str, monkeypatch: pytest.MonkeyPatch):
    calls = []
    for module, name in ((chunked, "attend_in_tiles"), (cpu, "attend")):
        attend = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given, attend=attend: calls.append(len(given[0])) or attend(*given))
    monkeypatch.setattr(cpu, "forward", lambda *given: chunked.forward(*given, attend=cpu.attend))
    lengths = [7, 3] * 200 + [0] * 5 + [11] * 100
    q, k, v = drawn(*[(1, sum(lengths), 2, 4)] * 3)
    with dispatch.backend(backend):
        o, _ = attention(q, k, v, cu_seqlens=boundaries(lengths))
        assert sorted(calls) == [100, 200, 200]
        # behind all queries keys that nobody reads
        calls.clear()
        more = torch.cat((k, k.new_full((1, 10**4, 2, 4), torch.nan)), 1)
        bounds = boundaries([*lengths, 0]), boundaries([*lengths, 10**4])
        again, _ = attention(q, more, more, cu_seqlens=bounds[0], cu_seqlens_k=bounds[1])
        assert sorted(calls) == [100, 200, 200]
    assert again.isfinite().all()
    assert o.isfinite().all()


def test_neighbours_of_equal_lengths_are_not_copied():
    for lengths, views in (([4, 4, 4], [True]), ([4, 2, 4], [False, True]), ([4, 0, 4, 3, 3], [True, True])):
        bounds = boundaries(lengths)
        (x,) = drawn((1, sum(lengths), 2, 3))
        found = [queries for queries, _ in chunked.stacks(bounds, None, sum(lengths), sum(lengths))]
        assert [one.take(x).untyped_storage().data_ptr() == x.untyped_storage().data_ptr() for one in found] == views


# -- caches --


@pytest.mark.parametrize(
    ("total", "heads", "options"),
    [
        (1, 4, {}),
        (1, 8, {}),
        (1, 4, {"window": 100}),
        (1, 4, {"causal": False, "bias": torch.zeros(2, 1, 1, 300)}),
        (1, 8, {"sinks": torch.zeros(8)}),
        (5, 4, {}),
    ],
)
def test_a_cache_is_read_where_it_lies(total, heads, options, monkeypatch: pytest.MonkeyPatch):
    cache = drawn((2, 400, 4, 8), (2, 400, 4, 8), dtype=torch.float32)
    (q,) = drawn((2, total, heads, 8), dtype=torch.float32)
    k, v = (x[:, :300] for x in cache)
    with dispatch.backend("chunked"):
        expected = attention(q, k, v, **options)
    read, kernel = [], cpu._flash

    def spy(q: Tensor, *columns: Any, **given: Any):
        read.extend((one.untyped_storage().data_ptr(), one.stride(0)) for one in columns[:2])
        return kernel(q, *columns, **given)

    monkeypatch.setattr(cpu, "_flash", spy)
    torch.testing.assert_close(attention(q, k, v, **options), expected)
    where = [(x.untyped_storage().data_ptr(), x.stride(0)) for x in cache]
    assert read
    assert read == where * (len(read) // 2)


@pytest.mark.parametrize("form", [{}, {"keys": 90}, {"keys": 50}, {"causal": False}, {"sinks": True}], ids=str)
def test_pytorch_s_kernel_goes_backwards_where_lse_is_not_used(form, monkeypatch: pytest.MonkeyPatch):
    calls: list[str] = []

    def counted(name: str, function: Callable) -> Callable:
        return lambda *given, **options: calls.append(name) or function(*given, **options)

    for name in ("_flash_backward", "differentiate_in_tiles"):
        monkeypatch.setattr(cpu, name, counted(name, getattr(cpu, name)))
    case = attention_case(torch.float32, **form)
    leaves = {name: None if x is None else x.clone().requires_grad_() for name, x in case.tensors.items()}
    with dispatch.backend("cpu"):
        o, lse, _ = case.call(leaves)
        o.sum().backward(retain_graph=True)
        assert set(calls) == {"_flash_backward"}
        calls.clear()
        lse.sum().backward()
        assert set(calls) == {"differentiate_in_tiles"}


# -- derivatives and compilers --


@pytest.mark.parametrize("backend", SOLVERS)
@pytest.mark.parametrize(
    "options",
    [
        {"sinks": True},
        {"shape": (2, 3), "causal": False, "value": 1, "bias": (False, True, True)},
        {"keys": 6, "logit_cap": 0.5, "window": 3},
        {"lengths": (2, 0, 3), "lengths_k": (3, 1, 3), "sinks": True},
    ],
    ids=str,
)
def test_gradcheck(backend: str, options: dict):
    case = attention_case(torch.float64, **{"shape": (1, 4), "heads": 2, "groups": 1, "key": 2, **options})
    present = {name: x.clone().requires_grad_() for name, x in case.tensors.items() if x is not None}

    def call(*values):
        return case.call({**case.tensors, **dict(zip(present, values, strict=True))})[:2]

    with dispatch.backend(backend):
        assert torch.autograd.gradcheck(call, list(present.values()))


def test_second_derivatives_raise_and_the_reference_has_them():
    case = attention_case(torch.float64, (1, 4))
    q = case.tensors["q"]
    assert q is not None

    def penalty(result: int):
        source = q.clone().requires_grad_()
        (first,) = torch.autograd.grad(case.call(case.tensors | {"q": source})[result].sum(), source, create_graph=True)
        return torch.autograd.grad(first.square().sum(), source)[0]

    for backend, result in itertools.product(("reference", *SOLVERS), (0, 1)):
        with dispatch.backend(backend):
            if backend == "reference":
                assert penalty(result).abs().max() > 0
                continue
            with pytest.raises(RuntimeError, match=r'second derivatives run inside seqzoo.ops.backend\("reference"\)'):
                penalty(result)
            with pytest.raises(RuntimeError, match=r"for the transforms of torch.func run inside"):
                torch.func.vmap(lambda x: case.call(case.tensors | {"q": x})[0])(q[None])


@pytest.mark.parametrize("backend", SOLVERS)
def test_it_compiles_once_for_all_lengths(backend: str):
    torch._dynamo.reset()

    def call(q, k, v, sinks, packing):
        o, lse = attention(q, k, v, sinks=sinks, window=5, cu_seqlens=packing)
        return 2 * o, lse

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    # of 13 tokens and 9 boundaries: Dynamo takes what is equal in the first call for the same
    first = (3, 0, 6, 1, 0, 2, 1, 0)
    for packed in (False, True):
        for number, lengths in enumerate((first, (2, 9, 1, 1), (7,))):
            total = sum(lengths)
            rows = 1 if packed else 3
            tensors = drawn((rows, total, 4, 8), (rows, total, 2, 8), (rows, total, 2, 6), (4,), gradients=True)
            packing = Packing.from_lengths(lengths) if packed else None
            with dispatch.backend(backend), torch._dynamo.config.patch(error_on_recompile=number > 0):
                actual = compiled(*tensors, packing)
                expected = call(*tensors, packing)
            torch.testing.assert_close(actual, expected, **CLOSE)
            torch.testing.assert_close(gradients_of(actual, tensors), gradients_of(expected, tensors), **CLOSE)


def test_one_tensor_in_two_places_compiles():
    torch._dynamo.reset()
    (x,) = drawn((1, 6, 2, 4), gradients=True)
    compiled = torch.compile(lambda x: attention(x, x, x), fullgraph=True, backend="aot_eager")
    actual, expected = compiled(x), attention(x, x, x)
    torch.testing.assert_close(actual, expected, **CLOSE)
    torch.testing.assert_close(gradients_of(actual, [x]), gradients_of(expected, [x]), **CLOSE)


def test_export_with_dynamic_shapes():
    class Attend(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            return attention(q, k, v, logit_cap=2.0)

    batch, total, total_k = (torch.export.Dim(name) for name in ("B", "T", "T_k"))
    shapes = ({0: batch, 1: total}, {0: batch, 1: total_k}, {0: batch, 1: total_k})
    program = torch.export.export(
        Attend(), tuple(drawn((2, 9, 4, 8), (2, 11, 2, 8), (2, 11, 2, 8))), dynamic_shapes=shapes
    )
    others = drawn((3, 5, 4, 8), (3, 20, 2, 8), (3, 20, 2, 8))
    torch.testing.assert_close(program.module()(*others), Attend()(*others))


@pytest.mark.parametrize("options", [{}, {"window": 3}, {"logit_cap": 2.0, "sinks": True}], ids=str)
def test_an_exported_program_runs_where_autograd_records(options: dict):
    class Attend(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(()))
            self.sinks = torch.nn.Parameter(torch.zeros(4)) if options.get("sinks") else None

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            return attention(self.weight * q, k, v, **{**options, "sinks": self.sinks})

    given = drawn((2, 9, 4, 8), (2, 9, 2, 8), (2, 9, 2, 8), dtype=torch.float32)
    module = Attend()
    program = torch.export.export(module, tuple(given))
    torch.testing.assert_close(program.module()(*given), module(*given))


# -- Flex --


FLEXIBLE = [
    case
    for case in attention_cases(torch.float32)
    if case.tensors["q"].numel() and case.tensors["k"].numel()  # pyright: ignore - both are there
]


@pytest.fixture
def flex_on_the_cpu(device: torch.device, monkeypatch: pytest.MonkeyPatch):
    """Lets Flex differentiate CPU tensors, which its plain implementation can and its checks refuse."""
    if dispatch.obstacle("gpu", device, False) is not None:
        pytest.skip("cannot run here; test_parity asserts its error")
    if device.type == "cpu":
        monkeypatch.setattr(flex_module, "_validate_device", lambda *tensors: None)
        monkeypatch.setattr(gpu, "takes", lambda q, k, v, bias, record: True)


@pytest.mark.parametrize("case", FLEXIBLE[:: len(FLEXIBLE) // 12], ids=lambda case: case.label)
def test_flex_agrees(case: AttentionCase, device: torch.device):
    if dispatch.obstacle("gpu", device, False) is not None:
        pytest.skip("cannot run here; test_parity asserts its error")
    case = case.to(device)
    with torch.no_grad():
        with dispatch.backend("gpu"):
            actual = case.call()
        with dispatch.backend("reference"):
            expected = case.call()
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"shape": (2, 20), "sinks": True},
        {"shape": (2, 20), "keys": 14, "window": 6, "logit_cap": 1.0},
        {"lengths": (0, 5, 3, 0, 9), "lengths_k": (3, 7, 2, 0, 9), "sinks": True, "groups": 1},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo looks at it
def test_flex_differentiates_both_results(options: dict, device: torch.device, flex_on_the_cpu):
    case = attention_case(torch.float32, **options).to(device)
    actual, expected = case.run("gpu"), case.to("cpu").widened().run("reference")
    for name, value in expected.items():
        torch.testing.assert_close(widen(actual[name]).cpu(), widen(value), rtol=1e-4, atol=1e-5, msg=name)
