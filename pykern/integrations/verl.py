"""verl: pykern's advantage estimators and policy losses in verl's registries, its aggregation, KL and fused head.

    from pykern.integrations import verl as pykern_verl
    pykern_verl.register()

in a module that every process of verl imports (`actor_rollout_ref.model.external_lib` names one) makes

    algorithm.adv_estimator=pykern_rloo
    actor_rollout_ref.actor.policy_loss.loss_mode=pykern_vanilla

work: verl's name behind "pykern_" has verl's numbers and settings, and every other row of pykern.ESTIMATORS and
pykern.LOSSES stands there under its own name. verl runs its "grpo" and "gae" without asking the registry, and hands
the rewards' components and the sums of squared probabilities to its own names alone: for those,
`register(replace=("gdpo", "optimal_token_baseline"))` takes the place of verl's entry.

Functions have the signatures that verl calls. The adapter has run with verl 0.9.1.
"""

from collections.abc import Callable, Hashable, Iterable
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..policy import (
    AGGREGATES,
    ESTIMATORS,
    LOSSES,
    clip_cov_mask,
    discounted_returns,
    gae,
    group_advantages,
    group_statistics,
    kl_cov_mask,
    linear_token_logprobs,
    masked_whiten,
    optimal_token_baseline,
    policy_loss,
    policy_loss_token_weights,
)
from .autocast import under_autocast

try:
    from verl.trainer.ppo import core_algos
    from verl.utils import groupwise

    from .verl_rollout import compute_rollout_correction_and_rejection_mask  # noqa: F401 (handed on)
except ImportError as error:
    raise ImportError(
        f"pykern.integrations.verl needs the package verl, 0.9 or newer; pip install verl: {error}"
    ) from error

# --- advantages -------------------------------------------------------------------------------------------------


def _ids(index: Iterable[Hashable], device: torch.device) -> Tensor:
    """verl's group labels, objects of any kind, as integers."""
    # The elements of a tensor are all different keys, and those of an array slow ones.
    labels = index.tolist() if isinstance(index, (Tensor, np.ndarray)) else index
    numbers: dict[Hashable, int] = {}
    return torch.tensor([numbers.setdefault(label, len(numbers)) for label in labels], dtype=torch.int64, device=device)


def _spread(advantages: Tensor, token_level_rewards: Tensor, response_mask: Tensor) -> tuple[Tensor, Tensor]:
    """The advantage of a response at each of its tokens; what verl calls returns is the same tensor."""
    spread = torch.where(response_mask != 0, advantages[:, None], 0.0).to(token_level_rewards.dtype)
    return spread, spread


def outcome_advantages(estimator: str, **parts) -> Callable[..., tuple[Tensor, Tensor]]:
    """An estimator of verl's signature from a row of pykern.ESTIMATORS and keywords of group_advantages."""

    def function(
        token_level_rewards: Tensor,
        response_mask: Tensor,
        index: Any = None,
        config: Any = None,
        reward_baselines: Tensor | None = None,
        norm_adv_by_std_in_grpo: bool = True,
        epsilon: float | None = None,
        **keywords,
    ) -> tuple[Tensor, Tensor]:
        device = token_level_rewards.device
        rewards = token_level_rewards.sum(dim=-1)
        ids = torch.arange(len(rewards), device=device) if index is None else _ids(index, device)
        chosen = "dr_grpo" if estimator == "grpo" and not norm_adv_by_std_in_grpo else estimator
        advantages = group_advantages(
            rewards,
            ids,
            estimator=chosen,
            preset="verl",
            lengths=(response_mask != 0).sum(dim=1),
            baseline_rewards=reward_baselines if ESTIMATORS[chosen].baseline == "given" else None,
            **({} if epsilon is None else {"eps": epsilon}),
            **parts,
        )
        return _spread(advantages, token_level_rewards, response_mask)

    return function


def gdpo(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Any,
    config: Any = None,
    non_tensor_batch: dict | None = None,
    batch: Any = None,
    **keywords,
) -> tuple[Tensor, Tensor]:
    """GDPO of the components that `algorithm.gdpo_reward_keys` names, weighted by `gdpo_reward_weights`."""
    device, names = token_level_rewards.device, None if config is None else config.get("gdpo_reward_keys", None)
    if names and non_tensor_batch is not None:
        missing = [name for name in names if name not in non_tensor_batch]
        if missing:
            raise KeyError(f"gdpo_reward_keys: expected keys of the rewards, got {missing[0]!r}; check compute_score")
        columns = [torch.as_tensor([float(value) for value in non_tensor_batch[name]]) for name in names]
        rewards = torch.stack(columns, dim=1).to(device=device, dtype=torch.float32)
    else:
        rewards = token_level_rewards.sum(dim=-1, keepdim=True)
    weights = None if config is None else config.get("gdpo_reward_weights", None)
    advantages = group_advantages(
        rewards,
        _ids(index, device),
        estimator="gdpo",
        preset="verl",
        component_weights=None if weights is None else [float(weight) for weight in weights],
        lengths=(response_mask != 0).sum(dim=1),
    )
    return _spread(advantages, token_level_rewards, response_mask)


def reinforce_plus_plus(
    token_level_rewards: Tensor, response_mask: Tensor, config: Any = None, **keywords
) -> tuple[Tensor, Tensor]:
    """Discounted returns, whitened over all tokens; `algorithm.gamma`."""
    returns = discounted_returns(token_level_rewards, gamma=config.gamma, mask=response_mask)
    return masked_whiten(returns, response_mask), returns


def remax(
    token_level_rewards: Tensor, response_mask: Tensor, reward_baselines: Tensor, config: Any = None, **keywords
) -> tuple[Tensor, Tensor]:
    """Rewards to come, less the reward of the greedy response."""
    returns = discounted_returns(torch.where(response_mask != 0, token_level_rewards, 0.0), gamma=1.0)
    return torch.where(response_mask != 0, returns - reward_baselines[:, None], 0.0), returns


def generalized_advantages(
    token_level_rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: Any, lam: Any
) -> tuple[Tensor, Tensor]:
    """verl's compute_gae_advantage_return."""
    return gae(token_level_rewards, values, gamma=float(gamma), lam=float(lam), mask=response_mask, whiten=True)


def token_baseline(align: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """verl's optimal token baselines: steps counted by "position", or by unmasked "token". Returns: rewards to come."""

    def function(
        token_level_rewards: Tensor,
        response_mask: Tensor,
        index: Any,
        old_log_probs: Tensor,
        sum_pi_squared: Tensor,
        rollout_is_weights: Tensor | None = None,
        handle_zero_tail: bool = True,
        epsilon: float = 1e-8,
        **keywords,
    ) -> tuple[Tensor, Tensor]:
        returns = discounted_returns(torch.where(response_mask != 0, token_level_rewards, 0.0), gamma=1.0)
        advantages = optimal_token_baseline(
            returns,
            old_log_probs,
            sum_pi_squared,
            _ids(index, returns.device),
            mask=response_mask,
            importance_weights=rollout_is_weights,
            align=align,
            zero_tail=handle_zero_tail,
            eps=epsilon,
            singleton="self",
        )
        return advantages, returns

    return function


def as_torch_index(index: Any, device: Any = None) -> Tensor:
    """verl's function of this name: labels of any kind as int64 [N]. Integers, floats within 1e-6 of them and numerals
    stand for themselves, others are numbered as they come, fractions too (verl cuts them off). Where no device is
    named, verl's rule decides: what VERL_FORCE_DEVICE names, else its own device."""
    device = groupwise._resolve_device(device)
    if isinstance(index, Tensor) and not index.is_floating_point():
        return index.reshape(-1).to(device, torch.int64)
    labels = np.asarray(index.detach().cpu().double() if isinstance(index, Tensor) else index).reshape(-1)
    if labels.dtype.kind == "f" and np.allclose(labels, np.rint(labels), rtol=0, atol=1e-6):
        labels = np.rint(labels).astype(np.int64)
    if not any(isinstance(label, (float, np.floating)) for label in labels):
        with suppress(TypeError, ValueError, OverflowError):
            return torch.from_numpy(labels.astype(np.int64)).to(device)
    return _ids(labels.tolist(), device)


def group_mean_std(scores: Tensor, gidx: Tensor, eps: float = 1e-6, device: Any = None) -> tuple[Tensor, ...]:
    """verl's function of this name: mean, deviation of at least sqrt(eps) and count of groups 0 to G - 1, float32 [G].
    A group of one score or none has mean 0 and deviation 1. Scores that are not finite stay out."""
    ids = as_torch_index(gidx, device)
    rows = group_statistics(scores.reshape(-1).to(ids.device, torch.float32), ids)
    size = int(ids.max()) + 1 if len(ids) else 0
    mean, std, count = (column.new_zeros(size).index_copy_(0, ids, column) for column in rows)
    single = count <= 1
    return mean.masked_fill(single, 0.0), std.clamp(min=eps**0.5).masked_fill(single, 1.0), count.float()


ADVANTAGES: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "grpo": outcome_advantages("grpo"),
    "grpo_vectorized": outcome_advantages("grpo"),
    "gdpo": gdpo,
    "grpo_passk": outcome_advantages("grpo_passk"),
    "rloo": outcome_advantages("rloo"),
    "rloo_vectorized": outcome_advantages("rloo", singleton="zero"),
    "opo": outcome_advantages("opo"),
    "gpg": outcome_advantages("gpg_nonzero"),
    "remax": remax,
    "reinforce_plus_plus": reinforce_plus_plus,
    "reinforce_plus_plus_baseline": outcome_advantages("reinforce_pp_baseline"),
    "optimal_token_baseline": token_baseline("position"),
    "tir_optimal_token_baseline": token_baseline("token"),
}
"""verl's estimators, in its own names."""

# --- losses -----------------------------------------------------------------------------------------------------


def _clips(config: Any) -> dict[str, float]:
    low, high = config.clip_ratio_low, config.clip_ratio_high
    return {
        "clip_low": config.clip_ratio if low is None else low,
        "clip_high": config.clip_ratio if high is None else high,
    }


def _divergence_bounds(config: Any) -> dict[str, float]:
    clips = _clips(config)
    return {
        "stabilisation_low": clips["clip_low"],
        "stabilisation_high": clips["clip_high"],
        "clip_low": float("inf"),
        "clip_high": config.get("clip_ratio_c", 20.0) - 1.0,
    }


def _picked(config: Any, name: str, default: float) -> float:
    value = config.policy_loss.get(name, None)
    return default if value is None else value


def _dro_beta(config: Any) -> float:
    beta = config.policy_loss.dro_beta
    if beta is None or not beta > 0:
        raise ValueError(f"policy_loss.dro_beta: expected a positive weight of the distance, got {beta!r}")
    return beta


_KEYWORDS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "vanilla": lambda config: {"loss": "ppo", "dual_clip": config.get("clip_ratio_c", 3.0), **_clips(config)},
    "dppo_tv": lambda config: {"loss": "dppo_tv", **_divergence_bounds(config)},
    "dppo_kl": lambda config: {"loss": "dppo_kl", **_divergence_bounds(config)},
    "gspo": lambda config: {"loss": "gspo", **_clips(config)},
    "sapo": lambda config: {
        "loss": "sapo",
        "temperatures": (float(config.tau_pos), float(config.tau_neg)),
        "aggregate": "seq-mean-token-mean",
    },
    "gpg": lambda config: {"loss": "gpg"},
    "clip_cov": lambda config: {"loss": "clip_cov", **_clips(config)},
    "kl_cov": lambda config: {"loss": "kl_cov", "anchor_coef": _picked(config, "ppo_kl_coef", 1.0)},
    "geo_mean": lambda config: {
        "loss": "gmpo",
        "aggregate": "seq-mean-token-mean",
        "count_empty": True,
        **_clips(config),
    },
    "dro": lambda config: {"loss": "dro", "anchor_coef": _dro_beta(config)},
    "cispo": lambda config: {"loss": "cispo_relative", **_clips(config)},
}
"""What verl's settings of each of its losses mean to policy_loss."""


def _share(total: int | Tensor, ranks: int) -> float:
    """Of a rank in a count of the global batch. Where nothing is left of a batch its loss is 0, not a NaN."""
    return max(float(total), 1.0) / ranks


def _whole_batch(aggregate: str, config: Any) -> tuple[dict[str, float], float]:
    """What verl tells of the global batch, as keywords of policy_loss, and a factor on its result."""
    batch = dict(config.global_batch_info or {})
    ranks = batch.get("dp_size") or 1
    keywords = {}
    total = batch.get("batch_num_tokens" if aggregate == "token-mean" else "global_batch_size")
    if aggregate == "token-sum":
        return keywords, ranks
    if total is not None:
        keywords["denominator"] = _share(total, ranks)
    elif ranks > 1:
        raise ValueError(f"global_batch_info: expected the count of the global batch with dp_size {ranks}, got none")
    if aggregate == "seq-mean-token-sum-norm" and batch.get("loss_scale_factor") is not None:
        keywords["horizon"] = float(batch["loss_scale_factor"])
    return keywords, 1.0


def policy_losses(name: str, **parts) -> Callable[..., tuple[Tensor, dict[str, float]]]:
    """A policy loss of verl's signature: one of verl's names, or a row of pykern.LOSSES, and keywords of policy_loss.

    Rows of pykern.LOSSES take `clip_ratio_low` and `clip_ratio_high` from verl's settings where those are not None.
    In gspo, weights or advantages that differ within a response are differentiated through the ratio of the whole
    response; verl gives each token the gradient of its own.
    """

    def function(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        if name in _KEYWORDS:
            keywords = _KEYWORDS[name](config) | parts
        else:
            own = {"clip_low": config.clip_ratio_low, "clip_high": config.clip_ratio_high}
            keywords = {"loss": name} | {key: value for key, value in own.items() if value is not None} | parts
        aggregate = keywords.setdefault("aggregate", loss_agg_mode)
        batch, factor = ({}, 1.0) if name == "geo_mean" else _whole_batch(aggregate, config)
        if name == "clip_cov":
            keywords["keep"] = clip_cov_mask(
                log_prob.detach(),
                old_log_prob,
                advantages,
                mask=response_mask,
                share=_picked(config, "clip_cov_ratio", 2e-4),
                covariance_low=_picked(config, "clip_cov_lb", 1.0),
                covariance_high=_picked(config, "clip_cov_ub", 5.0),
                clip_low=keywords["clip_low"],
                clip_high=keywords["clip_high"],
                # Another draw at each call, from the generator that verl draws from.
                seed=int(torch.randint(2**62, (), device="cpu")),
            )
        elif name == "kl_cov":
            share = _picked(config, "kl_cov_ratio", 2e-4)
            keywords["anchor_keep"] = kl_cov_mask(log_prob.detach(), advantages, mask=response_mask, share=share)
        if rollout_is_weights is not None and name == "geo_mean":
            # A response has one ratio, so its weight is one too: the geometric mean of its tokens'.
            logs = torch.where(response_mask != 0, torch.log(rollout_is_weights + 1e-10), 0.0)
            rollout_is_weights = torch.exp(logs.sum(dim=-1) / ((response_mask != 0).sum(dim=-1) + 1e-8))
        elif rollout_is_weights is not None and name in ("dro", "kl_cov"):
            # They weigh the distance from the old policy as well.
            del keywords["aggregate"]
            share = policy_loss_token_weights(log_prob, mask=response_mask, aggregate=aggregate, **batch)
            keywords["token_weights"], rollout_is_weights, batch = share * rollout_is_weights, None, {}
        loss, metrics = policy_loss(
            log_prob,
            old_log_prob,
            advantages,
            mask=response_mask,
            rollout_weights=rollout_is_weights,
            preset="verl",
            **keywords,
            **batch,
        )
        names = ("clip_fraction", "approx_kl", "dual_clip_fraction")
        # verl logs numbers: one wait for the device, not one for each.
        clipped, divergence, dual = torch.stack([metrics[key] for key in names]).tolist()
        values = {"actor/pg_clipfrac": clipped, "actor/ppo_kl": divergence, "actor/pg_clipfrac_lower": dual}
        return loss * factor if factor != 1.0 else loss, values

    return function


LOSS_FUNCTIONS = {name: policy_losses(name) for name in _KEYWORDS}
"""verl's losses, in its own names."""


def agg_loss(
    loss_mat: Tensor,
    loss_mask: Tensor,
    loss_agg_mode: str,
    dp_size: int = 1,
    batch_num_tokens: int | None = None,
    global_batch_size: int | None = None,
    loss_scale_factor: int | None = None,
) -> Tensor:
    """verl's agg_loss, whose masked tokens may hold anything."""
    if loss_agg_mode not in AGGREGATES:
        raise ValueError(f"loss_agg_mode: expected one of {', '.join(AGGREGATES)}, got {loss_agg_mode!r}")
    total = batch_num_tokens if loss_agg_mode == "token-mean" else global_batch_size
    if total is None and dp_size > 1 and loss_agg_mode != "token-sum":
        raise ValueError(f"{'batch_num_tokens' if loss_agg_mode == 'token-mean' else 'global_batch_size'}: expected "
                         f"the count of the global batch with dp_size {dp_size}, got None")  # fmt: skip
    weights = policy_loss_token_weights(
        loss_mat.detach(),
        mask=loss_mask,
        aggregate=loss_agg_mode,
        denominator=None if total is None or loss_agg_mode == "token-sum" else _share(total, dp_size),
        horizon=None if loss_scale_factor is None else float(loss_scale_factor),
    )
    loss = torch.where(loss_mask != 0, loss_mat * weights, 0.0).sum()
    return loss * dp_size if loss_agg_mode == "token-sum" else loss


# --- the head ---------------------------------------------------------------------------------------------------


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float | Tensor = 1.0,
    reduction: str = "none",
    dist_process_group: Any = None,
) -> tuple[Tensor, Tensor]:
    """verl.utils.kernel.linear_cross_entropy: log-probabilities and entropies, float32, of labels' shape.

    hidden [..., H]; weight [V, H], or with a process group this rank's rows of it; both are taken in the type of
    torch.autocast where that is on. labels [...], of the whole vocabulary. reduction "none" alone: "sum" and "mean" of
    the log-probabilities are the caller's.
    """
    if reduction != "none":
        raise ValueError(f'reduction: expected "none", got {reduction!r}; reduce what is returned')
    hidden, weight = under_autocast(hidden, weight)
    logprobs, entropy = linear_token_logprobs(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        labels.reshape(-1),
        temperature=temperature.reshape(-1) if isinstance(temperature, Tensor) and temperature.dim() else temperature,
        entropy=True,
        process_group=dist_process_group,
    )
    return logprobs.reshape(labels.shape), entropy.reshape(labels.shape)


class FusedLinearForPPO(torch.nn.Module):
    """verl's module of that name: (hidden_states, vocab_weights, input_ids, temperature) to log-probabilities, entropy.

    `chunk_size` and `impl_backend` are accepted and mean nothing here.
    """

    def __init__(self, chunk_size: int = 512, impl_backend: str = "torch"):
        super().__init__()

    def forward(
        self, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        return linear_cross_entropy(hidden_states, vocab_weights, input_ids, temperature)


# --- registration -----------------------------------------------------------------------------------------------


def register(prefix: str = "pykern_", replace: Iterable[str] = ()) -> list[str]:
    """Registers all estimators and losses with verl, and returns their names.

    Args:
        prefix: stands before each name; verl's own names stay its own.
        replace: names of verl's whose entries pykern takes over, in the registries alone: verl calls its "grpo" and
            "gae" directly, whatever is registered.

    Raises:
        ValueError: a name in `replace` that is not verl's or has no counterpart here.
    """
    estimators = ADVANTAGES | {
        name: outcome_advantages(name)
        for name, row in ESTIMATORS.items()
        if name not in ADVANTAGES and row.baseline != "given"
    }
    losses = LOSS_FUNCTIONS | {name: policy_losses(name) for name in LOSSES if name not in LOSS_FUNCTIONS}
    for name, function in estimators.items():
        core_algos.ADV_ESTIMATOR_REGISTRY.pop(prefix + name, None)  # verl refuses to register a name twice
        core_algos.register_adv_est(prefix + name)(function)
    for name, function in losses.items():
        core_algos.register_policy_loss(prefix + name)(function)
    for name in replace:
        if name not in ADVANTAGES and name not in LOSS_FUNCTIONS:
            raise ValueError(f"replace: expected names of {', '.join([*ADVANTAGES, *LOSS_FUNCTIONS])}, got {name!r}")
        if name in ADVANTAGES:
            core_algos.ADV_ESTIMATOR_REGISTRY[name] = ADVANTAGES[name]
        if name in LOSS_FUNCTIONS:
            core_algos.POLICY_LOSS_REGISTRY[name] = LOSS_FUNCTIONS[name]
    return [prefix + name for name in (*estimators, *losses)]
