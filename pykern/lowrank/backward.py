"""Optimizer steps inside the backward pass, so that no two weights' gradients live at once."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor


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
    ):
        self.accumulate = accumulate
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self._passes = 0
        self._pass = -1
        self._handles = []
        self._parameters: list[tuple[Tensor, torch.optim.Optimizer]] = []
        for name, param in model.named_parameters():
            if not param.requires_grad:
                continue
            optimizer = make_optimizer([param])
            self.optimizers[name] = optimizer
            self._parameters.append((param, optimizer))
            self._handles.append(param.register_post_accumulate_grad_hook(self._arrival(optimizer)))

    def _arrival(self, optimizer: torch.optim.Optimizer) -> Callable[[Tensor], None]:
        def arrived(param: Tensor) -> None:
            # A pass that raises never reaches its end; its number keeps the next one from being taken for it.
            if torch._C._current_graph_task_id() != self._pass:
                self._pass = torch._C._current_graph_task_id()
                torch.autograd.Variable._execution_engine.queue_callback(self._end_of_pass)
            if self._passes == self.accumulate - 1:
                _step(optimizer, param)

        return arrived

    def _end_of_pass(self) -> None:
        self._passes += 1
        if self._passes < self.accumulate:
            return
        self._passes = 0
        # What had a gradient in an earlier pass of this window but not in the last one, such as the
        # weights of an expert that no token chose.
        for param, optimizer in self._parameters:
            if param.grad is not None:
                _step(optimizer, param)

    @property
    def param_groups(self) -> Iterator[dict]:
        """All groups of all optimizers, for code that sets learning rates by hand."""
        return (group for optimizer in self.optimizers.values() for group in optimizer.param_groups)

    def state_dict(self) -> dict:
        """The optimizers' states by parameter name, and the passes counted. Gradients are not part of it."""
        return {
            "passes": self._passes,
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
        }

    def load_state_dict(self, state_dict: dict) -> None:
        """Loads what state_dict() returned for a model with the same parameter names."""
        missing = self.optimizers.keys() ^ state_dict["optimizers"].keys()
        if missing:
            raise ValueError(f"state_dict: expected the parameters of this model, these differ: {sorted(missing)}")
        self._passes = state_dict["passes"]
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state_dict["optimizers"][name])

    def remove(self) -> None:
        """Takes the hooks off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _step(optimizer: torch.optim.Optimizer, param: Tensor) -> None:
    optimizer.step()
    param.grad = None


def step_in_backward(
    model: torch.nn.Module,
    make_optimizer: Callable[[list[Tensor]], torch.optim.Optimizer],
    accumulate: int = 1,
) -> BackwardStepper:
    """Makes every backward pass step each parameter as soon as its gradient is complete, and free the gradient.

    With `accumulate` > 1 the gradients of so many backward passes add up in `.grad`, and the last pass steps;
    then all gradients live at once until that pass reaches them. A parameter that has no gradient in the last
    pass is stepped at its end. Scale the loss by 1 / accumulate yourself. Gradients can't be clipped by their
    total norm, and `.grad` is None after the last pass. Activation checkpointing must be of the non-reentrant kind
    (use_reentrant=False), or the inner backward passes are counted too.

    Args:
        model: hooks are put on its parameters that require a gradient.
        make_optimizer: called with [parameter] for each; for example lambda p: GaLoreAdamW(p, 1e-2, rank=128).
        accumulate: backward passes per step.

    Raises:
        ValueError: accumulate < 1.
    """
    if accumulate < 1:
        raise ValueError(f"accumulate: expected at least 1 backward pass per step, got {accumulate}")
    return BackwardStepper(model, make_optimizer, accumulate)
