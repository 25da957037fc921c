"""Tables of recall and state tracking: what a cell counts, that training is the same every time, the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("sklearn")

from seqzoo.cli import main
from seqzoo.eval.diagnostics import HELD_OUT, RECALL, STATE_TRACKING, batch, judge, markdown, probe, train
from seqzoo.hub import save_pretrained
from seqzoo.models import ClassifierConfig, LanguageModel, ModelConfig, SequenceClassifier
from seqzoo.train.data.state_tracking import product_table
from seqzoo.train.data.windows import IGNORED


def build(**options) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(
        ModelConfig(**{"vocab_size": 64, "d_model": 16, "n_layers": 1, "pattern": "min_gru", **options})
    )


class Knowing(LanguageModel):
    """Says what a function of the tokens says."""

    def __init__(self, answer, vocabulary: int = 64) -> None:
        super().__init__(ModelConfig(vocab_size=vocabulary, d_model=16, n_layers=1, pattern="min_gru"))
        self.answer = answer

    def forward(self, ids, state=None, **options):
        return torch.nn.functional.one_hot(self.answer(ids), self.config.vocab_size).float(), None


def recalled(ids: torch.Tensor) -> torch.Tensor:
    found = torch.zeros_like(ids)
    for row, one in enumerate(ids.tolist()):
        known: dict[int, int] = {}
        for place, token in enumerate(one):
            found[row, place] = known.get(token, 0)
            if place and one[place - 1] and token:
                known.setdefault(one[place - 1], token)
    return found


def products(group: str):
    table = torch.from_numpy(product_table(group))

    def answer(ids: torch.Tensor) -> torch.Tensor:
        found, state = torch.zeros_like(ids), torch.zeros(len(ids), dtype=torch.int64)
        for place in range(ids.shape[1]):
            state = found[:, place] = table[state, ids[:, place]]
        return found

    return answer


class TestCells:
    def test_who_knows_is_right_at_all_lengths(self):
        assert judge(Knowing(recalled), RECALL, "4", [16, 40, 64], 16) == {16: 1.0, 40: 1.0, 64: 1.0}
        for group, name in (("Z2", "parity"), ("S3", "S3")):
            assert judge(Knowing(products(group)), STATE_TRACKING, name, [5, 9], 16) == {5: 1.0, 9: 1.0}

    def test_a_guess_is_at_chance(self):
        # always the first value of the sequence, one of four
        found = judge(Knowing(lambda ids: ids[:, 1:2].expand_as(ids)), RECALL, "4", [64], 512)[64]
        assert found == pytest.approx(0.25, abs=1e-9)
        found = judge(Knowing(lambda ids: torch.zeros_like(ids)), STATE_TRACKING, "S3", [32], 512)[32]
        assert found == pytest.approx(1 / 6, abs=0.02)

    def test_lengths_that_do_not_fit_are_left_out(self):
        assert list(judge(build(), RECALL, "8", [16, 33, 32], 4)) == [32]
        assert list(judge(build(max_positions=20), STATE_TRACKING, "S3", [8, 20, 21], 4)) == [8, 20]

    def test_what_is_judged_is_never_trained_on(self):
        trained = [batch(STATE_TRACKING, "S3", 12, 0, step, 64, 6)[0] for step in range(5)]
        held = batch(STATE_TRACKING, "S3", 12, HELD_OUT, 0, 64, 6)[0]
        assert not any(torch.equal(one, held) for one in trained)
        assert (batch(RECALL, "4", 16, 0, 0, 8, 64)[1] != IGNORED).sum() == 32


class TestTraining:
    def test_the_same_arguments_give_the_same_numbers(self):
        options = {"groups": ["parity", "S3"], "lengths": [8, 16], "steps": 12}
        first, again = (probe(["min_gru"], STATE_TRACKING, **options) for _ in range(2))
        assert first == again
        assert first != probe(["min_gru"], STATE_TRACKING, **options, seed=1)
        assert [(cell.setting, cell.length, cell.trained, cell.steps) for cell in first] == [
            (group, length, 8, 12) for group in ("parity", "S3") for length in (8, 16)
        ]
        assert [cell.chance for cell in first] == [0.5, 0.5, 0.1667, 0.1667]

    def test_a_mixer_learns_and_stops(self):
        model, done = train(
            [{"name": "min_gru", "gate_range": [-1.0, 1.0]}], STATE_TRACKING, ["parity"], 6, steps=600, seed=0
        )
        assert not model.training
        found = judge(model, STATE_TRACKING, "parity", [6])[6]
        assert found > 0.95
        assert done < 600 or found < 0.9995

    def test_all_numbers_of_pairs_are_one_model(self):
        cells = probe(['{"name": "linear_attention", "d_conv": 4}'], RECALL, pairs=[2, 4], lengths=[16, 32], steps=3)
        assert [(cell.setting, cell.length) for cell in cells] == [("2", 16), ("2", 32), ("4", 16), ("4", 32)]
        assert {(cell.trained, cell.steps) for cell in cells} == {(16, 3)}


class TestCommand:
    def test_a_run_and_a_mixer(self, tmp_path: Path, capsys):
        save_pretrained(build(), tmp_path / "run" / "model")
        arguments = ["--recall", "--state-tracking", "S3", "--lengths", "16", "32", "--pairs", "2", "--steps", "2"]
        output = tmp_path / "tables"
        assert main(["eval", str(tmp_path / "run"), "min_gru", *arguments, "--output", str(output)]) == 0
        printed = capsys.readouterr().out
        for task, setting in ((RECALL, "2"), (STATE_TRACKING, "S3")):
            cells = json.loads((output / f"{task}.json").read_text())
            assert [(one["model"], one["setting"], one["length"], one["trained"]) for one in cells] == [
                *((str(tmp_path / "run"), setting, length, None) for length in (16, 32)),
                *(("min_gru", setting, length, 16) for length in (16, 32)),
            ]
            assert (output / f"{task}.md").read_text() in printed
            assert (output / f"{task}.png").read_bytes().startswith(b"\x89PNG")
            value = next(one["accuracy"] for one in cells if one["model"] == "min_gru" and one["length"] == 32)
            assert f"| min_gru | {setting} | 16 tokens, 2 steps |" in printed
            assert f"{100 * value:.1f} |" in printed
        assert "elsewhere" in printed

    def test_one_run_keeps_its_tables(self, tmp_path: Path):
        save_pretrained(build(), tmp_path / "model")
        assert main(["eval", str(tmp_path), "--state-tracking", "parity", "--lengths", "4"]) == 0
        assert (tmp_path / "state-tracking.json").is_file()
        assert not (tmp_path / "evaluation.json").exists()

    def test_bad_input(self, tmp_path: Path, capsys):
        kinds = {"n_classes": 2, "vocab_size": 9, "d_model": 16, "n_layers": 1, "pattern": "min_gru"}
        save_pretrained(SequenceClassifier(ClassifierConfig(**kinds)), tmp_path / "classes")
        save_pretrained(build(vocab_size=5), tmp_path / "small")
        for arguments, words in (
            (["min_gro", "--recall"], "nor a mixer; did you mean min_gru"),
            (["{min_gru}", "--recall"], "is no JSON"),
            (['{"name": "min_gru", "wide": 3}', "--recall"], "wide"),
            (["min_gru", "--recall", "--pairs", "0"], "--pairs"),
            (["min_gru", "--recall", "--steps", "0"], "--steps"),
            (["min_gru", "--recall", "--lengths", "-4"], "--lengths"),
            (["min_gru", "--recall", "--lengths", "16", "--pairs", "8"], "give --lengths of 32 and more"),
            (["min_gru", "--recall", "--lengths", "200", "--pairs", "40"], "--pairs must be at most 31, got 40"),
            (["min_gru", "--state-tracking", "Q8"], "a group is Zn, Sn or An"),
            ([str(tmp_path / "classes"), "--recall"], "holds a SequenceClassifier"),
            (
                [str(tmp_path / "small"), "--state-tracking", "S3"],
                "needs a vocabulary of 6 tokens at least, the model has 5",
            ),
        ):
            assert main(["eval", *arguments, "--output", str(tmp_path)]) == 1, arguments
            assert words in capsys.readouterr().err

    def test_the_table_leaves_cells_empty(self):
        cells = probe(["min_gru"], RECALL, pairs=[2, 4], lengths=[16, 20], steps=1)
        text = markdown([cell for cell in cells if (cell.setting, cell.length) != ("4", 16)])
        row = next(line for line in text.splitlines() if line.startswith("| min_gru | 4 |"))
        assert row.split("|")[5].strip() == ""
