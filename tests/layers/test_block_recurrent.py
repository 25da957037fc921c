"""Block-recurrent transformer: its equations token by token, its blocks wherever pieces are cut, what it learns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from seqzoo import create
from seqzoo.kernels.block_recurrence import block_recurrence
from seqzoo.layers import BlockRecurrent
from seqzoo.ops import backend
from seqzoo.testing import boundaries, inputs, parameters_of

WIDTH = 16
FIXED: dict[str, Any] = {"block_size": 3, "n_states": 4, "n_heads": 2}
LSTM: dict[str, Any] = {"block_size": 4, "n_states": 3, "gate": "lstm", "rotary_base": None, "bias": True, "n_heads": 4}


def build(dtype: torch.dtype = torch.float64, **options) -> BlockRecurrent:
    torch.manual_seed(0)
    mixer = create("block_recurrent", d_model=WIDTH, **options)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return mixer.to(dtype)


def look(q: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    """One query ``(H, K)`` and any number of keys and values of that shape."""
    weights = torch.stack([(q * k).sum(-1) for k in keys]).div(q.shape[-1] ** 0.5).softmax(0)
    return sum(weight[:, None] * v for weight, v in zip(weights, values, strict=True)).flatten()


def turned(x: Tensor, position: int, base: float | None) -> Tensor:
    """``(H, K)``, rotated in the planes of dimensions i and i + K / 2."""
    if base is None:
        return x
    half = x.shape[-1] // 2
    rotated = torch.view_as_complex(torch.stack((x[..., :half], x[..., half:]), -1).contiguous())
    angles = position * base ** (-torch.arange(half, dtype=torch.float64) / half)
    rotated = torch.view_as_real(rotated * torch.polar(torch.ones_like(angles), angles))
    return torch.cat((rotated[..., 0], rotated[..., 1]), -1)


def by_tokens(mixer: BlockRecurrent, x: Tensor) -> tuple[Tensor, Tensor]:
    """The docstring for one sequence ``(T, D)``: outputs, and the states behind the last complete block."""
    window, base = mixer.block_size, None if mixer.rotary is None else mixer.rotary.base
    heads = (mixer.n_heads, -1)
    c = x.new_zeros(mixer.n_states, WIDTH)
    past_k, past_v, block, outputs = [], [], [], []
    state_parts = None
    for t, token in enumerate(x):
        if t % window == 0:
            read = c / (c.square().mean(-1, keepdim=True) + 1e-5).sqrt() + mixer.state_ids
            projected = F.linear(read, mixer.state_proj.weight, mixer.state_proj.bias)
            state_parts = [part.unflatten(-1, heads) for part in projected.chunk(4, -1)]
        q_s, q_t, k_s, v_s = state_parts
        q, q_states, k, v = (
            part.unflatten(-1, heads) for part in F.linear(token, mixer.in_proj.weight, mixer.in_proj.bias).chunk(4)
        )
        past_k.append(turned(k, t, base))
        past_v.append(v)
        block.append((k, v))
        own = look(turned(q, t, base), past_k[-window:], past_v[-window:])
        of_states = look(q_states, list(k_s), list(v_s))
        outputs.append(F.linear(torch.cat((own, of_states)), mixer.out_proj.weight, mixer.out_proj.bias))
        if t % window == window - 1:
            new = []
            for index in range(mixer.n_states):
                h = torch.cat(
                    (
                        look(q_s[index], list(k_s), list(v_s)),
                        look(q_t[index], [k for k, _ in block], [v for _, v in block]),
                    )
                )
                raw = F.linear(h, mixer.gate_proj.weight, mixer.gate_proj.bias)
                if mixer.keep is None:
                    z, i, f = raw.chunk(3)
                    new.append((f + 1).sigmoid() * c[index] + (i - 1).sigmoid() * z.tanh())
                else:
                    gate = mixer.keep.sigmoid()
                    new.append(gate * c[index] + (1 - gate) * raw)
            c, block = torch.stack(new), []
    return torch.stack(outputs), c


@pytest.mark.parametrize("backend_name", ["reference", "chunked", "cpu"])
@pytest.mark.parametrize("options", [FIXED, LSTM], ids=["fixed", "lstm"])
def test_the_equations(options, backend_name):
    mixer = build(**options)
    x = inputs((2, 14, WIDTH), torch.float64).requires_grad_()
    with backend(backend_name):
        y, state = mixer(x, return_state=True)
    expected = [by_tokens(mixer, row) for row in x]
    results = (y, state["states"]), tuple(torch.stack(parts) for parts in zip(*expected, strict=True))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)
    losses = [sum((v * inputs(tuple(v.shape), v.dtype, seed=5)).sum() for v in result) for result in results]
    sources = [x, *parameters_of(mixer).values()]
    one, other = (torch.autograd.grad(loss, sources) for loss in losses)
    torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("options", [FIXED, LSTM], ids=["fixed", "lstm"])
def test_pieces_may_be_cut_anywhere(options):
    mixer = build(**options)
    total = 3 * mixer.block_size + 2
    x = inputs((2, total, WIDTH), torch.float64)
    whole, final = mixer(x, return_state=True)
    for first in range(total):
        for second in range(first, total):
            y, state, parts = None, None, []
            for piece in x.tensor_split((first, second), dim=1):
                y, state = mixer(piece, state, return_state=True)
                parts.append(y)
            torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(state, final, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("seen", "lengths"),
    [
        ([0, 1, 2, 7, 4, 5, 6, 11], [9, 1, 2, 0, 4, 1, 7, 3]),
        # at both block sizes every sequence has a token in each of two blocks
        ([11, 23, 11, 35], [2, 2, 2, 2]),
    ],
)
@pytest.mark.parametrize("options", [FIXED, LSTM], ids=["fixed", "lstm"])
def test_sequences_at_different_places_of_their_blocks(options, seen, lengths):
    """Packed together, some of them new, each goes on as if it were alone; with all gradients."""
    mixer = build(**options)
    tokens = [
        inputs((1, a + b, WIDTH), torch.float64, seed=9 + i) for i, (a, b) in enumerate(zip(seen, lengths, strict=True))
    ]
    results = []
    for together in (False, True):
        outputs, states, leaves = [], [], [token.clone().requires_grad_() for token in tokens]
        given = [mixer(leaf[:, :a], return_state=True)[1] for leaf, a in zip(leaves, seen, strict=True)]
        new = [leaf[:, a:] for leaf, a in zip(leaves, seen, strict=True)]
        if together:
            state = {key: torch.cat([one[key] for one in given]) for key in given[0]}
            y, after = mixer(torch.cat(new, 1), state, cu_seqlens=boundaries(lengths), return_state=True)
        else:
            for piece, one in zip(new, given, strict=True):
                out, last = mixer(piece, one, return_state=True)
                outputs.append(out)
                states.append(last)
            y, after = torch.cat(outputs, 1), {key: torch.cat([one[key] for one in states]) for key in states[0]}
        loss = (y * inputs(tuple(y.shape), y.dtype, seed=5)).sum()
        loss = loss + sum(value.square().sum() for key, value in after.items() if key != "length")
        results.append((y, after, torch.autograd.grad(loss, [*leaves, *mixer.parameters()])))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


def test_without_states_it_is_a_window():
    mixer = build(**FIXED)
    plain = create("sliding_window_attention", d_model=WIDTH, window=3, n_heads=2).double()
    with torch.no_grad():
        q, _, k, v = mixer.in_proj.weight.chunk(4)
        plain.in_proj.weight.copy_(torch.cat((q, k, v)))
        plain.out_proj.weight.copy_(mixer.out_proj.weight[:, :WIDTH])
        mixer.out_proj.weight[:, WIDTH:] = 0
    x = inputs((2, 10, WIDTH), torch.float64)
    torch.testing.assert_close(mixer(x)[0], plain(x)[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", [FIXED, LSTM], ids=["fixed", "lstm"])
def test_states_reach_beyond_the_window_from_block_to_block(options):
    mixer = build(**options)
    size = mixer.block_size
    x = inputs((1, 5 * size, WIDTH), torch.float64).requires_grad_()
    y, _ = mixer(x)
    for t in (0, size - 1, size, 2 * size - 1, 2 * size, 5 * size - 1):
        reached = torch.autograd.grad(y[0, t].sum(), x, retain_graph=True)[0][0].abs().amax(-1) > 0
        # all of the complete blocks, and the window
        expected = [s <= t and (s // size < t // size or t - s < size) for s in range(5 * size)]
        assert reached.tolist() == expected


@pytest.mark.parametrize("gate", ["fixed", "lstm"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_recurrence_against_its_reference(gate, dtype):
    """All gradients by hand against those of autograd; sequences of every length and place, blocks to spare."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)

    def draw(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) / 2).to(kind)

    rows, states, width, heads, blocks, size = 5, 3, 8, 2, 11, 4
    gates = width if gate == "fixed" else 3 * width
    layout = torch.tensor([[1, 0, 2, 0, 3], [1, 4, 0, 2, 3], [1, 3, 0, 2, 2]])
    tensors = [
        draw(rows, states, width, kind=wide),
        draw(rows, states, 2 * width),
        draw(blocks, size, heads, width // heads),
        draw(blocks, size, heads, width // heads),
        draw(states, width),
        draw(4 * width, width),
        draw(4 * width),
        draw(gates, 2 * width),
        draw(gates),
        draw(width, kind=wide) if gate == "fixed" else None,
    ]

    def run(name: str, kind: torch.dtype) -> list[Tensor]:
        leaves = [
            None
            if value is None
            else value.to(torch.float64 if kind == torch.float64 else value.dtype).requires_grad_()
            for value in (None if value is None else value.detach().clone() for value in tensors)
        ]
        with backend(name):
            outputs = block_recurrence(*leaves[:4], layout, *leaves[4:])
        present = [leaf for leaf in leaves if leaf is not None]
        loss = sum(
            (out.double() * inputs(tuple(out.shape), torch.float64, seed=5 + i)).sum() for i, out in enumerate(outputs)
        )
        return [*(out.detach() for out in outputs), *torch.autograd.grad(loss, present)]

    exact, actual, low = run("reference", torch.float64), run("chunked", dtype), run("reference", dtype)
    for one, other, plain in zip(actual, exact, low, strict=True):
        assert one.dtype == plain.dtype
        scale, unit = other.abs().max(), torch.finfo(one.dtype).eps
        error, allowed = ((value.double() - other).abs().max() for value in (one, plain))
        # in float64 the reference is the exact result, and sums in another order are what differs
        assert error <= 2 * (allowed + 2 * unit * scale) + (64 * unit * scale if dtype == torch.float64 else 0)
    assert (actual[0][10:] == 0).all()
    assert torch.equal(actual[1][2], tensors[0][2])


@pytest.mark.parametrize("options", [FIXED, LSTM], ids=["fixed", "lstm"])
def test_opcheck(options):
    mixer = build(torch.float32, **options)
    parameters = (
        mixer.state_ids,
        mixer.state_proj.weight,
        mixer.state_proj.bias,
        mixer.gate_proj.weight,
        mixer.gate_proj.bias,
        mixer.keep,
    )
    parameters = [None if value is None else value.detach() for value in parameters]
    states = inputs((2, mixer.n_states, WIDTH), torch.float32)
    kv = inputs((2, mixer.n_states, 2 * WIDTH), torch.float32)
    k = inputs((3, mixer.block_size, mixer.n_heads, mixer.head_dim), torch.float32)
    layout = torch.tensor([[1, 0], [2, 1], [1, 1]])
    arguments = (states, kv, k, k.flip(0), layout, *parameters)
    found = torch.ops.seqzoo.block_recurrence_forward(*arguments, "")
    starts = found[2]
    gradients = [torch.ones_like(value) for value in found[:2]]
    for name, call in (
        ("forward", (*arguments, "")),
        ("backward", (*gradients, *arguments, found[0], starts, "")),
    ):
        torch.library.opcheck(getattr(torch.ops.seqzoo, f"block_recurrence_{name}").default, call)


def test_decoding_projects_the_states_once_a_block(monkeypatch):
    from seqzoo.kernels.block_recurrence import chunked

    mixer = build(**FIXED)
    _, state = mixer(inputs((2, 3, WIDTH), torch.float64), return_state=True)
    calls = []
    read = F.linear
    monkeypatch.setattr(
        chunked.F, "linear", lambda x, weight, bias: calls.append(weight.shape) or read(x, weight, bias)
    )
    counts = []
    for token in inputs((2, 6, WIDTH), torch.float64, seed=4).unbind(1):
        before = sum(shape == (2 * WIDTH, WIDTH) for shape in calls)
        _, state = mixer.step(token, state)
        counts.append(sum(shape == (2 * WIDTH, WIDTH) for shape in calls) - before)
    # keys and values at the beginning, queries at the end
    assert counts == [1, 0, 1, 1, 0, 1]


def test_between_two_blocks_no_keys_of_states_are_kept():
    mixer = build(**FIXED)
    x = inputs((1, 7, WIDTH), torch.float64)
    for length in range(1, 8):
        _, state = mixer(x[:, :length], return_state=True)
        assert bool((state["state_k"] == 0).all()) == bool((state["state_v"] == 0).all()) == (length % 3 == 0)


def test_numbers():
    mixer = create("block_recurrent", d_model=32, block_size=8, n_states=4)
    assert mixer.keep.std() < 0.2
    # a token sees 4 states; 4 states change at every eighth
    assert mixer.flops(8) - mixer.flops(7) > mixer.flops(7) - mixer.flops(6)
    assert mixer.flops(17) - mixer.flops(16) == mixer.flops(18) - mixer.flops(17)
    assert mixer.flops(17) - mixer.flops(16) == 2 * 32 * (4 + 2) * 32 + 4 * 32 * (8 + 4)
    assert mixer.state_size(100) == mixer.state_size(1) == 3 * 4 * 32 + 2 * 8 * 32 + 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gate": "gru"}, "there is no gate 'gru'; known are fixed, lstm"),
        ({"block_size": 0}, "block_size must be a positive integer, got 0"),
        ({"n_states": 2.5}, "n_states must be a positive integer, got 2.5"),
        ({"n_heads": 3}, "n_heads must divide the width 16, got 3"),
        ({"head_dim": 1}, "rotary positions need an even head_dim, got 1"),
        ({"rotary_base": 0}, "rotary_base must be a finite number greater than 1, got 0"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ValueError, match=words):
        build(**options)


@pytest.mark.slow
def test_a_copy_across_blocks_is_learned():
    """A symbol of the first block is asked for three blocks later, where no window reaches."""
    torch.manual_seed(0)
    symbols, size = 8, 4
    embedding, head = torch.nn.Embedding(symbols + 2, 32), torch.nn.Linear(32, symbols)
    mixer = create("block_recurrent", d_model=32, block_size=size, n_states=4, n_heads=2)
    parameters = [*embedding.parameters(), *mixer.parameters(), *head.parameters()]
    optimiser = torch.optim.Adam(parameters, 3e-3)

    def batch(rows: int) -> tuple[Tensor, Tensor]:
        wanted = torch.randint(0, symbols, (rows,))
        ids = torch.full((rows, 4 * size), symbols)
        ids[torch.arange(rows), torch.randint(0, size, (rows,))] = wanted
        ids[:, -1] = symbols + 1
        return ids, wanted

    def logits(ids: Tensor) -> Tensor:
        x = embedding(ids)
        return head(x + mixer(x)[0])[:, -1]

    for _ in range(400):
        ids, wanted = batch(64)
        optimiser.zero_grad()
        F.cross_entropy(logits(ids), wanted).backward()
        optimiser.step()
    ids, wanted = batch(256)
    with torch.no_grad():
        assert (logits(ids).argmax(-1) == wanted).float().mean() > 0.95
