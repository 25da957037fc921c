"""ListOps: the value of a nested expression of lists of digits.

"ListOps: A Diagnostic Dataset for Latent Tree Learning", https://arxiv.org/abs/1804.06028, section 2, with the lengths
of "Long Range Arena", https://arxiv.org/abs/2011.04006, section 2.2.1. Grown from the root, at depth 1: above the
greatest depth a node is an operator with probability 1/4, else a uniform digit, and at the greatest depth always a
digit; an operator is uniform among MIN, MAX, MED (the median, cut to an integer) and SM (the sum modulo 10) and has a
uniform number of arguments from 2 to ``max_args``. Trees are drawn until the length, which counts tokens (an operator,
a digit, a closing bracket), lies between the bounds.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from seqzoo.kernels.numba_runtime import threads_for
from seqzoo.train.data import compiled
from seqzoo.train.data.ragged import Ragged

# the place of a token is its id
TOKENS = (*"0123456789", "[MIN", "[MAX", "[MED", "[SM", "]")
# for a tree of the wanted length; of the published law one in twelve has it
ATTEMPTS = 1 << 16
BLOCK = 4096


class Law(NamedTuple):
    """What trees are drawn from.

    Attributes:
        above: A tree is longer than this.
        below: And shorter than this.
        max_depth: Nodes from the root to a digit, at most.
        max_args: Arguments of an operator, at most.
    """

    above: int = 500
    below: int = 2000
    max_depth: int = 10
    max_args: int = 10

    def check(self) -> None:
        """Raises ValueError where the law is none, or no tree follows it."""
        if not 0 <= self.above < self.below - 1:
            raise ValueError(f"above must be at least 0 and leave lengths below {self.below}, got {self.above}")
        for name, least, most in (("max_depth", 1, compiled.DEEPEST), ("max_args", 2, compiled.WIDEST)):
            value = getattr(self, name)
            if not least <= value <= most:
                raise ValueError(f"{name} must be from {least} to {most}, got {value}")
        # an operator costs two tokens, and every one but the deepest may have max_args operators below it
        longest = 1
        for _ in range(self.max_depth - 1):
            longest = 2 + self.max_args * longest
        if longest <= self.above:
            raise ValueError(
                f"a tree of max_depth {self.max_depth} and max_args {self.max_args} has at most {longest} tokens, but "
                f"must have more than {self.above}; lower above, or raise one of the two"
            )


def tree(seed: int, index: int, law: Law = Law()) -> NDArray[np.uint8]:  # noqa: B008 a tuple, which nothing changes
    """The tree of an index, a pure function of its arguments: the ids of its tokens, uint8 ``(length,)``.

    Raises:
        ValueError: If a number is out of range, or the law hardly ever gives a tree of such a length.
    """
    tokens, lengths = _block(seed, index, 1, law)
    return tokens[0, : lengths[0]].copy()


def generate(seed: int, count: int, law: Law = Law()) -> Ragged:  # noqa: B008
    """So many different trees: those of the indices from 0 on, without what was there before.

    Args:
        seed: Of all trees, from 0 to 2^64 - 1.
        count: How many.
        law: What they are drawn from.

    Returns:
        The trees, labelled with their values.

    Raises:
        ValueError: If a number is out of range, or there are not so many trees.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    known: set[bytes] = set()
    trees: list[NDArray[np.uint8]] = []
    for first in itertools.count(0, BLOCK):
        if first > 16 * count + BLOCK:
            raise ValueError(f"{first} draws gave {len(trees)} different trees, {count} are wanted; widen {law}")
        for row, length in zip(*_block(seed, first, BLOCK, law), strict=True):
            text = row[:length].tobytes()
            if text not in known:
                known.add(text)
                trees.append(row[:length].copy())
        if len(trees) >= count:
            break
    return _labelled(trees[:count])


def values(trees: Ragged) -> NDArray[np.int64]:
    """The value of every expression, int64 ``(n,)``; -1 where tokens are no expression."""
    found = np.empty(len(trees), dtype=np.int64)
    compiled._values(threads_for(trees.tokens.size), trees.tokens, trees.bounds, found)
    return found


def text(tokens: NDArray[np.uint8]) -> str:
    """An expression in words."""
    return " ".join(TOKENS[token] for token in tokens.tolist())


def read_official(path: Path) -> Ragged:
    """Reads a file of the release, ``basic_train.tsv`` and its like: a header, then source and target a row.

    Round brackets, which the release adds to make a binary tree, are left out.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a row is not two columns, holds an unknown token, is no whole expression, or has another target
            than its value; names the file and the row, counted from 1 with the header.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no file {path}: the folder of the released ListOps holds basic_train.tsv, basic_val.tsv and "
            "basic_test.tsv (lra_release.gz of Long Range Arena, lra_release/listops-1000)"
        )
    ids = {token: number for number, token in enumerate(TOKENS)} | {"(": -1, ")": -1}
    trees, targets = [], []
    # bytes that are no text become words that are no tokens, which are named with their row
    with path.open(encoding="utf-8-sig", errors="backslashreplace") as file:
        rows = (line.rstrip("\n").split("\t") for line in file)
        header = next(rows, None)
        if header != ["Source", "Target"]:
            found = "an empty file" if header is None else "\t".join(header)[:40]
            raise ValueError(f"{path}, row 1: expected the header Source, Target, got {found!r}")
        for number, row in enumerate(rows, start=2):
            if len(row) != 2:
                raise ValueError(f"{path}, row {number}: expected 2 columns, source and target, got {len(row)}")
            try:
                tokens = [ids[word] for word in row[0].split()]
            except KeyError as error:
                raise ValueError(
                    f"{path}, row {number}: unknown token {error.args[0]!r}; known are {' '.join(ids)}"
                ) from None
            if row[1] not in TOKENS[: compiled.DIGITS]:
                raise ValueError(f"{path}, row {number}: the target must be a digit, got {row[1]!r}")
            trees.append(np.array([token for token in tokens if token >= 0], dtype=np.uint8))
            targets.append(int(row[1]))
    if not trees:
        raise ValueError(f"{path} has a header and no row; expected one expression a row")
    read = Ragged.join(trees, targets)
    found = values(read)
    for number, (value, target) in enumerate(zip(found.tolist(), targets, strict=True), start=2):
        if value == -1:
            raise ValueError(f"{path}, row {number}: the source is no whole expression; the file may be cut short")
        if value != target:
            raise ValueError(f"{path}, row {number}: the target is {target}, but the source's value is {value}")
    return read


def depth_oracle(fit: Ragged, trees: Ragged, max_depth: int = 10) -> dict[str, float]:
    """What accuracy is reached by who evaluates but the top levels of a tree, and knows the law of what is below.

    Who sees k levels knows the operators and digits of depth at most k, and of depth k + 1 the digits, and the names of
    the operators; what these give is a random variable with the distribution that operators of that name and depth have
    in ``fit``. The answer is the likeliest value given all this, computed exactly.

    Args:
        fit: Trees from which the distributions are counted.
        trees: Trees that are answered.
        max_depth: Of both.

    Returns:
        The accuracy of the class that is most frequent in ``fit``, ``"class prior"``, and for k from 0 on of
        ``"k levels"``; 0 levels are the first token alone, and ``max_depth - 1`` the whole tree.

    Raises:
        ValueError: If there is no tree, or one is no expression.
    """
    for name, given in (("fit", fit), ("trees", trees)):
        if len(given) == 0 or values(given).min() < 0:
            raise ValueError(f"{name} must be one or more expressions, got {len(given)} rows that are not all one")
    threads = threads_for(fit.tokens.size)
    counts = np.zeros((threads, compiled.DEEPEST, 4, compiled.DIGITS), dtype=np.int64)
    compiled._value_counts(threads, fit.tokens, fit.bounds, counts)
    total = counts.sum(0)
    # where no operator was seen, any value is as likely
    table = (total + 1e-9) / (total + 1e-9).sum(-1, keepdims=True)
    truth = values(trees)
    prior = int(np.bincount(values(fit), minlength=compiled.DIGITS).argmax())
    found = {"class prior": float((truth == prior).mean())}
    answers = np.empty(len(trees), dtype=np.int64)
    for levels in range(max_depth):
        compiled._likeliest(threads_for(trees.tokens.size), trees.tokens, trees.bounds, table, levels, answers)
        found[f"{levels} levels"] = float((answers == truth).mean())
    return found


def _block(seed: int, first: int, count: int, law: Law) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    law.check()
    for name, value in (("seed", seed), ("index", first)):
        if not 0 <= value < 2**64:
            raise ValueError(f"{name} must be from 0 to 2^64 - 1, got {value}")
    tokens = np.empty((count, law.below - 1), dtype=np.uint8)
    lengths = np.empty(count, dtype=np.int64)
    seeds = np.uint64(seed), np.uint64(first)
    room = law.max_depth, law.max_args, law.above + 1, law.below - 1
    compiled._trees(threads_for(tokens.size), *seeds, *room, ATTEMPTS, tokens, lengths)
    if lengths.min() == 0:
        raise ValueError(f"{ATTEMPTS} draws gave no tree of such a length; widen {law}")
    return tokens, lengths


def _labelled(trees: list[NDArray[np.uint8]]) -> Ragged:
    joined = Ragged.join(trees, np.zeros(len(trees), dtype=np.int64))
    return Ragged(joined.tokens, joined.bounds, values(joined))
