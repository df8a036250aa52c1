"""What a GPU makes of the inputs of ptx_cases.py, kept as files: the host twins are held to it where there is no GPU.

python -m tests.emulator.golden --record    on a machine with nvcc and a GPU of compute capability 8.0 or newer
"""

import argparse
import ctypes
import shutil
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import torch

from tests.emulator.ptx_cases import Case, all_cases

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(__file__).resolve().parent / "golden"


def compile_source(source: Path, architecture: str, target: Path, *flags: str) -> str:
    """Has nvcc compile a file for an architecture such as "80" or "90a"; returns what it said."""
    code = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    command = ["nvcc", "-std=c++17", "-O3", "-I.", code, *flags, str(source), "-o", str(target)]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"nvcc failed:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def compile_vectors(architecture: str, target: Path, *flags: str) -> str:
    define = ["-DPYKERN_VECTORS_SM90"] if architecture == "90a" else []
    return compile_source(ROOT / "tests" / "emulator" / "vectors.cu", architecture, target, *define, *flags)


def load_vectors(folder: Path, architecture: str) -> ctypes.CDLL:
    path = folder / f"vectors_{architecture}.so"
    compile_vectors(architecture, path, "-shared", "-Xcompiler=-fPIC")
    library = ctypes.CDLL(str(path))
    library.pykern_run_vector.restype = ctypes.c_char_p
    library.pykern_device_name.restype = ctypes.c_char_p
    return library


def run_on_gpu(library: ctypes.CDLL, case: Case) -> np.ndarray:
    options = (ctypes.c_int64 * 24)(*case.options)
    data, output = np.ascontiguousarray(case.data), np.empty(case.expected.nbytes, np.uint8)
    error = library.pykern_run_vector(
        case.kernel.encode(), options, data.ctypes.data_as(ctypes.c_void_p), ctypes.c_int64(data.nbytes),
        output.ctypes.data_as(ctypes.c_void_p), ctypes.c_int64(output.nbytes),
    )  # fmt: skip
    if error:
        raise RuntimeError(f"{case.name}: {error.decode()}")
    return output.view(case.expected.dtype).reshape(case.expected.shape)


def fingerprint(case: Case) -> int:
    """Of what the kernel was given: a file recorded for other input is of no use."""
    return zlib.crc32(np.array(case.options, np.int64).tobytes() + np.ascontiguousarray(case.data).tobytes())


def path_of(kernel: str) -> Path:
    return FOLDER / f"{kernel}.npz"


def recorded() -> dict[str, tuple[np.ndarray, int, str]]:
    """By case: output, fingerprint of the input, and the device that made it."""
    found = {}
    for path in sorted(FOLDER.glob("*.npz")):
        with np.load(path) as file:
            device = str(file["device"])
            for name in file["cases"]:
                found[str(name)] = (file[f"{name}.output"], int(file[f"{name}.input"]), device)
    return found


def record() -> int:
    """Writes a file for each kernel; returns how many cases are not what ptx_cases.py defines."""
    if not torch.cuda.is_available():
        raise SystemExit("golden: no GPU was found")
    if not shutil.which("nvcc"):
        raise SystemExit("golden: nvcc was not found; put it on the PATH")
    capability = torch.cuda.get_device_capability()
    architecture = "90a" if capability == (9, 0) else "".join(map(str, capability))
    wrong = 0
    by_kernel: dict[str, dict[str, np.ndarray]] = {}
    with tempfile.TemporaryDirectory() as folder:
        library = load_vectors(Path(folder), architecture)
        device = f"{library.pykern_device_name().decode()}, driver for CUDA {library.pykern_driver_version()}"
        for case in all_cases().values():
            if case.sm90 and architecture != "90a":
                continue
            output = run_on_gpu(library, case)
            try:
                case.compare(output, slack=2.0)
            except AssertionError as error:
                wrong += 1
                print(f"golden: {case.name} differs from its definition: {error}", file=sys.stderr)
            if case.golden:
                entries = by_kernel.setdefault(case.kernel, {})
                entries[f"{case.name}.output"] = output
                entries[f"{case.name}.input"] = np.array(fingerprint(case), np.uint32)
    FOLDER.mkdir(exist_ok=True)
    for kernel, entries in by_kernel.items():
        names = [key.removesuffix(".output") for key in entries if key.endswith(".output")]
        np.savez_compressed(path_of(kernel), device=np.array(device), cases=np.array(names), **entries)
        print(f"golden: {len(names)} cases of {kernel} in {path_of(kernel).stat().st_size} bytes, from {device}")
    return wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", help="run the cases on this machine's GPU and write the files")
    arguments = parser.parse_args()
    if arguments.record:
        sys.exit(1 if record() else 0)
    missing = [name for name, case in all_cases().items() if case.golden and name not in recorded()]
    print(f"golden: {len(recorded())} cases recorded, {len(missing)} still to be recorded")
