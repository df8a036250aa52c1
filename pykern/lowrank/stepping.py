"""One step of the parameters of one group: which ops, in which order, on what."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import ops
from .amp import Amp
from .bases import dense_bases, picks_rows, rows_or_bases
from .checks import rate_on
from .choosing import Bases, orthonormal
from .distributed import average, local_gradient, local_tensor
from .feedback import keep_missed, with_feedback
from .int8_linear import step_int8_weights
from .matrices import Job
from .quantized import int8_weight
from .residuals import RESIDUALS, limit_options, measured_factors
from .rules import RULES
from .state import make_state, plain_state, seed_of, wide_dtype
from .subspace import inner_products, product

_ROUNDING = {"nearest": 0, "stochastic": 1, "kahan": 2}


def step_plain(params: list[Tensor], kept: list[dict], group: dict, amp: Amp, bases: Bases) -> None:
    """Plain AdamW of parameters of one device and dtype."""
    weights, grads, states = [], [], []
    if bases.process_group is not None:
        average([param.grad for param in params], bases.process_group)
    for param, own in zip(params, kept, strict=True):
        if not own:
            own.update(plain_state(param))
        state = {name: local_tensor(value) for name, value in own.items()}
        # The kernel walks through memory, so all must lie alike; the moments have the strides of a
        # gapless tensor that is laid out like the parameter.
        weights.append(_laid_out(local_tensor(param.detach()), state["exp_avg"], param.dtype))
        grads.append(_laid_out(local_gradient(param), state["exp_avg"], param.dtype))
        states.append(state)
    beta1, beta2 = group["betas"]
    ops.adamw_step(
        weights,
        grads,
        *([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step")),
        rate_on(group["lr"], params[0].device),
        amp.grad_scale,
        amp.found_inf,
        beta1=beta1,
        beta2=beta2,
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        decay_after=group["decay"] == "after",
        corrected_eps=group["corrected_eps"],
        maximize=group["maximize"],
    )
    for param, weight in zip(params, weights, strict=True):
        local = local_tensor(param.detach())
        if weight.data_ptr() != local.data_ptr():
            local.copy_(weight)


def step_low_rank(jobs: list[Job], kept: list[dict], amp: Amp, bases: Bases) -> None:
    """The low-rank step of parameters of one group, device and dtype; `kept` is the optimizer's state of each."""
    for job, state in zip(jobs, kept, strict=True):
        if not job.state:
            make_state(job, state)
    sources, due = _sources(jobs, amp, bases)
    if steps_rows(jobs[0]):
        projectors = whole = rows_or_bases(jobs)
    else:
        whole = dense_bases(jobs)
        projectors = [job.own(projector) for job, projector in zip(jobs, whole, strict=True)]
    if is_fused(jobs[0], bases):
        _step_fused(jobs, projectors, amp)
    else:
        low, squares = _projected(jobs, sources, projectors, due, amp, bases)
        low, direction, step_factor = _directions(jobs, low, amp)
        if RESIDUALS[jobs[0].group["residual"]].feedback:
            keep_missed(jobs, sources, projectors, low, amp)
        update = _update(jobs, low, direction, squares, whole, amp)
        _apply(jobs, projectors, update, step_factor, amp)
    for job in jobs:
        job.write_back()
        bases.stepped(job)


def steps_rows(job: Job) -> bool:
    """Whether the batch of this job needs no more than the rows that its projectors pick.

    A measured residual needs the norms of whole columns, and 8-bit weights a product.
    """
    return picks_rows(job) and not RESIDUALS[job.group["residual"]].measured and int8_weight(job.param) is None


def misses_roundings(job: Job) -> bool:
    """Whether the basis has all of the gradient, so that the signs of what it misses are those of roundings."""
    group = job.group
    whole = job.rank == job.compressed and (group["side"] != "full" or job.rank == job.whole_length)
    return RESIDUALS[group["residual"]].sign and whole and orthonormal(group)


def is_fused(job: Job, bases: Bases) -> bool:
    """Whether low_rank_adamw_step has all that the batch of this job asks for."""
    group = job.group
    return (
        not steps_rows(job)
        and group["rule"] == "adamw"
        and group["state_dtype"] == "float32"
        and group["rounding"] == "nearest"
        and group["side"] != "full"
        and RESIDUALS[group["residual"]].fused is not None
        and int8_weight(job.param) is None
        and job.low is None
        and (job.shards is None or not RESIDUALS[group["residual"]].measured)
        and not job.partial
        and bases.process_group is None
    )


def _step_fused(jobs: list[Job], projectors: list[Tensor], amp: Amp) -> None:
    """The low-rank step in one op, for jobs where is_fused."""
    group = jobs[0].group
    states = [job.state for job in jobs]
    residual = RESIDUALS[group["residual"]]
    beta1, beta2 = group["betas"]
    limit = limit_options(group)
    ops.low_rank_adamw_step(
        [job.weight for job in jobs],
        [job.grad for job in jobs],
        projectors,
        *([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step")),
        [state["residual_norm"] for state in states] if residual.measured else [],
        rate_on(group["lr"], jobs[0].param.device),
        amp.grad_scale,
        amp.found_inf,
        beta1=beta1,
        beta2=beta2,
        eps=group["eps"],
        corrected_eps=group["corrected_eps"],
        weight_decay=group["weight_decay"],
        decay_after=group["decay"] == "after",
        residual=residual.fused,
        orthonormal=orthonormal(group),
        maximize=group["maximize"],
        **{**limit, "removed": limit["removed"] or 0.0},
    )


def _sources(jobs: list[Job], amp: Amp, bases: Bases) -> tuple[list[Tensor], list[bool]]:
    """What every job projects, and whether its basis was due; the bases that were are chosen.

    Between processes with gradients of their own, those are averaged that the step needs themselves.
    """
    residual, processes = RESIDUALS[jobs[0].group["residual"]], bases.process_group
    if jobs[0].low is not None:
        return [], [False] * len(jobs)
    due = [bases.due(job, amp) for job in jobs]
    if processes is not None:
        average([job.grad for job, now in zip(jobs, due, strict=True) if now or not residual.linear], processes)
    sources = with_feedback(jobs, amp) if residual.feedback else [job.grad for job in jobs]
    for job, source, now in zip(jobs, sources, due, strict=True):
        if now:
            bases.refresh(job, source, amp)
    return sources, due


def _projected(
    jobs: list[Job],
    sources: list[Tensor],
    projectors: list[Tensor],
    due: list[bool],
    amp: Amp,
    bases: Bases,
) -> tuple[list[Tensor], list[Tensor]]:
    """R of every job, and the columns' squares if these are needed.

    Between processes with gradients of their own, R is averaged where the gradient was not.
    """
    residual, processes = RESIDUALS[jobs[0].group["residual"]], bases.process_group
    if jobs[0].low is not None:
        low = [job.low.contiguous() for job in jobs]
        if processes is not None:
            low = [matrix.clone() for matrix in low]
            average(low, processes)
        return low, []
    low = [torch.empty(job.rank, job.length, dtype=wide_dtype(job.param), device=job.param.device) for job in jobs]
    squares = [matrix.new_empty(matrix.shape[1]) for matrix in low] if residual.measured else []
    scale = None if residual.feedback else amp.grad_scale
    maximize = jobs[0].group["maximize"] and not residual.feedback
    ops.low_rank_project(sources, projectors, scale, low, squares, maximize=maximize)
    if jobs[0].partial:
        jobs[0].shards.add_up([*low, *squares])
    if processes is not None and residual.linear:
        average([matrix for matrix, now in zip(low, due, strict=True) if not now], processes)
    return low, squares


def _directions(jobs: list[Job], low: list[Tensor], amp: Amp) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """What the bases see of the gradients, the directions that the inner rule makes of it, and its factors on the rate.

    With side "full" that is less than R, and comes back from the second basis.
    """
    group, shards = jobs[0].group, jobs[0].shards
    rule = RULES[group["rule"]]
    others = [job.state["other_projector"] for job in jobs] if group["side"] == "full" else []
    inner = [product(matrix, other) for matrix, other in zip(low, others, strict=True)] if others else low
    gathers = shards is not None and not rule.columnwise
    if gathers:
        inner = [shards.gathered(m, shards.along, 1, job.whole_length) for job, m in zip(jobs, inner, strict=True)]
    direction, step_factor = rule.directions(inner, jobs, group, amp.found_inf)
    if gathers:
        direction = [shards.own(matrix, 1, shards.along).contiguous() for matrix in direction]
    if others:
        low, direction = (
            [product(matrix, other.mT) for matrix, other in zip(matrices, others, strict=True)]
            for matrices in (inner, direction)
        )
    return low, direction, step_factor


@dataclass
class _Update:
    """What low_rank_apply is to take from the weights, by its names; an empty list where it is to do without."""

    direction: list[Tensor]
    scale: float
    grads: list[Tensor] = field(default_factory=list)
    factors: list[Tensor] = field(default_factory=list)
    low: list[Tensor] = field(default_factory=list)


def _update(
    jobs: list[Job],
    low: list[Tensor],
    direction: list[Tensor],
    squares: list[Tensor],
    projectors: list[Tensor],
    amp: Amp,
) -> _Update:
    """The update with what the group's residual adds to the directions; `projectors` are whole, also of shards."""
    group, grads = jobs[0].group, [job.grad for job in jobs]
    residual = RESIDUALS[group["residual"]]
    if residual.measured:
        shards = jobs[0].shards
        low_gram = []
        if residual.up and not orthonormal(group):
            low_gram = [product(inner_products(p), r) for p, r in zip(projectors, low, strict=True)]
        factors = measured_factors(
            low, direction, squares, low_gram, [job.state for job in jobs], group, amp.grad_scale, amp.found_inf,
            reduce=None if shards is None else shards.reduce,
        )  # fmt: skip
        return _Update(direction if residual.up else [], 1.0, grads, factors)
    if residual.constant:
        share = group["residual_scale"]
        direction = [group["scale"] * n - share * r for n, r in zip(direction, low, strict=True)]
        sign = -share if group["maximize"] else share
        factors = [matrix.new_full((matrix.shape[1],), sign) for matrix in low]
        if amp.grad_scale is not None:
            factors = [factor / amp.grad_scale for factor in factors]
        return _Update(direction, 1.0, grads, factors)
    if residual.sign and not misses_roundings(jobs[0]):
        return _Update(direction, group["scale"], grads, low=low)
    return _Update(direction, group["scale"])


def _rounding_seed(job: Job) -> int:
    """Of stochastic rounding; where a refresh begins the count of steps anew, one for each such period."""
    seed = seed_of(job.group["seed"], job.index, 0 if job.shards is None else job.shards.position)
    return (seed + int(job.state["refreshes"])) % 2**63 if job.group["moments"] == "reset" else seed


def _apply(jobs: list[Job], projectors: list[Tensor], update: _Update, step_factor: Tensor, amp: Amp) -> None:
    """Steps the weights."""
    group = jobs[0].group
    rate = rate_on(group["lr"], jobs[0].param.device)
    seeds = [_rounding_seed(job) for job in jobs]
    if int8_weight(jobs[0].param) is not None:
        step_int8_weights(jobs, projectors, update.direction, seeds, step_factor, rate, amp.found_inf)
        return
    ops.low_rank_apply(
        [job.weight for job in jobs],
        projectors if update.direction else [],
        update.direction,
        update.grads,
        update.factors,
        update.low,
        [job.state["compensation"] for job in jobs] if group["rounding"] == "kahan" else [],
        [job.state["step"] for job in jobs],
        seeds,
        step_factor,
        rate,
        amp.grad_scale,
        amp.found_inf,
        scale=update.scale,
        weight_decay=group["weight_decay"],
        decay_after=group["decay"] == "after",
        sign_scale=group["residual_scale"],
        rounding=_ROUNDING[group["rounding"]],
        maximize=group["maximize"],
    )


def _laid_out(tensor: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    if tensor.stride() == like.stride() and tensor.dtype == dtype:
        return tensor
    return torch.empty_like(like, dtype=dtype).copy_(tensor)
