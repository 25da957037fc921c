"""Softmax attention on several ranks is that of one: outputs, sums, gradients, states; and what it costs to send."""

from __future__ import annotations

import functools
import itertools
import random
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from seqzoo.parallel import Layout, Plan, attention_payload, zigzag
from seqzoo.parallel.layout import merged
from seqzoo.parallel.ring import Ring
from seqzoo.parallel.spans import calls, spans

ranks = runpy.run_path(str(Path(__file__).with_name("attention_ranks.py")))
TOLERANCE = 1e-10
# sequences that begin, end and lie on cuts, of one token and of none
LENGTHS = (0, 1, 9, 0, 3, 0)
COUNTS = {2: ((7, 6), (0, 13), (10, 3)), 3: ((5, 0, 8), (1, 9, 3), (0, 2, 11)), 4: ((3, 2, 1, 7), (4, 0, 6, 3))}
FORMS: dict[str, dict[str, Any]] = {
    "plain": {"heads": (12, 12)},
    "grouped": {"heads": (12, 4), "sinks": True, "logit_cap": 2.0, "scale": 0.7},
    "one-group": {"heads": (12, 1)},
    "window": {"heads": (12, 2), "window": 3, "sinks": True},
    "wide-window": {"heads": (12, 3), "window": 7, "logit_cap": 1.5},
    "future": {"heads": (12, 6), "causal": False, "sinks": True},
    "future-window": {"heads": (12, 4), "causal": False, "window": 4},
    "state": {"heads": (12, 4), "sinks": True, "held": 5, "final": True},
    "ragged-state": {"heads": (12, 3), "held": (3, 0, 7, 2, 1, 4), "final": True, "logit_cap": 2.0},
    "window-state": {"heads": (12, 4), "window": 6, "held": (2, 11, 5, 0, 8, 3), "final": True, "sinks": True},
    "new-state": {"heads": (12, 2), "final": True},
    "new-window-state": {"heads": (12, 2), "window": 4, "final": True},
}


def ways(size: int) -> list[dict[str, Any]]:
    found = [{"method": method} for method in ("allgather", "ring", "ulysses", "usp")]
    found += [{"method": method, "zigzags": True} for method in ("allgather", "ring", "ulysses")]
    if size == 4:
        found += [{"method": "usp", "head_ranks": 2, "zigzags": zigzags} for zigzags in (False, True)]
    return found


def cases(size: int, form: str) -> list[dict[str, Any]]:
    """Dense and packed, of a state as many rows as there are sequences."""
    found = []
    for counts, lengths in zip(COUNTS[size], (LENGTHS, None, LENGTHS), strict=False):
        one = {"counts": counts, "lengths": lengths, **FORMS[form]}
        rows = 2 if lengths is None else len(lengths)
        if isinstance(one.get("held"), int):
            one["held"] = (one["held"],) * rows
        elif "held" in one:
            one["held"] = one["held"][:rows]
        found.append(one)
    return found


def joined(name: str, parts: list[np.ndarray], wanted: np.ndarray, layout: Layout) -> list[np.ndarray]:
    """What the ranks' results say of one that all make together."""
    if name in ("o", "lse") or name in ("gradient of q", "gradient of k", "gradient of v"):
        return [layout.unshard([torch.from_numpy(part) for part in parts]).numpy()]
    if name.startswith("gradient"):
        return [sum(parts[1:], parts[0])]
    # final states are whole on every rank; a cache may have more room
    return [same_room(part, wanted) for part in parts]


def same_room(part: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    if part.ndim == 1:
        return part
    room = wanted.shape[1]
    assert not part[:, room:].any(), "a cache has something behind its tokens"
    return np.pad(part[:, :room], [(0, 0), (0, max(0, room - part.shape[1])), (0, 0), (0, 0)])


def compare(one: Any, way: dict[str, Any], parts: list[dict[str, np.ndarray]], wanted: dict[str, Any]) -> None:
    layout = ranks["layout_of"](one, len(parts), 0, way.get("zigzags", False))
    for name, value in wanted.items():
        value = value.detach().numpy()
        for found in joined(name, [part[name] for part in parts], value, layout):
            assert found.shape == value.shape, (one, way, name)
            scale = np.abs(value).max() or 1.0 if value.size else 1.0
            error = np.abs(found - value).max() / scale if value.size else 0.0
            assert error <= TOLERANCE, f"{way} {one}: {name}: {error:.2e}"


def check(pool: Any, size: int, given: list[dict[str, Any]], by: list[dict[str, Any]]) -> None:
    found = pool.call("attend", size, cases=given, ways=by)
    for index, options in enumerate(given):
        one = ranks["Case"](**options)
        wanted = ranks["exact"](one, size)
        for number, way in enumerate(by):
            compare(one, way, [answer[index][number] for answer in found], wanted)


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("form", FORMS)
def test_ranks_give_what_one_process_gives(attention_pool: Any, form: str, size: int):
    check(attention_pool, size, cases(size, form), ways(size))


def test_one_rank_and_no_tokens(attention_pool: Any):
    for size in (1, 3):
        given = [{**FORMS[form], "counts": (0,) * size} for form in ("plain", "window", "new-state")]
        check(attention_pool, size, given, ways(size))
    given = [
        {"counts": (13,), "lengths": LENGTHS, "window": window, "held": (2, 9, 0, 0, 4, 3), "final": True}
        for window in (None, 4)
    ]
    check(attention_pool, 1, given, ways(1))


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["dense", "packed"])
def test_without_gradients(attention_pool: Any, window: int | None, lengths: tuple[int, ...] | None):
    rows = 2 if lengths is None else len(lengths)
    options = {"counts": (5, 0, 8), "lengths": lengths, "window": window, "held": (6,) * rows, "final": True}
    one = ranks["Case"](**options)
    wanted = {name: value for name, value in ranks["exact"](one, 3).items() if not name.startswith("gradient")}
    for way in ways(3)[:2]:
        compare(one, way, attention_pool.call("no_gradients", 3, one=options, way=way), wanted)


@pytest.mark.parametrize("method", ["allgather", "ring", "ulysses"])
def test_few_gradients_end_on_every_rank(attention_pool: Any, method: str):
    found = attention_pool.call("some_gradients", 4, counts=(3, 2, 0, 4), method=method)
    assert found[0] > 0
    assert found[1:] == [None] * 3


def test_two_runs_give_the_same_bits(attention_pool: Any):
    one = {"counts": (5, 0, 8), "heads": (12, 4), "window": 4, "held": (3, 9), "sinks": True, "final": True}
    assert attention_pool.call("twice", 3, one=one, ways=ways(3)) == [[True] * len(ways(3))] * 3


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3, 4])
def test_ranks_give_what_one_process_gives_of_anything(attention_pool: Any, size: int):
    draw = random.Random(size)
    for _ in range(12):
        given = []
        for _ in range(10):
            packed = draw.random() < 0.6
            lengths = tuple(draw.choice([0, 1, 2, 3, 5, 8, 13]) for _ in range(draw.randint(1, 5))) if packed else None
            total = draw.randint(0, 20) if lengths is None else sum(lengths)
            cuts = sorted(draw.randint(0, total) for _ in range(size - 1))
            counts = tuple(end - start for start, end in itertools.pairwise([0, *cuts, total]))
            causal = draw.random() < 0.7
            rows = 2 if lengths is None else len(lengths)
            given.append(
                {
                    "counts": counts,
                    "lengths": lengths,
                    "heads": (12, draw.choice([1, 2, 3, 4, 6, 12])),
                    "causal": causal,
                    "window": draw.choice([None, 1, 2, 4, 9, 40]),
                    "sinks": draw.random() < 0.5,
                    "logit_cap": draw.choice([None, 2.0]),
                    "held": tuple(draw.randint(0, 12) for _ in range(rows)) if causal and draw.random() < 0.5 else None,
                    "final": draw.random() < 0.5,
                }
            )
        check(attention_pool, size, given, ways(size))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_a_recomputation_gives_the_same(attention_pool: Any, size: int):
    given = [
        {"counts": COUNTS[size][0], "lengths": LENGTHS, "heads": (12, 4), "sinks": True, "final": True},
        {"counts": COUNTS[size][1], "heads": (12, 4), "window": 5, "held": (4, 9), "final": True},
    ]
    check(attention_pool, size, given, [{**way, "recompute": True} for way in ways(size)])


def test_what_the_reference_computes(attention_pool: Any):
    options = {"counts": (5, 0, 8), "heads": (4, 2), "window": 4, "sinks": True, "logit_cap": 2.0}
    one = ranks["Case"](**options)
    compare(one, {}, attention_pool.call("by_reference", 3, one=options), ranks["exact"](one, 3))


@pytest.mark.parametrize("way", ways(3)[:3], ids=lambda way: way["method"])
def test_ranks_lose_no_more_to_rounding_than_one_process(attention_pool: Any, way: dict[str, Any]):
    options = {"counts": (9, 0, 14), "lengths": (4, 17, 2), "heads": (6, 2)}
    for found in attention_pool.call("narrow_attention", 3, one=options, way=way):
        for name in ("o", "dq", "dk", "dv"):
            if f"{name} one" in found:
                # a number is rounded once where it is made, once where parts of it meet
                assert found[f"{name} ranks"] <= 2 * found[f"{name} one"] + 2**-7, found


# -- what is sent --

PLAIN = {"heads": (12, 4)}
TRAFFIC = [
    ({**PLAIN, "counts": (5, 3, 8)}, "allgather", None, False),
    ({**PLAIN, "counts": (5, 0, 8), "lengths": (3, 9, 1)}, "allgather", None, False),
    ({**PLAIN, "counts": (5, 3, 8), "window": 6}, "allgather", None, False),
    ({**PLAIN, "counts": (5, 3, 8), "causal": False}, "allgather", None, True),
    ({**PLAIN, "counts": (5, 3, 8)}, "ring", None, False),
    ({**PLAIN, "counts": (5, 3, 8), "causal": False}, "ring", None, False),
    ({**PLAIN, "counts": (5, 3, 8), "causal": False, "window": 3}, "ring", None, False),
    ({**PLAIN, "counts": (5, 3, 8)}, "ring", None, True),
    ({**PLAIN, "counts": (5, 3, 8)}, "ulysses", None, False),
    ({"heads": (12, 1), "counts": (5, 0, 8), "lengths": (3, 9, 1)}, "ulysses", None, False),
]


@pytest.mark.parametrize(("dtype", "recompute"), [("float64", False), ("bfloat16", False), ("bfloat16", True)])
def test_bytes_are_those_foretold_and_a_recomputation_sends_none(attention_pool: Any, dtype: str, recompute: bool):
    for found in attention_pool.call("traffic", 3, dtype=dtype, cases=TRAFFIC, recompute=recompute):
        for case, (seen, told, _) in zip(TRAFFIC, found, strict=True):
            assert seen == told, case


def test_teams_send_what_was_foretold(attention_pool: Any):
    given = [({**PLAIN, "counts": (5, 3, 8, 4), "causal": causal}, "usp", 2, False) for causal in (True, False)]
    for found in attention_pool.call("traffic", 4, dtype="bfloat16", cases=given):
        for seen, told, _ in found:
            assert seen == told


def test_calls_and_what_crosses_no_cut(attention_pool: Any):
    given = [
        ({**PLAIN, "counts": (5, 3, 8)}, "allgather", None, False),
        ({**PLAIN, "counts": (5, 3, 8)}, "ulysses", None, False),
        ({**PLAIN, "counts": (5, 3, 8), "lengths": (5, 0, 1, 2, 8)}, "allgather", None, False),
        ({**PLAIN, "counts": (5, 3, 8), "lengths": (5, 0, 1, 2, 8)}, "ring", None, False),
        # sees one token of the rank before: one hop to every next rank, and none from the last
        ({**PLAIN, "counts": (5, 3, 8), "window": 2}, "ring", None, False),
    ]
    for rank, found in enumerate(attention_pool.call("traffic", 3, dtype="float64", cases=given)):
        gather, heads, *others, ring = [seen for *_, seen in found]
        assert gather == [1, 0, 1, 0]
        assert heads == [2, 0, 2, 0]
        assert others == [[0] * 4] * 2
        messages = (1, 2, 1)[rank]
        assert ring == [0, messages, 0, 2 * messages]


def test_a_causal_sequence_in_equal_shares_costs_what_the_formula_says():
    size, tokens, heads, groups, key, value = 4, 16, 8, 2, 8, 16
    column = 3 * groups * (key + value) * tokens
    options = {"n_heads": heads, "n_groups": groups, "key_size": key, "value_size": value, "dtype": torch.bfloat16}
    for rank in range(size):
        plan = Plan.of([tokens] * size, rank)
        told = functools.partial(attention_payload, plan, batch_size=3, **options)
        sent, received = (size - 1 - rank) * column * 2, rank * column * 2
        assert told("allgather") == (sent, received, received, sent)
        # of the block of every earlier rank one hop comes, those that others wait for go on
        passed = 0 if rank == size - 1 else rank + 1
        came = rank * column
        home = column if rank < size - 1 else 0
        further = sum(rank - owner > 1 for owner in range(rank)) * column
        assert told("ring") == (
            passed * column * 2,
            came * 2,
            passed * column * 2 + came * 4,
            came * 2 + (further + home) * 4,
        )
        there = 3 * tokens * (heads * key + size * (key + value)) * 2 * (size - 1) // size
        back = 3 * tokens * heads * (value * 2 + 4) * (size - 1) // size
        both = told("ulysses")
        assert both == (there + back,) * 4


def test_windows_limit_the_hops():
    layout = Layout.of(Plan.of([4] * 6, 0))
    for window, hops in ((1, 0), (2, 1), (5, 1), (6, 2), (9, 2), (10, 3), (100, 5)):
        ring = Ring.of(layout, 1, True, window)
        assert ring.hops == tuple(min(hops, 5 - owner) for owner in range(6)), window
        assert [sum(end - start for start, end in part) for part in ring.parts[:-1]] == [min(4, window - 1)] * 5


# -- layouts --


@functools.cache
def work(size: int, zigzags: bool, window: int | None = None) -> list[int]:
    """Pairs of a query and a key that it sees, of every rank."""
    total, found = 4096, []
    for rank in range(size):
        layout = zigzag(total, size, rank) if zigzags else Layout.of(Plan.balanced(total, size, rank))
        tokens = [token for start, end in layout.own for token in range(start, end)]
        found.append(sum(min(token + 1, window or total) for token in tokens))
    return found


@pytest.mark.parametrize(("size", "contiguous"), [(2, 0.67), (4, 0.57), (8, 0.53)])
def test_zigzag_gives_equal_work(size: int, contiguous: float):
    for zigzags, share in ((False, contiguous), (True, 1.0)):
        pairs = work(size, zigzags)
        assert round(sum(pairs) / size / max(pairs), 2) == share


@pytest.mark.parametrize("zigzags", [False, True])
def test_every_query_meets_every_key_that_it_sees_once(zigzags: bool):
    draw = random.Random(3)
    for _ in range(400):
        lengths = [draw.choice([0, 1, 2, 4, 7]) for _ in range(draw.randint(1, 5))]
        total, size = sum(lengths), draw.randint(1, 5)
        bounds = np.cumsum([0, *lengths]).tolist()
        causal, window = draw.random() < 0.5, draw.choice([None, 1, 2, 3, 6, 30])
        cuts = [0, *sorted(draw.randint(0, total) for _ in range(size - 1)), total]
        plan = Plan.of([end - start for start, end in itertools.pairwise(cuts)], 0, bounds)
        layout = zigzag(total, size, 0, bounds) if zigzags else Layout.of(plan)
        covered = [token for part in layout.fragments for a, b in part for token in range(a, b)]
        assert sorted(covered) == list(range(total))
        sequence = np.repeat(np.arange(len(lengths)), lengths)
        distance = np.arange(total)[:, None] - np.arange(total)
        sees = sequence[:, None] == sequence
        if causal:
            sees &= distance >= 0
        if window is not None:
            sees &= np.abs(distance) < window
        for rank, own in enumerate(layout.fragments):
            queries = [token for a, b in own for token in range(a, b)]
            wanted = layout.seen(rank, causal, window)
            for held in (wanted, *layout.fragments):
                keys = [token for a, b in held for token in range(a, b)]
                found = np.zeros((total, total), dtype=int)
                for call in calls(spans(layout.extent, own, held), causal, window, True):
                    add(found, call, queries, keys)
                expected = np.zeros_like(found)
                expected[np.ix_(queries, keys)] = sees[np.ix_(queries, keys)]
                assert (found == expected).all(), (bounds, own, held, causal, window)
            outside = np.ones(total, dtype=bool)
            outside[[token for a, b in wanted for token in range(a, b)]] = False
            assert not sees[queries][:, outside].any()


def add(found: np.ndarray, call: Any, queries: list[int], keys: list[int]) -> None:
    """Counts the pairs of a call, as the op's documentation says which they are."""
    for (a, b), (c, d) in zip(call.queries, call.keys, strict=True):
        rows, columns = queries[a:b], keys[c:d]
        if call.kind.reverse:
            rows, columns = rows[::-1], columns[::-1]
        for i, query in enumerate(rows):
            beside = i + len(columns) - len(rows)
            for j, key in enumerate(columns):
                ahead = call.kind.causal and j > beside
                far = call.kind.window is not None and abs(beside - j) >= call.kind.window
                found[query, key] += not (ahead or far)


def test_layouts_take_tensors_apart_and_together():
    x = torch.arange(26).view(2, 13)
    for size in (1, 2, 3, 7, 20):
        layouts = [zigzag(13, size, rank) for rank in range(size)]
        shards = [layout.shard(x) for layout in layouts]
        assert torch.equal(layouts[0].unshard(shards), x)
        assert all(len(layout.own) <= 2 for layout in layouts)
    assert zigzag(16, 2, 1).own == ((4, 12),)
    assert zigzag(16, 2, 0).own == ((0, 4), (12, 16))
    assert merged([(4, 4), (5, 7), (0, 2), (1, 3), (7, 9)]) == ((0, 3), (5, 9))
    with pytest.raises(ValueError, match="the layout is for 13 tokens, dimension 1 of the tensor has 12"):
        zigzag(13, 2, 0).shard(x[:, :12])
    with pytest.raises(ValueError, match=r"must have \[7, 6\] tokens, got \[7, 5\]"):
        zigzag(13, 2, 0).unshard([x[:, :7], x[:, :5]])
    with pytest.raises(ValueError, match="end at the number of tokens, 13, got 12"):
        zigzag(13, 2, 0, [0, 12])


# -- errors --


def test_refusals(attention_pool: Any):
    assert attention_pool.call("refused", 3) == [None] * 3
