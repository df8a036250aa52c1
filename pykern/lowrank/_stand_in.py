"""The ops by their references, until the native ones are in place."""

import torch

from ..reference import lowrank, lowrank_parts as parts


def _stop(found_inf):
    return found_inf is not None and found_inf.item() != 0


def _scale(grad_scale):
    return 1.0 if grad_scale is None else grad_scale.item()


def low_rank_project(matrix, projector, grad_scale, low, squares, *, maximize):
    for i, m in enumerate(matrix):
        r, s = parts.project(m.to(low[i].dtype), projector[i].to(low[i].dtype), _scale(grad_scale), maximize)
        low[i].copy_(r)
        if squares:
            squares[i].copy_(s)


def low_rank_rule(
    low, exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale, step, direction, step_factor, found_inf, *,
    rule, beta1, beta2, eps, corrected_eps,
):  # fmt: skip
    step_factor.fill_(1)
    for i, r in enumerate(low):
        if _stop(found_inf):
            direction[i].zero_()
            continue
        step[i].add_(1)
        eight = bool(exp_avg_scale)
        first = lowrank.dequantize(exp_avg[i], exp_avg_scale[i], True) if eight else exp_avg[i].to(r.dtype)
        second = None
        if exp_avg_sq:
            second = (
                lowrank.dequantize(exp_avg_sq[i], exp_avg_sq_scale[i], False) if eight else exp_avg_sq[i].to(r.dtype)
            )
        n, first, second, factor = parts.rule(
            r, first, second, int(step[i]), rule=parts.RULES[rule], beta1=beta1, beta2=beta2, eps=eps,
            corrected_eps=corrected_eps,
        )  # fmt: skip
        direction[i].copy_(n)
        step_factor[i] = factor
        for value, moment, scales, signed in (
            (first, exp_avg, exp_avg_scale, True),
            (second, exp_avg_sq, exp_avg_sq_scale, False),
        ):
            if value is None:
                continue
            if eight:
                codes, scale = lowrank.quantize(value, signed)
                moment[i].copy_(codes)
                scales[i].copy_(scale)
            else:
                moment[i].copy_(value)


def low_rank_ratios(low, direction, squares, low_gram, ratios, sums, *, per_tensor, removed):
    for i, r in enumerate(low):
        gram = low_gram[i] if low_gram else None
        phi, three = parts.ratios(r, direction[i], squares[i], gram, per_tensor=per_tensor, removed=removed)
        ratios[i].copy_(phi)
        sums[i].copy_(three)


def low_rank_limit(
    low, direction, ratios, sums, residual_norm, grad_scale, found_inf, *,
    scale, removed, per_tensor, amplitude, amplitude_first, growth, zero_norm_limits, maximize,
):  # fmt: skip
    for i, r in enumerate(low):
        combined, factors, norm = parts.limit(
            r, direction[i], ratios[i], sums[i], residual_norm[i].item() if residual_norm else None,
            scale=scale, removed=removed, per_tensor=per_tensor, amplitude=amplitude, amplitude_first=amplitude_first,
            growth=growth, zero_norm_limits=zero_norm_limits, grad_scale=_scale(grad_scale), maximize=maximize,
        )  # fmt: skip
        if combined is not None:
            direction[i].copy_(combined)
        ratios[i].copy_(factors)
        if residual_norm and not _stop(found_inf):
            residual_norm[i].fill_(norm)


def low_rank_apply(
    param, projector, direction, grad, factors, low, compensation, step, seeds, step_factor, lr, grad_scale,
    found_inf, *, scale, weight_decay, decay_after, sign_scale, rounding, maximize,
):  # fmt: skip
    assert rounding == 0, "the stand-in rounds to nearest only"
    if _stop(found_inf):
        return
    for i, weight in enumerate(param):
        wide = torch.promote_types(weight.dtype, torch.float32)
        rate = lr.item() * step_factor[i].item()
        # The decay takes the rate without the factor.
        new = parts.apply(
            weight.to(wide),
            projector[i].to(wide) if projector else None,
            direction[i].to(wide) * step_factor[i].item() if direction else None,
            grad[i].to(wide) if grad else None,
            factors[i].to(wide) * step_factor[i].item() if factors else None,
            low[i].to(wide) if low else None,
            lr=lr.item(), scale=scale, weight_decay=weight_decay, decay_after=decay_after,
            sign_scale=sign_scale * (rate / lr.item() if lr.item() else 1.0),
            grad_scale=_scale(grad_scale), maximize=maximize,
        )  # fmt: skip
        weight.copy_(new)
