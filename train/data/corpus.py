"""Language corpora: local files and data sets of the package datasets, read with any tokenizer."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from seqzoo.models.tokenizer import ByteTokenizer, Tokenizer, characters, load_tokenizer, nucleotides
from seqzoo.modules.options import check_count, check_flags
from seqzoo.train.baselines import compressed_bits_per_byte as compressed
from seqzoo.train.data.language import LanguageData
from seqzoo.train.data.shards import data_folder
from seqzoo.train.data.strands import complements
from seqzoo.train.data.streams import Position, Stream, StreamedBatches, stored
from seqzoo.train.data.texts import Files, Missing, Rows, Source, find
from seqzoo.train.data.tokenised import Tokens, as_text, is_held, tokenised
from seqzoo.train.data.windows import replica

KMERS = re.compile(r"([1-8])-mers")


class Corpus(LanguageData):
    """Next-token prediction on texts: local files, or a data set of the package datasets.

    Files are told apart by the ends of their names: JSON lines (``.jsonl``), parquet, FASTA (``.fa``, ``.fasta``,
    ``.fna``), anything else is text; ``.gz`` and ``.zip`` are unpacked. A row, a record or a file of text is a
    document; behind it stands the token that the tokenizer has between texts, where it has one.

    The tokens are written once, in shards that are mapped from the cache folder, in a folder of their own for every
    content of the data and every tokenizer. A stream (``streaming``) is known by its names and revision alone, is read
    in its own order, and, without ``max_tokens``, anew by every run, whose checkpoints keep the place.

    Training reads windows at random places; or, where ``tokens`` is given, documents, packed into batches. Validation
    reads all tokens in order, with the state handed on.

    Args:
        files: Patterns of files to train on.
        validation_files: Of files to validate on, which training leaves out.
        test_files: Of files to test on, likewise.
        sizes: Bytes of a single text to train on, to validate on, and to test on, one behind the other.
        dataset: Name on the Hugging Face Hub, or a folder, for ``datasets.load_dataset``, in place of files.
        subset: Of the data set, where it has several.
        split: To train on.
        validation_split: To validate on; None holds out a fraction.
        test_split: To test on.
        revision: Of the data set on the Hub.
        streaming: Whether the data set is read as it is downloaded.
        max_tokens: Training tokens of a stream that are kept on the disk, at least one shard; None keeps none.
        validation_tokens: Tokens of a stream to validate on, at most.
        column: Column, or key of JSON lines, that holds the text.
        joined: Whether the rows are parts of one text, with nothing between them.
        validation_fraction: Share of documents that is held out where nothing else validates: rows by a hash of their
            text, records and files by one of their name.
        tokenizer: "bytes"; "characters", those of the training data; "nucleotides" or "6-mers" (of 1 to 8) for DNA; a
            tokenizer.json or a folder that holds one; or owner/name on the Hugging Face Hub.
        reverse_complement: Whether half of all that is read of DNA is read on the other strand, backwards.
        context: Tokens of a window.
        batch_size: Windows of a step, in every process, or group of processes that share sequences.
        tokens: Tokens of a batch of packed documents; None trains on windows.
        long: What becomes of a document that is longer: "carry" cuts it into batches that follow one another, from each
            of which the next takes the state, without gradients; "truncate" keeps its beginning, "drop" leaves it out,
            "error" refuses it.
        validation_streams: Streams in which the validation tokens are read, side by side.
        cache: Folder for the tokens; None means ``data`` in SeqZoo's cache folder.
        verify: Whether the checksums of tokens that are there are compared before they are used.
        download: What to do where the data are missing, for the error.
        seed: Of the order; the command sets it from its own.

    Raises:
        ValueError: If options contradict each other, or one is out of range.
    """

    def __init__(
        self,
        files: list[str] | None = None,
        validation_files: list[str] | None = None,
        test_files: list[str] | None = None,
        sizes: list[int] | None = None,
        dataset: str | None = None,
        subset: str | None = None,
        split: str = "train",
        validation_split: str | None = None,
        test_split: str | None = None,
        revision: str | None = None,
        streaming: bool = False,
        max_tokens: int | None = None,
        validation_tokens: int = 1_000_000,
        column: str = "text",
        joined: bool = False,
        validation_fraction: float = 0.05,
        tokenizer: str = "bytes",
        reverse_complement: bool = False,
        context: int = 512,
        batch_size: int = 16,
        tokens: int | None = None,
        long: str = "carry",
        validation_streams: int = 16,
        cache: str | None = None,
        verify: bool = True,
        download: str = "",
        seed: int = 0,
    ) -> None:
        super().__init__(context, batch_size, validation_streams, tokens, long, seed)
        check_flags(streaming=streaming, joined=joined, reverse_complement=reverse_complement, verify=verify)
        if (files is None) == (dataset is None):
            raise ValueError(f"either files or a dataset is read, got files {files} and dataset {dataset}")
        if not 0.0 < validation_fraction < 1.0:
            raise ValueError(f"validation_fraction must lie between 0 and 1, got {validation_fraction}")
        if sizes is not None and (len(sizes) not in (2, 3) or min(sizes) < 1):
            raise ValueError(f"sizes must be two or three numbers of bytes, to train, validate and test, got {sizes}")
        if sizes is not None and (validation_files or test_files or dataset):
            raise ValueError("sizes divide a single file; leave validation_files, test_files and dataset out")
        if dataset is None and (streaming or validation_split or test_split or subset or revision):
            raise ValueError("streaming, splits, subset and revision are of a dataset; files have none of them")
        if dataset is not None and (validation_files or test_files):
            raise ValueError("validation_files and test_files stand beside files; a dataset has splits")
        if joined and not (validation_files or validation_split):
            raise ValueError("joined rows are one text, of which no share is held out; name validation_split or _files")
        if dataset is not None and len({split, validation_split, test_split} - {None}) < sum(
            one is not None for one in (split, validation_split, test_split)
        ):
            raise ValueError(f"splits must differ, got {split!r}, {validation_split!r} and {test_split!r}")
        if max_tokens is not None and not streaming:
            raise ValueError("max_tokens is of a stream; with streaming false all tokens are kept")
        if max_tokens is not None:
            check_count("max_tokens", max_tokens)
        self.files = {"training": files, "validation": validation_files, "test": test_files}
        self.sizes = sizes
        self.dataset, self.subset, self.revision = dataset, subset, revision
        self.splits = {"training": split, "validation": validation_split, "test": test_split}
        self.streaming, self.max_tokens = streaming, max_tokens
        self.validation_tokens = check_count("validation_tokens", validation_tokens)
        self.column, self.joined = column, joined
        given = validation_files or validation_split or sizes
        self.fraction = 0.0 if given else validation_fraction
        self.named = tokenizer
        self.reverse_complement = reverse_complement
        self.cache = data_folder() if cache is None else Path(cache).expanduser()
        self.verify = verify
        self.download = download
        self._position: Position | None = None
        self._streamed: StreamedBatches | None = None

    def source(self, side: str = "training") -> str:
        """Files or data set."""
        if self.dataset is None:
            return ", ".join(self.files[side] or self.files["training"] or [])
        return " ".join(word for word in (self.dataset, self.subset, self.splits[side]) if word)

    @property
    def tokenizer_words(self) -> str:
        """The tokenizer, by its name."""
        return "bytes" if isinstance(self.tokenizer, ByteTokenizer) else f"the tokens of tokenizer {self.named!r}"

    @property
    def unbounded(self) -> bool:
        """Whether training reads a stream of which nothing is kept."""
        return self.streaming and self.max_tokens is None

    @property
    def longest(self) -> tuple[str, int]:
        """As the base class's; of a document of a stream nothing is known but where it is cut."""
        if not self.unbounded or self.tokens is None:
            return super().longest
        if self.long == "carry":
            return "what a document of a stream can have", 1 << 62
        return max(("data.context", self.context), ("data.tokens", self.tokens), key=lambda pair: pair[1])

    def setup(self, stage: str | None = None) -> None:
        """Reads the data, or what of a stream validates, once.

        Raises:
            FileNotFoundError: If they are not there; says what to download.
            ValueError: If they are damaged or too few; a document is too long where that is an error.
        """
        if self.sides:
            return
        if self.unbounded:
            self.sides = self.read()
        else:
            super().setup(stage)
        if self.reverse_complement:
            self.complement = complements(self.tokenizer)

    def read(self) -> dict[str, Tokens]:
        """Makes tokens of the texts, where that was not done before."""
        if self.streaming:
            found = self._stored()
        else:
            sources = self._sources()
            for side, source in sources.items():
                if source.pieces == 0:
                    raise ValueError(f"{self.source(side)} is empty: there is nothing for {side}")
            self.tokenizer = self._tokenizer(sources["training"])
            found = tokenised(sources["training"], self.tokenizer, self.cache, self.fraction, self.verify)
            for side in sources.keys() - {"training"}:
                parts = tokenised(sources[side], self.tokenizer, self.cache, verify=self.verify)
                found[side] = parts["training"]
        held = found["validation"]
        if held.ids.size < 2:
            raise ValueError(
                f"{self.source()} gives {held.ids.size} validation tokens in {len(held.bounds) - 1} documents "
                f"(validation_fraction {self.fraction}); raise it, or name validation_files, validation_split or sizes"
            )
        return found

    def description(self) -> dict[str, str | int]:
        """What was read, and the fingerprint of the tokenizer."""
        own: dict[str, str | int] = {"tokenizer": self.named, "tokenizer_digest": self.tokenizer.digest()}
        if not self.unbounded:
            own |= {f"{side}_tokens": self.side(side).ids.size for side in ("training", "validation")}
            return super().description() | own
        held = self.side("validation")
        own |= {"folder": self.source(), "validation_bytes": held.bytes, "validation_tokens": held.ids.size}
        return own | {"validation_documents": len(held.bounds) - 1, "validation_digest": held.digest}

    def words(self, side: str) -> str:
        """How much a side has, in words."""
        return "a stream" if self.unbounded and side == "training" else super().words(side)

    def bytes_per_token(self, side: str) -> float:
        """Of the texts of a side; those of a stream are not counted, and validation stands for them."""
        return super().bytes_per_token("validation" if self.unbounded else side)

    def baselines(self) -> dict[str, float]:
        """As the base class's; to a stream nothing is fitted."""
        return compressed(self.text("validation")) if self.unbounded else super().baselines()

    def train_dataloader(self) -> Any:
        """Batches from the step on at which the trainer stands."""
        if not self.unbounded:
            return super().train_dataloader()
        rank, world_size = replica(self.trainer)
        self._streamed = StreamedBatches(
            self._stream("training"),
            self.tokenizer,
            context=self.context,
            batch_size=self.batch_size,
            tokens=self.tokens,
            long=self.long,
            seed=self.seed,
            complement=self.complement,
            rank=rank,
            world_size=world_size,
            position=self._position,
            remembered=4 if self.trainer is None else 3 + self.trainer.accumulate_grad_batches,
        )
        return self._streamed

    def state_dict(self) -> dict[str, Any]:
        """Where a stream of which nothing is kept stands; else nothing, as the step alone says what comes."""
        if self._streamed is None or self.trainer is None:
            return {}
        return {"position": self._streamed.position(self.trainer.global_step * self.trainer.accumulate_grad_batches)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from there."""
        self._position = state_dict.get("position")

    def _sources(self) -> dict[str, Source]:
        if self.dataset is not None:
            return {
                side: Rows(self._load(split), f"{self.dataset} {split}", self.column, self.joined)
                for side, split in self.splits.items()
                if split is not None
            }
        paths = {side: find(patterns, self.download) for side, patterns in self.files.items() if patterns}
        if self.sizes is None:
            judged = [{path.resolve() for path in paths.get(side, [])} for side in ("validation", "test")]
            if both := judged[0] & judged[1]:
                raise ValueError(
                    f"{min(both)} is of validation_files and of test_files; what chooses weights is no test"
                )
            held = judged[0] | judged[1]
            paths["training"] = [path for path in paths["training"] if path.resolve() not in held]
            if not paths["training"]:
                raise ValueError(f"validation_files and test_files leave nothing of {self.source()} to train on")
            return {side: Files(found, self.column, self.joined) for side, found in paths.items()}
        bounds = np.cumsum([0, *self.sizes]).tolist()
        return {
            side: Files(paths["training"], self.column, span=(first, last))
            for side, first, last in zip(("training", "validation", "test"), bounds, bounds[1:], strict=False)
        }

    def _stored(self) -> dict[str, Tokens]:
        """The sides of streams that are kept: where training has no bound, those that judge it."""
        self.tokenizer = self._tokenizer(None)
        sides = {"validation": self.validation_tokens}
        if self.splits["test"] is not None:
            sides["test"] = self.validation_tokens
        if self.max_tokens is not None:
            sides["training"] = self.max_tokens
        return {
            side: stored(self._stream(side), self.tokenizer, self.cache, most, self.verify)
            for side, most in sides.items()
        }

    def _stream(self, side: str) -> Stream:
        split = self.splits[side] or self.splits["training"]
        divided = split == self.splits["training"]
        names = {"dataset": self.dataset, "subset": self.subset, "split": split, "revision": self.revision}
        return Stream(
            lambda: self._load(split),
            names,
            name=f"{self.dataset} {split}",
            column=self.column,
            joined=self.joined,
            fraction=self.fraction if divided else 0.0,
            held=side == "validation" and divided,
        )

    def _load(self, split: str | None) -> Any:
        import datasets
        from datasets.exceptions import DatasetsError

        try:
            return datasets.load_dataset(
                str(self.dataset), self.subset, split=split, revision=self.revision, streaming=self.streaming
            )
        # a missing network, repository, subset or split and a damaged file raise errors of many classes below these
        except (OSError, ValueError, RuntimeError, DatasetsError) as error:
            words = str(error).partition("\n")[0]
            cause = f" ({str(error.__cause__).partition(chr(10))[0]})" if error.__cause__ else ""
            how = self.download or (
                f"download it with `hf download {self.dataset} --repo-type dataset --local-dir FOLDER` and give "
                "--data.dataset FOLDER"
            )
            name = " ".join(word for word in (self.dataset, self.subset, split) if word)
            raise Missing(f"the data set {name} cannot be read: {words}{cause}; {how}") from error

    def _tokenizer(self, training: Source | None) -> Tokenizer:
        """The tokenizer that was named; characters are those of the training documents."""
        kmers = KMERS.fullmatch(self.named)
        if kmers or self.named == "nucleotides":
            return nucleotides(int(kmers[1]) if kmers else 1)
        if self.named != "characters":
            return load_tokenizer(self.named)
        if training is None:
            raise ValueError("the characters of a stream are not known before it is read; name a tokenizer.json")
        parts = (part for piece in range(training.pieces) for part in training.parts(piece))
        return characters(as_text(part) for part in parts if not is_held(part.key, self.fraction))
