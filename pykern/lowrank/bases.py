"""How a basis is kept in a parameter's state, and how a step gets it back: each format a row of a table."""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from . import dct
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


class Indices:
    """Which rows of a fixed orthonormal matrix the columns of P are; int64, -1 without a basis."""

    exact = True

    def init(self, job):
        return {"projector_indices": torch.full((job.rank,), -1, dtype=torch.int64, device=job.param.device)}

    def store(self, job, chosen):
        job.state["projector_indices"].copy_(chosen)

    def dense(self, job, state):
        indices = state["projector_indices"]
        return self.columns(indices.clamp_min(0), job).mul_(indices >= 0)

    def rotation(self, job, before):
        # Rows of an orthonormal matrix: 1 where they are the same, and exact whatever P is rounded to.
        after, before = job.state["projector_indices"], before["projector_indices"]
        return (after[:, None] == before).to(torch.promote_types(job.param.dtype, torch.float32))

    def columns(self, indices: Tensor, job: Job) -> Tensor:
        raise NotImplementedError


class Cosines(Indices):
    """Vectors of the DCT-II."""

    def columns(self, indices, job):
        return dct.vectors(indices, job.compressed, job.param.dtype)


class Coordinates(Indices):
    """Unit vectors: rows of the weight and the gradient themselves."""

    def columns(self, indices, job):
        unit = torch.zeros(job.compressed, indices.shape[0], dtype=job.param.dtype, device=indices.device)
        return unit.scatter_(0, indices[None], 1.0)


BASES: dict[str, BasisFormat] = {"dense": Dense(), "dct": Cosines(), "rows": Coordinates()}


def basis_of(group: dict) -> BasisFormat:
    """The format of this group's bases: its projector's own, else the one that the group chose."""
    own = PROJECTORS[group["projector"]].basis if group["projector"] is not None else None
    return BASES[own or group["projector_format"]]
