"""Language corpora: which tokens come from which texts, where they are kept, and which batches they become."""

from __future__ import annotations

import gzip
import itertools
import json
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tokenizers
import torch

from seqzoo.models.tokenizer import ByteTokenizer, PieceTokenizer, characters, load_tokenizer, nucleotides
from seqzoo.train.data import Corpus, shards, streams, texts
from seqzoo.train.data.files import resolve_folder
from seqzoo.train.data.packed_documents import PackedDocuments
from seqzoo.train.data.strands import complements
from seqzoo.train.data.texts import Files
from seqzoo.train.data.tokenised import Joined, Tokens, dtype_of, is_held

END = "<|endoftext|>"


def stories(count: int = 40) -> list[str]:
    """Documents of unequal lengths, with characters of one to four bytes."""
    return [f"Story {index}: é€😀 " + "once upon a time " * (index % 7) + "\nThe end.\n" for index in range(count)]


def train_tokenizer(folder: Path, size: int = 400) -> Path:
    """A byte-level BPE tokenizer with a token between texts, trained on the spot."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=size, special_tokens=[END], initial_alphabet=alphabet)
    inner.train_from_iterator(stories(), trainer)
    path = folder / "tokenizer.json"
    inner.save(str(path))
    return path


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def stand_at(module: Corpus, step: int, *, accumulate: int = 1, ranks: tuple[int, int] | None = None) -> None:
    """Gives a data module a trainer that stands at a step, one of several processes where they are given."""
    divided = None if ranks is None else {"rank": ranks[0], "num_replicas": ranks[1]}
    trainer: Any = SimpleNamespace(
        global_step=step, accumulate_grad_batches=accumulate, distributed_sampler_kwargs=divided
    )
    module.trainer = trainer


def write_texts(folder: Path, documents: list[str]) -> list[str]:
    for index, text in enumerate(documents):
        (folder / f"{index:03}.txt").write_text(text, encoding="utf-8", newline="")
    return [str(folder / "*.txt")]


def write_lines(path: Path, documents: list[str]) -> list[str]:
    text = "".join(json.dumps({"text": document}) + "\n" for document in documents)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return [str(path)]


def write_parquet(path: Path, documents: list[str], rows: int = 7) -> list[str]:
    pyarrow.parquet.write_table(pyarrow.table({"text": documents}), path, row_group_size=rows)
    return [str(path)]


WRITERS = {
    "text": write_texts,
    "jsonl": lambda folder, documents: write_lines(folder / "a.jsonl", documents),
    "jsonl.gz": lambda folder, documents: write_lines(folder / "a.jsonl.gz", documents),
    "parquet": lambda folder, documents: write_parquet(folder / "a.parquet", documents),
}


def corpus(tmp_path: Path, files: list[str] | None = None, **options: Any) -> Corpus:
    given = {
        "validation_fraction": 0.2,
        "context": 8,
        "batch_size": 3,
        "validation_streams": 2,
        "validation_tokens": 5000,
    }
    return Corpus(files, **{**given, "cache": str(tmp_path / "cache"), **options})


def read(module: Corpus, side: str = "training") -> list[list[int]]:
    """The documents of a side, as tokens."""
    found = module.side(side)
    return [found.ids[begin:end].tolist() for begin, end in itertools.pairwise(found.bounds.tolist())]


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch):
    """Makes many shards, parts and blocks of little data."""
    monkeypatch.setattr(texts, "PIECE", 700)
    monkeypatch.setattr(texts, "PART", 64)
    monkeypatch.setattr(streams, "SHARD", 1000)
    monkeypatch.setattr(streams, "PART", 256)


class TestTokens:
    @pytest.mark.parametrize("kind", WRITERS)
    @pytest.mark.usefixtures("small_pieces")
    def test_both_sides_are_the_documents_one_after_the_other(self, tmp_path, bpe, kind):
        documents = stories()
        module = corpus(tmp_path, WRITERS[kind](tmp_path, documents), tokenizer=str(bpe))
        module.setup()
        tokenizer = load_tokenizer(bpe)
        keys = [text.encode() for text in documents]
        if kind == "text":
            keys = [f"{index:03}.txt".encode() for index in range(len(documents))]
        held = [is_held(key, 0.2) for key in keys]
        assert 0 < sum(held) < len(documents)
        for side, wanted in (("training", False), ("validation", True)):
            chosen = [text for text, one in zip(documents, held, strict=True) if one == wanted]
            found = read(module, side)
            assert [tokenizer.decode(ids) for ids in found] == chosen
            assert all(ids.index(tokenizer.end or 0) == len(ids) - 1 for ids in found)
            assert module.side(side).bytes == sum(len(text.encode()) for text in chosen)
            if kind != "text":  # a text is cut into parts, of which each is encoded apart
                assert found == [[*tokenizer.encode(text), tokenizer.end] for text in chosen]
        ids = module.side("training").ids
        assert isinstance(ids, Joined)
        assert len(ids.parts) > 1 or kind == "jsonl.gz", "the data fill several shards"
        assert ids.dtype == dtype_of(tokenizer.vocab_size) == np.uint16

    @pytest.mark.parametrize("size", range(1, 14))
    @pytest.mark.parametrize("end", ["é", "€", "😀", "€\n"])
    def test_no_character_is_cut_at_the_end(self, tmp_path, monkeypatch, size, end):
        monkeypatch.setattr(texts, "PART", 8)
        text = "a" * size + end
        (tmp_path / "a.txt").write_text(text, encoding="utf-8", newline="")
        source = Files([tmp_path / "a.txt"])
        assert "".join(part.text.decode() for part in source.parts(0)) == text

    @pytest.mark.usefixtures("small_pieces")
    def test_a_long_text_is_cut_between_characters_and_put_together(self, tmp_path):
        text = "".join(stories()) + "é€😀" * 300
        for name, content in (("lines.txt", text), ("none.txt", text.replace("\n", "€"))):
            path = tmp_path / name
            path.write_text(content, encoding="utf-8", newline="")
            source = Files([path])
            assert source.pieces > 3
            parts = [part for piece in range(source.pieces) for part in source.parts(piece)]
            assert "".join(part.text.decode("utf-8") for part in parts) == content
            assert [part.begins for part in parts] == [True] + [False] * (len(parts) - 1)
            assert [part.ends for part in parts] == [False] * (len(parts) - 1) + [True]

    @pytest.mark.parametrize("name", ["enwik8", "enwik8.zip", "enwik8.gz"])
    @pytest.mark.usefixtures("small_pieces")
    def test_a_file_is_divided_at_bytes(self, tmp_path, name):
        data = np.random.default_rng(0).integers(0, 256, 5000).astype(np.uint8).tobytes()
        path = tmp_path / name
        if name.endswith("zip"):
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("enwik8", data)
        else:
            path.write_bytes(gzip.compress(data) if name.endswith("gz") else data)
        module = corpus(tmp_path, [str(path)], sizes=[3000, 900, 1100])
        module.setup()
        sides = [module.side(side).ids[:].tobytes() for side in ("training", "validation", "test")]
        assert sides == [data[:3000], data[3000:3900], data[3900:]]
        with pytest.raises(ValueError, match="has 5000 bytes and cannot be cut at byte 6000; it may be cut short"):
            corpus(tmp_path, [str(path)], sizes=[3000, 3000]).setup()

    def test_characters_are_those_of_the_training_documents(self, tmp_path):
        omegas = (f"\u03a9 of number {number}" for number in itertools.count())
        documents = [*stories(), next(text for text in omegas if is_held(text.encode(), 0.2))]
        module = corpus(tmp_path, write_lines(tmp_path / "a.jsonl", documents), tokenizer="characters")
        module.setup()
        training = [text for text in documents if not is_held(text.encode(), 0.2)]
        assert module.tokenizer.vocab_size == len(set("".join(training))) + 1
        assert [module.tokenizer.decode(ids) for ids in read(module)] == training
        assert module.side("training").ids.dtype == np.uint8

    def test_files_that_validate_do_not_train(self, tmp_path):
        files = write_texts(tmp_path, stories(6))
        held = [str(tmp_path / "003.txt")]
        module = corpus(tmp_path, files, validation_files=held)
        module.setup()
        assert [bytes(ids).decode() for ids in read(module, "validation")] == [stories(6)[3]]
        assert [bytes(ids).decode() for ids in read(module)] == [s for i, s in enumerate(stories(6)) if i != 3]

    def test_rows_of_one_text_have_nothing_between_them(self, tmp_path, bpe):
        files = write_lines(tmp_path / "a.jsonl", stories())
        held = write_lines(tmp_path / "b.jsonl", stories(3))
        module = corpus(tmp_path, files, validation_files=held, joined=True, tokenizer=str(bpe))
        module.setup()
        (ids,) = read(module)
        assert load_tokenizer(bpe).decode(ids) == "".join(stories())
        assert ids.count(0) == 1, "the token between texts stands at the end alone"


class TestCache:
    def test_a_second_run_maps_what_the_first_has_written(self, tmp_path, bpe, monkeypatch):
        files = write_lines(tmp_path / "a.jsonl", stories())
        first = corpus(tmp_path, files, tokenizer=str(bpe))
        first.setup()
        monkeypatch.setattr(PieceTokenizer, "encode_many", None)
        second = corpus(tmp_path, files, tokenizer=str(bpe))
        second.setup()
        assert second.description() == first.description()
        assert read(second) == read(first)
        ids = second.side("training").ids
        assert isinstance(ids, Joined)
        for part in ids.parts:
            assert isinstance(part, np.memmap)
            assert not part.flags.writeable

    def test_other_contents_another_tokenizer_or_fraction_make_new_tokens(self, tmp_path, bpe):
        files = write_lines(tmp_path / "a.jsonl", stories())
        digests = set()
        other = train_tokenizer(tmp_path, size=300)
        for options in ({}, {"tokenizer": str(bpe)}, {"tokenizer": str(other)}, {"validation_fraction": 0.4}):
            module = corpus(tmp_path, files, **options)
            module.setup()
            digests.add(module.description()["training_digest"])
        write_lines(tmp_path / "a.jsonl", [*stories()[:-1], "another end"])
        module = corpus(tmp_path, files)
        module.setup()
        assert read(module)[-1] == list(b"another end") or read(module, "validation")[-1] == list(b"another end")
        digests.add(module.description()["training_digest"])
        assert len(digests) == 5
        assert len(list((tmp_path / "cache").iterdir())) == 5

    def test_contents_and_tokenizers_of_one_size_are_told_apart(self, tmp_path):
        files = write_lines(tmp_path / "a.jsonl", stories())
        folders = tmp_path / "cache"
        for count, more in enumerate("öü", start=1):
            folder = tmp_path / more
            folder.mkdir()
            characters([*stories(), more]).save(folder)
            corpus(tmp_path, files, tokenizer=str(folder)).setup()
            assert len(list(folders.iterdir())) == count
        first = corpus(tmp_path, files)
        first.setup()
        write_lines(tmp_path / "a.jsonl", [story.swapcase() for story in stories()])
        second = corpus(tmp_path, files)
        second.setup()
        assert sorted(map(bytes, read(second) + read(second, "validation"))) == sorted(
            story.swapcase().encode() for story in stories()
        )

    @pytest.mark.usefixtures("small_pieces")
    def test_what_was_interrupted_goes_on_with_the_next_shard(self, tmp_path, bpe, monkeypatch):
        files = write_lines(tmp_path / "a.jsonl", stories())
        whole = corpus(tmp_path / "whole", files, tokenizer=str(bpe))
        whole.setup()
        module = corpus(tmp_path, files, tokenizer=str(bpe))
        made = made_after_an_interruption(module, monkeypatch)
        assert made
        assert made[0] == 2, "the shards that were whole are not made again"
        assert read(module) == read(whole)

    @pytest.mark.usefixtures("small_pieces")
    def test_a_damaged_shard_is_made_again(self, tmp_path):
        files = write_lines(tmp_path / "a.jsonl", stories())
        first = corpus(tmp_path, files)
        first.setup()
        before = read(first)
        path = sorted((tmp_path / "cache").rglob("training-0*.npy"))[1]
        path.write_bytes(path.read_bytes()[:-1] + b"\x00")
        second = corpus(tmp_path, files)
        with pytest.warns(UserWarning, match="has another checksum than manifest.json says; it is made again"):
            second.setup()
        assert read(second) == before


def made_after_an_interruption(module: Corpus, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sets a module up until its third shard, then to the end; the shards that were written then."""
    write, made = shards.Shards._write, []

    def interrupted(self: shards.Shards, number: int) -> None:
        if number == 2:
            raise KeyboardInterrupt
        write(self, number)

    def noted(self: shards.Shards, number: int) -> None:
        made.append(number)
        write(self, number)

    monkeypatch.setattr(shards.Shards, "_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        module.setup()
    monkeypatch.setattr(shards.Shards, "_write", noted)
    module.setup()
    return made


def batches(module: Corpus, count: int) -> list[Any]:
    return list(itertools.islice(module.train_dataloader(), count))


class TestBatches:
    @pytest.mark.usefixtures("small_pieces")
    def test_windows_are_ranges_of_the_tokens(self, tmp_path, bpe):
        module = corpus(tmp_path, write_lines(tmp_path / "a.jsonl", stories()), tokenizer=str(bpe))
        module.setup()
        whole = module.side("training").ids
        text = ",".join(map(str, whole[:].tolist()))
        for batch in batches(module, 20):
            assert batch.shape == (3, 9)
            assert batch.dtype == torch.int64
            assert all(",".join(map(str, row)) in text for row in batch.tolist())
        held = module.side("validation").ids[:].tolist()
        labels = torch.cat([part for _, part in module.val_dataloader()], dim=1)
        assert labels[labels != -100].tolist() == held[1:]

    def test_a_range_over_several_arrays(self):
        parts = [np.arange(5), np.zeros(0, dtype=np.int64), np.arange(5, 6), np.arange(6, 20)]
        ids = Joined(parts)
        for start, stop in itertools.product(range(22), range(25)):
            assert ids[start:stop].tolist() == list(range(20))[start:stop]
        assert np.shares_memory(ids[7:15], parts[3]), "a range of one array is no copy"

    def test_packed_documents_are_the_documents(self, tmp_path, bpe):
        files = write_lines(tmp_path / "a.jsonl", stories())
        module = corpus(tmp_path, files, tokenizer=str(bpe), tokens=64, long="carry")
        module.setup()
        documents = read(module)
        found: dict[int, list[int]] = {}
        for batch in batches(module, 60):
            for index, document in enumerate(batch.documents):
                part = slice(*batch.cu_seqlens[index : index + 2].tolist())
                if not batch.continues[index]:
                    found[document] = []
                found[document] += batch.ids[0, part].tolist()
        assert len(found) == len(documents)
        assert sum(found[index] == ids for index, ids in enumerate(documents)) > len(documents) - 3

    @pytest.mark.parametrize("packed", [False, True])
    def test_the_middle_is_what_the_whole_has_there(self, tmp_path, packed):
        files = write_lines(tmp_path / "a.jsonl", stories())
        module = corpus(tmp_path, files, tokens=200 if packed else None, long="truncate")
        module.setup()
        whole = batches(module, 9)
        stand_at(module, 3, accumulate=2)
        for one, other in zip(batches(module, 3), whole[6:], strict=True):
            assert torch.equal(one[0] if packed else one, other[0] if packed else other)


def write_dataset(folder: Path, documents: list[str]) -> str:
    folder.mkdir()
    write_lines(folder / "train.jsonl", documents)
    write_lines(folder / "validation.jsonl", documents[:3])
    return str(folder)


@pytest.fixture
def dataset(tmp_path, monkeypatch) -> str:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    return write_dataset(tmp_path / "data", stories())


class TestDataSets:
    @pytest.mark.parametrize("streaming", [False, True])
    @pytest.mark.usefixtures("small_pieces")
    def test_rows_are_documents(self, tmp_path, dataset, bpe, streaming):
        options: dict[str, Any] = {"max_tokens": 9000} if streaming else {}
        module = corpus(tmp_path, dataset=dataset, tokenizer=str(bpe), streaming=streaming, **options)
        module.setup()
        tokenizer = load_tokenizer(bpe)
        for side, wanted in (("training", False), ("validation", True)):
            chosen = [text for text in stories() if is_held(text.encode(), 0.2) == wanted]
            assert read(module, side) == [[*tokenizer.encode(text), tokenizer.end] for text in chosen]
            assert module.side(side).bytes == sum(len(text.encode()) for text in chosen)
        named = corpus(tmp_path, dataset=dataset, validation_split="validation", streaming=streaming, **options)
        named.setup()
        assert [bytes(ids).decode() for ids in read(named, "validation")] == stories()[:3]
        assert [bytes(ids).decode() for ids in read(named)] == stories()

    @pytest.mark.usefixtures("small_pieces")
    def test_what_is_kept_of_a_stream_ends_with_the_tokens_asked_for(self, tmp_path, dataset):
        whole = b"".join(text.encode() for text in stories() if not is_held(text.encode(), 0.2))
        module = corpus(tmp_path, dataset=dataset, streaming=True, max_tokens=1250, validation_tokens=100)
        module.setup()
        assert module.side("training").ids[:].tobytes() == whole[:1250]
        ids = module.side("training").ids
        assert isinstance(ids, Joined)
        assert len(ids.parts) == 2
        assert all(isinstance(part, np.memmap) and part.size for part in ids.parts), "nothing is copied"
        assert module.side("validation").ids.size == 100

    def test_a_cut_between_documents_leaves_no_empty_one(self):
        whole = Tokens(np.arange(9, dtype=np.uint8), np.array([0, 3, 5, 9]), 9, "digest")
        assert [whole.cut(size).bounds.tolist() for size in (3, 4, 5)] == [[0, 3], [0, 3, 4], [0, 3, 5]]

    @pytest.mark.parametrize("judged", ["validation", "test"])
    def test_a_split_that_judges_is_read_whole(self, tmp_path, monkeypatch, judged):
        """Documents are held out of the split that trains alone."""
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        (tmp_path / "data").mkdir()
        write_lines(tmp_path / "data" / "train.jsonl", stories())
        write_lines(tmp_path / "data" / f"{judged}.jsonl", stories()[::-1])
        module = corpus(tmp_path, dataset=str(tmp_path / "data"), streaming=True, **{f"{judged}_split": judged})
        module.setup()
        assert [bytes(one).decode() for one in read(module, judged)] == stories()[::-1]

    @pytest.mark.usefixtures("small_pieces")
    def test_an_interrupted_stream_goes_on(self, tmp_path, dataset, monkeypatch):
        options = {"dataset": dataset, "validation_split": "validation", "streaming": True, "max_tokens": 2900}
        module = corpus(tmp_path, **options, validation_tokens=50)
        made = made_after_an_interruption(module, monkeypatch)
        assert made[0] == 2, "the shards that were whole are not made again"
        assert module.side("training").ids[:].tobytes() == "".join(stories()).encode()[:2900]

    @pytest.mark.parametrize("tokens", [None, 50])
    @pytest.mark.parametrize("long", ["carry", "truncate", "drop"])
    @pytest.mark.usefixtures("small_pieces")
    def test_a_stream_that_is_not_kept_goes_on_in_its_middle(self, tmp_path, dataset, bpe, tokens, long):
        options = {"dataset": dataset, "tokenizer": str(bpe), "streaming": True, "tokens": tokens, "long": long}
        module = corpus(tmp_path, **options)
        module.setup()
        assert "training" not in module.sides
        whole = batches(module, 60)
        for place in (1, 17, 40):
            first = corpus(tmp_path, **options)
            first.setup()
            stand_at(first, place, accumulate=1)
            running = iter(first.train_dataloader())
            # as Lightning, which reads a batch ahead
            for _ in range(place + 1):
                next(running)
            kept = first.state_dict()
            second = corpus(tmp_path, **options)
            second.setup()
            second.load_state_dict(kept)
            for one, other in zip(batches(second, 12), whole[place:], strict=False):
                if tokens is None:
                    assert torch.equal(one, other)
                else:
                    assert all(map(torch.equal, one[:3], other[:3]))
                    assert one[3:] == other[3:]

    @pytest.mark.parametrize("accumulate", [1, 9])
    def test_a_stream_knows_the_place_of_the_last_step_while_gradients_accumulate(self, tmp_path, dataset, accumulate):
        """A run that an error ends in the middle of a step is kept as of the step before."""
        options = {"dataset": dataset, "streaming": True, "validation_split": "validation"}
        first, second = (corpus(tmp_path, **options) for _ in range(2))
        for module in (first, second):
            module.setup()
        stand_at(first, 2, accumulate=accumulate)
        running = iter(first.train_dataloader())
        read = [next(running) for _ in range(3 * accumulate + 1)]
        second.load_state_dict(first.state_dict())
        assert torch.equal(batches(second, 1)[0], read[2 * accumulate])

    @pytest.mark.usefixtures("small_pieces")
    def test_windows_of_a_stream_follow_one_another(self, tmp_path, dataset):
        module = corpus(tmp_path, dataset=dataset, streaming=True, validation_split="validation")
        module.setup()
        whole = "".join(stories()).encode()
        rows = torch.cat(batches(module, len(whole) // 24 + 4))
        assert all(one[-1] == other[0] for one, other in itertools.pairwise(rows.tolist()))
        read_bytes = bytes(rows[:, :-1].flatten().tolist())
        assert read_bytes[: len(whole) + 20] == (whole + whole)[: len(whole) + 20], "the end is followed by the begin"

    def test_packed_documents_of_a_stream_are_its_documents(self, tmp_path, dataset):
        options = {"dataset": dataset, "streaming": True, "validation_split": "validation", "tokens": 50}
        module = corpus(tmp_path, **options)
        module.setup()
        found: dict[int, bytes] = {}
        for batch in batches(module, 70):
            assert batch.ids.numel() == 50, "with long=carry every batch is full"
            for index, document in enumerate(batch.documents):
                part = slice(*batch.cu_seqlens[index : index + 2].tolist())
                assert batch.continues[index] == (document in found)
                found[document] = found.get(document, b"") + bytes(batch.ids[0, part].tolist())
                labels = batch.labels[0, part]
                assert labels[:-1].tolist() == batch.ids[0, part][1:].tolist()
                assert (labels[-1] == -100) == (not batch.goes_on[index])
        assert [found[index].decode() for index in range(40)] == stories()

    @pytest.mark.parametrize(
        ("texts", "options", "words"),
        [
            (None, {"tokens": 8, "long": "drop"}, "every document is too short, or longer than data.tokens 8"),
            (["a", ""] * 9, {"tokens": 8, "long": "truncate"}, "every document is too short$"),
            ([""] * 9, {}, "every document is too short$"),
        ],
    )
    def test_a_stream_of_which_no_batch_can_be_made_is_told(self, tmp_path, dataset, texts, options, words):
        """And not read again and again."""
        if texts is not None:
            (tmp_path / "rows").mkdir()
            write_lines(tmp_path / "rows" / "train.jsonl", texts)
            write_lines(tmp_path / "rows" / "validation.jsonl", ["one two"])
            dataset = str(tmp_path / "rows")
        module = corpus(tmp_path, dataset=dataset, streaming=True, validation_split="validation", **options)
        module.setup()
        with pytest.raises(ValueError, match=words):
            batches(module, 1)

    def test_groups_of_processes_take_the_batches_of_a_stream_in_turn(self, tmp_path, dataset):
        options = {"dataset": dataset, "streaming": True, "validation_split": "validation"}
        found = []
        for rank, size in ((0, 1), (0, 2), (1, 2)):
            module = corpus(tmp_path, **options)
            module.setup()
            stand_at(module, 0, ranks=(rank, size))
            found.append(batches(module, 6 // size))
        assert all(map(torch.equal, found[0], itertools.chain.from_iterable(zip(*found[1:], strict=True))))
        module = corpus(tmp_path, **options, tokens=50)
        module.setup()
        stand_at(module, 0, ranks=(0, 2))
        with pytest.raises(ValueError, match=r"a document would go on in another group's; choose data\.long truncate"):
            module.train_dataloader()

    def test_what_cannot_be_had_is_told(self, tmp_path, dataset):
        with pytest.raises(FileNotFoundError, match=r"hf download owner/name --repo-type dataset --local-dir FOLDER"):
            corpus(tmp_path, dataset="owner/name").setup()
        with pytest.raises(FileNotFoundError, match="take it from there"):
            corpus(tmp_path, dataset="owner/name", download="take it from there").setup()
        with pytest.raises(FileNotFoundError, match=r'Unknown split "nothing"'):
            corpus(tmp_path, dataset=dataset, validation_split="nothing").setup()
        for streaming in (False, True):
            with pytest.raises(ValueError, match=r"has no column 'words', it has text"):
                corpus(tmp_path, dataset=dataset, column="words", streaming=streaming).setup()


FASTA = """>one first
ACGTACGTNN
acgtryac
>two

GGGG
CC
>three
TTTTTTTA"""


class TestDna:
    @pytest.mark.parametrize("name", ["a.fa", "a.fasta.gz"])
    @pytest.mark.usefixtures("small_pieces")
    def test_records_are_documents(self, tmp_path, name, monkeypatch):
        monkeypatch.setattr(texts, "PIECE", 9)
        path = tmp_path / name
        path.write_bytes(gzip.compress(FASTA.encode()) if name.endswith("gz") else FASTA.encode())
        source = Files([path])
        documents: list[str] = []
        for part in (part for piece in range(source.pieces) for part in source.parts(piece)):
            documents += [""] if part.begins else []
            documents[-1] += part.text.decode()
        assert documents == ["ACGTACGTNNACGTNNAC", "GGGGCC", "TTTTTTTA"]
        assert name.endswith("gz") or source.pieces > 3

    def test_nucleotides_and_kmers(self, tmp_path):
        for k, tokens in ((1, list("ACGTNACGTTA")), (3, ["ACG", "T", "N", "ACG", "TTA"])):
            tokenizer = nucleotides(k)
            ids = tokenizer.encode("ACGTNACGTTA")
            assert [tokenizer.inner.id_to_token(index) for index in ids] == tokens
            assert tokenizer.decode(ids) == "ACGTNACGTTA"
            tokenizer.save(tmp_path)
            loaded = load_tokenizer(tmp_path)
            assert (loaded.digest(), type(loaded)) == (tokenizer.digest(), type(tokenizer))
        assert nucleotides(6).vocab_size == 4**6 + 6

    @pytest.mark.parametrize("tokenizer", [nucleotides(), nucleotides(3), ByteTokenizer()])
    def test_the_other_strand(self, tokenizer):
        table = complements(tokenizer)
        text = "ACGTTTGACCCATTA"
        other = text[::-1].translate(str.maketrans("ACGT", "TGCA"))
        assert tokenizer.decode(table[tokenizer.encode(text)][::-1].tolist()) == other
        assert table[table].tolist() == list(range(tokenizer.vocab_size))

    def test_small_letters_and_what_is_no_nucleotide_on_the_other_strand(self):
        assert bytes(complements(ByteTokenizer())[list(b"acgtNn\n")].tolist()) == b"tgcaNn\n"

    def test_half_of_the_windows_are_of_the_other_strand(self, tmp_path):
        random = np.random.default_rng(0)
        letters = "".join("ACGT"[one] for one in random.integers(0, 4, 4000))
        (tmp_path / "a.fa").write_text(f">one\n{letters}\n")
        (tmp_path / "b.fa").write_text(">two\nACGTACGT\n")
        options = {"tokenizer": "nucleotides", "validation_files": [str(tmp_path / "b.fa")], "context": 20}
        files = [str(tmp_path / "a.fa")]
        for packed in ({}, {"tokens": 5000}):
            module = corpus(tmp_path, files, reverse_complement=True, batch_size=30, **options, **packed)
            module.setup()
            rows = [row for batch in batches(module, 20) for row in ([batch.ids[0]] if packed else batch)]
            found = [module.tokenizer.decode(row.tolist()) in letters for row in rows]
            assert 0.2 < sum(found) / len(found) < 0.8
            table = complements(module.tokenizer)
            assert all(
                module.tokenizer.decode(table[row.flip(0)].tolist()) in letters
                for row, one in zip(rows, found, strict=True)
                if not one
            )
            again = corpus(tmp_path, files, reverse_complement=True, batch_size=30, **options, **packed)
            again.setup()
            first, second = (batches(one, 7)[6] for one in (module, again))
            assert torch.equal(first.ids if packed else first, second.ids if packed else second)

    def test_the_parts_of_a_document_are_all_of_one_strand(self):
        tokenizer = nucleotides()
        document = np.random.default_rng(0).integers(1, 6, 500)
        table = complements(tokenizer)
        strands = [document.tolist(), table[document][::-1].tolist()]
        packed = PackedDocuments(document, np.array([500]), tokens=64, complement=table)
        seen = set()
        parts = iter(packed)
        for _ in range(12):
            batches = list(itertools.islice(parts, 8))
            ids = torch.cat([batch.ids[0] for batch in batches]).tolist()
            labels = torch.cat([batch.labels[0] for batch in batches]).tolist()
            assert ids in strands
            assert labels == [*ids[1:], -100]
            seen.add(strands.index(ids))
        assert seen == {0, 1}

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("ACGT\n>one\nAC\n", r"a\.fa, line 1: FASTA begins with a line of '>' and a name, got b'ACGT'"),
            (">one\nACGT\n>two\nAC-T\n", r"a\.fa, line 4: a sequence has the letters ACGT.*, got '-'"),
            (">one\n>two\nAC\n", r"a\.fa, line 2: the record 'one' before it is empty"),
            (">one\nACGT\n>two\n", r"a\.fa, line 3: the last record is empty; the file may be cut short"),
        ],
    )
    @pytest.mark.parametrize("piece", [1, 1 << 20])
    def test_what_is_no_fasta_is_named_by_its_line(self, tmp_path, monkeypatch, text, words, piece):
        monkeypatch.setattr(texts, "PIECE", piece)
        (tmp_path / "a.fa").write_text(text)
        with pytest.raises(ValueError, match=words):
            corpus(tmp_path, [str(tmp_path / "a.fa")], tokenizer="nucleotides").setup()


class TestErrors:
    @pytest.mark.parametrize(
        ("name", "content", "words"),
        [
            ("a.jsonl", b'{"text": "a"}\n{"text": "b', r"a\.jsonl, line 2 is no JSON: .*; the file may be cut short"),
            ("a.jsonl", b'{"text": "a"}\n\n{"words": "b"}\n', r"a\.jsonl, line 3 has no 'text', it has words"),
            ("a.jsonl", b'{"text": "a"}\n{"text": 3}\n', r"a\.jsonl, line 2: 'text' must be text, got int"),
            ("a.jsonl", b"[1]\n", r"a\.jsonl, line 1 has no 'text', it has list"),
            ("a.parquet", b"PAR1 and so on", r"a\.parquet is damaged, cut short, or no parquet file"),
            (
                "a.jsonl.gz",
                gzip.compress(b'{"text": "a"}\n' * 999, mtime=0)[:40],
                r"a\.jsonl\.gz is damaged or cut short",
            ),
            ("a.zip", b"PK", r"a\.zip is damaged or cut short"),
            ("a.txt", b"fine\n\xff\xfe", r"a\.txt, from byte 0 on: no UTF-8, byte 5 of 7"),
            ("a.txt", b"", r"a\.txt is empty"),
        ],
    )
    def test_damage_is_named(self, tmp_path, name, content, words):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=words):
            corpus(tmp_path, [str(tmp_path / name)], tokenizer="characters").setup()

    def test_rows_of_later_pieces_are_named_by_their_line(self, tmp_path, monkeypatch):
        monkeypatch.setattr(texts, "PIECE", 33)
        (path,) = write_lines(tmp_path / "a.jsonl", stories(9))
        lines = Path(path).read_text().splitlines(keepends=True)
        for number in range(9):
            Path(path).write_text("".join([*lines[:number], "broken\n", *lines[number + 1 :]]))
            source = Files([Path(path)])
            assert source.pieces > 9
            with pytest.raises(ValueError, match=rf"line {number + 1} is no JSON"):
                list(itertools.chain.from_iterable(map(source.parts, range(source.pieces))))

    def test_a_damaged_row_group_is_named(self, tmp_path):
        (path,) = write_parquet(tmp_path / "a.parquet", stories())
        data = bytearray(Path(path).read_bytes())
        data[len(data) // 2 - 200 : len(data) // 2] = b"\xff" * 200
        Path(path).write_bytes(bytes(data))
        with pytest.raises(ValueError, match=r"a\.parquet, rows \d+ to \d+, is damaged"):
            corpus(tmp_path, [path]).setup()

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({}, "either files or a dataset is read"),
            ({"files": ["a"], "dataset": "b"}, "either files or a dataset is read"),
            ({"files": ["a"], "sizes": [1]}, "sizes must be two or three numbers of bytes"),
            ({"files": ["a"], "sizes": [1, 2], "test_files": ["b"]}, "sizes divide a single file"),
            ({"files": ["a"], "streaming": True}, "streaming, splits, subset and revision are of a dataset"),
            ({"dataset": "a", "test_files": ["b"]}, "validation_files and test_files stand beside files"),
            ({"dataset": "a", "max_tokens": 3}, "max_tokens is of a stream"),
            ({"dataset": "a", "joined": True}, "joined rows are one text, of which no share is held out"),
            ({"dataset": "a", "validation_split": "train"}, "splits must differ, got 'train', 'train' and None"),
            ({"files": ["a"], "validation_fraction": 0.0}, "validation_fraction must lie between 0 and 1, got 0.0"),
            ({"files": ["a"], "tokens": 1}, "tokens must be at least 2"),
            ({"files": ["a"], "long": "cut", "tokens": 9}, "there is no long='cut'"),
            ({"dataset": "a", "streaming": True, "tokenizer": "characters"}, "the characters of a stream are not"),
            ({"files": ["/nowhere/a.txt"], "download": "fetch b"}, "there is no file /nowhere/a.txt; fetch b"),
        ],
    )
    def test_wrong_options_are_named(self, options, words):
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            Corpus(**options).setup()

    def test_too_little_is_named(self, tmp_path):
        files = write_texts(tmp_path, ["word " * 10])
        with pytest.raises(ValueError, match=r"0 validation tokens in 0 documents \(validation_fraction 1e-05\)"):
            corpus(tmp_path, files, validation_fraction=1e-5).setup()
        with pytest.raises(ValueError, match="gives 20 training tokens, at least 101 are needed"):
            corpus(tmp_path, files, sizes=[20, 10], context=100).setup()
        with pytest.raises(ValueError, match="leave nothing of"):
            corpus(tmp_path, files, validation_files=files).setup()
        more = [str(tmp_path / name) for name in ("one.dat", "none.dat")]
        for path, text in zip(more, ("word " * 10, ""), strict=True):
            Path(path).write_text(text)
        for side in ("validation", "test"):
            sides = {"validation_files": more[:1], f"{side}_files": more[1:]}
            with pytest.raises(ValueError, match=rf"none\.dat is empty: there is nothing for {side}"):
                corpus(tmp_path, files, **sides).setup()
        with pytest.raises(ValueError, match=r"one\.dat is of validation_files and of test_files"):
            corpus(tmp_path, files, validation_files=more[:1], test_files=[str(tmp_path / "on?.dat")]).setup()

    def test_tokens_without_a_complement_are_named(self, tmp_path):
        files = write_lines(tmp_path / "a.jsonl", stories())
        with pytest.raises(ValueError, match="reverse_complement needs tokens of ACGNT and their complements"):
            corpus(tmp_path, files, tokenizer="characters", reverse_complement=True).setup()


class TestTokenizers:
    def test_text_appears_as_its_characters_are_whole(self, bpe):
        tokenizer = load_tokenizer(bpe)
        text = "once é€😀 upon a time " * 4
        ids = tokenizer.encode(text)
        pieces = list(tokenizer.stream(iter(ids)))
        assert "".join(pieces) == text
        assert all("\ufffd" not in piece for piece in pieces)
        assert "".join(tokenizer.stream(iter(ids[7:]), ids[:7])) == text[len(tokenizer.decode(ids[:7])) :]
        assert "".join(tokenizer.stream(iter(ids[:-1] + tokenizer.encode("😀")[:-1]))).endswith("\ufffd")

    def test_a_table_reads_characters_as_the_package_does(self, tmp_path):
        tokenizer = characters(stories())
        for text in ("Story 3: é€😀\nOnce", "unknown: \u03a9 ~", ""):
            ids = tokenizer.encode(text)
            assert ids == PieceTokenizer.encode(tokenizer, text)
            assert [one.tolist() for one in tokenizer.encode_many([text, "a"])] == [ids, tokenizer.encode("a")]
        tokenizer.save(tmp_path)
        assert type(load_tokenizer(tmp_path)) is type(tokenizer)
        with pytest.raises(ValueError, match="the text is empty"):
            characters([""])

    def test_numbers_may_have_gaps(self):
        inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 9}, unk_token="a"))
        assert PieceTokenizer(inner).vocab_size == 10


def test_the_standard_library_in_bytes_is_what_its_files_hold(tmp_path):
    folder = resolve_folder("{stdlib}")
    module = corpus(tmp_path, [str(folder / "json/*.py"), str(folder / "email/*.py")])
    module.setup()
    paths = sorted(folder.glob("json/*.py")) + sorted(folder.glob("email/*.py"))
    chosen = [path.read_bytes() for path in paths if not is_held(path.name.encode(), 0.2)]
    assert module.side("training").ids[:].tobytes() == b"".join(chosen)
    assert module.bytes_per_token("training") == 1.0
