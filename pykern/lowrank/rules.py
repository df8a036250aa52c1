"""The inner rules: what turns the projected gradient R into a direction N, and keeps which moments."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from . import ops
from .matrices import Job
from .matrix_rules import Adafactor, NewtonSchulz

QUANT_BLOCK = 256
"""Neighbours in a row of 8-bit moments that share one scale."""

STATE_DTYPES = ("float32", "bfloat16", "8bit")


class InnerRule(Protocol):
    """One inner rule. All matrices are [rank, length], one per parameter; `group` is their parameter group.

    Attributes:
        default_momentum: of a group that names none; None where the rule has `betas` instead.
        state_dtypes: those of STATE_DTYPES that it can keep its moments in.
        columnwise: no column of R matters to another, so that a process can do with its shard's.
    """

    default_momentum: float | None
    state_dtypes: tuple[str, ...]
    columnwise: bool

    def init(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device, group: dict) -> dict[str, Tensor]:
        """The state of one parameter beside its step; `dtype` is that of the low-rank gradient."""
        ...

    def directions(
        self, low: list[Tensor], jobs: list[Job], group: dict, found_inf: Tensor | None
    ) -> tuple[list[Tensor], Tensor]:
        """Advances the jobs' states; the directions, and the factors on the learning rate, float64 [matrices]."""
        ...


@dataclass(frozen=True)
class Elementwise:
    """A rule of the op low_rank_rule, by its number there."""

    number: int
    moments: tuple[str, ...]
    default_momentum: float | None = None

    state_dtypes = STATE_DTYPES
    columnwise = True

    def init(self, shape, dtype, device, group) -> dict[str, Tensor]:
        state = {}
        eight_bit = group["state_dtype"] == "8bit" and dtype != torch.float64
        stored = torch.bfloat16 if group["state_dtype"] == "bfloat16" and dtype != torch.float64 else dtype
        for name in self.moments:
            state[name] = torch.zeros(shape, dtype=torch.uint8 if eight_bit else stored, device=device)
            if eight_bit:
                blocks = -(-shape[1] // QUANT_BLOCK)
                state[f"{name}_scale"] = torch.zeros(shape[0], blocks, dtype=torch.float32, device=device)
        return state

    def directions(self, low, jobs, group, found_inf) -> tuple[list[Tensor], Tensor]:
        states = [job.state for job in jobs]
        direction = [torch.empty_like(matrix) for matrix in low]
        factor = torch.empty(len(low), dtype=torch.float64, device=low[0].device)
        beta1, beta2 = group["betas"]
        if self.default_momentum is not None:
            beta1 = group["momentum"]
        lists = (
            [state[name] for state in states] if name in states[0] else []
            for name in ("exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale", "step")
        )
        ops.low_rank_rule(
            low, *lists, direction, factor, found_inf,
            rule=self.number, beta1=beta1, beta2=beta2, eps=group["eps"], corrected_eps=group["corrected_eps"],
        )  # fmt: skip
        return direction, factor


RULES: dict[str, InnerRule] = {
    "adamw": Elementwise(0, ("exp_avg", "exp_avg_sq")),
    "adabelief": Elementwise(1, ("exp_avg", "exp_avg_sq")),
    "lion": Elementwise(2, ("exp_avg",)),
    "momentum": Elementwise(3, ("exp_avg",), default_momentum=0.9),
    "adafactor": Adafactor(),
    "newton_schulz": NewtonSchulz(),
}
