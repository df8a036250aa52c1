"""Types of numbers: of the weights, and of what is computed from them.

float32, bfloat16: both of that type. mixed: float32 weights, gradients and optimizer states, and a float32 residual
stream; matrix products and attention are bfloat16, under torch.autocast. Attention on a GPU takes sixteen bits only.
"""

from contextlib import nullcontext

import torch

from .config import Config

MIXED = "mixed"
DTYPES = ("float32", "bfloat16", MIXED)


def weight_dtype(config: Config) -> torch.dtype:
    return torch.float32 if config.dtype == MIXED else getattr(torch, config.dtype)


def arithmetic(config: Config):
    """A context for the forward: what comes after it, the backward too, needs none."""
    return torch.autocast(config.device, torch.bfloat16) if config.dtype == MIXED else nullcontext()
