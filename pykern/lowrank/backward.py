"""Optimizer steps inside the backward pass, so that no two weights' gradients live at once."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .distributed import is_distributed
from .optimizer import LowRankOptimizer, join
from .state import fitted_states

REFRESH_BY = ("window", "first")
CLIP_BY = ("parameter", "previous")


@dataclass(eq=False)
class _Weight:
    """A parameter with its optimizer; `low` adds up R in a window where that is enough, `.grad` G where not."""

    name: str
    param: Tensor
    optimizer: torch.optim.Optimizer
    low: Tensor | None = None
    arrived: bool = False

    @property
    def waiting(self) -> bool:
        return self.low is not None or self.param.grad is not None


class BackwardStepper:
    """What `step_in_backward` returns: the optimizers, their state for checkpoints, and the way to stop.

    Attributes:
        optimizers: {parameter name: its optimizer}; for learning rate schedulers, one each.
        accumulate: backward passes per step.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        make_optimizer: Callable[[list[Tensor]], torch.optim.Optimizer],
        accumulate: int,
        refresh_by: str = "window",
        max_norm: float | None = None,
        clip_by: str = "parameter",
    ):
        self.accumulate = accumulate
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self._refresh_by, self._max_norm, self._clip_by = refresh_by, max_norm, clip_by
        self._passes = 0
        self._pass = -1
        # By device, so that nothing waits: the squares of this window's norms so far, and the last window's total.
        self._squares: dict[torch.device, Tensor] = {}
        self._previous: dict[torch.device, Tensor] = {}
        self._handles = []
        self._weights: list[_Weight] = []
        for name, param in model.named_parameters():
            if not param.requires_grad:
                continue
            weight = _Weight(name, param, make_optimizer([param]))
            self.optimizers[name] = weight.optimizer
            self._weights.append(weight)
            self._handles.append(param.register_post_accumulate_grad_hook(self._arrival(weight)))
        join([optimizer for optimizer in self.optimizers.values() if isinstance(optimizer, LowRankOptimizer)])

    def _arrival(self, weight: _Weight) -> Callable[[Tensor], None]:
        def arrived(param: Tensor) -> None:
            # A pass that raises never reaches its end; its number keeps the next one from being taken for it.
            if torch._C._current_graph_task_id() != self._pass:
                self._pass = torch._C._current_graph_task_id()
                torch.autograd.Variable._execution_engine.queue_callback(self._end_of_pass)
            if self.accumulate > 1:
                self._accumulate(weight)
            if self._passes == self.accumulate - 1:
                self._step(weight)

        return arrived

    def _accumulate(self, weight: _Weight) -> None:
        """Adds R up and frees the gradient, where the step needs no more than R."""
        param, optimizer = weight.param, weight.optimizer
        first, weight.arrived = not weight.arrived, True
        if weight.low is None:
            if not first or not isinstance(optimizer, LowRankOptimizer):
                return
            if optimizer.needs_gradient(param):
                if self._refresh_by == "window" or optimizer.needs_gradient(param, ignore_refresh=True):
                    return
                low = optimizer.project(param, refresh=True)
                if optimizer.needs_gradient(param):  # This gradient named no basis.
                    return
            else:
                low = optimizer.project(param)
            weight.low = low
        else:
            weight.low.add_(optimizer.project(param))
        param.grad = None

    def _end_of_pass(self) -> None:
        self._passes += 1
        if self._passes >= self.accumulate:
            self.finish_window()

    def finish_window(self) -> None:
        """Steps what has a gradient and was not stepped yet, and begins a new window, also after fewer passes.

        Called at the end of each last pass: weights that had a gradient only in earlier ones, such as those of an
        expert that no token chose, are stepped then. Call it yourself after the last passes of an epoch that fill no
        window.
        """
        self._passes = 0
        for weight in self._weights:
            if weight.waiting:
                self._step(weight)
            weight.arrived = False
        if self._max_norm is not None and self._squares:
            total = sum(square.to(next(iter(self._squares))) for square in self._squares.values()).sqrt()
            self._previous = {device: total.to(device) for device in self._squares}
            self._squares = {}

    def _step(self, weight: _Weight) -> None:
        if self._max_norm is not None:
            self._clip(weight)
        if weight.low is not None:
            weight.optimizer.step_projected({weight.param: weight.low})
        else:
            weight.optimizer.step()
        weight.low = weight.param.grad = None

    @torch.no_grad()
    def _clip(self, weight: _Weight) -> None:
        if weight.low is None:
            value = weight.param.grad
            norm = torch.linalg.vector_norm(value, dtype=torch.promote_types(value.dtype, torch.float32))
            norm = norm.full_tensor() if is_distributed(norm) else norm
        else:
            value, norm = weight.low, weight.optimizer.low_norm(weight.param, weight.low)
        device = norm.device
        self._squares[device] = self._squares.get(device, 0) + norm.square()
        if self._clip_by == "previous" and device in self._previous:
            norm = torch.maximum(norm, self._previous[device])
        value.mul_((self._max_norm / (norm + 1e-6)).clamp(max=1.0).to(value.dtype))

    @property
    def param_groups(self) -> Iterator[dict]:
        """All groups of all optimizers, for code that sets learning rates by hand."""
        return (group for optimizer in self.optimizers.values() for group in optimizer.param_groups)

    def state_dict(self) -> dict:
        """The optimizers' states by parameter name, the passes counted, and what a window has accumulated so far."""
        waiting = [weight for weight in self._weights if weight.waiting]
        return {
            "passes": self._passes,
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "low": {weight.name: weight.low for weight in waiting if weight.low is not None},
            "gradients": {weight.name: weight.param.grad for weight in waiting if weight.low is None},
            "previous_norm": next(iter(self._previous.values()), None),
        }

    def load_state_dict(self, state_dict: dict) -> None:
        """Loads what state_dict() returned for a model with the same parameter names.

        The groups stay the same dictionaries, so that schedulers still reach them.
        """
        missing = self.optimizers.keys() ^ state_dict["optimizers"].keys()
        if missing:
            raise ValueError(f"state_dict: expected the parameters of this model, these differ: {sorted(missing)}")
        for name, optimizer in self.optimizers.items():
            if isinstance(optimizer, LowRankOptimizer):
                # What does not fit is refused before anything is loaded.
                fitted_states(optimizer, state_dict["optimizers"][name])
        for name, optimizer in self.optimizers.items():
            groups = optimizer.param_groups
            optimizer.load_state_dict(state_dict["optimizers"][name])
            for group, loaded in zip(groups, optimizer.param_groups, strict=True):
                rate = group["lr"]
                group.update(loaded)
                if isinstance(rate, Tensor) and isinstance(group["lr"], Tensor):
                    group["lr"] = rate.copy_(group["lr"])
            optimizer.param_groups = groups
        self._passes = state_dict["passes"]
        previous = state_dict["previous_norm"]
        devices = {weight.param.device for weight in self._weights} if previous is not None else ()
        self._previous = {device: previous.to(device, copy=True) for device in devices}
        self._squares = {}
        for weight in self._weights:
            low, grad = state_dict["low"].get(weight.name), state_dict["gradients"].get(weight.name)
            weight.low = None if low is None else low.to(weight.param.device, copy=True)
            weight.param.grad = None if grad is None else grad.detach().to(weight.param.device, copy=True)
            weight.arrived = weight.waiting

    def remove(self) -> None:
        """Takes the hooks off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


class BackwardOptimizer(torch.optim.Optimizer):
    """A BackwardStepper where a trainer or a scheduler expects an optimizer.

    Its groups are the stepper's, so a scheduler on it sets the learning rate of every parameter, and its state_dict is
    the stepper's. step() only finishes a window that has begun; zero_grad() does nothing, as gradients are freed when
    they are used.
    """

    def __init__(self, stepper: BackwardStepper):
        self.stepper = stepper
        super().__init__(list(stepper.param_groups), {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None):
        """Steps what a window of fewer passes than `accumulate` has left."""
        if closure is not None:
            raise ValueError("closure: expected None, since the steps are taken in the backward pass")
        self.stepper.finish_window()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Does nothing."""

    def state_dict(self) -> dict:
        """The stepper's."""
        return self.stepper.state_dict()

    def load_state_dict(self, state_dict: dict) -> None:
        """Loads the stepper's state."""
        self.stepper.load_state_dict(state_dict)


def step_in_backward(
    model: torch.nn.Module,
    make_optimizer: Callable[[list[Tensor]], torch.optim.Optimizer],
    accumulate: int = 1,
    *,
    refresh_by: str = "window",
    max_norm: float | None = None,
    clip_by: str = "parameter",
) -> BackwardStepper:
    """Makes every backward pass step each parameter as soon as its gradient is complete, and free the gradient.

    With `accumulate` > 1 the last of so many backward passes steps. Where the optimizer needs only the low-rank
    gradient R (LowRankOptimizer.needs_gradient: residual "none", between two choices of the basis), each pass adds its
    R to a buffer and frees its gradient. Elsewhere gradients add up in `.grad`, and live until the last pass reaches
    them. A parameter that has no gradient in the last pass is stepped at its end. Scale the loss by 1 / accumulate
    yourself. Activation checkpointing must be of the non-reentrant kind (use_reentrant=False), or the inner backward
    passes are counted too. Torch.amp.GradScaler has no place here, as it would look at gradients before they are used.
    Processes that share a model average in the step: by process_group=, or as the shards of fully_shard.
    Optimizers of pykern draw their random numbers and stagger their refreshes as a single one of all parameters does.

    Learning rates: give all optimizers one tensor and change that, make a scheduler for BackwardOptimizer(stepper), or
    one for each of `stepper.optimizers`.

    Args:
        model: hooks are put on its parameters that require a gradient.
        make_optimizer: called with [parameter] for each; for example lambda p: GaLoreAdamW(p, 1e-2, rank=128).
        accumulate: backward passes per step.
        refresh_by: what a basis is chosen by when accumulate > 1. "window": the gradient of the whole window, which
            adds up in `.grad` there: the numbers of ordinary accumulation. "first": the gradient of the window's first
            pass, so that no gradient outlives its pass.
        max_norm: clips gradients, since their total norm is not known before the last one is gone: by the factor
            min(1, max_norm / (norm + 1e-6)). Where only R was accumulated, norms are R's.
        clip_by: "parameter": norm is the parameter's own. "previous": the total norm, over all parameters, of the step
            before, or the parameter's own if that is larger (and at first).

    Raises:
        ValueError: accumulate < 1, max_norm <= 0, an unknown refresh_by or clip_by; DistributedDataParallel.
    """
    if isinstance(model, torch.nn.parallel.DistributedDataParallel):
        raise ValueError(
            "model: expected one without DistributedDataParallel, whose averages come after the steps; give "
            "pykern's optimizers its process_group instead"
        )
    if accumulate < 1:
        raise ValueError(f"accumulate: expected at least 1 backward pass per step, got {accumulate}")
    for name, value, choices in (("refresh_by", refresh_by, REFRESH_BY), ("clip_by", clip_by, CLIP_BY)):
        if value not in choices:
            raise ValueError(f"{name}: expected one of {choices}, got {value!r}")
    if max_norm is not None and not max_norm > 0:
        raise ValueError(f"max_norm: expected a number above 0, or None for no clipping, got {max_norm}")
    return BackwardStepper(model, make_optimizer, accumulate, refresh_by, max_norm, clip_by)
