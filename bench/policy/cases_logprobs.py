"""token_logprobs against log_softmax and logsumexp; linear_token_logprobs against the eager head, whole and chunked."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear

import pykern
from bench.harness import Case


def by_log_softmax(logits: Tensor, targets: Tensor) -> Tensor:
    return torch.log_softmax(logits.float(), -1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def by_logsumexp(logits: Tensor, targets: Tensor) -> Tensor:
    logits = logits.float()
    return logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - torch.logsumexp(logits, -1)


def token_peers() -> dict[str, Callable[..., Tensor]]:
    return {"log_softmax": by_log_softmax, "logsumexp": by_logsumexp}


def token_case(
    rows: int,
    vocabulary: int,
    dtype: torch.dtype,
    backward: bool,
    peers: Callable[[], dict[str, Callable[..., Tensor]]] = token_peers,
) -> Case:
    """peers: made with the case; each has logits of its own, as there are some that overwrite them."""

    def make() -> dict[str, Callable[[], object]]:
        torch.manual_seed(0)
        logits = torch.randn(rows, vocabulary).to(dtype).requires_grad_(backward)
        targets = torch.randint(vocabulary, (rows,))
        weights = torch.randn(rows)

        def copied() -> Tensor:
            return logits.detach().clone().requires_grad_(backward)

        def provider(function, logits: Tensor) -> Callable[[], object]:
            if not backward:
                return lambda: function(logits, targets)

            def step() -> None:
                logits.grad = None
                function(logits, targets).backward(weights)

            return step

        providers = {"pykern": provider(pykern.token_logprobs, logits)}
        providers |= {name: provider(function, copied()) for name, function in peers().items()}
        if backward:
            # Overwrites its logits at every step.
            in_place = partial(pykern.token_logprobs, backward_in_place=True)
            providers["pykern, in place"] = provider(in_place, copied())
        return providers

    # One read of the logits; the backward reads them again and writes their gradient.
    passes = 3 if backward else 1
    return Case(
        "policy",
        "token_logprobs" + ("_forward_backward" if backward else "_forward"),
        f"{rows}x{vocabulary} {str(dtype).removeprefix('torch.')}",
        make,
        bytes=passes * rows * vocabulary * dtype.itemsize,
    )


def by_eager_head(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return by_log_softmax(linear(hidden, weight), targets)


def linear_peers() -> dict[str, tuple[Callable[..., Tensor], int | None]]:
    return {"linear, log_softmax": (by_eager_head, None), "the same, 256-row chunks": (by_eager_head, 256)}


def linear_case(
    rows: int,
    hidden_size: int,
    vocabulary: int,
    dtype: torch.dtype,
    backward: bool,
    peers: Callable[[], dict[str, tuple[Callable[..., Tensor], int | None]]] = linear_peers,
) -> Case:
    """peers: made with the case; each with the rows that it gets at a time, or None for all."""

    def make() -> dict[str, Callable[[], object]]:
        torch.manual_seed(0)
        hidden = torch.randn(rows, hidden_size).to(dtype).requires_grad_(backward)
        weight = (torch.randn(vocabulary, hidden_size) / hidden_size**0.5).to(dtype).requires_grad_(backward)
        targets = torch.randint(vocabulary, (rows,))
        weights = torch.randn(rows)

        def provider(function, chunk: int | None = None) -> Callable[[], object]:
            chunk = chunk or rows

            def step() -> None:
                hidden.grad = weight.grad = None
                for part in (slice(begin, begin + chunk) for begin in range(0, rows, chunk)):
                    logprobs = function(hidden[part], weight, targets[part])
                    if backward:
                        logprobs.backward(weights[part])

            return step

        ours = {"pykern": provider(pykern.linear_token_logprobs)}
        return ours | {name: provider(*peer) for name, peer in peers().items()}

    # Forward one product; backward the recomputed logits and two products.
    return Case(
        "policy",
        "linear_token_logprobs" + ("_forward_backward" if backward else "_forward"),
        f"N={rows} H={hidden_size} V={vocabulary} {str(dtype).removeprefix('torch.')}",
        make,
        flops=(8 if backward else 2) * rows * hidden_size * vocabulary,
        dtype="bfloat16" if dtype == torch.bfloat16 else "float32",
    )


def cases() -> list[Case]:
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        for backward in (False, True):
            found += [token_case(*shape, dtype, backward) for shape in ((512, 32000), (64, 151936))]
            found += [
                linear_case(*shape, dtype, backward)
                for shape in ((4096, 256, 512), (1024, 512, 8192), (2048, 256, 32000))
            ]
    # A micro-batch of a large vocabulary, the size that the bar of token_logprobs is set at.
    return [*found, token_case(2048, 151936, torch.bfloat16, True)]
