"""Tensors without their memory, and the tensors that subclasses are made of."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def plain_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """The tensor itself, or, of a subclass, the plain tensors that it is made of."""
    if is_traceable_wrapper_subclass(tensor):
        for _, inner in inner_tensors(tensor):
            yield from plain_tensors(inner)
    else:
        yield tensor


def inner_tensors(tensor: Tensor) -> list[tuple[str, Tensor]]:
    """Of a subclass: the tensors that it is made of, which may be subclasses again, by their names in it."""
    members = ((name, getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return [(name, member) for name, member in members if isinstance(member, Tensor)]


def with_inner_tensors(tensor: Tensor, inner: dict[str, Tensor]) -> Tensor:
    """The same subclass, made of other tensors.

    `detach` copies all else that it holds. Not `__tensor_unflatten__`: DTensor's refuses some layouts of its own.
    """
    other = tensor.detach()
    for name, member in inner.items():
        setattr(other, name, member)
    return other


def identities(tensors: Iterable[Tensor]) -> Iterator[int]:
    """Of the storages of the tensors."""
    for tensor in tensors:
        for plain in plain_tensors(tensor):
            if plain.layout is torch.strided:
                yield plain.untyped_storage()._cdata


def check_version(current: int, saved: int, tensor: Tensor, size: torch.Size) -> None:
    # Autograd leaves this check out for tensors that went through hooks.
    if current != saved:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: "
            f"[{tensor.type()} {list(size)}] is at version {current}; expected version {saved} instead. Hint: enable "
            "anomaly detection to find the operation that failed to compute its gradient, with "
            "torch.autograd.set_detect_anomaly(True)."
        )


def counter_of(tensor: Tensor) -> Tensor:
    """A tensor that shares the version counter of `tensor`, but not its memory."""
    if is_traceable_wrapper_subclass(tensor):
        return placeholder(tensor)
    counter = tensor.detach()
    counter.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return counter


def placeholder(tensor: Tensor) -> Tensor:
    """A tensor of the same size, dtype and device that takes one element of memory: NaN, where the dtype has one.

    Of a subclass, one that shares the version counter as well.
    """
    if is_traceable_wrapper_subclass(tensor):
        return with_inner_tensors(tensor, {name: placeholder(inner) for name, inner in inner_tensors(tensor)})
    element = torch.empty((), dtype=tensor.dtype, device=tensor.device)
    if tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1:
        element.fill_(float("nan"))
    # Not `expand`: its result would be a view, which autograd treats otherwise.
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(
        element.untyped_storage(), 0, tensor.size(), (0,) * tensor.dim()
    )


def take_memory(tensor: Tensor, other: Tensor) -> None:
    """Lets `tensor` go on with the memory of `other`, of the same kind, and drop its own."""
    if is_traceable_wrapper_subclass(tensor):
        # Not their `data`: a view would hold on to its base.
        for name, inner in inner_tensors(other):
            setattr(tensor, name, inner)
    else:
        tensor.data = other
