"""Multi-query associative recall: the data, and who solves it. A matrix state does, a vector state guesses.

Who has seen six values and knows no more guesses one of six right: 0.167.
"""

from __future__ import annotations

import json
import time

import pytest
import torch

from seqzoo import create
from seqzoo.models import LanguageModel, ModelConfig
from seqzoo.parameters import parameter_groups
from seqzoo.train.data.mqar import mqar
from seqzoo.train.data.windows import IGNORED
from seqzoo.train.schedule import rate_factor

TASK = {"length": 32, "n_pairs": 6, "vocab_size": 64}
BATCH, STEPS = 64, 1500
# HGRN2's forget gates begin at one half: at the common rate they have not opened by the last step
RATE, RATES = 3e-3, {"hgrn2": 1e-2}

MATRIX_STATES = (
    {"name": "linear_attention", "feature_map": "taylor"},
    {"name": "retnet"},
    {"name": "lightning_attention"},
    {"name": "gla"},
    {"name": "hgrn2"},
    {"name": "mamba2"},
    {"name": "mlstm"},
    {"name": "deltanet"},
    {"name": "gated_deltanet"},
    {"name": "kda"},
)
VECTOR_STATES = ({"name": "min_gru"}, {"name": "hgrn"}, {"name": "rglru"})
# its features differ too little from key to key
DILUTED = {"name": "linear_attention", "feature_map": "elu+1", "d_conv": 4}


def test_a_batch_is_the_task():
    ids, labels = mqar(3, 5, batch_size=300, **TASK)
    assert ids.shape == labels.shape == (300, 32)
    keys, values = ids[:, 0:12:2], ids[:, 1:12:2]
    assert keys.unique().tolist() == list(range(1, 32))
    assert values.unique().tolist() == list(range(32, 64))
    assert all(len(set(row.tolist())) == 6 for row in torch.cat((keys, values)))
    assert (labels[:, :12] == IGNORED).all()
    asked = labels != IGNORED
    assert (asked.sum(1) == 6).all()
    assert torch.equal(asked[:, 12:], ids[:, 12:] > 0)
    for row in range(300):
        known = dict(zip(keys[row].tolist(), values[row].tolist(), strict=True))
        assert [known[key] for key in ids[row][asked[row]].tolist()] == labels[row][asked[row]].tolist()
    # in slots of two tokens, early ones likelier
    often = asked.float().mean(0)[12:]
    assert (often[1::2] == 0).all()
    assert (often[0::2] > 0).all()
    assert often[0] > often[4] > often[18]


@pytest.mark.parametrize("power", [0.01, 0.5])
def test_the_gaps_follow_the_power_law(power):
    """With one pair, the i-th slot is asked in a share of ``i ** (power - 1)``."""
    labels = mqar(0, 0, batch_size=20_000, length=22, n_pairs=1, vocab_size=64, power=power)[1]
    found = (labels[:, 2::2] != IGNORED).double().mean(0)
    expected = torch.arange(1, 11, dtype=torch.float64) ** (power - 1)
    assert torch.allclose(found, expected / expected.sum(), atol=0.012)


def test_a_batch_depends_on_seed_and_index_alone():
    first = mqar(3, 5, batch_size=2, **TASK)[0]
    assert torch.equal(first, mqar(3, 5, batch_size=2, **TASK)[0])
    for seed, index in ((3, 6), (4, 5), (5, 3), (3 + 2**32, 5)):
        assert not torch.equal(first, mqar(seed, index, batch_size=2, **TASK)[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 22}, "length must be even and at least 4 . n_pairs = 24, got 22"),
        ({"length": 31}, "length must be even"),
        ({"vocab_size": 13}, "vocab_size must be at least 2 . n_pairs . 2 = 14, got 13"),
        ({"batch_size": 0}, "must be positive"),
        ({"index": -1}, "index must not be negative"),
    ],
)
def test_impossible_batches_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        mqar(**{"seed": 0, "index": 0, "batch_size": 2, **TASK, **options})


def accuracy(model: LanguageModel) -> float:
    ids, labels = mqar(1, 0, batch_size=512, **TASK)
    with torch.inference_mode():
        found = model(ids)[0].argmax(-1)
    return (found == labels)[labels != IGNORED].float().mean().item()


def train(mixer: dict) -> float:
    """Trains until the task is solved or the steps are over; returns the accuracy."""
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(vocab_size=64, d_model=64, n_layers=2, pattern=[mixer]))
    optimizer = torch.optim.AdamW(parameter_groups(model, RATES.get(mixer["name"], RATE), 0.1), betas=(0.9, 0.95))
    peaks = [group["lr"] for group in optimizer.param_groups]
    start = time.perf_counter()
    for step in range(STEPS):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * rate_factor(step, 100, STEPS)
        ids, labels = mqar(0, step, batch_size=BATCH, **TASK)
        loss = model.loss(ids, labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 99:
            found = accuracy(model)
            seconds = time.perf_counter() - start
            print(json.dumps(mixer), step + 1, f"{loss.item():.3f} {found:.3f} {seconds:.0f} s", flush=True)
            if found > 0.999:
                break
    return found


def words(mixer: dict) -> str:
    return mixer["name"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("mixer", MATRIX_STATES, ids=words)
def test_a_matrix_state_behind_a_short_convolution_recalls(mixer, record_property):
    found = train(mixer | {"d_conv": 4})
    record_property("accuracy", found)
    assert found > 0.99


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("mixer", VECTOR_STATES, ids=words)
def test_a_vector_state_guesses(mixer, record_property):
    found = train(mixer | {"d_conv": 4})
    record_property("accuracy", found)
    assert found < 0.5


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("mixer", [*MATRIX_STATES, *VECTOR_STATES], ids=words)
def test_what_is_reached_without_a_convolution(mixer, record_property):
    """A key and its value are two tokens: without a convolution the first layer has to bring them together."""
    try:
        create(d_model=16, **mixer, d_conv=None)
    except ValueError as error:
        pytest.skip(f"{mixer['name']} has no form without a convolution: {error}")
    record_property("accuracy", train(mixer | {"d_conv": None}))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_what_is_reached_with_features_that_hardly_differ(record_property):
    record_property("accuracy", train(DILUTED))
