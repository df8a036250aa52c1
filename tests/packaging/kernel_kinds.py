"""What each kernel is, and what it is allowed, by patterns of names as tests.packaging.budgets prints them."""

MEMORY = "memory"
"""Bound by memory: its machine code loads sixteen bytes at a time."""

MATRIX = "matrix"
"""Bound by products of matrices: its machine code uses the matrix units."""

OTHER = "other"
"""Neither: a kernel over few values, or one whose accesses can't be wide."""

KINDS: dict[str, str] = {
    "attention: gather_rows_kernel<Pack*": MEMORY,
    "attention: gather_rows_kernel<*": OTHER,
    "attention: gather_rows_backward_kernel<*, true>": MEMORY,
    "attention: gather_rows_backward_kernel<*, false>": OTHER,
    "attention: prefix_attention_tiles_kernel<true>": MEMORY,
    "attention: prefix_attention_tiles_kernel<false>": OTHER,
    "offload: staging_copy_kernel<*": MEMORY,
    "offload: staging_code_kernel<true, *": MEMORY,
    # Codes are a byte each: eight of them become sixteen bytes.
    "offload: staging_code_kernel<false, *": OTHER,
}
"""The kind of every kernel; the first pattern that fits counts."""

LOCAL_MEMORY: dict[str, str] = {}
"""Kernels that may spill or have a stack frame, and why."""

DOUBLES: dict[str, str] = {
    "attention: gather_rows_backward_kernel<double, *": "float64 gradients are summed in float64",
}
"""Kernels that may compute in double precision, and why."""
