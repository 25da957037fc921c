"""What every op keeps on every implementation that can run: parity with the float64 reference, and its forms."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad

from seqzoo.kernels import dispatch
from seqzoo.packing import Packing
from seqzoo.testing import (
    OP_CASES,
    OpCase,
    backends,
    cauchy_case,
    causal_conv_case,
    compare,
    gated_scan_case,
    linear_attention_case,
    linear_scan_case,
    long_conv_case,
    selective_scan_case,
    ssm_scan_case,
    vandermonde_case,
)

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex128, torch.complex64)
WIDE = dispatch.WIDE


def parity_cases() -> list[pytest.param]:
    """Every form on every implementation; of the GPU kernels in the slow interpreter small ones and a few."""
    found = []
    for backend, op, dtype in itertools.product(("chunked", "cpu", "gpu"), OP_CASES, DTYPES):
        for case in OP_CASES[op](dtype):
            elements = sum(tensor.numel() for tensor in case.tensors.values() if tensor is not None)
            quick = elements < (5000 if dtype in (torch.float32, torch.complex64) else 2500)
            telling = dtype in (torch.float32, torch.complex64) or ("packed" in case.label and dtype == torch.bfloat16)
            fast = backend != "gpu" or (telling and quick) or torch.cuda.is_available()
            marks = [] if fast else [pytest.mark.slow]
            found.append(pytest.param(backend, case, id=f"{backend} {op} {case.label}", marks=marks))
    return found


def able(device: torch.device, dtype: torch.dtype) -> list[str]:
    return [name for name in backends(device, dtype in WIDE) if name != "reference"]


@pytest.mark.parametrize(("backend", "case"), parity_cases())
def test_parity(backend: str, case: OpCase, device: torch.device):
    dtype = next(iter(case.tensors.values())).dtype
    reason = dispatch.obstacle(backend, device, case.wide)
    if reason is not None:
        with pytest.raises(RuntimeError, match="cannot run"), dispatch.backend(backend):
            case.to(device).call()
        return
    worst = compare(case.to(device), backend)
    assert max(worst.values()) <= 1, (dtype, worst)


def with_slow(*slow: str) -> list[Any]:
    """All ops, of which some take half a minute and more."""
    return [pytest.param(op, marks=[pytest.mark.slow] if op in slow else []) for op in OP_CASES]


@pytest.mark.parametrize("op", with_slow("ssm_scan", "ssm_kernel", "cauchy"))
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_reference_passes_gradcheck(op: str, dtype: torch.dtype):
    cases = [case for case in OP_CASES[op](dtype) if 0 < case.tensors[next(iter(case.tensors))].numel() < 700]
    for case in cases:
        names = [name for name, tensor in case.tensors.items() if tensor is not None]
        # a reduced size: the numerical Jacobian costs a run an element
        if sum(case.tensors[name].numel() for name in names) > 400:
            continue
        leaves = [case.tensors[name].clone().requires_grad_() for name in names]

        def call(*values, case=case, names=names):
            with dispatch.backend("reference"):
                return case.call({**case.tensors, **dict(zip(names, values, strict=True))})

        assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize(
    "case",
    [
        linear_scan_case(torch.float64, (2, 5, 3)),
        linear_scan_case(torch.float64, (0, 0, 2), lengths=(2, 0, 3), reverse=True, time_invariant=True),
        linear_scan_case(torch.complex128, (1, 5, 2)),
        gated_scan_case(torch.float64, (2, 5, 2), gate_range=(-1, 1)),
        gated_scan_case(torch.float64, (0, 0, 2), cell="min_lstm", lengths=(2, 0, 3), reverse=True),
        causal_conv_case(torch.float64, (2, 5, 2)),
        causal_conv_case(torch.float64, (0, 0, 2), taps=5, lengths=(2, 0, 6), bias=False, activation=None),
        long_conv_case(torch.float64, (2, 5, 2), taps=3, taps_reverse=7),
        long_conv_case(torch.float64, (2, 5, 2), recompute=True),
        vandermonde_case(torch.float64, (2, 3), 11),
        cauchy_case(torch.complex128, (2, 2, 3), length=6),
        cauchy_case(torch.complex128, (2, 2, 3), length=7, conjugate_pairs=False),
    ],
    ids=lambda case: f"{case.op} {case.label}",
)
def test_gradcheck_of_the_fast_paths(case: OpCase, device: torch.device):
    case = case.to(device)
    names = [name for name, tensor in case.tensors.items() if tensor is not None]
    leaves = [case.tensors[name].clone().requires_grad_() for name in names]
    for backend in able(device, torch.float64):
        if _slow(backend, device):
            continue

        def call(*values, backend=backend):
            with dispatch.backend(backend):
                return case.call({**case.tensors, **dict(zip(names, values, strict=True))})

        assert torch.autograd.gradcheck(call, leaves)


# whose operators an op runs on, where it has no others, or some that are no op's
MADE_OF = {"ssm_kernel": ("matrix_scan", "ssm_kernel"), "ssm_scan": ("matrix_scan",)}


# how ops are registered is the same for all
@pytest.mark.parametrize("op", with_slow(*(op for op in OP_CASES if op not in ("linear_scan", "delta_rule"))))
def test_opcheck(op: str, device: torch.device):
    for case in OP_CASES[op](torch.float32):
        if case.tensors[next(iter(case.tensors))].numel() == 0:
            continue  # opcheck's own copying of arguments fails on tensors without elements
        case = case.to(device)
        for backend in able(device, torch.float32):
            if _slow(backend, device) and case.tensors[next(iter(case.tensors))].numel() > 100:
                continue
            for owner in MADE_OF.get(op, (op,)):
                with _recorded(owner) as calls, dispatch.backend(backend):
                    case.run(backend)
                for overload, arguments in calls:
                    torch.library.opcheck(overload, arguments)


def _slow(backend: str, device: torch.device) -> bool:
    return backend == "gpu" and device.type == "cpu"


class _recorded:
    """Collects the calls of an op's registered operators, which opcheck then repeats."""

    def __init__(self, op: str) -> None:
        self.op, self.calls = op, []

    def __enter__(self):
        import importlib

        self.module = importlib.import_module(f"seqzoo.kernels.{self.op}.op")
        operators = torch._ops.OpOverload
        self.kept = {name: value for name, value in vars(self.module).items() if isinstance(value, operators)}
        for name, overload in self.kept.items():

            def call(*arguments, overload=overload):
                self.calls.append((overload, tuple(_detached(value) for value in arguments)))
                return overload(*arguments)

            setattr(self.module, name, call)
        return self.calls

    def __exit__(self, *error):
        for name, overload in self.kept.items():
            setattr(self.module, name, overload)


def _detached(value):
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 140), min_size=1, max_size=6),
    width=st.integers(1, 70),
    reverse=st.booleans(),
    time_invariant=st.booleans(),
    state=st.booleans(),
    # not time-invariant in low precision: with few columns the reference's error in that sum may be small by chance
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.complex64]),
    seed=st.integers(0, 1000),
)
def test_any_shape_and_boundaries(lengths, width, reverse, time_invariant, state, dtype, seed):
    case = linear_scan_case(
        dtype,
        (0, 0, width),
        lengths=lengths,
        reverse=reverse,
        time_invariant=time_invariant and dtype in WIDE,
        state=state,
        seed=seed,
    )
    for backend in ("chunked", "cpu"):
        worst = compare(case, backend)
        assert max(worst.values()) <= 1, (backend, worst)


def packed_cases(op: str, dtype: torch.dtype, device: torch.device) -> list[OpCase]:
    return [case.to(device) for case in OP_CASES[op](dtype) if case.options.get("cu_seqlens") is not None]


# the ops that know packed sequences
PACKING = [op for op in OP_CASES if any("cu_seqlens" in case.options for case in OP_CASES[op](torch.float32))]


def per_token(name: str, tensor: torch.Tensor) -> bool:
    """Whether it is ``(B, T, ...)``; parameters have fewer dimensions."""
    return tensor.dim() >= 3 and name != "initial_state"


@pytest.mark.parametrize("op", PACKING)
def test_packed_is_what_separate_sequences_give(op: str, device: torch.device):
    for backend in able(device, torch.float32):
        dtype = torch.float32 if backend == "gpu" else torch.float64
        if device.type == "cuda" and backend == "chunked":
            dtype = torch.float64
        cases = packed_cases(op, dtype, device)
        for case in cases[:1] if _slow(backend, device) else cases:
            bounds = case.options["cu_seqlens"].tolist()
            with dispatch.backend(backend):
                y, final = case.call()
                for index, (start, end) in enumerate(itertools.pairwise(bounds)):
                    tensors = dict(case.tensors)
                    for name, value in case.tensors.items():
                        if name == "initial_state":
                            tensors[name] = None if value is None else value[index : index + 1]
                        elif value is not None and per_token(name, value):
                            tensors[name] = value[:, start:end]
                    one_y, one_final = replace(case, options=case.options | {"cu_seqlens": None}).call(tensors)
                    torch.testing.assert_close(y[:, start:end], one_y)
                    torch.testing.assert_close(final[index : index + 1], one_final)


@pytest.mark.parametrize("op", PACKING)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy's, under Triton's interpreter
def test_nothing_crosses_a_boundary(op: str, poison: float, device: torch.device):
    for backend in able(device, torch.float32):
        cases = packed_cases(op, torch.float32, device)
        for case in cases[:1] if _slow(backend, device) else cases:
            bounds = case.options["cu_seqlens"]
            index = int(bounds.diff().argmax())
            rows = torch.ones(int(bounds[-1]), dtype=torch.bool)
            rows[bounds[index] : bounds[index + 1]] = False
            sequences = [other for other in range(len(bounds) - 1) if other != index]
            present = {name: value.clone() for name, value in case.tensors.items() if value is not None}
            next(value for name, value in present.items() if per_token(name, value))[:, ~rows] = poison
            leaves = {name: value.requires_grad_() for name, value in present.items()}
            with dispatch.backend(backend):
                y, final = case.call(case.tensors | leaves)
                assert torch.isfinite(y[:, rows]).all(), (backend, case.label)
                assert torch.isfinite(final[sequences]).all(), (backend, case.label)
                grads = torch.autograd.grad(y[:, rows].sum() + final[sequences].sum().real, list(leaves.values()))
            for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
                # what all sequences share receives NaN from the poisoned one, times zero though it is
                outside = (
                    grad[:, rows] if per_token(name, leaf) else grad[sequences] if name == "initial_state" else None
                )
                assert outside is None or torch.isfinite(outside).all(), (backend, case.label, name)


@pytest.mark.parametrize("op", OP_CASES)
def test_same_bits_twice(op: str, device: torch.device):
    torch.use_deterministic_algorithms(False)
    telling = (packed_cases(op, torch.float32, device) or list(OP_CASES[op](torch.float32)))[0].label
    for case in OP_CASES[op](torch.float32):
        case = case.to(device)
        for backend in able(device, torch.float32):
            if _slow(backend, device) and case.label != telling:
                continue
            first, second = case.run(backend), case.run(backend)
            assert all(torch.equal(first[name], second[name]) for name in first), backend


def _matrix_state_case(op: str) -> Callable[..., OpCase]:
    def make(dtype: torch.dtype, shape: tuple[int, int, int], lengths: tuple[int, ...] | None = None) -> OpCase:
        return linear_attention_case(dtype, shape[:2], op=op, key=shape[2], lengths=lengths)

    return make


# a short dense or, where the op knows them, packed call of each op
SMALL: dict[str, Callable[..., OpCase]] = {
    "linear_scan": linear_scan_case,
    "gated_scan": gated_scan_case,
    "causal_conv": causal_conv_case,
    "long_conv": long_conv_case,
    "selective_scan": selective_scan_case,
    "linear_attention": _matrix_state_case("linear_attention"),
    "delta_rule": _matrix_state_case("delta_rule"),
    "vandermonde": lambda dtype, shape: vandermonde_case(dtype, shape[1:], 11),
    "ssm_scan": ssm_scan_case,
}


@pytest.mark.parametrize("op", PACKING)
@pytest.mark.parametrize("backend", ["chunked", "cpu", "gpu"])
def test_the_op_compiles_without_a_break(op: str, backend: str, device: torch.device):
    if dispatch.obstacle(backend, device, False) is not None:
        pytest.skip("cannot run here; test_parity asserts its error")
    case = SMALL[op](torch.float32, (0, 0, 6), lengths=(3, 0, 5)).to(device)

    def call(tensors, cu_seqlens):
        y, final = replace(case, options=case.options | {"cu_seqlens": cu_seqlens}).call(tensors)
        return y * 2, final

    # the function above counts as one, whichever op it calls
    torch._dynamo.reset()
    with dispatch.backend(backend):
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
        leaves = {name: value.requires_grad_() for name, value in case.tensors.items() if value is not None}
        for cu_seqlens in (case.options["cu_seqlens"], Packing.from_lengths((3, 0, 5)).to(device)):
            expected, actual = (one(case.tensors | leaves, cu_seqlens) for one in (call, compiled))
            torch.testing.assert_close(actual, expected)
            for one, other in zip(
                torch.autograd.grad(_total(actual), list(leaves.values())),
                torch.autograd.grad(_total(expected), list(leaves.values())),
                strict=True,
            ):
                torch.testing.assert_close(one, other)


def _total(outputs):
    return sum((torch.view_as_real(out) if out.is_complex() else out).sum() for out in outputs)


def _penalty(call, x, direction):
    source = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(call(source), source, create_graph=True)
    return torch.autograd.grad(first.abs().square().sum(), source, allow_unused=True)[0]


def _dual(call, x, direction):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(call(forward_ad.make_dual(x, direction))).tangent


# each asks for more than a first derivative, backwards; most of them would lose it without a word
BEYOND: dict[str, Callable[..., torch.Tensor]] = {
    "penalty": _penalty,
    "hvp": lambda call, x, direction: torch.autograd.functional.hvp(call, x, direction)[1],
    "dual": _dual,
    "func.jvp": lambda call, x, direction: torch.func.jvp(call, (x,), (direction,))[1],
    "func.grad": lambda call, x, direction: torch.func.grad(call)(x),
    "func.vmap": lambda call, x, direction: torch.func.vmap(call)(x[None]),
}


@pytest.mark.parametrize("op", SMALL)
@pytest.mark.parametrize("derivative", BEYOND)
@pytest.mark.parametrize("square", [False, True])
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # PyTorch's own, in forward mode
def test_other_derivatives_raise_on_the_fast_paths_and_the_reference_has_them(
    op: str, derivative: str, square: bool, device: torch.device
):
    case = SMALL[op](torch.float64, (1, 4, 2)).to(device)
    # others are linear in their first input, and a long convolution in each
    name = next((name for name in ("delta", "log_decay", "step") if name in case.tensors), next(iter(case.tensors)))
    x = case.tensors[name]

    def call(value):
        changed = {name: value, "kernel": value[0].t()} if op == "long_conv" else {name: value}
        y = case.call(case.tensors | changed)[0]
        # of a sum the arriving gradient is a constant
        return (y.square() if square else y).sum()

    for backend in backends(device, True):
        with dispatch.backend(backend):
            if backend == "reference":
                assert BEYOND[derivative](call, x, torch.ones_like(x)).abs().max() > 0
            else:
                with pytest.raises(RuntimeError, match=r'for .* run inside seqzoo.ops.backend\("reference"\)'):
                    BEYOND[derivative](call, x, torch.ones_like(x))


@pytest.mark.parametrize("op", SMALL)
def test_views_and_strides_do_not_matter(op: str, device: torch.device):
    case = SMALL[op](torch.float32, (2, 9, 6)).to(device)
    expected = case.run()
    # every dimension but the last swapped in memory, or twice as far apart
    strided = {
        name: value
        if value is None
        else value.transpose(0, -1).contiguous().transpose(0, -1)
        if index % 2
        else torch.stack((value, value), -1)[..., 1]
        for index, (name, value) in enumerate(case.tensors.items())
    }
    actual = replace(case, tensors=strided).run()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
