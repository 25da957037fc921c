"""What a run leaves at its end: the model, its score beside the baselines, a sample, a picture."""

from __future__ import annotations

import time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from seqzoo.hub import save_pretrained
from seqzoo.hub.files import atomic_file
from seqzoo.models.generation import generate
from seqzoo.models.tokenizer import Tokenizer
from seqzoo.train.averaging import weights_to_judge
from seqzoo.train.callbacks.progress import quantity
from seqzoo.train.checkpoints import read_checkpoint
from seqzoo.train.curves import draw_curves
from seqzoo.train.data import LanguageData
from seqzoo.train.metrics_table import read_metrics
from seqzoo.train.modules import LanguageModeling
from seqzoo.train.run_folder import RunFolder
from seqzoo.train.sharded_checkpoints import read_shards

Facts = dict[str, Any]


def finish(run: RunFolder, module: LanguageModeling, data: LanguageData, facts: Facts, console: Console) -> Facts:
    """Judges a trained model on all validation and test tokens and leaves everything in the folder of the run.

    Weights are chosen by validation alone.

    Args:
        run: The folder.
        module: With the weights of the last step; afterwards with those that were saved.
        data: The texts.
        facts: What is known of the run already: ``steps``, ``seconds``, ``bytes``, ``bytes_per_second``, ``best_step``.
        console: For the report.

    Returns:
        What ``report.json`` holds.
    """
    started = time.perf_counter()
    step, score = _choose_weights(run, module, data, facts)
    save_pretrained(module.model, run.model, tokenizer=data.tokenizer)
    baselines = measure_baselines(data)
    text = sample(module, data.tokenizer)
    run.write_text(run.sample, text)
    draw(run, baselines, (step, score))
    report = {
        "validation_bits_per_byte": score,
        "validation_perplexity": 2.0 ** (score * data.bytes_per_token("validation")),
        **test_scores(module, data),
        "baselines_bits_per_byte": baselines,
        "model_of_step": step,
        "parameters": sum(parameter.numel() for parameter in module.model.parameters()),
        **facts,
        "report_seconds": round(time.perf_counter() - started, 3),
        "finished": True,
    }
    run.write_json(run.report, report)
    show(report, text, data, console)
    return report


def test_scores(module: LanguageModeling, data: LanguageData) -> Facts:
    """Bits per byte and perplexity of the test texts; empty where there are none."""
    if "test" not in data.sides:
        return {}
    bits = module.bits_per_token(data.test_dataloader())
    return {"test_bits_per_byte": bits / data.bytes_per_token("test"), "test_perplexity": 2.0**bits}


def save_interrupted(run: RunFolder, module: LanguageModeling, data: LanguageData) -> None:
    """Leaves the weights of the last step as a model."""
    save_pretrained(module.model, run.model, tokenizer=data.tokenizer)


def measure_baselines(data: LanguageData) -> dict[str, float]:
    """Bits per byte of the validation texts without a neural network, the best first."""
    return data.baselines()


def sample(module: LanguageModeling, tokenizer: Tokenizer) -> str:
    """A continuation of the module's prompt, the prompt included."""
    prompt = tokenizer.encode(module.sample_prompt or "\n")
    ids = torch.tensor([prompt], device=module.device)
    new = generate(module.model, ids, module.sample_length, temperature=module.sample_temperature, seed=module.seed)
    return tokenizer.decode([*prompt, *new[0].tolist()]) + "\n"


def draw(run: RunFolder, baselines: dict[str, float], final: tuple[int, float] | None) -> None:
    """Draws the curves so far."""
    lines = {name: value for name, value in baselines.items() if name != "uniform"}
    write_picture(run, draw_curves(read_metrics(run.metrics), lines, final, run.path.name))


def write_picture(run: RunFolder, picture: bytes) -> None:
    """Writes the picture of the curves, whole or not at all."""
    with atomic_file(run.curves, "wb", what="the picture of the curves") as file:
        file.write(picture)


def show(report: Facts, text: str, data: LanguageData, console: Console) -> None:
    """Prints a report, the sample first, so that the numbers are what one sees last."""
    console.rule("sample")
    console.print(Text(text.rstrip()))
    console.rule("validation")
    score = report["validation_bits_per_byte"]
    table = Table("", "bits per byte", "against the model")
    table.add_row("this model", f"{score:.3f}", "", style="bold")
    for name, value in report["baselines_bits_per_byte"].items():
        table.add_row(name, f"{value:.3f}", f"{100.0 * (value / score - 1.0):+.1f} %")
    console.print(table)
    console.print(
        f"Model and baselines were fitted on {data.words('training')}; the compressors saw the "
        f"{data.words('validation')} of validation alone, in one piece. The model's perplexity is "
        f"{report['validation_perplexity']:.3f} per token of {data.bytes_per_token('validation'):.3f} bytes.",
        highlight=False,
    )
    if "test_bits_per_byte" in report:
        console.print(
            f"On the {data.words('test')} of test {report['test_bits_per_byte']:.3f} bits per byte, perplexity "
            f"{report['test_perplexity']:.3f} per token.",
            highlight=False,
        )
    console.print(
        f"{report['parameters'] / 1e6:.2f} M parameters, {report['steps']} steps in {report['seconds'] / 60:.1f} min, "
        f"{quantity(report['bytes_per_second'])}B/s; weights of step {report['model_of_step']}",
        highlight=False,
    )


def _choose_weights(run: RunFolder, module: LanguageModeling, data: LanguageData, facts: Facts) -> tuple[int, float]:
    """Puts the better of the last and the best weights into the module; returns their step and score."""
    windows = data.val_dataloader()
    size = data.bytes_per_token("validation")
    step, score = facts["steps"], module.bits_per_token(windows) / size
    if facts["best_step"] == facts["steps"] or not run.best.exists():
        return step, score
    last = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    read = read_shards if run.sharded else read_checkpoint
    module.load_state_dict(weights_to_judge(read(run.best)))
    best = module.bits_per_token(windows) / size
    if best < score:
        return facts["best_step"], best
    module.load_state_dict(last)
    return step, score
