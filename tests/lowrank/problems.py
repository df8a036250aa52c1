"""Data for one optimizer step, and the step by the kernel and by the reference."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pykern.lowrank import ops
from pykern.reference import lowrank as reference, lowrank_parts as parts

RULE = {
    "beta1": 0.9,
    "beta2": 0.99,
    "eps": 1e-6,
    "weight_decay": 0.1,
    "decay_after": False,
    "corrected_eps": True,
    "maximize": False,
}
SUBSPACE = {
    "scale": 0.5,
    "removed": 1.0,
    "growth": 1.01,
    "zero_norm_limits": False,
    "amplitude": 1.0,
    "amplitude_first": False,
    "orthonormal": False,
}
RESIDUALS = ("none", "fira", "apollo_channel", "apollo_tensor")
LR = 0.05


@dataclass
class Problem:
    """One matrix [n, length]. Moments are those of a step in midcourse, so that no direction hangs on the sign of a
    rounding."""

    param: Tensor
    grad: Tensor
    projector: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    residual_norm: Tensor | None
    residual: str
    step: int = 4

    @staticmethod
    def make(
        n: int,
        length: int,
        rank: int,
        *,
        right: bool = False,
        dtype=torch.float32,
        residual="none",
        norm: float | None = -1.0,
        orthonormal=True,
        seed=0,
        device="cpu",
    ) -> "Problem":
        """`right`: the unit stride is along n."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        # Rounded to `dtype`, so that all computations start from the same numbers.
        def rounded(tensor):
            return tensor.to(dtype).to(device)

        def matrix():
            return rounded(normal(length, n)).mT if right else rounded(normal(n, length))

        moments = torch.float64 if dtype == torch.float64 else torch.float32
        basis = normal(n, rank)
        return Problem(
            matrix(),
            matrix(),
            rounded(torch.linalg.qr(basis)[0] if orthonormal else basis).contiguous(),
            rounded(normal(rank, length)).to(moments),
            rounded(normal(rank, length).square() + 0.5).to(moments),
            torch.tensor(norm, dtype=moments, device=device) if residual != "none" and norm is not None else None,
            residual,
        )

    def kernel(self, grad_scale=None, found_inf=None, **rule) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Runs the op on copies; returns the new parameter, moments and residual norm."""
        arguments, keywords = self.arguments(grad_scale, found_inf, **rule)
        ops.low_rank_adamw_step(*arguments, **keywords)
        assert arguments[5][0].item() == (self.step if found_inf else self.step + 1)
        return arguments[0][0], arguments[3][0], arguments[4][0], arguments[6][0] if arguments[6] else None

    def arguments(self, grad_scale=None, found_inf=None, **rule) -> tuple[tuple, dict]:
        """Fresh arguments of the raw op."""
        device = self.param.device

        def one(value):
            return None if value is None else torch.tensor(float(value), device=device)

        positional = (
            [self.param.clone()],
            [self.grad.clone()],
            [self.projector.clone()],
            [self.exp_avg.clone()],
            [self.exp_avg_sq.clone()],
            [torch.tensor(float(self.step), device=device)],
            [] if self.residual_norm is None else [self.residual_norm.clone()],
            torch.tensor(LR, dtype=torch.float64, device=device),
            one(grad_scale),
            one(found_inf),
        )
        return positional, {"residual": RESIDUALS.index(self.residual), **RULE, **SUBSPACE, **rule}

    def defined(self, dtype=torch.float64, grad_scale=1.0, **rule) -> tuple[Tensor, Tensor, Tensor, float | None]:
        """The reference in `dtype` throughout, as PyTorch would compute it."""
        rule = {**RULE, **SUBSPACE, **rule}
        tensors = (self.param, self.grad, self.projector, self.exp_avg, self.exp_avg_sq)
        param, grad, projector, first, second = (tensor.cpu().to(dtype) for tensor in tensors)
        low, squares = parts.project(grad, projector, grad_scale, rule["maximize"])
        direction, first, second, factor = parts.rule(
            low, first, second, self.step + 1, rule="adamw",
            **{name: rule[name] for name in ("beta1", "beta2", "eps", "corrected_eps")},
        )  # fmt: skip
        norm, factors, gradient = None, None, grad
        if self.residual != "none":
            fira, per_tensor = self.residual == "fira", self.residual == "apollo_tensor"
            removed = rule["removed"] if fira else None
            phi, sums = parts.ratios(low, direction, squares, None, per_tensor=per_tensor, removed=removed)
            if fira:
                # The residual itself, rather than its norm from the parts: what the subspace leaves of a column that
                # it holds is rounding.
                gradient = grad / (-grad_scale if rule["maximize"] else grad_scale)
                sums[2] = (phi * (gradient - removed * (projector @ low))).square().sum()
            stored = None if self.residual_norm is None else self.residual_norm.item()
            names = ("scale", "amplitude", "amplitude_first", "growth", "zero_norm_limits", "maximize")
            direction, factors, norm = parts.limit(
                low, direction, phi, sums, stored, per_tensor=per_tensor, removed=removed, grad_scale=grad_scale,
                **{name: rule[name] for name in names},
            )  # fmt: skip
            rule["scale"] = 1.0
        param = parts.apply(
            param, projector if direction is not None else None,
            None if direction is None else direction * factor, None if factors is None else grad,
            None if factors is None else factors * factor, lr=LR, scale=rule["scale"],
            weight_decay=rule["weight_decay"], decay_after=rule["decay_after"],
        )  # fmt: skip
        return param, first, second, norm


def adam_definition(tensors, step: int, dtype=torch.float64, grad_scale=1.0, lr=LR, **rule):
    """Plain AdamW of (param, grad, exp_avg, exp_avg_sq) by the reference in `dtype`."""
    param, grad, first, second = (tensor.cpu().to(dtype) for tensor in tensors)
    return reference.adam_step(param, grad / grad_scale, first, second, step, lr=lr, **{**RULE, **rule})
