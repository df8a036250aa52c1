"""Cases of the policy family, one module per pair of ops."""

from bench.harness import Case
from bench.policy import cases_advantages


def cases() -> list[Case]:
    return cases_advantages.cases()
