"""A mixture of memories, forward and backward, beside its core over as many tokens as the memories get together."""

from __future__ import annotations

import pytest

from seqzoo import create

WIDTH, LENGTH, TOP_K = 256, 2048, 2
CORE = {"name": "gated_deltanet", "n_heads": 4}


def mixture(**options):
    return lambda: create("mixture_of_memories", d_model=WIDTH, core=CORE, top_k=TOP_K, **options)


def core():
    return create(CORE["name"], d_model=WIDTH, n_heads=CORE["n_heads"])


# memories, and whether one more is shared, which gets every token once more
@pytest.fixture(params=[(4, False), (16, False), (4, True)], ids=["4", "16", "4 and a shared one"])
def place(request, training_step):
    memories, shared = request.param
    tokens = LENGTH * (TOP_K + shared)
    return {
        "group": f"mixture of {memories} memories{' and a shared one' * shared}, top {TOP_K} of {LENGTH} tokens",
        "limit": training_step(core, (1, tokens, WIDTH)),
        "seconds": 4.0,
    }, (memories, shared)


def test_core(measure, place):
    options, _ = place
    measure(options["limit"], name="its core over as many tokens", role="limit", **options)


def test_seqzoo(measure, place, training_step):
    options, (memories, shared) = place
    made = training_step(mixture(n_memories=memories, shared_memory=shared), (1, LENGTH, WIDTH))
    measure(made, name="seqzoo", role="seqzoo", **options)
