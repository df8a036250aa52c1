"""Comparisons and checks that the tests of all families share."""

import importlib.util
import os
import warnings
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

import pykern


def assert_accurate(
    actual: Tensor, exact: Tensor, baseline: Tensor | None = None, *, factor: float = 2.0, units: float = 1.0
) -> None:
    """Holds `actual` to the error that PyTorch itself makes.

    The largest error of `actual` against the float64 result `exact` may be `factor` times that of
    `baseline` (PyTorch's own computation in the same dtype), plus `units` roundings of the largest
    finite magnitude of `exact` in actual's dtype. NaN and infinities must be in the same places.
    """
    assert actual.shape == exact.shape, f"shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    got, want = actual.detach().double().cpu(), exact.detach().double().cpu()
    assert torch.equal(got.isnan(), want.isnan()), "NaN in other places than expected"
    assert torch.equal(got.isinf(), want.isinf()), "infinities in other places than expected"
    assert torch.equal(got[got.isinf()], want[want.isinf()]), "infinities of other sign than expected"
    finite = want.isfinite()
    if not finite.any():
        return
    error = (got - want)[finite].abs().max().item()
    bound = units * torch.finfo(actual.dtype).eps * want[finite].abs().max().item()
    if baseline is not None:
        other = baseline.detach().double().cpu()
        bound += factor * (other - want)[finite & other.isfinite()].abs().max().item()
    assert error <= bound, f"error {error:.3e} above {bound:.3e}"


def check_op(op, arguments: tuple, keywords: dict | None = None) -> None:
    """opcheck: schema, autograd registration, fake kernel against a real run, ahead-of-time dispatch."""
    torch.library.opcheck(op, arguments, keywords or {})


def assert_grads(tensors: dict[str, Tensor]) -> None:
    """Every named tensor has received a gradient. opcheck does not notice a missing one."""
    missing = [name for name, tensor in tensors.items() if tensor.grad is None]
    assert not missing, f"no gradient for {missing}"


def compile_whole(function):
    """fullgraph compile with a backend that needs no compiler of its own."""
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


@contextmanager
def threads(count: int):
    """Runs a block with `count` torch threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def poison(tensor: Tensor) -> Tensor:
    """Fills a floating-point tensor with NaN: whoever reads it shows it."""
    return tensor.fill_(float("nan"))


# --- devices --------------------------------------------------------------------------------------

EMULATOR_BUILD = os.environ.get("PYKERN_EMULATOR_BUILD", "_emulator")
"""Which build of the emulator runs the kernels: "_emulator", or "_emulator_address" under AddressSanitizer."""

_EMULATOR_FILE = Path(pykern.__file__).parent.parent / "build" / "emulator" / f"{EMULATOR_BUILD}.so"


@cache
def emulator() -> ModuleType:
    """The module that runs CUDA kernels on the CPU; loading it registers their ops as pykern_emulated::*.

    PYKERN_EMULATOR_ORDERS, such as "forward,random:5,random:6", chooses the thread orders of every launch.
    """
    spec = importlib.util.spec_from_file_location(EMULATOR_BUILD, _EMULATOR_FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    orders = os.environ.get("PYKERN_EMULATOR_ORDERS")
    if orders:
        module.set_orders(orders.split(","))
    return module


DEVICES = ["cpu", *(["emulated"] if _EMULATOR_FILE.exists() else []), *(["cuda"] if torch.cuda.is_available() else [])]
"""Where the tests of an op run: its CPU code; its CUDA wrapper and kernels on the emulator; a GPU."""


KERNELS = [name for device in DEVICES for name in ([device, "emulated 8.0"] if device == "emulated" else [device])]
"""DEVICES, and the emulator once more for ops that have kernels of their own for compute capability 9.0."""


@cache
def emulated_ops() -> list[str]:
    """Names of the ops that have a CUDA kernel, without namespace."""
    emulator()
    names = (name for name in torch._C._dispatch_get_all_op_names() if name.startswith("pykern_emulated::"))
    return sorted(name.split("::")[1] for name in names if torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU"))


@contextmanager
def on(device: str):
    """Runs a block on one of DEVICES or KERNELS and yields the torch device for its tensors.

    "emulated" puts the CUDA wrapper of every op in the place of its CPU code, so CPU tensors go through the wrapper
    and the kernels: those for compute capability 9.0, or with "emulated 8.0" those for all architectures.
    """
    if not device.startswith("emulated"):
        yield torch.device(device)
        return
    capability = float(device.removeprefix("emulated") or 9.0)
    emulator().set_compute_capability(round(10 * capability))
    replacement = torch.library.Library("pykern", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that a kernel is replaced
        for name in emulated_ops():
            replacement.impl(name, getattr(torch.ops.pykern_emulated, name).default, "CPU", allow_override=True)
    try:
        yield torch.device("cpu")
    finally:
        replacement._destroy()
