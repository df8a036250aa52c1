"""When a subspace is chosen anew, and what becomes of the moments then."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..reference.lowrank import dequantize, quantize
from .bases import basis_of
from .matrices import Job
from .subspace import product

REFRESHES = ("every", "staggered", "lazy", "online")
"""every: on the multiples of `refresh_every`. staggered: likewise, but shifted for each matrix, so that the work is
spread over all steps; in the first one, when all need a basis, a projector that has a cheaper one in its place (`first`
in PROJECTORS) uses that, and takes its own turn within the next `refresh_every` steps. lazy: every, but the gap doubles
while the subspace stays (Q-GaLore, arXiv 2407.08296). online: in each step."""

SIMILARITIES = 5
SIMILARITY_KEPT = 0.4
"""Lazily, the gap doubles at a refresh where the last SIMILARITIES cosines between the old and the new first basis
vector are on average at least SIMILARITY_KEPT. Their signs are arbitrary, so the magnitudes count."""

HOST_STATE = ("next_refresh", "refreshes", "refresh_gap", "refresh_similarity")
"""What is read without waiting for a device."""


def refresh_state(group: dict) -> dict[str, Tensor]:
    """The state of a parameter before its first refresh: the step of the next one, and how many there were."""
    # Torch's default device may be another one.
    state = {name: torch.zeros((), dtype=torch.int64, device="cpu") for name in ("next_refresh", "refreshes")}
    if group["refresh"] == "lazy":
        state["refresh_gap"] = torch.tensor(group["refresh_every"], dtype=torch.int64, device="cpu")
        state["refresh_similarity"] = torch.full((SIMILARITIES,), -torch.inf, dtype=torch.float32, device="cpu")
    return state


def is_due(job: Job, done: int) -> bool:
    """Whether the basis of this parameter is to be chosen in the step after `done` steps."""
    return done >= int(job.state["next_refresh"])


def note_refresh(job: Job, done: int, before: Mapping[str, Tensor], share: float) -> None:
    """Writes down that there was a refresh, and when the next one is: on the multiples of the gap, also after one that
    came late.

    `before` is the old basis; `share` the part of the optimizer's matrices, by the work for them, that come first.
    """
    state, group = job.state, job.group
    gap, phase = 1 if group["refresh"] == "online" else group["refresh_every"], 0
    if group["refresh"] == "staggered":
        phase = 1 + min(int(share * gap), gap - 1)
    if group["refresh"] == "lazy":
        if int(state["refreshes"]) > 0:
            _note_similarity(job, before)
        gap = int(state["refresh_gap"])
    if group["moments"] == "reset" and int(state["refreshes"]) > 0:
        # The count of steps is zero again.
        done, phase = 0, 0
    state["next_refresh"].fill_(((done - phase) // gap + 1) * gap + phase)
    state["refreshes"].add_(1)


def _note_similarity(job: Job, before: Mapping[str, Tensor]) -> None:
    basis, queue = basis_of(job.group), job.state["refresh_similarity"]
    first, last = (basis.dense(job, state)[:, 0].float() for state in (before, job.state))
    queue.copy_(torch.cat([queue[1:], torch.nn.functional.cosine_similarity(first, last, dim=0).abs().cpu()[None]]))
    # A queue that is not full yet has a mean of minus infinity.
    if queue.mean() >= SIMILARITY_KEPT:
        job.state["refresh_gap"].mul_(2)


def _keep(job: Job, before: Mapping[str, Tensor]) -> None:
    """The moments stay as they are, now read in the new basis."""


def _reset(job: Job, before: Mapping[str, Tensor]) -> None:
    """The moments and the count of steps start anew."""
    for name, value in job.state.items():
        if name.startswith("exp_avg") or name == "step":
            value.zero_()


def _rotate(job: Job, before: Mapping[str, Tensor]) -> None:
    """m = T m and v = |T v| with T = P^T P_before: DCT-AdamW, arXiv 2505.17967."""
    turn = _turned(job, before)
    _write(job, "exp_avg", turn(_read(job, "exp_avg")))
    _write(job, "exp_avg_sq", turn(_read(job, "exp_avg_sq")), nonnegative=True)


def _rotate_variance(job: Job, before: Mapping[str, Tensor]) -> None:
    """m = T m, and v by the variance around it: LDAdam, arXiv 2410.16103.

    v = c2 |(T o T) (v / c2 - (m / c1)^2) + (T m / c1)^2| with the bias corrections c = 1 - beta^step.
    """
    first, second = _read(job, "exp_avg"), _read(job, "exp_avg_sq")
    if first is None or second is None:
        _rotate(job, before)
        return
    step = job.state["step"].double()
    # Before the first step there are no moments, and their corrections are zero.
    beta1, beta2 = job.group["betas"]
    correction1, correction2 = (torch.where(step > 0, 1 - beta**step, 1.0).to(first.dtype) for beta in (beta1, beta2))
    turned = _turned(job, before)(first)
    variance = _turned(job, before, torch.square)(second / correction2 - (first / correction1).square())
    _write(job, "exp_avg", turned)
    _write(job, "exp_avg_sq", correction2 * (variance + (turned / correction1).square()), nonnegative=True)


def _turned(
    job: Job, before: Mapping[str, Tensor], element: Callable[[Tensor], Tensor] = torch.positive
) -> Callable[[Tensor | None], Tensor | None]:
    """The rotation of a moment into the new basis, or both new bases, by matrices whose elements `element` maps."""
    left = element(basis_of(job.group).rotation(job, before))
    right = None
    if "other_projector" in before:
        right = element(product(before["other_projector"].mT, job.state["other_projector"]))

    def turn(moment: Tensor | None) -> Tensor | None:
        if moment is None:
            return None
        turned = product(left.to(moment.dtype), moment)
        return turned if right is None else product(turned, right.to(moment.dtype))

    return turn


def _read(job: Job, name: str) -> Tensor | None:
    """A moment in float32, or float64; None where the rule keeps none of that name."""
    value = job.state.get(name)
    if value is None:
        return None
    if value.dtype == torch.uint8:
        return dequantize(value, job.state[f"{name}_scale"], name == "exp_avg")
    return value.to(torch.promote_types(value.dtype, torch.float32))


def _write(job: Job, name: str, moment: Tensor | None, nonnegative: bool = False) -> None:
    if moment is None:
        return
    if nonnegative:
        moment = moment.abs()
    stored = job.state[name]
    if stored.dtype == torch.uint8:
        codes, scale = quantize(moment, name == "exp_avg")
        stored.copy_(codes)
        job.state[f"{name}_scale"].copy_(scale)
    else:
        stored.copy_(moment)


MOMENTS: dict[str, Callable[[Job, Mapping[str, Tensor]], None]] = {
    "keep": _keep,
    "rotate": _rotate,
    "rotate_variance": _rotate_variance,
    "reset": _reset,
}
"""What becomes of a parameter's moments at a refresh: a function of the job, whose state has the new basis already,
and of the old basis (and `other_projector`) as its format (lowrank.bases) keeps it. Row and column averages of
Adafactor stay where the others are rotated."""
