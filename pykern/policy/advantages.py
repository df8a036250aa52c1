"""Advantages of grouped samples: parts from the tables of estimators.py, computed by one op."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, distributed

from .. import _native
from .checks import INTEGERS, check_device, check_floats, check_group_ids, checked_numbers, kind, lookup
from .estimators import BASELINES, ESTIMATORS, FILTERS, FINISHES, METRICS, PRESETS, SCALES, TRANSFORMS
from .gather import GatheredRows


def group_advantages(
    rewards: Tensor,
    group_ids: Tensor,
    *,
    estimator: str = "grpo",
    preset: str | None = None,
    transform: str | None = None,
    baseline: str | None = None,
    scale: str | None = None,
    finish: str | None = None,
    decompose: bool | None = None,
    component_weights: Sequence[float] | None = None,
    eps: float | None = None,
    finish_eps: float | None = None,
    ddof: int | None = None,
    singleton: str | None = None,
    k: int = 1,
    relative_length: float = 1.0,
    fallback: float | None = None,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    baseline_rewards: Tensor | None = None,
    answer_ids: Tensor | None = None,
    overlong: tuple[float, float, float] | None = None,
    filter: str = "none",
    window: tuple[float, float] = (0.0, 1.0),
    process_group: "distributed.ProcessGroup | None" = None,
    max_rows: int | None = None,
    return_keep: bool = False,
    return_metrics: bool = False,
) -> Tensor | tuple[Tensor | dict[str, Tensor], ...]:
    """Advantages of N samples, one each: float64 [N] for float64 rewards, else float32 [N]. Constants: no gradient.

    For a sample of reward r in a group of n with mean m and standard deviation s (L: response length; B: samples of the
    batch; p(others): what the same would be of the others in the group):

    =====================  ==========================================================  ================
    estimator              advantage                                                   arXiv
    =====================  ==========================================================  ================
    grpo                   (r - m) / (s + eps)                                         2402.03300
    grpo_leave_one_out     (r - m(others)) / (s(others) + eps)                         NeMo RL
    grpo_passk             (best - second best) / (s + eps) for the best, else 0       2503.19595
    dr_grpo                r - m                                                       2503.20783
    rloo                   r - m(others) = (r - m) n / (n - 1)                         2402.14740
    opo                    r - sum(L r) / sum(L)                                       2505.23585
    remax                  r - baseline_rewards                                        2310.10505
    reinforce_pp           r whitened over all tokens (the discount being 1)           2501.03262
    reinforce_pp_baseline  r - m whitened over all tokens                              2501.03262
    dler                   the same                                                    2510.15110
    gpg                    (r - m) B / (samples of groups whose rewards differ)        2504.02546
    gpg_nonzero            (r - m) B / (samples whose reward is not 0)                 verl's gpg
    lite_ppo               (r - m) / (s of all rewards + eps)                          2508.08221
    lite_ppo_centred       (r - m) / (s of all r - m, + eps)                           ROLL's
    gdpo                   sum of w grpo(component), less its batch mean, over its s   2601.05242
    bnpo                   (q - m(q)) / Beta density at m(q), q: r min-max scaled      2506.02864
    bnpo_decomposed        mean of bnpo(component)                                     2506.02864
    hapo                   r less its mean over all tokens of the group, over its s    2509.16591
    copo                   grpo: COPO's local advantage                                2508.04138
    copo_global            (m - mean of the groups' m) / (s of the groups' m, + eps)   2508.04138
    maxrl                  (r - m) / (m + eps), 0 where m <= 0                         2602.02710
    pass_at_k              rloo of C(n-c, k-1) / C(n-1, k-1) if correct, else 0        maxrl repository
    pkpo                   pass@k's marginal gain of r, less pass@(k-1) of the others  2505.15201
    pkpo_leave_one_out     the same, less pass@k of the others                         2505.15201
    pkpo_marginal          the same, without a baseline                                2505.15201
    =====================  ==========================================================  ================

    The tables TRANSFORMS, BASELINES, SCALES, FINISHES and FILTERS say what each part does; a keyword of that name takes
    the place of the estimator's own part. Where published code differs from its paper, the paper's form has the plain
    name; a preset gives that name the peer's parts.

    - Equal rewards: where all rewards that enter a group's statistics are equal (after the transform), its advantages
      are exactly 0, after a finish too; the group still counts in the mean and variance of a finish.
    - A reward (or baseline reward) that is NaN or infinite gives its own row 0, stays out of all statistics, and is
      counted. Of several components the finite ones count, so NaN says that a reward function has no opinion.
    - Sums run in float64 or finer, in an order that no thread decides, so results are the same bit for bit.

    Args:
        rewards: [N], or [N, K] of K components (at most 16): float32, float64, bfloat16 or float16.
        group_ids: [N] integers, of any value and in any order; equal ids make a group.
        estimator: a row of ESTIMATORS.
        preset: a row of PRESETS ("verl", "trl", "openrlhf", "oat", "nemo", "roll", "slime", "prime_rl"): that project's
            eps, ddof and singleton rule, where not given here, and its parts where it means others by the name.
        transform, baseline, scale, finish: names of parts, in the place of the estimator's.
        decompose: the estimator for each component, then their weighted sum; else for the weighted sum of components.
        component_weights: K numbers; by default 1 each (1/K for bnpo_decomposed).
        eps: added to the standard deviation, mean or share that divides; default 1e-6 ("trl" 1e-4; gpg 0, in its
            repository 1e-5).
        finish_eps: added to the standard deviation (default as eps) or to the variance (1e-8) of the finish.
        ddof: 1 (default) divides squared distances by n - 1, 0 by n.
        singleton: a group with one reward gets "zero", or by "self" its reward with mean 0 and deviation 1.
        k: of pass@k.
        relative_length: how much of the group's mean its longest response loses, in that transform.
        fallback: size of an advantage from which on token_std gives its group over to grpo (hapo 5).
        lengths, mask, cu_seqlens: response lengths as integers [N], as a token mask [N, T], or as offsets [N + 1].
            Needed where tokens weigh, by relative_length and by overlong. In means and deviations over tokens a
            response without any has no part; token_whiten gives it 0.
        baseline_rewards: [N], for the baseline "given" only: the reward of the greedy response to the same prompt.
        answer_ids: [N] integers, equal for equal answers. Rewards are first multiplied by 1 - H (1 - 1/n) / log2 n with
            H the group_entropy (COPO's consistency).
        overlong: (longest, buffer, factor): every component loses factor * (L - (longest - buffer)) / buffer where L
            goes beyond longest - buffer (DAPO, arXiv 2503.14476).
        filter, window: which groups are left out of everything; see FILTERS.
        process_group: the rows are split over the ranks of this group, group by group in any way. One all-gather, then
            every rank computes the whole batch: the results are those of one process that has the rows of rank 0, 1,
            ... in this order, bit for bit, and metrics are those of the whole batch.
        max_rows: with process_group: upper bound of the rows per rank, the same on all; needed where they differ.
        return_keep: also return bool [N]: which rows take part, being finite and not filtered.
        return_metrics: also return the integers of METRICS, on the same device.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    row = lookup(ESTIMATORS, estimator, "estimator")
    numbers = lookup(PRESETS, preset, "preset")
    row = numbers.estimators.get(estimator, row)
    transform = _part(TRANSFORMS, transform, row.transform, "transform")
    baseline = _part(BASELINES, baseline, row.baseline, "baseline")
    scale = _part(SCALES, scale, row.scale, "scale")
    finish = _part(FINISHES, finish, row.finish, "finish")
    filter = _part(FILTERS, filter, "none", "filter")
    singleton = numbers.singleton if singleton is None else singleton
    if singleton not in ("zero", "self"):
        raise ValueError(f'singleton: expected "zero" or "self", got {singleton!r}')
    ddof = _first(ddof, row.ddof, numbers.ddof)
    if ddof not in (0, 1):
        raise ValueError(f"ddof: expected 0 or 1, got {ddof!r}")
    eps = _first(eps, row.eps, numbers.std_eps)
    finish_eps = _first(finish_eps, row.finish_eps, numbers.std_eps if finish == "batch_std" else numbers.variance_eps)
    fallback = row.fallback if fallback is None else fallback
    for name, value in (("eps", eps), ("finish_eps", finish_eps), ("fallback", fallback)):
        if not value >= 0:
            raise ValueError(f"{name}: expected a number of at least 0, got {value!r}")
    if not isinstance(k, int) or k < 1:
        raise ValueError(f"k: expected an integer of at least 1, got {k!r}")

    check_floats(rewards, "rewards")
    if rewards.dim() not in (1, 2) or (rewards.dim() == 2 and not 1 <= rewards.shape[1] <= MAX_COMPONENTS):
        raise ValueError(
            f"rewards: expected one value per sample, [N], or up to {MAX_COMPONENTS} components, [N, K], "
            f"got {list(rewards.shape)}"
        )
    size, components = rewards.shape[0], 1 if rewards.dim() == 1 else rewards.shape[1]
    check_group_ids(group_ids, "group_ids", size, "reward")
    if component_weights is None:
        weights = [1.0 / components if row.average else 1.0] * components
    else:
        given = component_weights if isinstance(component_weights, Iterable) else [component_weights]
        weights = [float(weight) for weight in given]
        if len(weights) != components or not all(math.isfinite(weight) for weight in weights):
            raise ValueError(f"component_weights: expected {components} finite numbers, got {component_weights!r}")
    if (baseline_rewards is not None) != (baseline == "given"):
        need = "needs the greedy responses' rewards" if baseline == "given" else "takes none; use estimator='remax'"
        raise ValueError(f"baseline_rewards: estimator {estimator!r} {need}")
    dtype = torch.float64 if rewards.dtype == torch.float64 else torch.float32
    if baseline_rewards is not None:
        check_floats(baseline_rewards, "baseline_rewards")
        if list(baseline_rewards.shape) != [size]:
            raise ValueError(
                f"baseline_rewards: expected one value per sample, [{size}], got {list(baseline_rewards.shape)}"
            )
        baseline_rewards = baseline_rewards.detach().to(dtype).contiguous()
    longest, buffer, factor = _overlong(overlong)
    low, high = checked_numbers(window, "window", "low", "high")
    response_lengths = _lengths(lengths, mask, cu_seqlens, size)
    by_length = (
        baseline == "length_weighted"
        or scale == "token_std"
        or finish == "token_whiten"
        or transform == "relative_length"
    )
    if not by_length and overlong is None:
        response_lengths = None
    elif response_lengths is None:
        user = f"estimator {estimator!r}" if by_length else "overlong"
        raise ValueError(f"lengths: {user} needs them; pass lengths, mask or cu_seqlens")
    if answer_ids is not None:
        check_group_ids(answer_ids, "answer_ids", size, "reward")
    for name, tensor in (
        ("group_ids", group_ids),
        ("lengths", response_lengths),
        ("baseline_rewards", baseline_rewards),
        ("answer_ids", answer_ids),
    ):
        if tensor is not None:
            check_device(tensor, name, rewards, "rewards")
    _native.require_kernels(rewards, "rewards", "group_advantages")

    values = rewards.detach().to(dtype).contiguous()
    values = values if values.dim() == 2 else values.unsqueeze(1)
    columns = [values, group_ids.to(torch.int64).contiguous(), response_lengths, baseline_rewards, answer_ids]
    gathered = None
    if process_group is not None:
        if not distributed.is_available() or not isinstance(process_group, distributed.ProcessGroup):
            raise TypeError(
                f"process_group: expected a torch.distributed.ProcessGroup or None, got {kind(process_group)}"
            )
        gathered = GatheredRows(size, process_group, max_rows)
        columns = gathered.gather(columns)
    elif max_rows is not None:
        raise ValueError("max_rows: expected None without process_group")
    values, ids, response_lengths, baseline_rewards, answer_ids = columns
    if answer_ids is not None:
        values = _weighed_by_agreement(values, ids if gathered is None else gathered.apart(ids), answer_ids)
        baseline_rewards = None if baseline_rewards is None else baseline_rewards.double()
    advantages, keep, counts = torch.ops.pykern.group_advantages.default(
        values,
        weights,
        ids,
        response_lengths,
        baseline_rewards,
        row.decompose if decompose is None else decompose,
        TRANSFORMS.index(transform),
        BASELINES.index(baseline),
        SCALES.index(scale),
        FINISHES.index(finish),
        FILTERS.index(filter),
        int(ddof),
        singleton == "self",
        [eps, finish_eps, k, longest, buffer, factor, relative_length, fallback, low, high],
    )
    advantages = advantages.to(dtype)
    if gathered is not None:
        advantages, keep, counts = gathered.own(advantages), gathered.own(keep), gathered.without_padding(counts)
    results = (advantages,)
    if return_keep:
        results += (keep,)
    if return_metrics:
        results += (dict(zip(METRICS, counts.unbind())),)
    return results if len(results) > 1 else advantages


def _weighed_by_agreement(values: Tensor, ids: Tensor, answer_ids: Tensor) -> Tensor:
    """The rewards, float64, times 1 - H (1 - 1/n) / log2 n."""
    entropy, sizes = torch.ops.pykern.group_entropy.default(ids, answer_ids.to(torch.int64).contiguous())
    largest = torch.where(sizes > 1, sizes.double().log2() * sizes / (sizes - 1), 1.0)
    return values.double() * (1 - entropy / largest).unsqueeze(1)


def group_entropy(group_ids: Tensor, answer_ids: Tensor) -> Tensor:
    """Entropy in bits of the answers of each row's group, float64 [N]: -sum p log2 p, p the shares of the distinct
    answers (COPO, arXiv 2508.04138, whose loss blends local and global advantage by it).

    Args:
        group_ids: [N] integers, of any value and in any order; equal ids make a group.
        answer_ids: [N] integers, equal for equal answers.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    check_group_ids(group_ids, "group_ids", group_ids.numel() if isinstance(group_ids, Tensor) else 0, "row")
    check_group_ids(answer_ids, "answer_ids", group_ids.shape[0], "row")
    check_device(answer_ids, "answer_ids", group_ids, "group_ids")
    _native.require_kernels(group_ids, "group_ids", "group_entropy")
    ids, answers = (values.to(torch.int64).contiguous() for values in (group_ids, answer_ids))
    return torch.ops.pykern.group_entropy.default(ids, answers)[0]


@torch.library.register_fake("pykern::group_advantages")
def _group_advantages_fake(
    rewards, component_weights, group_ids, lengths, baseline_rewards, decompose, transform, baseline, scale, finish,
    filter, ddof, singleton_self, settings,
):  # fmt: skip
    rows = rewards.shape[0]
    return (
        rewards.new_empty(rows),
        rewards.new_empty(rows, dtype=torch.bool),
        group_ids.new_empty(len(METRICS)),
    )


@torch.library.register_fake("pykern::group_entropy")
def _group_entropy_fake(group_ids, answer_ids):
    return group_ids.new_empty(group_ids.shape, dtype=torch.float64), torch.empty_like(group_ids)


MAX_COMPONENTS = 16


def _part(names: tuple[str, ...], name: str | None, default: str, argument: str) -> str:
    if name is None:
        return default
    if name not in names:
        raise ValueError(f"{argument}: expected one of {', '.join(names)}, got {name!r}")
    return name


def _first(*values):
    return next(value for value in values if value is not None)


def _overlong(overlong: tuple[float, float, float] | None) -> tuple[float, float, float]:
    if overlong is None:
        return 0.0, 0.0, 0.0
    longest, buffer, factor = checked_numbers(overlong, "overlong", "longest", "buffer", "factor")
    if not buffer > 0:
        raise ValueError(f"overlong: expected (longest, buffer, factor) with a buffer above 0, got {overlong!r}")
    return longest, buffer, factor


def _lengths(lengths: Tensor | None, mask: Tensor | None, cu_seqlens: Tensor | None, size: int) -> Tensor | None:
    """Whichever of the three ways was used, as int64 [N]."""
    given = [
        name for name, value in (("lengths", lengths), ("mask", mask), ("cu_seqlens", cu_seqlens)) if value is not None
    ]
    if not given:
        return None
    if len(given) > 1:
        raise ValueError(f"{given[1]}: expected one of lengths, mask and cu_seqlens, got also {given[0]}")
    if mask is not None:
        if not isinstance(mask, Tensor):
            raise TypeError(f"mask: expected a tensor, got {kind(mask)}")
        if mask.dim() != 2 or mask.shape[0] != size:
            raise ValueError(f"mask: expected one row per sample, [{size}, T], got {list(mask.shape)}")
        return (mask != 0).sum(dim=1)
    name, value, entries = ("lengths", lengths, size) if lengths is not None else ("cu_seqlens", cu_seqlens, size + 1)
    if not isinstance(value, Tensor) or value.dtype not in INTEGERS:
        raise TypeError(f"{name}: expected a tensor of integers, got {kind(value)}")
    if list(value.shape) != [entries]:
        raise ValueError(f"{name}: expected [{entries}], got {list(value.shape)}")
    value = value.to(torch.int64)
    return value.contiguous() if lengths is not None else value.diff()
