"""What the functions of this family check alike, and the form in which ops take tensors."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def kind(value: object) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__


def lookup(table: dict, name: object, argument: str):
    if name not in table:
        raise ValueError(f"{argument}: expected one of {', '.join(str(key) for key in table)}, got {name!r}")
    return table[name]


def checked_numbers(given: Sequence[float], name: str, *meaning: str) -> list[float]:
    """As many numbers as there are words for them."""
    try:
        numbers = [float(number) for number in given]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) != len(meaning) or any(math.isnan(number) for number in numbers):
        raise ValueError(f"{name}: expected {len(meaning)} numbers, ({', '.join(meaning)}), got {given!r}")
    return numbers


def check_floats(tensor: Tensor, name: str) -> None:
    if not isinstance(tensor, Tensor) or tensor.dtype not in FLOATS:
        raise TypeError(f"{name}: expected a floating-point tensor, got {kind(tensor)}; convert it with .float()")


def check_integers(tensor: Tensor, name: str) -> None:
    if not isinstance(tensor, Tensor) or tensor.dtype not in INTEGERS:
        raise TypeError(f"{name}: expected a tensor of integers, got {kind(tensor)}")


def check_group_ids(ids: Tensor, name: str, size: int, of: str) -> None:
    """One integer for each of `size` of something."""
    if not isinstance(ids, Tensor) or ids.dtype not in INTEGERS:
        raise TypeError(f"{name}: expected a tensor of integers, got {kind(ids)}; number the groups")
    if list(ids.shape) != [size]:
        raise ValueError(f"{name}: expected one per {of}, [{size}], got {list(ids.shape)}")


def check_like(tensor: Tensor, name: str, like: Tensor, like_name: str) -> None:
    """Of the shape of `like` and on its device."""
    if tensor.shape != like.shape:
        raise ValueError(f"{name}: expected the shape of {like_name}, {list(like.shape)}, got {list(tensor.shape)}")
    check_device(tensor, name, like, like_name)


def check_device(tensor: Tensor, name: str, like: Tensor, like_name: str) -> None:
    if tensor.device != like.device:
        raise ValueError(f"{name}: expected the device of {like_name}, {like.device}, got {tensor.device}")


def checked_flags(flags: Tensor | None, name: str, like: Tensor, like_name: str) -> Tensor | None:
    """A mask as contiguous bool."""
    if flags is None:
        return None
    if not isinstance(flags, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {kind(flags)}")
    check_like(flags, name, like, like_name)
    return (flags if flags.dtype == torch.bool else flags != 0).contiguous()


def checked_offsets(cu_seqlens: Tensor | None, tokens: Tensor, name: str) -> tuple[Tensor | None, int]:
    """The bounds of packed sequences as contiguous int64, None beside padded `tokens`; and how many sequences."""
    if cu_seqlens is None:
        if tokens.dim() != 2:
            raise ValueError(f"{name}: expected [B, T], got {list(tokens.shape)}; packed tokens [N] need cu_seqlens")
        return None, tokens.shape[0]
    check_integers(cu_seqlens, "cu_seqlens")
    if tokens.dim() != 1 or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(
            f"cu_seqlens: expected [B + 1] beside {name} [N], got {list(cu_seqlens.shape)} beside "
            f"{list(tokens.shape)}; padded {name} take a mask instead"
        )
    check_device(cu_seqlens, "cu_seqlens", tokens, name)
    return cu_seqlens.to(torch.int64).contiguous(), cu_seqlens.shape[0] - 1


def constant(tensor: Tensor) -> Tensor:
    """Contiguous, float64 for float64, else float32, and without a gradient."""
    return tensor.detach().to(torch.float64 if tensor.dtype == torch.float64 else torch.float32).contiguous()
