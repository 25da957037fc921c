"""Prefix linear attention: its equations token by token, what a prefix sees, and how prefixes travel."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from seqzoo import Packing, create
from seqzoo.kernels import dispatch
from seqzoo.layers import PrefixLinearAttention
from seqzoo.models import LanguageModel, ModelConfig
from seqzoo.testing import inputs, parameters_of

WIDTH = 16
# no prefix, part of a sequence, all of it, of an empty one
LENGTHS, PREFIXES = [5, 0, 9, 4, 1, 6], [0, 0, 6, 4, 1, 2]
OPTIONS = ({"head_dim": 4}, {"n_heads": 2, "feature_map": "elu+1", "bias": True}, {"feature_map": "learned"})


def build(dtype: torch.dtype = torch.float64, **options) -> PrefixLinearAttention:
    torch.manual_seed(0)
    mixer = create("prefix_linear_attention", d_model=WIDTH, **options)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return mixer.to(dtype)


def features(mixer: PrefixLinearAttention, x: Tensor, which: int) -> Tensor:
    """phi of queries (0) or keys (1), ``(..., H, K)``; the Taylor map with all its squares, as in the paper."""
    if mixer.feature_map == "elu+1":
        return torch.where(x > 0, x + 1, x.exp())
    if mixer.feature_map == "learned":
        x = torch.einsum("...hk,hkl->...hl", x, mixer.feature_proj[which])
        return torch.cat((x.softmax(-1), (-x).softmax(-1)), -1)
    size = x.shape[-1]
    squares = (x[..., :, None] * x[..., None, :]).flatten(-2) / (math.sqrt(2) * size**0.5)
    return torch.cat((torch.ones_like(x[..., :1]), x / size**0.25, squares), -1)


def by_tokens(mixer: PrefixLinearAttention, x: Tensor, prefix: int, before: Tensor | None = None) -> Tensor:
    """The docstring for one sequence ``(T, D)``, all of whose sums are written out; ``before`` are earlier tokens."""
    earlier = 0 if before is None else len(before)
    tokens = x if before is None else torch.cat((before, x))
    projected = torch.nn.functional.linear(tokens, mixer.in_proj.weight, mixer.in_proj.bias)
    q, k, v, k_prefix, v_prefix = (part.unflatten(-1, (mixer.n_heads, -1)) for part in projected.split(WIDTH, -1))
    q, k, k_prefix = features(mixer, q, 0), features(mixer, k, 1), features(mixer, k_prefix, 1)
    outputs = []
    for t in range(earlier, len(tokens)):
        weights = [(q[t] * k_prefix[s]).sum(-1) for s in range(earlier, earlier + prefix)]
        values = [v_prefix[s] for s in range(earlier, earlier + prefix)]
        weights += [(q[t] * k[s]).sum(-1) for s in range(t + 1)]
        values += [v[s] for s in range(t + 1)]
        o = sum(weight[:, None] * value for weight, value in zip(weights, values, strict=True))
        outputs.append((o / sum(weights)[:, None]).flatten())
    stacked = torch.stack(outputs) if outputs else tokens[:0]
    return torch.nn.functional.linear(stacked, mixer.out_proj.weight, mixer.out_proj.bias)


@pytest.mark.parametrize("backend", ["reference", "chunked", "cpu"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_equations(options, backend):
    mixer = build(**options)
    x = inputs((1, sum(LENGTHS), WIDTH), torch.float64).requires_grad_()
    expected = torch.cat(
        [by_tokens(mixer, one, prefix) for one, prefix in zip(x[0].split(LENGTHS), PREFIXES, strict=True)]
    )
    with dispatch.backend(backend):
        y, _ = mixer(x, cu_seqlens=Packing.from_lengths(LENGTHS, prefix_lengths=PREFIXES))
    torch.testing.assert_close(y[0], expected, rtol=1e-9, atol=1e-9)
    weights = inputs(tuple(expected.shape), torch.float64, seed=5)
    sources = [x, *parameters_of(mixer).values()]
    actual, wanted = (torch.autograd.grad((value * weights).sum(), sources) for value in (y[0], expected))
    torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-9)
    assert all(gradient.abs().max() > 0 for gradient in actual)


def test_pieces_and_steps_behind_the_prefix_give_the_whole():
    mixer = build(head_dim=4)
    x = inputs((1, sum(LENGTHS), WIDTH), torch.float64).requires_grad_()
    whole, final = mixer(x, cu_seqlens=Packing.from_lengths(LENGTHS, prefix_lengths=PREFIXES), return_state=True)
    parts = x.split(LENGTHS, 1)
    outputs, states = [], []
    for one, prefix in zip(parts, PREFIXES, strict=True):
        head = Packing.from_lengths([prefix], prefix_lengths=[prefix])
        y, state = mixer(one[:, :prefix], cu_seqlens=head, return_state=True)
        middle = prefix + (one.shape[1] - prefix) // 2
        more, state = mixer(one[:, prefix:middle], state, return_state=True)
        decoded = []
        for token in one[:, middle:].unbind(1):
            step, state = mixer.step(token, state)
            decoded.append(step[:, None])
        outputs += [y, more, *decoded]
        states.append(state)
    pieces = torch.cat(outputs, 1)
    torch.testing.assert_close(pieces, whole, rtol=1e-9, atol=1e-9)
    joined = {key: torch.cat([state[key] for state in states]) for key in final}
    torch.testing.assert_close(joined, final, rtol=1e-9, atol=1e-9)
    sources = [x, *parameters_of(mixer).values()]
    weights = inputs(tuple(whole.shape), torch.float64, seed=5)
    losses = [
        (y * weights).sum() + sum(v.square().sum() for v in s.values()) for y, s in ((whole, final), (pieces, joined))
    ]
    one, other = (torch.autograd.grad(loss, sources) for loss in losses)
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_a_prefix_may_follow_a_state():
    mixer = build(head_dim=4)
    before, x = inputs((3, WIDTH), torch.float64, seed=4), inputs((7, WIDTH), torch.float64)
    _, state = mixer(before[None], return_state=True)
    y, _ = mixer(x[None], state, cu_seqlens=Packing.from_lengths([7], prefix_lengths=[4]))
    torch.testing.assert_close(y[0], by_tokens(mixer, x, 4, before), rtol=1e-9, atol=1e-9)


def test_a_prefix_sees_itself_and_the_rest_is_causal():
    mixer = build(head_dim=4)
    x = inputs((1, 9, WIDTH), torch.float64)
    packing = Packing.from_lengths([9], prefix_lengths=[4])
    y, _ = mixer(x, cu_seqlens=packing)
    for at in range(9):
        changed = x.clone()
        changed[:, at] += 1
        moved = [
            not torch.equal(one, other)
            for one, other in zip(y[0], mixer(changed, cu_seqlens=packing)[0][0], strict=True)
        ]
        assert moved == [at < 4 or t >= at for t in range(9)]


def test_what_follows_a_prefix_does_not_reach_it_as_nan():
    mixer = build(head_dim=4)
    x = inputs((1, 300, WIDTH), torch.float64)
    changed = x.clone()
    changed[:, 290] = float("nan")
    packing = Packing.from_lengths([300], prefix_lengths=[4])
    y, other = (mixer(value, cu_seqlens=packing)[0] for value in (x, changed))
    # the last tokens before it share its chunk
    assert torch.equal(y[:, :200], other[:, :200])
    assert other[:, 290:].isnan().all()


def test_without_prefixes_it_is_linear_attention():
    mixer = build(head_dim=4)
    plain = create("linear_attention", d_model=WIDTH, head_dim=4, feature_map="taylor").double()
    weights = mixer.state_dict()
    plain.load_state_dict(weights | {"in_proj.weight": weights["in_proj.weight"][: 3 * WIDTH]})
    x = inputs((1, 9, WIDTH), torch.float64)
    expected = plain(x)[0]
    assert torch.equal(mixer(x)[0], expected)
    assert torch.equal(mixer(x, cu_seqlens=Packing.from_lengths([9]))[0], expected)
    torch.testing.assert_close(mixer(x, cu_seqlens=Packing.from_lengths([9], prefix_lengths=[0]))[0], expected)
    assert mixer.flops(10) == plain.flops(10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype):
    mixer, wide = build(dtype, head_dim=4), build(torch.float32, head_dim=4)
    wide.load_state_dict(mixer.state_dict())
    x = inputs((1, sum(LENGTHS), WIDTH), dtype)
    packing = Packing.from_lengths(LENGTHS, prefix_lengths=PREFIXES)
    y, state = mixer(x, cu_seqlens=packing, return_state=True)
    expected, _ = wide(x.float(), cu_seqlens=packing)
    assert (y.float() - expected).abs().max() <= 8 * torch.finfo(dtype).eps * expected.abs().max()
    assert {value.dtype for value in state.values()} == {torch.float32}


def test_compiled_once_for_all_prefixes():
    mixer = build(torch.float32, head_dim=4)
    torch._dynamo.reset()
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager", dynamic=True)
    for number, (lengths, prefixes) in enumerate(
        ((LENGTHS, PREFIXES), ([4, 6, 2], [4, 0, 1]), ([2, 0, 9, 3], [0, 0, 9, 2]))
    ):
        packing = Packing.from_lengths(lengths, prefix_lengths=prefixes)
        x = inputs((1, sum(lengths), WIDTH), torch.float32)
        with torch._dynamo.config.patch(error_on_recompile=number > 0):
            y, _ = compiled(x, cu_seqlens=packing)
        torch.testing.assert_close(y, mixer(x, cu_seqlens=packing)[0], rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


def test_a_language_model_hands_prefixes_on():
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=11, d_model=WIDTH, n_layers=2, pattern=["prefix_linear_attention", "min_gru"])
    model = LanguageModel(config).double()
    ids = torch.randint(0, 11, (1, 12), generator=torch.Generator().manual_seed(0))
    packing = Packing.from_lengths([7, 5], prefix_lengths=[4, 0])
    logits, _ = model(ids, cu_seqlens=packing)
    changed = ids.clone()
    changed[0, 3] = (ids[0, 3] + 1) % 11
    moved = (model(changed, cu_seqlens=packing)[0] != logits).any(-1)[0]
    assert moved.tolist() == [True] * 7 + [False] * 5
    changed = ids.clone()
    changed[0, 5] = (ids[0, 5] + 1) % 11
    moved = (model(changed, cu_seqlens=packing)[0] != logits).any(-1)[0]
    assert moved.tolist() == [False] * 5 + [True] * 2 + [False] * 5
    labels = ids.roll(-1, 1)
    labels[0, :4] = -100
    assert torch.isfinite(model.loss(ids, labels, cu_seqlens=packing))


def test_prefixes_of_a_packing():
    packing = Packing.from_lengths([3, 0, 2], prefix_lengths=torch.tensor([3, 0, 1], dtype=torch.int32))
    assert packing.prefix_lengths.tolist() == [3, 0, 1]
    assert packing.prefix_lengths.dtype == torch.int64
    assert Packing.from_lengths([3, 0, 2]).prefix_lengths is None
    bare = Packing.from_cu_seqlens(torch.tensor([0, 3, 3, 5], dtype=torch.int32), 5)
    given = torch.tensor([1, 0, 2])
    prefixed = bare.with_prefixes(given)
    given[0] = 3
    assert prefixed.prefix_lengths.tolist() == [1, 0, 2]
    assert bare.prefix_lengths is None
    assert Packing.from_lengths([3], prefix_lengths=[2], device="meta").prefix_lengths.device.type == "meta"


@pytest.mark.parametrize(
    ("prefixes", "error", "words"),
    [
        ([1, 0], ValueError, "one entry a sequence, 3, got 2"),
        ([1, 0, 3], ValueError, "prefix of sequence 2 must have from 0 to 2 tokens, .* got 3; a prefix lies in one"),
        ([0, 1, 0], ValueError, "prefix of sequence 1 must have from 0 to 0 tokens"),
        ([-1, 0, 0], ValueError, "prefix of sequence 0 .* got -1"),
        ([1.0, 0.0, 0.0], TypeError, "prefix_lengths must be integers, got torch.float32"),
        ([[1, 0, 0]], ValueError, r"prefix_lengths must be a non-empty list of integers, got shape \(1, 3\)"),
    ],
)
def test_bad_prefixes(prefixes, error, words):
    with pytest.raises(error, match=words):
        Packing.from_lengths([3, 0, 2], prefix_lengths=prefixes)
    with pytest.raises(error, match=words):
        Packing.from_lengths([3, 0, 2]).with_prefixes(prefixes)


@pytest.mark.parametrize("prefix", range(7))
def test_a_piece_that_ends_inside_its_prefix_is_an_error(prefix):
    for length in range(prefix):
        with pytest.raises(
            ValueError, match=f"from 0 to {length} tokens.* got {prefix}; .* pass all of it in one call"
        ):
            Packing.from_lengths([length], prefix_lengths=[prefix])
