"""Data for one optimizer step, and the step by the kernel and by the reference."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pykern.lowrank import ops
from pykern.reference import lowrank as reference

RULE = {
    "beta1": 0.9,
    "beta2": 0.99,
    "eps": 1e-6,
    "weight_decay": 0.1,
    "scale": 0.5,
    "decay_after": False,
    "corrected_eps": True,
    "scaled_residual": False,
    "maximize": False,
}
LR = 0.05


@dataclass
class Problem:
    """Moments are those of a step in midcourse, so that no direction hangs on the sign of a rounding."""

    param: Tensor
    grad: Tensor
    projector: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    residual_norm: Tensor | None
    right: bool
    step: int = 4

    @staticmethod
    def make(
        rows: int,
        columns: int,
        rank: int,
        *,
        right: bool,
        dtype=torch.float32,
        fira=False,
        norm=-1.0,
        orthonormal=True,
        seed=0,
        device="cpu",
    ) -> "Problem":
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        # Rounded to `dtype`, so that all computations start from the same numbers.
        def rounded(tensor):
            return tensor.to(dtype).to(device)

        moments = torch.float64 if dtype == torch.float64 else torch.float32
        shape = (rows, rank) if right else (rank, columns)
        basis = normal(columns if right else rows, rank)
        return Problem(
            rounded(normal(rows, columns)),
            rounded(normal(rows, columns)),
            rounded(torch.linalg.qr(basis)[0] if orthonormal else basis).contiguous(),
            rounded(normal(*shape)).to(moments),
            rounded(normal(*shape).square() + 0.5).to(moments),
            torch.tensor(norm, dtype=moments, device=device) if fira else None,
            right,
        )

    def kernel(self, **rule) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Runs the op on copies; returns the new parameter, moments and residual norm."""
        param, first, second = self.param.clone(), self.exp_avg.clone(), self.exp_avg_sq.clone()
        norm = None if self.residual_norm is None else self.residual_norm.clone()
        self.run(param, first, second, norm, **rule)
        return param, first, second, norm

    def run(self, param, first, second, norm, **rule) -> None:
        count = torch.tensor(float(self.step), device=param.device)
        ops.low_rank_adam_step(
            param,
            self.grad,
            self.projector,
            first,
            second,
            count,
            norm,
            torch.tensor(LR, dtype=torch.float64, device=param.device),
            right=self.right,
            **{**RULE, **rule},
        )
        assert count.item() == self.step + 1

    def defined(self, dtype=torch.float64, **rule) -> tuple[Tensor, Tensor, Tensor, float | None]:
        """The reference in `dtype` throughout, as PyTorch would compute it."""
        return reference.low_rank_adam_step(
            self.param.cpu().to(dtype),
            self.grad.cpu().to(dtype),
            self.projector.cpu().to(dtype),
            self.exp_avg.cpu().to(dtype),
            self.exp_avg_sq.cpu().to(dtype),
            self.step + 1,
            None if self.residual_norm is None else self.residual_norm.item(),
            lr=LR,
            right=self.right,
            **{**RULE, **rule},
        )

    def arguments(self) -> tuple[tuple, dict]:
        """Fresh arguments of the raw op."""
        positional = (
            self.param.clone(),
            self.grad.clone(),
            self.projector.clone(),
            self.exp_avg.clone(),
            self.exp_avg_sq.clone(),
            torch.tensor(float(self.step), device=self.param.device),
            None if self.residual_norm is None else self.residual_norm.clone(),
            torch.tensor(LR, dtype=torch.float64, device=self.param.device),
        )
        return positional, {"right": self.right, **RULE}
