"""Likelihoods at context lengths against token by token, what speed and memory count, the command."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning")

from seqzoo.cli import main
from seqzoo.eval.perplexity import at_contexts, carried, in_windows
from seqzoo.eval.throughput import measure
from seqzoo.hub import save_pretrained
from seqzoo.models import LanguageModel, ModelConfig
from seqzoo.models.tokenizer import characters


def build(pattern="min_gru", **options) -> LanguageModel:
    torch.manual_seed(0)
    values = {"vocab_size": 256, "d_model": 16, "n_layers": 2, **options}
    model = LanguageModel(ModelConfig(pattern=pattern, **values)).eval()
    with torch.no_grad():
        model.embedding.weight.mul_(20)
    return model


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(256, (50,), generator=torch.Generator().manual_seed(1))


def nats(model: LanguageModel, ids: torch.Tensor) -> float:
    """Token by token."""
    state, total = model.init_state(1), 0.0
    with torch.no_grad():
        for token, following in itertools.pairwise(ids):
            logits, state = model.step(token[None], state)
            total -= float(logits[0].log_softmax(-1)[following])
    return total


class TestLikelihoods:
    @pytest.mark.parametrize("context", [2, 7, 16, 50])
    @pytest.mark.parametrize("batch_tokens", [1, 40])
    def test_windows_are_read_token_by_token(self, ids, context, batch_tokens):
        model = build()
        found = in_windows(model, ids, context, bytes_per_token=2.5, batch_tokens=batch_tokens)
        windows = [ids[start : start + context] for start in range(0, 50 // context * context, context)]
        expected = sum(nats(model, window) for window in windows)
        assert found.nats == pytest.approx(expected, rel=1e-5)
        assert found.tokens == len(windows) * (context - 1)
        assert found.share == found.tokens / 50
        assert found.bits_per_byte == pytest.approx(expected / found.tokens / math.log(2) / 2.5, rel=1e-5)
        assert found.perplexity == pytest.approx(math.exp(expected / found.tokens), rel=1e-5)

    @pytest.mark.parametrize("batch_tokens", [1, 16, 400])
    def test_a_carried_state_is_the_whole_text(self, ids, batch_tokens):
        model = build(["mamba", "attention"])
        found = carried(model, ids, batch_tokens=batch_tokens)
        assert found.nats == pytest.approx(nats(model, ids), rel=1e-5)
        assert found.tokens == 49

    def test_all_lengths(self, ids):
        assert list(at_contexts(build(), ids, [16, 4, 16])) == ["4", "16", "carried"]
        # learned positions end somewhere
        assert list(at_contexts(build(max_positions=32), ids, [16, 4])) == ["4", "16"]

    def test_bad_input(self, ids):
        for call, words in (
            (lambda: in_windows(build(), ids, 51), "between 2 and the text's 50"),
            (lambda: in_windows(build(), ids, 1), "between 2"),
            (lambda: in_windows(build(max_positions=8), ids, 9), "max_positions=8"),
            (lambda: carried(build(max_positions=8), ids), "max_positions=8"),
            (lambda: carried(build(), ids[:1]), "at least 2 tokens"),
            (lambda: at_contexts(build(), ids, []), "at least one length"),
        ):
            with pytest.raises(ValueError, match=words):
                call()


class TestSpeed:
    def test_it_counts_what_it_says(self):
        short, long = measure(build(["min_gru", "attention"]), [32, 8], batch_tokens=64, rounds=1)
        assert (short.length, long.length) == (8, 32)
        for one in (short, long):
            assert min(one.forward, one.training, one.step, one.kept) > 0
            # 16 numbers of minGRU; keys and values of attention; its count, of 8 bytes
            assert one.state == 4 * (16 + 2 * 16 * one.length) + 8
        # of a recurrent model what training keeps grows with the tokens alone
        recurrent = measure(build(), [16, 64], batch_tokens=64, rounds=1)
        assert recurrent[0].kept == pytest.approx(recurrent[1].kept, rel=0.2)

    def test_bad_input(self):
        for options, words in (({"lengths": [0]}, "at least 1"), ({"lengths": [4], "rounds": 0}, "rounds")):
            with pytest.raises(ValueError, match=words):
                measure(build(), **options)
        with pytest.raises(ValueError, match="below max_positions, 8"):
            measure(build(max_positions=8), [8])


class TestCommand:
    @pytest.fixture
    def run(self, tmp_path: Path) -> Path:
        save_pretrained(build(), tmp_path / "run" / "model")
        (tmp_path / "text.txt").write_text("so much depends upon a red wheel barrow glazed with rain water. " * 20)
        return tmp_path / "run"

    def test_a_text(self, run, capsys):
        text = run.parent / "text.txt"
        arguments = ["--text", str(text), "--tokens", "600", "--contexts", "16", "64", "4096", "--speed", "32"]
        assert main(["eval", str(run), *arguments]) == 0
        printed = capsys.readouterr().out
        found = json.loads((run / "evaluation.json").read_text())
        assert set(found["bits_per_byte"]) == {"16", "64", "carried"}
        assert (found["tokens"], found["bytes"]) == (600, 600)
        assert found["bits_per_byte"]["carried"] == pytest.approx(
            nats(build(), torch.tensor(list(text.read_bytes()[:600]))) / 599 / math.log(2), rel=1e-5
        )
        assert f"{found['bits_per_byte']['64']:.3f}" in printed
        assert "xz" in printed
        assert found["speed"][0]["length"] == 32
        assert (run / "context.png").read_bytes().startswith(b"\x89PNG")

    def test_its_own_validation_files(self, run, tmp_path: Path):
        files = tmp_path / "files"
        files.mkdir()
        for index in range(40):
            (files / f"{index}.txt").write_text(f"file {index} says so\n" * 30)
        (run / "config.yaml").write_text(
            "data:\n  class_path: seqzoo.train.data.folder_bytes.FolderBytes\n  init_args:\n"
            f"    folder: {files}\n    files: ['*.txt']\n    validation_fraction: 0.3\n    context: 32\n"
        )
        assert main(["eval", str(run), "--contexts", "32"]) == 0
        assert json.loads((run / "evaluation.json").read_text())["tokens"] > 1000

    def test_pieces_of_text(self, run, tmp_path: Path):
        text = run.parent / "text.txt"
        tokenizer = characters([text.read_text()])
        save_pretrained(build(vocab_size=tokenizer.vocab_size), tmp_path / "other")
        tokenizer.save(tmp_path / "other")
        assert main(["eval", str(tmp_path / "other"), "--text", str(text), "--tokens", "100", "--contexts", "10"]) == 0
        found = json.loads((tmp_path / "other" / "evaluation.json").read_text())
        assert (found["tokens"], found["bytes"]) == (100, 100)

    def test_tasks_of_ones_own(self, run, tmp_path: Path):
        pytest.importorskip("lm_eval")
        tasks = tmp_path / "tasks"
        tasks.mkdir()
        (tasks / "rows.json").write_text('{"text": "a red wheel barrow"}\n{"text": "rain water"}\n')
        (tasks / "poem.yaml").write_text(
            f"task: poem\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: '{tasks}/rows.json'}}}}\n"
            "test_split: test\noutput_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
            "metric_list: [{metric: bits_per_byte}]\nmetadata: {version: 1.0}\n"
        )
        arguments = [
            "--text",
            str(run.parent / "text.txt"),
            "--contexts",
            "16",
            "--tasks",
            "poem",
            "--include",
            str(tasks),
        ]
        assert main(["eval", str(run), *arguments]) == 0
        found = json.loads((run / "evaluation.json").read_text())["tasks"]["poem"]["bits_per_byte,none"]
        expected = sum(
            nats(build(), torch.tensor([10, *text.encode()])) for text in ("a red wheel barrow", "rain water")
        )
        assert found == pytest.approx(expected / 28 / math.log(2), rel=1e-4)

    def test_bad_input(self, run, tmp_path: Path, capsys):
        text = str(run.parent / "text.txt")
        (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
        characters(["abc"]).save(tmp_path)
        for arguments, words in (
            ([str(tmp_path / "nowhere")], "no folder"),
            ([str(run)], "give --text"),
            ([str(run), "--text", str(tmp_path / "missing.txt")], "missing.txt"),
            ([str(run), "--text", text, "--tokens", "1"], "--tokens must be at least 2"),
            ([str(run), "--text", text, "--contexts", "100000"], "asks for 100000 at least"),
            ([str(run), "--text", text, "--tokenizer", "nothing.json"], "no tokenizer 'nothing.json'"),
            ([str(run), "--text", str(tmp_path / "latin.txt"), "--tokenizer", str(tmp_path)], "no UTF-8, byte 3"),
        ):
            assert main(["eval", *arguments]) == 1
            assert words in capsys.readouterr().err
