"""Restarts for factored weights and for moments."""

import warnings

import torch
from torch import Tensor, nn

from .backward import BackwardOptimizer, BackwardStepper
from .choosing import recount
from .optimizer import LowRankOptimizer
from .sltrain import SLTrainLinear
from .weight_norm import NormalizedLowRankLinear


@torch.no_grad()
def refactorize(module: nn.Module) -> int:
    """Balances the low-rank factors of every layer below: up @ down = U S V^T becomes U S^1/2 times S^1/2 V^T.

    The product stays what it is, up to rounding; both factors get orthogonal columns and rows of equal norms, from
    which training goes on better. To be called every few hundred steps; the optimizer's moments of the factors
    then belong to other numbers: see `reset_moments`. The decomposition is that of a rank x rank matrix.

    Args:
        module: a model; its SLTrainLinear and NormalizedLowRankLinear layers are balanced.

    Returns:
        How many layers were balanced.

    Paper: arXiv 2505.22922 (weight refactorization).
    """
    count = 0
    for layer in module.modules():
        if not isinstance(layer, (SLTrainLinear, NormalizedLowRankLinear)):
            continue
        up, down = layer.up, layer.down
        wide = torch.float64 if up.dtype == torch.float64 else torch.float32
        left, left_rest = torch.linalg.qr(up.to(wide))
        right, right_rest = torch.linalg.qr(down.mT.to(wide))
        inner = left_rest @ right_rest.mT
        if not inner.isfinite().all():
            warnings.warn(
                f"refactorize: a layer of shape {tuple(up.shape)} has non-finite factors and is left as it is"
            )
            continue
        vectors, sizes, others = torch.linalg.svd(inner)
        root, used = sizes.sqrt(), sizes.numel()
        balanced_up, balanced_down = left @ vectors[:, :used] * root, (right @ others[:used].mT * root).mT
        up.zero_()
        down.zero_()
        up[:, :used] = balanced_up.to(up.dtype)
        down[:used] = balanced_down.to(down.dtype)
        count += 1
    return count


@torch.no_grad()
def reset_moments(optimizer: torch.optim.Optimizer | BackwardStepper, params=None, *, steps: bool = True) -> int:
    """Zeroes the moments of an optimizer: those of `params`, or of all it has. Returns how many parameters.

    For any optimizer that keeps its moments under the names of torch's (exp_avg, exp_avg_sq, max_exp_avg_sq,
    momentum_buffer), pykern's with 8-bit states included; bases stay, and the next ones come when they were due.
    `steps` says whether the bias corrections start anew too.

    Paper: momentum reset, arXiv 2505.22922; after 2501.06842 (SPAM).
    """
    if params is not None:
        # A tensor is iterable too, and an iterator ends with the first reading.
        params = [params] if isinstance(params, Tensor) else list(params)
    if isinstance(optimizer, (BackwardOptimizer, BackwardStepper)):
        stepper = optimizer if isinstance(optimizer, BackwardStepper) else optimizer.stepper
        return sum(reset_moments(own, params, steps=steps) for own in stepper.optimizers.values())
    chosen = None if params is None else {id(param) for param in params}
    count = 0
    for param, state in optimizer.state.items():
        if chosen is not None and id(param) not in chosen:
            continue
        count += 1
        if steps and isinstance(optimizer, LowRankOptimizer) and "next_refresh" in state:
            # A count of steps, as the one that begins anew.
            state["next_refresh"].sub_(int(state["step"]))
            recount(optimizer._counted, param)
        for name, value in state.items():
            if not isinstance(value, Tensor):
                continue
            if name.startswith(("exp_avg", "max_exp_avg", "momentum_buffer")) or (name == "step" and steps):
                value.zero_()
    return count
