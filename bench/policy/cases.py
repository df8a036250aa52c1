from bench.harness import Case
from bench.policy import cases_advantages, cases_logprobs


def cases() -> list[Case]:
    return [*cases_advantages.cases(), *cases_logprobs.cases()]
