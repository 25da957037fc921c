"""lm-evaluation-harness: scores are sums over single steps, windows and batches change nothing, tasks run."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from seqzoo.hub import save_pretrained
from seqzoo.models import LanguageModel, ModelConfig, generate
from seqzoo.models.tokenizer import characters
from seqzoo.packing import Packing

pytest.importorskip("lm_eval")

from seqzoo.eval.harness import HarnessModel

PATTERN = ["mamba", "attention", "gla"]


@pytest.fixture
def model() -> LanguageModel:
    torch.manual_seed(0)
    made = LanguageModel(ModelConfig(vocab_size=256, d_model=16, n_layers=3, pattern=PATTERN)).double().eval()
    with torch.no_grad():
        made.embedding.weight.mul_(30)
    return made


def asking(*arguments) -> list[SimpleNamespace]:
    return [SimpleNamespace(args=one) for one in arguments]


def by_steps(model: LanguageModel, text: str, start: str = "\n") -> list[torch.Tensor]:
    """Log-probabilities of all successors behind each byte, one step after another."""
    state, found = model.init_state(1), []
    with torch.no_grad():
        for byte in (start + text).encode():
            logits, state = model.step(torch.tensor([byte]), state)
            found.append(logits[0].log_softmax(-1))
    return found


def test_likelihoods_are_sums_of_steps(model):
    pairs = [("the cat", " sat"), ("the cat", " ran away"), ("", "dog"), ("a", "b"), ("the cat ", "sat")]
    found = HarnessModel(model).loglikelihood(asking(*pairs), disable_tqdm=True)
    for (given, asked), (value, greedy) in zip(pairs, found, strict=True):
        # lm-evaluation-harness moves a space between the two to the answer
        context = given.rstrip()
        answer = given[len(context) :] + asked
        steps = (
            by_steps(model, context + answer) if not context else by_steps(model, (context + answer)[1:], context[0])
        )
        targets = answer.encode()
        used = steps[-1 - len(targets) : -1]
        expected = sum(float(step[byte]) for step, byte in zip(used, targets, strict=True))
        assert value == pytest.approx(expected, rel=1e-9)
        assert greedy == all(int(step.argmax()) == byte for step, byte in zip(used, targets, strict=True))


def test_greedy_answers_are_told(model):
    context = torch.tensor([list(b"hello")])
    answer = bytes(generate(model, context, 1, temperature=0)[0].tolist())
    harness = HarnessModel(model)
    request = [(("", ""), list(b"hello"), list(answer)), (("", ""), list(b"hello"), [(answer[0] + 1) % 256])]
    assert [greedy for _, greedy in harness._loglikelihood_tokens(request)] == [True, False]


@pytest.mark.parametrize("batch_tokens", [1, 7, 8192])
def test_a_shared_context_is_read_once(model, batch_tokens, monkeypatch):
    pairs = [("one context", f" answer {index}") for index in range(4)] + [("another", " one"), ("one context", " x")]
    alone = [HarnessModel(model).loglikelihood(asking(pair), disable_tqdm=True)[0] for pair in pairs]
    read = []
    prefill = model.prefill
    monkeypatch.setattr(model, "prefill", lambda ids, packing: read.append(ids.shape[1]) or prefill(ids, packing))
    together = HarnessModel(model, batch_tokens=batch_tokens).loglikelihood(asking(*pairs), disable_tqdm=True)
    for one, other in zip(together, alone, strict=True):
        assert one == (pytest.approx(other[0], rel=1e-9), other[1])
    assert sum(read) == len("one context") + len("another")


class TestRolling:
    TEXT = "It was a bright cold day in April."

    @pytest.mark.parametrize("batch_tokens", [1, 5, 8192])
    def test_every_token_counts_once_behind_all_before_it(self, model, batch_tokens):
        steps = by_steps(model, self.TEXT)
        expected = sum(float(step[byte]) for step, byte in zip(steps, self.TEXT.encode(), strict=False))
        harness = HarnessModel(model, batch_tokens=batch_tokens)
        assert harness.loglikelihood_rolling(asking((self.TEXT,), ("",))) == [pytest.approx(expected, rel=1e-9), 0.0]

    def test_windows(self, model):
        width = 10
        expected = 0.0
        text = "\n" + self.TEXT
        for start in range(0, len(self.TEXT), width):
            end = min(start + width, len(self.TEXT))
            # the last window is as long as the others and scores what they have left
            begin = max(0, end - width)
            steps = by_steps(model, text[begin + 1 : end + 1], text[begin])
            expected += sum(float(steps[i - begin][ord(text[i + 1])]) for i in range(start, end))
        found = HarnessModel(model, max_length=width).loglikelihood_rolling(asking((self.TEXT,)))
        assert found == [pytest.approx(expected, rel=1e-9)]


class TestGeneration:
    def test_prompts_together_as_alone(self, model):
        prompts = ["a", "some longer prompt", "mid size", "a"]
        options = {"until": ["zzzz"], "max_gen_toks": 7}
        found = HarnessModel(model, batch_size=3).generate_until(asking(*((one, dict(options)) for one in prompts)))
        for prompt, text in zip(prompts, found, strict=True):
            new = generate(model, torch.tensor([list(prompt.encode())]), 7, temperature=0)[0]
            assert text == bytes(new.tolist()).decode(errors="replace")

    def test_it_stops_at_the_first_stopping_text(self, model):
        whole = HarnessModel(model).generate_until(asking(("ab", {"max_gen_toks": 12})))[0]
        stop = whole[4:6]
        cut = HarnessModel(model).generate_until(asking(("ab", {"until": [stop, "none"], "max_gen_toks": 12})))[0]
        assert cut == whole[: whole.index(stop)]

    def test_options_that_are_not_known(self, model):
        with pytest.raises(ValueError, match="num_beams"):
            HarnessModel(model).generate_until(asking(("a", {"num_beams": 4})))


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """A multiple choice and a perplexity task over files."""
    rows = [
        {"question": f"{a}+{b}=", "choices": ["3", "5", "7"], "answer": (a + b) % 3} for a in (1, 2) for b in (1, 4)
    ]
    (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "sums.yaml").write_text(
        f"""task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{tmp_path}/rows.json"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1.0}}
"""
    )
    return tmp_path


def test_a_task_runs(model, task: Path):
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(task), include_defaults=False)
    found = lm_eval.simple_evaluate(
        model=HarnessModel(model), tasks=["sums"], task_manager=manager, bootstrap_iters=0, log_samples=True
    )
    assert found is not None
    hits = []
    for row in map(json.loads, (task / "rows.json").read_text().splitlines()):
        question = row["question"]
        behind = by_steps(model, question[1:] + " ", question[0])
        values = [float(behind[-2][32]) + float(behind[-1][ord(choice)]) for choice in row["choices"]]
        hits.append(values.index(max(values)) == row["answer"])
    assert found["results"]["sums"]["acc,none"] == pytest.approx(sum(hits) / len(hits))


class TestTokenizers:
    def test_a_checkpoint_brings_its_own(self, tmp_path: Path):
        text = "to be or not to be"
        tokenizer = characters([text])
        model = LanguageModel(ModelConfig(vocab_size=16, d_model=16, n_layers=1, pattern="min_gru"))
        save_pretrained(model, tmp_path / "model")
        with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json"):
            HarnessModel(tmp_path)
        tokenizer.save(tmp_path / "model")
        harness = HarnessModel(tmp_path)
        assert harness.tok_encode(text) == tokenizer.encode(text)
        assert harness.text.decode(harness.tok_encode(text)) == text
        assert harness.loglikelihood(asking((text, " be")), disable_tqdm=True)[0][0] < 0

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"batch_tokens": 0}, "batch_tokens must be at least 1"),
            ({"max_length": 9}, "max_positions, 8, got 9"),
            ({"tokenizer": "large"}, "vocabulary 20"),
        ],
    )
    def test_what_does_not_fit(self, options, words):
        model = LanguageModel(ModelConfig(vocab_size=20, d_model=16, n_layers=1, pattern="min_gru", max_positions=8))
        if options.get("tokenizer") == "large":
            options = {"tokenizer": characters(["abcdefghijklmnopqrstuvwxyz"])}
        else:
            options = {"tokenizer": characters(["abc"]), **options}
        with pytest.raises(ValueError, match=words):
            HarnessModel(model, **options)

    def test_an_answer_longer_than_the_model_sees(self):
        model = LanguageModel(ModelConfig(vocab_size=256, d_model=16, n_layers=1, pattern="min_gru", max_positions=4))
        with pytest.raises(ValueError, match="does not fit into max_length = 4"):
            HarnessModel(model).loglikelihood(asking(("ab", "cdefg")), disable_tqdm=True)


def count_tokens(model: LanguageModel, monkeypatch) -> list[int]:
    """The tokens that every call embeds: what the model reads, by whatever way."""
    read: list[int] = []
    forward = model.embedding.forward
    monkeypatch.setattr(model.embedding, "forward", lambda ids: read.append(ids.numel()) or forward(ids))
    return read


class TestReadTokens:
    def test_a_multiple_choice_reads_its_context_once(self, model, monkeypatch):
        answers = [" yes", " no", " it may be so"]
        read = count_tokens(model, monkeypatch)
        HarnessModel(model).loglikelihood(asking(*(("a question:", one) for one in answers)), disable_tqdm=True)
        # the last token of an answer is predicted and not read
        assert sum(read) == len("a question:") + sum(len(one) - 1 for one in answers)

    def test_a_rolling_text_is_read_once(self, model, monkeypatch):
        read = count_tokens(model, monkeypatch)
        HarnessModel(model, batch_tokens=7).loglikelihood_rolling(asking(("some text of bytes",)))
        assert sum(read) == len("some text of bytes") + 1

    def test_generation_steps(self, model, monkeypatch):
        read = count_tokens(model, monkeypatch)
        HarnessModel(model).generate_until(asking(("abcd", {"max_gen_toks": 6})))
        assert sum(read) == 4 + 5


class TestTwice:
    def test_contexts_stand_in_the_prompt_twice(self, model):
        context, answer = "the key is 7", " it is 7"
        twice = HarnessModel(model, twice=True).loglikelihood(asking((context, answer)), disable_tqdm=True)[0]
        by_hand = HarnessModel(model).loglikelihood(asking((f"{context}\n{context}", answer)), disable_tqdm=True)[0]
        assert twice == (pytest.approx(by_hand[0], rel=1e-12), by_hand[1])
        once = HarnessModel(model).loglikelihood(asking((context, answer)), disable_tqdm=True)[0]
        assert once[0] != pytest.approx(twice[0], rel=1e-6)
        options = {"max_gen_toks": 5}
        assert HarnessModel(model, twice=True).generate_until(asking((context, options))) == HarnessModel(
            model
        ).generate_until(asking((f"{context}\n{context}", options)))

    def test_what_has_no_context_is_read_as_ever(self, model):
        twice, once = HarnessModel(model, twice=True), HarnessModel(model)
        for kind, one in (("loglikelihood", ("", "dog")), ("loglikelihood_rolling", ("some text",))):
            given = asking(one)
            assert getattr(twice, kind)(given, disable_tqdm=True) == getattr(once, kind)(given, disable_tqdm=True)
        assert twice.generate_until(asking(("", {"max_gen_toks": 3}))) == once.generate_until(
            asking(("", {"max_gen_toks": 3}))
        )

    def test_both_copies_are_cut_where_room_is_short(self, model, monkeypatch):
        prompts = []
        prefill = model.prefill
        monkeypatch.setattr(model, "prefill", lambda ids, packing=None: prompts.append(ids) or prefill(ids, packing))
        HarnessModel(model, max_length=12, twice=True).loglikelihood(asking(("0123456789", "ab")), disable_tqdm=True)
        HarnessModel(model, max_length=12, twice=True).generate_until(asking(("0123456789", {"max_gen_toks": 2})))
        assert [bytes(one[0].tolist()) for one in prompts] == [b"56789\n56789"] * 2
        with pytest.raises(ValueError, match="context of at least one, twice"):
            HarnessModel(model, max_length=3, twice=True).loglikelihood(asking(("ab", "cd")), disable_tqdm=True)


class TestPrefix:
    @pytest.fixture
    def reader(self) -> LanguageModel:
        torch.manual_seed(1)
        pattern = ["prefix_linear_attention", "mamba"]
        made = LanguageModel(ModelConfig(vocab_size=256, d_model=16, n_layers=2, pattern=pattern)).double().eval()
        with torch.no_grad():
            made.embedding.weight.mul_(30)
        return made

    @pytest.mark.parametrize("twice", [False, True])
    def test_the_first_copy_is_read_as_a_whole(self, reader, twice):
        context, answer = "a: 1, b: 2; a", ": 1"
        prompt = f"{context}\n{context}" if twice else context
        ids = torch.tensor([list((prompt + answer).encode())])
        packing = Packing.from_lengths([ids.shape[1]], prefix_lengths=[len(context)])
        with torch.no_grad():
            scores = reader(ids, cu_seqlens=packing)[0][0].log_softmax(-1)
        expected = sum(float(scores[len(prompt) + i - 1, byte]) for i, byte in enumerate(answer.encode()))
        harness = HarnessModel(reader, twice=twice, prefix=True)
        found = harness.loglikelihood(asking((context, answer)), disable_tqdm=True)[0][0]
        assert found == pytest.approx(expected, rel=1e-9)
        causal = HarnessModel(reader, twice=twice).loglikelihood(asking((context, answer)), disable_tqdm=True)[0][0]
        assert causal != pytest.approx(expected, rel=1e-6)

    def test_a_generation_sees_it_too(self, reader, monkeypatch):
        seen = []
        prefill = reader.prefill

        def watched(ids, packing=None):
            logits, state = prefill(ids, packing)
            seen.append((None if packing is None else packing.prefix_lengths, logits))
            return logits, state

        monkeypatch.setattr(reader, "prefill", watched)
        for prefix in (False, True):
            harness = HarnessModel(reader, twice=True, prefix=prefix)
            harness.generate_until(asking(("abcdefg", {"max_gen_toks": 2}), ("gfedcba", {"max_gen_toks": 2})))
        (no_prefix, causal), (prefixes, whole) = seen
        assert no_prefix is None
        assert prefixes.tolist() == [7, 7]
        assert not torch.allclose(causal, whole)

    def test_a_model_without_such_a_mixer_is_refused(self, model):
        with pytest.raises(ValueError, match="prefix_linear_attention; the model's pattern is"):
            HarnessModel(model, prefix=True)
        with pytest.raises(ValueError, match="twice must be True or False, got 'yes'"):
            HarnessModel(model, twice="yes")


def test_a_task_that_generates(model, tmp_path: Path):
    import lm_eval
    from lm_eval.tasks import TaskManager

    questions = ["first", "a second one"]
    for twice in (False, True):
        texts = [f"{one}\n{one}" if twice else one for one in questions]
        answers = [
            bytes(generate(model, torch.tensor([list(text.encode())]), 4, temperature=0)[0].tolist()) for text in texts
        ]
        golds = [answers[0].decode(errors="replace"), "something else"]
        rows = [{"q": one, "a": gold} for one, gold in zip(questions, golds, strict=True)]
        folder = tmp_path / str(twice)
        folder.mkdir()
        (folder / "rows.json").write_text("\n".join(map(json.dumps, rows)))
        (folder / "saying.yaml").write_text(
            f"task: saying{twice}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: '{folder}/rows.json'}}}}\n"
            "test_split: test\noutput_type: generate_until\ndoc_to_text: '{{q}}'\ndoc_to_target: '{{a}}'\n"
            "generation_kwargs: {until: ['@@'], max_gen_toks: 4}\n"
            "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
            "metadata: {version: 1.0}\n"
        )
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        found = lm_eval.simple_evaluate(
            model=HarnessModel(model, twice=twice), tasks=[f"saying{twice}"], task_manager=manager, bootstrap_iters=0
        )
        assert found is not None
        assert found["results"][f"saying{twice}"]["exact_match,none"] == 0.5
