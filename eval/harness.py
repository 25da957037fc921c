"""Language models in lm-evaluation-harness: ``lm_eval.simple_evaluate(model=HarnessModel(...), tasks=[...])``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from seqzoo.hub.saving import find_checkpoint, from_pretrained
from seqzoo.layers.prefix_linear_attention import PrefixLinearAttention
from seqzoo.models.continuations import score
from seqzoo.models.generation import stream
from seqzoo.models.language_model import LanguageModel
from seqzoo.models.tokenizer import Tokenizer, check_tokenizer, load_tokenizer, tokenizer_of
from seqzoo.modules.options import check_flags

# what stands before a text without context where the tokenizer has no token for it: a line has ended
NEWLINE = "\n"


@register_model("seqzoo")
class HarnessModel(TemplateLM):
    """A :class:`LanguageModel` as lm-evaluation-harness asks for it.

    The requests that share a context, as the answers of a multiple choice do, are scored from one state: the context
    is read once. Without ``max_length`` whole texts are read, whatever their length, the state carried from piece to
    piece; no window cuts them.

    With ``twice`` every context stands in the prompt twice, a line apart (JRT-Prompt, "Just read twice",
    https://arxiv.org/abs/2407.05483, section 3): a model of little memory reads it the second time knowing what is
    asked for. With ``prefix`` the layers of prefix linear attention read the prompt's beginning as a whole (section 4).
    Whole texts, which have no context, are read as ever.

    Args:
        pretrained: A checkpoint's folder or that of a training run, or the model itself.
        tokenizer: A :class:`Tokenizer` or the name of one (:func:`load_tokenizer`); None means that of the checkpoint,
            or bytes.
        max_length: Tokens that the model may see at once: of longer contexts the last ones count, longer texts are cut
            into disjoint windows. None means all that it can, ``max_positions`` where it has them.
        batch_tokens: Tokens that are read in one call, at least one request.
        batch_size: Prompts that are continued at once.
        max_gen_toks: Tokens of a continuation whose request names no other number.
        device: Where to run.
        twice: Whether contexts stand in the prompt twice.
        prefix: Whether mixers that know a prefix see the context, or of two copies the first, as a whole.

    Raises:
        TypeError: If the checkpoint holds no language model.
        ValueError: If tokenizer and vocabulary do not fit, a number is below 1, or a model without such a mixer is to
            read a prefix.
    """

    def __init__(
        self,
        pretrained: str | Path | LanguageModel,
        tokenizer: str | Tokenizer | None = None,
        max_length: int | None = None,
        batch_tokens: int = 8192,
        batch_size: int | str = 16,
        max_gen_toks: int = 256,
        device: str = "cpu",
        twice: bool = False,
        prefix: bool = False,
    ) -> None:
        super().__init__()
        check_flags(twice=twice, prefix=prefix)
        self.twice, self.prefix = twice, prefix
        numbers = {"batch_tokens": batch_tokens, "batch_size": batch_size, "max_gen_toks": max_gen_toks}
        if max_length is not None:
            numbers["max_length"] = max_length
        for name, value in numbers.items():
            if int(value) < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if isinstance(pretrained, LanguageModel):
            self.model = pretrained.to(device).eval()
            chosen = load_tokenizer("bytes") if tokenizer is None else tokenizer
        else:
            folder = find_checkpoint(pretrained)
            self.model = from_pretrained(folder, device=device)
            if not isinstance(self.model, LanguageModel):
                raise TypeError(f"{folder} holds a {type(self.model).__name__}, not a language model")
            chosen = tokenizer_of(folder, self.model.config.vocab_size) if tokenizer is None else tokenizer
        loaded = load_tokenizer(chosen) if isinstance(chosen, str) else chosen
        self.text = check_tokenizer(loaded, self.model.config.vocab_size)
        if prefix and not any(isinstance(module, PrefixLinearAttention) for module in self.model.modules()):
            raise ValueError(
                "prefix asks for a mixer that reads a prefix as a whole, prefix_linear_attention; the model's pattern "
                f"is {self.model.config.pattern}"
            )
        limit = self.model.config.max_positions
        if max_length is not None and limit is not None and max_length > limit:
            raise ValueError(f"max_length must be at most the model's max_positions, {limit}, got {max_length}")
        self.max_length = limit if max_length is None else int(max_length)
        self.batch_tokens, self.batch_size = int(batch_tokens), int(batch_size)
        self.max_gen_toks = int(max_gen_toks)

    @property
    def eot_token_id(self) -> int:
        """The token that stands before a text without context."""
        return self.text.encode(NEWLINE)[0] if self.text.end is None else self.text.end

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        """The tokens of a text; none are added at its ends."""
        return self.text.encode(string)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **options: Any
    ) -> list[tuple[float, bool]]:
        # what stands for an empty context is no context
        return self._scored([(ids, answer, self.twice and text != "") for (text, _), ids, answer in requests])

    def _scored(self, requests: list[tuple[list[int], list[int], bool]]) -> list[tuple[float, bool]]:
        """Log-likelihoods of continuations, and whether they are greedy; of contexts that may be doubled."""
        found: list[tuple[float, bool] | None] = [None] * len(requests)
        # answers to one context beside one another, by the prompt and the length of its prefix
        contexts: dict[tuple[tuple[int, ...], int], list[int]] = {}
        for index, (context, continuation, twice) in enumerate(requests):
            prompt, first = self._fitted(context, len(continuation), twice)
            contexts.setdefault((tuple(prompt), first), []).append(index)
        for group in self._batches(contexts, [continuation for _, continuation, _ in requests]):
            prompts = [torch.tensor(prompt) for prompt, _ in group]
            answers = [[torch.tensor(requests[index][1]) for index in indices] for indices in group.values()]
            prefixes = [first for _, first in group] if self.prefix else None
            with torch.inference_mode():
                scores = score(self.model, prompts, answers, prefixes)
            for indices, several in zip(group.values(), scores, strict=True):
                for index, one in zip(indices, several, strict=True):
                    found[index] = float(one.log_probabilities.sum()), bool(one.greedy.all())
        return [one for one in found if one is not None]

    def _fitted(self, context: list[int], following: int, twice: bool) -> tuple[list[int], int]:
        """The end of a context that still fits before so many tokens, twice if asked for, and its first copy's length.

        Raises:
            ValueError: If not one token, or not two copies of one, fit.
        """
        between = self.text.encode(NEWLINE) if twice else []
        if self.max_length is not None:
            room = self.max_length + 1 - following  # the last token is scored and not read
            room = (room - len(between)) // 2 if twice else room
            if room < 1:
                raise ValueError(
                    f"a continuation of {following} tokens does not fit into max_length = {self.max_length} behind a "
                    f"context of at least one{', twice' if twice else ''}"
                )
            context = context[-room:]
        return [*context, *between, *context] if twice else context, len(context)

    def _batches(
        self, contexts: dict[tuple[tuple[int, ...], int], list[int]], continuations: list[list[int]]
    ) -> Iterator[dict[tuple[tuple[int, ...], int], list[int]]]:
        """Prompts of about as many tokens as are read at once."""
        batch: dict[tuple[tuple[int, ...], int], list[int]] = {}
        size = 0
        for context, indices in contexts.items():
            cost = max(len(context[0]), sum(len(continuations[index]) for index in indices))
            if batch and size + cost > self.batch_tokens:
                yield batch
                batch, size = {}, 0
            batch[context] = indices
            size += cost
        if batch:
            yield batch

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, every token once."""
        return [self._whole(self.text.encode(text)) for (text,) in (request.args for request in requests)]

    def _whole(self, ids: list[int]) -> float:
        if not ids:
            return 0.0
        if self.max_length is None:
            return self._carried(torch.tensor([self.eot_token_id, *ids]).split(self.batch_tokens))
        windows = get_rolling_token_windows(ids, self.eot_token_id, self.max_length, 1)
        cut = [make_disjoint_window(window) for window in windows]
        asked = [(list(context), list(continuation), False) for context, continuation in cut]
        return sum(value for value, _ in self._scored(asked))

    def _carried(self, pieces: Sequence[Tensor]) -> float:
        total, state = 0.0, None
        device = self.model.embedding.weight.device
        with torch.inference_mode():
            for index, piece in enumerate(pieces):
                follows = pieces[index + 1][:1] if index + 1 < len(pieces) else piece[:0]
                logits, state = self.model(piece[None].to(device), state, return_state=True)
                targets = torch.cat([piece[1:], follows]).to(device)
                scores = logits[0, : len(targets)].to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
                total += float(scores.gather(1, targets[:, None]).sum())
        return total

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations, each up to the first of its stopping texts."""
        found: list[str] = [""] * len(requests)
        # prompts whose options are alike run together
        alike: dict[tuple[Any, ...], list[int]] = {}
        for index, request in enumerate(requests):
            alike.setdefault(_options(request.args[1], self.max_gen_toks), []).append(index)
        for (until, count, temperature, top_k, top_p), indices in alike.items():
            for start in range(0, len(indices), self.batch_size):
                part = indices[start : start + self.batch_size]
                texts = [self.text.encode(requests[index].args[0]) for index in part]
                prompts = [
                    self._fitted(text or [self.eot_token_id], count, self.twice and bool(text)) for text in texts
                ]
                sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
                for index, text in zip(part, self._continued(prompts, until, count, sampling), strict=True):
                    found[index] = text
        return found

    def _continued(
        self, prompts: list[tuple[list[int], int]], until: tuple[str, ...], count: int, sampling: dict[str, Any]
    ) -> list[str]:
        """What follows each prompt, which comes with the length of its prefix."""
        rows: list[list[int]] = [[] for _ in prompts]
        done: list[str | None] = [None] * len(prompts)
        rows_of = [torch.tensor(prompt) for prompt, _ in prompts]
        prefixes = [first for _, first in prompts] if self.prefix else None
        for tokens in stream(self.model, rows_of, count, prefix_lengths=prefixes, **sampling):
            for index, token in enumerate(tokens.tolist()):
                if done[index] is None:
                    rows[index].append(token)
                    text = self.text.decode(rows[index])
                    stops = [text.index(word) for word in until if word in text]
                    if stops:
                        done[index] = text[: min(stops)]
                    elif token == self.text.end:
                        done[index] = self.text.decode(rows[index][:-1])
            if all(one is not None for one in done):
                break
        return [self.text.decode(row) if one is None else one for row, one in zip(rows, done, strict=True)]


def _options(given: dict[str, Any], count: int) -> tuple[tuple[str, ...], int, float, int | None, float | None]:
    """Stopping texts, number of tokens, temperature, top-k and top-p of a request.

    Raises:
        ValueError: If it asks for another way of decoding.
    """
    options = dict(given)
    until = options.pop("until", None) or []
    until = [until] if isinstance(until, str) else until
    count = int(options.pop("max_gen_toks", options.pop("max_new_tokens", count)))
    temperature = float(options.pop("temperature", 1.0 if options.get("do_sample") else 0.0))
    if not options.pop("do_sample", temperature > 0):
        temperature = 0.0
    top_k, top_p = options.pop("top_k", None), options.pop("top_p", None)
    if options:
        raise ValueError(
            f"generation knows until, max_gen_toks, do_sample, temperature, top_k and top_p, the task also asks for "
            f"{', '.join(options)}"
        )
    return tuple(word for word in until if word), count, temperature, top_k, top_p
