"""What tests, benchmarks and ``seqzoo doctor`` share: inputs of the ops, the oracle and the tolerance derived from it.

An op is compared with its own ``reference`` in float64 on the same inputs. What it may be off by is derived, not tuned:
twice the error that the reference makes in the op's own precision, plus one rounding of the result, plus what the op's
method costs where that is another than the reference's (an FFT's errors are as large as its largest values).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from seqzoo import ops
from seqzoo.kernels import dispatch
from seqzoo.kernels.checks import COMPLEX_OF, HALF, accumulator
from seqzoo.layers import Bidirectional
from seqzoo.mixer import Mixed, SequenceMixer, State, StateSpec, create, list_mixers, registration
from seqzoo.modules.convolution import ConvolutionMixer
from seqzoo.packing import Packing

WIDE_OF = {torch.complex64: torch.complex128, torch.complex128: torch.complex128}


def widen(tensor: Tensor) -> Tensor:
    """The same values in float64 or complex128; integers stay."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return tensor
    return tensor.detach().to(WIDE_OF.get(tensor.dtype, torch.float64))


@dataclass(frozen=True)
class OpCase:
    """One call of a public op.

    Attributes:
        op: Its name.
        label: What is peculiar to the call.
        tensors: Its differentiable tensors, by argument name.
        options: The rest of its arguments.
        allowance: From the tensors, the outputs' cotangents and the exact results to the errors that the op's method
            may make beyond those of its reference, by name of the result; none when omitted.
        groups: Arguments that are tuples, and the names in ``tensors`` of what they hold.
    """

    op: str
    label: str
    tensors: dict[str, Tensor | None]
    options: dict[str, Any]
    allowance: Callable[[dict[str, Tensor | None], list[Tensor], dict[str, Tensor]], dict[str, float]] | None = None
    groups: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def widened(self) -> OpCase:
        """The same call in float64."""
        wide = {name: None if tensor is None else widen(tensor) for name, tensor in self.tensors.items()}
        return replace(self, tensors=wide)

    @property
    def wide(self) -> bool:
        """Whether it is computed in float64."""
        return dispatch.is_wide(self.op, self.tensors)

    def to(self, device: torch.device | str) -> OpCase:
        """The same call on another device."""
        return replace(
            self,
            tensors={name: None if value is None else value.to(device) for name, value in self.tensors.items()},
            options={
                name: value.to(device) if isinstance(value, Tensor) else value for name, value in self.options.items()
            },
        )

    def call(self, tensors: dict[str, Tensor | None] | None = None) -> tuple[Tensor, ...]:
        """Calls the op; a single output counts as a tuple of one."""
        arguments: dict[str, Any] = dict(self.tensors if tensors is None else tensors)
        for name, parts in self.groups.items():
            arguments[name] = tuple(arguments.pop(part) for part in parts)
        outputs = getattr(ops, self.op)(**arguments, **self.options)
        return (outputs,) if isinstance(outputs, Tensor) else outputs

    def run(self, backend: str | None = None, seed: int = 0) -> dict[str, Tensor]:
        """Outputs and, for cotangents drawn from ``seed``, the gradients of all tensors, by name."""
        leaves = {n: None if t is None else t.detach().clone().requires_grad_() for n, t in self.tensors.items()}
        with dispatch.backend(backend):
            outputs = self.call(leaves)
            present = {name: leaf for name, leaf in leaves.items() if leaf is not None}
            reached = [(out, _cotangent(out, seed + i)) for i, out in enumerate(outputs) if out.requires_grad]
            gradients = torch.autograd.grad(
                [output for output, _ in reached],
                list(present.values()),
                [cotangent for _, cotangent in reached],
                allow_unused=True,
                materialize_grads=True,
            )
        result = {f"output {index}": output.detach() for index, output in enumerate(outputs)}
        return result | {f"gradient of {name}": value for name, value in zip(present, gradients, strict=True)}

    def allowed(self, results: dict[str, Tensor], seed: int = 0) -> dict[str, float]:
        """The allowance of a :meth:`run` with these results and this seed."""
        if self.allowance is None:
            return {}
        outputs = [value for name, value in results.items() if name.startswith("output")]
        cotangents = [_cotangent(output, seed + i) for i, output in enumerate(outputs)]
        return self.allowance(self.tensors, cotangents, results)


def _cotangent(output: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    # drawn on a coarse grid, so that every precision gets the same values
    shape = (*output.shape, 2) if output.is_complex() else output.shape
    drawn = torch.randint(-8, 9, shape, generator=generator).to(torch.float64) / 8
    return (torch.view_as_complex(drawn) if output.is_complex() else drawn).to(output.device, output.dtype)


def excess(
    actual: Tensor,
    low: Tensor | Sequence[Tensor],
    exact: Tensor,
    allowance: float = 0.0,
    precision: torch.dtype | None = None,
) -> float:
    """Error of ``actual`` over what it may be off by: above 1 it is wrong, NaN anywhere counts as infinitely wrong.

    Args:
        actual: Of the implementation under test.
        low: Of the reference in the same precision; of several (see :func:`nearby`) the greatest error counts.
        exact: Of the reference in float64, on the same inputs.
        allowance: What its method may be off by beyond that.
        precision: What it was computed in, where that is less than its own dtype.
    """
    precision = actual.dtype if precision is None else precision
    if actual.shape != exact.shape:
        return float("inf")
    if actual.numel() == 0:
        return 0.0
    exact = widen(exact)
    error = (widen(actual) - exact).abs().max().item()
    scale = exact.abs().max().item()
    if precision in dispatch.WIDE:
        budget = 1e-12 * scale  # the oracle has errors of this size itself
    else:
        lows = [low] if isinstance(low, Tensor) else low
        worst = max((widen(one) - exact).abs().max().item() for one in lows)
        budget = 2 * (worst + torch.finfo(precision).eps * scale)
    budget += allowance
    if error != error:
        return float("inf")
    return error / budget if budget > 0 else (0.0 if error == 0 else float("inf"))


def nearby(x: Tensor, seed: int) -> Tensor:
    """x with every value moved to a neighbour in its dtype, up or down.

    What a few numbers are off by is luck: where a reference has one rounding that matters, that of another order of
    summation may be several times as large. Inputs that differ by their rounding draw that luck again.
    """
    generator = torch.Generator().manual_seed(seed)
    up = torch.randint(0, 2, x.shape, generator=generator).to(x.device, torch.bool)
    return torch.nextafter(x, torch.where(up, torch.inf, -torch.inf).to(x.dtype))


def compare(case: OpCase, backend: str | None) -> dict[str, float]:
    """:func:`excess` of every output and gradient of a case on one implementation."""
    actual = case.run(backend)
    low = case.to("cpu").run("reference")
    exact = case.to("cpu").widened().run("reference")
    allowed = case.to("cpu").allowed(exact)
    # a gradient has the dtype of its tensor, which may be wider than what the op computes in
    narrow = [] if case.wide else [value.dtype for value in actual.values() if value.dtype not in dispatch.WIDE]
    return {
        name: excess(
            value.cpu(),
            low[name],
            exact[name],
            allowed.get(name, 0.0),
            narrow[0] if narrow and value.dtype in dispatch.WIDE else None,
        )
        for name, value in actual.items()
    }


def boundaries(lengths: Sequence[int]) -> Tensor:
    """``cu_seqlens`` of sequences of these lengths."""
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


# one token, empty at both ends and in the middle, the chunks' length and beyond it
LENGTHS = (0, 1, 70, 0, 3, 64, 2, 0)
# the same for whole mixers, which are slow where their GPU kernels are interpreted
FEW_LENGTHS = (0, 1, 66, 0, 3, 0)


def _uniform(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(shape, generator=generator, dtype=torch.float64)


def linear_scan_case(
    dtype: torch.dtype,
    shape: tuple[int, int, int] = (2, 67, 5),
    *,
    lengths: Sequence[int] | None = None,
    state: bool = True,
    time_invariant: bool = False,
    reverse: bool = False,
    a_dtype: torch.dtype | None = None,
    seed: int = 0,
) -> OpCase:
    """Inputs of :func:`seqzoo.ops.linear_scan`; with ``lengths`` packed, the shape's B and T are then theirs."""
    g = torch.Generator().manual_seed(seed)
    batch, total, width = shape if lengths is None else (1, sum(lengths), shape[2])
    rows = batch if lengths is None else len(lengths)
    a_shape = (width,) if time_invariant else (batch, total, width)
    a, b, h = 2 * _uniform(g, *a_shape) - 1, _uniform(g, batch, total, width) - 0.5, _uniform(g, rows, width) - 0.5
    if dtype.is_complex:
        turn = 6.283185307179586 * _uniform(g, *a_shape)
        a = torch.polar(a.abs(), turn)
        b, h = (torch.complex(value, _uniform(g, *value.shape) - 0.5) for value in (b, h))
    accumulate = torch.float32 if dtype in HALF else dtype
    words = ["packed" if lengths is not None else f"{shape}", "reverse" if reverse else "", str(dtype).split(".")[1]]
    words += ["time-invariant" if time_invariant else "", "state" if state else ""]
    tensors = {"a": a.to(a_dtype or dtype), "b": b.to(dtype), "initial_state": h.to(accumulate) if state else None}
    options = {"reverse": reverse, "cu_seqlens": None if lengths is None else boundaries(lengths)}
    return OpCase("linear_scan", " ".join(filter(None, words)), tensors, options)


def gated_scan_case(
    dtype: torch.dtype,
    shape: tuple[int, int, int] = (2, 67, 5),
    *,
    cell: str = "min_gru",
    gate_range: tuple[float, float] = (0.0, 1.0),
    lengths: Sequence[int] | None = None,
    state: bool = True,
    reverse: bool = False,
    scale: float = 4.0,
    seed: int = 0,
) -> OpCase:
    """Inputs of :func:`seqzoo.ops.gated_scan`; the projections are uniform in ``(-scale, scale)``."""
    g = torch.Generator().manual_seed(seed)
    batch, total, width = shape if lengths is None else (1, sum(lengths), shape[2])
    rows = batch if lengths is None else len(lengths)
    x = scale * (2 * _uniform(g, batch, total, width * {"min_gru": 2, "min_lstm": 3}[cell]) - 1)
    h = (_uniform(g, rows, width) - 0.5).to(torch.float32 if dtype in HALF else dtype)
    words = [
        cell,
        "packed" if lengths is not None else f"{shape}",
        "reverse" if reverse else "",
        str(dtype).split(".")[1],
    ]
    options = {"cell": cell, "gate_range": gate_range, "reverse": reverse}
    options["cu_seqlens"] = None if lengths is None else boundaries(lengths)
    return OpCase(
        "gated_scan", " ".join(filter(None, words)), {"x": x.to(dtype), "initial_state": h if state else None}, options
    )


def causal_conv_case(
    dtype: torch.dtype,
    shape: tuple[int, int, int] = (2, 67, 5),
    *,
    taps: int = 4,
    bias: bool = True,
    activation: str | None = "silu",
    lengths: Sequence[int] | None = None,
    state: bool = True,
    weight_dtype: torch.dtype | None = None,
    seed: int = 0,
) -> OpCase:
    """Inputs of :func:`seqzoo.ops.causal_conv`; with ``lengths`` packed, the shape's B and T are then theirs."""
    g = torch.Generator().manual_seed(seed)
    batch, total, width = shape if lengths is None else (1, sum(lengths), shape[2])
    rows = batch if lengths is None else len(lengths)
    x, before = (2 * _uniform(g, *extent) - 1 for extent in ((batch, total, width), (rows, taps - 1, width)))
    weight, offset = 2 * _uniform(g, width, taps) - 1, _uniform(g, width) - 0.5
    tensors = {
        "x": x.to(dtype),
        "weight": weight.to(weight_dtype or dtype),
        "bias": offset.to(weight_dtype or dtype) if bias else None,
        "initial_state": before.to(dtype) if state else None,
    }
    words = ["packed" if lengths is not None else f"{shape}", f"W={taps}", str(activation), "bias" if bias else ""]
    words += ["state" if state else "", str(dtype).split(".")[1]]
    options = {"activation": activation, "cu_seqlens": None if lengths is None else boundaries(lengths)}
    return OpCase("causal_conv", " ".join(filter(None, words)), tensors, options)


def fft_errors(
    tensors: dict[str, Tensor | None], cotangents: list[Tensor], results: dict[str, Tensor]
) -> dict[str, float]:
    """What FFTs may add to the errors of ``long_conv``, which spread over a whole channel.

    With eps of the precision of the computation and k both kernels side by side: ``8 eps max|u| |k|_1`` for y, and for
    the gradients, which are convolutions with the gradient g of y, ``8 eps max|g| |k|_1`` for that of u and
    ``8 eps max|u| |g|_1`` for those of the kernels. The norms are those of one channel, ``|g|_1`` over all sequences.
    """
    u, (g,) = tensors["u"], cotangents
    if u is None or u.numel() == 0:
        return {}
    kernels = [kernel for kernel in (tensors["kernel"], tensors["kernel_reverse"]) if kernel is not None]
    taps = torch.cat([widen(kernel)[:, : u.shape[1]] for kernel in kernels], 1).abs().sum(1).max().item()
    unit = 8 * torch.finfo(accumulator(u.dtype)).eps
    largest, of_kernels = widen(u).abs().max().item(), widen(g).abs().sum((0, 1)).max().item()
    return {
        "output 0": unit * largest * taps,
        "gradient of u": unit * widen(g).abs().max().item() * taps,
        "gradient of kernel": unit * largest * of_kernels,
        "gradient of kernel_reverse": unit * largest * of_kernels,
    }


def long_conv_case(
    dtype: torch.dtype,
    shape: tuple[int, int, int] = (2, 67, 5),
    *,
    taps: int | None = None,
    taps_reverse: int | None = None,
    recompute: bool = False,
    kernel_dtype: torch.dtype | None = None,
    seed: int = 0,
) -> OpCase:
    """Inputs of :func:`seqzoo.ops.long_conv`; ``taps`` None for one a token, ``taps_reverse`` None for one side."""
    g = torch.Generator().manual_seed(seed)
    _, total, width = shape
    u = 2 * _uniform(g, *shape) - 1
    tensors: dict[str, Tensor | None] = {"u": u.to(dtype), "kernel": None, "kernel_reverse": None}
    for name, lags in (("kernel", total if taps is None else taps), ("kernel_reverse", taps_reverse)):
        if lags is not None:
            tensors[name] = (2 * _uniform(g, width, lags) - 1).to(kernel_dtype or dtype)
    words = [f"{shape}", "" if taps is None else f"L={taps}", "" if taps_reverse is None else f"L'={taps_reverse}"]
    words += ["recompute" if recompute else "", "fp32 kernel" if kernel_dtype == torch.float32 else ""]
    label = " ".join(filter(None, [*words, str(dtype).split(".")[1]]))
    return OpCase("long_conv", label, tensors, {"recompute": recompute}, fft_errors)


def cauchy_case(
    dtype: torch.dtype,
    shape: tuple[int, int, int] = (3, 2, 5),
    *,
    length: int = 37,
    conjugate_pairs: bool = True,
    poles_dtype: torch.dtype | None = None,
    poles: str = "spread",
    seed: int = 0,
) -> OpCase:
    """Inputs of :func:`seqzoo.ops.cauchy`; ``dtype`` is the weights', ``shape`` (D, M, N).

    The poles are ``"spread"``, ``"far"``, at 50 times the distance of the others, or ``"near"``: 1e-6 beside the nodes.
    """
    g = torch.Generator().manual_seed(seed)
    width, sums, size = shape
    weights = torch.complex(*(2 * _uniform(g, width, sums, size) - 1 for _ in range(2)))
    real, imaginary = -0.01 - _uniform(g, width, size), 6 * _uniform(g, width, size) - 3
    if poles == "far":
        real, imaginary = 50 * real, 50 * imaginary
    if poles == "near":
        node = torch.randint(0, (length + 1) // 2, (width, size), generator=g).to(real)
        real, imaginary = torch.full_like(real, -1e-6), torch.tan(torch.pi / length * node)
    values = torch.complex(real, imaginary).to(poles_dtype or dtype)
    words = [f"{shape}", f"length={length}", "pairs" if conjugate_pairs else "alone", poles, str(dtype).split(".")[1]]
    words += ["" if poles_dtype is None else f"poles {str(poles_dtype).split('.')[1]}"]
    tensors: dict[str, Tensor | None] = {"weights": weights.to(dtype), "poles": values}
    return OpCase(
        "cauchy", " ".join(filter(None, words)), tensors, {"length": length, "conjugate_pairs": conjugate_pairs}
    )


def selective_scan_case(
    dtype: torch.dtype,
    shape: tuple[int, int, int] = (2, 67, 6),
    *,
    size: int = 4,
    groups: int | None = None,
    lengths: Sequence[int] | None = None,
    transition: str = "exponential",
    complex_decay: bool = False,
    softplus: bool = True,
    optional: bool = True,
    step_dtype: torch.dtype | None = None,
    decay: float = 1.0,
    steps: tuple[float, float] | None = None,
    seed: int = 0,
) -> OpCase:
    """Inputs of :func:`seqzoo.ops.selective_scan`.

    ``groups`` None gives B and C without groups; ``optional`` False leaves D, z, the bias and the state away; ``decay``
    is the greatest rate of decay a unit of the step; ``steps`` the range of delta, where not the usual one.
    """
    g = torch.Generator().manual_seed(seed)
    batch, total, width = shape if lengths is None else (1, sum(lengths), shape[2])
    rows = batch if lengths is None else len(lengths)
    accumulate = accumulator(dtype)
    number = COMPLEX_OF[accumulate] if complex_decay else dtype

    def drawn(*extent: int, kind: torch.dtype) -> Tensor:
        value = 2 * _uniform(g, *extent) - 1
        return (torch.complex(value, 2 * _uniform(g, *extent) - 1) if kind.is_complex else value).to(kind)

    projected = (batch, total, size) if groups is None else (batch, total, groups, size)
    low, high = steps or ((-2.0, 1.0) if softplus else (0.0, 1.0))
    delta = low + (high - low) * _uniform(g, batch, total, width)
    A = -decay * _uniform(g, width, size)
    if complex_decay:
        A = torch.complex(A, 6 * _uniform(g, width, size) - 3)
    tensors: dict[str, Tensor | None] = {
        "u": drawn(batch, total, width, kind=dtype),
        "delta": delta.to(step_dtype or dtype),
        "A": None if transition == "longhorn" else A.to(COMPLEX_OF[accumulate] if complex_decay else accumulate),
        "B": drawn(*projected, kind=number),
        "C": drawn(*projected, kind=number),
        "D": drawn(width, kind=accumulate),
        "z": drawn(batch, total, width, kind=dtype),
        "delta_bias": 0.1 * drawn(width, kind=accumulate),
        "initial_state": drawn(rows, width, size, kind=accumulator(number)),
    }
    if not optional:
        tensors |= dict.fromkeys(("D", "z", "delta_bias", "initial_state"))
    options = {
        "transition": transition,
        "delta_softplus": softplus,
        "cu_seqlens": None if lengths is None else boundaries(lengths),
    }
    words = [transition, "complex" if complex_decay else "", "packed" if lengths is not None else f"{shape}"]
    words += [f"N={size}", "" if groups is None else f"G={groups}", "all" if optional else "plain"]
    words += ["" if steps is None else f"steps={steps}"]
    words += ["softplus" if softplus else "", "" if decay == 1 else f"decay={decay}", str(dtype).split(".")[1]]
    words += ["fp32 step" if step_dtype == torch.float32 else ""]
    return OpCase("selective_scan", " ".join(filter(None, words)), tensors, options)


def selective_scan_cases(dtype: torch.dtype) -> Iterator[OpCase]:
    """The forms of ``selective_scan``: both transitions, complex A, groups, packed, without the optional arguments."""
    if dtype.is_complex:
        return
    for transition in ("exponential", "longhorn"):
        yield selective_scan_case(dtype, transition=transition)
        yield selective_scan_case(dtype, transition=transition, lengths=LENGTHS, groups=2)
        yield selective_scan_case(dtype, (3, 130, 9), transition=transition, size=5, softplus=False, optional=False)
    yield selective_scan_case(dtype, complex_decay=True)
    yield selective_scan_case(dtype, complex_decay=True, lengths=LENGTHS, groups=3, size=3, optional=False)
    yield selective_scan_case(dtype, (1, 70, 34), size=16, decay=30.0)
    yield selective_scan_case(dtype, (1, 70, 130), size=3, steps=(-60.0, 30.0))
    yield selective_scan_case(dtype, (1, 70, 34), size=3, steps=(-0.1, 0.1), softplus=False)
    for shape in ((1, 1, 3), (2, 0, 3), (1, 64, 130), (0, 4, 3), (2, 3, 0)):
        yield selective_scan_case(dtype, shape, size=2)
    if dtype in HALF:
        yield selective_scan_case(dtype, step_dtype=torch.float32)


def state_spaces(
    kind: torch.dtype, width: int, size: int, rank: int | None, generator: torch.Generator
) -> dict[str, Tensor | None]:
    """Poles, b, c, steps and what makes up a low rank, of complex dtype ``kind``; a rank of 0 has no dimension of R."""

    def drawn(*extent: int) -> Tensor:
        return torch.complex(2 * _uniform(generator, *extent) - 1, 2 * _uniform(generator, *extent) - 1).to(kind)

    poles = torch.complex(-0.05 - _uniform(generator, width, size), 12 * _uniform(generator, width, size) - 6)
    step = 0.02 + 0.3 * _uniform(generator, width)
    tensors: dict[str, Tensor | None] = {
        "poles": poles.to(kind),
        "b": drawn(width, size),
        "c": drawn(width, size),
        "step": step.to(kind.to_real()),
    }
    if rank is not None:
        p = drawn(width, size) if rank == 0 else drawn(width, rank, size)
        # equal ones only take from the states' energy
        tensors |= {"p": 0.3 * p, "q": 0.3 * p.clone()}
    return tensors


def generating_errors(
    tensors: dict[str, Tensor | None], cotangents: list[Tensor], results: dict[str, Tensor]
) -> dict[str, float]:
    """What ``ssm_kernel`` may be off by where it has a generating function transformed, not powers summed up.

    Sums, quotients and a transform round some 16 times, each what is at most the kernel's sum of magnitudes.
    """
    poles = tensors["poles"]
    if poles is None or results["output 0"].numel() == 0:
        return {}
    unit = 16 * torch.finfo(poles.dtype).eps
    found = {name: unit * value.abs().max().item() for name, value in results.items() if value.numel()}
    return found | {"output 0": unit * results["output 0"].abs().sum(1).max().item()}


def ssm_kernel_case(
    dtype: torch.dtype,
    shape: tuple[int, int] = (3, 4),
    *,
    length: int = 67,
    rank: int | None = None,
    discretisation: str = "zoh",
    conjugate_pairs: bool = False,
    seed: int = 0,
) -> OpCase:
    """Inputs of :func:`seqzoo.ops.ssm_kernel`, of D channels and N states, for a kernel of real ``dtype``."""
    tensors = state_spaces(COMPLEX_OF[dtype], *shape, rank, torch.Generator().manual_seed(seed))
    options = {"length": length, "discretisation": discretisation, "conjugate_pairs": conjugate_pairs}
    words = [f"{shape} L={length}", discretisation, "" if rank is None else f"rank={rank}"]
    words += ["pairs" if conjugate_pairs else "", str(dtype).split(".")[1]]
    label = " ".join(filter(None, words))
    if rank is None:
        return OpCase("ssm_kernel", label, tensors, options)
    return OpCase("ssm_kernel", label, tensors, options, generating_errors, {"low_rank": ("p", "q")})


def ssm_kernel_cases(dtype: torch.dtype) -> Iterator[OpCase]:
    """The forms of ``ssm_kernel``: both discretisations, low ranks, one of each conjugate pair, all lengths."""
    if dtype not in COMPLEX_OF:
        return
    for discretisation, rank in (("zoh", None), ("bilinear", None), ("bilinear", 0), ("bilinear", 2)):
        for pairs in (False, True):
            yield ssm_kernel_case(dtype, rank=rank, discretisation=discretisation, conjugate_pairs=pairs)
    for length in (0, 1, 2, 64):
        yield ssm_kernel_case(dtype, (2, 1), length=length)
        yield ssm_kernel_case(dtype, (2, 2), length=length, rank=1, discretisation="bilinear", conjugate_pairs=True)
    yield ssm_kernel_case(dtype, (0, 2), rank=0, discretisation="bilinear")
    yield ssm_kernel_case(dtype, (2, 0))


def ssm_scan_case(
    dtype: torch.dtype,
    shape: tuple[int, int, int] = (2, 67, 3),
    *,
    size: int = 4,
    rank: int | None = None,
    discretisation: str = "zoh",
    conjugate_pairs: bool = False,
    lengths: Sequence[int] | None = None,
    state: bool = True,
    seed: int = 0,
) -> OpCase:
    """Inputs of :func:`seqzoo.ops.ssm_scan`; with ``lengths`` packed, the shape's B and T are then theirs."""
    g = torch.Generator().manual_seed(seed)
    batch, total, width = shape if lengths is None else (1, sum(lengths), shape[2])
    rows = batch if lengths is None else len(lengths)
    kind = COMPLEX_OF[accumulator(dtype)]
    before = torch.complex(_uniform(g, rows, width, size) - 0.5, _uniform(g, rows, width, size) - 0.5).to(kind)
    tensors = {"u": (2 * _uniform(g, batch, total, width) - 1).to(dtype)} | state_spaces(kind, width, size, rank, g)
    tensors["initial_state"] = before if state else None
    options = {"discretisation": discretisation, "conjugate_pairs": conjugate_pairs}
    options["cu_seqlens"] = None if lengths is None else boundaries(lengths)
    words = ["packed" if lengths is not None else f"{shape}", f"N={size}", discretisation]
    words += ["" if rank is None else f"rank={rank}", "pairs" if conjugate_pairs else "", "state" if state else ""]
    groups = {} if rank is None else {"low_rank": ("p", "q")}
    label = " ".join(filter(None, [*words, str(dtype).split(".")[1]]))
    return OpCase("ssm_scan", label, tensors, options, groups=groups)


def ssm_scan_cases(dtype: torch.dtype) -> Iterator[OpCase]:
    """The forms of ``ssm_scan``: diagonal and with a low rank, dense and packed, one token, sequences of any chunks."""
    if dtype.is_complex:
        return
    for rank in (None, 0):
        form = {"rank": rank, "discretisation": "zoh" if rank is None else "bilinear"}
        for pairs in (False, True):
            yield ssm_scan_case(dtype, conjugate_pairs=pairs, **form)
            yield ssm_scan_case(dtype, lengths=LENGTHS, conjugate_pairs=pairs, **form)
            yield ssm_scan_case(dtype, (2, 1, 2), conjugate_pairs=pairs, **form)
        yield ssm_scan_case(dtype, lengths=LENGTHS, state=False, **form)
        yield ssm_scan_case(dtype, (1, 130, 4), state=False, **form)
        for shape in ((1, 1, 3), (2, 0, 3), (1, 64, 5), (0, 4, 3), (2, 3, 0)):
            yield ssm_scan_case(dtype, shape, size=2, **form)
    yield ssm_scan_case(dtype, rank=2, discretisation="bilinear", conjugate_pairs=True)
    yield ssm_scan_case(dtype, (1, 70, 2), discretisation="bilinear")


def linear_attention_case(
    dtype: torch.dtype,
    shape: tuple[int, int] = (2, 67),
    *,
    op: str = "linear_attention",
    heads: int = 2,
    groups: int | None = None,
    key: int = 5,
    value: int = 3,
    decay: str | None = "token",
    strength: float = 1.0,
    lengths: Sequence[int] | None = None,
    state: bool = True,
    causal: bool = True,
    scale: float | None = None,
    decay_dtype: torch.dtype | None = None,
    seed: int = 0,
) -> OpCase:
    """Inputs of :func:`seqzoo.ops.linear_attention` and, with ``op="delta_rule"``, of :func:`seqzoo.ops.delta_rule`.

    ``decay`` is None, ``"head"``, ``"token"`` or ``"key"``; its logarithms are uniform in ``(-strength, 0)``. The delta
    rule's keys are normalised and its betas uniform in (0, 1.9).
    """
    g = torch.Generator().manual_seed(seed)
    batch, total = shape if lengths is None else (1, sum(lengths))
    rows, groups = batch if lengths is None else len(lengths), heads if groups is None else groups

    def drawn(*extent: int) -> Tensor:
        return 2 * _uniform(g, *extent) - 1

    q, k, v = drawn(batch, total, groups, key), drawn(batch, total, groups, key), drawn(batch, total, heads, value)
    shapes = {"head": (heads,), "token": (batch, total, heads), "key": (batch, total, heads, key)}
    log_decay = None if decay is None else -strength * _uniform(g, *shapes[decay])
    given = drawn(rows, heads, key, value).to(accumulator(dtype)) if state else None
    tensors: dict[str, Tensor | None] = {"q": q.to(dtype), "k": k.to(dtype), "v": v.to(dtype)}
    options: dict[str, Any] = {"scale": scale, "cu_seqlens": None if lengths is None else boundaries(lengths)}
    if op == "delta_rule":
        tensors["k"] = torch.nn.functional.normalize(k, dim=-1).to(dtype)
        tensors["beta"] = (1.9 * _uniform(g, batch, total, heads)).to(dtype)
    else:
        options["causal"] = causal
    tensors["log_decay"] = None if log_decay is None else log_decay.to(decay_dtype or dtype)
    tensors["initial_state"] = given
    words = ["packed" if lengths is not None else f"{shape}", f"H={heads} G={groups} K={key} V={value}"]
    words += ["no decay" if decay is None else f"{decay} decay", "" if strength == 1 else f"to -{strength}"]
    words += ["" if causal else "whole", "state" if state else "", "" if scale is None else f"scale {scale}"]
    words += ["fp32 decay" if decay_dtype == torch.float32 else "", str(dtype).split(".")[1]]
    return OpCase(op, " ".join(filter(None, words)), tensors, options)


def linear_attention_cases(dtype: torch.dtype) -> Iterator[OpCase]:
    """The forms of ``linear_attention``: every decay, weak and strong, groups, packed, causal or not."""
    if dtype.is_complex:
        return
    for decay in (None, "head", "token", "key"):
        yield linear_attention_case(dtype, decay=decay)
        yield linear_attention_case(dtype, decay=decay, lengths=LENGTHS, heads=4, groups=2)
    for decay in ("token", "key"):
        yield linear_attention_case(dtype, (1, 130), decay=decay, heads=1, key=16, value=20, state=False, scale=1.0)
        yield linear_attention_case(dtype, (1, 70), decay=decay, strength=50.0)
        yield linear_attention_case(dtype, (1, 70), decay=decay, strength=0.0)
    yield linear_attention_case(dtype, decay=None, causal=False)
    yield linear_attention_case(dtype, decay=None, causal=False, lengths=LENGTHS, heads=4, groups=1)
    for shape in ((1, 1), (2, 0), (0, 4), (1, 64)):
        yield linear_attention_case(dtype, shape, heads=3, groups=1)
    yield linear_attention_case(dtype, (2, 3), heads=3, value=0)
    if dtype in HALF:
        yield linear_attention_case(dtype, decay="key", decay_dtype=torch.float32)


def delta_rule_cases(dtype: torch.dtype) -> Iterator[OpCase]:
    """The forms of ``delta_rule``: every decay, weak and strong, groups, packed."""
    if dtype.is_complex:
        return
    for decay in (None, "token", "key"):
        yield linear_attention_case(dtype, op="delta_rule", decay=decay)
        yield linear_attention_case(dtype, op="delta_rule", decay=decay, lengths=LENGTHS, heads=4, groups=2)
    for decay in ("token", "key"):
        yield linear_attention_case(
            dtype, (1, 130), op="delta_rule", decay=decay, heads=1, key=16, value=20, state=False, scale=1.0
        )
        yield linear_attention_case(dtype, (1, 70), op="delta_rule", decay=decay, strength=50.0)
    for shape in ((1, 1), (2, 0), (0, 4), (1, 64)):
        yield linear_attention_case(dtype, shape, op="delta_rule", heads=3, groups=1)
    if dtype in HALF:
        yield linear_attention_case(dtype, op="delta_rule", decay="key", decay_dtype=torch.float32)


def linear_scan_cases(dtype: torch.dtype) -> Iterator[OpCase]:
    """The forms of ``linear_scan``: dense and packed, both directions, a in time or not, with and without state."""
    for reverse in (False, True):
        yield linear_scan_case(dtype, reverse=reverse)
        yield linear_scan_case(dtype, lengths=LENGTHS, reverse=reverse)
        yield linear_scan_case(dtype, lengths=LENGTHS, reverse=reverse, time_invariant=True, state=False)
        yield linear_scan_case(dtype, (3, 130, 9), reverse=reverse, time_invariant=True)
        yield linear_scan_case(dtype, (3, 130, 1), reverse=reverse)
    for shape in ((1, 1, 3), (2, 0, 3), (1, 64, 130), (0, 4, 3), (2, 3, 0)):
        yield linear_scan_case(dtype, shape)
    if dtype in HALF:
        yield linear_scan_case(dtype, a_dtype=torch.float32)


def gated_scan_cases(dtype: torch.dtype) -> Iterator[OpCase]:
    """The forms of ``gated_scan``: both cells, dense and packed, both directions, saturated gates."""
    if dtype.is_complex:
        return
    for cell in ("min_gru", "min_lstm"):
        yield gated_scan_case(dtype, cell=cell)
        yield gated_scan_case(dtype, cell=cell, lengths=LENGTHS, reverse=True, gate_range=(-1.0, 1.0))
        yield gated_scan_case(dtype, cell=cell, scale=100.0, gate_range=(-0.5, 1.0))
        for shape in ((1, 1, 3), (2, 0, 3), (1, 64, 130)):
            yield gated_scan_case(dtype, shape, cell=cell, state=False)


def causal_conv_cases(dtype: torch.dtype) -> Iterator[OpCase]:
    """The forms of ``causal_conv``: few and many taps, dense and packed, sequences shorter than the state."""
    if dtype.is_complex:
        return
    for taps in (2, 4, 8):
        yield causal_conv_case(dtype, taps=taps)
        yield causal_conv_case(dtype, taps=taps, activation=None, bias=False, state=False)
        yield causal_conv_case(dtype, taps=taps, lengths=LENGTHS)
    yield causal_conv_case(dtype, taps=3, lengths=LENGTHS, activation=None, bias=False)
    yield causal_conv_case(dtype, taps=5, lengths=LENGTHS, state=False)
    for shape in ((1, 1, 3), (2, 0, 3), (1, 64, 130), (0, 4, 3), (2, 3, 0)):
        yield causal_conv_case(dtype, shape)
    if dtype in HALF:
        yield causal_conv_case(dtype, weight_dtype=torch.float32)


def long_conv_cases(dtype: torch.dtype) -> Iterator[OpCase]:
    """The forms of ``long_conv``: one and both sides, kernels of every length, spectra kept or not."""
    if dtype.is_complex:
        return
    for recompute in (False, True):
        yield long_conv_case(dtype, recompute=recompute)
        yield long_conv_case(dtype, taps=20, taps_reverse=67, recompute=recompute)
    for taps, taps_reverse in ((1, None), (100, None), (0, None), (1, 1), (0, 3), (5, 0), (80, 90), (3, 66)):
        yield long_conv_case(dtype, (2, 67, 2), taps=taps, taps_reverse=taps_reverse)
    yield long_conv_case(dtype, (3, 130, 37), taps_reverse=130)
    for shape in ((1, 1, 3), (2, 0, 3), (1, 64, 130), (0, 4, 3), (2, 3, 0)):
        yield long_conv_case(dtype, shape, taps=3, taps_reverse=2)
    yield long_conv_case(dtype, (1, 4, 2))
    if dtype in HALF or dtype == torch.float64:
        yield long_conv_case(dtype, taps_reverse=5, kernel_dtype=torch.float32)


def vandermonde_case(
    dtype: torch.dtype,
    shape: tuple[int, int] = (3, 5),
    length: int = 67,
    *,
    exponents_dtype: torch.dtype = torch.complex128,
    decay: float = 0.05,
    turn: float = 3.0,
    seed: int = 0,
) -> OpCase:
    """Inputs of :func:`seqzoo.ops.vandermonde` whose result is ``dtype``, float64 or float32.

    The exponents' real parts are uniform in ``(-decay, 0)``, their imaginary ones in ``(-turn, turn)``.
    """
    g = torch.Generator().manual_seed(seed)
    exponents = torch.complex(-decay * _uniform(g, *shape), turn * (2 * _uniform(g, *shape) - 1))
    weights = torch.complex(2 * _uniform(g, *shape) - 1, 2 * _uniform(g, *shape) - 1)
    words = [f"{shape}", f"length={length}", "" if decay == 0.05 else f"decay={decay}"]
    words += ["" if turn == 3 else f"turn={turn}", "" if exponents_dtype == torch.complex128 else "complex64 exponents"]
    tensors = {"exponents": exponents.to(exponents_dtype), "weights": weights.to(COMPLEX_OF[dtype])}
    label = " ".join(filter(None, [*words, str(dtype).split(".")[1]]))
    return OpCase("vandermonde", label, dict(tensors), {"length": length})


def vandermonde_cases(dtype: torch.dtype) -> Iterator[OpCase]:
    """The forms of ``vandermonde``: lengths and numbers of terms of all kinds, no decay, sudden decay, fast turns."""
    if dtype not in COMPLEX_OF:
        return
    yield vandermonde_case(dtype)
    if dtype == torch.float32:
        yield vandermonde_case(dtype, exponents_dtype=torch.complex64)
    yield vandermonde_case(dtype, (2, 33), 256)
    yield vandermonde_case(dtype, (5, 2), 600)
    yield vandermonde_case(dtype, decay=0.0)
    yield vandermonde_case(dtype, decay=1e4)
    yield vandermonde_case(dtype, decay=2.0, turn=1e3)
    for length in (0, 1, 2, 3, 64, 129):
        yield vandermonde_case(dtype, (2, 3), length)
    for shape in ((0, 4), (3, 0), (1, 1), (17, 1)):
        yield vandermonde_case(dtype, shape, 20)


def cauchy_cases(dtype: torch.dtype) -> Iterator[OpCase]:
    """The forms of ``cauchy``: lengths around those where nodes are real, poles near and far, few and many sums.

    In float32 the weights are complex64 beside poles of complex128, as a layer has them; in complex64 both are.
    """
    if dtype not in (torch.float32, *COMPLEX_OF.values()):
        return
    weights = torch.complex64 if dtype == torch.float32 else dtype
    poles = torch.complex128 if dtype == torch.float32 else None
    for pairs in (False, True):
        for length in (1, 2, 3, 36, 37, 1030):
            yield cauchy_case(weights, length=length, conjugate_pairs=pairs, poles_dtype=poles)
        yield cauchy_case(weights, length=36, conjugate_pairs=pairs, poles_dtype=poles, poles="far")
        if dtype == torch.float32:
            # in float64 the nodes' own rounding shows there
            yield cauchy_case(weights, length=36, conjugate_pairs=pairs, poles_dtype=poles, poles="near")
        # of a single weight the reference's error may be small by chance
        for shape in ((16, 1, 1), (2, 4, 33), (2, 5, 8), (0, 2, 3), (2, 0, 3), (2, 2, 0)):
            yield cauchy_case(weights, shape, conjugate_pairs=pairs, poles_dtype=poles)


@dataclass(frozen=True)
class AttentionCase(OpCase):
    """One call of :func:`seqzoo.ops.attention`.

    Its results are o, lse with zeros where a query sees nothing, and one where that is so: there lse is -infinity, of
    which neither errors nor numerical derivatives can be taken.

    Attributes:
        lengths: Those of packed sequences, or None.
        lengths_k: Those of their keys, None for the same.
    """

    lengths: tuple[int, ...] | None = None
    lengths_k: tuple[int, ...] | None = None

    def call(self, tensors: dict[str, Tensor | None] | None = None) -> tuple[Tensor, ...]:
        """Calls the op."""
        arguments: dict[str, Any] = dict(self.tensors if tensors is None else tensors)
        device = arguments["q"].device
        for name, lengths in (("cu_seqlens", self.lengths), ("cu_seqlens_k", self.lengths_k)):
            arguments[name] = None if lengths is None else boundaries(lengths).to(device)
        o, lse = ops.attention(**arguments, **self.options)
        blind = lse == -torch.inf
        return o, lse.masked_fill(blind, 0.0), blind.to(lse.dtype)


def softmax_errors(
    tensors: dict[str, Tensor | None], cotangents: list[Tensor], results: dict[str, Tensor]
) -> dict[str, float]:
    """What ``attention`` may be off by where its reference is not.

    Its weights are ``exp(s - lse)``, of two numbers that are rounded at the size of lse: one such rounding of every
    result. In half precision PyTorch's kernel for CPUs takes exponentials to 1e-4, which lse inherits, and o is kept
    rounded, with which the backward pass takes ``dO o`` from every query's part of the gradients of float32.
    """
    q, o, lse = tensors["q"], results["output 0"], results["output 1"]
    if q is None or o.numel() == 0:
        return {}
    unit = torch.finfo(accumulator(q.dtype)).eps
    largest = max(1.0, lse.abs().max().item())
    found = {name: unit * largest * value.abs().max().item() for name, value in results.items() if value.numel()}
    if q.dtype in HALF:
        found["output 1"] += 1e-4
        of_queries = torch.finfo(q.dtype).eps * (widen(cotangents[0]) * o).abs().sum(-1)
        for name in ("sinks", "bias"):
            value = tensors[name]
            if value is not None:
                # (B, H, T), summed over what shares a parameter
                shape = (1, *value.shape, 1) if name == "sinks" else value.shape[:3]
                found[f"gradient of {name}"] += of_queries.transpose(1, 2).sum_to_size(shape).max().item()
    return found


def attention_case(
    dtype: torch.dtype,
    shape: tuple[int, int] = (2, 67),
    *,
    keys: int | None = None,
    heads: int = 4,
    groups: int = 2,
    key: int = 8,
    value: int | None = None,
    causal: bool = True,
    window: int | None = None,
    logit_cap: float | None = None,
    sinks: bool = False,
    bias: tuple[bool, bool, bool] | None = None,
    lengths: Sequence[int] | None = None,
    lengths_k: Sequence[int] | None = None,
    parameter_dtype: torch.dtype | None = None,
    seed: int = 0,
) -> AttentionCase:
    """Inputs of :func:`seqzoo.ops.attention`; with ``lengths`` packed, B and the numbers of tokens are then theirs.

    ``bias`` says of its first three dimensions whether they have more than one place. It hides every third key and, if
    it has rows for the sequences, all keys of the first. Where it is None there is none.
    """
    g = torch.Generator().manual_seed(seed)
    batch, total = shape if lengths is None else (1, sum(lengths))
    keys = (total if keys is None else keys) if lengths_k is None else sum(lengths_k)
    value = key if value is None else value
    sizes = (batch, total, heads, key), (batch, keys, groups, key), (batch, keys, groups, value)
    q, k, v = (4 * _uniform(g, *size) - 2 for size in sizes)
    of_heads = 2 * _uniform(g, heads) - 1
    tensors: dict[str, Tensor | None] = {"q": q.to(dtype), "k": k.to(dtype), "v": v.to(dtype), "sinks": None}
    parameter_dtype = dtype if parameter_dtype is None else parameter_dtype
    if sinks:
        tensors["sinks"] = of_heads.to(parameter_dtype)
    tensors["bias"] = None
    if bias is not None:
        rows = [size if more else 1 for size, more in zip((batch, heads, total), bias, strict=True)]
        added = 2 * _uniform(g, *rows, keys) - 1
        added[..., 1::3] = -torch.inf
        if bias[0]:
            added[:1] = -torch.inf
        tensors["bias"] = added.to(parameter_dtype)
    words = [f"{shape} of {keys}" if lengths is None else "packed", f"{heads}/{groups} heads of {key}/{value}"]
    words += ["" if lengths_k is None else "own keys", "causal" if causal else "", f"window={window}" if window else ""]
    words += [f"cap={logit_cap}" if logit_cap else "", "sinks" if sinks else "", f"bias={bias}" if bias else ""]
    label = " ".join(filter(None, [*words, str(dtype).split(".")[1]]))
    return AttentionCase(
        "attention",
        label,
        tensors,
        {"causal": causal, "window": window, "logit_cap": logit_cap},
        softmax_errors,
        lengths=None if lengths is None else tuple(lengths),
        lengths_k=None if lengths_k is None else tuple(lengths_k),
    )


# keys of the sequences of LENGTHS: none, fewer than queries, more, and keys that no query sees
LENGTHS_K = (3, 1, 80, 0, 0, 60, 5, 9)


def attention_cases(dtype: torch.dtype) -> Iterator[OpCase]:
    """The forms of ``attention``: dense and packed, fewer and more keys than queries, windows, caps, sinks, biases."""
    if dtype.is_complex:
        return
    for causal in (True, False):
        yield attention_case(dtype, causal=causal)
        yield attention_case(dtype, causal=causal, window=5, sinks=True, groups=4)
        yield attention_case(dtype, causal=causal, value=5 if causal else None, logit_cap=1.5)
        for keys in (80, 60):
            yield attention_case(dtype, keys=keys, causal=causal, groups=1)
            yield attention_case(dtype, keys=keys, causal=causal, window=20, sinks=True)
        yield attention_case(dtype, lengths=LENGTHS, causal=causal)
        yield attention_case(dtype, lengths=LENGTHS, causal=causal, window=3, sinks=True, logit_cap=2.0)
        yield attention_case(dtype, lengths=LENGTHS, lengths_k=LENGTHS_K, causal=causal)
        yield attention_case(dtype, lengths=LENGTHS, lengths_k=LENGTHS_K, causal=causal, value=5, window=6, sinks=True)
        yield attention_case(dtype, (2, 9), causal=causal, bias=(True, False, False), sinks=causal)
        yield attention_case(dtype, (2, 9), keys=14, causal=causal, bias=(False, True, True), logit_cap=1.0)
    for of_heads in (False, True):
        yield attention_case(dtype, (3, 1), keys=50, bias=(True, of_heads, False))
    yield attention_case(dtype, (1, 300), keys=600, groups=1, window=270)
    for shape, keys in (((1, 1), 1), ((2, 1), 70), ((2, 0), 3), ((2, 3), 0), ((0, 4), 4)):
        yield attention_case(dtype, shape, keys=keys, sinks=shape == (2, 3))
    yield attention_case(dtype, (1, 5), heads=2, groups=1, key=3, sinks=True)
    yield attention_case(dtype, (1, 3), keys=4, heads=2, groups=2, key=2, causal=False, bias=(False, True, False))
    if dtype in HALF:
        yield attention_case(dtype, (2, 9), sinks=True, bias=(True, True, True), parameter_dtype=torch.float32)


OP_CASES: dict[str, Callable[[torch.dtype], Iterator[OpCase]]] = {
    "linear_scan": linear_scan_cases,
    "gated_scan": gated_scan_cases,
    "causal_conv": causal_conv_cases,
    "long_conv": long_conv_cases,
    "cauchy": cauchy_cases,
    "selective_scan": selective_scan_cases,
    "linear_attention": linear_attention_cases,
    "delta_rule": delta_rule_cases,
    "vandermonde": vandermonde_cases,
    "ssm_kernel": ssm_kernel_cases,
    "ssm_scan": ssm_scan_cases,
    "attention": attention_cases,
}


def backends(device: torch.device | str, wide: bool = False) -> list[str]:
    """The implementations that can run on ``device``."""
    device = torch.device(device)
    return [name for name in dispatch.BACKENDS if dispatch.obstacle(name, device, wide) is None]


# -- mixers --


class PlainMixer(SequenceMixer):
    """A mixer with what the base class does for it alone: packing one by one, a parameter kept in float32, a loss.

    ``h_t = a h_{t-1} + x_t``, ``y_t = W h_t``; the auxiliary loss is the mean square of the outputs.
    """

    fp32_parameters = ("decay",)

    def __init__(self, d_model: int) -> None:
        super().__init__(d_model)
        self.decay = nn.Parameter(torch.empty(d_model))
        self.out_proj = nn.Linear(d_model, d_model, bias=False)
        self.reset_parameters()

    def mix(self, x: Tensor, state: State | None, packing: Packing | None, return_state: bool) -> Mixed:
        """One op and one projection."""
        if packing is not None:
            raise ValueError("a mixer that does not pack was given a packing")
        h, final = ops.linear_scan(torch.sigmoid(self.decay), x, None if state is None else state["h"])
        y = self.out_proj(h)
        return Mixed(y, {"h": final}, y.to(final.dtype).square().mean())

    def state_spec(self, batch_size: int, dtype: torch.dtype) -> StateSpec:
        """One value a channel."""
        return {"h": ((batch_size, self.d_model), accumulator(dtype))}

    def parameter_options(self) -> dict[str, dict[str, float]]:
        """The decay learns slower and does not decay."""
        return {"decay": {"weight_decay": 0.0, "lr_scale": 0.5}}

    def reset_parameters(self) -> None:
        """Decays of one half."""
        nn.init.zeros_(self.decay)
        self.out_proj.reset_parameters()


@dataclass(frozen=True)
class Subject:
    """A mixer as the contract suite builds it.

    Attributes:
        label: Its name and options.
        build: Its constructor.
        rank: 0 if it speaks for an op, or for the base class; 1 if it is the first variant of its mixer; 2 if another.
    """

    label: str
    build: Callable[[], SequenceMixer]
    rank: int = 0

    def make(self, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu") -> SequenceMixer:
        """The mixer at ``d_model`` 16, the same parameters every time, none of them at a special value.

        What begins at zero or one, a gate that is the same for all tokens for instance, would be tested as that alone.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            mixer = self.build()
            mixer.reset_parameters()
            with torch.no_grad():
                for parameter in mixer.parameters():
                    parameter += 0.1 * torch.randn_like(parameter)
        return mixer.to(device=device, dtype=dtype)


# the mixer that is run on every implementation, for all that are made of the same op
SPEAKERS = {
    "gated_scan": "min_gru",
    "linear_scan": "gateloop",
    "causal_conv": "mamba",
    "selective_scan": "mamba",
    "linear_attention": "gla",
    "delta_rule": "gated_deltanet",
    "long_conv": "s4d",
    "vandermonde": "s4d",
    "cauchy": "s4",
    "attention": "attention",
}


def subjects() -> list[Subject]:
    """Every registered mixer in each of its variants, and the wrapper around a causal one."""
    found = []
    for name in list_mixers():
        for index, options in enumerate(registration(name).mixer.variants):
            words = ", ".join(f"{key}={value}" for key, value in options.items())
            rank = 2 if index else int(name not in SPEAKERS.values())
            found.append(
                Subject(
                    f"{name}({words})", lambda name=name, options=options: create(name, d_model=16, **options), rank
                )
            )
    found.append(Subject("plain()", lambda: PlainMixer(16)))
    for index, merge in enumerate(("sum", "concat", "gate")):
        found.append(
            Subject(
                f"bidirectional({merge})",
                lambda merge=merge: Bidirectional(create("min_gru", d_model=16), merge=merge),
                min(index + 1, 2),
            )
        )
    return found


def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 1) -> Tensor:
    """Standard normal values on a grid of 1/64, the same in every precision."""
    kind = torch.complex128 if dtype.is_complex else torch.float64
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=kind)
    if dtype.is_complex:
        drawn = torch.view_as_real(drawn)
        return torch.view_as_complex((drawn * 64).round() / 64).to(device=device, dtype=dtype)
    return ((drawn * 64).round() / 64).to(device=device, dtype=dtype)


def differentiable(tensor: Tensor) -> bool:
    """Whether gradients exist for a tensor of this dtype."""
    return tensor.is_floating_point() or tensor.is_complex()


def random_state(mixer: SequenceMixer, batch_size: int, x: Tensor, seed: int = 2) -> dict[str, Tensor]:
    """A state with nothing zero in it, made by running the mixer over a few tokens."""
    with torch.no_grad():
        _, state = mixer(inputs((batch_size, 5, mixer.d_model), x.dtype, x.device, seed), return_state=True)
    return {key: value.detach() for key, value in state.items()}


# the greatest slope of GELU
GELU_SLOPE = 1.13


@torch.no_grad()
def fourier_leak(mixer: SequenceMixer, x: Tensor, roundings: int = 8) -> float:
    """By how much later inputs may move an output of ``mixer(x)`` in rounding: zero unless Fourier transforms mix them.

    A long convolution's output moves by at most ``8 eps max|x| |k|_1``, eps that of the accumulator; beside a sum over
    tokens it is as far off, and by 16 roundings more where the kernel is a transform as well. The map that follows
    passes it on, each channel of the linear map by the sum of its weights' magnitudes, the gated linear unit
    ``a sigmoid(b)`` by ``|da| + |a| |db| / 4``; and what has moved is rounded anew, to a bit of the results' dtype.
    """
    if not isinstance(mixer, ConvolutionMixer) or x.numel() == 0:
        return 0.0
    taps = widen(mixer.kernel(x.shape[1])).abs().sum(1).max().item()
    largest = widen(x).abs().max().item()
    leak = roundings * torch.finfo(accumulator(x.dtype)).eps * largest * taps
    unit = torch.finfo(x.dtype).eps
    reach = largest * (taps + widen(mixer.D).abs().max().item())
    leak += unit * reach
    if mixer.output == "none":
        return leak
    weight = widen(mixer.out_proj.weight).abs().sum(1).max().item()
    leak, reach = leak * GELU_SLOPE * weight, reach * weight + widen(mixer.out_proj.bias).abs().max().item()
    leak += unit * reach
    return leak * (1 + reach / 4) + unit * reach


def parameters_of(mixer: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by name."""
    return dict(mixer.named_parameters())
