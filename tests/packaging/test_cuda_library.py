"""The CUDA library beside whatever torch is here: it loads, registers its ops, and tells why it can't be used."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch

import pykern
from pykern import _native

from . import budgets
from .binary import CUDA_LIBRARY, ROOT
from .test_native import package, python  # noqa: F401

NVCC = shutil.which("nvcc")
needs_library = pytest.mark.skipif(not NVCC and not CUDA_LIBRARY, reason="no CUDA library: there is no nvcc here")

# Ops whose work is the host's. Every other op has a CUDA kernel.
HOST_OPS = {
    "cpu_level", "best_cpu_level", "set_cpu_level", "built_with", "matmul_in_cache",
    "cuda_architectures", "cuda_built_with", "cuda_stream_source",
    "offload_open", "offload_error", "offload_close", "offload_store", "offload_settle",
    "offload_reserve", "offload_unreserve",
    "offload_load", "offload_release", "offload_map_allocations", "offload_synchronize", "offload_take_failure",
    "offload_description", "offload_counters", "offload_reset_counters",
}  # fmt: skip


def in_sources(pattern, sources):
    names = []
    for path in (ROOT / "csrc").glob(sources):
        names += re.findall(pattern, path.read_text())
    assert len(names) == len(set(names)), "registered twice"
    return set(names)


def defined_ops():
    return in_sources(r'm\.def\(\s*"(\w+)\(', "*/*.cpp")


def ops_with_wrappers():
    return in_sources(r'm\.impl\("(\w+)"', "*/cuda*.cpp") - HOST_OPS


def test_every_op_has_a_cuda_wrapper_or_is_known_to_have_none():
    assert defined_ops() - ops_with_wrappers() == HOST_OPS


REGISTERED = """
import json, torch
torch.ops.load_library({cpu!r})
torch.ops.load_library({cuda!r})
names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("pykern::")]
print(json.dumps([name for name in names if torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")]))
"""


@needs_library
def test_every_wrapper_is_registered():
    assert CUDA_LIBRARY, "there is an nvcc, but the build made no CUDA library; run 'make build'"
    code = REGISTERED.format(cpu=str(next(CUDA_LIBRARY.parent.glob("_C.*so"))), cuda=str(CUDA_LIBRARY))
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert {name.removeprefix("pykern::") for name in json.loads(result.stdout)} == ops_with_wrappers()


@needs_library
def test_what_is_registered_is_what_is_allowed():
    assert _native.cuda_ops == ops_with_wrappers()


@needs_library
def test_tells_how_it_was_built():
    architectures = torch.ops.pykern.cuda_architectures().split()
    assert architectures and all(re.fullmatch(r"\d{2,3}[af]?(-virtual)?", name) for name in architectures)
    assert re.match(r"nvcc \d+\.\d+.*, headers of torch \d", torch.ops.pykern.cuda_built_with())
    assert torch.ops.pykern.cuda_architectures() in pykern.info()["cuda built with"]


@needs_library
@pytest.mark.skipif(not budgets.disassembler(), reason="no cuobjdump (pip install nvidia-cuda-cuobjdump)")
def test_holds_code_for_what_it_says():
    names = torch.ops.pykern.cuda_architectures().split()
    for kind, option in (("sm", "--list-elf"), ("compute", "--list-ptx")):
        told = subprocess.run([budgets.disassembler(), option, CUDA_LIBRARY], capture_output=True, text=True).stdout
        expected = {name.removesuffix("-virtual") for name in names if name.endswith("-virtual") == (kind == "compute")}
        # cuobjdump calls a family, 100f, by its first member.
        assert set(re.findall(r"\.sm_(\w+)\.", told)) == {name.removesuffix("f") for name in expected}


# --- the stream ---------------------------------------------------------------------------------------

STREAM = """
import ctypes, sys, torch
if len(sys.argv) > 1:
    ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_LOCAL)
import pykern
print(torch.ops.pykern.cuda_stream_source())
"""


@needs_library
@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has a libtorch_cuda of its own")
def test_stream_of_a_cpu_only_torch():
    expected = "libtorch_cpu" if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13) else "none"
    assert python("-c", STREAM, cwd=ROOT).stdout.strip() == expected


@needs_library
@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has a libtorch_cuda of its own")
def test_stream_is_found_in_a_torch_loaded_without_rtld_global(tmp_path):
    """As Python loads torch; a weak symbol would not be found."""
    source, library = tmp_path / "stand_in.c", tmp_path / "libtorch_cuda.so"
    source.write_text(
        "int aoti_torch_get_current_cuda_stream(int device, void** stream) { return device + !stream; }\n"
    )
    subprocess.run(
        ["c++", "-x", "c", "-shared", "-fPIC", f"-Wl,-soname,{library.name}", "-o", library, source], check=True
    )
    result = python("-c", STREAM, str(library), cwd=ROOT)
    assert result.stdout.strip() == "libtorch_cuda", result.stderr


# --- why it can't be used -------------------------------------------------------------------------------


def cuda_kernels(package):  # noqa: F811
    code = "import pykern\nprint(pykern.info()['cuda kernels'])"
    result = python("-c", code, cwd=package)
    assert result.returncode == 0, result.stderr
    (line,) = result.stdout.strip().splitlines()
    return line


def test_not_built(package):  # noqa: F811
    for path in (package / "pykern").glob("_C_cuda*"):
        path.unlink()
    assert cuda_kernels(package) == (
        "not loaded: this build of pykern has no CUDA kernels (there was no nvcc, or PYKERN_CUDA was 0)"
    )


def test_does_not_load(package):  # noqa: F811
    for path in (package / "pykern").glob("_C_cuda*"):
        path.unlink()
    damaged = package / "pykern" / "_C_cuda.abi3.so"
    damaged.write_bytes(b"no library")
    told = cuda_kernels(package)
    assert told.startswith(f"not loaded: {damaged.name} does not load: ") and str(damaged) in told


@pytest.fixture
def torch_as(monkeypatch):
    """Makes this process's torch pass for another, then tells what pykern says of CUDA."""

    def tell(version_cuda, hip=None, **functions):
        monkeypatch.setattr(torch.version, "cuda", version_cuda)
        monkeypatch.setattr(torch.version, "hip", hip)
        for name, function in functions.items():
            monkeypatch.setattr(torch.cuda, name, function)
        monkeypatch.setattr(_native, "cuda_ops", _native.cuda_ops)
        monkeypatch.setattr(_native, "cuda_unavailable_reason", _native._load_cuda())
        return pykern.info()

    return tell


@needs_library
def test_torch_of_rocm(torch_as):
    torch_as(None, hip="7.0")
    assert (
        _native.cuda_unavailable_reason == f"torch {torch.__version__} is built for ROCm, and pykern's kernels for CUDA"
    )


@needs_library
def test_torch_without_cuda(torch_as):
    assert torch_as(None)["cuda kernels"] == (
        f"loaded, but not usable: torch {torch.__version__} is built without CUDA; install one that is built with it"
    )


@needs_library
def test_no_gpu(torch_as):
    def init():
        raise RuntimeError("Found no NVIDIA driver on your system.\nMore of it.")

    told = torch_as("13.0", is_available=lambda: False, init=init)["cuda kernels"]
    assert told == "loaded, but not usable: torch finds no CUDA device: Found no NVIDIA driver on your system."


@needs_library
def test_gpus_are_named_and_those_without_kernels(torch_as):
    entries = torch_as(
        "13.0",
        is_available=lambda: True,
        device_count=lambda: 2,
        get_device_capability=lambda device=0: [(9, 0), (7, 5)][device],
        get_device_name=lambda device=0: ["NVIDIA H200", "Tesla T4"][device],
    )
    assert entries["cuda kernels"] == "loaded"
    if _native.runs_on(torch.ops.pykern.cuda_architectures(), 9, 0):
        assert entries["cuda device 0"] == "NVIDIA H200, 9.0"
    assert entries["cuda device 1"] == "Tesla T4, 7.5: no kernels for it; build with PYKERN_CUDA_ARCHS=75"


def test_import_asks_no_driver():
    """Who has asked the driver can't use CUDA in a forked child."""
    refuse = "def refuse(*_): raise SystemExit('asked')\n"
    refuse += "torch.cuda.init = torch.cuda._lazy_init = torch.cuda.is_available = torch.cuda.device_count = refuse"
    result = python("-c", f"import torch\n{refuse}\nimport pykern", cwd=ROOT)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("architectures", "runs", "runs_not"),
    [
        ("90a", ["9.0"], ["8.0", "8.9", "10.0"]),
        ("80", ["8.0", "8.6", "8.9"], ["7.5", "9.0"]),
        ("86", ["8.6", "8.9"], ["8.0"]),
        ("100f", ["10.0", "10.3"], ["9.0", "12.0", "11.0"]),
        ("120-virtual", ["12.0", "12.1", "13.0"], ["10.0", "9.0"]),
        ("80 86 89 90a 100f 120 120-virtual", ["8.0", "8.7", "9.0", "10.3", "12.1", "15.0"], ["7.5", "11.0"]),
    ],
)
def test_which_gpus_an_architecture_runs_on(architectures, runs, runs_not):
    for capability in runs + runs_not:
        assert _native.runs_on(architectures, *map(int, capability.split("."))) == (capability in runs), capability


# --- ops without kernels fail by name -------------------------------------------------------------------


@pytest.mark.parametrize("op", ["prefix_attention_forward", "linear_token_logprobs"])
def test_op_without_a_kernel_fails_by_name(op, monkeypatch):
    monkeypatch.setattr(_native, "cuda_unavailable_reason", None)
    monkeypatch.setattr(_native, "cuda_ops", _native.cuda_ops - {op})
    with torch._subclasses.FakeTensorMode():
        x = torch.empty(4, 2, 8, dtype=torch.bfloat16, device="cuda")
        hidden = torch.empty(4, 8, device="cuda")
        positions = torch.empty(4, dtype=torch.int32, device="cuda")
        with pytest.raises(NotImplementedError) as raised:
            if op == "prefix_attention_forward":
                pykern.prefix_attention(x, x, x, (positions, positions))
            else:
                pykern.linear_token_logprobs(hidden, hidden, torch.empty(4, dtype=torch.int64, device="cuda"))
    assert str(raised.value) in [
        f"{op}: {name} is on cuda:0, but this build of pykern has no CUDA kernel for {op}; move the tensors to the CPU"
        for name in ("q", "hidden")
    ]


def test_devices_of_other_kinds_are_refused():
    with torch._subclasses.FakeTensorMode():
        with pytest.raises(
            NotImplementedError, match="group_advantages: rewards is on xpu:0, but pykern has no xpu kernels"
        ):
            pykern.group_advantages(torch.empty(2, device="xpu"), torch.empty(2, dtype=torch.int64, device="xpu"))
