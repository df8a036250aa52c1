"""Inner rules that see a low-rank gradient as a matrix, where those of the op low_rank_rule see single elements."""

from dataclasses import dataclass

import torch
from torch import Tensor


SQUARE_FLOOR = 1e-30
"""Adafactor adds it to squares, so that a zero row has a root."""

NORM_FLOOR = 1e-7
"""Newton-Schulz adds it to the norm it divides by, so that a zero matrix stays zero."""

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the odd quintic that takes singular values in (0, 1] to about [0.7, 1.2] in five steps."""

ITERATIONS = 5

SHAPE_SCALES = {
    "original": lambda rows, columns: max(1.0, rows / columns) ** 0.5,
    "match_rms_adamw": lambda rows, columns: 0.2 * max(rows, columns) ** 0.5,
    "spectral": lambda rows, columns: (rows / columns) ** 0.5,
    "none": lambda rows, columns: 1.0,
}
"""Factors that fit an orthogonal direction to its weight [rows, columns]; the first two are torch.optim.Muon's."""


@dataclass(frozen=True)
class Adafactor:
    """Second moments kept as row and column means; the update's root mean square held to 1.

    k counts steps from 1, beta2 = 1 - k^-0.8, r and c are running means of R^2 + 1e-30 over rows and columns::

        U = R / sqrt(r c / mean(r)),  U = U / max(1, RMS(U)),  M = momentum M + (1 - momentum) lr U

    and the direction is M / lr, or U without momentum. With the rate inside M an old update keeps the rate that it was
    made at. At a rate of zero nothing moves.
    """

    default_momentum = 0.0
    state_dtypes = ("float32",)
    columnwise = False

    def init(self, shape, dtype, device, group) -> dict[str, Tensor]:
        state = {
            "exp_avg_sq_row": torch.zeros(shape[0], dtype=dtype, device=device),
            "exp_avg_sq_col": torch.zeros(shape[1], dtype=dtype, device=device),
        }
        if group["momentum"] > 0:
            state["exp_avg"] = torch.zeros(shape, dtype=dtype, device=device)
        return state

    def directions(self, low, jobs, group, found_inf) -> tuple[list[Tensor], Tensor]:
        rate, momentum = group["lr"], group["momentum"]
        results = []
        for matrix, job in zip(low, jobs, strict=True):
            state = job.state
            beta2 = (1 - (state["step"] + 1).double() ** -0.8).to(matrix.dtype)
            squares = matrix.square() + SQUARE_FLOOR
            rows = torch.lerp(_row_sums(squares) / matrix.shape[1], state["exp_avg_sq_row"], beta2)
            columns = torch.lerp(squares.mean(dim=0), state["exp_avg_sq_col"], beta2)
            update = matrix * (rows / rows.mean()).rsqrt().unsqueeze(1) * columns.rsqrt()
            mean_square = _row_sums(update.square()).sum() / update.numel()
            update = update / mean_square.sqrt().clamp_min(1.0)
            advanced = {"step": state["step"] + 1, "exp_avg_sq_row": rows, "exp_avg_sq_col": columns}
            if momentum > 0:
                scaled = update * rate if isinstance(rate, float | int) else update * rate.to(update.dtype)
                average = momentum * state["exp_avg"] + (1 - momentum) * scaled
                advanced["exp_avg"] = average
                update = _over_rate(average, rate)
            results.append(_advance(state, advanced, update, found_inf))
        return results, _ones(low)


@dataclass(frozen=True)
class NewtonSchulz:
    """Momentum, orthogonalised: the singular values of the direction are all about one.

    M = momentum M + (1 - momentum) R, and X = M, or (1 - momentum) R + momentum M with `nesterov`. Then
    X = X / (|X| + 1e-7), five times X = a X + (b A + c A^2) X with A = X X^T, and the direction is X times one of
    SHAPE_SCALES. Without momentum there is no state.
    """

    default_momentum = 0.95
    state_dtypes = ("float32",)
    columnwise = False

    def init(self, shape, dtype, device, group) -> dict[str, Tensor]:
        return {"exp_avg": torch.zeros(shape, dtype=dtype, device=device)} if group["momentum"] > 0 else {}

    def directions(self, low, jobs, group, found_inf) -> tuple[list[Tensor], Tensor]:
        momentum, scale_of = group["momentum"], SHAPE_SCALES[group["shape_scale"]]
        averaged = []
        for matrix, job in zip(low, jobs, strict=True):
            advanced = {"step": job.state["step"] + 1}
            if momentum > 0:
                average = momentum * job.state["exp_avg"] + (1 - momentum) * matrix
                advanced["exp_avg"] = average
                matrix = (1 - momentum) * matrix + momentum * average if group["nesterov"] else average
            averaged.append(_advance(job.state, advanced, matrix, found_inf))
        results = orthogonalized(averaged)
        return [x * scale_of(job.rows, job.columns) for x, job in zip(results, jobs, strict=True)], _ones(low)


def orthogonalized(matrices: list[Tensor]) -> list[Tensor]:
    """Each matrix [rank, length], rank <= length, with its singular values brought near one; zero stays zero."""
    results: list[Tensor] = [None] * len(matrices)
    # Matrices of one shape share their products: a model has many of a few shapes.
    shapes: dict[torch.Size, list[int]] = {}
    for index, matrix in enumerate(matrices):
        shapes.setdefault(matrix.shape, []).append(index)
    a, b, c = COEFFICIENTS
    for indices in shapes.values():
        x = torch.stack([matrices[index] for index in indices])
        norm = _row_sums(x.square()).sum(dim=1).sqrt()
        x = x / (norm + NORM_FLOOR).view(-1, 1, 1)
        for _ in range(ITERATIONS):
            gram = x @ x.mT
            x = a * x + torch.baddbmm(gram, gram, gram, beta=b, alpha=c) @ x
        for index, result in zip(indices, x, strict=True):
            results[index] = result
    return results


def _row_sums(matrix: Tensor) -> Tensor:
    """Sums over the last axis, in pieces too short for PyTorch to give each of its threads a part of a single row."""
    return sum(piece.sum(dim=-1) for piece in matrix.split(8192, dim=-1))


def _advance(state: dict, advanced: dict[str, Tensor], direction: Tensor, found_inf: Tensor | None) -> Tensor:
    """Writes `advanced` to the state and gives the direction; where found_inf is set, nothing and zeros."""
    if found_inf is None:
        for name, value in advanced.items():
            state[name].copy_(value)
        return direction
    stop = found_inf.reshape(()) != 0
    for name, value in advanced.items():
        state[name].copy_(torch.where(stop, state[name], value))
    return torch.where(stop, 0.0, direction)


def _over_rate(average: Tensor, rate: float | Tensor) -> Tensor:
    if isinstance(rate, Tensor):
        rate = rate.to(average.dtype)
        return torch.where(rate == 0, 0.0, average / rate)
    return average / rate if rate != 0 else torch.zeros_like(average)


def _ones(low: list[Tensor]) -> Tensor:
    return torch.ones(len(low), dtype=torch.float64, device=low[0].device)
