"""Automatic mixed precision: what torch.amp.GradScaler left with an optimizer, and steps inside autocast."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, distributed


@dataclass(frozen=True)
class Amp:
    """The factor on the gradients, and whether the step is to be skipped, both on the device; None: neither."""

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def on(self, device: torch.device) -> "Amp":
        """Both on one device, as float32 of one element."""
        return Amp(
            *(None if one is None else one.to(device, torch.float32) for one in (self.grad_scale, self.found_inf))
        )

    def gradient_factor(self, maximize: bool) -> float | Tensor:
        """What the gradient as it came is multiplied by to be descended."""
        sign = -1.0 if maximize else 1.0
        return sign if self.grad_scale is None else sign / self.grad_scale

    def shared_by(self, group: "distributed.ProcessGroup") -> "Amp":
        """All processes skip the step if one of them is to."""
        if self.grad_scale is not None:
            raise RuntimeError(
                "grad_scale: with process_group the gradients are to be unscaled before they are averaged; call "
                "scaler.unscale_(optimizer) before scaler.step(optimizer)"
            )
        if self.found_inf is None:
            return self
        found_inf = self.found_inf.clone()
        distributed.all_reduce(found_inf, distributed.ReduceOp.MAX, group=group)
        return Amp(None, found_inf)


def without_autocast(device_type: str) -> AbstractContextManager:
    """The products of a step are of the weight's dtype, also where the step is taken inside an autocast block."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
