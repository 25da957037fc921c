"""``seqzoo generate``, from the command line's entry to the text."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from seqzoo.cli import main
from seqzoo.hub import save_pretrained
from seqzoo.models import LanguageModel, ModelConfig, command, generate
from seqzoo.models.tokenizer import ByteTokenizer


@pytest.fixture
def model() -> LanguageModel:
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(vocab_size=256, d_model=16, n_layers=1, pattern="min_gru")).eval()
    with torch.no_grad():
        model.embedding.weight.mul_(20)
    return model


@pytest.fixture
def run(model: LanguageModel, tmp_path: Path) -> Path:
    save_pretrained(model, tmp_path / "run" / "model")
    return tmp_path / "run"


def test_it_continues_the_prompt(run: Path, model: LanguageModel, capsys: pytest.CaptureFixture[str]):
    prompt = "dé "
    options = ["generate", "--checkpoint", str(run), "--prompt", prompt, "--max-new-tokens", "40"]
    assert main([*options, "--temperature", "0"]) == 0
    expected = bytes(generate(model, torch.tensor([list(prompt.encode())]), 40, temperature=0)[0].tolist())
    assert capsys.readouterr().out == prompt + expected.decode("utf-8", errors="replace") + "\n"
    texts = []
    for seed in ("1", "1", "2"):
        assert main([*options, "--top-k", "50", "--top-p", "0.9", "--seed", seed]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    for _ in range(2):
        assert main(options) == 0
        texts.append(capsys.readouterr().out)
    assert texts[3] != texts[4], "without a seed every call draws another text"


def test_characters_appear_when_they_are_complete():
    text = "aé€😀b"
    assert list(ByteTokenizer().stream(iter(text.encode()))) == list(text)
    assert list(ByteTokenizer().stream(iter([0xE2, 0x82]))) == ["\ufffd"]
    assert "".join(ByteTokenizer().stream(iter([0xFF, 0x61, 0xE2, 0x61]))) == "\ufffda\ufffda"


def test_text_appears_as_it_is_produced(run: Path, monkeypatch: pytest.MonkeyPatch):
    class Terminal(io.StringIO):
        encoding = "ascii"
        flushed = 0

        def flush(self) -> None:
            self.flushed += 1

    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    assert command.main(["--checkpoint", str(run), "--prompt", "é", "--max-new-tokens", "20", "--seed", "0"]) == 0
    assert terminal.flushed > 10
    # a terminal that cannot show a character gets a question mark, not an error
    assert terminal.getvalue().startswith("?")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--checkpoint", "none", "--prompt", "a"], "there is no folder none"),
        (["--checkpoint", ".", "--prompt", "a"], "neither . nor its folder model holds a checkpoint"),
        (["--checkpoint", "broken", "--prompt", "a"], "config.json does not describe a model"),
        (["--checkpoint", "half", "--prompt", "a"], "the checkpoint half lacks model.safetensors"),
        (
            ["--checkpoint", "words", "--prompt", "a"],
            "its vocabulary of 300 is not that of bytes",
        ),
        (["--checkpoint", "run", "--prompt", ""], "at least one token"),
        (["--checkpoint", "run", "--prompt", "a", "--top-p", "2"], "top_p must be above 0 and at most 1, got 2.0"),
        (["--checkpoint", "run", "--prompt", "a", "--max-new-tokens", "0"], "max_new_tokens must be a positive"),
        (["--checkpoint", "run", "--prompt", "a", "--device", "abacus"], "abacus"),
    ],
)
def test_mistakes_take_one_line(
    options: list[str],
    words: str,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    for name in ("broken", "half"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "broken" / "model.safetensors").touch()
    if "words" in options:
        save_pretrained(LanguageModel(ModelConfig(vocab_size=300, d_model=16, n_layers=1, pattern="min_gru")), "words")
    assert main(["generate", *options]) == 1
    error = capsys.readouterr().err
    assert error.startswith("seqzoo generate: ")
    assert words in error
    assert error.count("\n") == 1


def test_help(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        main(["generate", "--help"])
    assert caught.value.code == 0
    assert "--top-k" in capsys.readouterr().out


def test_interrupting_is_no_error(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "stream", interrupted)
    assert main(["generate", "--checkpoint", str(run), "--prompt", "a"]) == 130
    assert capsys.readouterr().err == ""


def test_a_reader_may_leave(run: Path):
    call = [sys.executable, "-m", "seqzoo.cli", "generate", "--checkpoint", str(run), "--prompt", "abc"]
    reader, writer = os.pipe()
    with subprocess.Popen([*call, "--max-new-tokens", "3000"], stdout=writer, stderr=subprocess.PIPE) as process:
        os.close(writer)
        os.read(reader, 3)
        os.close(reader)
        _, error = process.communicate(timeout=120)
    assert error == b""
    assert process.returncode == 0
