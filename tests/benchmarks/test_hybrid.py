"""What a hybrid takes: memory of training with the gradients in chunks, at 8k and at 64k tokens, and time beside plain.

The memory is the process's peak above what it held before the step, in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from seqzoo.models import LanguageModel, ModelConfig, backward_in_chunks

CHUNK = 2048
CONFIG = ModelConfig(vocab_size=256, d_model=128, n_layers=4, pattern=["mamba", "rglru"])

SCRIPT = """
import ctypes, sys
sys.path.insert(0, sys.argv[1])
import torch
from test_hybrid import CHUNK, CONFIG, LanguageModel, backward_in_chunks

def status(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name)) * 1024

def step(total):
    ids = torch.randint(256, (1, total + 1))
    if chunked:
        backward_in_chunks(model, ids[:, :-1], ids[:, 1:], CHUNK)
    else:
        model.loss(ids[:, :-1], ids[:, 1:]).backward()

torch.manual_seed(0)
model, chunked = LanguageModel(CONFIG), sys.argv[3] == "chunked"
# compiles, touches the libraries' memory and makes the gradients
step(CHUNK + 1 if chunked else 64)
ctypes.CDLL(None).malloc_trim(0)
before = status("VmRSS")
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # resets the peak
step(int(sys.argv[2]))
print(status("VmHWM") - before)
"""


def peak(total: int, how: str) -> float:
    """MiB that a step takes at most."""
    command = [sys.executable, "-c", SCRIPT, str(Path(__file__).parent), str(total), how]
    # a threshold that is given stays: every large block is mapped and given back, so the peak is what lives at once
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=3000, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return int(done.stdout) / 2**20


@pytest.mark.timeout(3600)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the process's memory as Linux tells it")
def test_the_memory_of_a_chunk_does_for_any_length(capsys: pytest.CaptureFixture[str]):
    short, long = 8192, 65536
    table = {
        (short, "plain"): peak(short, "plain"),
        (short, "chunked"): peak(short, "chunked"),
        (long, "chunked"): peak(long, "chunked"),
    }
    with capsys.disabled():
        print(f"\n| gradients, {CHUNK} tokens a chunk | peak above the model |\n|---|---|")
        for (total, how), size in table.items():
            print(f"| {total} tokens, {how} | {size:.0f} MiB |")
    assert table[long, "chunked"] <= 1.2 * table[short, "chunked"]
    assert table[short, "chunked"] < table[short, "plain"] / 2


def steps(chunked: bool):
    """What makes training steps of 8k tokens."""

    def make():
        torch.manual_seed(0)
        model = LanguageModel(CONFIG)
        ids, labels = torch.randint(256, (2, 1, 8192))

        def call() -> None:
            if chunked:
                backward_in_chunks(model, ids, labels, CHUNK)
            else:
                model.loss(ids, labels).backward()

        return call

    return make


@pytest.mark.parametrize("name", ["plain", "in chunks"])
def test_time(measure, name: str):
    measure(
        steps(name == "in chunks"),
        group="8192 tokens of a recurrent hybrid, gradients",
        name="seqzoo, in chunks of 2048" if name == "in chunks" else "seqzoo, at once",
        role="seqzoo" if name == "in chunks" else "peer",
        limit=steps(False),
        seconds=8.0,
    )
