"""Packed documents: what batches hold, and that training on them is training on the documents one by one."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from seqzoo.models import ModelConfig
from seqzoo.train.checkpoints import read_checkpoint
from seqzoo.train.command import main
from seqzoo.train.data.documents import FolderDocuments
from seqzoo.train.data.packed_documents import PackedDocuments
from seqzoo.train.metrics_table import read_metrics
from seqzoo.train.modules import LanguageModeling
from seqzoo.train.sharded_checkpoints import read_shards

LENGTHS = np.array([5, 70, 12, 33, 2, 64, 9])


def documents(**options) -> PackedDocuments:
    data = np.random.default_rng(0).integers(0, 256, LENGTHS.sum()).astype(np.uint8)
    return PackedDocuments(data, LENGTHS, **{"tokens": 32, **options})


def epoch(batches: PackedDocuments) -> list:
    """The batches until every document has been read to its end."""
    found, ended = [], 0
    for batch in batches:
        found.append(batch)
        ended += sum(not one for one in batch.goes_on)
        if ended == len(LENGTHS):
            return found
    raise AssertionError


def test_every_byte_is_read_once_in_its_place():
    batches = documents()
    read: dict[int, list[int]] = {index: [] for index in range(len(LENGTHS))}
    running: set[int] = set()
    for batch in epoch(batches):
        assert batch.ids.shape == batch.labels.shape == (1, batch.cu_seqlens[-1])
        assert batch.ids.numel() <= batch.capacity == 32
        for index, document in enumerate(batch.documents):
            part = slice(*batch.cu_seqlens[index : index + 2].tolist())
            ids, labels = batch.ids[0, part].tolist(), batch.labels[0, part].tolist()
            assert batch.continues[index] == (document in running) == bool(read[document])
            read[document] += ids
            whole = batches.data[batches.begins[document] : batches.begins[document + 1]].tolist()
            after = [*whole, -100][len(read[document]) - len(ids) + 1 : len(read[document]) + 1]
            assert labels == after
            (running.add if batch.goes_on[index] else running.discard)(document)
    assert not running
    assert [len(read[index]) for index in range(len(LENGTHS))] == LENGTHS.tolist()


def test_a_batch_depends_on_its_number_alone():
    whole = list(itertools.islice(documents(), 40))
    for start in (1, 7, 30):
        for one, other in zip(documents(start=start), whole[start:], strict=False):
            assert all(map(torch.equal, one[:3], other[:3]))
    ranks = [epoch_of(documents(rank=rank, world_size=2)) for rank in range(2)]
    assert not ranks[0] & ranks[1], "groups of processes read different documents"


def epoch_of(batches: PackedDocuments) -> set[int]:
    sampled = itertools.islice(batches.parts(), 4)
    return {document for parts in sampled for document, _, _ in parts}


@pytest.mark.parametrize("long", ["truncate", "drop"])
def test_what_is_not_carried(long: str):
    kept = [index for index, length in enumerate(LENGTHS) if long == "truncate" or length <= 32]
    found = []
    for batch in documents(long=long):
        found += batch.documents
        assert not any([*batch.continues, *batch.goes_on])
        if len(found) == len(kept):
            break
    assert sorted(found) == kept


def test_documents_that_are_all_too_long_are_told():
    with pytest.raises(
        ValueError, match=rf"all {len(LENGTHS)} documents are longer than a batch of 1 tokens, the shor"
    ):
        documents(long="drop", tokens=1)


@pytest.mark.parametrize("pattern", ["min_gru", [{"name": "attention", "n_heads": 2}, "mamba"]], ids=["scan", "hybrid"])
def test_the_loss_of_batches_is_that_of_whole_documents(pattern):
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=256, d_model=16, n_layers=2, pattern=pattern, max_positions=80)
    module = LanguageModeling(config).double()
    module.trainer = type("T", (), {"global_step": 0, "distributed_sampler_kwargs": None})()
    module._fabric = None
    batches = documents()
    nats = 0.0
    with torch.no_grad():
        for index, batch in enumerate(epoch(batches)):
            nats += float(module.training_step(batch, index)["total"]) * int((batch.labels != -100).sum())
            if index == 3:
                state: dict = {}
                module.on_save_checkpoint(state)
                module._carried = {}
                module.on_load_checkpoint(state)
        assert module._carried == {}
        expected = 0.0
        for begin, end in itertools.pairwise(batches.begins):
            ids = torch.from_numpy(batches.data[begin:end].astype(np.int64))[None]
            expected += float(module.model.loss(ids[:, :-1], ids[:, 1:])) * (end - begin - 1)
    assert nats == pytest.approx(expected, rel=1e-10)


@pytest.fixture(scope="module")
def packed(corpus: Path) -> list[str]:
    words = """
        --config task/documents --data.validation_fraction 0.25 --data.context 32 --data.tokens 900
        --data.validation_streams 4 --model.config.d_model 16 --model.config.n_layers 2 --model.warmup_steps 6
        --model.lr 0.02 --model.sample_length 40 --trainer.val_check_interval 8 --trainer.limit_val_batches 4
        --trainer.log_every_n_steps 3 --trainer.max_steps 24 --checkpoint_steps 1
    """
    return [*words.split(), "--data.folder", str(corpus)]


def test_a_run_tells_how_full_its_batches_are_and_resumes_inside_a_document(packed, train, tmp_path, capsys):
    assert main([*packed, "--runs", str(tmp_path / "whole")]) == 0
    assert "% filled" in capsys.readouterr().out
    reference = next((tmp_path / "whole").iterdir())
    rows = [row for row in read_metrics(reference / "metrics.csv") if row["train_loss"] is not None]
    assert all(0.5 < row["packing"] <= 1.0 for row in rows)
    # which step lies inside a document
    module = FolderDocuments(folder=packed[-1], validation_fraction=0.25, tokens=900)
    module.setup()
    inside = next(n for n, batch in enumerate(module.train_dataloader()) if n > 5 and any(batch.goes_on)) + 1
    train(([*packed, "--runs", tmp_path / "killed"], {"at": "step", "step": inside + 1, "does": "kill"}))
    run = next((tmp_path / "killed").iterdir())
    state = read_checkpoint(run / "checkpoints/last.safetensors")
    assert state["global_step"] == inside
    assert state["carried"][0]
    assert main(["--resume", str(run)]) == 0
    assert (run / "model/model.safetensors").read_bytes() == (reference / "model/model.safetensors").read_bytes()
    scores = [json.loads((path / "report.json").read_text())["validation_bits_per_byte"] for path in (run, reference)]
    assert scores[0] == scores[1]


@pytest.mark.slow
def test_several_processes_pack_alike(packed, train_on, tmp_path):
    runs = [tmp_path / "one", tmp_path / "two"]
    assert main([*packed, "--runs", str(runs[0])]) == 0
    done = train_on(2, ([*packed, "--runs", runs[1], "--sequence-parallel", "2"], None))
    assert done.statuses == [[0]] * 2, done.out
    one, other = (read_metrics(next(path.iterdir()) / "metrics.csv") for path in runs)
    for expected, found in zip(one, other, strict=True):
        for name in ("train_loss", "validation_bpb", "packing"):
            assert found[name] == (None if expected[name] is None else pytest.approx(expected[name], rel=1e-4)), name


@pytest.mark.slow
def test_groups_of_processes_go_on_inside_their_documents(packed, train_on, tmp_path):
    options = [*packed, "--sequence-parallel", "2"]
    assert train_on(4, ([*options, "--runs", tmp_path / "whole"], None)).statuses == [[0]] * 4
    reference = next((tmp_path / "whole").iterdir())
    carried = []
    for step in (7, 8, 9):
        train_on(4, ([*options, "--runs", tmp_path / str(step)], {"at": "step", "step": step + 1, "does": "kill"}))
        run = next((tmp_path / str(step)).iterdir())
        state = read_shards(run / "checkpoints/last")
        assert state["global_step"] == step
        carried += state.get("carried", [])
        assert train_on(4, (["--resume", run], None)).statuses == [[0]] * 4
        assert (run / "model/model.safetensors").read_bytes() == (reference / "model/model.safetensors").read_bytes()
    assert any(carried), "no checkpoint lies inside a document"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--data.long", "cut"], "there is no long='cut'"),
        (["--data.tokens", "1"], "tokens must be at least 2, one to read and one to predict, got 1"),
        (["--data.long", "error"], "documents are longer than a batch of 900 tokens, the first"),
        (["--model.config.max_positions", "900"], "max_positions must be at least the longest document"),
    ],
)
def test_refusals(packed, capsys, options, words):
    assert main([*packed, *options]) == 2
    assert words in " ".join(capsys.readouterr().err.split())
