"""The options of a run do what they say: groups, refined and free schedules, averages, early end, and the rest."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as lightning
import pytest
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from seqzoo.hub import from_pretrained
from seqzoo.models import ClassifierConfig, LanguageModel, ModelConfig, SequenceClassifier
from seqzoo.models.tokenizer import characters
from seqzoo.parameters import parameter_groups
from seqzoo.train.averaging import ExponentialAverage, weights_to_judge
from seqzoo.train.callbacks import Checkpointing
from seqzoo.train.checkpoints import read_checkpoint
from seqzoo.train.classification import ClassificationModule
from seqzoo.train.command import main
from seqzoo.train.environment import memory_in_use
from seqzoo.train.finite import NonFiniteLoss, check_finite
from seqzoo.train.groups import check_groups, describe_groups
from seqzoo.train.metrics_table import read_metrics
from seqzoo.train.modules import LanguageModeling
from seqzoo.train.refinement import RefinedSchedule, refine
from seqzoo.train.schedule import rate_factor

pytestmark = [
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
    # Dynamo's own look at the inputs of what it compiles
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]
FREE = ("--model.schedule", "schedule_free")


def config(**options) -> ModelConfig:
    return ModelConfig(**{"vocab_size": 256, "d_model": 16, "n_layers": 2, "pattern": ["s4d", "min_gru"]} | options)


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def command(tmp_path_factory, tiny):
    """Runs the command and returns the folder of its run."""

    def run(*more: object, status: int = 0):
        runs = tmp_path_factory.mktemp("runs")
        assert main([*tiny, "--runs", str(runs), *map(str, more)]) == status
        return next(runs.iterdir())

    return run


@pytest.fixture(scope="module")
def plain(command):
    return command("--trainer.log_every_n_steps", 1)


def stopped(command, monkeypatch, step, *more):
    """A run that Ctrl-C, seen as Lightning's own, ended at a step."""
    original = Checkpointing.on_train_batch_end

    def stop(self, trainer, *arguments):
        original(self, trainer, *arguments)
        if trainer.global_step == step:
            raise RuntimeError("stopped by the test")

    with monkeypatch.context() as patch:
        patch.setattr(Checkpointing, "on_train_batch_end", stop)
        with pytest.raises(RuntimeError, match="by the test"):
            command(*more)


def last_run(tmp_path_factory):
    folders = [path for path in tmp_path_factory.getbasetemp().glob("runs*/*") if path.is_dir()]
    return max(folders, key=lambda path: path.stat().st_mtime)


class TestGroups:
    def test_every_parameter_is_described_once(self):
        model = LanguageModel(config())
        groups = parameter_groups(model, 0.01, 0.1)
        described = describe_groups(model, groups)
        names = [name for group in described for name in group["names"]]
        assert sorted(names) == sorted(name for name, _ in model.named_parameters())
        assert sum(group["parameters"] for group in described) == sum(one.numel() for one in model.parameters())
        assert [group["tensors"] for group in described] == [len(group["names"]) for group in described]
        kinds = {(round(group["lr"], 9), group["weight_decay"]) for group in described}
        assert kinds == {(0.01, 0.1), (0.01, 0.0), (0.001, 0.0)}

    def test_what_is_not_in_one_group_is_named(self):
        model = LanguageModel(config())
        groups = parameter_groups(model, 0.01)
        lost = groups[0]["params"].pop()
        with pytest.raises(ValueError, match=r"must be in one group of the optimiser: .* is in 0$"):
            check_groups(model, groups)
        groups[0]["params"] += [lost, lost]
        with pytest.raises(ValueError, match=r"is in 2$"):
            check_groups(model, groups)
        groups[0]["params"][-1] = nn.Parameter(torch.ones(3))
        with pytest.raises(ValueError, match=r"shape \(3,\) that the model does not train"):
            check_groups(model, groups)

    def test_a_run_shows_and_keeps_them(self, plain, command, capsys):
        written = json.loads((plain / "parameter_groups.json").read_text())
        model = from_pretrained(plain / "model")
        assert sum(group["parameters"] for group in written) == sum(one.numel() for one in model.parameters())
        assert {group["lr"] for group in written} == {0.02}


class TestRefinement:
    def test_equal_norms_give_the_line(self):
        found = refine([2.0] * 50)
        assert found == pytest.approx([1 - step / 49 for step in range(50)])
        assert refine([2.0] * 50, power=2.0) == pytest.approx(found)

    def test_it_is_the_sum_over_what_follows(self):
        norms = [1.0 + 0.1 * (step % 7) + 3.0 / (1 + step) for step in range(30)]
        for power in (1.0, 2.0):
            weights = [norm**-power for norm in norms]
            values = [weight * sum(weights[step + 1 :]) for step, weight in enumerate(weights)]
            expected = [value / max(values) for value in values]
            assert refine(norms, smoothing=0.0, power=power) == pytest.approx(expected)

    def test_large_gradients_first_make_a_rise_and_single_ones_do_nothing(self):
        falling = [10.0 - step if step < 9 else 1.0 for step in range(100)]
        found = refine(falling, smoothing=0.03)
        assert found[0] < 0.2
        assert 8 < found.argmax() < 14
        spiked = [1.0] * 100
        spiked[40] = 1000.0
        assert refine(spiked) == pytest.approx(refine([1.0] * 100))

    def test_norms_that_are_none(self):
        with pytest.raises(ValueError, match=r"must be positive and finite, number 2 is nan"):
            refine([1.0, 2.0, float("nan")])

    def test_the_factor_of_a_step(self):
        schedule = RefinedSchedule(*map(torch.tensor, ([0.0, 0.5, 1.0], [0.5, 1.0, 0.0])))
        assert rate_factor(49, 0, 99, "refined", schedule) == pytest.approx(1.0)
        assert rate_factor(74, 0, 99, "refined", schedule) == pytest.approx(0.5)
        assert rate_factor(0, 9, 99, "refined", schedule) == pytest.approx(0.1 * schedule(0.01))
        with pytest.raises(ValueError, match="needs refined_from and a number of steps"):
            rate_factor(0, 0, -1, "refined", schedule)

    def test_a_run_takes_anothers_and_resumes_without_it(self, plain, command, tmp_path, monkeypatch, tmp_path_factory):
        rows = read_metrics(plain / "metrics.csv")
        assert all(row["gradient_l1"] >= row["gradient_norm"] > 0 for row in rows if row["train_loss"])
        earlier = tmp_path / "earlier"
        shutil.copytree(plain, earlier)
        options = ["--model.schedule", "refined", "--model.refined_from", earlier, "--model.warmup_steps", 0]
        whole = command(*options, "--trainer.log_every_n_steps", 1)
        schedule = RefinedSchedule.of_run(plain)
        rates = [row["lr"] for row in read_metrics(whole / "metrics.csv") if row["lr"] is not None]
        assert rates == pytest.approx([0.02 * schedule((step + 1) / 25) for step in range(24)])
        stopped(command, monkeypatch, 13, *options)
        shutil.rmtree(earlier)
        run = last_run(tmp_path_factory)
        assert main(["--resume", str(run)]) == 0
        assert (run / "model/model.safetensors").read_bytes() == (whole / "model/model.safetensors").read_bytes()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"schedule": "refined"}, "belong together"),
            ({"refined_from": "runs/x"}, "belong together"),
            ({"schedule": "refined", "refined_from": "/nowhere"}, "which has a metrics.csv, got '/nowhere'"),
        ],
    )
    def test_what_does_not_fit(self, options, message):
        with pytest.raises(ValueError, match=message):
            LanguageModeling(config(), **options)

    def test_a_run_that_is_too_short(self, tmp_path):
        (tmp_path / "metrics.csv").write_text("step,gradient_l1\n1,2.0\n2,2.0\n")
        with pytest.raises(ValueError, match=r"holds 2 gradient norms .* at least 10"):
            RefinedSchedule.of_run(tmp_path)


@pytest.fixture(scope="module")
def free(command):
    return command(*FREE)


class TestScheduleFree:
    def test_it_keeps_the_average_and_trains_with_the_rest(self, free):
        checkpoint = read_checkpoint(free / "checkpoints/last.safetensors")
        average, weights = weights_to_judge(checkpoint), checkpoint["state_dict"]
        (optimiser,) = checkpoint["optimizer_states"]
        named = [name for group in optimiser["param_groups"] for name in group.get("param_names", group["names"])]
        assert all(group["train_mode"] for group in optimiser["param_groups"])
        for index, name in enumerate(named):
            y, z = weights[f"model.{name}"], optimiser["state"][index]["z"]
            # y = (1 - beta1) z + beta1 x, with beta1 = 0.9
            torch.testing.assert_close(average[f"model.{name}"], (y - 0.1 * z) / 0.9, rtol=1e-4, atol=1e-6)
        assert not same(average, weights)
        model = from_pretrained(free / "model").state_dict()
        best = read_checkpoint(free / "checkpoints/best.safetensors")
        assert any(
            same({f"model.{k}": v for k, v in model.items()}, weights_to_judge(one)) for one in (checkpoint, best)
        )

    def test_validation_changes_no_bit(self, free, command):
        other = command(*FREE, "--trainer.val_check_interval", 3)
        one, two = (read_checkpoint(run / "checkpoints/last.safetensors") for run in (free, other))
        assert same(one["state_dict"], two["state_dict"])

    def test_it_resumes_to_the_same_bits(self, free, command, monkeypatch, tmp_path_factory):
        stopped(command, monkeypatch, 13, *FREE)
        run = last_run(tmp_path_factory)
        assert main(["--resume", str(run)]) == 0
        assert (run / "model/model.safetensors").read_bytes() == (free / "model/model.safetensors").read_bytes()
        one, two = (read_checkpoint(path / "checkpoints/last.safetensors") for path in (free, run))
        assert same(one["state_dict"], two["state_dict"])
        assert repr(one["optimizer_states"]) == repr(two["optimizer_states"])

    def test_what_does_not_fit(self, monkeypatch):
        with pytest.raises(ValueError, match="of which norm='batch' has no statistics"):
            LanguageModeling(config(norm="batch"), schedule="schedule_free")
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ValueError, match=r"pip install 'seqzoo\[schedulefree\]'"):
            LanguageModeling(config(), schedule="schedule_free")


class TestExponentialAverage:
    def test_it_is_the_weighted_mean_of_the_steps(self):
        module = nn.Linear(3, 2).double()
        module.register_buffer("count", torch.tensor(0))
        callback, trainer = ExponentialAverage(0.8), SimpleNamespace(global_step=0)
        module.device = torch.device("cpu")
        callback.on_train_start(trainer, module)
        seen = []
        for step in range(1, 7):
            for name in ("weight", "bias"):
                with torch.no_grad():
                    getattr(module, name).add_(torch.randn_like(getattr(module, name)))
            # a batch whose gradients are kept for the next is no step
            callback.on_train_batch_end(trainer, module, None, None, 0)
            trainer.global_step = step
            module.count.fill_(step)
            callback.on_train_batch_end(trainer, module, None, None, 0)
            seen.append({name: tensor.clone() for name, tensor in module.state_dict().items()})
        shares = [0.8 ** (6 - step) for step in range(1, 7)]
        for name in ("weight", "bias"):
            expected = sum(share * one[name] for share, one in zip(shares, seen, strict=True)) / sum(shares)
            torch.testing.assert_close(callback.weights()[name], expected, rtol=1e-13, atol=1e-13)
        assert callback.weights()["count"] == 6

    def test_half_precision_is_averaged_in_float32(self):
        module = nn.Linear(3, 2).bfloat16()
        module.device = torch.device("cpu")
        callback = ExponentialAverage(0.8)
        callback.on_train_start(None, module)
        assert callback.weights()["weight"].dtype == torch.float32

    def test_validation_has_the_average_and_gives_the_weights_back(self):
        module = nn.Linear(3, 2)
        module.device = torch.device("cpu")
        callback = ExponentialAverage(0.5)
        trainer = SimpleNamespace(global_step=0, sanity_checking=False, state=SimpleNamespace(fn=TrainerFn.FITTING))
        callback.on_train_start(trainer, module)
        for step in (1, 2):
            trainer.global_step = step
            nn.init.constant_(module.weight, float(step))
            callback.on_train_batch_end(trainer, module, None, None, 0)
        for end in (callback.on_validation_end, lambda *one: callback.on_exception(*one, RuntimeError())):
            callback.on_validation_start(trainer, module)
            assert module.weight[0, 0].item() == pytest.approx((0.5 * 1 + 2) / 1.5)
            end(trainer, module)
            assert module.weight[0, 0].item() == 2.0

    def test_which_weights_a_checkpoint_is_judged_with(self):
        plain, average = {"weight": torch.zeros(1)}, {"weight": torch.ones(1)}
        for use, expected in ((True, average), (False, plain)):
            callbacks = {"averaged_weights": {"use": use, "average": average}}
            assert weights_to_judge({"state_dict": plain, "callbacks": callbacks}) is expected
        assert weights_to_judge({"state_dict": plain, "callbacks": {}}) is plain

    def test_the_best_average_is_kept(self, command, monkeypatch):
        original, scores = LanguageModeling.score, iter((2.0, 1.0))

        def score(self, batch, state):
            nats, count, state = original(self, batch, state)
            return nats * (1.0 if self.trainer.global_step == 8 else 100.0), count, state

        monkeypatch.setattr(LanguageModeling, "score", score)
        # the last weights are judged first, then the best
        monkeypatch.setattr(LanguageModeling, "bits_per_token", lambda self, windows: next(scores))
        run = command("--ema_decay", 0.8)
        best = read_checkpoint(run / "checkpoints/best.safetensors")
        assert best["global_step"] == 8
        kept = {f"model.{name}": tensor for name, tensor in from_pretrained(run / "model").state_dict().items()}
        assert same(kept, best["callbacks"]["averaged_weights"]["average"])

    @pytest.mark.parametrize("use", [True, False])
    def test_a_run_trains_to_the_same_bits_and_keeps_it(self, use, plain, command, monkeypatch, tmp_path_factory):
        options = ["--ema_decay", 0.8, "--ema_use", str(use).lower()]
        run = command(*options, "--trainer.log_every_n_steps", 1)
        one, other = (read_checkpoint(path / "checkpoints/last.safetensors") for path in (run, plain))
        assert same(one["state_dict"], other["state_dict"])
        assert repr(one["optimizer_states"]) == repr(other["optimizer_states"])
        scores = [
            [row["validation_bpb"] for row in read_metrics(path / "metrics.csv") if row["validation_bpb"]]
            for path in (run, plain)
        ]
        assert (scores[0] == scores[1]) == (not use)
        assert (run / "model-average").exists() == (not use)
        folder = run / ("model" if use else "model-average")
        kept = {f"model.{name}": tensor for name, tensor in from_pretrained(folder).state_dict().items()}
        best = read_checkpoint(run / "checkpoints/best.safetensors")
        averages = [checkpoint["callbacks"]["averaged_weights"]["average"] for checkpoint in (one, best)]
        assert any(same(kept, average) for average in averages)
        assert not same(kept, one["state_dict"])
        if use:
            stopped(command, monkeypatch, 13, *options)
            again = last_run(tmp_path_factory)
            assert main(["--resume", str(again)]) == 0
            assert (again / "model/model.safetensors").read_bytes() == (run / "model/model.safetensors").read_bytes()


def test_early_stopping_ends_and_is_finished(command, capsys):
    # without a learning rate no validation is better than the first
    run = command("--model.lr", 0, "--early_stopping", 1)
    assert "stopped early: 1 validations without a better one" in capsys.readouterr().out
    report = json.loads((run / "report.json").read_text())
    assert report["steps"] == 16
    # killed in its report
    (run / "report.json").unlink()
    assert main(["--resume", str(run)]) == 0
    assert json.loads((run / "report.json").read_text())["steps"] == 16


class Batches(torch.utils.data.IterableDataset):
    def __init__(self, size: int) -> None:
        self.size = size

    def __iter__(self):
        generator = torch.Generator().manual_seed(0)
        return iter(torch.randint(0, 256, (24, 13), generator=generator).split(self.size))


@pytest.fixture
def fit(quiet_trainer):
    def run(module, size: int, steps: int = 3, **options) -> lightning.Trainer:
        trainer = quiet_trainer(steps, **options)
        trainer.fit(module, torch.utils.data.DataLoader(Batches(size), batch_size=None))
        return trainer

    return run


def language(**options) -> LanguageModeling:
    torch.manual_seed(0)
    return LanguageModeling(config(), lr=0.01, warmup_steps=0, schedule="constant", **options)


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers", "ignore:You defined")
class TestTrainer:
    def test_two_batches_of_four_are_one_of_eight(self, fit):
        together, apart = language(), language()
        fit(together, 8, precision="64-true")
        assert fit(apart, 4, precision="64-true", accumulate_grad_batches=2).global_step == 3
        for (name, one), other in zip(together.named_parameters(), apart.parameters(), strict=True):
            assert one.dtype == torch.float64
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10, msg=name)
        half = language()
        fit(half, 4, precision="64-true")
        assert not torch.allclose(half.model.embedding.weight, together.model.embedding.weight)

    def test_gradients_are_clipped_to_the_norm(self, fit):
        found = []

        def look(optimiser, *arguments):
            gradients = [
                one.grad for group in optimiser.param_groups for one in group["params"] if one.grad is not None
            ]
            found.append(float(torch.nn.utils.get_total_norm(gradients)))

        handle = register_optimizer_step_post_hook(look)
        try:
            fit(language(), 8, gradient_clip_val=0.125)
            fit(language(), 8)
        finally:
            handle.remove()
        assert found[:3] == pytest.approx([0.125] * 3, rel=1e-4)
        assert min(found[3:]) > 0.25

    def test_bfloat16_is_that_of_activations(self, fit):
        kinds, losses = [], []
        for precision, kind in (("bf16-mixed", torch.bfloat16), ("32-true", torch.float32)):
            module = language()
            mlp = module.model.backbone.blocks[1].mlp
            kinds.clear()
            mlp.register_forward_hook(lambda one, given, out: kinds.append(out.dtype))
            fit(module, 8, precision=precision)
            assert set(kinds) == {kind}
            assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
            with torch.no_grad():
                losses.append(float(module.model.loss(*shifted())))
        assert losses[0] == pytest.approx(losses[1], rel=0.02)


def shifted():
    batch = next(iter(Batches(8)))
    return batch[:, :-1], batch[:, 1:]


def compiled_losses(command, backend):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    options = ["--model.config.dropout", 0, "--trainer.max_steps", 6, "--trainer.log_every_n_steps", 1]
    rows = [read_metrics(command(*options, *more) / "metrics.csv") for more in ([], ["--compile", backend])]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    return [[row["train_loss"] for row in one if row["train_loss"] is not None] for one in rows]


def test_compiling_changes_no_loss(command):
    eager, compiled = compiled_losses(command, "aot_eager")
    assert len(eager) == 6
    assert compiled == pytest.approx(eager, rel=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script")  # of PyTorch's own use of it
def test_inductor_changes_no_loss(command):
    eager, compiled = compiled_losses(command, "true")
    assert compiled == pytest.approx(eager, rel=1e-4)


class TestFinite:
    def classifier(self, **options) -> ClassificationModule:
        torch.manual_seed(0)
        values = {"d_model": 16, "n_layers": 2, "pattern": "s4d", "n_classes": 3, "vocab_size": 9} | options
        return ClassificationModule(ClassifierConfig(**values))

    def test_a_classifiers_layer_is_named(self):
        model = self.classifier().model
        assert isinstance(model, SequenceClassifier)
        block = model.backbone.blocks[1]
        block.mlp.register_forward_hook(lambda one, given, out: out / 0.0)
        ids = torch.zeros(4, 6, dtype=torch.int64)
        message = (
            r"the loss of step 8 is nan; the first layer whose output is not finite is backbone\.blocks\.1\.mlp "
            r"\(\w+\); it is batch 15, of inputs \(4, 6\)"
        )
        with pytest.raises(NonFiniteLoss, match=message):
            check_finite(torch.tensor(float("nan")), model, ids, step=7, batch=14, lengths=[6, 2, 3, 1])

    def test_in_training_lengths_are_those_of_the_batch(self):
        module = self.classifier()
        module._trainer = SimpleNamespace(global_step=2)
        first = module.model.backbone.blocks[0]
        tokens = []
        first.register_forward_hook(lambda one, given, out: tokens.append(out[0].shape[1]))
        with torch.no_grad():
            module.model.head.bias.register_hook(lambda gradient: gradient)
        module.model.head.register_forward_hook(lambda one, given, out: out * float("inf"))
        batch = {"x": torch.zeros(2, 6, dtype=torch.int64), "lengths": [6, 2], "labels": torch.tensor([0, 1])}
        with pytest.raises(NonFiniteLoss, match=r"loss of step 3 .* is head \(Linear\); it is batch 5,"):
            module.training_step(batch, 4)
        assert tokens == [8, 8], "of the true tokens alone, again as before"

    def test_compiled_layers_are_searched_too(self):
        model = self.classifier().model

        class Breaks(nn.Module):
            def forward(self, x):
                return x / 0.0

        model.backbone.blocks[0].mlp = Breaks()
        torch._dynamo.reset()
        model.backbone.compile(backend="eager")
        ids = torch.zeros(2, 6, dtype=torch.int64)
        loss = model.loss(ids, torch.tensor([0, 1]))
        # compiled without hooks, for a call as that of the search
        with torch.no_grad():
            model(ids)
        with pytest.raises(NonFiniteLoss, match=r"is not finite is backbone\.blocks\.0\.mlp "):
            check_finite(loss, model, ids, step=0, batch=0)


class TestResumingAnotherVersion:
    @pytest.fixture
    def run(self, plain, tmp_path):
        shutil.copytree(plain, tmp_path / "run")
        (tmp_path / "run/report.json").unlink()
        return tmp_path / "run"

    def record(self, run, **values):
        path = run / "environment.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    def test_another_format_is_refused(self, run, capsys):
        self.record(run, format=7, seqzoo="9.0.0")
        assert main(["--resume", str(run)]) == 1
        message = " ".join(capsys.readouterr().err.split())
        assert "was made by seqzoo 9.0.0 and has format 7; seqzoo" in message
        assert "pip install seqzoo==9.0.0, or start a new run" in message

    def test_options_that_are_not_known_here(self, run, capsys):
        path = run / "config.yaml"
        path.write_text(path.read_text().replace("early_stopping:", "stop_early:"))
        assert main(["--resume", str(run)]) == 2
        assert "seqzoo train: there is no option 'stop_early'" in " ".join(capsys.readouterr().err.split())
        self.record(run, seqzoo="9.0.0")
        assert main(["--resume", str(run)]) == 2
        message = " ".join(capsys.readouterr().err.split())
        assert "was made by seqzoo 9.0.0, and seqzoo" in message
        assert "there is no option 'stop_early'" in message


def test_the_best_weights_are_taken_though_training_went_on(command, monkeypatch):
    found = iter([8.0, 4.0])
    monkeypatch.setattr(LanguageModeling, "bits_per_token", lambda self, windows: next(found, 5.0))
    run = command("--trainer.val_check_interval", 16, "--trainer.max_steps", 20)
    report = json.loads((run / "report.json").read_text())
    # of the last weights and those of the only validation, which was not at the end
    assert (report["steps"], report["model_of_step"], report["validation_bits_per_byte"]) == (20, 16, 4.0)


class TestWeights:
    """A run that begins with the weights of another."""

    def test_without_learning_they_stay(self, plain, command):
        still = ("--model.lr", "0", "--model.weight_decay", "0")
        run = command("--weights", plain, *still)
        assert same(from_pretrained(run / "model").state_dict(), from_pretrained(plain / "model").state_dict())
        other = command(*still)
        assert not same(from_pretrained(other / "model").state_dict(), from_pretrained(run / "model").state_dict())

    def test_it_goes_on_without_what_it_began_with(self, plain, command, monkeypatch, tmp_path, tmp_path_factory):
        beginning = tmp_path / "beginning"
        shutil.copytree(plain / "model", beginning)
        monkeypatch.chdir(tmp_path)
        whole = command("--weights", "beginning")
        stopped(command, monkeypatch, 12, "--weights", "beginning")
        run = last_run(tmp_path_factory)
        shutil.rmtree(beginning)
        assert main(["--resume", str(run)]) == 0
        assert same(from_pretrained(run / "model").state_dict(), from_pretrained(whole / "model").state_dict())

    def test_without_a_checkpoint_it_begins_with_them_again(self, plain, command, monkeypatch, tmp_path_factory):
        whole = command("--weights", plain)
        monkeypatch.chdir(plain.parent)
        stopped(command, monkeypatch, 1, "--weights", plain.name)
        run = last_run(tmp_path_factory)
        monkeypatch.chdir(plain)
        # as a run that was killed before its first checkpoint
        for path in (run / "checkpoints").iterdir():
            path.unlink()
        assert main(["--resume", str(run)]) == 0
        assert same(from_pretrained(run / "model").state_dict(), from_pretrained(whole / "model").state_dict())

    def test_those_of_another_model(self, plain, tiny, tmp_path, capsys):
        options = ["--weights", str(plain), "--model.config.d_model", "8"]
        assert main([*tiny, "--runs", str(tmp_path), *options]) == 2
        words = " ".join(capsys.readouterr().err.split())
        assert "are of another model: the shape of embedding.weight is (256, 16) there and (256, 8)" in words
        assert not list(tmp_path.iterdir())

    def test_those_of_another_tokenizer(self, plain, tiny, tmp_path, capsys):
        folder = tmp_path / "model"
        shutil.copytree(plain / "model", folder)
        characters(["abc"]).save(folder)
        assert main([*tiny, "--runs", str(tmp_path / "runs"), "--weights", str(folder)]) == 2
        assert "are of another tokenizer" in " ".join(capsys.readouterr().err.split())

    def test_a_folder_without_a_model(self, tiny, tmp_path, capsys):
        assert main([*tiny, "--runs", str(tmp_path / "runs"), "--weights", str(tmp_path)]) == 2
        words = " ".join(capsys.readouterr().err.split())
        assert "cannot be read: neither" in words
        assert "holds a checkpoint, config.json and model.safetensors" in words


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--ema_decay", "1"], "ema_decay must be at least 0 and below 1, got 1"),
        (["--ema_use", "false"], "ema_use=false says what becomes of an average, which ema_decay asks for"),
        (["--early_stopping", "0"], "early_stopping must be at least 1 validation, got 0"),
        (["--ema_decay", "0.9", "--model.schedule", "schedule_free"], "averages weights itself; leave ema_decay out"),
        (["--compile", "inducter"], "a backend of torch.compile, got 'inducter'; did you mean inductor"),
        (["--ema_decy", "0.9"], "no option 'ema_decy'; did you mean ema_decay"),
    ],
)
def test_options_that_do_not_fit(options, words, tiny, tmp_path, capsys):
    assert main([*tiny, "--runs", str(tmp_path), *options]) == 2
    assert words in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())


def test_a_refined_schedule_needs_the_number_of_steps(plain, tiny, tmp_path, capsys):
    options = ["--trainer.max_steps", "-1", "--model.schedule", "refined", "--model.refined_from", str(plain)]
    assert main([*tiny, "--runs", str(tmp_path), *options]) == 2
    assert "give trainer.max_steps" in " ".join(capsys.readouterr().err.split())


def test_memory_is_that_of_this_process():
    lines = Path("/proc/self/status").read_text().splitlines()
    (kilobytes,) = (int(line.split()[1]) for line in lines if line.startswith("VmRSS"))
    assert memory_in_use(torch.device("cpu")) == pytest.approx(1024 * kilobytes, rel=0.05)


def test_the_folder_of_a_run_is_whole(plain):
    names = {"config.yaml", "environment.json", "metrics.csv", "curves.png", "report.json", "sample.txt"}
    names |= {"parameter_groups.json", "tensorboard", "model", "checkpoints"}
    assert names <= {path.name for path in plain.iterdir()}
    assert {path.name for path in (plain / "checkpoints").iterdir()} == {"last.safetensors", "best.safetensors"}
    record = json.loads((plain / "environment.json").read_text())
    assert {"format", "seqzoo", "git", "torch", "arguments", "data", "processor"} <= record.keys()
    assert list((plain / "tensorboard").glob("events.*"))
