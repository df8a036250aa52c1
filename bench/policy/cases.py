from bench.harness import Case
from bench.policy import (
    cases_advantages,
    cases_gpu,
    cases_linear,
    cases_logprobs,
    cases_loss,
    cases_loss_gpu,
    cases_returns,
    cases_selection,
)


def cases(device: str) -> list[Case]:
    own = [*cases_loss_gpu.cases(), *cases_gpu.cases()] if device == "cuda" else []
    return [
        *cases_advantages.cases(device),
        *cases_loss.cases(device),
        *cases_returns.cases(device),
        *cases_selection.cases(),
        *own,
        *cases_logprobs.cases(),
        *cases_linear.cases(),
    ]
