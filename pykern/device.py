"""Which device a command runs on."""

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
                f"build it with PYKERN_CUDA_ARCHS={major}{minor}"
            )
    return reason


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
