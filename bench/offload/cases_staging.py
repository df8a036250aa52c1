"""Packing the saved tensors of a transformer layer into one block, and back, against plain PyTorch."""

from collections.abc import Callable

import torch
from torch import Tensor

import pykern
from bench.harness import Case


def saved_tensors(tokens: int, width: int) -> list[Tensor]:
    """Two norm inputs, Q, K, V, the attention's output and the MLP's middle, in bfloat16, and a row of positions."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    widths = [width, width, width, width // 4, width // 4, width, 4 * width]
    tensors = [torch.randn(tokens, columns, generator=generator).bfloat16() for columns in widths]
    return [*tensors, torch.arange(tokens)]


def plain_pack(tensors: list[Tensor], codec: str) -> list[Tensor]:
    """One block by `cat` of bytes; encoded, codes and scales per 128 elements of each tensor."""
    if codec == "none":
        return [torch.cat([tensor.view(-1).view(torch.uint8) for tensor in tensors])]
    packed = []
    for tensor in tensors:
        if not tensor.is_floating_point():
            packed.append(tensor)
            continue
        blocks = tensor.view(-1, 128).float()
        limit = 448.0 if codec == "float8_e4m3" else 127.0
        scales = blocks.abs().amax(dim=1, keepdim=True).clamp(min=1e-30) / limit
        scaled = blocks / scales
        codes = scaled.to(torch.float8_e4m3fn) if codec == "float8_e4m3" else scaled.round_().to(torch.int8)
        packed.extend((codes, scales))
    return packed


def staging_case(tokens: int, width: int, codec: str, packing: bool) -> Case:
    elements = tokens * (8 * width + width // 2)
    # Read once, written once; a code and its share of a scale are 1 + 1/32 bytes.
    encoded = 2.0 * elements if codec == "none" else (1 + 1 / 32) * elements

    def make() -> dict[str, Callable[[], object]]:
        tensors = saved_tensors(tokens, width)
        layout = pykern.StagingLayout.of(tensors, codec)
        block = layout.pack(tensors)
        if not packing:
            targets = layout.unpack(block)
            return {"pykern": lambda: layout.unpack(block, targets)}
        return {
            "pykern": lambda: layout.pack(tensors, block),
            "plain PyTorch": lambda: plain_pack(tensors, codec),
        }

    return Case(
        "offload",
        f"staging {'pack' if packing else 'unpack'} {codec}",
        f"{tokens} tokens of {width}, bfloat16",
        make,
        bytes=2.0 * elements + encoded + 2 * 8.0 * tokens,
    )


def cases(device: str) -> list[Case]:
    tokens, width = (32768, 4096) if device == "cuda" else (4096, 1024)
    codecs = ("none", "float8_e4m3", "int8")
    return [staging_case(tokens, width, codec, packing) for codec in codecs for packing in (True, False)]
