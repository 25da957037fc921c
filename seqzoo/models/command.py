"""``seqzoo generate``: continues a prompt with a trained model of bytes, and prints the text as it is produced."""

from __future__ import annotations

import argparse
import codecs
import os
import sys
from collections.abc import Iterator, Sequence

import torch

from seqzoo.models.generation import stream
from seqzoo.models.language_model import LanguageModel

BYTES = 256


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    options = argparse.ArgumentParser(
        prog="seqzoo generate", description="Continue a prompt with a trained language model of bytes."
    )
    options.add_argument("--checkpoint", required=True, help="a checkpoint's folder, or that of a training run")
    options.add_argument("--prompt", required=True, help="the text to continue")
    options.add_argument("--max-new-tokens", type=int, default=200, help="bytes to add (%(default)s)")
    options.add_argument("--temperature", type=float, default=1.0, help="0 takes the most probable byte (%(default)s)")
    options.add_argument("--top-k", type=int, help="sample among the K most probable bytes alone")
    options.add_argument("--top-p", type=float, help="sample among the bytes that hold this much probability")
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
        model = from_pretrained(find_checkpoint(options.checkpoint), device=options.device)
        _check_bytes(model)
        prompt = torch.tensor(list(options.prompt.encode("utf-8")), dtype=torch.int64)
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
        for text in decode(int(token) for token in tokens):
            _write(text)
        _write("\n")
    except BrokenPipeError:
        # the reader has seen enough; a flush at exit would raise again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        _write("\n")
        return 130
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        sys.stderr.write(f"seqzoo generate: {' '.join(str(error).split())}\n")
        return 1
    return 0


def decode(tokens: Iterator[int]) -> Iterator[str]:
    """Text from bytes, each character when its last byte has come; what is no UTF-8 becomes U+FFFD."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in tokens:
        text = decoder.decode(bytes([token]))
        if text:
            yield text
    rest = decoder.decode(b"", final=True)
    if rest:
        yield rest


def _check_bytes(model: object) -> None:
    if not isinstance(model, LanguageModel):
        raise TypeError(f"only a language model generates, this is a {type(model).__name__}")
    if model.config.vocab_size != BYTES:
        raise ValueError(f"the model must read bytes, a vocabulary of {BYTES}; it has {model.config.vocab_size} tokens")


def _write(text: str) -> None:
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, errors="replace").decode(encoding))
    sys.stdout.flush()
