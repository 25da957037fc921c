"""``linear_attention`` and ``delta_rule`` against the loops over time of flash-linear-attention, written by others.

Of its package ``fla-core`` only the files named here are read: importing it takes seconds and warns where there is no
GPU. They compute in float32.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from seqzoo.kernels import dispatch
from seqzoo.ops import delta_rule, linear_attention
from seqzoo.testing import OpCase, linear_attention_case

BACKENDS = ("reference", "chunked", "cpu")


def oracle(family: str, name: str) -> Callable[..., Any]:
    """A function of ``fla.ops.<family>.naive``."""
    found = importlib.util.find_spec("fla")
    if found is None or not found.submodule_search_locations:
        pytest.skip("the oracle is not installed: pip install --no-deps fla-core")
    path = Path(found.submodule_search_locations[0], "ops", family, "naive.py")
    spec = importlib.util.spec_from_file_location(f"fla_{family}_naive", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def case(op: str, decay: str | None, state: bool) -> OpCase:
    return linear_attention_case(
        torch.float32, (2, 150), op=op, heads=3, key=16, value=20, decay=decay, state=state, seed=7
    )


def check(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor | None]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        if theirs is not None:
            assert ours.shape == theirs.shape
            assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("state", [False, True], ids=["no state", "state"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_decay_for_every_key_is_gla(backend, state):
    one = case("linear_attention", "key", state)
    q, k, v, log_decay, given = (one.tensors[name] for name in ("q", "k", "v", "log_decay", "initial_state"))
    expected = oracle("gla", "naive_recurrent_gla")(q, k, v, log_decay, given, output_final_state=True)
    with dispatch.backend(backend):
        check(one.call(), expected)


@pytest.mark.parametrize("state", [False, True], ids=["no state", "state"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_decay_for_every_token_is_simple_gla(backend, state):
    one = case("linear_attention", "token", state)
    q, k, v, log_decay, given = (one.tensors[name] for name in ("q", "k", "v", "log_decay", "initial_state"))
    recurrent = oracle("simple_gla", "naive_recurrent_simple_gla")
    with dispatch.backend(backend):
        check(one.call(), recurrent(q, k, v, log_decay, initial_state=given))
        scaled = linear_attention(q, k, v, log_decay, given, scale=0.3)
    check(scaled, recurrent(q, k, v, log_decay, scale=0.3, initial_state=given))


@pytest.mark.parametrize("backend", BACKENDS)
def test_fixed_decays_are_retention(backend):
    one = case("linear_attention", None, False)
    q, k, v = (one.tensors[name] for name in ("q", "k", "v"))
    turned = (value.transpose(1, 2) for value in (q, k, v))
    expected = oracle("retention", "naive_retention")(*turned).transpose(1, 2)
    log_decay = torch.log1p(-torch.exp2(-5 - torch.arange(3.0)))
    with dispatch.backend(backend):
        check(linear_attention(q, k, v, log_decay), (expected, None))


@pytest.mark.parametrize("state", [False, True], ids=["no state", "state"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_without_decay_it_is_linear_attention(backend, state):
    one = case("linear_attention", None, state)
    q, k, v, given = (one.tensors[name] for name in ("q", "k", "v", "initial_state"))
    recurrent = oracle("linear_attn", "naive_recurrent_linear_attn")
    expected = recurrent(q, k, v, initial_state=given, output_final_state=True)
    with dispatch.backend(backend):
        check(one.call(), expected)


@pytest.mark.parametrize("state", [False, True], ids=["no state", "state"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_delta_rule(backend, state):
    one = case("delta_rule", None, state)
    q, k, v, beta, given = (one.tensors[name] for name in ("q", "k", "v", "beta", "initial_state"))
    turned = (value.transpose(1, 2) for value in (q, k, v, beta))
    o, final = oracle("delta_rule", "delta_rule_recurrence")(*turned, given)
    with dispatch.backend(backend):
        check(one.call(), (o.transpose(1, 2), final))


@pytest.mark.parametrize("state", [False, True], ids=["no state", "state"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_delta_rule_with_a_decay_for_every_token_is_the_gated_one(backend, state):
    one = case("delta_rule", "token", state)
    q, k, v, beta, log_decay, given = (
        one.tensors[name] for name in ("q", "k", "v", "beta", "log_decay", "initial_state")
    )
    recurrent = oracle("gated_delta_rule", "naive_recurrent_gated_delta_rule")
    options = {"initial_state": given, "output_final_state": True}
    with dispatch.backend(backend):
        check(one.call(), recurrent(q, k, v, beta, log_decay, **options))
        scaled = delta_rule(q, k, v, beta, log_decay, given, scale=0.3)
    check(scaled, recurrent(q, k, v, beta, log_decay, scale=0.3, **options))


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("state", [False, True], ids=["no state", "state"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_delta_rule_with_a_decay_for_every_key_is_kda(backend, state, groups):
    one = linear_attention_case(
        torch.float32, (2, 150), op="delta_rule", heads=3, groups=groups, key=16, value=20, decay="key", state=state
    )
    q, k, v, beta, log_decay, given = (
        one.tensors[name] for name in ("q", "k", "v", "beta", "log_decay", "initial_state")
    )
    recurrent = oracle("kda", "naive_recurrent_kda")
    expected = recurrent(q, k, v, log_decay, beta, initial_state=given, output_final_state=True)
    with dispatch.backend(backend):
        check(one.call(), expected)
