"""G4: what ranks give together is what one process gives: outputs, final states, all gradients."""

from __future__ import annotations

import functools
import itertools
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from seqzoo.layers import Bidirectional
from seqzoo.mixer import Mixed, SequenceMixer
from seqzoo.modules.attention import AttentionMixer
from seqzoo.ops import linear_scan
from seqzoo.parallel.ops import try_out
from seqzoo.parallel.parallelize import parts_of
from seqzoo.testing import Subject, subjects

ranks = runpy.run_path(str(Path(__file__).with_name("ranks.py")))
TOLERANCE = 1e-10
# sequences that begin, end and lie on cuts, of one token and of none; in the first of COUNTS one that goes on after
# a rank on which another ends
LENGTHS = ((4, 0, 6, 3), (0, 1, 9, 0, 3, 0), (0, 1, 9, 0, 3, 0))
COUNTS = {
    2: ((7, 6), (0, 13), (10, 3)),
    3: ((5, 0, 8), (1, 9, 3), (0, 2, 11)),
    4: ((3, 2, 1, 7), (4, 0, 6, 3), (0, 6, 7, 0)),
}


def cases(size: int, keeps_state: bool) -> list[dict[str, Any]]:
    found = []
    for index, counts in enumerate(COUNTS[size]):
        for lengths in (None, LENGTHS[index]):
            given = keeps_state and (index + (lengths is None)) % 2 == 0
            final = keeps_state and index != 0
            found.append({"counts": counts, "lengths": lengths, "given": given, "final": final})
    return found


@functools.cache
def expected(label: str, size: int, keeps_state: bool) -> list[dict[str, torch.Tensor]]:
    return [ranks["one_process"](label, size, **one) for one in cases(size, keeps_state)]


def together(name: str, parts: list[torch.Tensor], exact: torch.Tensor) -> list[torch.Tensor]:
    """What the ranks' results say of one that all make together."""
    if name in ("y", "gradient of x"):
        return [torch.cat(parts, 1)]
    if name == "auxiliary" or name.startswith("gradient"):
        return [sum(parts[1:], parts[0])]
    # final states are whole on every rank; a cache may have more room or less
    return [padded(part, exact) for part in parts]


def padded(part: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    sizes = [max(pair) for pair in zip(part.shape, exact.shape, strict=True)]
    found = part.new_zeros(sizes)
    found[tuple(slice(size) for size in part.shape)] = part
    outside = [slice(None)] * part.dim()
    for dim, size in enumerate(exact.shape):
        assert not found[(*outside[:dim], slice(size, None))].any(), "a cache has something behind its tokens"
    return found[tuple(slice(size) for size in exact.shape)]


def compare(found: list[dict[str, Any]], exact: dict[str, torch.Tensor], skip: tuple[str, ...] = ()) -> None:
    for name, value in exact.items():
        if name in skip:
            continue
        parts = [torch.from_numpy(one[name]) for one in found]
        for joined in together(name, parts, value):
            assert joined.shape == value.shape, name
            scale = value.abs().max().item() or 1.0 if value.numel() else 1.0
            error = (joined - value).abs().max().item() / scale if value.numel() else 0.0
            assert error <= TOLERANCE, f"{name}: {error:.2e}"


def parallel_subjects() -> list[Subject]:
    """All but what test_refusals has: what reads the future and is not Bidirectional."""
    mixers = ((one, one.make()) for one in subjects())
    return [one for one, mixer in mixers if "state" not in mixer.limits or isinstance(mixer, Bidirectional)]


def summed_up(subject: Subject) -> bool:
    """Whether a subject exchanges summaries, whatever parts it has."""
    mixer = subject.make()
    return try_out(parts_of(mixer)[0], torch.empty((1, 0, 16), dtype=torch.float64))[0] is None


def runs() -> list[Any]:
    """Subjects, exchanges and numbers of ranks; slow is what repeats the same code with other options or ranks."""
    found = []
    for one in parallel_subjects():
        exchanges = ("chain", "allgather", "hillis_steele", "pipelined") if summed_up(one) else ("chain",)
        for exchange, size in itertools.product(exchanges, (2, 3, 4)):
            fast = one.rank < 2 and (exchange, size) in (("chain", 3), ("allgather", 4))
            fast |= one.rank == 0 and exchange != "chain"
            words = f"{one.label}-{exchange}-{size}"
            found.append(pytest.param(one, exchange, size, id=words, marks=[] if fast else [pytest.mark.slow]))
    return found


@pytest.mark.parametrize(("subject", "exchange", "size"), runs())
def test_ranks_give_what_one_process_gives(pool, subject: Subject, exchange: str, size: int):
    keeps_state = "state" not in subject.make().limits
    wanted = expected(subject.label, size, keeps_state)
    found = pool.call("mixer", size, label=subject.label, cases=cases(size, keeps_state), exchange=exchange)
    # of a sequence in parts a mixture counts the shares apart
    skip = ("auxiliary",) if subject.label.startswith("mixture_of_memories") else ()
    for index, exact in enumerate(wanted):
        compare([one[index] for one in found], exact, skip)


def attentions() -> list[Any]:
    """Subjects that are softmax attention, ways and numbers of ranks."""
    found = []
    for one in subjects():
        mixer = one.make()
        if not isinstance(mixer, AttentionMixer):
            continue
        for way, size in itertools.product(("allgather", "ulysses", "ring", "usp"), (2, 3, 4)):
            if way == "ulysses" and mixer.n_heads % size:
                continue
            fast = size == (2 if way == "ulysses" else 3)
            marks = [] if fast else [pytest.mark.slow]
            found.append(pytest.param(one, way, size, id=f"{one.label}-{way}-{size}", marks=marks))
    return found


@pytest.mark.parametrize(("subject", "way", "size"), attentions())
def test_attention_over_all_ranks_gives_what_one_process_gives(pool, subject: Subject, way: str, size: int):
    keeps_state = "state" not in subject.make().limits
    wanted = expected(subject.label, size, keeps_state)
    found = pool.call("mixer", size, label=subject.label, cases=cases(size, keeps_state), attention=way)
    for index, exact in enumerate(wanted):
        compare([one[index] for one in found], exact)


# what takes the chain whatever is asked for: softmax, kernels of any form, running maxima, hard decisions, own loops
CHAINED = (
    "aaren",
    "attention",
    "block_recurrent",
    "long_conv",
    "mixture_of_memories",
    "mlstm",
    "plain",
    "seqboat",
    "sliding_window_attention",
    "transmamba",
)


@pytest.mark.parametrize("subject", parallel_subjects(), ids=lambda one: one.label)
def test_all_whose_states_are_affine_exchange_summaries(subject: Subject):
    assert summed_up(subject) == (subject.label.partition("(")[0] not in CHAINED)


class Secretive(SequenceMixer):
    """A mixer that reads the token before in a way that no op knows, in one of several places."""

    packs = True

    def __init__(self, place: str) -> None:
        super().__init__(4)
        # weights of zero, which a trial must see through
        self.weight = torch.nn.Parameter(torch.zeros(4, 4))
        self.place = place

    def mix(self, x: torch.Tensor, state: Any, packing: Any, return_state: bool) -> Mixed:
        before = x.roll(1, 1) @ self.weight
        added = before if self.place == "inputs" else x
        given = None if state is None else state["h"]
        if self.place == "decision":
            # nothing of it shows in a sum, nor in a product
            added = added * (x > x.detach().cummax(1).values.roll(1, 1)).to(x.dtype)
        if self.place == "chunk":
            added = added + F.pad(added[:, 31:32], (0, 0, 32, x.shape[1] - 33))
        h, final = linear_scan(torch.full_like(x, 0.5), added, None if self.place == "state" else given)
        if self.place == "state" and given is not None:
            h = h + given[:, None] * self.weight[0]
        after = x[:, -1] @ self.weight if self.place == "final" else final
        counted = torch.zeros_like(x[:, 0, 0], dtype=torch.int64) if state is None else state["count"]
        y = h + before if self.place == "outputs" else h
        return Mixed(y, {"h": after, "count": counted + (2 if self.place == "count" else x.shape[1])})

    def state_spec(self, batch_size: int, dtype: torch.dtype) -> Any:
        return {"h": ((batch_size, 4), dtype), "count": ((batch_size,), torch.int64)}


@pytest.mark.parametrize("place", ["inputs", "decision", "chunk", "outputs", "state", "final", "count", "nowhere"])
def test_a_trial_finds_what_else_connects_tokens(place: str):
    reason, calls = try_out(Secretive(place), torch.empty(2, 0, 4))
    assert (reason is None) == (place == "nowhere"), reason
    assert [type(one).__name__ for one in calls] == (["LinearScan"] if reason is None else [])


@pytest.mark.parametrize("exchange", ["chain", "allgather", pytest.param("pipelined", marks=pytest.mark.slow)])
@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16", "autocast"])
@pytest.mark.parametrize("label", ["mamba()", "attention(n_heads=2)", "gated_deltanet(n_heads=2)", "gla()"])
def test_ranks_lose_no_more_to_rounding_than_one_process(pool, label: str, autocast: bool, exchange: str):
    for found in pool.call("narrow", 3, label=label, autocast=autocast, exchange=exchange):
        for part in ("y", "gradient"):
            assert found[f"{part} of ranks"] <= 2 * found[f"{part} of one process"] + 2**-7, found
