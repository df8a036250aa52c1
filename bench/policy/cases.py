from bench.harness import Case
from bench.policy import cases_advantages, cases_logprobs


def cases(device: str) -> list[Case]:
    return [*cases_advantages.cases(device), *cases_logprobs.cases(device)]
