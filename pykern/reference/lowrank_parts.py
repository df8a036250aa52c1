"""What the parts of a low-rank step mean, in plain PyTorch. Works in any dtype; tests run it in float64.

A matrix is seen with its compressed axis first: G is [n, length], whichever way it lies in memory, the basis P is
[n, rank], R = P^T G and all states are [rank, length], and up(X) = P X.
"""

import math

import torch
from torch import Tensor

from .philox import philox

RULES = ("adamw", "adabelief", "lion", "momentum")
ROUNDINGS = ("nearest", "stochastic", "kahan")


def project(
    gradient: Tensor, projector: Tensor, grad_scale: float = 1.0, maximize: bool = False
) -> tuple[Tensor, Tensor]:
    """R = P^T G [rank, length], and the squared norms of G's columns [length], both of g = G / grad_scale, or -g."""
    gradient = gradient / (-grad_scale if maximize else grad_scale)
    return projector.mT @ gradient, gradient.square().sum(dim=0)


def rule(
    low: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor | None,
    step: int,
    *,
    rule: str,
    beta1: float,
    beta2: float,
    eps: float,
    corrected_eps: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None, float]:
    """The direction N, the new moments, and the factor on the learning rate; `step` counts from 1.

    adamw, as adam_direction: m = beta1 m + (1 - beta1) R, v = beta2 v + (1 - beta2) R^2.
    adabelief: m as above, v = beta2 v + (1 - beta2) (R - m)^2 + eps with the new m; then as adamw.
    lion: N = sign(beta1 m + (1 - beta1) R), m = beta2 m + (1 - beta2) R.
    momentum: N = m = beta1 m + R.
    The factor is sqrt(1 - beta2^step) / (1 - beta1^step) for adamw and adabelief unless `corrected_eps`, else 1.
    """
    if rule == "lion":
        return (beta1 * exp_avg + (1 - beta1) * low).sign(), beta2 * exp_avg + (1 - beta2) * low, None, 1.0
    if rule == "momentum":
        exp_avg = beta1 * exp_avg + low
        return exp_avg, exp_avg, None, 1.0
    exp_avg = beta1 * exp_avg + (1 - beta1) * low
    if rule == "adabelief":
        exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * (low - exp_avg).square() + eps
    else:
        exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * low.square()
    correction1, correction2 = 1 - beta1**step, 1 - beta2**step
    if corrected_eps:
        return (exp_avg / correction1) / ((exp_avg_sq / correction2).sqrt() + eps), exp_avg, exp_avg_sq, 1.0
    return exp_avg / (exp_avg_sq.sqrt() + eps), exp_avg, exp_avg_sq, math.sqrt(correction2) / correction1


def ratios(
    low: Tensor,
    direction: Tensor,
    squares: Tensor,
    low_gram: Tensor | None = None,
    *,
    per_tensor: bool,
    removed: float | None,
) -> tuple[Tensor, Tensor]:
    """How much the rule scales every column, phi [length], and three sums [3] of which the limiter is made.

    phi_j = |N_j| / (|R_j| + 1e-8). The sums: |N|^2, |R|^2 and |S|^2, where S is the residual before its limit:
    S_j = phi_j (G_j - removed * up(R)_j), so
    |S_j|^2 = phi_j^2 (|G_j|^2 - 2 removed |R_j|^2 + removed^2 R_j^T P^T P R_j).
    `low_gram` is P^T P R; None where P is orthonormal. `removed` is None where S_j = phi_j G_j (APOLLO). With
    `per_tensor` phi is 1 everywhere here, and S = G: the one ratio is made of the sums, after they are complete.
    """
    if per_tensor:
        phi = torch.ones_like(squares)
    else:
        phi = direction.norm(dim=0) / (low.norm(dim=0) + 1e-8)
    remaining = squares
    if removed is not None:
        inside = low.square().sum(dim=0)
        double = inside if low_gram is None else (low * low_gram).sum(dim=0)
        remaining = (squares - 2 * removed * inside + removed**2 * double).clamp_min(0)
    return phi, torch.stack([direction.square().sum(), low.square().sum(), (phi.square() * remaining).sum()])


def limit(
    low: Tensor,
    direction: Tensor,
    phi: Tensor,
    sums: Tensor,
    residual_norm: float | None,
    *,
    scale: float,
    removed: float | None,
    per_tensor: bool,
    amplitude: float = 1.0,
    amplitude_first: bool = False,
    growth: float = 1.01,
    zero_norm_limits: bool = False,
    grad_scale: float = 1.0,
    maximize: bool = False,
) -> tuple[Tensor | None, Tensor, float | None]:
    """(X, factors, residual norm): the update's direction is up(X) + G * factors, with factors [length] on the columns.

    phi is first multiplied by |N| / (|R| + 1e-8) if `per_tensor`, and by `amplitude` if `amplitude_first`. The norm of
    the residual, |S| with phi's new factor, may then grow by `growth` a step, as low_rank_adam_step says; growth 0 and
    `residual_norm` None: no limit. c = phi / limiter, and times `amplitude` if not `amplitude_first`.
    X = scale N - removed * c R, or None if `removed` is None. factors = c / grad_scale, negative if `maximize`,
    since G is the gradient as it came.
    """
    front = amplitude if amplitude_first else 1.0
    if per_tensor:
        front = front * (sums[0].sqrt() / (sums[1].sqrt() + 1e-8)).item()
    norm = front * sums[2].sqrt().item()
    factor = front
    if residual_norm is not None and growth > 0:
        if residual_norm < 0 or (residual_norm == 0 and not zero_norm_limits):
            residual_norm = norm
        else:
            limiter = max(norm / (residual_norm + 1e-8), growth) / growth
            factor = factor / limiter
            residual_norm = norm / limiter
    if not amplitude_first:
        factor = factor * amplitude
    c = phi * factor
    combined = None if removed is None else scale * direction - removed * (c * low)
    return combined, (-c if maximize else c) / grad_scale, residual_norm


def apply(
    param: Tensor,
    projector: Tensor | None,
    direction: Tensor | None,
    grad: Tensor | None = None,
    factors: Tensor | None = None,
    low: Tensor | None = None,
    *,
    lr: float,
    scale: float = 1.0,
    weight_decay: float = 0.0,
    decay_after: bool = False,
    sign_scale: float = 0.0,
    grad_scale: float = 1.0,
    maximize: bool = False,
) -> Tensor:
    """W - lr * D with W multiplied by 1 - lr * weight_decay before or after; no rounding.

    D = scale * up(direction) + G * factors + sign_scale * sign(g - up(low)), each term where its parts are given;
    g = G / grad_scale, or its negative if `maximize` (`low` is of g already).
    """
    update = torch.zeros_like(param)
    if direction is not None:
        update = update + scale * (projector @ direction)
    if factors is not None:
        update = update + grad * factors
    if low is not None:
        update = update + sign_scale * (grad / (-grad_scale if maximize else grad_scale) - projector @ low).sign()
    decay = 1 - lr * weight_decay
    if decay_after:
        return (param - lr * update) * decay
    return param * decay - lr * update


def rounding_words(n: int, length: int, seed: int, step: int) -> Tensor:
    """What decides how each element of a weight is rounded: the first word of the counter (index, step, 0)."""
    index = torch.arange(n * length, dtype=torch.int64)
    counter = (index & 0xFFFFFFFF, index >> 32, torch.full_like(index, step), torch.zeros_like(index))
    return philox(counter, (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF))[0].view(n, length)


def round_stochastic(values: Tensor, dtype: torch.dtype, words: Tensor) -> Tensor:
    """Rounds float32 `values` to bfloat16 or float16, up in magnitude with the probability of what is left over.

    With u the unit in the last place at |x|, x goes up where floor(24 bits of |x| / u beyond the point) + (word >> 8)
    reaches 2^24. Infinities and NaN stay, and so does what `dtype` represents. Float32 and float64 have nothing to
    round.
    """
    if dtype in (torch.float32, torch.float64):
        return values.to(dtype)
    smallest, digits = (-126, 7) if dtype == torch.bfloat16 else (-14, 10)
    wide = values.double()
    exponent = (torch.frexp(wide).exponent - 1).clamp_min(smallest) - digits
    units = torch.ldexp(wide.abs(), -exponent)
    below = units.floor()
    up = ((units - below) * 2.0**24).floor() + (words.to(units.device) >> 8) >= 2.0**24
    rounded = torch.copysign(torch.ldexp(below + up, exponent), wide)
    return torch.where(wide.isfinite(), rounded, wide).to(dtype)


def round_kahan(param: Tensor, compensation: Tensor, exact: Tensor) -> tuple[Tensor, Tensor]:
    """The weight and its compensation after a step from `param` to `exact`.

    The compensation joins the change, exact - param; what rounding loses of their sum is the new compensation.
    """
    change = compensation.to(exact.dtype) + (exact - param.to(exact.dtype))
    rounded = (param.to(exact.dtype) + change).to(param.dtype)
    return rounded, (change - (rounded.to(exact.dtype) - param.to(exact.dtype))).to(param.dtype)
