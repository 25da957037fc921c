"""The comparison of runs: what the page and the table say, what damaged folders say."""

from __future__ import annotations

import base64
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

pytest.importorskip("lightning")

from seqzoo.cli import main
from seqzoo.eval.report import curves, differences, flatten, read_run
from seqzoo.hub import save_pretrained
from seqzoo.models import LanguageModel, ModelConfig

CONFIG = "name: one\nseed: {seed}\nmodel:\n  init_args:\n    lr: {lr}\n    betas: [0.9, 0.95]\n"
METRICS = "step,train_loss,validation_bpb,seconds\n10,3.5,,1\n20,2.5,4.25,2\n30,2.25,4.0,3\n40,1.0"


def make(path: Path, lr: float, score: float) -> Path:
    path.mkdir()
    (path / "config.yaml").write_text(CONFIG.format(seed=lr, lr=lr))
    (path / "metrics.csv").write_text(METRICS)
    report = {
        "validation_bits_per_byte": score,
        "baselines_bits_per_byte": {"xz -9e": 1.638},
        "steps": 30,
        "finished": True,
        "bytes_per_second": 12345,
    }
    (path / "report.json").write_text(json.dumps(report))
    (path / "environment.json").write_text(
        json.dumps({"torch": "2.13.0", "git": {"commit": "a" * 40, "changed": True}})
    )
    (path / "sample.txt").write_text("a <b> & c\n")
    return path


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    found = [make(tmp_path / "first", 0.1, 1.25), make(tmp_path / "second", 0.2, 1.75)]
    model = LanguageModel(ModelConfig(vocab_size=256, d_model=16, n_layers=2, pattern=["min_gru", "attention"]))
    save_pretrained(model, found[0] / "model")
    return found


LOADING = ("src", "href", "xlink:href", "srcset", "data", "action", "background", "poster")


class Reader(HTMLParser):
    """Cells of the tables, text, and whatever would be loaded from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.loaded: list[str] = []
        self.text = ""
        self.tags: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            # a part of the page itself, or a picture that it holds
            held = (value or "").startswith(("#", "data:image/png;base64,"))
            self.loaded += [f"{tag} {name}"] if name in LOADING and not held else []
            self.loaded += [f"{tag} {name}"] if name == "style" and "url(" in (value or "") else []
        self.loaded += [tag] if tag in ("script", "link", "iframe", "object", "embed", "base") else []
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data):
        self.text += data
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data.strip()


def test_two_runs(runs, tmp_path: Path, capsys):
    output = tmp_path / "page.html"
    assert main(["report", *map(str, runs), "--output", str(output)]) == 0
    printed, table = capsys.readouterr().out, (tmp_path / "page.md").read_text()
    assert table in printed
    assert "| validation bits per byte | 1.25 | 1.75 |" in table
    assert "| baseline xz -9e | 1.638 | 1.638 |" in table
    assert "| model.init_args.lr | 0.1 | 0.2 |" in table
    assert "betas" not in table
    assert "aaaaaaaaaa and changes" in table
    # 16 numbers of minGRU, keys and values of 1024 tokens and a count of attention
    assert f"| state after 1024 tokens | {16 + 2 * 16 * 1024 + 1:,} | - |" in table
    reader = Reader()
    reader.feed(output.read_text())
    assert not reader.loaded
    assert ["validation bits per byte", "1.25", "1.75"] in reader.rows
    assert "a <b> & c" in reader.text
    assert output.read_text().count("<svg") == 2


def test_what_eval_left_is_in_the_page(runs, tmp_path: Path):
    from seqzoo.eval.perplexity import Likelihood, draw

    picture = draw({"16": Likelihood(50.0, 15, 0.9, 1.0), "64": Likelihood(40.0, 15, 0.9, 1.0)}, {"xz": 2.0}, 32)
    (runs[0] / "context.png").write_bytes(picture)
    (runs[0] / "evaluation.json").write_text(json.dumps({"bits_per_byte": {"16": 4.5, "carried": 4.25}}))
    (runs[1] / "evaluation.json").write_text(json.dumps({"accuracy": 0.625}))
    output = tmp_path / "page.html"
    assert main(["report", *map(str, runs), "--output", str(output)]) == 0
    table = output.with_suffix(".md").read_text()
    assert "| evaluated bits per byte, context carried | 4.25 | - |" in table
    assert "| evaluated accuracy (test) | - | 0.625 |" in table
    reader = Reader()
    reader.feed(output.read_text())
    assert not reader.loaded
    assert reader.tags.count("img") == 1
    assert reader.tags.count("svg") == 2
    held = re.findall(r'src="data:image/png;base64,([^"]+)"', output.read_text())
    assert [base64.b64decode(one) for one in held] == [picture]


def test_the_figures_hold_the_curves(runs):
    drawn = curves([read_run(path) for path in runs], "train_loss")
    tree = ElementTree.fromstring(drawn)
    space = {"svg": "http://www.w3.org/2000/svg"}
    paths = [one.get("d") for one in tree.iterfind(".//svg:g[@id='axes_1']/svg:g/svg:path", space)]
    # two runs of three points each, in the same place
    lines = [one for one in paths if one is not None and one.count("L") == 2]
    assert len(lines) >= 2
    assert curves([read_run(path) for path in runs], "train_loss") == drawn
    assert "url(http" not in drawn


def test_one_run_has_no_differences(runs, tmp_path: Path):
    assert main(["report", str(runs[0]), "--output", str(tmp_path / "page.html")]) == 0
    assert "differ" not in (tmp_path / "page.html").read_text()


def test_what_is_read(runs):
    run = read_run(runs[0])
    assert run.metrics["validation_bpb"] == [(20.0, 4.25), (30.0, 4.0)]
    # the last line was cut short
    assert run.metrics["train_loss"] == [(10.0, 3.5), (20.0, 2.5), (30.0, 2.25)]
    assert flatten({"a": {"b": 1, "c": {}}, "d": [2]}) == {"a.b": 1, "a.c": {}, "d": [2]}
    both = [run, read_run(runs[1])]
    assert differences(both) == {"model.init_args.lr": [0.1, 0.2], "seed": [0.1, 0.2]}


def test_a_run_of_the_quickstart_that_lies_here(tmp_path: Path):
    folder = Path(__file__).parents[1] / "benchmarks" / "results" / "quickstart-60-minutes"
    assert main(["report", str(folder), "--output", str(tmp_path / "page.html")]) == 0
    assert "1.303" in (tmp_path / "page.md").read_text()


def damage(path: Path, name: str, text: str) -> None:
    (path / name).parent.mkdir(exist_ok=True)
    (path / name).write_text(text)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("report.json", "{", "report.json is damaged"),
        ("report.json", "[1]", "report.json is damaged: it holds list"),
        ("environment.json", '"x"', "environment.json is damaged: it holds str"),
        ("evaluation.json", "[1", "evaluation.json is damaged"),
        ("model/config.json", "{", "config.json is damaged"),
        ("model/config.json", '{"d_model": 4}', "config.json does not fit this version of SeqZoo: 'model'"),
        ("model/config.json", '{"model": "writer"}', "there is no model 'writer'"),
        ("model/config.json", '{"model": "language_model", "width": 3}', "config.json does not fit this version"),
        ("config.yaml", "a: [", "config.yaml is damaged"),
        ("config.yaml", "a", "holds str, not options"),
        ("metrics.csv", "steps,loss\n1,2\n", "no column 'step'"),
        ("metrics.csv", "step,loss\n1,2\n2,abc\n", "line 3 of"),
    ],
)
def test_damaged_files(runs, name, text, words, capsys):
    damage(runs[1], name, text)
    assert main(["report", *map(str, runs)]) == 1
    assert words in capsys.readouterr().err


def test_what_is_no_run(runs, tmp_path: Path, capsys):
    assert main(["report", str(tmp_path / "nothing")]) == 1
    assert "no run folder" in capsys.readouterr().err
    shutil.rmtree(runs[0])
    runs[0].mkdir()
    assert main(["report", str(runs[0])]) == 1
    assert "has no config.yaml" in capsys.readouterr().err
    assert main(["report", str(runs[1]), "--output", str(tmp_path / "x.md")]) == 1
    assert "names the page of HTML" in capsys.readouterr().err
