"""The GPU kernels compile for every target without a GPU, and use what ``resources.json`` says.

A change that moves a number has to bring the table along: ``python -m seqzoo.kernels.aot --output
tests/kernels/resources.json``. Launches and bytes hold for every version of Triton, registers for the one in the table.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from seqzoo.kernels import aot

triton = pytest.importorskip("triton")

RECORDED = Path(__file__).with_name("resources.json")


def compiled(*options: str) -> dict[str, Any]:
    # kernels of this process may be interpreted ones, which cannot be compiled
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "seqzoo.kernels.aot", *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def entries(table: dict[str, Any]):
    for target, names in table["targets"].items():
        for op, examples in names.items():
            for example, entry in examples.items():
                yield (target, op, example), entry


def check_limits(table: dict[str, Any]) -> None:
    for key, entry in entries(table):
        for kernel, used in entry["kernels"].items():
            assert used["spills"] == 0, (*key, kernel)
            assert used["shared"] <= aot.TARGETS[key[0]].shared_memory, (*key, kernel)


@pytest.fixture(scope="module")
def table() -> dict[str, Any]:
    return compiled()


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    return json.loads(RECORDED.read_text())


def test_nothing_spills_and_shared_memory_suffices(table):
    check_limits(table)


def test_every_op_is_compiled_for_every_target(table):
    assert set(table["targets"]) == set(aot.TARGETS)
    assert all(set(names) == set(aot.ops()) for names in table["targets"].values())


def test_launches_and_bytes_are_those_recorded(table, recorded):
    def moved(source):
        return {key: (entry["launches"], entry["bytes"]) for key, entry in entries(source)}

    assert moved(table) == moved(recorded)


def test_registers_and_shared_memory_are_those_recorded(table, recorded):
    if table["triton"] != recorded["triton"]:
        pytest.skip(f"the table was made with Triton {recorded['triton']}, this is {table['triton']}")
    assert table == recorded


def test_a_scan_moves_at_most_what_it_promises(recorded):
    forms = {"forward": {"one pass": 6.2, "segments": 10.2}, "backward": {"one pass": 10.2, "segments": 14.2}}
    for (_, op, example), entry in entries(recorded):
        if op in ("linear_scan", "gated_scan") and "bfloat16" in example and "min_lstm" not in example:
            mode = "one pass" if "one pass" in example else "segments"
            assert entry["bytes"] <= forms[example.split()[-1]][mode], (op, example)
            assert entry["launches"] == (1 if mode == "one pass" else 2), (op, example)


def test_a_convolution_moves_each_value_once_in_one_launch(recorded):
    limits = {"forward": 4.05, "backward": 6.6}
    found = [
        (example, entry)
        for (_, op, example), entry in entries(recorded)
        if op == "causal_conv" and example.startswith("bfloat16")
    ]
    assert found
    for example, entry in found:
        assert entry["bytes"] <= limits[example.split()[-1]], example
        assert entry["launches"] == 1, example


def test_cauchy_sums_are_moved_once_in_one_launch(recorded):
    found = [
        (example, entry) for (_, op, example), entry in entries(recorded) if op == "cauchy" and "length=4096" in example
    ]
    assert found
    for example, entry in found:
        # 8 bytes a node of every sum, and no quotient
        assert entry["bytes"] <= 9, example
        assert entry["launches"] == 1, example


def test_a_selective_scan_moves_no_state_a_token(recorded):
    limits = {
        ("one pass", "forward"): (1, 9.1),
        ("one pass", "backward"): (2, 19.2),
        ("segments", "forward"): (3, 14.0),
        ("segments", "backward"): (4, 30.0),
    }
    found = [
        (example, entry)
        for (_, op, example), entry in entries(recorded)
        if op == "selective_scan" and "bfloat16" in example
    ]
    assert found
    for example, entry in found:
        mode = "one pass" if "one pass" in example else "segments"
        launches, most = limits[mode, example.split()[-1]]
        assert entry["launches"] == launches, example
        assert entry["bytes"] <= most, example


def test_matrix_states_with_one_decay_a_head_take_few_launches(recorded):
    limits = {"forward": 3, "backward": 5}
    found = [
        (op, example, entry["launches"])
        for (_, op, example), entry in entries(recorded)
        if op in ("linear_attention", "delta_rule") and "key decay" not in example
    ]
    assert {op for op, _, _ in found} == {"linear_attention", "delta_rule"}
    for op, example, launches in found:
        assert launches <= limits[example.split()[-1]], (op, example)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_every_form_compiles_without_spills():
    check_limits(compiled("--exhaustive"))


def test_the_interpreter_is_refused():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "seqzoo.kernels.aot"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "unset TRITON_INTERPRET" in done.stderr


def test_spills_count_inside_loops_only():
    code = """
        /*0010*/                   STL [R1], R3 ;
        /*0020*/                   LDG.E R4, [R2.64] ;
        /*0030*/              @!P0 LDL R5, [R1+0x4] ;
        /*0040*/               @P1 BRA 0x20 ;
        /*0050*/                   LDL.LU R7, [R1] ;
        /*0060*/                   BRA 0x60 ;
    """
    assert aot.spills_in_loops(code) == 1
