"""LDAdam's parts: a subspace that follows the momentum as well as the gradient, and the momentum that it loses."""

from torch import Tensor

from .bases import basis_of
from .matrices import Job
from .subspace import product


def momentum_outside(job: Job) -> Tensor:
    """up(m) [n, length] in the basis of the state, of the dtype of the moments."""
    basis = basis_of(job.group).dense(job, job.state)
    moment = job.state["exp_avg"]
    return product(basis.to(moment.dtype), moment)


def remembered(job: Job, source: Tensor, done: int, factor: float | Tensor) -> Tensor:
    """What the projector is to look at: memory * up(m) / (1 - beta1^done) + (1 - memory) * factor * source.

    `source` is [n, length], of shards with all of n; `factor` makes of it what the moments are moments of.
    """
    memory = job.group["projector_memory"]
    if memory == 0 or done == 0:
        return source
    momentum = momentum_outside(job).mul_(memory / (1 - job.group["betas"][0] ** done))
    # A factor without an axis takes the dtype of what it multiplies: float16 would round it.
    return momentum.add_(source.to(momentum.dtype) * ((1 - memory) * factor))


def keep_lost_momentum(job: Job, before: Tensor, source: Tensor) -> None:
    """source += beta1 / (1 - beta1) * (up(m) before the refresh - up(m) after it).

    That is orthogonal to the new basis where the moments were rotated into it, so the projection of this step does
    not see it yet.
    """
    beta1 = job.group["betas"][0]
    source.add_(job.own(before.sub_(momentum_outside(job))), alpha=beta1 / (1 - beta1))
