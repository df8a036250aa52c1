"""Tensors of a GPU that are made in one stream and used in others as well."""

import torch
from torch import Tensor


def stream_of(tensor: Tensor) -> object:
    """The stream that computes on the tensor's device now; None on a CPU."""
    return torch.cuda.current_stream(tensor.device) if tensor.is_cuda else None


def hand_over(tensor: Tensor, made_in: object) -> Tensor:
    """The tensor, for use in the stream that computes now, which waits for `made_in`. Its memory waits for both."""
    stream = stream_of(tensor)
    if stream != made_in:
        stream.wait_stream(made_in)
        tensor.record_stream(stream)
    return tensor


__all__ = ["hand_over", "stream_of"]
