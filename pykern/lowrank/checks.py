"""What a step checks of its parameters and gradients."""

import torch
from torch import Tensor

from .. import _native
from .distributed import is_distributed
from .options import check_rate_device


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured on the device."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def rate_on(lr: float | Tensor, device: torch.device) -> Tensor:
    """The learning rate as a tensor on the device, without a copy from the host: that would wait for it.

    A tensor on the CPU, which torch.distributed.checkpoint puts in the place of any while it has states made, is read
    as a number.
    """
    if isinstance(lr, Tensor) and lr.device != device and lr.device.type == "cpu" and not capturing(device):
        lr = lr.item()
    if not isinstance(lr, Tensor):
        return torch.full((), lr, dtype=torch.float64, device=device)
    check_rate_device(lr, device)
    return lr


def check_parameter(param: Tensor, averaged: bool) -> None:
    """Raises where a parameter cannot be stepped at all; `averaged`: its gradient is to be, over a process group."""
    if averaged and is_distributed(param):
        raise ValueError(
            f"process_group: expected parameters that each process holds whole, got a DTensor of {tuple(param.shape)}, "
            "whose gradient is reduced already; leave process_group None"
        )
    if param.grad is not None and param.grad.is_sparse:
        raise RuntimeError("LowRankOptimizer: sparse gradients are not supported; use torch.optim.SparseAdam for them")
    if param.device.type not in ("cpu", "cuda"):
        raise NotImplementedError(
            f"LowRankOptimizer: this build of pykern has no {param.device.type} kernels for it; "
            "keep the parameters on the CPU or a CUDA device"
        )
    _native.require_kernels(param, "a parameter", "low_rank_adamw_step", "adamw_step")
