"""``seqzoo generate``: continues a prompt with a trained model, and prints the text as it is produced."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import torch

from seqzoo.models.generation import stream
from seqzoo.models.language_model import LanguageModel
from seqzoo.models.tokenizer import check_tokenizer, load_tokenizer, tokenizer_of


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    options = argparse.ArgumentParser(
        prog="seqzoo generate", description="Continue a prompt with a trained language model."
    )
    options.add_argument("--checkpoint", required=True, help="a checkpoint's folder, or that of a training run")
    options.add_argument("--prompt", required=True, help="the text to continue")
    options.add_argument("--max-new-tokens", type=int, default=200, help="tokens to add (%(default)s)")
    options.add_argument("--temperature", type=float, default=1.0, help="0 takes the most probable token (%(default)s)")
    options.add_argument("--top-k", type=int, help="sample among the K most probable tokens alone")
    options.add_argument("--top-p", type=float, help="sample among the tokens that hold this much probability")
    options.add_argument("--tokenizer", help="'bytes', a tokenizer.json or owner/name; the checkpoint's if omitted")
    options.add_argument("--seed", type=int, help="of the random numbers; another each time when omitted")
    options.add_argument("--device", default="cpu", help="where to run (%(default)s)")
    return options


def main(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit status."""
    from seqzoo.hub.saving import find_checkpoint, from_pretrained

    options = parser().parse_args(arguments)
    try:
        generator = torch.Generator(options.device)
        generator.seed() if options.seed is None else generator.manual_seed(options.seed)
        folder = find_checkpoint(options.checkpoint)
        model = from_pretrained(folder, device=options.device)
        if not isinstance(model, LanguageModel):
            raise TypeError(f"only a language model generates, this is a {type(model).__name__}")
        vocabulary = model.config.vocab_size
        tokenizer = (
            tokenizer_of(folder, vocabulary)
            if options.tokenizer is None
            else check_tokenizer(load_tokenizer(options.tokenizer), vocabulary)
        )
        ids = tokenizer.encode(options.prompt)
        prompt = torch.tensor(ids, dtype=torch.int64)
        tokens = stream(
            model,
            [prompt],
            options.max_new_tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            generator=generator,
        )
        _write(options.prompt)
        for text in tokenizer.stream((int(token) for token in tokens), ids):
            _write(text)
        _write("\n")
    except BrokenPipeError:
        # the reader has seen enough; a flush at exit would raise again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        _write("\n")
        return 130
    except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        sys.stderr.write(f"seqzoo generate: {' '.join(str(error).split())}\n")
        return 1
    return 0


def _write(text: str) -> None:
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, errors="replace").decode(encoding))
    sys.stdout.flush()
