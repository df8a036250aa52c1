"""What each kernel is, and what it is allowed, by patterns of names as tests.packaging.budgets prints them."""

MEMORY = "memory"
"""Bound by memory: its machine code loads sixteen bytes at a time."""

MATRIX = "matrix"
"""Bound by products of matrices: its machine code uses the matrix units."""

OTHER = "other"
"""Neither: a kernel over few values, or one whose accesses can't be wide."""

KINDS: dict[str, str] = {
    "policy: token_logprobs_*": MEMORY,
}
"""The kind of every kernel; the first pattern that fits counts."""

LOCAL_MEMORY: dict[str, str] = {}
"""Kernels that may spill or have a stack frame, and why."""

DOUBLES: dict[str, str] = {
    "policy: token_logprobs_kernel*": "a row's last sum, over its warps, and its logarithm; 1 / temperature",
    "policy: token_logprobs_backward_kernel*": "1 / temperature, once per thread",
}
"""Kernels that may compute in double precision, and why."""
