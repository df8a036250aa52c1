"""The built library: what it needs and offers, and that no instruction escapes its level."""

import platform
import re
import subprocess
import sys

import pytest

from . import binary

X86 = platform.machine() in ("x86_64", "AMD64")


@pytest.fixture(params=binary.LIBRARIES, ids=lambda path: path.name.split(".")[0])
def library(request):
    """_C, and _C_cuda where it is built."""
    return request.param


def test_needs_torch_cpu_and_the_system_alone(library):
    """No libcudart, whose soname changes with CUDA, and no libtorch_cuda, which a CPU-only torch lacks."""
    system = {"libstdc++.so.6", "libgcc_s.so.1", "libm.so.6", "libc.so.6", "libc++.so.1"}
    system |= {"libpthread.so.0", "libdl.so.2", "librt.so.1"}  # parts of libc.so.6 from glibc 2.34 on
    needed = {name for name in binary.needed(library) if not name.startswith("ld-linux")}
    assert "libtorch_cpu.so" in needed
    assert needed - system == {"libtorch_cpu.so"}


def test_has_no_path_of_the_building_machine(library):
    dynamic = binary.output("readelf", "--dynamic", "--wide", library)
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic and "TEXTREL" not in dynamic


def test_offers_the_module_function_alone(library):
    names = {name for _, name in binary.defined_symbols(library)}
    names |= set(re.findall(r" [TDBVWRu] (\S+)", binary.output("nm", "--dynamic", "--defined-only", library)))
    names = {name for name in names if not name.startswith(("__bss", "_edata", "_end", "_init", "_fini"))}
    assert names <= {"PyInit_" + library.name.split(".")[0]}


def test_stack_is_not_executable(library):
    headers = binary.output("readelf", "--program-headers", "--wide", library)
    assert re.search(r"GNU_STACK.* RW +0x", headers)


@pytest.mark.parametrize("level", binary.levels())
def test_level_keeps_to_its_namespace(level):
    """An inline function outside of it could be the copy that the linker keeps for every caller."""
    objects = binary.level_objects(level)
    assert objects
    escaped = []
    for path in objects:
        for kind, name in binary.defined_symbols(path):
            # Template arguments and lambdas name the level too, but in the middle.
            if f"pykern::{level}::" not in name:
                escaped.append(f"{path.name}: {kind} {name}")
    assert not escaped, "\n".join(escaped)


# Beyond SSE2, which every x86-64 processor has. VEX and EVEX instructions all begin with v.
NEWER = re.compile(
    r"\t(v[a-z]\w+|popcnt|lzcnt|tzcnt|andn|bextr|bls\w+|bzhi|mulx|pdep|pext|rorx|sarx|shlx|shrx|crc32\w*|ptest|pshufb|pabs\w|palignr"
    r"|h(add|sub)p[sd]|ph(add|sub)\w+|pmul(ld|hrsw|dq)|pm(in|ax)(s[bd]|u[wd])|p(insr|extr)[bdq]|blend\w+|pblend\w+|round[sp][sd]"
    r"|dpp[sd]|pmov[sz]x\w+|packusdw|movshdup|movsldup|movddup|lddqu|addsubp[sd]|extractps|insertps|pcmpgtq|pcmpeqq)\s"
)
# Begin with v too, or ask for what the processor has before using it.
OLD = {"verr", "verw"}


@pytest.mark.skipif(not X86, reason="levels above portable exist on x86-64 alone")
@pytest.mark.parametrize("part", ["host", "portable"])
def test_runs_on_every_x86_64(part):
    objects = binary.host_objects() if part == "host" else binary.level_objects("portable")
    assert objects
    newer = []
    for path in objects:
        code = binary.output("objdump", "--disassemble", "--no-show-raw-insn", path)
        newer += [f"{path.name}: {name}" for name in NEWER.findall(code) if name not in OLD]
    assert not newer, f"{len(newer)} instructions, the first: {newer[:5]}"


@pytest.mark.skipif(not X86, reason="levels above portable exist on x86-64 alone")
def test_newer_instructions_are_seen_where_they_are():
    level = next((level for level in binary.levels() if level != "portable"), None)
    assert level, "the build has the portable level alone"
    code = "".join(binary.output("objdump", "-d", "--no-show-raw-insn", path) for path in binary.level_objects(level))
    assert len(NEWER.findall(code)) > 100


def audit(script, *arguments, library):
    run = f"import importlib.metadata as m; m.entry_points(group='console_scripts')['{script}'].load()()"
    command = [sys.executable, "-c", f"import sys; sys.argv[0] = '{script}'; {run}", *arguments, str(library)]
    return subprocess.run(command, capture_output=True, text=True)


def test_torch_symbols_are_of_its_stable_abi(library):
    result = audit("torch-abi-audit", "--check", "torch", library=library)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "unstable=0" in result.stdout
    oldest = re.search(r"Min torch: +(\d+)\.(\d+)", result.stdout)
    assert oldest and tuple(map(int, oldest.groups())) <= (2, 11), result.stdout


@pytest.mark.skipif(".abi3." not in binary.LIBRARY.name, reason="a free-threaded Python has no limited API")
def test_python_symbols_are_of_the_limited_api(library):
    result = audit("abi3audit", "--verbose", "--strict", "--assume-minimum-abi3", "3.10", library=library)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 ABI violations" in " ".join((result.stdout + result.stderr).split())
