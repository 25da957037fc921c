"""Weights that stand for those in training where a model is judged and kept: averages of them over the steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as lightning
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from seqzoo.kernels.checks import accumulator
from seqzoo.train.configuration import ConfigurationError

KEY = "averaged_weights"
Weights = dict[str, Tensor]


class AveragedWeights(lightning.Callback):
    """Validates with other weights than those in training, which afterwards have the bits that they had before.

    It stands before the callback that saves, so that a checkpoint's ``state_dict`` is always what training goes on
    with; the averaged weights are part of this callback's state.

    Args:
        use: Whether validation takes the averaged weights, and the model that the run leaves.
    """

    def __init__(self, use: bool = True) -> None:
        self.use = use
        self._aside: Weights = {}

    @property
    def state_key(self) -> str:
        """The same for every kind of average, so that whoever reads a checkpoint finds it."""
        return KEY

    def weights(self) -> Weights:
        """The averaged weights, with the names of the module's state."""
        raise NotImplementedError(f"{type(self).__name__} must define weights")

    def put_into(self, module: nn.Module) -> None:
        """Replaces a module's weights by the averaged ones."""
        _put(module, self.weights())

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Puts the averaged weights into their place."""
        if self.use and not trainer.sanity_checking and trainer.state.fn == TrainerFn.FITTING:
            self._aside = _copies(pl_module)
            self.put_into(pl_module)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Puts the weights in training back."""
        self._back(pl_module)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Puts the weights in training back, where validation failed."""
        self._back(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"use": self.use, "average": self.weights()}

    def _back(self, module: nn.Module) -> None:
        if self._aside:
            _put(module, self._aside)
            self._aside = {}


class ExponentialAverage(AveragedWeights):
    """The weights' exponential moving average, corrected for its beginning as Adam's are.

    After step t it is ``sum_s d^(t - s) w_s / sum_s d^(t - s)`` over the steps s = 1 to t: "Adam",
    https://arxiv.org/abs/1412.6980, section 3, on weights as in "Acceleration of Stochastic Approximation by Averaging"
    (Polyak and Juditsky, 1992). Buffers of floating point are averaged too, so that batch norm's statistics belong to
    the weights; others are the last ones. Averages of float16 and bfloat16 are float32.

    Args:
        decay: d, from 0 to below 1; the average reaches back about 1 / (1 - d) steps.
        use: Whether validation takes the average, and the model that the run leaves.

    Raises:
        ConfigurationError: If ``decay`` is out of range.
    """

    def __init__(self, decay: float, use: bool = True) -> None:
        super().__init__(use)
        if not 0.0 <= decay < 1.0:
            raise ConfigurationError(f"ema_decay must be at least 0 and below 1, got {decay}")
        self.decay = decay
        self.steps = 0
        self._average: Weights = {}

    def weights(self) -> Weights:
        """The average."""
        return self._average

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begins with the weights as they are; goes on, where a checkpoint was read."""
        if not self._average:
            self._average = {name: tensor.to(_wide(tensor)) for name, tensor in _copies(pl_module).items()}
        self._average = {name: tensor.to(pl_module.device) for name, tensor in self._average.items()}

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Adds the weights of a step; batches whose gradients are accumulated are none."""
        if trainer.global_step == self.steps:
            return
        self.steps = trainer.global_step
        share = (1.0 - self.decay) / (1.0 - self.decay**self.steps)
        for name, tensor in pl_module.state_dict().items():
            average = self._average[name]
            if average.is_floating_point():
                average.lerp_(tensor.to(average.dtype), share)
            else:
                average.copy_(tensor)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return super().state_dict() | {"steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up what a checkpoint kept."""
        self._average, self.steps = state_dict["average"], state_dict["steps"]


class ScheduleFreeWeights(AveragedWeights):
    """The average x that the schedule-free optimiser keeps beside the weights y where it takes gradients.

    "The Road Less Scheduled", https://arxiv.org/abs/2405.15682, section 2. The optimiser's own way from y to x and back
    rounds; here y is kept aside, so that validating and saving do not change the bits of training.
    """

    def __init__(self) -> None:
        super().__init__()
        self._average: Weights = {}
        self._training: tuple[Any, nn.Module] | None = None

    def weights(self) -> Weights:
        """x: while training goes on that of the last step, else that at its end."""
        if self._training is None:
            return self._average
        optimizer, module = self._training
        before = _copies(module)
        with _judging(optimizer):
            average = _copies(module)
        _put(module, before)
        return average

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Tells the optimiser that training begins."""
        optimizer = trainer.optimizers[0]
        optimizer.train()
        self._training = optimizer, pl_module

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Keeps x for the report; the optimiser may be gone then."""
        self._leave()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """As at the end of training, which this is."""
        super().on_exception(trainer, pl_module, exception)
        if self._training is not None:
            self._leave()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up x, for the report of a run whose training is over."""
        self._average = state_dict["average"]

    def _leave(self) -> None:
        self._average = self.weights()
        self._training = None


def weights_to_judge(checkpoint: Mapping[str, Any]) -> Weights:
    """Of a checkpoint, the weights that its validation was with, for a module's ``load_state_dict``."""
    own = checkpoint["callbacks"].get(KEY)
    return checkpoint["state_dict"] if own is None or not own["use"] else own["average"]


@contextmanager
def _judging(optimizer: Any) -> Iterator[None]:
    """Lets the optimiser change its weights to x; the caller puts y back."""
    optimizer.eval()
    try:
        yield
    finally:
        for group in optimizer.param_groups:
            group["train_mode"] = True


def _wide(tensor: Tensor) -> torch.dtype:
    return accumulator(tensor.dtype) if tensor.is_floating_point() else tensor.dtype


def _copies(module: nn.Module) -> Weights:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


@torch.no_grad()
def _put(module: nn.Module, weights: Weights) -> None:
    for name, tensor in module.state_dict().items():
        tensor.copy_(weights[name])
