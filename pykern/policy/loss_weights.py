"""Weights that some losses take beside the log-probabilities."""

import torch
from torch import Tensor

from .checks import check_floats, check_like


def copo_weights(entropies: Tensor, *, b: float = 0.5, k: float = 1.0, advantages: Tensor | None = None) -> Tensor:
    """COPO's share of the advantages within a group: sigmoid(k (H - b)), for policy_loss(advantage_weights=...).

    Where the answers to a prompt agree (low H), the advantages of whole groups, second_advantages, count more. With
    `advantages` (the local ones) the share is 0 where they are exactly 0, the paper's code's "soft with forced":
    group_advantages gives exact zeros to equal rewards.

    Paper: arXiv 2508.04138.

    Args:
        entropies: base-2 entropy of the distinct answers in each sample's group, one per sequence.
        b, k: where the share is a half, and how sharp it turns.
        advantages: of the shape of entropies.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    check_floats(entropies, "entropies")
    if advantages is not None:
        check_floats(advantages, "advantages")
        check_like(advantages, "advantages", entropies, "entropies")
    weights = torch.sigmoid(k * (entropies.detach() - b))
    return weights if advantages is None else torch.where(advantages == 0, 0.0, weights)


def annealed_coef(step: int, steps: int, *, first: float = 5e-3, last: float = 1e-3) -> float:
    """A coefficient on its straight way from `first` to `last`, which it keeps from `steps` on: KDRL's anchor_coef.

    KDRL (arXiv 2506.02208) also drops the teacher's term where the reward is already full: policy_loss(loss="kdrl",
    anchor_keep=...) with the rewards below it, expanded to the tokens.

    Raises:
        ValueError: naming the argument.
    """
    if step < 0:
        raise ValueError(f"step: expected a number of at least 0, got {step!r}")
    if steps < 1:
        raise ValueError(f"steps: expected a number of at least 1, got {steps!r}")
    return first + (last - first) * min(step / steps, 1.0)
