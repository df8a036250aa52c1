"""Linear layers whose weight is kept in 8 bits (Q-GaLore)."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import _native
from .groups import is_target
from .matrices import Job
from .quantized import Int8Weight, int8_weight, low_rank_apply_int8, quantize_groups, quantized_zeros


class _Int8Product(torch.autograd.Function):
    """x W^T + bias; the weight is made anew for the backward, so that no layer's float weight is kept."""

    @staticmethod
    def forward(ctx, x, weight, codes, scale, zero, bias):
        ctx.save_for_backward(x, codes, scale, zero)
        ctx.weight_dtype = weight.dtype
        return torch.nn.functional.linear(x, Int8Weight(codes, scale, zero).dense(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, codes, scale, zero = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ Int8Weight(codes, scale, zero).dense(grad.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = (rows.mT @ x.reshape(-1, x.shape[-1])).to(ctx.weight_dtype)
        if ctx.needs_input_grad[5]:
            grad_bias = rows.sum(dim=0)
        return grad_x, grad_weight, None, None, None, grad_bias


class Int8Linear(torch.nn.Linear):
    """torch.nn.Linear with its weight in 8 bits, 1.03 bytes an element, and a gradient in full precision.

    The weight is in the buffers weight_codes (uint8 [out, in]), weight_scale and weight_zero (float32 [out,
    ceil(in / 256)]); see lowrank.quantized. `weight` is a parameter of the layer's shape and dtype that has one
    element of memory, NaN, so that whoever takes it for the weight notices; what it is for is `.grad`, which hooks,
    gradient clipping, torch.amp and the optimizers find where they look for it. `LowRankOptimizer` steps the codes,
    rounding stochastically, in a group with a `rank`; other optimizers raise where they write to it. A layer's weight
    in floating point lives only during its own product, forward and backward.

    A state_dict has the buffers and no weight; loading takes these, or the weight of a torch.nn.Linear.

    Args:
        in_features, out_features, bias, device, dtype: as of torch.nn.Linear; dtype not float64.

    Q-GaLore: arXiv 2407.08296.

    Raises:
        TypeError: a dtype other than float32, bfloat16 and float16.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, device=None, dtype=None):
        super().__init__(in_features, out_features, bias, device, dtype)
        self._take(self.weight)

    @classmethod
    def from_linear(cls, linear: torch.nn.Linear) -> "Int8Linear":
        """The layer with another's weight, quantised, and its bias itself."""
        layer = cls.__new__(cls)
        torch.nn.Module.__init__(layer)
        layer.in_features, layer.out_features = linear.in_features, linear.out_features
        layer.register_parameter("bias", linear.bias)
        layer._take(linear.weight)
        return layer.train(linear.training)

    def dequantized(self) -> Tensor:
        """The weight, in the layer's dtype."""
        return self.weight.int8.dense(self.weight.dtype)

    def forward(self, input: Tensor) -> Tensor:
        bias = self.bias
        if torch.is_autocast_enabled(input.device.type):
            dtype = torch.get_autocast_dtype(input.device.type)
            input, bias = input.to(dtype), None if bias is None else bias.to(dtype)
        _native.require_kernels(input, "input", "dequantize_groups")
        return _Int8Product.apply(input, self.weight, self.weight_codes, self.weight_scale, self.weight_zero, bias)

    def _take(self, weight: Tensor) -> None:
        if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise TypeError(f"dtype: expected float32, bfloat16 or float16, got {weight.dtype}")
        _native.require_kernels(weight, "weight", "quantize_groups")
        for name, value in quantized_zeros(*weight.shape, 8, weight.device).items():
            self.register_buffer(f"weight_{name}", value)
        self.weight = torch.nn.Parameter(_stand_in(_nan(weight), weight.shape), weight.requires_grad)
        self._bind()
        self._store(weight)

    def _store(self, weight: Tensor) -> None:
        codes, scale, zero = self.weight.int8
        quantize_groups([weight.detach()], [codes], [scale], [zero], None, bits=8)

    def _bind(self) -> None:
        self.weight.int8 = Int8Weight(self.weight_codes, self.weight_scale, self.weight_zero)

    def _apply(self, fn, recurse=True):
        # Torch's own would give the stand-in memory, and change the dtype of scale and zero.
        weight = self._parameters.pop("weight")
        buffers = {name: self._buffers.pop(name) for name in ("weight_codes", "weight_scale", "weight_zero")}
        super()._apply(fn, recurse)
        self._buffers.update({name: fn(value.view(torch.uint8)).view(value.dtype) for name, value in buffers.items()})
        with torch.no_grad():
            weight.data = _stand_in(fn(_nan(weight)), weight.shape)
            if weight.grad is not None:
                weight.grad = fn(weight.grad)
        self._parameters = {"weight": weight, **self._parameters}
        self._bind()
        return self

    def __deepcopy__(self, memo):
        # An optimizer that was copied first has the parameter already, with all the memory that torch gave it.
        weight = memo.setdefault(id(self.weight), torch.nn.Parameter(self.weight.detach(), self.weight.requires_grad))
        weight.data = _stand_in(_nan(weight), weight.shape)
        weight.grad = copy.deepcopy(self.weight.grad, memo)
        layer = memo[id(self)] = self.__class__.__new__(self.__class__)
        layer.__dict__ = copy.deepcopy(self.__dict__, memo)
        layer._bind()
        return layer

    def __setstate__(self, state):
        super().__setstate__(state)
        self._bind()

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[prefix + "weight"]

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        state_dict, dense = dict(state_dict), state_dict.get(prefix + "weight")
        state_dict.pop(prefix + "weight", None)
        ours = [f"{prefix}weight_{part}" for part in ("codes", "scale", "zero")]
        if dense is not None and dense.shape != self.weight.shape:
            errors.append(f"size mismatch for {prefix}weight: {tuple(dense.shape)} for {tuple(self.weight.shape)}")
        elif dense is not None:
            self._store(dense.to(self.weight_codes.device))
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        absent = {prefix + "weight"} if dense is None else {prefix + "weight", *ours}
        missing[:] = [name for name in missing if name not in absent]
        self._bind()


def _nan(like: Tensor) -> Tensor:
    return like.new_full((1, 1), float("nan"))


def _stand_in(element: Tensor, shape: torch.Size) -> Tensor:
    """A matrix of one element's memory."""
    return element.expand(shape)


def int8_linears(model: torch.nn.Module, targets: str | Sequence[str] = "all-linear") -> torch.nn.Module:
    """Replaces a model's torch.nn.Linear modules by Int8Linear, in place; returns the model.

    Args:
        model: a module; parents of the layers, not a layer itself.
        targets: as of low_rank_groups: "all-linear", a regular expression that must match a module's whole name, or a
            list of strings, one of which must occur in the name. A layer that shares its weight with another module
            stays as it is, and so does one of a subclass of torch.nn.Linear, or in float64. A layer that is in several
            places is replaced in all of them if one of its names matches.

    Raises:
        ValueError: nothing matches `targets`.
    """
    owners: dict[int, int] = {}
    for module in model.modules():
        for param in module.parameters(recurse=False):
            owners[id(param)] = owners.get(id(param), 0) + 1
    replaced: dict[torch.nn.Module, Int8Linear] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        plain = type(module) is torch.nn.Linear and module is not model and module.weight.dtype != torch.float64
        if plain and module not in replaced and owners[id(module.weight)] == 1 and is_target(name, targets):
            replaced[module] = Int8Linear.from_linear(module)
    if not replaced:
        raise ValueError(
            f'targets: expected "all-linear", a regular expression or names of torch.nn.Linear modules of the model '
            f"that share no weight, but nothing matches {targets!r}"
        )
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in replaced:
                setattr(parent, name, replaced[child])
    return model


def step_int8_weights(
    jobs: list[Job],
    projectors: list[Tensor],
    direction: list[Tensor],
    seeds: list[int],
    step_factor: Tensor,
    lr: Tensor,
    found_inf: Tensor | None,
) -> None:
    """W - lr * step_factor * scale * up(direction) of jobs of one group whose weights are in 8 bits."""
    group = jobs[0].group
    weights = [int8_weight(job.param) for job in jobs]
    pairs = [(d.mT, p.mT) if job.right else (p, d) for job, p, d in zip(jobs, projectors, direction, strict=True)]
    low_rank_apply_int8(
        *([getattr(weight, name) for weight in weights] for name in ("codes", "scale", "zero")),
        [left for left, _ in pairs],
        [right for _, right in pairs],
        [job.state["step"] for job in jobs],
        seeds,
        step_factor,
        lr,
        found_inf,
        factor=group["scale"],
        weight_decay=group["weight_decay"],
        decay_after=group["decay"] == "after",
    )
