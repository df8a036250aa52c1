"""linear_token_logprobs against its matrix products alone; linear_policy_loss against two steps and the eager head."""

from collections.abc import Callable

import torch
from torch import Tensor

import pykern
from bench.harness import Case
from bench.policy.cases_logprobs import by_eager_head


def named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def products_alone(hidden: Tensor, weight: Tensor) -> Callable[[], None]:
    """The products of forward and backward with recomputed logits: logits twice, and both gradients."""
    hidden, weight = hidden.detach(), weight.detach()
    logits = torch.empty(hidden.shape[0], weight.shape[0], dtype=hidden.dtype)

    def products() -> None:
        torch.mm(hidden, weight.t(), out=logits)
        torch.mm(hidden, weight.t(), out=logits)
        torch.mm(logits, weight)
        torch.mm(logits.t(), hidden)

    return products


def head_and_targets(rows: int, hidden_size: int, vocabulary: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    hidden = torch.randn(rows, hidden_size).to(dtype).requires_grad_()
    weight = (torch.randn(vocabulary, hidden_size) / hidden_size**0.5).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(vocabulary, (rows,))


def products_case(rows: int, hidden_size: int, vocabulary: int, dtype: torch.dtype) -> Case:
    def make() -> dict[str, Callable[[], object]]:
        hidden, weight, targets = head_and_targets(rows, hidden_size, vocabulary, dtype)
        weights = torch.randn(rows)

        def ours() -> None:
            hidden.grad = weight.grad = None
            pykern.linear_token_logprobs(hidden, weight, targets).backward(weights)

        return {"pykern": ours, "its products alone, torch.mm": products_alone(hidden, weight)}

    return Case(
        "policy",
        "linear_token_logprobs_products",
        f"N={rows} H={hidden_size} V={vocabulary} {named(dtype)}",
        make,
        flops=8 * rows * hidden_size * vocabulary,
        dtype=named(dtype),
    )


def loss_case(rows: int, hidden_size: int, vocabulary: int, dtype: torch.dtype) -> Case:
    """A batch of 16 responses, a quarter of them without an advantage."""

    def make() -> dict[str, Callable[[], object]]:
        hidden, weight, targets = head_and_targets(rows, hidden_size, vocabulary, dtype)
        shape = (16, rows // 16)
        targets, advantages = targets.view(shape), torch.randn(16)
        advantages[::4] = 0
        with torch.no_grad():
            old = by_eager_head(hidden, weight, targets.flatten()).view(shape) + 0.1 * torch.randn(shape)
        size = (*shape, hidden_size)

        def provider(loss: Callable[[], tuple[Tensor, dict]]) -> Callable[[], None]:
            def step() -> None:
                hidden.grad = weight.grad = None
                loss()[0].backward()

            return step

        def in_two_steps(logprobs: Callable[..., Tensor]) -> Callable[[], None]:
            def loss() -> tuple[Tensor, dict]:
                return pykern.policy_loss(logprobs(hidden, weight, targets.flatten()).view(shape), old, advantages)

            return provider(loss)

        return {
            "pykern": provider(lambda: pykern.linear_policy_loss(hidden.view(size), weight, targets, old, advantages)),
            "linear_token_logprobs, policy_loss": in_two_steps(pykern.linear_token_logprobs),
            "linear, log_softmax, policy_loss": in_two_steps(by_eager_head),
        }

    return Case(
        "policy",
        "linear_policy_loss",
        f"N={rows} H={hidden_size} V={vocabulary} {named(dtype)}",
        make,
        flops=6 * rows * hidden_size * vocabulary,
        dtype=named(dtype),
    )


def cases() -> list[Case]:
    """Those of seconds; the head of a large vocabulary is measured by bench.policy.linear_head."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        found += [products_case(512, 1024, 32000, dtype)]
        found += [loss_case(*shape, dtype) for shape in ((1024, 512, 8192), (1024, 1024, 32000))]
    return found
