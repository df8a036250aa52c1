"""Passing tensors to the functions of floor.cpp."""

import ctypes

import torch

TYPES = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 3}


def pointer(tensor: torch.Tensor | None):
    return ctypes.c_void_p(tensor.data_ptr() if tensor is not None else None)


def integer(value: int):
    return ctypes.c_int64(value)
