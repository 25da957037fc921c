"""G4: what ranks give together is what one process gives: outputs, final states, all gradients."""

from __future__ import annotations

import functools
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from seqzoo.layers import Bidirectional
from seqzoo.testing import Subject, subjects

ranks = runpy.run_path(str(Path(__file__).with_name("ranks.py")))
TOLERANCE = 1e-10
# sequences that begin, end and lie on cuts, of one token and of none
LENGTHS = (0, 1, 9, 0, 3, 0)
COUNTS = {
    2: ((7, 6), (0, 13), (10, 3)),
    3: ((5, 0, 8), (1, 9, 3), (0, 2, 11)),
    4: ((3, 2, 1, 7), (4, 0, 6, 3), (0, 6, 7, 0)),
}


def cases(size: int, keeps_state: bool) -> list[dict[str, Any]]:
    found = []
    for index, counts in enumerate(COUNTS[size]):
        for lengths in (None, LENGTHS):
            given = keeps_state and (index + (lengths is None)) % 2 == 0
            final = keeps_state and index != 1
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


def parallel_subjects() -> list[Any]:
    """All but what test_refusals has: what reads the future and is not Bidirectional."""
    found = []
    for one in subjects():
        mixer = one.make()
        if "state" not in mixer.limits or isinstance(mixer, Bidirectional):
            found.append(pytest.param(one, id=one.label, marks=[pytest.mark.slow] if one.rank == 2 else []))
    return found


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("subject", parallel_subjects())
def test_ranks_give_what_one_process_gives(pool, subject: Subject, size: int):
    keeps_state = "state" not in subject.make().limits
    wanted = expected(subject.label, size, keeps_state)
    found = pool.call("mixer", size, label=subject.label, cases=cases(size, keeps_state))
    # of a sequence in parts a mixture counts the shares apart
    skip = ("auxiliary",) if subject.label.startswith("mixture_of_memories") else ()
    for index, exact in enumerate(wanted):
        compare([one[index] for one in found], exact, skip)


@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16", "autocast"])
@pytest.mark.parametrize("label", ["mamba()", "attention(n_heads=2)", "gated_deltanet(n_heads=2)"])
def test_ranks_lose_no_more_to_rounding_than_one_process(pool, label: str, autocast: bool):
    for found in pool.call("narrow", 3, label=label, autocast=autocast):
        for part in ("y", "gradient"):
            assert found[f"{part} of ranks"] <= 2 * found[f"{part} of one process"] + 2**-7, found
