from bench.harness import Case
from bench.policy import cases_advantages, cases_logprobs, cases_loss, cases_returns


def cases(device: str) -> list[Case]:
    return [
        *cases_advantages.cases(device),
        *cases_loss.cases(device),
        *cases_returns.cases(device),
        *cases_logprobs.cases(device),
    ]
