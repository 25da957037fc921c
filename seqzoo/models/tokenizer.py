"""Text as tokens: bytes, or the pieces of a ``tokenizer.json``."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

FILE = "tokenizer.json"
BYTES = 256
# what published tokenizers call the token between texts
ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")


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

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens."""
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

    def decode(self, ids: Sequence[int]) -> str:
        """The text of bytes; what is no UTF-8 becomes U+FFFD.

        Raises:
            ValueError: If a token is no byte.
        """
        return bytes(ids).decode("utf-8", errors="replace")

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
        self.vocab_size: int = inner.get_vocab_size()
        if end is not None and inner.token_to_id(end) is None:
            raise ValueError(f"the tokenizer has no token {end!r}")
        names = ENDS if end is None else (end,)
        self.end: int | None = next((i for i in map(inner.token_to_id, names) if i is not None), None)

    def encode(self, text: str) -> list[int]:
        """The tokens of a text."""
        return self.inner.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, special ones left out."""
        return self.inner.decode(list(ids))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes ``tokenizer.json``."""
        self.inner.save(str(Path(folder) / FILE))


def characters(text: Iterable[str]) -> PieceTokenizer:
    """A tokenizer whose tokens are the characters of a text, in the order of their code points; 0 is any other one."""
    tokenizers = _package()
    known = ["<unknown>", *sorted(set().union(*map(set, text)))]
    words = {character: index for index, character in enumerate(known)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token=known[0]))
    # Oniguruma's (?m) lets the dot match newlines
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("(?m:.)"), "isolated")
    inner.decoder = tokenizers.decoders.Fuse()
    return PieceTokenizer(inner)


def load_tokenizer(name: str | os.PathLike[str]) -> Tokenizer:
    """A tokenizer by name.

    Args:
        name: ``"bytes"``; a ``tokenizer.json``, or a folder that holds one; or a repository of the Hugging Face Hub.

    Raises:
        FileNotFoundError: If a path does not exist, or the folder holds none.
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
        return PieceTokenizer(tokenizers.Tokenizer.from_pretrained(str(name)))
    try:
        return PieceTokenizer(tokenizers.Tokenizer.from_file(str(path)))
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


def _package() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(
            'a tokenizer other than "bytes" needs the package tokenizers: pip install tokenizers'
        ) from error
    return tokenizers
