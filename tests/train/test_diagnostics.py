"""The diagnostics are what their papers say: laws checked by hand-written oracles over many draws."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

pytest.importorskip("lightning")

from seqzoo.train.data.diagnostics import DIAGNOSTICS, diagnostic
from seqzoo.train.data.mad import Decompressor
from seqzoo.train.data.state_tracking import product_table
from seqzoo.train.data.windows import IGNORED

OPTIONS = {
    "mqar": {"length": 32, "n_pairs": 6, "vocab_size": 64},
    "selective-copying": {"length": 24},
    "induction-heads": {"length": 20},
    **{name: {"length": 17} for name in ("parity", "modular-sum", "group-words", "cycle-navigation")},
}


@pytest.mark.parametrize("name", DIAGNOSTICS)
class TestEvery:
    def test_a_batch_depends_on_seed_and_index_alone(self, name):
        draw = diagnostic(name, **OPTIONS.get(name, {}))
        first = draw(3, 5, batch_size=4)
        for one, other in zip(first, draw(3, 5, batch_size=4), strict=True):
            assert torch.equal(one, other)
            assert one.dtype == torch.int64
        for seed, index in ((3, 6), (4, 5), (5, 3), (3 + 2**32, 5)):
            assert not torch.equal(first[0], draw(seed, index, batch_size=4)[0])

    def test_impossible_batches_are_refused(self, name):
        draw = diagnostic(name, **OPTIONS.get(name, {}))
        with pytest.raises(ValueError, match="batch_size must be positive, got 0"):
            draw(0, 0, batch_size=0)
        with pytest.raises(ValueError, match="index must not be negative"):
            draw(0, -1, batch_size=1)


def test_names_and_options():
    with pytest.raises(ValueError, match=r"no diagnostic 'parety'.*parity"):
        diagnostic("parety", length=3)
    with pytest.raises(TypeError, match=r"mqar has no option 'n_pair'.*n_pairs"):
        diagnostic("mqar", n_pair=3)
    with pytest.raises(TypeError, match="needs length"):
        diagnostic("parity")


class TestGroups:
    @pytest.mark.parametrize(
        ("group", "order"),
        [("Z2", 2), ("Z60", 60), ("S3", 6), ("S5", 120), ("A4", 12), ("A5", 60), ("A4xZ5", 60), ("A1", 1)],
    )
    def test_a_table_is_that_of_a_group(self, group, order):
        table = product_table(group)
        assert table.shape == (order, order)
        assert (table[0] == np.arange(order)).all()
        assert (table[:, 0] == np.arange(order)).all()
        for line in (*table, *table.T):
            assert sorted(line) == list(range(order))
        some = np.random.default_rng(0).integers(0, order, (3, 500))
        assert (table[table[some[0], some[1]], some[2]] == table[some[0], table[some[1], some[2]]]).all()

    def test_which_groups_commute(self):
        commuting = {
            name: bool((product_table(name) == product_table(name).T).all()) for name in ("Z6", "S3", "A4", "Z2xZ3")
        }
        assert commuting == {"Z6": True, "S3": False, "A4": False, "Z2xZ3": True}

    @pytest.mark.parametrize("group", ["", "Z0", "D4", "Z2x", "z2", "S05"])
    def test_what_is_no_group(self, group):
        with pytest.raises(ValueError, match="Zn, Sn or An"):
            product_table(group)
        with pytest.raises(ValueError, match="more than 1000"):
            product_table("S7")

    def test_words(self):
        ids, labels = diagnostic("group-words", length=9, group="S3")(1, 2, batch_size=50)
        elements = list(itertools.permutations(range(3)))
        for word, products in zip(ids.tolist(), labels.tolist(), strict=True):
            arrangement = (0, 1, 2)
            for letter, product in zip(word, products, strict=True):
                # where each thing is after one more permutation
                arrangement = tuple(elements[letter][place] for place in arrangement)
                assert elements[product] == arrangement
        assert sorted(ids.unique().tolist()) == list(range(6))

    def test_sums(self):
        ids, labels = diagnostic("parity", length=40)(0, 0, batch_size=30)
        assert torch.equal(labels, ids.cumsum(1) % 2)
        ids, labels = diagnostic("modular-sum", length=40)(0, 0, batch_size=30)
        assert torch.equal(labels, ids.cumsum(1) % 5)

    def test_walks(self):
        ids, labels = diagnostic("cycle-navigation", length=40, size=4)(0, 0, batch_size=30)
        place = torch.zeros(30, dtype=torch.int64)
        for token, label in zip(ids.T, labels.T, strict=True):
            place = torch.where(token == 1, place + 1, torch.where(token == 2, place - 1, place)) % 4
            assert torch.equal(place, label)


def test_induction_heads():
    ids, labels = diagnostic("induction-heads", length=12)(0, 0, batch_size=400)
    assert (labels[:, :-1] == IGNORED).all()
    assert (ids[:, -1] == 15).all()
    places = (ids[:, :-1] == 15).nonzero()
    assert places[:, 0].tolist() == list(range(400))
    assert torch.equal(ids[places[:, 0], places[:, 1] + 1], labels[:, -1])
    # at every place where a successor is left before the end
    assert sorted(places[:, 1].unique().tolist()) == list(range(10))
    assert int(labels[:, -1].max()) == 14


@pytest.mark.parametrize(("n_first", "n_second"), [(4, 16), (16, 4), (1, 1), (5, 5), (18, 18)])
def test_set_disjointness(n_first, n_second):
    draw = diagnostic("set-disjointness", n_first=n_first, n_second=n_second, vocab_size=40)
    ids, labels = draw(0, 0, batch_size=200)
    assert ids.shape == (200, n_first + n_second + 3)
    places, others = set(), set()
    for row, label in zip(ids.tolist(), labels.tolist(), strict=True):
        first, second = row[1 : 1 + n_first], row[2 + n_first : -1]
        assert (row[0], row[1 + n_first], row[-1]) == (1, 2, 3)
        assert len(set(first)) == n_first
        assert len(set(second)) == n_second
        assert set(first) & set(second) == {label[-1]}
        assert min(first + second) >= 4
        assert label[:-1] == [IGNORED] * (len(row) - 1)
        places.add(first.index(label[-1]))
        others.add(second.index(label[-1]))
    assert places == set(range(n_first))
    assert others == set(range(n_second))
    with pytest.raises(ValueError, match="vocab_size must be at least 44"):
        diagnostic("set-disjointness", n_first=20, n_second=2, vocab_size=43)(0, 0, batch_size=1)


class TestMad:
    @pytest.mark.parametrize("name", ["mad-in-context-recall", "mad-noisy-recall"])
    def test_recall(self, name):
        ids, labels = diagnostic(name)(0, 0, batch_size=60)
        noisy = name == "mad-noisy-recall"
        share = float((ids[:, ::2] >= 16).float().mean())
        assert abs(share - 0.2) < 0.03 if noisy else share == 0
        assert (labels[:, 1::2] == IGNORED).all()
        for row, label in zip(ids.tolist(), labels.tolist(), strict=True):
            seen: dict[int, int] = {}
            for place in range(0, 128, 2):
                key, value = row[place : place + 2]
                if key >= 16:
                    assert label[place] == IGNORED
                    assert 16 <= value < 32
                    continue
                assert key < 8 <= value < 16
                assert seen.get(key, value) == value
                assert label[place] == (value if key in seen else IGNORED)
                seen[key] = value

    def test_selective_copying(self):
        ids, labels = diagnostic("mad-selective-copying")(0, 0, batch_size=60)
        assert ids.shape == (60, 256)
        assert ids.unique().tolist() == list(range(16))
        assert (labels != IGNORED).sum(1).tolist() == [16] * 60

    def test_fuzzy_recall(self):
        ids, labels = diagnostic("mad-fuzzy-recall", length=60)(0, 0, batch_size=60)
        asked, lengths = 0, set()
        for row, label in zip(ids.tolist(), labels.tolist(), strict=True):
            # words end where values give way to keys, or padding begins
            seen: dict[tuple[int, ...], tuple[int, ...]] = {}
            place = 0
            while place < 60 and row[place] != 15:
                key = tuple(itertools.takewhile(lambda one: one < 7, row[place:]))
                value = tuple(itertools.takewhile(lambda one: 7 <= one < 15, row[place + len(key) :]))
                assert 1 <= len(key) <= 3
                assert 1 <= len(value) <= 3
                assert seen.get(key, value) == value
                begin, end = place + len(key) - 1, place + len(key) + len(value)
                expected = list(value) if key in seen else [IGNORED] * len(value)
                assert label[begin : end - 1] == expected
                assert label[place:begin] == [IGNORED] * (begin - place)
                assert label[end - 1] == IGNORED
                seen[key] = value
                place = end
                asked += len(value) if key in seen else 0
                lengths.add((len(key), len(value)))
            assert row[place:] == [15] * (60 - place)
        assert asked > 1000
        assert lengths == set(itertools.product((1, 2, 3), repeat=2))

    def test_compression(self):
        ids, targets = diagnostic("mad-compression", length=9, vocab_size=5)(0, 0, batch_size=100)
        assert (ids[:, -1] == 4).all()
        assert torch.equal(ids[:, :-1], targets)
        assert int(targets.max()) == 3
        assert Decompressor(8, 8, 5)(torch.zeros(2, 8)).shape == (2, 8, 5)

    def test_memorisation(self):
        draw = diagnostic("mad-memorisation", length=8, vocab_size=21)
        table: dict[int, int] = {}
        for index in range(40):
            ids, labels = draw(7, index, batch_size=10)
            assert (ids[:, 1::2] == 20).all()
            assert (labels[:, ::2] == IGNORED).all()
            for key, value in zip(ids[:, ::2].flatten().tolist(), labels[:, 1::2].flatten().tolist(), strict=True):
                assert key < 10 <= value < 20
                assert table.setdefault(key, value) == value
        assert len(table) == 10
        other = draw(8, 0, batch_size=10)
        pairs = zip(other[0][:, ::2].flatten().tolist(), other[1][:, 1::2].flatten().tolist(), strict=True)
        assert any(table[key] != value for key, value in pairs)

    @pytest.mark.parametrize(
        ("name", "options", "words"),
        [
            ("mad-in-context-recall", {"length": 7}, "even"),
            ("mad-in-context-recall", {"vocab_size": 3}, "at least 4"),
            ("mad-in-context-recall", {"noise": 0.5}, "needs ids"),
            ("mad-fuzzy-recall", {"n_keys": 8}, "at least 2 . n_keys . 1 = 17"),
            ("mad-compression", {"length": 1}, "length must be positive"),
        ],
    )
    def test_options_out_of_range(self, name, options, words):
        with pytest.raises(ValueError, match=words):
            diagnostic(name, **options)(0, 0, batch_size=1)
