"""What a process of a run with several does: the commands of fault_driver.py, as torchrun would start them."""

from __future__ import annotations

import contextlib
import os
import runpy
import signal
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from seqzoo.models import LanguageModel, ModelConfig
from seqzoo.parallel import shard_model, training_mesh
from seqzoo.parameters import parameter_groups
from seqzoo.train.sharded_checkpoints import load_into, whole_tensors, write_shards


def strike_alone(fault: dict[str, Any] | None, rank: int) -> dict[str, Any] | None:
    """The fault, where it concerns this rank; ``"rank"`` says which one, none concerns all."""
    if fault is None or fault.get("rank", rank) != rank:
        return None
    return {name: value for name, value in fault.items() if name != "rank"}


def serve(connection: Any, rank: int, size: int, ports: list[int], commands: list[dict[str, Any]], log: str) -> None:
    """Runs commands and answers with their exit statuses."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    os.environ |= {"GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "127.0.0.1", "COLUMNS": "200"}
    driver = runpy.run_path(str(Path(__file__).with_name("fault_driver.py")))
    # a child of a server that ignores them
    signal.signal(signal.SIGINT, signal.default_int_handler)
    statuses = []
    with Path(log).open("a", encoding="utf-8", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            fault = strike_alone(commands[0].get("fault"), rank)
            if fault:
                driver["inject"](**fault)
            for command, port in zip(commands, ports, strict=True):
                os.environ["MASTER_PORT"] = str(port)
                kind, *arguments = command["arguments"]
                statuses.append(
                    CASES[kind](*arguments) if kind in CASES else driver["main"](["train", kind, *arguments])
                )
    connection.send(statuses)


# -- cases that are no command --


def trained(size: int, seed: int) -> tuple[LanguageModel, torch.optim.Optimizer]:
    """A model that all processes share, two to a sequence where their number is even."""
    torch.manual_seed(seed)
    config = ModelConfig(vocab_size=19, d_model=16, n_layers=2, pattern=["min_gru", "mamba"], max_positions=7)
    mesh = training_mesh(1 if size % 2 else 2)
    model = shard_model(LanguageModel(config), mesh)
    return model, torch.optim.AdamW(parameter_groups(model, 0.01, 0.1))


def state_of(model: LanguageModel, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"state_dict": model.state_dict(), "optimizer_states": [optimizer.state_dict()], "number": 7}


def numbers_of(model: LanguageModel, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """All numbers of a model and its optimiser."""
    found = whole_tensors(model.state_dict(), True)
    for index, values in optimizer.state_dict()["state"].items():
        found |= {f"{index} {name}": value for name, value in whole_tensors(values, True).items()}
    return {name: value.numpy() for name, value in found.items()}


def save(path: str) -> dict[str, Any]:
    """Takes a step and writes a checkpoint."""
    dist.init_process_group("gloo")
    model, optimizer = trained(dist.get_world_size(), 0)
    generator = torch.Generator().manual_seed(dist.get_rank())
    for parameter in model.parameters():
        parameter.grad = distribute(parameter, generator)
    optimizer.step()
    write_shards(state_of(model, optimizer), Path(path))
    numbers = numbers_of(model, optimizer)
    dist.destroy_process_group()
    return numbers


def distribute(parameter: Any, generator: torch.Generator) -> Any:
    """A gradient that differs everywhere."""
    gradient = torch.zeros_like(parameter)
    gradient.to_local().normal_(generator=generator)
    return gradient


def load(path: str) -> dict[str, Any]:
    """Puts a checkpoint into a model that begins with other numbers."""
    dist.init_process_group("gloo")
    model, optimizer = trained(dist.get_world_size(), 1)
    rest = load_into(Path(path), model, [optimizer])
    assert rest == {"number": 7}, rest
    numbers = numbers_of(model, optimizer)
    dist.destroy_process_group()
    return numbers


CASES = {"case:save": save, "case:load": load}


if __name__ == "rank":
    serve(connection, rank, size, ports, commands, log)  # noqa: F821 - given by the test  # pyright: ignore
