"""Packing: what derives from the boundaries, and where it is built."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqzoo import Packing


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=8))
def test_what_derives_from_the_lengths(lengths):
    packing = Packing.from_lengths(lengths)
    assert packing.lengths.tolist() == lengths
    assert packing.n_sequences == len(lengths)
    expected_index = [index for index, length in enumerate(lengths) for _ in range(length)]
    expected_positions = [place for length in lengths for place in range(length)]
    assert packing.sequence_index.tolist() == expected_index
    assert packing.positions.tolist() == expected_positions
    reversal = packing.reversal()
    assert torch.equal(reversal[reversal], torch.arange(sum(lengths)))
    assert packing.positions[reversal].tolist() == [length - 1 - place for length in lengths for place in range(length)]
    again = Packing.from_cu_seqlens(packing.cu_seqlens, sum(lengths))
    assert again.bounds() == packing.bounds()
    assert torch.equal(again.positions, packing.positions)


def test_it_is_a_pytree_of_tensors():
    packing = Packing.from_lengths([2, 3])
    leaves, spec = torch.utils._pytree.tree_flatten(packing)
    assert len([leaf for leaf in leaves if leaf is not None]) == 4
    assert torch.utils._pytree.tree_unflatten(leaves, spec).bounds() == [0, 2, 5]


def test_moving_takes_everything_along():
    packing = dataclasses.replace(Packing.from_lengths([2, 3]), prefix_lengths=torch.tensor([1, 0]))
    assert packing.to("cpu").prefix_lengths.tolist() == [1, 0]


def test_the_callers_tensor_is_not_shared():
    cu_seqlens = torch.tensor([0, 2, 5], dtype=torch.int32)
    packing = Packing.from_cu_seqlens(cu_seqlens, 5)
    cu_seqlens[1] = 4
    assert packing.bounds() == [0, 2, 5]


def test_moving_keeps_a_host_copy():
    packing = Packing.from_lengths([2, 3], device="meta")
    assert packing.cu_seqlens.device.type == "meta"
    assert packing.bounds() == [0, 2, 5]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Packing.from_lengths([]), "non-empty"),
        (lambda: Packing.from_lengths([2, -1]), "must not be negative, got -1"),
        (lambda: Packing.from_lengths(torch.ones(2, 2)), r"got shape \(2, 2\)"),
        (lambda: Packing.from_cu_seqlens(torch.tensor([0, 4], dtype=torch.int32), 5), "tokens, 5, got 4"),
        (lambda: Packing.from_cu_seqlens(torch.tensor([0, 3, 2, 5], dtype=torch.int32), 5), "got 3 then 2"),
        (lambda: Packing.from_cu_seqlens(Packing.from_lengths([4]), 5), "describes 4 tokens"),
    ],
)
def test_bad_values(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Packing.from_lengths([1.7, 2.0]), "lengths must be integers, got torch.float32"),
        (lambda: Packing.from_cu_seqlens([0, 3], 3), "Tensor or a Packing, got list"),
        (lambda: Packing.from_cu_seqlens(torch.tensor([0, 3]), 3), "must be int32, got torch.int64"),
    ],
)
def test_bad_types(call, words):
    with pytest.raises(TypeError, match=words):
        call()


def test_positions_and_numbers_of_sequences_give_the_packing():
    wanted = Packing.from_lengths([3, 1, 4])
    for start in (0, 2):
        ids = torch.tensor([[*range(3), 0, *range(4)]]) + start
        assert torch.equal(Packing.from_position_ids(ids).cu_seqlens, wanted.cu_seqlens)
    for numbers in ([0, 0, 0, 1, 2, 2, 2, 2], [7, 7, 7, 5, 9, 9, 9, 9]):
        assert torch.equal(Packing.from_seq_idx(torch.tensor(numbers)).cu_seqlens, wanted.cu_seqlens)
    assert Packing.from_seq_idx(torch.zeros(1, 0, dtype=torch.int32)).n_sequences == 1


def test_transformers_collator_makes_what_a_packing_does():
    transformers = pytest.importorskip("transformers")
    collate = transformers.DataCollatorWithFlattening(
        return_position_ids=True, return_seq_idx=True, return_flash_attn_kwargs=True
    )
    batch = collate([{"input_ids": list(range(length))} for length in (3, 1, 4)])
    packing = Packing.from_position_ids(batch["position_ids"])
    assert torch.equal(packing.cu_seqlens, Packing.from_seq_idx(batch["seq_idx"]).cu_seqlens)
    for name, value in packing.to_huggingface().items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, batch[name])
            assert value.dtype == batch[name].dtype, name
        else:
            assert value == batch[name], name


def test_bad_conventions():
    with pytest.raises(ValueError, match=r"position_ids must have shape \(T,\) or \(1, T\), got \(2, 3\)"):
        Packing.from_position_ids(torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"seq_idx must be a Tensor of integers, got torch\.float32"):
        Packing.from_seq_idx(torch.zeros(3))
