"""How a basis is kept in a parameter's state, and how a step gets it back: each format a row of a table."""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from .matrices import Job
from .projectors import PROJECTORS

PROJECTOR_FORMATS = ("dense",)
"""What a group may choose for projectors that give vectors; those that give indices have formats of their own."""


class BasisFormat(Protocol):
    """One format.

    Attributes:
        exact: what comes back is what went in, up to the weight's dtype; else an orthonormal basis is none any more.
    """

    exact: bool

    def init(self, job: Job) -> dict[str, Tensor]:
        """The state of a parameter that has no basis yet; `dense` makes zeros of it."""
        ...

    def store(self, job: Job, chosen: Tensor) -> None:
        """Writes into job.state, in place, what a projector's `choose` gave."""
        ...

    def dense(self, job: Job, state: Mapping[str, Tensor]) -> Tensor:
        """P [n, rank] in the weight's dtype, of job.state or of an earlier copy of what `init` named."""
        ...

    def rotation(self, job: Job, before: Mapping[str, Tensor]) -> Tensor:
        """T = P^T P_before [rank, rank], of the dtype of the moments."""
        ...


class Dense:
    """P itself, in the weight's dtype."""

    exact = True

    def init(self, job):
        return {"projector": torch.zeros(job.compressed, job.rank, dtype=job.param.dtype, device=job.param.device)}

    def store(self, job, chosen):
        job.state["projector"].copy_(chosen)

    def dense(self, job, state):
        return state["projector"]

    def rotation(self, job, before):
        return product_of(self, job, before)


def product_of(basis: BasisFormat, job: Job, before: Mapping[str, Tensor]) -> Tensor:
    """The rotation between two bases by their product."""
    wide = torch.promote_types(job.param.dtype, torch.float32)
    return basis.dense(job, job.state).mT.to(wide) @ basis.dense(job, before).to(wide)


BASES: dict[str, BasisFormat] = {"dense": Dense()}


def basis_of(group: dict) -> BasisFormat:
    """The format of this group's bases: its projector's own, else the one that the group chose."""
    own = PROJECTORS[group["projector"]].basis if group["projector"] is not None else None
    return BASES[own or group["projector_format"]]
