"""Drop-in PyTorch kernels for RL post-training and memory-efficient training of language models.

Four families, each one call: shared-prefix attention, group-normalised policy optimisation,
low-rank optimizers, activation offload. See README.md for the formulas.
"""

from typing import Any

from . import attention, lowrank, offload, policy
from ._native import info
from .attention import *  # noqa: F403
from .device import choose_device
from .lowrank import *  # noqa: F403
from .offload import *  # noqa: F403
from .policy import *  # noqa: F403

__all__ = ["choose_device", "info", *attention.__all__, *lowrank.__all__, *offload.__all__, *policy.__all__]


def __getattr__(name: str) -> Any:
    # Of the offload family, those that need torch.distributed are imported when they are asked for.
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(offload, name)
    except AttributeError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
