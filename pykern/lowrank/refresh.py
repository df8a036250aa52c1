"""When a subspace is chosen anew, and what becomes of the moments then."""

from collections.abc import Callable, Mapping

from torch import Tensor

from .matrices import Job

REFRESHES = ("every", "staggered")


def is_due(job: Job, done: int) -> bool:
    """Whether the basis of this parameter is to be chosen in the step after `done` steps."""
    return done >= int(job.state["next_refresh"])


def note_refresh(job: Job, done: int, parameters: int) -> None:
    """Writes down when the basis is to be chosen next: on the multiples of the gap, also after one that came late.

    Staggered, the multiples are shifted, evenly over the optimizer's `parameters`.
    """
    gap = job.group["refresh_every"]
    phase = job.index * gap // parameters if job.group["refresh"] == "staggered" else 0
    job.state["next_refresh"].fill_(((done - phase) // gap + 1) * gap + phase)


def _keep(job: Job, before: Mapping[str, Tensor]) -> None:
    """The moments stay as they are, now read in the new basis."""


def _reset(job: Job, before: Mapping[str, Tensor]) -> None:
    """The moments and the count of steps start anew."""
    for name, value in job.state.items():
        if name.startswith("exp_avg") or name == "step":
            value.zero_()


MOMENTS: dict[str, Callable[[Job, Mapping[str, Tensor]], None]] = {"keep": _keep, "reset": _reset}
"""What becomes of a parameter's moments at a refresh: a function of the job, whose state has the new basis already,
and of the old basis as its format (lowrank.bases) keeps it."""
