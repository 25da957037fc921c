"""ListOps: its law, its values, its files, and what is known from the top of a tree."""

from __future__ import annotations

import hashlib
import itertools
import statistics
import time

import numpy as np
import pytest
import torch

from seqzoo.train.data import compiled
from seqzoo.train.data.listops import TOKENS, Law, depth_oracle, generate, read_official, text, tree, values
from seqzoo.train.data.ragged import Ragged

SMALL = Law(above=4, below=40, max_depth=4, max_args=4)
OPERATORS = {
    "[MIN": min,
    "[MAX": max,
    "[MED": lambda arguments: int(statistics.median(arguments)),
    "[SM": lambda arguments: sum(arguments) % 10,
}


def parse(words: list[str]):
    """An expression as nested lists, consuming the words."""
    word = words.pop(0)
    if word in OPERATORS:
        arguments = []
        while words[0] != "]":
            arguments.append(parse(words))
        words.pop(0)
        return [word, *arguments]
    return int(word)


def evaluate(node) -> int:
    return node if isinstance(node, int) else OPERATORS[node[0]]([evaluate(one) for one in node[1:]])


def depth(node) -> int:
    return 1 if isinstance(node, int) else 1 + max(depth(one) for one in node[1:])


def nodes(node, at: int = 1):
    yield at, node
    if not isinstance(node, int):
        for one in node[1:]:
            yield from nodes(one, at + 1)


def words(trees: Ragged, row: int) -> list[str]:
    return text(trees.tokens[trees.bounds[row] : trees.bounds[row + 1]]).split()


def expressions(*texts: str) -> Ragged:
    ids = {token: number for number, token in enumerate(TOKENS)}
    return Ragged.join([np.array([ids[word] for word in one.split()], np.uint8) for one in texts], [0] * len(texts))


def digest(trees: Ragged) -> str:
    return hashlib.blake2b(b"".join(part.tobytes() for part in (trees.tokens, trees.bounds, trees.labels))).hexdigest()


def test_values_are_those_of_the_definition():
    trees = generate(1, 600)
    for row in range(600):
        left = words(trees, row)
        assert 500 < len(left) < 2000
        node = parse(left)
        assert left == []
        assert depth(node) <= 10
        assert evaluate(node) == trees.labels[row]
    arities = {len(one) - 1 for row in range(60) for _, one in nodes(parse(words(trees, row))) if one.__class__ is list}
    assert arities == set(range(2, 11))


def test_the_law_of_a_node():
    """Without bounds that could reject a tree, each node is what the law says of its depth alone."""
    law = Law(above=0, below=1000, max_depth=3, max_args=5)
    found = [one for index in range(4000) for one in nodes(parse(text(tree(7, index, law)).split()))]
    for level in (1, 2):
        kinds = [node.__class__ is list for at, node in found if at == level]
        assert abs(np.mean(kinds) - 0.25) < 4 * (0.1875 / len(kinds)) ** 0.5
    assert not any(node.__class__ is list for at, node in found if at == 3)
    for group in (
        [node[0] for _, node in found if node.__class__ is list],
        [len(node) for _, node in found if node.__class__ is list],
        [node for _, node in found if node.__class__ is int],
    ):
        counts = np.unique(group, return_counts=True)[1]
        assert len(counts) in (4, 10)
        assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 30


def test_statistics_are_those_of_the_published_law():
    """Against figures that a program written from the same law gave for 20 000 trees."""
    trees = generate(0, 10_000)
    lengths = np.diff(trees.bounds)
    assert abs(lengths.mean() - 1036) < 20
    assert abs(np.median(lengths) - 950) < 20
    share = np.bincount(trees.labels, minlength=10) / 10_000
    expected = [0.171, 0.086, 0.074, 0.085, 0.089, 0.085, 0.080, 0.073, 0.091, 0.168]
    np.testing.assert_allclose(share, expected, atol=0.015)


def test_trees_are_the_same_for_ever():
    assert digest(generate(0, 500))[:32] == "cf1b568ac9af9cd37b15348e5c5358fc"
    assert digest(generate(3, 500, SMALL))[:12] == "66ec4fc049df"


def test_a_tree_depends_on_seed_index_and_law_alone():
    assert np.array_equal(tree(5, 9), tree(5, 9))
    for seed, index in ((5, 10), (6, 9), (9, 5), (5 + 2**32, 9), (5, 9 + 2**32)):
        assert not np.array_equal(tree(5, 9), tree(seed, index))
    trees = generate(5, 12)
    assert np.array_equal(trees.tokens[trees.bounds[9] : trees.bounds[10]], tree(5, 9))


@pytest.mark.slow
def test_threads_grow_and_judge_the_same():
    trees = generate(4, 300)
    fit, found = depth_oracle(trees, trees), digest(trees)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert digest(generate(4, 300)) == found
        assert depth_oracle(trees, trees) == fit
    finally:
        torch.set_num_threads(threads)


def test_no_tree_comes_twice():
    """Of so short trees the draws repeat many, of which the first alone stays."""
    law = Law(above=3, below=6, max_depth=2, max_args=3)
    trees = generate(0, 2000, law)
    texts = [" ".join(words(trees, row)) for row in range(2000)]
    assert len(set(texts)) == 2000
    drawn = [text(tree(0, index, law)) for index in range(3000)]
    assert list(dict.fromkeys(drawn))[:1500] == texts[:1500]


def test_a_hundred_thousand_trees_take_less_than_a_minute():
    generate(0, 10)
    before = time.process_time()
    generate(0, 10_000)
    assert time.process_time() - before < 6


@pytest.mark.parametrize("operator", range(10, 14))
@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_the_distribution_of_an_operator(operator, count):
    """Against all combinations of arguments."""
    random = np.random.default_rng(count)
    parts = random.dirichlet(np.full(10, 0.3), count)
    parts[:, random.integers(0, 10, 5)] = 0
    parts /= parts.sum(-1, keepdims=True)
    found = np.zeros(10)
    compiled._distribution(operator, parts, count, found)
    expected = np.zeros(10)
    for arguments in itertools.product(*(np.flatnonzero(part) for part in parts)):
        chance = np.prod([part[value] for part, value in zip(parts, arguments, strict=True)])
        expected[OPERATORS[TOKENS[operator]]([int(value) for value in arguments])] += chance
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_the_oracle_s_accuracies():
    """Against published measurements of the same oracle, by samples: 36.1, 60.8, 76.2 and 85.1 per cent."""
    trees = generate(0, 6000)
    cut = trees.bounds[4000]
    fit = Ragged(trees.tokens[:cut], trees.bounds[:4001], trees.labels[:4000])
    rest = Ragged(trees.tokens[cut:], trees.bounds[4000:] - cut, trees.labels[4000:])
    found = depth_oracle(fit, rest)
    expected = {"class prior": 0.171, "0 levels": 0.361, "1 levels": 0.608, "2 levels": 0.762, "3 levels": 0.851}
    for name, value in expected.items():
        assert abs(found[name] - value) < 0.035, name
    assert list(found.values()) == sorted(found.values())
    assert found["9 levels"] == 1.0


def test_the_oracle_at_a_glance():
    """A root of MAX is 9 in two of three trees; what lies below is known with one level more."""
    fit = expressions("[MAX 9 1 ]", "[MAX 2 9 ]", "[MAX 3 4 ]", "[MIN 2 1 ]")
    found = depth_oracle(fit, expressions("[MAX 9 3 ]", "[MAX 8 [MIN 3 2 ] ]"), max_depth=3)
    assert found == {"class prior": 0.5, "0 levels": 0.5, "1 levels": 1.0, "2 levels": 1.0}


def write(path, *rows: str, header: str = "Source\tTarget"):
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def test_the_released_format_is_read(tmp_path):
    path = write(
        tmp_path / "basic_train.tsv", "( ( ( [MAX 3 ) 4 ) ] )\t4", "( ( ( [SM 7 ) ( ( ( [MED 1 ) 2 ) ] ) ) ] )\t8"
    )
    trees = read_official(path)
    assert [" ".join(words(trees, row)) for row in range(2)] == ["[MAX 3 4 ]", "[SM 7 [MED 1 2 ] ]"]
    assert trees.labels.tolist() == [4, 8]


def test_line_ends_and_a_byte_order_mark_of_another_system_are_read(tmp_path):
    path = tmp_path / "basic_val.tsv"
    path.write_bytes(b"\xef\xbb\xbfSource\tTarget\r\n( ( ( [MAX 3 ) 4 ) ] )\t4\r\n")
    assert read_official(path).labels.tolist() == [4]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            ["( ( ( [MAX 3 ) 4 ) ] )\t4", "( ( ( [MAX 3 ) 4 ) ] )"],
            "row 3: expected 2 columns, source and target, got 1",
        ),
        (["( ( ( [MAX 3 ) 4 ) ] )\t"], "row 2: the target must be a digit, got ''"),
        (["( ( ( [MAX 3 ) 4 ) ] )\t10"], "row 2: the target must be a digit, got '10'"),
        (["( ( ( [MAX 3 ) 4 ) ] )\t3"], "row 2: the target is 3, but the source's value is 4"),
        (["( ( ( [MAX 3 ) 4\t4"], "row 2: the source is no whole expression; the file may be cut short"),
        (["[MAX 3 ]\t3"], "row 2: the source is no whole expression"),
        (["[FIRST 3 4 ]\t3"], r"row 2: unknown token '\[FIRST'"),
        ([], "has a header and no row"),
    ],
)
def test_damaged_files_are_named_with_the_row(rows, message, tmp_path):
    with pytest.raises(ValueError, match=rf"basic_test\.tsv.*{message}"):
        read_official(write(tmp_path / "basic_test.tsv", *rows))


def test_other_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"row 1: expected the header Source, Target, got 'Target\\tSource'"):
        read_official(write(tmp_path / "a.tsv", header="Target\tSource"))
    (tmp_path / "c.tsv").touch()
    with pytest.raises(ValueError, match=r"c\.tsv, row 1: expected the header Source, Target, got 'an empty file'"):
        read_official(tmp_path / "c.tsv")
    with pytest.raises(FileNotFoundError, match=r"there is no file .*b\.tsv: .*lra_release\.gz"):
        read_official(tmp_path / "b.tsv")


@pytest.mark.parametrize("wrong", ["[MAX 3 4", "3 4", "]", "[MAX 3 4 ] ]", "[MAX ]", "[SM" + " 1" * 11 + " ]"])
def test_what_is_no_expression_has_no_value(wrong):
    assert values(expressions(wrong, "3")).tolist() == [-1, 3]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: generate(0, 0), "count must be at least 1, got 0"),
        (lambda: tree(-1, 0), "seed must be from 0 to 2.64 - 1, got -1"),
        (lambda: tree(0, 0, Law(max_args=11)), "max_args must be from 2 to 10, got 11"),
        (lambda: tree(0, 0, Law(max_depth=65)), "max_depth must be from 1 to 64, got 65"),
        (lambda: tree(0, 0, Law(above=10, below=11)), "above must be at least 0 and leave lengths below 11, got 10"),
        (lambda: tree(0, 0, Law(max_depth=3)), "has at most 122 tokens, but must have more than 500"),
        (
            lambda: generate(0, 100, Law(above=0, below=2, max_depth=1)),
            "8192 draws gave 10 different trees, 100 are wanted",
        ),
        (lambda: depth_oracle(expressions("3"), expressions("[MAX 3")), "trees must be one or more expressions"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
