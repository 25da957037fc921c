"""One run of training what is judged by accuracy: what it measures, shows and leaves."""

from __future__ import annotations

import math
import time
from typing import Any

from rich.console import Console
from rich.table import Table

from seqzoo.hub import save_pretrained
from seqzoo.train import report
from seqzoo.train.averaging import weights_to_judge
from seqzoo.train.callbacks import Metering, ProgressDisplay, StepsFromMinutes
from seqzoo.train.callbacks.planning import FORWARD_SHARE, REPORT_SECONDS, plan_steps
from seqzoo.train.callbacks.progress import quantity
from seqzoo.train.checkpoints import read_checkpoint
from seqzoo.train.curves import draw_accuracy_curves
from seqzoo.train.data.examples import EvaluationBatches
from seqzoo.train.metrics_table import CLASSIFICATION_COLUMNS, read_metrics
from seqzoo.train.training import Training


class ClassificationMetering(Metering):
    """Measures tokens in place of bytes, and logs the validation's accuracy and loss."""

    speed = "tokens_per_second"

    def __init__(self) -> None:
        super().__init__()
        self.accuracy: float | None = None

    def size(self, batch: Any) -> int:
        """Tokens of a batch, without padding."""
        return sum(batch["lengths"]) if "lengths" in batch else math.prod(batch["x"].shape[:2])

    def room(self, batch: Any) -> int:
        """Tokens of a batch with padding; 0 of batches that have none."""
        return math.prod(batch["x"].shape[:2]) if "lengths" in batch else 0

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """A row with the validation's result."""
        if "validation_accuracy" not in trainer.callback_metrics or trainer.sanity_checking:
            return
        row = {name: float(trainer.callback_metrics[name]) for name in ("validation_accuracy", "validation_loss")}
        self.accuracy = row["validation_accuracy"]
        self._log(trainer, row | {"seconds": round(self.seconds, 3)})

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return super().state_dict() | {"accuracy": self.accuracy}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up what a checkpoint kept."""
        super().load_state_dict(state_dict)
        self.accuracy = state_dict["accuracy"]


class ClassificationDisplay(ProgressDisplay):
    """Shows loss, accuracy, speed and remaining time.

    Args:
        console: Where.
        meter: What is shown; it must stand before this callback.
    """

    def __init__(self, console: Console, meter: ClassificationMetering) -> None:
        super().__init__(console, meter)
        self._measured = meter

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """A line for each validation."""
        value = self._measured.accuracy
        if value is not None and not trainer.sanity_checking:
            self._console.print(f"step {trainer.global_step}: validation accuracy {value:.4f}", highlight=False)

    def _words(self, step: int, total: int | None) -> str:
        words = [f"loss {self._average:.3f}"] if self._average else []
        if self._measured.accuracy is not None:
            words.append(f"accuracy {self._measured.accuracy:.3f}")
        words.append(f"{quantity(self._measured.recent_bytes_per_second)}tokens/s")
        return "  ".join([*words, *self._rest(step, total)])


class ClassificationSteps(StepsFromMinutes):
    """Turns minutes into steps, with room for judging all validation and test examples."""

    def _plan(self, trainer: Any, batch: Any, elapsed: float, step_seconds: float) -> int:
        data = trainer.datamodule
        each = FORWARD_SHARE * step_seconds / trainer.accumulate_grad_batches
        count, limit = len(data.val_dataloader()), trainer.limit_val_batches
        used = min(limit, count) if isinstance(limit, int) else int(limit * count)
        return plan_steps(
            budget=self.budget,
            elapsed=elapsed,
            done=trainer.global_step,
            step=step_seconds,
            validation=used * each,
            every=trainer.val_check_interval if isinstance(trainer.val_check_interval, int) else 0,
            # the last weights and the best are judged by validation, one of them by the test
            final=(2 * count + len(data.test_dataloader())) * each + REPORT_SECONDS,
        )


class ClassificationTraining(Training):
    """Training of a classifier: the best weights are those of the greatest accuracy in validation."""

    metric, greatest, columns = "validation_accuracy", True, CLASSIFICATION_COLUMNS
    planner, unit = ClassificationSteps, "tokens"

    def make_display(self) -> tuple[Metering, ProgressDisplay]:
        """What measures loss and speed, and what shows it."""
        meter = ClassificationMetering()
        return meter, ClassificationDisplay(self.console, meter)

    def data_words(self) -> str:
        """Where the data lie, and how many examples there are."""
        return self.cli.datamodule.words()

    def finish(self, module: Any, facts: dict[str, Any]) -> str:
        """Chooses weights by validation, judges them by the test, and leaves model, report and a table beside it."""
        started = time.perf_counter()
        data = self.cli.datamodule
        step, validation = self._choose(module, facts)
        test = module.judge(EvaluationBatches(data.examples("test"), batch_size=data.batch_size))
        save_pretrained(module.model, self.run.model)
        baselines = data.baselines()
        self.draw(baselines, (step, validation))
        found = {
            "test_accuracy": test["accuracy"],
            "test_loss": test["loss"],
            "test_examples": test["examples"],
            "validation_accuracy": validation,
            "baselines_accuracy": baselines,
            "model_of_step": step,
            "parameters": sum(parameter.numel() for parameter in module.model.parameters()),
            **{name.replace("bytes", "tokens"): value for name, value in facts.items()},
            "report_seconds": round(time.perf_counter() - started, 3),
            "finished": True,
        }
        self.run.write_json(self.run.report, found)
        table = Table("", "accuracy (test)")
        rows = sorted({**baselines, "this model": test["accuracy"]}.items(), key=lambda row: -row[1])
        for name, value in rows:
            table.add_row(name, f"{value:.4f}", style="bold" if name == "this model" else None)
        self.console.print(table)
        self._say(
            f"{found['parameters'] / 1e6:.2f} M parameters, {found['steps']} steps in {found['seconds'] / 60:.1f} "
            f"min; weights of step {step}, chosen by validation accuracy, {validation:.4f}"
        )
        return f"seqzoo.hub.from_pretrained({str(self.run.model)!r}) loads the model"

    def draw(self, baselines: dict[str, float] | None = None, final: tuple[int, float] | None = None) -> None:
        """Draws loss and accuracy so far; baselines are those of the test, near to those of validation."""
        picture = draw_accuracy_curves(read_metrics(self.run.metrics), baselines or {}, final, self.run.path.name)
        report.write_picture(self.run, picture)

    def _choose(self, module: Any, facts: dict[str, Any]) -> tuple[int, float]:
        """Puts the better of the last and the best weights into the module; returns their step and accuracy."""
        data = self.cli.datamodule
        batches = EvaluationBatches(data.examples("validation"), batch_size=data.batch_size)
        step, accuracy = facts["steps"], module.judge(batches)["accuracy"]
        if facts["best_step"] == facts["steps"] or not self.run.best.is_file():
            return step, accuracy
        last = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        module.load_state_dict(weights_to_judge(read_checkpoint(self.run.best)))
        best = module.judge(batches)["accuracy"]
        if best > accuracy:
            return facts["best_step"], best
        module.load_state_dict(last)
        return step, accuracy
