"""Which device a command runs on."""

import torch

from . import _native


def unusable_reason() -> str | None:
    """Why pykern can use no GPU here, or None if it can."""
    return _native.cuda_unavailable_reason or _native.no_device_reason()


def choose_device(name: str) -> torch.device:
    """"auto" is the GPU where pykern's CUDA kernels load and one is there, else the CPU. Raises RuntimeError for a
    "cuda" that can't be used."""
    if name == "cpu":
        return torch.device("cpu")
    reason = unusable_reason()
    if reason is None:
        return torch.device("cuda")
    if name == "auto":
        return torch.device("cpu")
    raise RuntimeError(f"device cuda: {reason}; use the device cpu")
