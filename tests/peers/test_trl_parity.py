"""policy_loss and group_advantages against TRL's GRPOTrainer, whose own methods run on a stand-in for the trainer."""

from collections import defaultdict
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from trl import GRPOTrainer

import pykern

ROWS, COLUMNS, HORIZON = 6, 17, 32


def batch(spread):
    mask = (torch.rand(ROWS, COLUMNS) < 0.7).double()
    mask[:, 0] = 1
    logprobs = -3 * torch.rand(ROWS, COLUMNS, dtype=torch.float64)
    old, reference = (logprobs + spread * torch.randn(ROWS, COLUMNS) for _ in range(2))
    return logprobs.requires_grad_(), old, reference, torch.randn(ROWS, dtype=torch.float64), mask


def trl_loss(logprobs, old, reference, advantages, mask, *, loss_type, level, low, high, beta):
    """GRPOTrainer._compute_loss on given log-probabilities."""
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *arguments, **keywords: (logprobs, torch.zeros_like(logprobs), None),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level=level,
        beta=beta,
        loss_type=loss_type,
        epsilon_low=low,
        epsilon_high=high,
        use_vllm=False,
        model=SimpleNamespace(training=True),
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        current_gradient_accumulation_steps=1,
        max_completion_length=HORIZON,
        accelerator=SimpleNamespace(num_processes=1, reduce=lambda x, reduction: x, gather=lambda x: x),
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
    )
    ids = torch.zeros(ROWS, COLUMNS, dtype=torch.int64)
    inputs = {
        "prompt_ids": ids[:, :2],
        "prompt_mask": torch.ones(ROWS, 2),
        "completion_ids": ids,
        "completion_mask": mask,
        "advantages": advantages,
        "old_per_token_logps": old,
        "ref_per_token_logps": reference,
        "num_items_in_batch": mask.sum(),
    }
    return GRPOTrainer._compute_loss(trainer, None, inputs), trainer._metrics["train"]


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("spread", [0.3, 3.0])
@pytest.mark.parametrize(
    "loss_type, level, loss, aggregate",
    [
        ("grpo", "token", "grpo", "seq-mean-token-mean"),
        ("bnpo", "token", "grpo", "token-mean"),
        ("dr_grpo", "token", "dr_grpo", "seq-mean-token-sum-norm"),
        ("dapo", "token", "dapo", "token-mean"),
        ("cispo", "token", "cispo", "token-mean"),
        ("grpo", "sequence", "gspo", "seq-mean-token-mean"),
    ],
)
def test_policy_loss(loss_type, level, loss, aggregate, spread, beta):
    logprobs, old, reference, advantages, mask = batch(spread)
    high = 5.0 if loss_type == "cispo" else 0.28
    theirs, metrics = trl_loss(
        logprobs, old, reference, advantages, mask, loss_type=loss_type, level=level, low=0.2, high=high, beta=beta
    )
    (gradient,) = torch.autograd.grad(theirs, logprobs)
    clips = {} if loss_type == "cispo" else {"clip_low": 0.2, "clip_high": high}
    kl = {"kl": "k3", "kl_coef": beta, "ref_logprobs": reference} if beta else {}
    ours, own = pykern.policy_loss(
        logprobs,
        old,
        advantages,
        mask=mask,
        loss=loss,
        aggregate=aggregate,
        horizon=HORIZON,
        preset="trl",
        **clips,
        **kl,
    )
    ours.backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(logprobs.grad, gradient, rtol=1e-6, atol=1e-12)
    if loss_type != "cispo" and level == "token":
        assert own["clip_fraction_low"].item() == pytest.approx(metrics["clip_ratio/low_mean"][0], rel=1e-6)
        assert own["clip_fraction_high"].item() == pytest.approx(metrics["clip_ratio/high_mean"][0], rel=1e-6)


def trl_advantages(rewards, size, scale_rewards):
    """GRPOTrainer._generate_and_score_completions with the sampling replaced: only its rewards matter."""
    rows = len(rewards)
    trainer = MagicMock()
    trainer.accelerator.device = torch.device("cpu")
    trainer.accelerator.process_index = 0
    trainer.accelerator.gather = lambda x: x
    trainer.model.training = True
    trainer.num_generations = size
    trainer.scale_rewards = scale_rewards
    trainer.multi_objective_aggregation = "sum_then_normalize"
    trainer.reward_weights = torch.ones(1, dtype=rewards.dtype)
    trainer.reward_func_names = ["reward"]
    trainer._calculate_rewards.return_value = rewards[:, None]
    trainer.beta = 0.0
    trainer.use_vllm = False
    trainer.mask_truncated_completions = False
    trainer.num_iterations = 1
    trainer.args.steps_per_generation = trainer.args.gradient_accumulation_steps = 1
    trainer.pad_token_id = trainer._tokenizer.pad_token_id = 0
    trainer.environment_factories = trainer.environments = trainer.tools = None
    trainer.pad_to_multiple_of = None
    trainer.aux_loss_enabled = False
    trainer._generate.return_value = ([[1]] * rows, [[1]] * rows, None, ["x"] * rows, None, {}, None, None)
    trainer._metrics = {"train": defaultdict(list)}
    outputs = GRPOTrainer._generate_and_score_completions(trainer, [{"prompt": "p"}] * rows)
    return outputs["advantages"]


@pytest.mark.parametrize("scale_rewards, estimator", [("group", "grpo"), ("none", "dr_grpo"), ("batch", "lite_ppo")])
@pytest.mark.parametrize("missing", [False, True])
def test_advantages(scale_rewards, estimator, missing):
    rewards = torch.rand(40, dtype=torch.float64)
    if missing:
        rewards[[3, 17, 18]] = float("nan")
    ids = torch.arange(5).repeat_interleave(8)
    theirs = trl_advantages(rewards, 8, scale_rewards)
    ours = pykern.group_advantages(rewards, ids, estimator=estimator, preset="trl")
    torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=1e-6, atol=1e-6)
