"""What the options of a run are made into: model, optimizer, and the place where activations wait."""

from contextlib import nullcontext

import torch
from torch import Tensor

from .. import ActivationOffload, FiraAdamW, GaLoreAdamW, low_rank_groups
from .config import Config
from .model import Shape, Transformer
from .precision import weight_dtype


def use_threads(config: Config) -> None:
    if config.threads:
        torch.set_num_threads(config.threads)


def make_model(config: Config, device: torch.device) -> Transformer:
    """The model as the seed makes it: always on the CPU first, so that every device starts alike."""
    torch.manual_seed(config.seed)
    shape = Shape(config.layers, config.width, config.heads, config.key_heads, config.tie_head)
    return Transformer(shape).to(device=device, dtype=weight_dtype(config))


def make_optimizer(
    config: Config, model: Transformer, learning_rate: float, trained: list[Tensor] | None = None
) -> torch.optim.Optimizer:
    """Of all parameters, or of those in `trained`."""
    if config.optimizer == "adamw":
        return torch.optim.AdamW(trained or model.parameters(), lr=learning_rate, weight_decay=0.0)
    kind = {"galore": GaLoreAdamW, "fira": FiraAdamW}[config.optimizer]
    rank = min(config.rank, config.width)
    groups = low_rank_groups(model, rank=rank, targets=r"blocks\..*", refresh_every=config.refresh_every)
    if trained is not None:
        kept = set(map(id, trained))
        for group in groups:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) in kept]
    return kind([group for group in groups if group["params"]], lr=learning_rate)


def make_offload(config: Config, model: Transformer):
    """A context that keeps activations elsewhere between forward and backward, or one that does nothing."""
    if config.offload == "none":
        return nullcontext()
    keywords = {"path": config.spill_dir} if config.offload == "file" and config.spill_dir else {}
    return ActivationOffload(storage=config.offload, parameters=model, **keywords)
