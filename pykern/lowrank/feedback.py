"""Error feedback: what the subspace missed is kept and added to the next gradient.

The buffer is of the weight's size. In the weight's dtype it is what a step projects, with the gradient added in place.
In 8 or 4 bits (lowrank.quantized) it is added to the gradient in place, so that `.grad` is that during a step and what
was missed after it; then it is quantised anew. Its groups lie along the compressed axis, so that a shard of the other
axis has whole groups.
"""

import torch
from torch import Tensor

from . import ops
from .amp import Amp
from .matrices import Job
from .quantized import dequantize_groups, parts, quantize_groups, quantized_zeros

FEEDBACK_DTYPES = ("weight", "8bit", "4bit")

_BITS = {"8bit": 8, "4bit": 4}


def feedback_state(job: Job) -> dict[str, Tensor]:
    """The buffer before the first step."""
    bits = _BITS.get(job.group["feedback_dtype"])
    if bits is None:
        return {"error": torch.zeros_like(job.weight)}
    if job.partial:
        raise NotImplementedError(
            f'feedback_dtype: expected "weight" for a weight in shards as {job.shards.placements}, which would cut the '
            f"groups of {job.group['feedback_dtype']!r}"
        )
    zeros = quantized_zeros(job.length, job.compressed, bits, job.param.device)
    return {f"error_{name}": value for name, value in zeros.items()}


def with_feedback(jobs: list[Job], amp: Amp) -> list[Tensor]:
    """Gradient plus buffer, of each job: the buffer's memory, or the gradient's where that is in few bits."""
    group = jobs[0].group
    bits = _BITS.get(group["feedback_dtype"])
    if bits is None:
        return [_added(job, amp) for job in jobs]
    states, values = [job.state for job in jobs], [job.grad.mT for job in jobs]
    dequantize_groups(*parts(states, "error"), values, amp.grad_scale, bits=bits, adds=True, maximize=group["maximize"])
    return [job.grad for job in jobs]


def _added(job: Job, amp: Amp) -> Tensor:
    error = job.state["error"]
    # By a scale of one axis, so that the quotient is of float32: float16 has no number as large as the first scale.
    grad = job.grad if amp.grad_scale is None else job.grad / amp.grad_scale.reshape(1)
    if amp.found_inf is not None:
        grad = torch.where(amp.found_inf != 0, 0.0, grad)
    return error.sub_(grad) if job.group["maximize"] else error.add_(grad)


def keep_missed(jobs: list[Job], sources: list[Tensor], projectors: list[Tensor], low: list[Tensor], amp: Amp) -> None:
    """buffer = source - share * up(R) where the step is taken; `sources`, which `with_feedback` gave, are scratch."""
    group, device = jobs[0].group, jobs[0].param.device
    ops.low_rank_apply(
        sources,
        projectors,
        low,
        [],
        [],
        [],
        [],
        [job.state["step"] for job in jobs],
        [0] * len(jobs),
        torch.ones(len(jobs), dtype=torch.float64, device=device),
        torch.ones((), dtype=torch.float64, device=device),
        None,
        amp.found_inf,
        scale=group["feedback_share"],
        weight_decay=0.0,
        decay_after=False,
        sign_scale=0.0,
        rounding=0,
        maximize=False,
    )
    bits = _BITS.get(group["feedback_dtype"])
    if bits is not None:
        states, values = [job.state for job in jobs], [source.mT for source in sources]
        quantize_groups(values, *parts(states, "error"), amp.found_inf, bits=bits)
