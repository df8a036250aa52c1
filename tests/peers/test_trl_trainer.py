"""TRL's GRPOTrainer and pykern's of the same name: a few steps of a tiny random model, with and without pykern."""

import copy
import math

import pytest
import torch
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig

import pykern
from pykern.integrations.trl import GRPOTrainer, add_linear_head

WORDS = ["<pad>", "<eos>", *(chr(code) for code in range(ord("a"), ord("z") + 1)), " "]


def tokenizer() -> PreTrainedTokenizerFast:
    characters = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token=" "))
    characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=characters, pad_token="<pad>", eos_token="<eos>")


def model(**changes) -> Qwen2ForCausalLM:
    torch.manual_seed(5)
    config = Qwen2Config(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=None, **changes,
    )  # fmt: skip
    return Qwen2ForCausalLM(config)


def vowels(completions, **_):
    """Share of vowels; of several values, none of them usual."""
    return [sum(letter in "aeiou" for letter in text) / max(len(text), 1) for text in completions]


def short(completions, **_):
    """One function that has nothing to say of some completions."""
    return [None if text.startswith("q") else -0.1 * len(text) for text in completions]


def train(trainer_class, folder, **settings):
    """Losses, advantages, gradient norms and weights of two updates, the second off policy."""
    keywords = {name: settings.pop(name) for name in ("estimator", "loss") if name in settings}
    arguments = GRPOConfig(
        output_dir=str(folder / "run"), per_device_train_batch_size=4, num_generations=4, max_completion_length=8,
        max_steps=2, gradient_accumulation_steps=2, num_iterations=2, learning_rate=0.02, logging_steps=1,
        report_to="none", seed=3, use_cpu=True, bf16=False, save_strategy="no", disable_tqdm=True, **settings,
    )  # fmt: skip
    prompts = Dataset.from_dict({"prompt": ["abc", "hello", "q", "some words", "z y", "pykern", "tree", "lane"]})
    # TRL loads the model for the KL term a second time, by its name.
    model().save_pretrained(folder / "model")
    trainer = trainer_class(
        str(folder / "model"),
        [vowels, short],
        args=arguments,
        train_dataset=prompts,
        processing_class=tokenizer(),
        **keywords,
    )
    trainer.train()
    logged = [row for row in trainer.state.log_history if "loss" in row]
    return logged, list(trainer._logs["advantages"]), copy.deepcopy(trainer.model.state_dict())


CASES = {
    "grpo": {"loss_type": "grpo"},
    "kl": {"loss_type": "grpo", "beta": 0.1},
    "corrected kl": {"loss_type": "dapo", "beta": 0.1, "use_bias_correction_kl": True},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-3, "epsilon_high": 4e-3},
    "bnpo": {"loss_type": "bnpo", "scale_rewards": "batch"},
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 0.999},
    "sapo": {"loss_type": "sapo"},
    "vespo": {"loss_type": "vespo"},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    "delta": {"loss_type": "dapo", "delta": 1.1, "reward_weights": [1.0, 0.3]},
    "gdpo": {"loss_type": "dapo", "multi_objective_aggregation": "normalize_then_sum", "reward_weights": [1.0, 0.3]},
    "entropy": {"loss_type": "grpo", "entropy_coef": 0.05, "top_entropy_quantile": 0.5},
    "off policy": {"loss_type": "dapo", "off_policy_mask_threshold": 1e-4},
}


@pytest.mark.parametrize("case", CASES)
def test_same_training(case, tmp_path):
    theirs = train(trl.GRPOTrainer, tmp_path / "theirs", **CASES[case])
    ours = train(GRPOTrainer, tmp_path / "ours", **CASES[case])
    torch.testing.assert_close(torch.tensor(ours[1]), torch.tensor(theirs[1]), rtol=1e-5, atol=1e-5)
    assert len(ours[0]) == len(theirs[0]) == 2
    for own, other in zip(ours[0], theirs[0]):
        for name in ("loss", "grad_norm", "entropy", "reward", "kl", "policy_loss", "entropy_coef"):
            if name in other:
                assert own[name] == pytest.approx(other[name], rel=2e-4, abs=2e-6), name
        # Of sequences TRL logs the share of sequences, and with delta it looks at the bounded ratio.
        by_token = CASES[case].get("importance_sampling_level") != "sequence" and case != "delta"
        for name in ("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"):
            if name in other and by_token:
                assert own[name] == pytest.approx(other[name], abs=1e-6), name
    for name, weight in theirs[2].items():
        torch.testing.assert_close(ours[2][name], weight, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("estimator, loss", [("rloo", "gspo"), ("opo", "dapo"), ("grpo", "gmpo")])
def test_other_rows(estimator, loss, tmp_path):
    logged, advantages, _ = train(GRPOTrainer, tmp_path, estimator=estimator, loss=loss)
    assert len(logged) == 2 and any(advantages)
    assert all(math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]) for row in logged)
    assert logged[0]["grad_norm"] > 0


def test_the_head_scales_and_caps_logits():
    ours = model()
    ours.config.logit_scale, ours.config.final_logit_softcapping = 0.5, 4.0
    theirs = copy.deepcopy(ours)
    add_linear_head(ours, temperature=0.7)
    trl.trainer.utils.add_fused_lm_head(theirs, temperature=0.7, outputs=("log_probs", "entropy"))
    ids = torch.randint(2, len(WORDS), (3, 9))
    labels = ids.masked_fill(torch.rand(3, 9) < 0.3, -100)
    results = []
    for one in (ours, theirs):
        output = one(input_ids=ids, labels=labels, fused_lm_head=True)
        (output.log_probs.sum() - 0.3 * output.entropy.sum()).backward()
        results.append((output.log_probs, output.entropy, one.lm_head.weight.grad, one.model.embed_tokens.weight.grad))
    for own, other in zip(*results):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours(input_ids=ids).logits, theirs(input_ids=ids).logits)


@pytest.mark.parametrize("in_float32", [False, True])
def test_the_head_follows_autocast(in_float32):
    """Mixed precision keeps the weights in float32, and TRL multiplies in bfloat16."""
    one = model()
    add_linear_head(one, temperature=0.7, cast_lm_head_to_fp32=in_float32)
    ids = torch.randint(2, len(WORDS), (3, 9))
    with torch.autocast("cpu", torch.bfloat16):
        output = one(input_ids=ids, labels=ids, fused_lm_head=True)
        hidden = one.model(ids, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
    weight = one.lm_head.weight
    hidden, weight = (hidden.float(), weight) if in_float32 else (hidden.bfloat16(), weight.bfloat16())
    want = pykern.linear_token_logprobs(hidden, weight, ids[:, 1:].flatten(), temperature=0.7)
    assert torch.equal(output.log_probs.flatten(), want)
    output.log_probs.sum().backward()
    assert one.lm_head.weight.grad.dtype == torch.float32


def test_adaptive_entropy_is_refused(tmp_path):
    with pytest.raises(ValueError, match="constant entropy_coef"):
        train(GRPOTrainer, tmp_path, use_adaptive_entropy=True)


def test_equal_rewards_give_zero(tmp_path):
    arguments = {"estimator": "grpo", "preset": "trl"}
    ids = torch.arange(8) // 8
    assert not pykern.group_advantages(torch.full((8,), 0.7), ids, **arguments).any()
