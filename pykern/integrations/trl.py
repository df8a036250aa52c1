"""TRL's GRPOTrainer with pykern's advantages, policy losses and log-probabilities.

    from pykern.integrations.trl import GRPOTrainer      # was: from trl import GRPOTrainer
    trainer = GRPOTrainer(model, reward_funcs, args=GRPOConfig(...), train_dataset=dataset)

GRPOConfig means what it means to TRL: `loss_type`, `importance_sampling_level`, `epsilon`, `delta`, `beta`,
`scale_rewards`, `multi_objective_aggregation` and the rest choose pykern's parts, and groups without equal rewards get
TRL's numbers. Groups of equal rewards get advantages of exactly 0, where TRL leaves rounding over 1e-4. `estimator=`
and `loss=` take any other row of pykern.ESTIMATORS and pykern.LOSSES instead.

Log-probabilities and entropies come straight from hidden states and head (pykern.linear_token_logprobs); for any model
that TRL gives its own fused head, softcaps, logit scales, PEFT and FSDP2 included.

The adapter has run with trl 1.16.0.
"""

import functools
import types
from typing import Any

import torch
from torch import Tensor, nn

from ..policy import group_advantages, linear_token_logprobs, policy_loss
from .autocast import under_autocast

try:
    import trl
    from trl.trainer.utils import FusedCausalLMOutput
except ImportError as error:
    raise ImportError(
        f"pykern.integrations.trl needs the package trl, 1.16 or newer; pip install trl: {error}"
    ) from error

_ESTIMATORS = {"group": "grpo", "none": "dr_grpo", "batch": "lite_ppo"}
"""TRL's scale_rewards in pykern's terms."""

_LOSSES: dict[str, dict[str, Any]] = {
    "grpo": {"loss": "grpo", "aggregate": "seq-mean-token-mean"},
    "bnpo": {"loss": "grpo", "aggregate": "token-mean"},
    "dr_grpo": {"loss": "grpo", "aggregate": "seq-mean-token-sum-norm"},
    "dapo": {"loss": "grpo", "aggregate": "token-sum"},
    "luspo": {"loss": "luspo", "aggregate": "seq-mean-token-sum"},
    "cispo": {"loss": "cispo", "aggregate": "token-sum"},
    "sapo": {"loss": "sapo", "aggregate": "seq-mean-token-mean"},
    "vespo": {"loss": "vespo", "aggregate": "token-sum"},
}
"""TRL's loss_type in pykern's terms; a token-sum is then divided by TRL's count of the whole batch."""


class GRPOTrainer(trl.GRPOTrainer):
    """`trl.GRPOTrainer`, its arguments and two more.

    Args:
        estimator: a row of pykern.ESTIMATORS; None: what `scale_rewards` and `multi_objective_aggregation` say.
        loss: a row of pykern.LOSSES, with its own bounds and aggregate; None: what `loss_type` and the other settings
            of GRPOConfig say.

    Logged clip ratios are shares of tokens, also for ratios of sequences, and of every loss. TRL's extremes over
    sequences, clip_ratio/low_min and clip_ratio/high_max, are not logged, nor cispo_clip_ratio and vespo/phi_seq_mean.

    Raises:
        ValueError: adaptive entropy control, which TRL keeps within its own loss.
    """

    def __init__(self, *arguments, estimator: str | None = None, loss: str | None = None, **keywords):
        super().__init__(*arguments, **keywords)
        if self.use_adaptive_entropy:
            raise ValueError(
                "args: expected a constant entropy_coef, got adaptive entropy control, which is part of trl's own "
                "loss; use trl.GRPOTrainer for it"
            )
        self.pykern_estimator = estimator
        self.pykern_loss = loss
        self._rewards: Tensor | None = None
        fp32 = self.args.cast_lm_head_to_fp32
        model = self.accelerator.unwrap_model(self.model)
        add_linear_head(model.get_base_model() if hasattr(model, "get_base_model") else model, self.temperature, fp32)
        if self.ref_model is not None:
            add_linear_head(self.accelerator.unwrap_model(self.ref_model), self.temperature, fp32)

    # --- advantages ---------------------------------------------------------------------------------------------

    def _calculate_rewards(self, *arguments, **keywords):
        # Of all processes, [samples, reward functions]; NaN where a function had nothing to say.
        self._rewards = super()._calculate_rewards(*arguments, **keywords)
        return self._rewards

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        rewards, self._rewards = self._rewards, None
        samples = self.num_generations if self.model.training else self.num_generations_eval
        estimator = self.pykern_estimator
        if estimator is None:
            decomposed = self.multi_objective_aggregation == "normalize_then_sum"
            estimator = "gdpo" if decomposed else _ESTIMATORS[self.scale_rewards]
        advantages = group_advantages(
            rewards,
            torch.arange(len(rewards), device=rewards.device) // samples,
            estimator=estimator,
            preset="trl",
            component_weights=self.reward_weights.tolist(),
            lengths=self.accelerator.gather(output["completion_mask"].sum(dim=1)),
        )
        logged = self._logs["advantages"]
        for _ in range(min(len(advantages), len(logged))):
            logged.pop()
        logged.extend(advantages.tolist())
        own = len(output["advantages"])
        first = self.accelerator.process_index * own
        output["advantages"] = advantages[first : first + own].to(output["advantages"].dtype)
        return output

    # --- loss ---------------------------------------------------------------------------------------------------

    def _compute_loss(self, model, inputs):
        mode = "train" if self.model.training else "eval"
        mask = inputs["completion_mask"]
        if "tool_mask" in inputs:
            mask = mask * inputs["tool_mask"]
        logprobs, entropies, aux_loss = self._scored(model, inputs)
        old = inputs.get("old_per_token_logps")
        advantages = inputs["advantages"]

        keep = None
        if self.top_entropy_quantile < 1.0:
            keep = self.get_high_entropy_mask(entropies, mask, 1 - self.top_entropy_quantile) != 0
        entropy_mask = keep
        if self.off_policy_mask_threshold is not None:
            sampled = inputs.get("sampling_per_token_logps", logprobs.detach() if old is None else old)
            columns = advantages if advantages.dim() == 2 else advantages[:, None]
            on_policy = self.get_off_policy_mask(columns, logprobs, sampled, mask, self.off_policy_mask_threshold) != 0
            keep = on_policy.expand_as(mask) if keep is None else keep & on_policy

        keywords = self._loss_keywords()
        weights = None
        if self.use_vllm and self.vllm_importance_sampling_correction:
            weights = inputs["importance_sampling_ratio"].expand_as(logprobs)
            if keywords["loss"] == "vespo":
                # The whole sequence's ratio to the sampler tapers the loss, instead of a weight beside it.
                base = logprobs.detach() if old is None else old
                keywords["rollout_logprobs"], weights = base - weights.log(), None
        if self.beta != 0.0:
            keywords |= {"kl": "k3", "kl_coef": self.beta, "ref_logprobs": inputs["ref_per_token_logps"]}
            if self.args.use_bias_correction_kl:
                keywords["kl_gradient"] = "importance"
        loss, metrics = policy_loss(
            logprobs, old, advantages, mask=mask, keep=keep, rollout_weights=weights, **keywords
        )
        accumulated = self.current_gradient_accumulation_steps if mode == "train" else 1
        if keywords.get("aggregate") == "token-sum":
            count = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
            if mode == "train":
                count = count * accumulated / self.args.steps_per_generation
            loss = loss / count
            logged = loss.detach()
        else:
            logged = loss.detach()
            loss = loss / accumulated
        if self._entropy_bonus_enabled:
            acting = mask != 0 if entropy_mask is None else (mask != 0) & entropy_mask
            mean = torch.where(acting, entropies, 0.0).sum() / acting.sum().clamp(min=1)
            self._metrics[mode]["policy_loss"].append(self.accelerator.gather(logged).nanmean().item())
            if mode == "train" and self.accelerator.sync_gradients:
                self._metrics[mode]["entropy_coef"].append(self.entropy_coef)
            loss = loss - self.entropy_coef * mean / accumulated
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * aux_loss / accumulated
            self._metrics[mode]["aux_loss"].append(self.accelerator.gather_for_metrics(aux_loss).mean().item())
        self._log_loss(mode, metrics, entropies, mask)
        return loss

    def _scored(self, model, inputs):
        """Log-probabilities and entropies of the completions, and the routers' loss."""
        completion = inputs["completion_ids"]
        return self._get_per_token_logps_and_entropies(
            model,
            torch.cat([inputs["prompt_ids"], completion], dim=1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            completion.shape[1],
            compute_entropy=True,
            compute_aux_loss=self.aux_loss_enabled,
            **{name: inputs.get(name) for name in _IMAGES},
        )

    def _loss_keywords(self) -> dict[str, Any]:
        if self.pykern_loss is not None:
            return {"loss": self.pykern_loss, "horizon": self.max_completion_length, "preset": "trl"}
        args, kind = self.args, self.loss_type
        keywords = _LOSSES[kind] | {"count_empty": True, "horizon": self.max_completion_length, "preset": "trl"}
        if kind == "cispo":
            # TRL's epsilon_high is the bound itself.
            keywords["clip_high"] = self.epsilon_high - 1
        elif kind == "sapo":
            keywords["temperatures"] = (args.sapo_temperature_pos, args.sapo_temperature_neg)
        elif kind == "vespo":
            keywords["taper"] = ((args.vespo_k_pos, args.vespo_lambda_pos), (args.vespo_k_neg, args.vespo_lambda_neg))
        else:
            keywords |= {"clip_low": self.epsilon_low, "clip_high": self.epsilon_high}
            if args.delta is not None:
                keywords["ratio_limit"] = args.delta
        if kind != "vespo":
            keywords["ratio"] = self.importance_sampling_level
        return keywords

    def _log_loss(self, mode: str, metrics: dict[str, Tensor], entropies: Tensor, mask: Tensor) -> None:
        """Means over the tokens of all processes, in one collective and one wait."""
        count = (mask != 0).sum()
        names = {"entropy": torch.where(mask != 0, entropies.detach(), 0.0).sum() / count.clamp(min=1)}
        if self.beta != 0.0:
            names["kl"] = metrics["kl"]
        names |= {
            "clip_ratio/low_mean": metrics["clip_fraction_low"],
            "clip_ratio/high_mean": metrics["clip_fraction_high"],
            "clip_ratio/region_mean": metrics["clip_fraction"],
        }
        sums = torch.stack([value.float() * count for value in names.values()] + [count.float()])
        *totals, tokens = self.accelerator.reduce(sums, reduction="sum").tolist()
        for name, total in zip(names, totals):
            self._metrics[mode][name].append(total / max(tokens, 1.0))


_IMAGES = (
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)


def add_linear_head(model: nn.Module, temperature: float = 1.0, cast_lm_head_to_fp32: bool = False) -> None:
    """Gives a causal language model TRL's interface of a fused head, computed by pykern.linear_token_logprobs.

    `model(..., labels=labels, fused_lm_head=True)` then returns log-probabilities and entropies [batch, tokens - 1] of
    the next tokens, 0 where a label is -100; without `fused_lm_head` the model's forward is what it was. The products
    are taken in the type of torch.autocast where that is on, else in that of the head.

    Args:
        model: a causal language model of transformers; before it is wrapped with PEFT.
        temperature: the logits are divided by it.
        cast_lm_head_to_fp32: hidden states and head take part in float32, under autocast too.
    """
    plain = model.forward
    config = model.config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None)
    scale = _logit_scale(config)

    @functools.wraps(type(model).forward)
    def forward(self, *arguments, fused_lm_head: bool = False, **keywords):
        if not fused_lm_head:
            return plain(*arguments, **keywords)
        labels, shifted = keywords.pop("labels", None), keywords.pop("shift_labels", None)
        if keywords.get("output_router_logits") or "num_items_in_batch" in keywords:
            # TRL's own head adds the loss of the routers and of the batch.
            return plain(*arguments, fused_lm_head=True, labels=labels, shift_labels=shifted, **keywords)
        hidden = self.base_model(*arguments, **keywords, use_cache=False).last_hidden_state
        if shifted is None:
            hidden, labels = hidden[:, :-1], labels[:, 1:]
        else:
            labels = shifted
        head = self.get_output_embeddings()
        weight, bias = (_whole(tensor) for tensor in (head.weight, getattr(head, "bias", None)))
        hidden, labels = hidden.to(weight.device), labels.to(weight.device)
        if cast_lm_head_to_fp32:
            hidden, weight = hidden.float(), weight.float()
        else:
            hidden, weight = under_autocast(hidden, weight)
        # (s z) capped at c, over T, is z capped at c / s, over T / s.
        logprobs, entropy = linear_token_logprobs(
            hidden.reshape(-1, hidden.shape[-1]).to(weight.dtype),
            weight,
            labels.reshape(-1),
            bias=bias,
            temperature=temperature / scale,
            softcap=None if softcap is None else softcap / scale,
            entropy=True,
        )
        shape = labels.shape
        return FusedCausalLMOutput(
            log_probs=logprobs.view(shape), entropy=entropy.view(shape), label_mask=labels != -100
        )

    model.forward = types.MethodType(forward, model)


def _whole(tensor: Tensor | None) -> Tensor | None:
    """The tensor of a shard of FSDP2."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _logit_scale(config) -> float:
    """What a model of this configuration multiplies its logits by, under the names that models have for it."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    return scaling if config.model_type == "hyperclovax" else 1 / scaling
