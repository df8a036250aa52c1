"""Losses of given log-probabilities at the size of a GPU's micro-batch, beside their chain under torch.compile."""

from collections.abc import Callable

import torch

import pykern
from bench.harness import Case
from bench.policy.cases_gpu import compiled
from bench.policy.cases_loss import eager_loss


def clipped_loss_case(rows: int, columns: int, loss: str) -> Case:
    """A ratio's clip and a KL estimate: the loss and its gradient."""

    def make() -> dict[str, Callable[[], object]]:
        torch.manual_seed(0)
        logprobs = (-torch.rand(rows, columns)).requires_grad_()
        old, reference = (logprobs.detach() + 0.1 * torch.randn(rows, columns) for _ in range(2))
        advantages, mask = torch.randn(rows), torch.rand(rows, columns) < 0.8
        chain = compiled(lambda x: eager_loss(x, old, advantages, mask, reference, loss))

        def step() -> object:
            value, _ = pykern.policy_loss(
                logprobs, old, advantages, mask=mask, loss=loss, kl="k3", kl_coef=0.05, ref_logprobs=reference
            )
            return torch.autograd.grad(value, logprobs)

        return {"pykern": step, "torch.compile": lambda: torch.autograd.grad(chain(logprobs), logprobs)}

    # Three inputs and a mask byte read, the coefficient written, read and scaled into the gradient.
    moved = 25.0 * rows * columns
    return Case("policy", f"policy_loss {loss} beside torch.compile", f"{rows}x{columns}", make, bytes=moved)


def composed_loss_case(rows: int, columns: int) -> Case:
    """A gate of the ratio times weights of the rollout, less an entropy bonus: the loss and both gradients."""
    high, low = pykern.LOSSES["sapo"].temperatures

    def chain(logprobs, entropy, old, advantages, mask, weights):
        temperature = torch.where(advantages > 0, high, low)
        gate = torch.sigmoid(temperature * ((logprobs - old).exp() - 1))
        tokens = -advantages * (4 / temperature) * gate * weights - 0.001 * entropy
        return (torch.where(mask, tokens, 0.0)).sum() / mask.sum()

    def make() -> dict[str, Callable[[], object]]:
        torch.manual_seed(0)
        logprobs = (-torch.rand(rows, columns)).requires_grad_()
        entropy = torch.rand(rows, columns).requires_grad_()
        old = logprobs.detach() + 0.1 * torch.randn(rows, columns)
        advantages, weights = torch.randn(rows, columns), torch.rand(rows, columns)
        mask = torch.rand(rows, columns) < 0.8
        by_compiler = compiled(chain)

        def step() -> object:
            value, _ = pykern.policy_loss(
                logprobs, old, advantages, mask=mask, loss="sapo", aggregate="token-mean", rollout_weights=weights,
                entropy=entropy, entropy_coef=0.001,
            )  # fmt: skip
            return torch.autograd.grad(value, (logprobs, entropy))

        def compiled_step() -> object:
            value = by_compiler(logprobs, entropy, old, advantages, mask, weights)
            return torch.autograd.grad(value, (logprobs, entropy))

        return {"pykern": step, "torch.compile": compiled_step}

    # Five inputs and a mask byte read, two coefficients written, read and scaled into gradients.
    moved = 45.0 * rows * columns
    return Case("policy", "policy_loss sapo, weighted, with entropy", f"{rows}x{columns}", make, bytes=moved)


def cases() -> list[Case]:
    clipped = [clipped_loss_case(4096, 8192, loss) for loss in ("grpo", "gspo", "gmpo")]
    return [*clipped, composed_loss_case(4096, 8192)]
