"""Each kind of bad input to an op is an error that names the value and what was expected."""

from __future__ import annotations

import pytest
import torch

from seqzoo import ops
from seqzoo.kernels import dispatch
from seqzoo.ops import cauchy, causal_conv, gated_scan, linear_scan, long_conv, selective_scan, vandermonde
from seqzoo.packing import Packing

B = torch.zeros(2, 5, 3)
A = torch.zeros(2, 5, 3)
W = torch.zeros(3, 4)
# of a selective scan: N = 2
RATES, READ = -torch.ones(3, 2), torch.zeros(2, 5, 2)
EXPONENTS, WEIGHTS = torch.zeros(3, 2, dtype=torch.complex128), torch.zeros(3, 2, dtype=torch.complex64)
# of Cauchy sums: D = 3, M = 2, N = 4
SUMS, POLES = torch.ones(3, 2, 4, dtype=torch.complex64), -torch.ones(3, 4, dtype=torch.complex128)


def selective(**changes):
    given = {"u": B, "delta": A, "A": RATES, "B": READ, "C": READ}
    return selective_scan(**(given | changes))


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: linear_scan([1.0], B), TypeError, r"a must be a Tensor, got list"),
        (lambda: linear_scan(A, B.long()), TypeError, r"b must be one of .*, got int64"),
        (lambda: linear_scan(A.double(), B), TypeError, r"a must be float32 beside b of float32, got float64"),
        (lambda: linear_scan(A, B.to(torch.complex64)), TypeError, r"a must be complex64 .* got float32"),
        (lambda: linear_scan(A.bfloat16(), B.half()), TypeError, r"a must be float16 or float32 .* got bfloat16"),
        (lambda: linear_scan(A, B[0]), ValueError, r"b must have 3 dimensions, \(B, T, D\), got 2"),
        (lambda: linear_scan(A[:, :4], B), ValueError, r"a must have shape .*\(2, 5, 3\) or \(3,\), got \(2, 4, 3\)"),
        (lambda: linear_scan(A, B, torch.zeros(3, 3)), ValueError, r"initial_state must have shape .*got \(3, 3\)"),
        (lambda: linear_scan(A, B, torch.zeros(2, 3).double()), TypeError, r"initial_state must be float32"),
        (lambda: linear_scan(A.to("meta"), B), ValueError, r"a is on meta, b on cpu"),
        (lambda: linear_scan(A, B, cu_seqlens=ints(0, 5)), ValueError, r"batch of 1, got a batch of 2"),
        (
            lambda: linear_scan(A[:1], B[:1], cu_seqlens=ints(0, 4)),
            ValueError,
            r"end at the number of tokens, 5, got 4",
        ),
        (lambda: linear_scan(A[:1], B[:1], cu_seqlens=ints(1, 5)), ValueError, r"start at 0, got 1"),
        (lambda: linear_scan(A[:1], B[:1], cu_seqlens=ints(0, 4, 3, 5)), ValueError, r"not descend, got 4 then 3"),
        (lambda: linear_scan(A[:1], B[:1], cu_seqlens=ints(0)), ValueError, r"at least 2 entries"),
        (lambda: linear_scan(A[:1], B[:1], cu_seqlens=ints(0, 5).long()), TypeError, r"must be int32, got torch.int64"),
        (lambda: linear_scan(A[:1], B[:1], cu_seqlens=[0, 5]), TypeError, r"Tensor or a Packing, got list"),
        (
            lambda: linear_scan(A[:1], B[:1], cu_seqlens=Packing.from_lengths([4])),
            ValueError,
            r"describes 4 tokens, the sequence has 5",
        ),
        (
            lambda: linear_scan(A[:1], B[:1], torch.zeros(1, 3), cu_seqlens=ints(0, 2, 5)),
            ValueError,
            r"initial_state must have shape \(S, D\)",
        ),
        (lambda: linear_scan(A, B, reset=True), TypeError, r"reset"),
        (lambda: gated_scan(B, cell="gru"), ValueError, r"cell must be one of min_gru, min_lstm, got 'gru'"),
        (lambda: gated_scan(B, cell="min_gru"), ValueError, r"2 projections side by side, got 3 channels"),
        (
            lambda: gated_scan(B[..., :2], cell="min_gru", gate_range=(1, 0)),
            ValueError,
            r"-1 <= lo < hi <= 1, got \(1, 0\)",
        ),
        (lambda: gated_scan(B.to(torch.complex64), cell="min_lstm"), TypeError, r"x must be one of .*complex64"),
        (lambda: causal_conv(B.long(), W), TypeError, r"x must be one of .*, got int64"),
        (lambda: causal_conv(B[0], W), ValueError, r"x must have 3 dimensions, \(B, T, D\), got 2"),
        (
            lambda: causal_conv(B.half(), W.bfloat16()),
            TypeError,
            r"weight must be float16 or float32 beside x of float16",
        ),
        (lambda: causal_conv(B, W[None]), ValueError, r"weight must have 2 dimensions, \(D, W\), got 3"),
        (lambda: causal_conv(B, W[:, :1]), ValueError, r"weight must have from 2 to 8 taps, got 1 in \(3, 1\)"),
        (lambda: causal_conv(B, torch.zeros(3, 9)), ValueError, r"weight must have from 2 to 8 taps, got 9"),
        (lambda: causal_conv(B, W[:2]), ValueError, r"weight must have shape \(D, W\) = \(3, 4\), got \(2, 4\)"),
        (lambda: causal_conv(B, W.to("meta")), ValueError, r"weight is on meta, x on cpu"),
        (lambda: causal_conv(B, W, torch.zeros(4)), ValueError, r"bias must have shape \(D,\) = \(3,\), got \(4,\)"),
        (lambda: causal_conv(B, W, torch.zeros(3).double()), TypeError, r"bias must be float32 beside x of float32"),
        (
            lambda: causal_conv(B, W, activation="gelu"),
            ValueError,
            r"activation must be one of None, 'silu', got 'gelu'",
        ),
        (
            lambda: causal_conv(B, W, initial_state=torch.zeros(2, 4, 3)),
            ValueError,
            r"initial_state must have shape \(B, W - 1, D\) = \(2, 3, 3\), got \(2, 4, 3\)",
        ),
        (
            lambda: causal_conv(B.half(), W, initial_state=torch.zeros(2, 3, 3)),
            TypeError,
            r"initial_state must be float16 beside x, got float32",
        ),
        (
            lambda: causal_conv(B[:1], W, initial_state=torch.zeros(1, 3, 3), cu_seqlens=ints(0, 2, 5)),
            ValueError,
            r"initial_state must have shape \(S, W - 1, D\) = \(2, 3, 3\)",
        ),
        (lambda: long_conv(B.long(), W), TypeError, r"u must be one of .*, got int64"),
        (lambda: long_conv(B.to(torch.complex64), W), TypeError, r"u must be one of .*, got complex64"),
        (lambda: long_conv(B[0], W), ValueError, r"u must have 3 dimensions, \(B, T, D\), got 2"),
        (lambda: long_conv(B, [1.0]), TypeError, r"kernel must be a Tensor, got list"),
        (lambda: long_conv(B, W[None]), ValueError, r"kernel must have 2 dimensions, \(D, L\), got 3"),
        (lambda: long_conv(B, W[:2]), ValueError, r"kernel must have shape \(D, L\) = \(3, 4\), got \(2, 4\)"),
        (lambda: long_conv(B, W.double()), TypeError, r"kernel must be float32 beside u of float32, got float64"),
        (lambda: long_conv(B.half(), W.bfloat16()), TypeError, r"kernel must be float16 or float32 .* got bfloat16"),
        (lambda: long_conv(B, W.to(torch.complex64)), TypeError, r"kernel must be float32 .* got complex64"),
        (lambda: long_conv(B, W.to("meta")), ValueError, r"kernel is on meta, u on cpu"),
        (
            lambda: long_conv(B, W, kernel_reverse=W.t()),
            ValueError,
            r"kernel_reverse must have shape \(D, L\) = \(3, 3\), got \(4, 3\)",
        ),
        (
            lambda: long_conv(B, W, kernel_reverse=W.to(torch.complex64)),
            TypeError,
            r"kernel_reverse must be float32 beside u of float32, got complex64",
        ),
        (lambda: long_conv(B, W, kernel_reverse=W.to("meta")), ValueError, r"kernel_reverse is on meta, u on cpu"),
        (lambda: long_conv(B, W, cu_seqlens=ints(0, 5)), TypeError, r"cu_seqlens"),
        (lambda: cauchy(SUMS.real, POLES, 8), TypeError, r"weights must be one of complex128, complex64, got float32"),
        (lambda: cauchy([1j], POLES, 8), TypeError, r"weights must be a Tensor, got list"),
        (lambda: cauchy(SUMS[0], POLES, 8), ValueError, r"weights must have 3 dimensions, \(D, M, N\), got 2"),
        (lambda: cauchy(SUMS, POLES.real, 8), TypeError, r"poles must be one of .*, got float64"),
        (lambda: cauchy(SUMS, POLES[0], 8), ValueError, r"poles must have shape \(D, N\) = \(3, 4\), got \(4,\)"),
        (lambda: cauchy(SUMS, POLES[:, :3], 8), ValueError, r"poles must have shape .*= \(3, 4\), got \(3, 3\)"),
        (lambda: cauchy(SUMS, POLES.to("meta"), 8), ValueError, r"poles is on meta, weights on cpu"),
        (lambda: cauchy(SUMS, POLES, 0), ValueError, r"length must be at least 1, got 0"),
        (lambda: cauchy(SUMS, POLES, 8.0), TypeError, r"length must be an int, got float"),
        (lambda: cauchy(SUMS, POLES, True), TypeError, r"length must be an int, got bool"),
        (lambda: selective(u=B[0]), ValueError, r"u must have 3 dimensions, \(B, T, D\), got 2"),
        (lambda: selective(delta=A.double()), TypeError, r"delta must be float32 beside u of float32, got float64"),
        (lambda: selective(delta=A[..., :2]), ValueError, r"delta must have shape \(B, T, D\) = \(2, 5, 3\), got"),
        (lambda: selective(A=None), ValueError, r"A must be given for the transition 'exponential'"),
        (lambda: selective(transition="longhorn"), ValueError, r"A must be None for the transition 'longhorn'"),
        (lambda: selective(transition="zoh"), ValueError, r"one of exponential, longhorn, got 'zoh'"),
        (lambda: selective(A=RATES.long()), TypeError, r"A must be one of float32, complex64, got int64"),
        (lambda: selective(A=RATES[:, 0]), ValueError, r"A must have 2 dimensions, \(D, N\), got 1"),
        (lambda: selective(A=RATES[:2]), ValueError, r"A must have shape \(D, N\) = \(3, 2\), got \(2, 2\)"),
        (lambda: selective(A=RATES.to(torch.complex64)), TypeError, r"B must be complex64 beside a complex A"),
        (
            lambda: selective(B=READ.transpose(1, 2)),
            ValueError,
            r"B must have shape \(B, T, N\) .* = \(2, 5, 2\) or \(2, 5, 1, 2\), got \(2, 2, 5\)",
        ),
        (lambda: selective(C=READ[:, :, None]), ValueError, r"C must have shape that of B = \(2, 5, 2\)"),
        (
            lambda: selective(B=READ[:, :, None].repeat(1, 1, 2, 1), C=READ[:, :, None].repeat(1, 1, 2, 1)),
            ValueError,
            r"the groups of B must divide the 3 channels of u, got 2",
        ),
        (lambda: selective(D=torch.zeros(1)), ValueError, r"D must have shape \(D,\) = \(3,\), got \(1,\)"),
        (lambda: selective(z=B.bfloat16()), TypeError, r"z must be float32 beside u, got bfloat16"),
        (lambda: selective(delta_bias=torch.zeros(2)), ValueError, r"delta_bias must have shape \(D,\)"),
        (lambda: selective(z=B.to("meta")), ValueError, r"z is on meta, u on cpu"),
        (
            lambda: selective_scan(
                B[:1], A[:1], RATES, READ[:1], READ[:1], initial_state=torch.zeros(1, 3, 2), cu_seqlens=ints(0, 2, 5)
            ),
            ValueError,
            r"initial_state must have shape \(S, D, N\) = \(2, 3, 2\), got \(1, 3, 2\)",
        ),
        (lambda: vandermonde(RATES, WEIGHTS, 4), TypeError, r"exponents must be one of complex128, .*, got float32"),
        (lambda: vandermonde(EXPONENTS, RATES, 4), TypeError, r"weights must be one of complex128, .*, got float32"),
        (
            lambda: vandermonde(EXPONENTS[0], WEIGHTS, 4),
            ValueError,
            r"exponents must have 2 dimensions, \(D, N\), got 1",
        ),
        (
            lambda: vandermonde(EXPONENTS, WEIGHTS[:2], 4),
            ValueError,
            r"weights must have shape \(D, N\) = \(3, 2\), got \(2, 2\)",
        ),
        (lambda: vandermonde(EXPONENTS, WEIGHTS.to("meta"), 4), ValueError, r"weights is on meta, exponents on cpu"),
        (lambda: vandermonde(EXPONENTS, WEIGHTS, -1), ValueError, r"length must not be negative, got -1"),
        (lambda: vandermonde(EXPONENTS, WEIGHTS, 4.0), TypeError, r"length must be an int, got float"),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()


# on a GPU the check is an assertion on the device
@pytest.mark.parametrize("backend", ["reference", "chunked", "cpu"])
def test_broken_boundaries_never_index(backend: str):
    for call in (
        lambda: linear_scan(A[:1], B[:1], cu_seqlens=ints(0, 500)),
        lambda: causal_conv(B[:1], W, cu_seqlens=ints(0, 500)),
        lambda: selective_scan(B[:1], A[:1], RATES, READ[:1], READ[:1], cu_seqlens=ints(0, 500)),
    ):
        with dispatch.backend(backend), pytest.raises(ValueError, match="end at the number of tokens"):
            call()


def test_broken_boundaries_never_index_when_compiled():
    compiled = torch.compile(lambda a, b, c: linear_scan(a, b, cu_seqlens=c)[0], fullgraph=True, backend="aot_eager")
    assert compiled(A[:1], B[:1], ints(0, 5)).shape == (1, 5, 3)
    with pytest.raises(ValueError, match="end at the number of tokens"):
        compiled(A[:1], B[:1], ints(0, 500))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"length": 3.0}, TypeError, "length must be an int, got float"),
        ({"length": True}, TypeError, "length must be an int, got bool"),
        ({"length": -1}, ValueError, "length must not be negative, got -1"),
        ({"poles": torch.ones(3, 2)}, TypeError, "poles must be one of complex128, complex64, got float32"),
        ({"b": torch.ones(3, 1, dtype=torch.complex64)}, ValueError, r"b must have shape \(D, N\) = \(3, 2\)"),
        ({"c": torch.ones(3, 2, dtype=torch.complex128)}, TypeError, "c must be complex64 beside poles"),
        ({"step": torch.ones(2)}, ValueError, r"step must have shape \(D,\) = \(3,\), got \(2,\)"),
        ({"discretisation": "euler"}, ValueError, "discretisation must be zoh or bilinear, got 'euler'"),
        ({"low_rank": 1}, ValueError, "a low rank needs discretisation='bilinear', got 'zoh'"),
        ({"low_rank": 1, "discretisation": "bilinear"}, TypeError, r"low_rank must be a pair of Tensors \(p, q\)"),
    ],
)
def test_state_spaces(changes, error, words):
    ones = torch.ones(3, 2, dtype=torch.complex64)
    arguments = {"poles": -ones, "b": ones, "c": ones, "step": torch.ones(3), "length": 4} | changes
    with pytest.raises(error, match=words):
        ops.ssm_kernel(**arguments)
    if "length" not in changes:
        del arguments["length"]
        with pytest.raises(error, match=words):
            ops.ssm_scan(torch.ones(1, 5, 3), **arguments)


def test_state_spaces_that_do_not_fit_their_input():
    ones = torch.ones(3, 2, dtype=torch.complex64)
    space = -ones, ones, ones, torch.ones(3)
    with pytest.raises(ValueError, match=r"poles must have shape \(D, N\) = \(4, 2\), got \(3, 2\)"):
        ops.ssm_scan(torch.ones(1, 5, 4), *space)
    with pytest.raises(TypeError, match="poles must be complex128 beside u of"):
        ops.ssm_scan(torch.ones(1, 5, 3).double(), *space)
    with pytest.raises(ValueError, match=r"initial_state must have shape \(B, D, N\) = \(1, 3, 2\), got \(2, 3, 2\)"):
        ops.ssm_scan(torch.ones(1, 5, 3), *space, ones.expand(2, 3, 2))
    with ops.checks():
        with pytest.raises(ValueError, match=r"step must be positive, got 0.0 at index \(0,\)"):
            ops.ssm_kernel(*space[:3], 0 * space[3], 4)
        with pytest.raises(ValueError, match=r"the real part of poles must not be positive, got 1\.0"):
            ops.ssm_kernel(ones, *space[1:], 4)


QUERY, KEY, VALUE = torch.zeros(1, 5, 4, 8), torch.zeros(1, 7, 2, 8), torch.zeros(1, 7, 2, 6)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"q": [1.0]}, TypeError, "q must be a Tensor, got list"),
        ({"q": QUERY.long()}, TypeError, "q must be one of .*, got int64"),
        ({"k": KEY.double()}, TypeError, "k must be float32 beside q, got float64"),
        ({"v": VALUE.bfloat16()}, TypeError, "v must be float32 beside q, got bfloat16"),
        ({"k": KEY.to("meta")}, ValueError, "k is on meta, q on cpu"),
        ({"q": QUERY[0]}, ValueError, r"q must have 4 dimensions, \(B, T, H, K\), got 3"),
        ({"v": VALUE[0]}, ValueError, r"v must have 4 dimensions, \(B, T_k, G, V\), got 3"),
        ({"k": KEY[..., :4]}, ValueError, r"k must have shape \(B, T_k, G, K\) = \(1, 7, 2, 8\), got \(1, 7, 2, 4\)"),
        ({"v": VALUE[:, :3]}, ValueError, r"v must have shape \(B, T_k, G, V\) = \(1, 7, 2, 6\), got \(1, 3, 2, 6\)"),
        ({"q": QUERY[:, :, :3]}, ValueError, "the heads of k must divide the 3 of q, got 2"),
        ({"k": KEY[:, :, :0], "v": VALUE[:, :, :0]}, ValueError, "the heads of k must divide the 4 of q, got 0"),
        ({"window": 0}, ValueError, "window must be a positive integer or None, got 0"),
        ({"window": 2.0}, ValueError, "window must be a positive integer or None, got 2.0"),
        ({"window": True}, ValueError, "window must be a positive integer or None, got True"),
        ({"scale": 0.0}, ValueError, "scale must be positive and finite, got 0.0"),
        ({"logit_cap": float("inf")}, ValueError, "logit_cap must be positive and finite, got inf"),
        ({"sinks": torch.zeros(2)}, ValueError, r"sinks must have shape \(H,\) = \(4,\), got \(2,\)"),
        ({"sinks": torch.zeros(4).double()}, TypeError, "sinks must be float32 beside q of float32, got float64"),
        ({"bias": torch.zeros(5, 7)}, ValueError, r"bias must have 4 dimensions, \(B, H, T, T_k\), got 2"),
        (
            {"bias": torch.zeros(1, 2, 5, 7)},
            ValueError,
            r"bias must have shape .* = \(1, 4, 5, 7\), got \(1, 2, 5, 7\)",
        ),
        (
            {"bias": torch.zeros(1, 1, 1, 5)},
            ValueError,
            r"bias must have shape .* = \(1, 1, 1, 7\), got \(1, 1, 1, 5\)",
        ),
        ({"bias": torch.zeros(1, 1, 1, 7).half()}, TypeError, "bias must be float32 beside q of float32, got float16"),
        ({"cu_seqlens": ints(0, 5)}, ValueError, "k must have the 5 tokens of q unless cu_seqlens_k says"),
        ({"cu_seqlens_k": ints(0, 7)}, ValueError, "cu_seqlens_k needs cu_seqlens"),
        (
            {"cu_seqlens": ints(0, 5), "cu_seqlens_k": ints(0, 3, 7)},
            ValueError,
            r"cu_seqlens_k must have shape that of cu_seqlens, = \(2,\), got \(3,\)",
        ),
        ({"cu_seqlens": ints(0, 4), "cu_seqlens_k": ints(0, 7)}, ValueError, "end at the number of tokens, 5, got 4"),
        ({"cu_seqlens": ints(0, 5), "cu_seqlens_k": ints(0, 900)}, ValueError, "the number of tokens, 7, got 900"),
        (
            {"cu_seqlens": ints(0, 5), "cu_seqlens_k": ints(0, 7), "bias": torch.zeros(1, 1, 1, 7)},
            ValueError,
            "bias is for dense batches",
        ),
    ],
)
@pytest.mark.parametrize("backend", [None, "reference", "chunked"])
def test_attention(changes, error, words, backend):
    arguments = {"q": QUERY, "k": KEY, "v": VALUE} | changes
    with dispatch.backend(backend), pytest.raises(error, match=words):
        ops.attention(**arguments)


def test_values_are_looked_at_only_when_asked_for():
    poisoned = B.clone()
    poisoned[1, 2, 0] = float("nan")
    assert torch.isnan(linear_scan(A, poisoned)[0]).any()
    with ops.checks(), pytest.raises(ValueError, match=r"b must be finite, got nan at index \(1, 2, 0\)"):
        linear_scan(A, poisoned)
    with ops.checks(), pytest.raises(ValueError, match="x must be finite"):
        gated_scan(poisoned[..., :2], cell="min_gru")
    with ops.checks(), pytest.raises(ValueError, match="delta must be finite"):
        selective(delta=poisoned)
    with ops.checks(), pytest.raises(ValueError, match=r"A must not be positive, got 1.0 at index \(0, 0\)"):
        selective(A=-RATES)
    with ops.checks(), pytest.raises(ValueError, match=r"u must be finite, got nan at index \(1, 2, 0\)"):
        long_conv(poisoned, W)
    selective(A=-RATES)
    with ops.checks():
        vandermonde(EXPONENTS + 1e-6, WEIGHTS, 4)
        with pytest.raises(ValueError, match=r"exponents must not be positive, got 0.1 at index \(0, 0\)"):
            vandermonde(EXPONENTS + 0.1, WEIGHTS, 4)
        with pytest.raises(ValueError, match="weights must be finite"):
            vandermonde(EXPONENTS, WEIGHTS / 0, 4)
    with ops.checks(), pytest.raises(ValueError, match=r"poles must not be positive, got 1.0 at index \(0, 0\)"):
        cauchy(SUMS, -POLES, 8)
    with ops.checks(), pytest.raises(ValueError, match="weights must be finite"):
        cauchy(SUMS / 0, POLES, 8)
    with ops.checks(), pytest.raises(ValueError, match=r"k must be finite, got inf at index \(0, 0, 0, 0\)"):
        ops.attention(QUERY, KEY + torch.inf, VALUE)
    assert torch.isnan(linear_scan(A, poisoned)[0]).any()


def test_an_implementation_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch):
    with (
        pytest.raises(ValueError, match="backend must be one of reference, chunked, cpu, gpu, got 'fast'"),
        ops.backend("fast"),
    ):
        pass
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with (
        ops.backend("gpu"),
        pytest.raises(RuntimeError, match="'gpu' was asked for and cannot run: it takes CUDA tensors"),
    ):
        linear_scan(A, B)
    assert dispatch.slot.backend is None


def test_choice_by_device():
    cpu, cuda, other = torch.device("cpu"), torch.device("cuda"), torch.device("mps")
    assert dispatch.choose(cpu, False)[0] == "cpu"
    assert dispatch.choose(cuda, False)[0] == "gpu"
    assert dispatch.choose(cuda, True)[0] == "chunked"
    assert dispatch.choose(other, False)[0] == "chunked"
