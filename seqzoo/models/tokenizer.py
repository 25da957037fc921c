"""Text as tokens: bytes, or the pieces of a ``tokenizer.json``."""

from __future__ import annotations

import codecs
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

FILE = "tokenizer.json"
BYTES = 256
# what published tokenizers call the token between texts
ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")
# what stands for a character that is not in the vocabulary
UNKNOWN = "<unknown>"
# Oniguruma's (?m) lets the dot match newlines
CHARACTER = "(?m:.)"
NUCLEOTIDES = "ACGNT"
# tokens by whose text the next one may be written otherwise: a character of several tokens, a space at the begin
NEIGHBOURS = 8


class Tokenizer(Protocol):
    """What turns text into tokens and back.

    Attributes:
        vocab_size: Tokens that there are.
        end: The token between texts; None where there is none.
    """

    vocab_size: int
    end: int | None

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, without one at its begin or end."""
        ...

    def encode_many(self, texts: Sequence[str]) -> list[Sequence[int]]:
        """The tokens of each of the texts."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens."""
        ...

    def stream(self, tokens: Iterable[int], before: Sequence[int] = ()) -> Iterator[str]:
        """The text of tokens that come one by one behind others, each character as soon as it is whole."""
        ...

    def digest(self) -> str:
        """A fingerprint, as 32 hexadecimal digits: tokenizers that differ have different ones."""
        ...

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes what :func:`load_tokenizer` reads into a checkpoint's folder."""
        ...


class ByteTokenizer:
    """The bytes of UTF-8; there is nothing to save."""

    vocab_size: int = BYTES
    end: int | None = None

    def encode(self, text: str) -> list[int]:
        """The bytes of a text."""
        return list(text.encode("utf-8"))

    def encode_many(self, texts: Sequence[str]) -> list[Sequence[int]]:
        """The bytes of each of the texts."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of bytes; what is no UTF-8 becomes U+FFFD.

        Raises:
            ValueError: If a token is no byte.
        """
        return bytes(ids).decode("utf-8", errors="replace")

    def stream(self, tokens: Iterable[int], before: Sequence[int] = ()) -> Iterator[str]:
        """Text from bytes, each character when its last byte has come; what is no UTF-8 becomes U+FFFD."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token in tokens:
            text = decoder.decode(bytes([token]))
            if text:
                yield text
        rest = decoder.decode(b"", final=True)
        if rest:
            yield rest

    def digest(self) -> str:
        """That of the word for it."""
        return _fingerprint("bytes")

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Nothing: a checkpoint without ``tokenizer.json`` reads bytes."""


class PieceTokenizer:
    """A tokenizer of the package tokenizers.

    Args:
        inner: ``tokenizers.Tokenizer``.
        end: The token between texts, by its name; None looks for those that published tokenizers have.

    Raises:
        ValueError: If there is no token of that name.
    """

    def __init__(self, inner: Any, end: str | None = None) -> None:
        self.inner = inner
        # numbers may have gaps
        self.vocab_size: int = max(inner.get_vocab().values(), default=-1) + 1
        if end is not None and inner.token_to_id(end) is None:
            raise ValueError(f"the tokenizer has no token {end!r}")
        names = ENDS if end is None else (end,)
        self.end: int | None = next((i for i in map(inner.token_to_id, names) if i is not None), None)

    def encode(self, text: str) -> list[int]:
        """The tokens of a text."""
        return self.inner.encode(text, add_special_tokens=False).ids

    def encode_many(self, texts: Sequence[str]) -> list[Sequence[int]]:
        """The tokens of each of the texts, on all cores."""
        return [one.ids for one in self.inner.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, special ones left out."""
        return self.inner.decode(list(ids))

    def stream(self, tokens: Iterable[int], before: Sequence[int] = ()) -> Iterator[str]:
        """The text that tokens add to that of those before them."""
        ids = list(before)[-NEIGHBOURS:]
        first, told = 0, len(ids)
        for token in tokens:
            ids.append(token)
            known, text = self.decode(ids[first:told]), self.decode(ids[first:])
            # a character of which bytes are still to come
            if len(text) > len(known) and not text.endswith("\ufffd"):
                yield text[len(known) :]
                first, told = told, len(ids)
        rest = self.decode(ids[first:])[len(self.decode(ids[first:told])) :]
        if rest:
            yield rest

    def digest(self) -> str:
        """That of ``tokenizer.json``."""
        return _fingerprint(self.inner.to_str())

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes ``tokenizer.json``."""
        self.inner.save(str(Path(folder) / FILE))


class CharacterTokenizer(PieceTokenizer):
    """A :class:`PieceTokenizer` whose tokens are single characters, which a table reads in a hundredth of the time."""

    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        known = {token: index for token, index in inner.get_vocab().items() if len(token) == 1}
        order = sorted(known)
        self.points = np.array([ord(character) for character in order], dtype=np.uint32)
        self.numbers = np.array([known[character] for character in order], dtype=np.int64)
        self.unknown = inner.token_to_id(UNKNOWN)

    def encode(self, text: str) -> list[int]:
        """The characters' numbers."""
        return self.array(text).tolist()

    def encode_many(self, texts: Sequence[str]) -> list[Any]:
        """Those of each of the texts, as arrays."""
        return [self.array(text) for text in texts]

    def array(self, text: str) -> np.ndarray:
        """The characters' numbers, int64 ``(n,)``."""
        points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
        places = np.searchsorted(self.points, points).clip(max=self.points.size - 1)
        return np.where(self.points[places] == points, self.numbers[places], self.unknown)


def characters(text: Iterable[str]) -> CharacterTokenizer:
    """A tokenizer whose tokens are the characters of a text, in the order of their code points; 0 is any other one.

    Raises:
        ValueError: If the text is empty.
    """
    known = sorted(set().union(*map(set, text)))
    if not known:
        raise ValueError("a tokenizer of characters needs a text that has some; the text is empty")
    return CharacterTokenizer(_words([UNKNOWN, *known], CHARACTER))


def nucleotides(k: int = 1) -> PieceTokenizer:
    """A tokenizer of DNA: every k nucleotides A, C, G and T are a token, as of "The Nucleotide Transformer", Methods.

    Beside them are the single nucleotides and N, which stand where an N or the end leaves fewer than k (Dalla-Torre et
    al., https://doi.org/10.1101/2023.01.11.523679). Small letters are unknown.

    Args:
        k: Nucleotides of a token, from 1 to 8.

    Raises:
        ValueError: If k is out of range.
    """
    if not 1 <= k <= 8:
        raise ValueError(f"a token must have from 1 to 8 nucleotides, got {k}")
    if k == 1:
        return characters([NUCLEOTIDES])
    longer = ["".join(letters) for letters in itertools.product("ACGT", repeat=k)]
    return PieceTokenizer(_words([UNKNOWN, *NUCLEOTIDES, *longer], f"[ACGT]{{{k}}}|{CHARACTER}"))


def _words(known: Sequence[str], pattern: str) -> Any:
    """A tokenizer that looks up what a pattern cuts a text into; the first word is any other one."""
    tokenizers = _package()
    words = {word: index for index, word in enumerate(known)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token=known[0]))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    inner.decoder = tokenizers.decoders.Fuse()
    return inner


def _loaded(inner: Any) -> PieceTokenizer:
    """A tokenizer that was read, with the table where it is one of characters."""
    said = json.loads(inner.to_str())
    one_by_one = {"type": "Split", "pattern": {"Regex": CHARACTER}, "behavior": "Isolated", "invert": False}
    kind = (said["model"].get("type"), said["model"].get("unk_token"), said["pre_tokenizer"], said["normalizer"])
    if kind == ("WordLevel", UNKNOWN, one_by_one, None) and not said["added_tokens"]:
        return CharacterTokenizer(inner)
    return PieceTokenizer(inner)


def load_tokenizer(name: str | os.PathLike[str]) -> Tokenizer:
    """A tokenizer by name.

    Args:
        name: ``"bytes"``; a ``tokenizer.json``, or a folder that holds one; or a repository of the Hugging Face Hub.

    Raises:
        FileNotFoundError: If a path does not exist, the folder holds none, or the Hub does not give it.
        ImportError: If it is not ``"bytes"`` and the package tokenizers is not installed.
        ValueError: If the file is damaged.
    """
    if str(name) == "bytes":
        return ByteTokenizer()
    path = Path(name).expanduser()
    if path.is_dir() and not (path / FILE).is_file():
        raise FileNotFoundError(f"the folder {path} holds no {FILE}; save a tokenizer there, or name another")
    path = path / FILE if path.is_dir() else path
    tokenizers = _package()
    if not path.exists():
        if path.is_absolute() or path.suffix == ".json" or str(name).count("/") != 1:
            raise FileNotFoundError(
                f"there is no tokenizer {str(name)!r}; give 'bytes', a {FILE}, a folder with one, or owner/name of the "
                "Hugging Face Hub"
            )
        try:
            return _loaded(tokenizers.Tokenizer.from_pretrained(str(name)))
        except Exception as error:  # of no class of their own
            words = str(error).partition("\n")[0]
            raise FileNotFoundError(
                f"the Hub did not give the tokenizer {name}: {words}; download it with `hf download {name} {FILE} "
                "--local-dir FOLDER` and name FOLDER"
            ) from error
    try:
        return _loaded(tokenizers.Tokenizer.from_file(str(path)))
    except Exception as error:  # of no class of their own
        raise ValueError(f"{path} is no tokenizer that the package tokenizers reads: {error}") from error


def tokenizer_of(folder: str | os.PathLike[str], vocab_size: int) -> Tokenizer:
    """The tokenizer of a checkpoint: its ``tokenizer.json``, or bytes where the vocabulary is theirs.

    Raises:
        FileNotFoundError: If there is none and the vocabulary has more tokens than there are bytes.
        ValueError: If the tokenizer has more tokens than the vocabulary.
    """
    if (Path(folder) / FILE).is_file():
        return check_tokenizer(load_tokenizer(folder), vocab_size)
    if vocab_size != BYTES:
        raise FileNotFoundError(
            f"{folder} holds no {FILE}, and its vocabulary of {vocab_size} is not that of bytes; name a tokenizer"
        )
    return ByteTokenizer()


def check_tokenizer(tokenizer: Tokenizer, vocab_size: int) -> Tokenizer:
    """The tokenizer, where a model of so many tokens can read what it writes; a vocabulary may be rounded up.

    Raises:
        ValueError: If it has more tokens.
    """
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model's vocabulary {vocab_size}; take the tokenizer "
            "with which the model was trained"
        )
    return tokenizer


def _fingerprint(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8"), digest_size=16).hexdigest()


def _package() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(
            'a tokenizer other than "bytes" needs the package tokenizers: pip install tokenizers'
        ) from error
    return tokenizers
