"""What nvcc makes of every kernel, held to kernels/budgets.json and to what kernel_kinds.py declares."""

import re
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from . import budgets
from .kernel_kinds import DOUBLES, KINDS, LOCAL_MEMORY, MATRIX, MEMORY, OTHER, WARPGROUP_KERNELS, WIDE_STORES

pytestmark = pytest.mark.skipif(not budgets.nvcc(), reason="no nvcc here to compile the kernels with")
needs_disassembler = pytest.mark.skipif(
    not budgets.disassembler(),
    reason="no cuobjdump and nvdisasm (pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm)",
)

AGAIN = "look at them, then run 'python -m tests.packaging.budgets --write'"
WIDE_LOAD = re.compile(r"LDG\..*128|LDGSTS\..*128|UBLKCP|UTMALDG")
WIDE_STORE = re.compile(r"STG\..*128")
MATRIX_UNIT = re.compile(r"HMMA|HGMMA|DMMA|OMMA|UTC\w*MMA")
LOCAL = re.compile(r"LDL|STL")


@pytest.fixture(scope="module")
def usages():
    """(kernel, architecture, usage) of all kernels."""
    return [
        (kernel, architecture, usage)
        for kernel, entry in budgets.measured().items()
        for architecture, usage in entry.items()
    ]


def allowed(patterns, kernel):
    return next((value for pattern, value in patterns.items() if fnmatchcase(kernel, pattern)), None)


def failing(usages, fails):
    return [
        f"{kernel} [{architecture}]: {told}" for kernel, architecture, usage in usages if (told := fails(kernel, usage))
    ]


def test_table_names_every_kernel_and_no_other(usages):
    listed = {(kernel, architecture) for kernel, entry in budgets.table()["kernels"].items() for architecture in entry}
    found = {(kernel, architecture) for kernel, architecture, _ in usages}
    assert found - listed == set(), f"kernels without a budget; {AGAIN}"
    assert listed - found == set(), f"budgets without a kernel; {AGAIN}"


def test_no_kernel_exceeds_its_budget(usages):
    if budgets.table()["nvcc"] != budgets.nvcc_version():
        pytest.skip(f"the table is nvcc {budgets.table()['nvcc']}'s, this is {budgets.nvcc_version()}")
    granted = budgets.table()["kernels"]
    above = []
    for kernel, architecture, usage in usages:
        for name, value in usage.told().items():
            budget = granted.get(kernel, {}).get(architecture, {}).get(name, 0)
            if value > budget:
                above.append(f"{kernel} [{architecture}]: {name} {value}, budget {budget}")
    assert not above, "\n".join([*above, AGAIN])


def test_no_kernel_spills_without_a_reason(usages):
    def fails(kernel, usage):
        local = usage.stack or usage.spill_stores or usage.spill_loads
        return usage.told() if local and not allowed(LOCAL_MEMORY, kernel) else None

    assert not failing(usages, fails)


def test_no_kernel_computes_in_doubles_without_a_reason(usages):
    assert not failing(usages, lambda kernel, usage: usage.doubles and not allowed(DOUBLES, kernel))


def test_no_kernel_waits_for_products_where_its_source_does_not(usages):
    assert not failing(usages, lambda kernel, usage: usage.waits)


def test_every_kernel_has_a_kind(usages):
    kinds = {kernel: allowed(KINDS, kernel) for kernel, _, _ in usages}
    assert not [kernel for kernel, kind in kinds.items() if kind not in (MEMORY, MATRIX, OTHER)], (
        "add them to kernel_kinds.py"
    )


def test_every_declaration_has_a_kernel(usages):
    names = {kernel for kernel, _, _ in usages}
    patterns = [*KINDS, *WIDE_STORES, *LOCAL_MEMORY, *DOUBLES]
    assert not [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in names)]


def test_names_are_those_of_the_sources(usages):
    text = "".join(path.read_text() for path in (budgets.ROOT / "kernels").glob("*/*.cu*"))
    for kernel, _, _ in usages:
        name = re.fullmatch(r"\w+: (?:\w+::)*(\w+)(?:<.*>)?", kernel)
        assert name and re.search(rf"\b{name[1]}\b", text), kernel


# --- machine code -----------------------------------------------------------------------------------------


@needs_disassembler
def test_machine_code_was_read(usages):
    assert all(sum(usage.opcodes.values()) > 5 for _, _, usage in usages)


@needs_disassembler
def test_no_kernel_uses_local_memory_without_a_reason(usages):
    def fails(kernel, usage):
        return [] if allowed(LOCAL_MEMORY, kernel) else [name for name in usage.opcodes if LOCAL.match(name)]

    assert not failing(usages, fails)


@needs_disassembler
def test_kernels_bound_by_memory_load_sixteen_bytes(usages):
    def fails(kernel, usage):
        return allowed(KINDS, kernel) == MEMORY and not any(map(WIDE_LOAD.match, usage.opcodes))

    assert not failing(usages, fails)


@needs_disassembler
def test_kernels_with_large_results_store_sixteen_bytes(usages):
    def fails(kernel, usage):
        stores = any(fnmatchcase(kernel, pattern) for pattern in WIDE_STORES)
        return stores and not any(map(WIDE_STORE.match, usage.opcodes))

    assert not failing(usages, fails)


@needs_disassembler
def test_matrix_kernels_use_the_matrix_units(usages):
    def fails(kernel, usage):
        return allowed(KINDS, kernel) == MATRIX and not any(map(MATRIX_UNIT.match, usage.opcodes))

    assert not failing(usages, fails)


@needs_disassembler
def test_warpgroup_kernels_multiply_what_tensor_copies_bring(usages):
    def concerned(pattern):
        return [entry for entry in usages if fnmatchcase(entry[0], pattern)]

    def fails(_, usage):
        return [name for name in ("HGMMA", "UTMALDG") if not any(code.startswith(name) for code in usage.opcodes)]

    for pattern in WARPGROUP_KERNELS:
        assert concerned(pattern), f"no kernel is called {pattern}"
        assert not failing(concerned(pattern), fails)


# --- the gates see what they are for ------------------------------------------------------------------------


@pytest.fixture(scope="module", params=budgets.ARCHITECTURES)
def planted(request, tmp_path_factory):
    source = Path(__file__).with_name("planted_usage.cu")
    return budgets.compiled(source, request.param, tmp_path_factory.mktemp("planted") / "planted.cubin")


def test_planted_doubles_are_seen(planted):
    usage = planted["doubles<float, 3>"]
    assert usage.doubles and usage.static_shared_per_block == 256 and 0 < usage.registers <= 255
    assert not usage.stack and not usage.spill_stores


def test_planted_spills_are_seen(planted):
    usage = planted["spills"]
    assert usage.registers <= 32 and usage.spill_stores and usage.spill_loads and not usage.doubles


def test_planted_wait_is_seen(tmp_path):
    usages = budgets.compiled(Path(__file__).with_name("planted_usage_sm90.cu"), "90a", tmp_path / "planted.cubin")
    assert usages["touches<true>"].waits and not usages["touches<false>"].waits


@needs_disassembler
def test_planted_local_memory_is_seen_in_the_machine_code(planted):
    assert any(map(LOCAL.match, planted["spills"].opcodes))
    assert not any(map(LOCAL.match, planted["doubles<float, 3>"].opcodes))
    assert not any(map(WIDE_LOAD.match, planted["spills"].opcodes))
    assert any(name.startswith("DFMA") for name in planted["doubles<float, 3>"].opcodes)
