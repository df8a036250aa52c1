"""Tables of policy_loss: a loss is a row of parts, a peer's numerical limits are a row of limits."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

# The order of each tuple is that of an enumeration in csrc/policy/loss.h and kernels/policy/loss.h.

RATIOS = ("token", "sequence", "product", "clipped_sequence")
"""Of a token; exp of a sequence's mean log-ratio; of their sum; of the mean of those after their own clip."""

RULES = ("clip", "weight", "log", "gate", "taper")
"""How ratio and advantage make a token's loss: see policy_loss."""

STABILISATIONS = ("none", "total_variation", "binary_kl")
"""Which tokens drop out because their probability moved too far from the old one: see policy_loss."""

KL_ESTIMATORS = ("k1", "k2", "k3", "abs")
"""With d = logprob - ref_logprob: d; d^2 / 2; exp(-d) + d - 1; |d|."""

KL_GRADIENTS = ("value", "straight_through", "importance")
"""The estimate's own gradient; that of k2 in its place; the estimate times the ratio, both differentiated."""

ROLLOUT_RULES = ("truncate", "mask")
"""A rollout weight outside its bounds: moved to the nearer one, or 0."""

AGGREGATES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
"""How token losses become one: see policy_loss."""

METRICS = (
    "policy_loss",
    "kl_loss",
    "anchor_loss",
    "entropy_loss",
    "kl",
    "anchor",
    "entropy",
    "ratio_mean",
    "approx_kl",
    "clip_fraction",
    "clip_fraction_low",
    "clip_fraction_high",
    "dual_clip_fraction",
    "rollout_weight_mean",
    "keep_fraction",
)


@dataclass(frozen=True)
class Loss:
    """A row of LOSSES.

    paper: where the loss was published; fields it does not need keep their defaults.
    rule, ratio, stabilisation: of RULES, RATIOS, STABILISATIONS.
    clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high], log-ratios of a "clipped_sequence" to
        [-clip_low, clip_high]; infinite for no bound.
    ratio_limit: highest ratio of the unclipped branch of "clip".
    dual_clip: highest ratio that a negative advantage may count with.
    temperatures: of the gate, for positive advantages and for the others.
    taper: (power, rate) for advantages of at least 0, and for negative ones.
    negative_scale: factor on negative advantages.
    weight_negative_only: positive advantages count with weight 1.
    stabilisation_low, stabilisation_high: how far a probability may fall, and rise.
    anchor, anchor_coef: a second estimate of KL_ESTIMATORS, and its weight; None: the caller chooses it.
    anchor_to: the argument of policy_loss that it is measured against.
    needs: further arguments without which the loss is not itself, and where they come from.
    """

    paper: str
    rule: str = "clip"
    ratio: str = "token"
    clip_low: float = 0.2
    clip_high: float = 0.2
    aggregate: str = "token-mean"
    ratio_limit: float = math.inf
    dual_clip: float = math.inf
    temperatures: tuple[float, float] | None = None
    taper: tuple[tuple[float, float], tuple[float, float]] | None = None
    negative_scale: float = 1.0
    weight_negative_only: bool = False
    stabilisation: str = "none"
    stabilisation_low: float = math.inf
    stabilisation_high: float = math.inf
    anchor: str | None = None
    anchor_coef: float | None = 0.0
    anchor_to: str = "anchor_logprobs"
    needs: Mapping[str, str] = field(default_factory=dict)


_FREE = {"clip_low": math.inf, "clip_high": math.inf}
_BY_SEQUENCE = {"ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4}
_LOG = {"rule": "log", **_FREE}
_DIVERGENCE = {"rule": "weight", "clip_low": math.inf, "clip_high": 19.0}

LOSSES: dict[str, Loss] = {
    "ppo": Loss("arXiv 1707.06347"),
    "grpo": Loss("arXiv 2402.03300"),
    "dual_clip": Loss("arXiv 1912.09729", dual_clip=3.0),
    "dapo": Loss("arXiv 2503.14476", clip_high=0.28),
    "dr_grpo": Loss("arXiv 2503.20783", aggregate="seq-mean-token-sum-norm"),
    "bnpo": Loss("arXiv 2506.02864"),
    "two_sided": Loss("arXiv 2505.07291", ratio_limit=4.0),
    "gspo": Loss("arXiv 2507.18071", aggregate="seq-mean-token-mean", **_BY_SEQUENCE),
    "luspo": Loss("arXiv 2602.05261", aggregate="seq-mean-token-sum", **_BY_SEQUENCE),
    "cispo": Loss("arXiv 2506.13585", rule="weight", clip_low=math.inf, clip_high=4.0),
    "cispo_relative": Loss("arXiv 2506.13585", rule="weight"),
    "sapo": Loss("arXiv 2511.20347", rule="gate", aggregate="seq-mean-token-mean", temperatures=(1.0, 1.05), **_FREE),
    "vespo": Loss("arXiv 2602.10693", rule="taper", ratio="product", taper=((2.0, 3.0), (3.0, 2.0)), **_FREE),
    "gmpo": Loss(
        "arXiv 2507.20673", ratio="clipped_sequence", clip_low=0.4, clip_high=0.4, aggregate="seq-mean-token-mean"
    ),
    "gpg": Loss("arXiv 2504.02546", **_LOG),
    "reinforce": Loss("doi 10.1007/BF00992696", **_LOG),
    "topr": Loss(
        "arXiv 2503.14286",
        rule="weight",
        ratio="product",
        clip_low=1.0,
        clip_high=0.0,
        weight_negative_only=True,
        aggregate="seq-mean-token-sum",
    ),
    "topr_token": Loss("arXiv 2503.14286", rule="weight", clip_low=1.0, clip_high=0.0, weight_negative_only=True),
    "dro": Loss("arXiv 2405.19107", anchor="k2", anchor_coef=None, anchor_to="old_logprobs", **_LOG),
    "kimi": Loss("arXiv 2501.12599", anchor="k2", anchor_coef=None, anchor_to="old_logprobs", **_LOG),
    "dppo_tv": Loss(
        "arXiv 2602.04879",
        stabilisation="total_variation",
        stabilisation_low=0.2,
        stabilisation_high=0.2,
        **_DIVERGENCE,
    ),
    "dppo_kl": Loss(
        "arXiv 2602.04879", stabilisation="binary_kl", stabilisation_low=0.2, stabilisation_high=0.2, **_DIVERGENCE
    ),
    "prime_rl": Loss(
        "arXiv 2602.04879, 2602.02276",
        stabilisation="total_variation",
        stabilisation_low=0.2,
        stabilisation_high=0.2,
        anchor="k2",
        anchor_coef=2e-3,
        anchor_to="old_logprobs",
        **_FREE,
    ),
    "kdrl": Loss(
        "arXiv 2506.02208",
        anchor="k2",
        anchor_coef=5e-3,
        needs={"anchor_logprobs": "the teacher's log-probabilities, of token_logprobs"},
    ),
    "clip_cov": Loss("arXiv 2505.22617", needs={"keep": "the tokens that stay, of pykern.clip_cov_mask"}),
    "kl_cov": Loss(
        "arXiv 2505.22617",
        anchor="abs",
        anchor_coef=1.0,
        anchor_to="old_logprobs",
        needs={"anchor_keep": "the tokens of pykern.kl_cov_mask"},
        **_FREE,
    ),
    "lp_reg": Loss(
        "arXiv 2510.03222",
        clip_low=1.0,
        clip_high=9.0,
        anchor="k3",
        anchor_coef=None,
        needs={
            "anchor_logprobs": "the taken tokens' log-probabilities under the min-p filtered policy",
            "anchor_keep": "the tokens of pykern.low_probability_mask",
        },
    ),
    "hapo": Loss(
        "arXiv 2509.16591",
        clip_high=0.28,
        needs={
            "clip_low": "the first result of pykern.hapo_modulation, whose third is a factor on the advantages",
            "clip_high": "the second result of pykern.hapo_modulation",
        },
    ),
    "copo": Loss(
        "arXiv 2508.04138",
        dual_clip=3.0,
        needs={
            "second_advantages": "the advantages of whole groups against each other",
            "advantage_weights": "pykern.copo_weights of the groups' answer entropies",
        },
    ),
    "redi": Loss("arXiv 2505.24850", aggregate="seq-mean-token-mean", negative_scale=0.8, **_LOG),
}


@dataclass(frozen=True)
class Limits:
    """Clamps of a peer; beyond one, a gradient is zero.

    log_ratio: of a token's log-ratio, in both directions; the sequence's mean or sum has two bounds of its own.
    kl_log_ratio, kl: of the k3 estimate, in its input (both directions) and its value.
    dual_clip: a bound that the peer sets where the loss has none; or dual_clip_per_clip * clip_low above 1.
    losses: losses with limits of their own.
    """

    log_ratio: float = math.inf
    sequence_log_ratio_low: float = -math.inf
    sequence_log_ratio_high: float = math.inf
    kl_log_ratio: float = math.inf
    kl: float = math.inf
    dual_clip: float | None = None
    dual_clip_per_clip: float | None = None
    losses: Mapping[str, "Limits"] = field(default_factory=dict)


_PPO = ("ppo", "grpo", "dual_clip", "dapo", "dr_grpo", "bnpo", "two_sided", "hapo", "copo")
_VERL_KL = {"kl_log_ratio": 20.0, "kl": 10.0}
_VESPO = {"vespo": Limits(log_ratio=20.0, sequence_log_ratio_low=math.log(1e-8), sequence_log_ratio_high=20.0)}

PRESETS: dict[str | None, Limits] = {
    None: Limits(),
    "verl": Limits(
        **_VERL_KL,
        losses={
            **dict.fromkeys(_PPO, Limits(log_ratio=20.0, dual_clip=3.0, **_VERL_KL)),
            **dict.fromkeys(
                ("cispo", "cispo_relative", "sapo", "dppo_tv", "dppo_kl"), Limits(log_ratio=20.0, **_VERL_KL)
            ),
            "gspo": Limits(sequence_log_ratio_high=10.0, **_VERL_KL),
        },
    ),
    "trl": Limits(losses=_VESPO),
    "liger": Limits(losses=_VESPO),
    "openrlhf": Limits(kl=10.0),
    "roll": Limits(losses=dict.fromkeys(_PPO, Limits(dual_clip_per_clip=2.0))),
    "slime": Limits(kl=10.0),
    "nemo": Limits(**_VERL_KL),
    "oat": Limits(kl_log_ratio=40.0),
    "prime_rl": Limits(),
}
