"""What a step does with the part of the gradient that the subspace misses."""

from dataclasses import dataclass

import torch
from torch import Tensor

from . import ops


@dataclass(frozen=True)
class Residual:
    """One residual rule, as the ops' numbers and flags.

    Attributes:
        fused: its number in low_rank_adamw_step, or None where the parts do it.
        measured: its factors on G's columns come from low_rank_ratios and low_rank_limit.
        per_tensor: one factor for all columns.
        up: the direction is projected up; False where only scaled columns of G are the update.
        sign: the state-free part is sign(g - up(R)).
        constant: the state-free part is g - up(R), times `residual_scale`.
        feedback: what the subspace missed is kept and added to the next gradient.
    """

    fused: int | None = None
    measured: bool = False
    per_tensor: bool = False
    up: bool = True
    sign: bool = False
    constant: bool = False
    feedback: bool = False

    @property
    def linear(self) -> bool:
        """The step needs R of the gradient and nothing else, so that R may be summed and averaged in its place."""
        return self.fused == 0


RESIDUALS: dict[str, Residual] = {
    "none": Residual(fused=0),
    "fira": Residual(fused=1, measured=True),
    "apollo_channel": Residual(fused=2, measured=True, up=False),
    "apollo_tensor": Residual(fused=3, measured=True, per_tensor=True, up=False),
    "sign": Residual(sign=True),
    "sgd": Residual(constant=True),
    "error_feedback": Residual(feedback=True),
}


def measured_factors(
    low: list[Tensor],
    direction: list[Tensor],
    squares: list[Tensor],
    low_gram: list[Tensor],
    states: list[dict],
    group: dict,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    reduce=None,
) -> list[Tensor]:
    """The factors on the columns of G; `direction` becomes what is to be projected up.

    `reduce` adds up the sums in place over the processes that share the columns of these matrices.
    """
    rule = RESIDUALS[group["residual"]]
    ratios = [torch.empty_like(square) for square in squares]
    sums = torch.empty(len(low), 3, dtype=torch.float64, device=low[0].device)
    ops.low_rank_ratios(
        low, direction, squares, low_gram, ratios, sums, per_tensor=rule.per_tensor, removed=removed(group)
    )
    if reduce is not None:
        reduce(sums)
    ops.low_rank_limit(
        low, direction, ratios, sums, [state["residual_norm"] for state in states], grad_scale, found_inf,
        per_tensor=rule.per_tensor, maximize=group["maximize"], **limit_options(group),
    )  # fmt: skip
    return ratios


def removed(group: dict) -> float | None:
    """The factor on up(R) in the residual; None where G itself is scaled."""
    if not RESIDUALS[group["residual"]].up:
        return None
    return group["scale"] if group["scaled_residual"] else 1.0


def limit_options(group: dict) -> dict:
    """The keywords of low_rank_limit that low_rank_adamw_step shares."""
    apollo = not RESIDUALS[group["residual"]].up
    return {
        "scale": group["scale"],
        "removed": removed(group),
        "amplitude": group["scale"] ** 0.5 if apollo else 1.0,
        "amplitude_first": group["scale_first"],
        "growth": group["growth_limit"],
        "zero_norm_limits": group["zero_norm_limits"],
    }
