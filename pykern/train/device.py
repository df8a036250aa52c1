"""Where a run computes, and whether every family it uses has the kernels for it."""

import torch

from .. import _native
from ..device import choose_device, unusable_reason
from .config import Config, InputError

_OPS = {
    "attention": ("prefix_attention_forward", "prefix_attention_backward"),
    "policy": (
        "group_advantages",
        "policy_loss_forward",
        "policy_loss_backward",
        "linear_token_logprobs",
        "linear_token_logprobs_backward",
    ),
    "lowrank": ("low_rank_adamw_step", "adamw_step"),
    "offload": ("offload_pack",),
}


GPU_DEFAULTS = {"dtype": "mixed", "offload": "none"}
"""What differs from Config's own defaults on a GPU."""


def choose(name: str) -> str:
    """ "cpu" or "cuda" for "auto", "cpu" or "cuda". Raises InputError for a GPU that can't be used."""
    try:
        return choose_device(name).type
    except RuntimeError as error:
        raise InputError(f"--device {name}: {unusable_reason()}; use --device cpu") from error


def families(config: Config) -> list[str]:
    """The families that a run with these options uses."""
    unused = {"lowrank": config.optimizer == "adamw", "offload": config.offload == "none"}
    return [family for family in _OPS if not unused.get(family)]


def resolve(config: Config, name: str) -> str:
    """The device that `choose` gives, for a run with these options. Raises InputError where it can't run there."""
    device = choose(name)
    if device == "cuda":
        for family in families(config):
            missing = [op for op in _OPS[family] if op not in _native.cuda_ops]
            if missing:
                raise InputError(
                    f"--device {name}: the {family} family has no CUDA kernel for {', '.join(missing)} yet; "
                    "use --device cpu"
                )
        if not config.pipeline and config.offload in ("memory", "file"):
            raise InputError(
                f"--offload {config.offload}: is for activations in ordinary memory; use --offload pinned or none on a "
                "GPU, or --device cpu"
            )
        if config.dtype == "float32":
            raise InputError(
                f"--dtype float32: attention on a GPU takes bfloat16; use --dtype {GPU_DEFAULTS['dtype']}, which keeps "
                "float32 weights, or --device cpu"
            )
    elif config.offload == "pinned":
        raise InputError("--offload pinned: needs a GPU; use --offload memory or file")
    return device


def describe(config: Config) -> str:
    """One line: which device each family runs on, and why not on a GPU."""
    line = f"{', '.join(families(config))}: on {config.device}"
    if config.device == "cuda":
        return f"{line} ({torch.cuda.get_device_name()})"
    reason = unusable_reason()
    return f"{line} ({reason})" if reason else line
