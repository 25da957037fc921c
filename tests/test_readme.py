"""What README.md says runs, and its table is the registry's."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from seqzoo import cli, zoo

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_code_blocks_run(block: str):
    # in a process of its own: a block may register a mixer, which would then be in everybody's zoo
    done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr


def test_a_layer_added_as_the_readme_says_is_in_the_zoo():
    block = next(block for block in BLOCKS if "@register" in block)
    check = """
import seqzoo
from seqzoo.testing import inputs
mixer = seqzoo.create("ema", d_model=16).double()
x = inputs((1, 9, 16), torch.float64)
whole, final = mixer(x, return_state=True)
first, state = mixer(x[:, :4], return_state=True)
second, state = mixer(x[:, 4:], state, return_state=True)
assert torch.allclose(whole, torch.cat((first, second), 1)) and torch.allclose(final["y"], state["y"])
assert "ema" in seqzoo.list_mixers() and mixer.state_size(5) == 16
"""
    done = subprocess.run(
        [sys.executable, "-c", block + check], capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_table_is_the_registry():
    found = re.search(r"<!-- zoo: seqzoo list --markdown -->\n(.*?)\n?<!-- /zoo -->", README, flags=re.DOTALL)
    assert found is not None
    assert found.group(1) == zoo.markdown(), "README.md's table is not what `seqzoo list --markdown` prints"


def test_the_signature_is_that_of_the_results():
    pytest.importorskip("lightning")
    from seqzoo.eval import signature

    path = Path(__file__).parent / "benchmarks/results/signature/signature.jsonl"
    results = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    cells = {(name, task) for name, row in signature.ROWS.items() for task in row.expected}
    assert sorted((one["row"], one["task"], one["seed"]) for one in results) == sorted(
        (*cell, seed) for cell in cells for seed in range(signature.SEEDS)
    )
    assert f"<!-- signature -->\n{signature.medians(results)}<!-- /signature -->" in README
    assert signature.markdown(results) == path.with_suffix(".md").read_text(encoding="utf-8")


def test_every_command_is_described_and_every_described_one_exists():
    described = set(re.findall(r"^seqzoo (\w+)", README, flags=re.MULTILINE))
    assert described == set(cli.COMMANDS)


def test_it_stays_short():
    assert len(README.splitlines()) <= 250
