"""RiskPO: advantages from the quantiles of scores that bundles of prompts reach together."""

import torch
from torch import Tensor

from .. import _native
from .checks import check_device, check_floats, check_group_ids, checked_numbers, constant, kind

CREDITS = ("uniform", "score", "std", "sum_mean")
"""What each response of a paper gets of the paper's utility u: u; u / 2 for a positive reward, else 3 u / 2; u over the
standard deviation of its prompt's rewards; u times its part in the sum of all distances of rewards from their prompts'
means."""

TRACKINGS = ("mix", "track")
"""Which quantiles count once there are tracked ones: the mean of those and the bundle's; the tracked ones alone."""

METRICS = ("non_finite", "bundles", "papers")


class QuantileTracker:
    """Quantiles of the paper scores of a whole run, followed step by step. Its state is one tensor, on its device.

    The first update takes the quantiles of its scores; each later one moves q by lr (level - mean[score < q]). Nothing
    waits for the device.

    Args:
        levels: the levels that are followed, from 0 to 1; .05, .10, ... .95 by default.
        lr: step size.
        device: of the state.

    Raises:
        ValueError: naming the argument.

    Paper: RiskPO, arXiv 2510.00911.
    """

    def __init__(self, levels: tuple[float, ...] | None = None, *, lr: float = 0.1, device: object = None):
        levels = tuple(step / 20 for step in range(1, 20)) if levels is None else tuple(levels)
        if not levels or not all(0 <= level <= 1 for level in levels):
            raise ValueError(f"levels: expected numbers from 0 to 1, got {levels!r}")
        if not lr > 0:
            raise ValueError(f"lr: expected a positive number, got {lr!r}")
        self.levels = levels
        self.lr = lr
        self.values = torch.full((len(levels),), float("nan"), dtype=torch.float64, device=device)
        self._levels = torch.tensor(levels, dtype=torch.float64, device=device)

    def update(self, scores: Tensor) -> None:
        """Takes the scores of a step, metrics["scores"] of risk_advantages; NaN among them are not there.

        Raises TypeError or ValueError, naming the argument.
        """
        check_floats(scores, "scores")
        check_device(scores, "scores", self.values, "the tracker")
        if scores.numel() == 0:
            return
        ordered = scores.detach().double().flatten().sort().values  # NaN last
        count = (~ordered.isnan()).sum()
        rank = self._levels * (count - 1).clamp(min=0)
        below, above = (ordered[index.long()] for index in (rank.floor(), rank.ceil()))
        first = below + (rank - rank.floor()) * (above - below)
        share = (ordered < self.values[:, None]).sum(1, dtype=torch.float64) / count
        moved = self.values + self.lr * (self._levels - share)
        moved = torch.where(self.values.isnan(), first, moved)
        self.values.copy_(torch.where(count > 0, moved, self.values))

    def quantiles(self, levels: tuple[float, float]) -> Tensor:
        """Those of the followed levels that are nearest to `levels`; NaN before the first update."""
        nearest = []
        for level in levels:
            distances = [abs(followed - level) for followed in self.levels]
            nearest.append(distances.index(min(distances)))
        return torch.stack([self.values[index] for index in nearest])

    def state_dict(self) -> dict[str, Tensor]:
        """The state, a copy."""
        return {"values": self.values.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes the state of a tracker of as many levels.

        Raises ValueError, naming the argument.
        """
        if "values" not in state:
            raise ValueError(f"state: expected that of a QuantileTracker, got the keys {', '.join(state) or 'none'}")
        values = state["values"]
        if values.shape != self.values.shape:
            raise ValueError(f"state: expected {len(self.levels)} values, got {list(values.shape)}")
        self.values.copy_(values)


def risk_advantages(
    rewards: Tensor,
    group_ids: Tensor,
    bundle_ids: Tensor,
    *,
    levels: tuple[float, float] = (0.2, 0.8),
    mix: float | None = 1.5,
    upper_tail: float | None = None,
    tracker: QuantileTracker | None = None,
    tracking: str = "mix",
    credit: str = "uniform",
    eps: float = 1e-6,
    return_metrics: bool = False,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """RiskPO's advantages of N samples: float64 [N] for float64 rewards, else float32 [N]. Constants: no gradient.

    Several prompts make a bundle. The j-th response to each of them, in the order of the rows, make paper j of the
    bundle, whose score S_j is the sum of their rewards; there are as many papers as the prompt with the fewest
    responses has, and responses beyond get 0. With q_a and q_b the quantiles of the bundle's scores at levels a and b
    (linear between neighbours) and s their standard deviation (1 for a single paper), a paper's utility is

        u = ((S - q_a)+ - (S - q_b)+ + q_a - q_b) / (b - a + eps)
        u = (mix c + u) / (mix + 1),  c = -(q_a - S)+ / (a + eps)                      unless mix is None
        u = (upper_tail d + u) / (upper_tail + 1),  d = (S - q_b)+ / (1 - b + eps)     unless upper_tail is None
        u / (s + eps)

    and `credit` says what of it each response gets.

    - Equal scores: where a bundle's two or more papers all have the same score, its advantages are exactly 0, with
      tracked quantiles too (the published code divides by eps there).
    - A reward that is NaN or infinite gets 0 and is counted; papers are made as if its row were not there.
    - Sums run in float64, in an order that no thread decides: results are the same bit for bit.

    Args:
        rewards: [N] float32, float64, bfloat16 or float16.
        group_ids: [N] integers, the prompt of each response, of any value and in any order.
        bundle_ids: [N] integers, the bundle of each response. The same prompt in two bundles counts as two.
        levels: a and b, 0 <= a < b <= 1.
        mix: weight of the lower tail's utility.
        upper_tail: weight of the upper tail's utility; mix must be None beside it.
        tracker: quantiles of earlier steps; it is read only, and before its first update left out. To move it on, call
            tracker.update(metrics["scores"]).
        tracking: a row of TRACKINGS.
        credit: a row of CREDITS; deviations up to 1e-3 count as 1, and where the distances' sum is at most 1e-6 in
            magnitude, u is shared out in equal parts.
        eps: see the formulas.
        return_metrics: also return tensors on the same device: "scores", [N], the score of each paper at the row of
            its first response and NaN elsewhere, and integers: rewards left out ("non_finite"), "bundles", "papers".

    Raises:
        TypeError, ValueError: naming the argument.

    Paper: RiskPO, arXiv 2510.00911, as its published code computes it.
    """
    check_floats(rewards, "rewards")
    if rewards.dim() != 1:
        raise ValueError(f"rewards: expected one value per sample, [N], got {list(rewards.shape)}")
    for name, ids in (("group_ids", group_ids), ("bundle_ids", bundle_ids)):
        check_group_ids(ids, name, len(rewards), "reward")
        check_device(ids, name, rewards, "rewards")
    low_level, high_level = checked_numbers(levels, "levels", "a", "b")
    if not 0 <= low_level < high_level <= 1:
        raise ValueError(f"levels: expected two numbers, 0 <= a < b <= 1, got {levels!r}")
    for name, weight in (("mix", mix), ("upper_tail", upper_tail)):
        if weight is not None and not weight > 0:
            raise ValueError(f"{name}: expected a positive weight or None, got {weight!r}")
    if mix is not None and upper_tail is not None:
        raise ValueError("upper_tail: expected one of mix and upper_tail, got both; pass mix=None")
    if tracking not in TRACKINGS:
        raise ValueError(f"tracking: expected one of {', '.join(TRACKINGS)}, got {tracking!r}")
    if credit not in CREDITS:
        raise ValueError(f"credit: expected one of {', '.join(CREDITS)}, got {credit!r}")
    if not eps >= 0:
        raise ValueError(f"eps: expected a number of at least 0, got {eps!r}")
    if tracker is not None and not isinstance(tracker, QuantileTracker):
        raise TypeError(f"tracker: expected a QuantileTracker or None, got {kind(tracker)}")
    tracked = None if tracker is None else tracker.quantiles((low_level, high_level))
    if tracked is not None:
        check_device(tracked, "tracker", rewards, "rewards")
    _native.require_kernels(rewards, "rewards", "risk_advantages")

    advantages, scores, counts = torch.ops.pykern.risk_advantages.default(
        constant(rewards),
        group_ids.to(torch.int64).contiguous(),
        bundle_ids.to(torch.int64).contiguous(),
        tracked,
        float(low_level),
        float(high_level),
        0.0 if mix is None else float(mix),
        0.0 if upper_tail is None else float(upper_tail),
        tracking == "track",
        CREDITS.index(credit),
        float(eps),
    )
    if return_metrics:
        return advantages, {"scores": scores, **dict(zip(METRICS, counts.unbind()))}
    return advantages


@torch.library.register_fake("pykern::risk_advantages")
def _risk_advantages_fake(
    rewards, group_ids, bundle_ids, tracked, low_level, high_level, mix, upper_tail, tracked_alone, credit, eps
):
    return torch.empty_like(rewards), torch.empty_like(rewards), group_ids.new_empty(len(METRICS))
