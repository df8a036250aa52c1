"""What nvcc makes of each kernel: registers, spills, stack, shared memory, doubles, and its machine code.

`python -m tests.packaging.budgets` prints what it measures beside kernels/budgets.json; with --write it
makes that file anew. A kernel may use what the file grants it, and no more.
"""

import functools
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "kernels" / "budgets.json"
CACHE = ROOT / "build" / "budgets"

ARCHITECTURES = ("80", "90a")
# As kernels/CMakeLists.txt compiles them.
FLAGS = ["-std=c++17", "-O3", "-DNDEBUG", "-DPYKERN_HAS_SM90"]
TOLD = "-Xptxas=-v"


@dataclass(frozen=True)
class Usage:
    """Of one kernel on one architecture; bytes, per thread where not said otherwise."""

    registers: int = 0
    static_shared_per_block: int = 0
    stack: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    doubles: bool = False
    waits: bool = False  # ptxas lets wgmma wait where the source doesn't, for registers that are touched too early
    opcodes: dict[str, int] = field(default_factory=dict, compare=False)

    def told(self) -> dict:
        """The registers, and whatever else isn't zero."""
        values = asdict(self)
        del values["opcodes"]
        return {name: value for name, value in values.items() if value or name == "registers"}

    def budget(self) -> dict:
        """What the table grants: registers by the eight, as the hardware allots them to a thread."""
        return {**self.told(), "registers": -(-self.registers // 8) * 8}


@functools.cache
def nvcc() -> str | None:
    return next(
        filter(None, map(shutil.which, (os.environ.get("CUDACXX") or "nvcc", "/usr/local/cuda/bin/nvcc"))), None
    )


@functools.cache
def nvcc_version() -> str:
    told = subprocess.run([nvcc(), "--version"], check=True, capture_output=True, text=True).stdout
    return re.search(r", V([\d.]+)", told)[1]


@functools.cache
def disassembler() -> str | None:
    """cuobjdump of the toolkit or of PyPI's nvidia-cuda-cuobjdump, with an nvdisasm beside it or on the PATH."""
    folders = [Path(nvcc()).resolve().parent] if nvcc() else []
    packages = importlib.util.find_spec("nvidia")
    for place in packages.submodule_search_locations if packages else []:
        folders += sorted(Path(place).glob("cu*/bin"))
    path = os.pathsep.join([*map(str, folders), os.environ["PATH"]])
    return shutil.which("cuobjdump", path=path) if shutil.which("nvdisasm", path=path) else None


def sources() -> list[tuple[Path, str]]:
    """Every source with each architecture that it is compiled for."""
    found = sorted((ROOT / "kernels").glob("*/launch*.cu"))
    return [
        (source, architecture)
        for source in found
        for architecture in ARCHITECTURES
        if architecture == "90a" or "_sm90" not in source.name
    ]


def closure(source: Path, seen: set[Path] | None = None) -> set[Path]:
    """A source and the headers of the tree that it includes, through others too."""
    seen = set() if seen is None else seen
    if source not in seen and source.exists():
        seen.add(source)
        for name in re.findall(r'^\s*#\s*include "([^"]+)"', source.read_text(), flags=re.MULTILINE):
            closure(ROOT / name, seen)
    return seen


def measured() -> dict[str, dict[str, Usage]]:
    """Usage by kernel and architecture. What the same nvcc compiled before, from the same text, is remembered."""
    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    kernels: dict[str, dict[str, Usage]] = {}
    with ThreadPoolExecutor(jobs) as pool:
        for (source, architecture), usages in zip(sources(), pool.map(lambda task: _remembered(*task), sources())):
            folder = source.parent.name
            for name, usage in usages.items():
                entry = kernels.setdefault(f"{folder}: {name.removeprefix(folder + '::')}", {})
                assert architecture not in entry, f"two kernels are called {name}"
                entry[architecture] = usage
    return dict(sorted(kernels.items()))


def _remembered(source: Path, architecture: str) -> dict[str, Usage]:
    kept = memory(source, architecture)
    if not kept.exists():
        remember(kept, compiled(source, architecture, kept.with_suffix(".cubin")))
    return {name: Usage(**values) for name, values in json.loads(kept.read_text()).items()}


def memory(source: Path, architecture: str) -> Path:
    """The file that what is measured of a source goes to; one for another text of the source is removed."""
    digest = hashlib.sha256(repr((nvcc_version(), disassembler(), FLAGS, TOLD)).encode())
    for path in sorted(closure(source)) + [Path(__file__)]:
        digest.update(path.read_bytes())
    name = f"{source.parent.name}-{source.stem}-{architecture}-"
    kept = CACHE / f"{name}{digest.hexdigest()[:16]}.json"
    CACHE.mkdir(parents=True, exist_ok=True)
    for old in CACHE.glob(name + "*"):
        if old.stem != kept.stem:
            old.unlink(missing_ok=True)
    return kept


def remember(kept: Path, usages: dict[str, Usage]) -> None:
    temporary = kept.with_suffix(".new")
    temporary.write_text(json.dumps({name: asdict(usage) for name, usage in usages.items()}, indent=1))
    temporary.replace(kept)


def compiled(source: Path, architecture: str, cubin: Path) -> dict[str, Usage]:
    with tempfile.TemporaryDirectory() as kept:
        command = [nvcc(), *FLAGS, "-I.", TOLD, "-cubin", f"-arch=sm_{architecture}", "--keep", "--keep-dir", kept]
        result = subprocess.run([*command, "-o", str(cubin), str(source)], cwd=ROOT, capture_output=True, text=True)
        told = result.stdout + result.stderr
        assert result.returncode == 0, told
        (ptx,) = Path(kept).glob("*.ptx")
        return usages_of(source, told, ptx.read_text(), cubin)


def usages_of(source: Path, told: str, ptx: str, cubin: Path) -> dict[str, Usage]:
    """Of every kernel of a source, by its name, from what its compilation told and left."""
    # Of products of warpgroups that the compiler would not let overlap.
    assert "serialized" not in told, told
    usages = parse(told, ptx)
    code = opcodes(cubin) if disassembler() else {}
    names = dict(zip(usages, readable(list(usages))))
    assert len(set(names.values())) == len(names), f"{source}: kernels of one name"
    return {names[symbol]: Usage(**{**values, "opcodes": code.get(symbol, {})}) for symbol, values in usages.items()}


def parse(told: str, ptx: str) -> dict[str, dict]:
    """What ptxas and its input say of each kernel, by symbol."""
    usages: dict[str, dict] = {}
    kernel, function = None, None
    for line in told.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)'", line):
            kernel = match[1]
            usages.setdefault(kernel, {})
        elif match := re.search(r"Function properties for '?(\w+)", line):
            function = match[1]
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            # A function that was not inlined counts for the kernel that calls it.
            values = usages.setdefault(function if function in usages else kernel, {})
            for name, value in zip(("stack", "spill_stores", "spill_loads"), match.groups()):
                values[name] = values.get(name, 0) + int(value)
        elif match := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            usages[kernel] |= {"registers": int(match[1]), "static_shared_per_block": int(shared[1]) if shared else 0}
    for match in re.finditer(r"\(C75\d\d\) .* in function '(\w+)'", told):
        usages.setdefault(match[1], {})["waits"] = True
    doubles = double_functions(ptx)
    for kernel in usages.keys() & doubles:
        usages[kernel]["doubles"] = True
    return usages


def double_functions(ptx: str) -> set[str]:
    """Symbols of the functions that compute in doubles, or name one that does: they call it.

    Not --warn-on-double-precision-use of ptxas: it names lines, and those are off.
    """
    bodies: dict[str, list[str]] = {"": []}
    function = ""
    for line in re.sub("//.*", "", ptx).splitlines():
        if match := re.search(r"\.(?:entry|func)\s+(?:\([^)]*\)\s*)?(\w+)", line):
            function = match[1]
        bodies.setdefault(function, []).append(line)
    texts = {function: "\n".join(lines) for function, lines in bodies.items()}
    computes = re.compile(r"^\s*(?:@!?%\w+ )?(?!ld|st|mov)\w[\w.]*\.f64\b", re.MULTILINE)
    found = {function for function, text in texts.items() if computes.search(text)}
    names = {function: set(re.findall(r"\w+", text)) for function, text in texts.items()}
    while more := {function for function, named in names.items() if named & found} - found:
        found |= more
    return found


def opcodes(cubin: Path) -> dict[str, dict[str, int]]:
    """How often each instruction stands in the machine code of each kernel, by symbol."""
    environment = {**os.environ, "PATH": os.pathsep.join([str(Path(disassembler()).parent), os.environ["PATH"]])}
    told = subprocess.run(
        [disassembler(), "-sass", str(cubin)], check=True, capture_output=True, text=True, env=environment
    ).stdout
    found: dict[str, dict[str, int]] = {}
    for line in told.splitlines():
        if match := re.search(r"Function : (\w+)", line):
            counts = found.setdefault(match[1], {})
        elif match := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][A-Z0-9_.]*)", line):
            counts[match[1]] = counts.get(match[1], 0) + 1
    return found


def readable(symbols: list[str]) -> list[str]:
    """Names as they stand in the sources: without the namespace and the parameters."""
    told = subprocess.run(["c++filt", *symbols], check=True, capture_output=True, text=True).stdout.splitlines()
    names = []
    for name in told:
        name = name.replace("(anonymous namespace)::", "").replace("pykern::", "").removeprefix("void ")
        if name.endswith(")"):
            depth = 0
            for index in range(len(name) - 1, -1, -1):
                depth += (name[index] == ")") - (name[index] == "(")
                if depth == 0:
                    name = name[:index]
                    break
        names.append(name.strip())
    return names


def table() -> dict:
    return json.loads(TABLE.read_text()) if TABLE.exists() else {"nvcc": "", "kernels": {}}


def write() -> None:
    rows = [
        f"    {json.dumps(kernel)}: "
        + json.dumps({architecture: usage.budget() for architecture, usage in entry.items()})
        for kernel, entry in measured().items()
    ]
    TABLE.write_text(f'{{\n  "nvcc": "{nvcc_version()}",\n  "kernels": {{\n' + ",\n".join(rows) + "\n  }\n}\n")


def main() -> int:
    if not nvcc():
        print("no nvcc was found; put it on the PATH or name it in CUDACXX", file=sys.stderr)
        return 1
    if sys.argv[1:] == ["--write"]:
        write()  # over whatever a merge has left there
        print(f"wrote {TABLE.relative_to(ROOT)}")
        return 0
    granted = table()["kernels"]
    for kernel, entry in measured().items():
        for architecture, usage in entry.items():
            told = ", ".join(f"{name} {value}" for name, value in usage.told().items())
            before = granted.get(kernel, {}).get(architecture)
            mark = "" if before == usage.budget() else f"   (table: {before})"
            print(f"{kernel} [{architecture}]: {told}{mark}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
