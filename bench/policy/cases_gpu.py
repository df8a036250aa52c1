"""Log-probabilities at the size of a GPU's micro-batch, where a CPU takes half a minute: beside torch.compile, and
liger-kernel where it is installed.
"""

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

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


def cases() -> list[Case]:
    found = []
    for backward in (False, True):
        found += [
            token_case(8192, 151936, torch.bfloat16, backward, token_peers_of_a_gpu),
            linear_case(8192, 4096, 131072, torch.bfloat16, backward, linear_peers_of_a_gpu),
        ]
    return found
