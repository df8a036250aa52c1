"""Low-rank optimizers and activation offload for the Trainer of transformers; nothing is patched.

::

    Trainer(model, args, ..., optimizer_cls_and_kwargs=trainer_optimizer(model, "GaLoreAdamW", rank=128, lr=1e-2))
    Trainer(model, args, ..., optimizers=backward_optimizer(model, "GaLoreAdamW", rank=128, lr=1e-2))
    offloading(Trainer, storage="pinned")(model, args, ...)
"""

from collections.abc import Sequence

import torch

from .. import ActivationOffload
from ..lowrank import BackwardOptimizer, low_rank_groups, optimizer, presets, step_in_backward


def trainer_optimizer(
    model: torch.nn.Module,
    name: str = "GaLoreAdamW",
    *,
    rank: int,
    lr: float,
    targets: str | Sequence[str] = "all-linear",
    exclude: str | Sequence[str] = (),
    convolutions: bool = False,
    weight_decay: float = 0.0,
    **options,
) -> tuple[type, dict]:
    """Trainer's `optimizer_cls_and_kwargs`: the class of a preset and its arguments, "params" among them.

    Biases, norms and whatever else has one axis don't decay, as Trainer has it. The Trainer then takes the rate from
    here, not from args.learning_rate; its scheduler, clipping, gradient accumulation and checkpoints work as always.

    Args:
        model: the model to be trained.
        name: "LowRankOptimizer", or a preset such as "GaLoreAdamW".
        rank, targets, exclude, convolutions: see low_rank_groups.
        lr, weight_decay: of all groups.
        options: further keywords of the optimizer (refresh_every, scale, betas, ...).

    Raises:
        ValueError: an unknown name, or targets that match nothing.
    """
    kind = _kind(name)
    groups = low_rank_groups(model, rank=rank, targets=targets, exclude=exclude, convolutions=convolutions)
    inside, outside = groups[0], [param for group in groups[1:] for param in group["params"]]
    split = [
        {"params": [param for param in outside if param.dim() > 1], "rank": None},
        {"params": [param for param in outside if param.dim() < 2], "rank": None, "weight_decay": 0.0},
    ]
    params = [inside, *(group for group in split if group["params"])]
    return kind, {"params": params, "lr": lr, "weight_decay": weight_decay, **options}


def backward_optimizer(
    model: torch.nn.Module,
    name: str = "GaLoreAdamW",
    *,
    accumulate: int = 1,
    refresh_by: str = "window",
    max_norm: float | None = None,
    clip_by: str = "parameter",
    **keywords,
) -> tuple[BackwardOptimizer, None]:
    """Trainer's `optimizers`: every parameter is stepped in the backward pass as its gradient arrives, and frees it.

    The Trainer makes its scheduler for it, saves and loads its state. `accumulate` is to be
    args.gradient_accumulation_steps. args.max_grad_norm finds no gradients left: clip by `max_norm` here. One device:
    put the model there first.

    Args:
        model, name, keywords: as trainer_optimizer has them.
        accumulate, refresh_by, max_norm, clip_by: see step_in_backward.
    """
    kind, arguments = trainer_optimizer(model, name, **keywords)
    groups = {param: group for group in arguments.pop("params") for param in group["params"]}

    def make(params: list[torch.Tensor]) -> torch.optim.Optimizer:
        return kind([{**groups[params[0]], "params": params}], **arguments)

    stepper = step_in_backward(model, make, accumulate, refresh_by=refresh_by, max_norm=max_norm, clip_by=clip_by)
    return BackwardOptimizer(stepper), None


def offloading(trainer: type, **options) -> type:
    """A subclass of a Trainer class whose forwards run under ActivationOffload.

    The class's own `compute_loss_context_manager` is extended, so evaluation, autocast, gradient accumulation and
    subclasses such as trl's trainers work as always. The trainer has the ActivationOffload as `activation_offload`,
    with its `stats()`.

    Args:
        trainer: transformers.Trainer or a subclass.
        options: of ActivationOffload. By default storage is "pinned" where torch has CUDA, else "memory", and
            `parameters` are the model's.

    Raises:
        TypeError: not a class with that method.
    """
    if not hasattr(trainer, "compute_loss_context_manager"):
        name = getattr(trainer, "__name__", type(trainer).__name__)
        raise TypeError(f"trainer: expected transformers.Trainer or a subclass, got {name}")
    settled = {"storage": "pinned" if torch.cuda.is_available() else "memory", **options}

    class OffloadingTrainer(trainer):
        def __init__(self, *arguments, **keywords) -> None:
            super().__init__(*arguments, **keywords)
            self.activation_offload = ActivationOffload(**{"parameters": self.model, **settled})

        def compute_loss_context_manager(self):
            stack = super().compute_loss_context_manager()
            stack.enter_context(self.activation_offload)
            return stack

    OffloadingTrainer.__name__ = OffloadingTrainer.__qualname__ = f"Offloading{trainer.__name__}"
    return OffloadingTrainer


def _kind(name: str) -> type:
    if name == "LowRankOptimizer":
        return optimizer.LowRankOptimizer
    if name not in presets.PRESETS:
        raise ValueError(f"name: expected 'LowRankOptimizer' or one of {sorted(presets.PRESETS)}, got {name!r}")
    return getattr(presets, name)
