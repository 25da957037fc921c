"""What a plan for more ranks than there are costs: ``seqzoo plan --ranks 1024 --tokens 16M --model jamba-small``.

Bytes are those of :func:`payload_bytes` and :func:`attention_payload`, the formulas that the tests hold against counted
bytes. Times follow from them by the textbook model of a link, a latency and a bandwidth ("Optimization of Collective
Communication Operations in MPICH", https://doi.org/10.1177/1094342005051521, section 2); of s bytes a rank and P ranks:

* chain, one rank after another: ``(P - 1) (latency + s / bandwidth)``;
* all-gather: ``latency ceil(log2 P) + (P - 1) s / bandwidth``;
* scan by doubling: ``ceil(log2 P) (latency + s / bandwidth)``;
* pipelined in K parts: ``(P + K - 2) (latency + s / (K bandwidth))``;
* all-to-all: ``(P - 1) latency + s / bandwidth``, s what leaves the rank; a ring of P - 1 hops alike.

Beyond a node its links are the slower ones, which all messages are taken to wait for.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch

from seqzoo.mixer import SequenceMixer
from seqzoo.models.config import ModelConfig, build_mixer
from seqzoo.models.memory import kept_bytes
from seqzoo.models.parallel_mixers import ParallelMixers
from seqzoo.models.presets import preset
from seqzoo.modules.attention import AttentionMixer
from seqzoo.modules.options import check_count
from seqzoo.parallel.attention import Method, attention_payload
from seqzoo.parallel.exchange import forms_of, message_bytes
from seqzoo.parallel.parallelize import payload_bytes
from seqzoo.parallel.plan import Plan
from seqzoo.parallel.transports import PIECES

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SUFFIXES = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30}
# tokens on which the memory of activations is measured
PROBE = 256
# beyond, who sees whom, which is worked out for every pair, takes more than minutes
MOST_RANKS = 4096


@dataclass(frozen=True)
class Link:
    """Between two ranks.

    Attributes:
        latency: Seconds until a message arrives, its bytes apart.
        bandwidth: Bytes a second, each way.
    """

    latency: float
    bandwidth: float

    def __post_init__(self) -> None:
        for name in ("latency", "bandwidth"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {value!r}")


class Cost(NamedTuple):
    """Of one way to run a mixer, on a rank in the middle, forward and backward.

    Attributes:
        sent: Bytes that leave the rank, each message once.
        received: Bytes that come to it.
        seconds: In which nothing else is done.
    """

    sent: int
    received: int
    seconds: float


class Estimate(NamedTuple):
    """Of one kind of mixer in a model.

    Attributes:
        name: Its class.
        blocks: How many blocks have one.
        costs: By exchange, what one of them costs.
        kept: Bytes of activations that a rank keeps for the backward pass.
    """

    name: str
    blocks: int
    costs: dict[str, Cost]
    kept: int

    @property
    def best(self) -> str:
        """The exchange that takes the least time; of equals the one with fewer bytes."""
        return min(self.costs, key=lambda name: (self.costs[name].seconds, self.costs[name].received))


def chain(size: int, ranks: int, link: Link) -> float:
    """Seconds of a state that goes from rank to rank."""
    return (ranks - 1) * (link.latency + size / link.bandwidth)


def allgather(size: int, ranks: int, link: Link) -> float:
    """Seconds of a gather of ``size`` bytes from each."""
    return math.ceil(math.log2(ranks)) * link.latency + (ranks - 1) * size / link.bandwidth


def hillis_steele(size: int, ranks: int, link: Link) -> float:
    """Seconds of a scan in rounds, of ``size`` bytes each."""
    return math.ceil(math.log2(ranks)) * (link.latency + size / link.bandwidth)


def pipelined(size: int, ranks: int, link: Link, pieces: int = PIECES) -> float:
    """Seconds of a state that goes from rank to rank in parts."""
    return (ranks + pieces - 2) * (link.latency + size / (pieces * link.bandwidth))


def all_to_all(size: int, ranks: int, link: Link) -> float:
    """Seconds in which ``size`` bytes leave a rank for all others."""
    return (ranks - 1) * link.latency + size / link.bandwidth


TIMES: dict[str, Callable[[int, int, Link], float]] = {
    "allgather": allgather,
    "hillis_steele": hillis_steele,
    "pipelined": pipelined,
}


def estimate(mixers: Iterable[SequenceMixer], plan: Plan, link: Link, *, batch_size: int = 1) -> list[Estimate]:
    """What each kind of mixer costs on this rank.

    Args:
        mixers: With parameters of the activations' dtype, not on the meta device; what prints alike counts as one.
        plan: Of the tokens; a rank in the middle has the most to do.
        link: Between ranks.
        batch_size: Of dense sequences.

    Raises:
        ValueError: If there is one rank alone, or no token on this one.
    """
    if plan.size < 2:
        raise ValueError(f"a plan needs at least 2 ranks, got {plan.size}")
    if plan.length == 0:
        raise ValueError(f"rank {plan.rank} has no token; take one that has")
    kinds: dict[str, list[SequenceMixer]] = {}
    for mixer in mixers:
        parts = list(mixer.mixers) if isinstance(mixer, ParallelMixers) else [mixer]
        for part in parts:
            # what it prints are its options
            kinds.setdefault(repr(part), []).append(cast("SequenceMixer", part))
    return [
        Estimate(
            type(alike[0]).__name__,
            len(alike),
            _costs(alike[0], plan, link, batch_size),
            activation_bytes(alike[0], plan.length, batch_size),
        )
        for alike in kinds.values()
    ]


def _costs(mixer: SequenceMixer, plan: Plan, link: Link, batch_size: int) -> dict[str, Cost]:
    ranks, dtype = plan.size, _dtype(mixer)
    if isinstance(mixer, AttentionMixer):
        return _attention_costs(mixer, plan, link, batch_size)
    size = message_bytes(forms_of(mixer.state_spec(batch_size, dtype)))
    found = {"chain": Cost(2 * size, 2 * size, 2 * chain(size, ranks, link))}
    for exchange, time in TIMES.items():
        try:
            forward, backward = payload_bytes(mixer, plan, exchange, batch_size=batch_size)
        except ValueError:
            break  # its state is none of ops that can be summed up
        gathered = (ranks - 1) * (forward + backward) if exchange == "allgather" else forward + backward
        # a scan's messages of all rounds are one after the other
        rounds = math.ceil(math.log2(ranks)) if exchange == "hillis_steele" else 1
        seconds = sum(time(-(-one // rounds), ranks, link) for one in (forward, backward))
        found[exchange] = Cost(forward + backward, gathered, seconds)
    return found


def _attention_costs(mixer: AttentionMixer, plan: Plan, link: Link, batch_size: int) -> dict[str, Cost]:
    found = {}
    ways: list[Method] = ["allgather", "ring", "usp"]
    if mixer.n_heads % plan.size == 0:
        ways.append("ulysses")
    for method in ways:
        payload = attention_payload(
            plan,
            method,
            n_heads=mixer.n_heads,
            n_groups=mixer.n_kv_heads,
            key_size=mixer.head_dim,
            value_size=mixer.head_dim,
            dtype=_dtype(mixer),
            batch_size=batch_size,
            window=getattr(mixer, "window", None),
        )
        both = (
            max(payload.sent_forward, payload.received_forward),
            max(payload.sent_backward, payload.received_backward),
        )
        seconds = sum(all_to_all(size, plan.size, link) for size in both)
        found[method] = Cost(
            payload.sent_forward + payload.sent_backward, payload.received_forward + payload.received_backward, seconds
        )
    return found


def activation_bytes(mixer: SequenceMixer, length: int, batch_size: int) -> int:
    """Bytes of activations that a mixer keeps for the backward pass: those of a short sequence, in proportion."""
    probe = min(PROBE, length)
    weight = next(mixer.parameters())
    x = torch.randn(1, probe, mixer.d_model, dtype=_dtype(mixer), device=weight.device, requires_grad=True)
    return kept_bytes(lambda: mixer(x), mixer.parameters()) * batch_size * length // probe


def _dtype(mixer: SequenceMixer) -> torch.dtype:
    """Of a mixer's inputs, which the greater part of its parameters has."""
    weight = mixer._weight()
    return torch.get_default_dtype() if weight is None else weight.dtype


def table(estimates: Sequence[Estimate], plan: Plan, link: Link) -> str:
    """All ways, the best of each kind marked, and what the whole model takes with those."""
    links = f"links of {1e6 * link.latency:g} us and {link.bandwidth / 1e9:g} GB/s"
    head = f"{'':2}{'mixer':<26}{'blocks':>6}  {'exchange':<14}{'sent':>10}{'received':>11}{'time':>11}"
    lines = [
        f"{plan.total:,} tokens on {plan.size:,} ranks, {plan.length:,} on rank {plan.rank}; {links}; there and back",
        "",
        f"{head}{'activations':>13}",
    ]
    for one in estimates:
        for exchange, cost in one.costs.items():
            mark = "*" if exchange == one.best else ""
            lines.append(
                f"{mark:2}{one.name:<26}{one.blocks:>6}  {exchange:<14}{_bytes(cost.sent):>10}"
                f"{_bytes(cost.received):>11}{_seconds(cost.seconds):>11}{_bytes(one.kept):>13}"
            )
    seconds = sum(one.blocks * one.costs[one.best].seconds for one in estimates)
    received = sum(one.blocks * one.costs[one.best].received for one in estimates)
    kept = sum(one.blocks * one.kept for one in estimates)
    lines += [
        "",
        f"* the least time. With those all blocks: {_bytes(received)} received and {_seconds(seconds)} on every rank, ",
        f"and {_bytes(kept)} of activations of the mixers, of one block alone where blocks are checkpointed.",
    ]
    return "\n".join(lines) + "\n"


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    options = argparse.ArgumentParser(
        prog="seqzoo plan", description="Bytes, modelled time and memory of sequence parallel, for any number of ranks."
    )
    options.add_argument("--ranks", type=int, required=True, help="that share every sequence")
    options.add_argument("--tokens", type=count, required=True, help="of a sequence, as 16M")
    options.add_argument("--model", required=True, help="a preset (seqzoo list), or the name of a mixer")
    options.add_argument("--d-model", type=int, help="another width")
    options.add_argument("--n-layers", type=int, help="another number of blocks")
    options.add_argument("--batch-size", type=int, default=1, help="sequences (%(default)s)")
    options.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of activations (%(default)s)")
    options.add_argument("--per-node", type=int, default=8, help="ranks of a node (%(default)s)")
    options.add_argument("--node-latency", type=float, default=5.0, help="us inside a node (%(default)s)")
    options.add_argument("--node-bandwidth", type=float, default=300.0, help="GB/s inside a node (%(default)s)")
    options.add_argument("--latency", type=float, default=20.0, help="us between nodes (%(default)s)")
    options.add_argument("--bandwidth", type=float, default=50.0, help="GB/s between nodes (%(default)s)")
    return options


def count(text: str) -> int:
    """``"16M"`` as 16,777,216."""
    match = re.fullmatch(r"([0-9]+)([kmgKMG]?)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"a number of tokens is digits, and k, M or G behind them, got {text!r}")
    return int(match[1]) * SUFFIXES[match[2].lower()]


def main(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit status."""
    options = parser().parse_args(arguments)
    try:
        for name in ("per_node", "batch_size"):
            check_count(name, getattr(options, name))
        if options.ranks > MOST_RANKS:
            raise ValueError(f"ranks must be at most {MOST_RANKS:,}, got {options.ranks:,}")
        inside = Link(options.node_latency / 1e6, options.node_bandwidth * 1e9)
        beyond = Link(options.latency / 1e6, options.bandwidth * 1e9)
        link = inside if options.ranks <= options.per_node else beyond
        plan = Plan.balanced(options.tokens, options.ranks, options.ranks // 2)
        found = estimate(mixers_of(options), plan, link, batch_size=options.batch_size)
        sys.stdout.write(table(found, plan, link))
    except (TypeError, ValueError) as error:
        sys.stderr.write(f"seqzoo plan: {' '.join(str(error).split())}\n")
        return 1
    return 0


def mixers_of(options: argparse.Namespace) -> list[SequenceMixer]:
    """The mixers of a preset, one a block, or one by its name.

    Raises:
        ValueError: If there is neither, or a number is out of range.
    """
    changed = {"d_model": options.d_model, "n_layers": options.n_layers}
    changed = {name: value for name, value in changed.items() if value is not None}
    try:
        known = preset(options.model)
    except ValueError as unknown:
        try:
            build_mixer(options.model, 16)
        except ValueError as error:
            raise ValueError(f"--model is neither a preset ({unknown}) nor a mixer ({error})") from None
        values = {"vocab_size": 256, "d_model": 512, "n_layers": 1, **changed}
        config = ModelConfig(pattern=options.model, **values)
    else:
        config = known.config(**changed)
    return [build_mixer(layer.mixer, config.d_model).to(DTYPES[options.dtype]) for layer in config.layers()]


def _bytes(value: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError  # the loop has returned


def _seconds(value: float) -> str:
    return f"{1e6 * value:.0f} us" if value < 1e-3 else f"{1e3 * value:.2f} ms" if value < 1 else f"{value:.2f} s"
