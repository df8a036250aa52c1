"""Log-probabilities, and a loss from hidden states, at the size of a GPU's micro-batch: half a minute of a CPU.

Beside torch.compile, and liger-kernel where it is installed.
"""

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

import pykern
from bench.harness import Case
from bench.policy.cases_logprobs import by_eager_head, by_log_softmax, linear_case, token_case, token_peers


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(function, dynamic=False, fullgraph=True)


def token_peers_of_a_gpu() -> dict[str, Callable[..., Tensor]]:
    peers = {"torch.compile": compiled(by_log_softmax), **token_peers()}
    if find_spec("liger_kernel"):
        from liger_kernel.transformers.functional import liger_cross_entropy

        # Where a gradient is wanted its forward writes that over the logits.
        peers["liger-kernel"] = lambda logits, targets: -liger_cross_entropy(logits, targets, reduction="none")
    return peers


def linear_peers_of_a_gpu() -> dict[str, tuple[Callable[..., Tensor], int | None]]:
    head = compiled(by_eager_head)
    peers = {"torch.compile": (head, None), "the same, 1024-row chunks": (head, 1024)}
    # On compute capability 9.0 its kernels are CuTe's.
    if find_spec("liger_kernel") and (torch.cuda.get_device_capability() != (9, 0) or find_spec("cutlass")):
        from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as Liger

        peers["liger-kernel"] = (lambda hidden, weight, targets: -Liger.apply(hidden, weight, targets), None)
    return peers


def loss_case(rows: int, hidden_size: int, vocabulary: int) -> Case:
    """Hidden states to the gradients of a token-level loss. More workspace saves the logits' second product."""

    def make() -> dict[str, Callable[[], object]]:
        torch.manual_seed(0)
        hidden = torch.randn(rows, hidden_size).bfloat16().requires_grad_()
        weight = (torch.randn(vocabulary, hidden_size) / hidden_size**0.5).bfloat16().requires_grad_()
        targets = torch.randint(vocabulary, (rows,))
        sequences = torch.arange(17) * (rows // 16)
        old_logprobs, advantages = -torch.rand(rows), torch.randn(16)
        head = compiled(by_eager_head)

        def by_parts() -> Tensor:
            logprobs = head(hidden, weight, targets)
            return pykern.policy_loss(logprobs, old_logprobs, advantages, cu_seqlens=sequences)[0]

        def at_once(workspace_bytes: int) -> Callable[[], Tensor]:
            return lambda: pykern.linear_policy_loss(
                hidden,
                weight,
                targets,
                old_logprobs,
                advantages,
                cu_seqlens=sequences,
                workspace_bytes=workspace_bytes,
            )[0]

        def provider(loss: Callable[[], Tensor]) -> Callable[[], object]:
            def step() -> None:
                hidden.grad = weight.grad = None
                loss().backward()

            return step

        return {
            "pykern": provider(at_once(8 << 30)),
            "the same in 4 GiB": provider(at_once(4 << 30)),
            "the same in 512 MiB": provider(at_once(512 << 20)),
            "torch.compile, policy_loss": provider(by_parts),
        }

    return Case(
        "policy",
        "linear_policy_loss_forward_backward",
        f"N={rows} H={hidden_size} V={vocabulary} bfloat16",
        make,
        flops=6 * rows * hidden_size * vocabulary,
        dtype="bfloat16",
    )


def cases() -> list[Case]:
    found = []
    for backward in (False, True):
        found += [
            token_case(8192, 151936, torch.bfloat16, backward, token_peers_of_a_gpu),
            linear_case(8192, 4096, 131072, torch.bfloat16, backward, linear_peers_of_a_gpu),
        ]
    return [*found, loss_case(8192, 4096, 131072)]
