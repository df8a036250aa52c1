"""The published low-rank optimizers as loops over one weight, each written from its own formula.

Every method is a function (param, gradient, state, choose, lr, **options) -> param. The weight and its gradient
are [n, length], the compressed axis first; `state` begins as an empty dict and is kept by the method; `choose` is
called with the matrix [n, length] that the method looks at whenever it wants a basis, and returns P [n, rank].
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Choose = Callable[[Tensor], Tensor]
Stored = Callable[[Tensor, bool], Tensor]


def galore_adamw(
    param, gradient, state, choose: Choose, lr, *, every, scale, betas=(0.9, 0.999), eps=1e-8, decay=0.0,
    decay_after=False, stored: Stored | None = None,
):  # fmt: skip
    """GaLore: R = P^T G, W = (1 - lr decay) W - lr scale P Adam(R); the moments are kept when P changes.

    `stored` gives a moment (with a sign, or without) as it comes back from where it is kept in fewer bits.
    """
    _begin(state, gradient, choose, every)
    update = lr * scale * state["basis"] @ _adam(state["basis"].mT @ gradient, state, betas, eps)
    if stored is not None:
        state["first"], state["second"] = stored(state["first"], True), stored(state["second"], False)
    if decay_after:
        return (param - update) * (1 - lr * decay)
    return param * (1 - lr * decay) - update


def galore_adafactor(param, gradient, state, choose: Choose, lr, *, every, scale, momentum=0.0, decay=0.0):
    """GaLore over Adafactor: the root of an outer product of means takes the place of sqrt(v), U has RMS 1 at most."""
    step = _begin(state, gradient, choose, every)
    low = state["basis"].mT @ gradient
    share = step**-0.8
    squares = low.square() + 1e-30
    rows = state["rows"] = (1 - share) * state.get("rows", 0.0) + share * squares.mean(dim=1)
    columns = state["columns"] = (1 - share) * state.get("columns", 0.0) + share * squares.mean(dim=0)
    update = low / (torch.outer(rows, columns) / rows.mean()).sqrt()
    update = lr * update / max(1.0, update.square().mean().sqrt().item())
    if momentum > 0:
        update = state["average"] = momentum * state.get("average", 0.0) + (1 - momentum) * update
    return param * (1 - lr * decay) - scale * state["basis"] @ update


def fira_adamw(param, gradient, state, choose: Choose, lr, *, every, scale, betas=(0.9, 0.999), eps=1e-8, decay=0.0):
    """Fira: GaLore, and what P misses of G, column by column in the proportion in which Adam scales P's part."""
    _begin(state, gradient, choose, every)
    basis = state["basis"]
    low = basis.mT @ gradient
    normalized = _adam(low, state, betas, eps)
    residual = (gradient - basis @ low) * (normalized.norm(dim=0) / (low.norm(dim=0) + 1e-8))
    update = scale * basis @ normalized + _limited(residual, state)
    return param * (1 - lr * decay) - lr * update


def apollo_adamw(
    param, gradient, state, choose: Choose, lr, *, every, scale, per_tensor=False, scale_first=False,
    betas=(0.9, 0.999), eps=1e-8, decay=0.0,
):  # fmt: skip
    """APOLLO: G itself, each column (or the whole) scaled as Adam scales its random projection, times sqrt(scale)."""
    _begin(state, gradient, choose, every)
    low = state["basis"].mT @ gradient
    normalized = _adam(low, state, betas, eps)
    dim = None if per_tensor else 0
    update = gradient * (
        torch.linalg.vector_norm(normalized, dim=dim) / (torch.linalg.vector_norm(low, dim=dim) + 1e-8)
    )
    if scale_first:
        update = _limited(math.sqrt(scale) * update, state)
    else:
        update = math.sqrt(scale) * _limited(update, state)
    return param * (1 - lr * decay) - lr * update


def dct_adamw(
    param, gradient, state, choose: Choose, lr, *, every, feedback=False, rotate=False, betas=(0.9, 0.999), eps=1e-8,
    decay=0.0,
):  # fmt: skip
    """DCT-AdamW: GaLore with columns of the cosine transform, error feedback and rotated moments as one likes."""
    seen = gradient + state.get("error", 0.0)
    before = state.get("basis")
    _begin(state, seen, choose, every)
    basis = state["basis"]
    if rotate and before is not None and before is not basis:
        rotation = basis.mT @ before
        state["first"], state["second"] = rotation @ state["first"], (rotation @ state["second"]).abs()
    low = basis.mT @ seen
    if feedback:
        state["error"] = seen - basis @ low
    return param * (1 - lr * decay) - lr * basis @ _adam(low, state, betas, eps)


def trion(param, gradient, state, choose: Choose, lr, *, every, momentum=0.95, scale=1.0, decay=0.0):
    """Trion: the part of the momentum M that P sees is orthogonalised, and only a share of it is forgotten."""
    seen = state.get("momentum", 0.0) + gradient
    _begin(state, seen, choose, every)
    basis = state["basis"]
    low = basis.mT @ seen
    state["momentum"] = seen - (1 - momentum) * basis @ low
    return param * (1 - lr * decay) - lr * scale * basis @ newton_schulz(low)


def ldadamw(
    param, gradient, state, choose: Choose, lr, *, memory=0.908, feedback=True, betas=(0.908, 0.99), eps=1e-8, decay=0.0
):
    """LDAdam: a basis a step that follows momentum and gradient, moments moved into it, and both losses fed back."""
    beta1, beta2 = betas
    seen = gradient + state.get("error", 0.0)
    done, before = state.get("step", 0), state.get("basis")
    error = torch.zeros_like(param)
    if before is None:
        state.update(step=1, basis=choose(seen))
    else:
        first, second = state["first"], state["second"]
        mean = first / (1 - beta1**done)
        basis = choose(memory * before @ mean + (1 - memory) * seen)
        rotation = basis.mT @ before
        variance = second / (1 - beta2**done) - mean.square()
        moved = rotation.square() @ variance + (rotation @ mean).square()
        error = beta1 / (1 - beta1) * (before @ first - basis @ rotation @ first)
        state.update(step=done + 1, basis=basis, first=rotation @ first, second=(1 - beta2**done) * moved.abs())
    basis = state["basis"]
    low = basis.mT @ seen
    if feedback:
        state["error"] = error + seen - basis @ low
    return param * (1 - lr * decay) - lr * basis @ _adam(low, state, betas, eps)


def frugal(
    param, gradient, state, choose: Choose, lr, *, every, rule="adamw", residual="sign", residual_scale=1.0,
    betas=(0.9, 0.999), momentum=0.9, eps=1e-8, decay=0.0,
):  # fmt: skip
    """FRUGAL: a rule with state inside the subspace, one without outside it; a new subspace starts all states anew."""
    count = state["count"] = state.get("count", 0) + 1
    if (count - 1) % every == 0:
        state.clear()
        state.update(count=count, basis=choose(gradient), step=0)
    state["step"] += 1
    basis = state["basis"]
    low = basis.mT @ gradient
    if rule == "adamw":
        inside = _adam(low, state, betas, eps)
    elif rule == "lion":
        average = state.get("first", 0.0)
        inside = (betas[0] * average + (1 - betas[0]) * low).sign()
        state["first"] = betas[1] * average + (1 - betas[1]) * low
    else:
        inside = state["first"] = momentum * state.get("first", 0.0) + low
    outside = gradient - basis @ low
    outside = {"sign": outside.sign(), "sgd": outside, "none": 0.0}[residual]
    return param * (1 - lr * decay) - lr * (basis @ inside + residual_scale * outside)


def flora(param, gradient, state, choose: Choose, lr, *, every, momentum=0.9, decay=0.0):
    """Flora: a momentum that is kept compressed by a random P, and moved to a new one by way of the whole matrix."""
    before = state.get("basis")
    _begin(state, gradient, choose, every)
    basis = state["basis"]
    if before is not None and before is not basis:
        state["first"] = basis.mT @ (before @ state["first"])
    state["first"] = momentum * state.get("first", 0.0) + (1 - momentum) * basis.mT @ gradient
    return param * (1 - lr * decay) - lr * basis @ state["first"]


def grass_adamw(param, gradient, state, choose: Choose, lr, *, every, scale, betas=(0.9, 0.999), eps=1e-8, decay=0.0):
    """Grass: GaLore with rows of G for a subspace, and moments that start anew with it."""
    options = {"rule": "adamw", "residual": "none", "betas": betas, "eps": eps}
    step = frugal(torch.zeros_like(param), gradient, state, choose, 1.0, every=every, **options)
    return param * (1 - lr * decay) + lr * scale * step


def newton_schulz(matrix: Tensor, steps: int = 5) -> Tensor:
    """Singular values s / |s| through `steps` times 3.4445 s - 4.775 s^3 + 2.0315 s^5."""
    matrix = matrix / (matrix.norm() + 1e-7)
    for _ in range(steps):
        gram = matrix @ matrix.mT
        matrix = 3.4445 * matrix - 4.775 * gram @ matrix + 2.0315 * gram @ gram @ matrix
    return matrix


def _begin(state: dict, seen: Tensor, choose: Choose, every: int) -> int:
    """Counts the step and chooses a basis if it is time to."""
    done = state.get("step", 0)
    if done % every == 0:
        state["basis"] = choose(seen)
    state["step"] = done + 1
    return done + 1


def _adam(low: Tensor, state: dict, betas: tuple[float, float], eps: float) -> Tensor:
    step = state["step"]
    first = state["first"] = betas[0] * state.get("first", 0.0) + (1 - betas[0]) * low
    second = state["second"] = betas[1] * state.get("second", 0.0) + (1 - betas[1]) * low.square()
    return (first / (1 - betas[0] ** step)) / ((second / (1 - betas[1] ** step)).sqrt() + eps)


def _limited(update: Tensor, state: dict) -> Tensor:
    """`update` with its norm at most 1.01 times that of the step before."""
    norm = update.norm().item()
    if "norm" in state:
        limiter = max(norm / (state["norm"] + 1e-8) / 1.01, 1.0)
        update, norm = update / limiter, norm / limiter
    state["norm"] = norm
    return update
