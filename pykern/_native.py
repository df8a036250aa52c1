"""Loads the native libraries and tells what they can do on this machine."""

import os
import platform
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch

_FOLDER = Path(__file__).resolve().parent

CPU_LEVELS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")

cuda_unavailable_reason: str | None = "this build of pykern has no CUDA kernels"
"""Why the CUDA kernels are not loaded, or None if they are."""


def _load_cpu() -> None:
    found = sorted(_FOLDER.glob("_C.*so"))
    if not found:
        raise ImportError(
            f"pykern's native library is missing from {_FOLDER}; build it with 'make build' or 'pip install .'"
        )
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11):
        raise ImportError(f"pykern needs torch >= 2.11, this is torch {torch.__version__}; upgrade torch")
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        raise ImportError(
            f"pykern's native library {found[0].name} does not load with torch {torch.__version__} on "
            f"{platform.machine()}; rebuild it with 'make build' or 'pip install .': {error.__cause__ or error}"
        ) from error


def _check_wanted_level() -> None:
    """Warns where PYKERN_CPU_LEVEL asks for what is not in force."""
    wanted = os.environ.get("PYKERN_CPU_LEVEL")
    if wanted and wanted != cpu_level():
        expected = "one of " + ", ".join(CPU_LEVELS) if wanted not in CPU_LEVELS else "a level of this machine and build"
        warnings.warn(f"PYKERN_CPU_LEVEL: expected {expected}, got {wanted!r}; {cpu_level()} is used", stacklevel=2)


def cpu_level() -> str:
    """Instruction set in force: "portable", "avx2", "avx512", "avx512_bf16" or "amx"."""
    return torch.ops.pykern.cpu_level.default()


@contextmanager
def use_cpu_level(level: str):
    """Runs a block on a lower instruction set than the machine's best, to test or compare it.

    Raises ValueError if this machine or build lacks `level`. Process-wide: not for concurrent use.
    """
    before = cpu_level()
    if not torch.ops.pykern.set_cpu_level.default(level):
        raise ValueError(f"level: expected an instruction set this machine has (up to {best_cpu_level()}), got {level!r}")
    try:
        yield
    finally:
        torch.ops.pykern.set_cpu_level.default(before)


def best_cpu_level() -> str:
    """The fastest instruction set that this processor and this build have."""
    return torch.ops.pykern.best_cpu_level.default()


def check_device(name: str, tensor: torch.Tensor) -> None:
    """Raises NotImplementedError for a tensor on a device that this build has no kernels for."""
    kind = tensor.device.type
    if kind in ("cpu", "meta") or (kind == "cuda" and cuda_unavailable_reason is None):
        return
    reason = f" ({cuda_unavailable_reason})" if kind == "cuda" else ""
    raise NotImplementedError(f"{name}: no {kind} kernels{reason}; move the inputs to the CPU")


def info() -> dict[str, str]:
    """Versions, the processor features in use, and whether the CUDA kernels are there or why not."""
    return {
        "pykern": (_FOLDER / "VERSION").read_text().strip(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "built with": torch.ops.pykern.built_with.default(),
        "cpu level": f"{cpu_level()} (best here: {best_cpu_level()})",
        "cpu threads": str(torch.get_num_threads()),
        "cuda kernels": "loaded" if cuda_unavailable_reason is None else f"not loaded: {cuda_unavailable_reason}",
    }


_load_cpu()
_check_wanted_level()
