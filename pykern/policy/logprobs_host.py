"""What the log-probability functions check and prepare."""

import math

import torch
from torch import Tensor

from .. import _native

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def described(value: object) -> str:
    return f"a tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__


def check_floating(function: str, name: str, tensor: Tensor, *ops: str) -> None:
    if not isinstance(tensor, Tensor) or tensor.dtype not in _DTYPES:
        raise TypeError(
            f"{function}: {name}: expected a tensor of float32, bfloat16, float16 or float64, got {described(tensor)}"
        )
    _native.require_kernels(tensor, name, *ops)


def prepared_targets(function: str, targets: Tensor, rows: Tensor, rows_name: str, shape: torch.Size) -> Tensor:
    if not isinstance(targets, Tensor) or targets.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{function}: targets: expected a tensor of int64 or int32, got {described(targets)}")
    if targets.shape != shape:
        raise ValueError(
            f"{function}: targets: expected shape {list(shape)}, one per row of {rows_name}, got {list(targets.shape)}"
        )
    if targets.device != rows.device:
        raise ValueError(f"{function}: targets: expected on {rows.device}, got on {targets.device}; move it there")
    return targets.to(torch.int64).contiguous()


def can_look_at(tensor: Tensor) -> bool:
    """Whether a value decides what Python does: looking must cost no synchronisation and cut no compiled graph."""
    return not torch.compiler.is_compiling() and tensor.is_cpu


def check_targets(function: str, targets: Tensor, vocabulary: int) -> None:
    """Where one can look. What is not looked at here is left to the op, or to who calls it."""
    if can_look_at(targets) and targets.numel() > 0:
        largest = int(targets.max())
        if largest >= vocabulary:
            raise ValueError(
                f"{function}: targets: expected values below the vocabulary size {vocabulary}, got {largest}; "
                "use a negative value for rows to ignore"
            )


def prepared_temperature(function: str, temperature: float | Tensor, targets: Tensor) -> tuple[Tensor | None, float]:
    if isinstance(temperature, Tensor):
        if temperature.requires_grad:
            raise ValueError(f"{function}: temperature: expected no requires_grad, as none is computed; pass .detach()")
        if not temperature.is_floating_point():
            raise TypeError(f"{function}: temperature: expected a floating-point tensor, got {temperature.dtype}")
        try:
            expanded = temperature.expand(targets.shape)
        except RuntimeError:
            raise ValueError(
                f"{function}: temperature: expected a shape that broadcasts to {list(targets.shape)}, "
                f"got {list(temperature.shape)}"
            ) from None
        expanded = expanded.to(device=targets.device, dtype=torch.float64).contiguous()
        if can_look_at(targets):
            refused = expanded[(targets >= 0) & ~((expanded > 0) & (expanded < math.inf))]
            if refused.numel() > 0:
                raise ValueError(
                    f"{function}: temperature: expected positive finite numbers, got {refused[0].item()}; use a "
                    "negative target for rows to ignore"
                )
        return expanded, 1.0
    if not (isinstance(temperature, (int, float)) and 0 < temperature < math.inf):
        raise ValueError(f"{function}: temperature: expected a positive finite number or a tensor, got {temperature!r}")
    return None, float(temperature)


def result_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
