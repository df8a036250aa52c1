"""The tables of group_advantages: the parts that an advantage is made of, and the estimators that name them."""

import math
from dataclasses import dataclass, field, replace

TRANSFORMS = (
    "none",
    "min_max",
    "best_gap",
    "pass_at_k",
    "pass_at_k_marginal",
    "relative_length",
    "pass_at_k_leave_one_out",
    "pass_at_k_minus_one",
)
"""What a reward r becomes first (in a group of n, of which c are correct, that is above zero; C: binomial coefficient).

- min_max: (r - smallest) / (largest - smallest) of the batch.
- best_gap: best - second best for the best of the group, 0 for the others.
- pass_at_k: C(n-c, k-1) / C(n-1, k-1) if correct, else 0: that k-1 others drawn beside it are all wrong.
- pass_at_k_marginal: k/n if correct, else k/n (1 - C(n-1-c, k-1) / C(n-1, k-1)): s of the PKPO paper.
- pass_at_k_leave_one_out: the marginal less k/(n-1) times pass@k of the others, s(loo) of that paper.
- pass_at_k_minus_one: the marginal less k/n times pass@(k-1) of the others, s(loo-1): k/n times pass_at_k.
- relative_length: r - relative_length * m * (its length / longest of the group), m: mean of the group."""

BASELINES = ("none", "group_mean", "leave_one_out", "length_weighted", "given", "batch_mean", "groups_mean")
"""What is subtracted: nothing; the mean of the group; the mean of the others in the group; the mean of the group
weighted by response length; a reward of the caller's for the same prompt; the mean of the batch. groups_mean puts the
distance of the group's mean from the mean of the groups' means in the place of a row's own distance."""

SCALES = (
    "none",
    "group_std",
    "leave_one_out_std",
    "token_std",
    "group_mean",
    "beta",
    "batch_std",
    "centred_batch_std",
    "groups_std",
    "nonzero_share",
    "valid_share",
)
"""What the difference is divided by, plus eps where it is a standard deviation, group_mean or valid_share.

- group_std: the standard deviation of the group's rewards.
- leave_one_out_std: that of the others in the group (ddof 1); 1 where it is zero, without eps.
- token_std: the standard deviation of the reward over all tokens of the group (ddof 0). A group in which an advantage
  would reach `fallback` in size takes group_mean and group_std instead.
- group_mean: the mean of the group; the advantage is 0 where it is not above zero.
- beta: the density at the group's mean of the Beta distribution that the means of all groups suggest, held to
  [1e-6, inf): its mean p and variance v (ddof 1) give q = p (1 - p) / v - 1, alpha = max(1 + q p / 3, 1) and
  beta = max(1 + q (1 - p) / 3, 1). Rewards are expected between 0 and 1.
- batch_std, centred_batch_std: of all rewards; of all distances from the baseline.
- groups_std: of the groups' means.
- nonzero_share: the share of rewards that are not zero.
- valid_share: the share of rewards in groups whose rewards differ."""

FINISHES = ("none", "batch_std", "token_whiten")
"""What is done with the results of the whole batch: nothing; their mean subtracted, then division by their standard
deviation plus finish_eps; or the same over all tokens, every one carrying its response's value, division then being by
the square root of the variance plus finish_eps."""

FILTERS = ("none", "equal", "difficulty")
"""Which groups are taken out before anything is computed: none; those of two or more rows whose rewards are all equal
(dynamic sampling, arXiv 2503.14476); those whose mean is not strictly within `window` (arXiv 2504.03380)."""


@dataclass(frozen=True)
class Estimator:
    """A row of ESTIMATORS. All tokens of a response share its advantage."""

    baseline: str
    scale: str
    paper: str
    transform: str = "none"
    finish: str = "none"
    decompose: bool = False
    """Each reward component on its own, the results summed with the weights."""
    average: bool = False
    """Weights of 1/K for K components, where none are given; else of 1."""
    eps: float | None = None
    finish_eps: float | None = None
    ddof: int | None = None
    fallback: float = math.inf


_PKPO = "arXiv 2505.15201"

ESTIMATORS: dict[str, Estimator] = {
    "grpo": Estimator("group_mean", "group_std", "arXiv 2402.03300"),
    "grpo_leave_one_out": Estimator("leave_one_out", "leave_one_out_std", "NeMo RL"),
    "grpo_passk": Estimator("none", "group_std", "arXiv 2503.19595", transform="best_gap"),
    "dr_grpo": Estimator("group_mean", "none", "arXiv 2503.20783"),
    "rloo": Estimator("leave_one_out", "none", "arXiv 2402.14740"),
    "opo": Estimator("length_weighted", "none", "arXiv 2505.23585"),
    "remax": Estimator("given", "none", "arXiv 2310.10505"),
    "reinforce_pp": Estimator("none", "none", "arXiv 2501.03262", finish="token_whiten"),
    "reinforce_pp_baseline": Estimator("group_mean", "none", "arXiv 2501.03262", finish="token_whiten"),
    "dler": Estimator("group_mean", "none", "arXiv 2510.15110", finish="token_whiten"),
    "gpg": Estimator("group_mean", "valid_share", "arXiv 2504.02546", eps=0.0),
    "gpg_nonzero": Estimator("group_mean", "nonzero_share", "verl, after arXiv 2504.02546"),
    "lite_ppo": Estimator("group_mean", "batch_std", "arXiv 2508.08221"),
    "lite_ppo_centred": Estimator("group_mean", "centred_batch_std", "ROLL, after arXiv 2508.08221"),
    "gdpo": Estimator("group_mean", "group_std", "arXiv 2601.05242", finish="batch_std", decompose=True),
    "bnpo": Estimator("group_mean", "beta", "arXiv 2506.02864", transform="min_max"),
    "bnpo_decomposed": Estimator(
        "group_mean", "beta", "arXiv 2506.02864", transform="min_max", decompose=True, average=True
    ),
    "hapo": Estimator("length_weighted", "token_std", "arXiv 2509.16591", fallback=5.0),
    "copo": Estimator("group_mean", "group_std", "arXiv 2508.04138"),
    "copo_global": Estimator("groups_mean", "groups_std", "arXiv 2508.04138"),
    "maxrl": Estimator("group_mean", "group_mean", "arXiv 2602.02710"),
    "pass_at_k": Estimator("leave_one_out", "none", "maxrl repository, after " + _PKPO, transform="pass_at_k"),
    "pkpo": Estimator("none", "none", _PKPO, transform="pass_at_k_minus_one"),
    "pkpo_leave_one_out": Estimator("none", "none", _PKPO, transform="pass_at_k_leave_one_out"),
    "pkpo_marginal": Estimator("none", "none", _PKPO, transform="pass_at_k_marginal"),
}


@dataclass(frozen=True)
class Preset:
    """A peer's numbers: what it adds to a standard deviation, to a variance, its ddof, its rule for one sample; and
    its rows where it means other parts by an estimator's name."""

    std_eps: float
    variance_eps: float
    ddof: int
    singleton: str
    estimators: dict[str, Estimator] = field(default_factory=dict)


def _rows(**changes: dict) -> dict[str, Estimator]:
    return {name: replace(ESTIMATORS[name], **change) for name, change in changes.items()}


PRESETS: dict[str | None, Preset] = {
    None: Preset(1e-6, 1e-8, 1, "zero"),
    "verl": Preset(1e-6, 1e-8, 1, "self", {"gpg": ESTIMATORS["gpg_nonzero"]} | _rows(gdpo={"finish": "token_whiten"})),
    "trl": Preset(1e-4, 1e-8, 1, "zero"),
    # Over tokens it takes the population variance.
    "openrlhf": Preset(
        1e-9, 1e-8, 1, "zero", _rows(reinforce_pp={"ddof": 0}, reinforce_pp_baseline={"ddof": 0}, dler={"ddof": 0})
    ),
    "oat": Preset(1e-8, 1e-8, 1, "zero"),
    "nemo": Preset(
        1e-6,
        1e-8,
        1,
        "zero",
        {"grpo": ESTIMATORS["grpo_leave_one_out"]}
        | _rows(gdpo={"baseline": "leave_one_out", "scale": "leave_one_out_std", "finish_eps": 0.0}),
    ),
    "roll": Preset(1e-6, 1e-8, 1, "zero"),
    "slime": Preset(1e-6, 1e-8, 1, "zero"),
    "prime_rl": Preset(1e-6, 1e-8, 1, "zero", _rows(grpo={"scale": "none"}, maxrl={"eps": 0.0})),
}

METRICS = ("non_finite", "missing", "groups", "equal_groups", "singletons", "filtered")
"""Rows left out because no reward (or their baseline reward) is finite; components left out of the other rows; groups;
groups of two or more whose rewards are all equal; groups of one; rows that the filter took out."""

SETTINGS = (
    "eps",
    "finish_eps",
    "k",
    "overlong_longest",
    "overlong_buffer",
    "overlong_factor",
    "relative_length",
    "fallback",
    "window_low",
    "window_high",
)
"""The floats that the op takes, in its order."""
