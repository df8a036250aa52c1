"""What activation offload and its codecs mean, in plain PyTorch."""

import torch
from torch import Tensor


def activation_offload() -> torch.autograd.graph.saved_tensors_hooks:
    """Every saved tensor waits for the backward as a copy of its own.

    Gradients are those of plain autograd, bit for bit where kernels don't choose their path by strides. No filter, no
    deduplication, no overlap.
    """

    def pack(tensor: Tensor) -> Tensor:
        return tensor.detach().clone(memory_format=torch.preserve_format)

    def unpack(copy: Tensor) -> Tensor:
        return copy

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def encode(tensor: Tensor, codec: str) -> tuple[Tensor, Tensor]:
    """Codes, uint8 [n], and scales, float32 [ceil(n / 128)], of a tensor's n elements."""
    values = tensor.detach().reshape(-1).float()
    count = values.numel()
    blocks = torch.nn.functional.pad(values, (0, -count % 128)).view(-1, 128)
    finite = blocks.isfinite()
    limit = 448.0 if codec == "float8_e4m3" else 127.0
    # A little below the largest float, so that limit * scale is finite.
    absmax = blocks.abs().masked_fill(~finite, 0.0).amax(dim=1).clamp(max=2.0**128 - 2.0**108)
    scales = (absmax / limit).clamp(min=torch.finfo(torch.float32).tiny)
    scaled = (blocks * (1.0 / scales)[:, None]).clamp(-limit, limit).masked_fill(~finite, 0.0)
    if codec == "float8_e4m3":
        codes = scaled.to(torch.float8_e4m3fn).view(torch.uint8).masked_fill(~finite, 0x7F)
    else:
        codes = scaled.round().to(torch.int8).view(torch.uint8).masked_fill(~finite, 0x80)
    return codes.reshape(-1)[:count], scales


def decode(codes: Tensor, scales: Tensor, codec: str, dtype: torch.dtype) -> Tensor:
    """The elements again, [n], rounded to `dtype`."""
    if codec == "float8_e4m3":
        values = codes.view(torch.float8_e4m3fn).float()
    else:
        values = codes.view(torch.int8).float().masked_fill(codes == 0x80, float("nan"))
    return (values * scales.repeat_interleave(128)[: len(codes)]).to(dtype)
