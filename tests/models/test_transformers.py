"""A LanguageModel under the interface of transformers: the same numbers, generation, training, files."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from seqzoo import Packing
from seqzoo.models import LanguageModel, ModelConfig, generate
from seqzoo.parallel import next_tokens

transformers = pytest.importorskip("transformers")

from seqzoo.hub.causal_lm import SeqZooCache, SeqZooConfig, SeqZooForCausalLM  # noqa: E402

PATTERN = ["mamba", "attention", "gated_deltanet"]
Tokens = Callable[..., torch.Tensor]


@pytest.fixture
def own() -> LanguageModel:
    torch.manual_seed(0)
    # the logits of a new model are too close to one another for a beam search to choose
    model = LanguageModel(ModelConfig(vocab_size=23, d_model=16, n_layers=3, pattern=PATTERN)).double().eval()
    with torch.no_grad():
        model.embedding.weight.mul_(30)
    return model


@pytest.fixture
def wrapped(own: LanguageModel) -> SeqZooForCausalLM:
    return SeqZooForCausalLM.of(own, pad_token_id=0).eval()


@pytest.fixture
def prompts() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, 23, (length,), generator=generator) for length in (3, 7, 5)]


def padded(prompts: list[torch.Tensor], side: str) -> dict[str, torch.Tensor]:
    longest = max(map(len, prompts))
    rows, masks = [], []
    for row in prompts:
        gap = torch.zeros(longest - len(row), dtype=torch.int64)
        parts = [gap, row] if side == "left" else [row, gap]
        rows.append(torch.cat(parts))
        masks.append(torch.cat([torch.zeros_like(gap) if part is gap else torch.ones_like(row) for part in parts]))
    return {"input_ids": torch.stack(rows), "attention_mask": torch.stack(masks)}


def test_logits_and_loss_are_the_models_own(own, wrapped, prompts):
    ids = torch.stack([prompts[1], prompts[1].flip(0)])
    torch.testing.assert_close(wrapped(ids).logits, own(ids)[0], rtol=0, atol=0)
    torch.testing.assert_close(wrapped(ids, logits_to_keep=2).logits, own(ids)[0][:, -2:])
    loss = wrapped(ids, labels=ids).loss
    torch.testing.assert_close(loss, own.loss(ids, next_tokens(ids)))
    shared = wrapped(ids, labels=ids, num_items_in_batch=torch.tensor(24)).loss
    torch.testing.assert_close(shared, loss / 2)
    embedded = wrapped(inputs_embeds=own.embedding(ids), return_dict=False)
    torch.testing.assert_close(embedded[0], own(ids)[0], rtol=0, atol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(own, wrapped, prompts, side):
    batch = padded(prompts, side)
    logits = wrapped(**batch).logits
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    losses = []
    for row, found, mask in zip(prompts, logits, batch["attention_mask"], strict=True):
        torch.testing.assert_close(found[mask.bool()], own(row[None])[0][0], rtol=1e-9, atol=1e-9)
        losses.append(own.loss(row[None], next_tokens(row[None])) * (len(row) - 1))
    expected = torch.stack(losses).sum() / sum(len(row) - 1 for row in prompts)
    torch.testing.assert_close(wrapped(**batch, labels=labels).loss, expected)


@pytest.mark.parametrize("how", ["position_ids", "cu_seq_lens", "seq_idx"])
def test_packed_as_transformers_packs(own, wrapped, prompts, how):
    told = Packing.from_lengths([len(row) for row in prompts]).to_huggingface()
    ids = torch.cat(prompts)[None]
    packed = wrapped(ids, labels=ids, **{name: value for name, value in told.items() if name.startswith(how)})
    torch.testing.assert_close(
        packed.logits[0], torch.cat([own(row[None])[0][0] for row in prompts]), rtol=1e-9, atol=1e-9
    )
    torch.testing.assert_close(packed.loss, wrapped(**padded(prompts, "left"), labels=labels_of(prompts)).loss)


def labels_of(prompts: list[torch.Tensor]) -> torch.Tensor:
    batch = padded(prompts, "left")
    return batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)


def test_a_flattening_collator_feeds_it(own, wrapped, prompts):
    collate = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    batch = collate([{"input_ids": row.tolist()} for row in prompts])
    torch.testing.assert_close(
        wrapped(**batch).loss, wrapped(**padded(prompts, "left"), labels=labels_of(prompts)).loss
    )


class TestGeneration:
    def test_prompts_of_unequal_length_give_what_each_gives_alone(self, own, wrapped, prompts):
        found = wrapped.generate(**padded(prompts, "left"), max_new_tokens=9, do_sample=False, eos_token_id=None)
        for row, continued in zip(prompts, found, strict=True):
            alone = generate(own, row[None], 9, temperature=0)[0]
            assert continued[-9:].tolist() == alone.tolist()

    @pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}])
    def test_the_state_takes_nothing_from_it(self, wrapped, prompts, options):
        found = []
        for use_cache in (True, False):
            torch.manual_seed(3)
            batch = padded(prompts, "left")
            found.append(wrapped.generate(**batch, max_new_tokens=8, use_cache=use_cache, **options).tolist())
        assert found[0] == found[1]

    def test_a_cache_is_continued_by_several_tokens(self, own, wrapped, prompts):
        ids = torch.stack([prompts[1], prompts[1].flip(0)])
        first = wrapped(ids[:, :3], use_cache=True)
        assert first.past_key_values.get_seq_length() == 3
        second = wrapped(ids[:, 3:], past_key_values=first.past_key_values, attention_mask=torch.ones(2, 7))
        torch.testing.assert_close(second.logits, own(ids)[0][:, 3:], rtol=1e-9, atol=1e-9)
        assert second.past_key_values.get_seq_length() == 7

    def test_a_cache_is_continued_by_padded_rows(self, own, wrapped, prompts):
        ids = torch.stack([prompts[1], prompts[1].flip(0)])
        cache = wrapped(ids[:, :3], use_cache=True).past_key_values
        mask = torch.ones(2, 7)
        mask[1, 3:5] = 0
        second = wrapped(ids[:, 3:], past_key_values=cache, attention_mask=mask)
        torch.testing.assert_close(second.logits[0], own(ids[:1])[0][0, 3:], rtol=1e-9, atol=1e-9)
        kept = torch.cat([ids[1, :3], ids[1, 5:]])[None]
        torch.testing.assert_close(second.logits[1, 2:], own(kept)[0][0, 3:], rtol=1e-9, atol=1e-9)

    def test_rows_of_a_cache(self, own, wrapped, prompts):
        ids = torch.stack([prompts[1], prompts[1].flip(0)])
        cache = wrapped(ids[:, :-1], use_cache=True).past_key_values
        cache.batch_repeat_interleave(2)
        cache.reorder_cache(torch.tensor([3, 0]))
        found = wrapped(ids.flip(0)[:, -1:], past_key_values=cache).logits
        torch.testing.assert_close(found[:, 0], own(ids)[0].flip(0)[:, -1], rtol=1e-9, atol=1e-9)

    def test_what_crops_a_state_raises(self, wrapped, prompts):
        with pytest.raises(ValueError, match="stateful models"):
            wrapped.generate(prompts[0][None], assistant_model=wrapped, max_new_tokens=4)
        with pytest.raises(ValueError, match="trust_remote_code"):
            wrapped.generate(prompts[0][None], penalty_alpha=0.6, top_k=4, max_new_tokens=4)
        with pytest.raises(NotImplementedError, match="cannot be cropped"):
            SeqZooCache([], 3).crop(2)


class TestFiles:
    def test_saved_and_loaded_by_the_auto_classes(self, own, wrapped, prompts, tmp_path: Path):
        wrapped.save_pretrained(tmp_path)
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
        assert isinstance(again, SeqZooForCausalLM)
        assert again.model.config == own.config
        assert (again.config.vocab_size, again.config.hidden_size, again.config.pad_token_id) == (23, 16, 0)
        torch.testing.assert_close(again(prompts[1][None]).logits, own(prompts[1][None])[0], rtol=0, atol=0)

    def test_fp32_parameters_stay_wide(self, wrapped, tmp_path: Path):
        wrapped.float().save_pretrained(tmp_path)
        narrow = SeqZooForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
        wide = {name for name, parameter in narrow.named_parameters() if parameter.dtype == torch.float32}
        assert "model.backbone.blocks.0.mixer.A_log" in wide
        assert wide == {name for name, p in wrapped.to(torch.bfloat16).named_parameters() if p.dtype == torch.float32}

    @pytest.mark.parametrize("pattern", [[{"name": "attention", "shared": "one"}, "min_gru"], "mamba2"])
    @pytest.mark.parametrize("tied", [True, False])
    def test_shared_blocks_and_either_output(self, pattern, tied, tmp_path: Path):
        config = ModelConfig(vocab_size=11, d_model=16, n_layers=4, pattern=pattern, tie_embeddings=tied)
        model = SeqZooForCausalLM.of(LanguageModel(config)).eval()
        model.save_pretrained(tmp_path)
        ids = torch.arange(10)[None]
        again = SeqZooForCausalLM.from_pretrained(tmp_path)
        torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=0)

    def test_a_checkpoint_that_lacks_a_tensor(self, wrapped, tmp_path: Path):
        wrapped.save_pretrained(tmp_path)
        from safetensors.torch import load_file, save_file

        tensors = load_file(tmp_path / "model.safetensors")
        tensors.pop("model.embedding.weight")
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"1 tensors missing: model\.embedding\.weight"):
            SeqZooForCausalLM.from_pretrained(tmp_path)


def test_a_pipeline_writes_text(wrapped, own, tmp_path: Path):
    tokenizers = pytest.importorskip("tokenizers")
    words = {"<pad>": 0, **{letter: index + 1 for index, letter in enumerate("abcdefghijklmnopqrstuv")}}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", padding_side="left")
    wrapped.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    write = transformers.pipeline("text-generation", model=str(tmp_path), dtype=torch.float64, device="cpu")
    texts = ["abba", "cabbage"]
    found = write(texts, max_new_tokens=5, do_sample=False, batch_size=2, return_full_text=False)
    for text, [entry] in zip(texts, found, strict=True):
        ids = torch.tensor([[words[letter] for letter in text]])
        expected = generate(own, ids, 5, temperature=0)[0].tolist()
        assert entry["generated_text"].replace(" ", "") == tokenizer.decode(expected).replace(" ", "")


class TestTraining:
    @pytest.fixture
    def trained(self, own, prompts, tmp_path: Path):
        pytest.importorskip("accelerate")

        def run(steps: int, **options) -> tuple[list[float], SeqZooForCausalLM]:
            torch.manual_seed(0)
            # SGD: a factor on gradients shows in the weights
            model = SeqZooForCausalLM(SeqZooConfig.of(own.config, pad_token_id=0)).double()
            rows = rows_of(prompts)
            arguments = transformers.TrainingArguments(
                output_dir=str(tmp_path / "run"),
                max_steps=steps,
                learning_rate=0.1,
                lr_scheduler_type="constant",
                optim="sgd",
                max_grad_norm=0.0,
                report_to=[],
                logging_steps=1,
                save_strategy="no",
                use_cpu=True,
                disable_tqdm=True,
                seed=0,
                **options,
            )
            trainer = transformers.Trainer(model, arguments, train_dataset=rows)
            trainer.train()
            return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], model

        return run

    def test_it_learns(self, trained):
        losses, _ = trained(12, per_device_train_batch_size=3)
        assert losses[-1] < 0.8 * losses[0]

    def test_accumulated_gradients_are_those_of_the_batch(self, trained):
        losses, whole = trained(2, per_device_train_batch_size=3)
        parts, accumulated = trained(2, per_device_train_batch_size=1, gradient_accumulation_steps=3)
        assert parts == pytest.approx(losses, rel=1e-6)
        for one, other in zip(whole.parameters(), accumulated.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)

    def test_checkpointed_blocks_give_the_same(self, trained):
        _, plain = trained(2, per_device_train_batch_size=3)
        _, again = trained(2, per_device_train_batch_size=3, activation_checkpointing=True)
        assert again.is_gradient_checkpointing
        assert not plain.is_gradient_checkpointing
        for one, other in zip(plain.parameters(), again.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def rows_of(prompts: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    batch = padded(prompts, "right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return [
        {"input_ids": ids, "attention_mask": mask, "labels": label}
        for ids, mask, label in zip(batch["input_ids"], batch["attention_mask"], labels, strict=True)
    ]


class TestBadInput:
    def test_arguments(self, own, wrapped, prompts):
        ids = prompts[1][None]
        for arguments, error, words in (
            ({}, ValueError, "one of them"),
            ({"input_ids": ids, "inputs_embeds": own.embedding(ids)}, ValueError, "one of them"),
            ({"input_ids": ids[0]}, ValueError, r"\(B, T\)"),
            ({"input_ids": ids, "output_attentions": True}, ValueError, "output_attentions"),
            ({"input_ids": ids, "attention_mask": torch.tensor([[1, 0, 1, 1, 1, 1, 1]])}, ValueError, "holes"),
            (
                {"input_ids": ids, "cu_seq_lens_q": torch.tensor([0, 7]), "cu_seq_lens_k": torch.tensor([0, 6])},
                ValueError,
                "cu_seq_lens_k",
            ),
            ({"input_ids": ids, "token_type_ids": ids}, TypeError, "token_type_ids"),
        ):
            with pytest.raises(error, match=words):
                wrapped(**arguments)

    def test_configurations(self, wrapped):
        with pytest.raises(ValueError, match="no mixer 'mamb'"):
            SeqZooConfig(seqzoo={"vocab_size": 3, "d_model": 16, "n_layers": 1, "pattern": "mamb"})
        with pytest.raises(ValueError, match="needs seqzoo="):
            SeqZooForCausalLM(SeqZooConfig())
        with pytest.raises(TypeError, match="must be a LanguageModel"):
            SeqZooForCausalLM.of(torch.nn.Linear(2, 2))
        with pytest.raises(NotImplementedError, match="vocab_size"):
            wrapped.resize_token_embeddings(40)
        with pytest.raises(ValueError, match="use_reentrant"):
            wrapped.activation_checkpointing_enable({"use_reentrant": True})


def test_the_hub_does_without_transformers():
    code = "import sys; sys.modules['transformers'] = None; import seqzoo.hub; import seqzoo.hub.causal_lm"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert "needs transformers" in done.stderr
