"""How a basis is kept in a parameter's state, and how a step gets it back: each format a row of a table."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from . import dct
from .matrices import Job
from .projectors import PROJECTORS
from .quantized import dequantize_groups, parts, quantize_groups, quantized_zeros
from .subspace import product

PROJECTOR_FORMATS = ("dense", "int8", "int4")
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


@dataclass(frozen=True)
class Grouped:
    """P in few bits (lowrank.quantized), its groups along the basis vectors: codes of [rank, n], for Q-GaLore.

    Takes 8.25 or 4.25 bits an element; P in the weight's dtype lives during a step.
    """

    bits: int
    exact = False

    def init(self, job):
        zeros = quantized_zeros(job.rank, job.compressed, self.bits, job.param.device)
        return {f"projector_{name}": value for name, value in zeros.items()}

    def store(self, job, chosen):
        quantize_groups([chosen.mT], *parts([job.state], "projector"), None, bits=self.bits)

    def dense(self, job, state):
        return self.dense_all([job], [state])[0]

    def dense_all(self, jobs: list[Job], states: list[Mapping[str, Tensor]]) -> list[Tensor]:
        """P of many, in one call."""
        bases = [torch.empty(job.compressed, job.rank, dtype=job.param.dtype, device=job.param.device) for job in jobs]
        values = [basis.mT for basis in bases]
        dequantize_groups(*parts(states, "projector"), values, None, bits=self.bits, adds=False, maximize=False)
        return bases

    def rotation(self, job, before):
        return product_of(self, job, before)


def product_of(basis: BasisFormat, job: Job, before: Mapping[str, Tensor]) -> Tensor:
    """The rotation between two bases by their product."""
    wide = torch.promote_types(job.param.dtype, torch.float32)
    return product(basis.dense(job, job.state).mT.to(wide), basis.dense(job, before).to(wide))


class Indices(ABC):
    """Which rows of a fixed orthonormal matrix the columns of P are; int64, -1 without a basis.

    What is chosen again keeps its place among them, so that moments which stay where they are stay with their vector;
    the others fill the places that become free.
    """

    exact = True

    def init(self, job):
        return {"projector_indices": torch.full((job.rank,), -1, dtype=torch.int64, device=job.param.device)}

    def store(self, job, chosen):
        indices = job.state["projector_indices"]
        same = indices[:, None] == chosen
        stays, known = same.any(dim=1), same.any(dim=0)
        # Stable sorts bring the free places, and what is new, to the front: no mask whose count a device must tell.
        free, new = (taken.to(torch.uint8).sort(stable=True).indices for taken in (stays, known))
        indices.scatter_(0, free, torch.where(stays[free], indices[free], chosen[new]))

    def dense(self, job, state):
        indices = state["projector_indices"]
        return self.columns(indices.clamp_min(0), job).mul_(indices >= 0)

    def rotation(self, job, before):
        # Rows of an orthonormal matrix: 1 where they are the same, and exact whatever P is rounded to.
        after, before = job.state["projector_indices"], before["projector_indices"]
        return (after[:, None] == before).to(torch.promote_types(job.param.dtype, torch.float32))

    @abstractmethod
    def columns(self, indices: Tensor, job: Job) -> Tensor:
        """P [n, rank] of these rows; each matrix has its own way."""


class Cosines(Indices):
    """Vectors of the DCT-II."""

    def columns(self, indices, job):
        return dct.vectors(indices, job.compressed, job.param.dtype)


class Coordinates(Indices):
    """Unit vectors: rows of the weight and the gradient themselves."""

    def columns(self, indices, job):
        unit = torch.zeros(job.compressed, indices.shape[0], dtype=job.param.dtype, device=indices.device)
        return unit.scatter_(0, indices[None], 1.0)


BASES: dict[str, BasisFormat] = {
    "dense": Dense(),
    "int8": Grouped(8),
    "int4": Grouped(4),
    "dct": Cosines(),
    "rows": Coordinates(),
}


def basis_of(group: dict) -> BasisFormat:
    """The format of this group's bases: its projector's own, else the one that the group chose."""
    own = PROJECTORS[group["projector"]].basis if group["projector"] is not None else None
    return BASES[own or group["projector_format"]]


def picks_rows(job: Job) -> bool:
    """Whether ops take the rows that P picks in its place: its columns are unit vectors, and no row is elsewhere."""
    return isinstance(basis_of(job.group), Coordinates) and not job.partial


def rows_or_bases(jobs: list[Job]) -> list[Tensor]:
    """What low_rank_project takes of jobs of one group: the rows that are picked, or this process's rows of P."""
    if picks_rows(jobs[0]):
        return [job.state["projector_indices"] for job in jobs]
    return [job.own(basis) for job, basis in zip(jobs, dense_bases(jobs), strict=True)]


def dense_bases(jobs: list[Job]) -> list[Tensor]:
    """P of jobs of one group."""
    basis = basis_of(jobs[0].group)
    if isinstance(basis, Grouped):
        return basis.dense_all(jobs, [job.state for job in jobs])
    return [basis.dense(job, job.state) for job in jobs]
