"""Norms, gated activation functions and dropout, forward and backward, against PyTorch's own."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

import pykern
from bench.harness import Case


def step(function: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(function(*inputs), inputs, grad)


def case(
    name: str, tokens: int, width: int, lines: int, inputs: int, traffic: int, providers: dict[str, Callable]
) -> Case:
    """`inputs` of [tokens, width] and `lines` of [width]; `traffic` large tensors are read or written at least."""

    def make() -> dict[str, Callable[[], object]]:
        generator = torch.Generator(torch.get_default_device()).manual_seed(0)
        shapes = [(tokens, width)] * inputs + [(width,)] * lines
        tensors = [torch.randn(shape, generator=generator).bfloat16().requires_grad_() for shape in shapes]
        grad = torch.randn(tokens, width, generator=generator).bfloat16()
        return {provider: step(function, tensors, grad) for provider, function in providers.items()}

    return Case("offload", name, f"{tokens} x {width} bfloat16", make, bytes=2.0 * traffic * tokens * width)


def cases(device: str) -> list[Case]:
    tokens, width = (32768, 4096) if device == "cuda" else (4096, 1024)
    return [
        case("rms_norm", tokens, width, 1, 1, 5, {
            "pykern": lambda x, w: pykern.rms_norm(x, w, 1e-6),
            "torch": lambda x, w: functional.rms_norm(x, (width,), w, 1e-6),
        }),
        case("layer_norm", tokens, width, 2, 1, 5, {
            "pykern": lambda x, w, b: pykern.layer_norm(x, w, b),
            "torch": lambda x, w, b: functional.layer_norm(x, (width,), w, b),
        }),
        case("gelu", tokens, 4 * width, 0, 1, 5, {"pykern": pykern.gelu, "torch": functional.gelu}),
        case("swiglu", tokens, 4 * width, 0, 2, 8, {
            "pykern": pykern.swiglu,
            "torch": lambda gate, up: functional.silu(gate) * up,
        }),
        case("dropout", tokens, width, 0, 1, 4, {
            "pykern": lambda x: pykern.dropout(x, 0.1),
            "torch": lambda x: functional.dropout(x, 0.1),
        }),
    ]  # fmt: skip
