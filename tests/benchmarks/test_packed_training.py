"""An epoch over documents of long-tailed lengths: packed, and padded to the longest of each batch.

The limit of packing is the same tokens with no boundaries among them, one long sequence a batch.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from seqzoo.models import LanguageModel, ModelConfig
from seqzoo.packing import Packing

DOCUMENTS, BATCH, LONGEST, VOCABULARY = 1000, 25, 4096, 256
CONFIG = ModelConfig(vocab_size=VOCABULARY, d_model=64, n_layers=2, pattern="mamba", mlp="none")


def documents() -> list[torch.Tensor]:
    """Log-normal lengths of mean 300, the longest 4096."""
    random = np.random.default_rng(0)
    sigma = 1.0
    lengths = random.lognormal(np.log(300) - sigma**2 / 2, sigma, DOCUMENTS)
    lengths = np.clip(lengths, 2, LONGEST).astype(int)
    lengths[random.integers(DOCUMENTS)] = LONGEST
    return [torch.from_numpy(random.integers(0, VOCABULARY, length)) for length in lengths]


def packed(model: LanguageModel, batch: list[torch.Tensor]) -> torch.Tensor:
    ids, labels = (torch.cat([document[part] for document in batch])[None] for part in (slice(-1), slice(1, None)))
    return model.loss(ids, labels, cu_seqlens=Packing.from_lengths([len(document) - 1 for document in batch]))


def whole(model: LanguageModel, batch: list[torch.Tensor]) -> torch.Tensor:
    ids, labels = (torch.cat([document[part] for document in batch])[None] for part in (slice(-1), slice(1, None)))
    return model.loss(ids, labels)


def padded(model: LanguageModel, batch: list[torch.Tensor]) -> torch.Tensor:
    ids = torch.nn.utils.rnn.pad_sequence([document[:-1] for document in batch], batch_first=True)
    labels = torch.nn.utils.rnn.pad_sequence([document[1:] for document in batch], batch_first=True, padding_value=-100)
    return model.loss(ids, labels)


def epoch(form):
    """What makes an epoch: forward, backward and update for every batch; returns the losses."""

    def make():
        torch.manual_seed(0)
        model, texts = LanguageModel(CONFIG), documents()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

        def call() -> list[float]:
            losses = []
            for first in range(0, DOCUMENTS, BATCH):
                loss = form(model, texts[first : first + BATCH])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            return losses

        return call

    return make


@pytest.mark.parametrize(("name", "form", "role"), [("packed", packed, "seqzoo"), ("padded", padded, "peer")])
def test_epoch(measure, device, name, form, role):
    if device.type != "cpu":
        pytest.skip("the documents are on the CPU")
    tokens = sum(len(document) - 1 for document in documents())
    group = f"mamba language model, {DOCUMENTS:,} documents of {tokens:,} tokens, forward+backward+update"
    measure(epoch(form), group=group, name=name, role=role, limit=epoch(whole))


def test_losses_are_equal(device):
    if device.type != "cpu":
        pytest.skip("the documents are on the CPU")
    torch.testing.assert_close(epoch(packed)()(), epoch(padded)()(), rtol=1e-5, atol=1e-5)
