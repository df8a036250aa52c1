"""Loads the native libraries and tells what they can do on this machine."""

import os
import platform
import re
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

_FOLDER = Path(__file__).resolve().parent

CPU_LEVELS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")

cuda_unavailable_reason: str | None = None
"""Why no CUDA tensor can reach a kernel in this process, or None if one can, given a GPU."""

cuda_ops: frozenset[str] = frozenset()
"""The ops that have a CUDA kernel here."""

FAMILY_OPS = {
    "attention": (
        "prefix_attention_forward",
        "prefix_attention_backward",
        "prefix_attention_tiles",
        "gather_rows",
        "gather_rows_backward",
    ),
    "policy": (
        "group_advantages",
        "group_entropy",
        "group_statistics",
        "discounted_scan",
        "masked_whiten",
        "optimal_token_baseline",
        "risk_advantages",
        "policy_loss_forward",
        "policy_loss_backward",
        "policy_loss_token_weights",
        "token_logprobs",
        "token_logprobs_backward",
        "token_logprobs_backward_in_place",
        "linear_token_logprobs",
        "linear_token_logprobs_backward",
        "linear_chunk_logprobs",
        "linear_chunk_gradients",
        "masked_quantile",
        "masked_select_share",
        "masked_moments",
        "rollout_correction",
        "disco_loss_forward",
    ),
    "lowrank": (
        "low_rank_adamw_step",
        "low_rank_project",
        "low_rank_rule",
        "low_rank_ratios",
        "low_rank_limit",
        "low_rank_apply",
        "low_rank_apply_int8",
        "adamw_step",
        "quantize_groups",
        "dequantize_groups",
        "sparse_rows_add",
        "sparse_rows_take",
    ),
    "offload": (
        "offload_pack",
        "offload_unpack",
        "norm",
        "norm_backward",
        "activation",
        "activation_backward",
        "seeded_dropout",
    ),
}
"""The ops that compute on tensors, on a GPU too once they have a kernel for it."""


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


def _load_cuda() -> str | None:
    """Loads the CUDA library, beside a torch without CUDA too. Returns why its kernels can't be used, or None."""
    global cuda_ops
    found = sorted(_FOLDER.glob("_C_cuda.*so"))
    if not found:
        return "this build of pykern has no CUDA kernels (there was no nvcc, or PYKERN_CUDA was 0)"
    if torch.version.hip:
        return f"torch {torch.__version__} is built for ROCm, and pykern's kernels for CUDA"
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        return f"{found[0].name} does not load: {error.__cause__ or error}"
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("pykern::")]
    cuda_ops = frozenset(
        name.removeprefix("pykern::") for name in names if torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")
    )
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; install one that is built with it"
    if torch.ops.pykern.cuda_stream_source.default() == "none":
        return f"torch {torch.__version__} tells no CUDA stream"
    return None


def require_kernels(tensor: Tensor, name: str, *ops: str) -> None:
    """Raises NotImplementedError if `tensor`, the argument `name`, is where one of `ops` has no kernel."""
    device = tensor.device.type
    if device in ("cpu", "meta"):
        return
    reason = cuda_unavailable_reason if device == "cuda" else f"pykern has no {device} kernels"
    for op in ops:
        if reason is None and op not in cuda_ops:
            reason = f"this build of pykern has no CUDA kernel for {op}"
    if reason is not None:
        raise NotImplementedError(f"{ops[0]}: {name} is on {tensor.device}, but {reason}; move the tensors to the CPU")


def _check_wanted_level() -> None:
    """Warns where PYKERN_CPU_LEVEL asks for what is not in force."""
    wanted = os.environ.get("PYKERN_CPU_LEVEL")
    if wanted and wanted != cpu_level():
        expected = (
            "one of " + ", ".join(CPU_LEVELS) if wanted not in CPU_LEVELS else "a level of this machine and build"
        )
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
        raise ValueError(
            f"level: expected an instruction set this machine has (up to {best_cpu_level()}), got {level!r}"
        )
    try:
        yield
    finally:
        torch.ops.pykern.set_cpu_level.default(before)


def best_cpu_level() -> str:
    """The fastest instruction set that this processor and this build have."""
    return torch.ops.pykern.best_cpu_level.default()


def runs_on(architectures: str, major: int, minor: int) -> bool:
    """Whether a GPU of compute capability major.minor runs code for one of these architectures.

    Plain numbers run on their major version from their minor on, those with "f" too, those with "a" on
    themselves alone; "-virtual" is PTX, which the driver compiles for whatever is as new.
    """
    for architecture in architectures.split():
        number, kind = re.fullmatch(r"(\d+)([af]?(?:-virtual)?)", architecture).groups()
        built = divmod(int(number), 10)
        if kind.startswith("a"):
            fits = (major, minor) == built
        elif kind == "-virtual":
            fits = (major, minor) >= built
        else:
            fits = major == built[0] and minor >= built[1]
        if fits:
            return True
    return False


def architecture_of(major: int, minor: int) -> str:
    """What PYKERN_CUDA_ARCHS calls a GPU of this compute capability; 9.0 has instructions that only 90a names."""
    return f"{major}{minor}" + ("a" if (major, minor) == (9, 0) else "")


def no_device_reason() -> str | None:
    """Why torch, built with CUDA, has no CUDA device. Asks the driver, so importing pykern doesn't call it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if torch.cuda.is_available():
            return None
        try:
            torch.cuda.init()
        except (RuntimeError, AssertionError) as error:
            return "torch finds no CUDA device: " + str(error).strip().splitlines()[0]
    return "torch finds no CUDA device"


def _cuda_info() -> dict[str, str]:
    if not hasattr(torch.ops.pykern, "cuda_architectures"):
        return {"cuda kernels": f"not loaded: {cuda_unavailable_reason}"}
    architectures = torch.ops.pykern.cuda_architectures.default()
    entries = {
        "cuda kernels": "loaded",
        "cuda built with": f"{torch.ops.pykern.cuda_built_with.default()}, architectures {architectures}",
    }
    for family, ops in FAMILY_OPS.items():
        missing = [op for op in ops if op not in cuda_ops]
        entries[f"{family} on cuda"] = f"not yet: {', '.join(missing)}" if missing else "every op"
    reason = cuda_unavailable_reason or no_device_reason()
    if reason:
        entries["cuda kernels"] = f"loaded, but not usable: {reason}"
        return entries
    for device in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(device)
        told = f"{torch.cuda.get_device_name(device)}, {major}.{minor}"
        if not runs_on(architectures, major, minor):
            told += f": no kernels for it; build with PYKERN_CUDA_ARCHS={architecture_of(major, minor)}"
        entries[f"cuda device {device}"] = told
    return entries


def info() -> dict[str, str]:
    """Versions, the processor features in use, and whether the CUDA kernels are there and run here, or why not."""
    return {
        "pykern": (_FOLDER / "VERSION").read_text().strip(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "built with": torch.ops.pykern.built_with.default(),
        "cpu level": f"{cpu_level()} (best here: {best_cpu_level()})",
        "cpu threads": str(torch.get_num_threads()),
        **_cuda_info(),
    }


_load_cpu()
cuda_unavailable_reason = _load_cuda()
_check_wanted_level()
