"""Published recipes: every file builds its model, and says what its source says."""

from __future__ import annotations

import pytest
import torch

from seqzoo.parameters import parameter_groups
from seqzoo.train.configuration import combine, shipped
from seqzoo.train.optimisation import OptimisedModule
from seqzoo.train.options import TrainingCLI

RECIPES = [name for name in shipped() if name.startswith("recipe/")]
LRA = ("listops", "text", "retrieval", "image", "pathfinder", "pathx")
# the names that the authors of Mamba give their models by their sizes
SIZES = {"130m": 130e6, "370m": 370e6, "790m": 790e6, "1.4b": 1.4e9, "2.8b": 2.8e9}
# width, states, learning rate and, of the state space's own rate, the published one
S4 = {
    "listops": (256, 4, 0.01, 0.001, "post"),
    "text": (256, 4, 0.01, 0.001, "pre"),
    "retrieval": (256, 4, 0.01, 0.001, "pre"),
    "image": (512, 64, 0.01, 0.001, "post"),
    "pathfinder": (256, 64, 0.004, 0.001, "pre"),
    "pathx": (256, 64, 0.001, 0.001, "pre"),
}
S5 = {
    "listops": (128, 16, 0.003, 0.001),
    "text": (256, 192, 0.004, 0.001),
    "retrieval": (128, 256, 0.002, 0.001),
    "image": (512, 384, 0.0045, 0.001),
    "pathfinder": (192, 256, 0.0045, 0.0009),
    "pathx": (128, 256, 0.0018, 0.0006),
}


def build(name: str) -> TrainingCLI:
    # on the meta device the largest costs nothing
    with torch.device("meta"):
        return TrainingCLI(combine([name]), [])


def slow_rates(module: OptimisedModule) -> dict[str, tuple[float, float]]:
    groups = parameter_groups(module.model, module.lr, module.weight_decay)
    return {name: (group["lr"], group["weight_decay"]) for group in groups for name in group["names"]}


def test_which_there_are():
    expected = {f"recipe/{kind}-{task}" for kind in ("s4", "s4d", "s5") for task in LRA}
    expected |= {f"recipe/mamba-{size}" for size in SIZES} | {
        "recipe/min_gru-shakespeare",
        "recipe/min_gru-selective-copying",
    }
    assert expected | {f"recipe/lru-{task}" for task in ("listops", "text", "pathx")} == set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_it_builds_and_names_its_source(name):
    text = shipped()[name].read_text(encoding="utf-8")
    comment = " ".join(line[1:].strip() for line in text.splitlines() if line.startswith("#"))
    assert "Source" in comment
    assert "github.com" in comment or "arxiv.org" in comment
    cli = build(name)
    kind, _, task = name.removeprefix("recipe/").partition("-")
    module, config = cli.model, cli.model.model.config
    assert cli.config.name == f"{kind}-{task}"
    assert 0 <= module.warmup_steps < cli.config.trainer.max_steps
    if task in LRA:
        assert (config.norm, config.mlp, config.pooling, config.bidirectional) == ("batch", "none", "mean", True)
        assert module.pairs == (task == "retrieval")
        module.check_data(cli.datamodule)
    if kind in ("s4", "s4d"):
        width, states, lr, own, position = S4[task]
        assert (config.d_model, config.n_layers, config.norm_position) == (width, 6, position)
        mixer = module.model.backbone.blocks[0].mixer.mixer
        assert mixer.d_state == states
        rates = slow_rates(module)
        assert rates["backbone.blocks.0.mixer.mixer.A_imag"] == (pytest.approx(own), 0.0)
        assert rates["backbone.blocks.0.mixer.mixer.out_proj.weight"] == (lr, 0.05)
        assert rates["backbone.blocks.0.mixer_norm.weight"] == (lr, 0.0)
    if kind == "s5":
        width, states, lr, own = S5[task]
        assert (config.d_model, config.n_layers) == (width, 8 if task == "listops" else 6)
        assert module.model.backbone.blocks[0].mixer.mixer.size == states // 2
        rates = slow_rates(module)
        assert rates["backbone.blocks.0.mixer.mixer.A_imag"] == (pytest.approx(own), 0.0)
        assert rates["backbone.blocks.0.mixer.mixer.out_proj.weight"][0] == lr
    if task == "selective-copying":
        mixer = module.model.backbone.blocks[0].mixer
        assert (config.n_layers, mixer.in_proj.out_features, cli.config.trainer.max_steps) == (3, 2 * 6 * 64, 400_000)
        assert cli.datamodule.draws["training"](0, 0, batch_size=1)[0].shape == (1, 4096 + 16)
    if kind == "mamba":
        count = sum(parameter.numel() for parameter in module.model.parameters())
        assert count == pytest.approx(SIZES[task], rel=0.025)
        batch = cli.datamodule.context * cli.datamodule.batch_size * cli.config.trainer.accumulate_grad_batches
        assert batch == 2**19


@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["recipe/s4-listops", "recipe/s5-listops"])
def test_it_trains_on_sequences_of_unequal_lengths(name, tmp_path):
    options = ["--model.config.d_model", "16", "--model.config.n_layers", "2", "--model.warmup_steps", "0"]
    options += ["--data.above", "3", "--data.below", "12", "--data.max_depth", "2", "--data.batch_size", "4"]
    options += [f"--data.{split}_examples=8" for split in ("training", "validation", "test")]
    options += ["--data.max_args", "9", "--data.cache", str(tmp_path), "--trainer.max_steps", "2"]
    cli = TrainingCLI(combine([name]), options)
    trainer = cli.build_trainer(loggers=[], callbacks=[], plugins=[], folder=str(tmp_path))
    trainer.fit(cli.model, datamodule=cli.datamodule)
    assert trainer.global_step == 2
    norm = cli.model.model.backbone.blocks[0].mixer_norm
    assert norm.num_batches_tracked == 2
    assert not torch.equal(norm.running_mean, torch.zeros(16))
    judged = cli.model.judge(cli.datamodule.val_dataloader())
    assert 0 < judged["loss"] < 20
