"""Which device to compute on."""

import torch

from . import _native


def unusable_reason() -> str | None:
    """Why pykern can't use the current GPU here, or None if it can."""
    reason = _native.cuda_unavailable_reason or _native.no_device_reason()
    if reason is None:
        architectures = torch.ops.pykern.cuda_architectures.default()
        major, minor = torch.cuda.get_device_capability()
        if not _native.runs_on(architectures, major, minor):
            reason = (
                f"pykern was built for architectures {architectures}, this GPU is of {major}{minor}; "
                f"build it with PYKERN_CUDA_ARCHS={_native.architecture_of(major, minor)}"
            )
    return reason


def choose_device(name: str = "auto") -> torch.device:
    """The device to put tensors on: "auto" is the GPU where pykern can use one, else the CPU.

    An op that has no CUDA kernel yet refuses CUDA tensors with NotImplementedError, by name; `pykern.info()` lists
    them.
    Raises RuntimeError for a "cuda" that can't be used, with the reason, and ValueError for another name.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"name: expected 'auto', 'cpu' or 'cuda', got {name!r}")
    if name == "cpu":
        return torch.device("cpu")
    reason = unusable_reason()
    if reason is None:
        return torch.device("cuda")
    if name == "auto":
        return torch.device("cpu")
    raise RuntimeError(f"device cuda: {reason}; use the device cpu")
