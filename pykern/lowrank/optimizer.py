"""AdamW in a low-rank subspace of the gradient."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import chain

import torch
from torch import Tensor

from .. import _native
from . import ops
from .projector import SIDES, compresses_right, gram_projector

Projector = Callable[[Tensor, int, bool], Tensor]

RESIDUALS = ("none", "fira")

PARITY: dict[str, dict] = {
    "galore_torch": {"residual": "none", "decay": "after", "corrected_eps": False, "scaled_residual": False},
    "fira": {"residual": "fira", "decay": "after", "corrected_eps": False, "scaled_residual": True},
}
"""What `parity` fixes: the order of epsilon and decay, and the scale in the residual, of each package."""

PRESETS: dict[str, dict] = {
    "GaLoreAdamW": {"scale": 0.25, "residual": "none", "parity": "galore_torch"},
    "FiraAdamW": {"scale": 1.0, "residual": "fira", "parity": "fira"},
}
"""A paper a row: its default scale, its fixed residual rule, and the one package it may be in parity with."""

_ALIASES = {"update_proj_gap": "refresh_every", "proj_type": "side", "alpha": "scale"}

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class LowRankAdamW(torch.optim.Optimizer):
    r"""AdamW whose moments live in a low-rank subspace of each weight's gradient.

    For a weight W [rows, columns] with gradient G and an orthonormal basis P, at step t = 1, 2, ...::

        R = G P                                     (right side, P is [columns, rank])
        R = P^T G                                   (left side, P is [rows, rank])
        m = beta1 m + (1 - beta1) R                 v = beta2 v + (1 - beta2) R^2
        N = m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)
        D = scale * up(N)                           up(X) = X P^T, or P X
        W = (1 - lr * weight_decay) W - lr * D

    `residual="fira"` adds to D what the subspace misses, with the subspace's own step length::

        S_j = |N_j| / (|R_j| + 1e-8) * (G - up(R))_j     for every row j (right) or column j (left)
        S   = S / l,  l = max(|S| / (norm + 1e-8), 1.01) / 1.01,  norm = |S| after that (l = 1 at first)

    Every `refresh_every` steps, beginning with the first, P becomes the leading singular vectors of the
    current gradient; the moments stay. A gradient that is zero or not finite names no subspace: the old P
    is kept (at first: P = 0, so only decay acts), and the next step tries again. The step itself is taken as
    other optimizers take it, so a NaN in the gradient reaches the weights.

    A group without `rank`, and a parameter that is not a matrix, gets plain AdamW (the same lines with R = G,
    D = N). Ranks above min(rows, columns) are cut to it. On the CPU one kernel call per parameter projects, updates
    the moments, projects up and updates the weights, with no temporary of the weight's size. On CUDA the two
    projections are PyTorch's matrix products, in the weight's dtype and under its TF32 setting, with kernels between
    and after them, and up(N) is one temporary of the weight's size. Results don't depend on the number of threads
    and repeat bit for bit.

    On CUDA a step waits for the device only where it chooses P, and when it first reads a loaded state. It can be
    captured in a graph after one ordinary step; in a graph P stays, so step outside it every `refresh_every` steps,
    and such steps read the count from the device. Pass `lr` as a tensor to change it between replays.

    Args:
        params: parameters or groups, float32, float64, bfloat16 or float16. Groups may set every keyword below
            but `projector`, and may call refresh_every, side and scale by the names of the GaLore and Fira
            packages: update_proj_gap, proj_type, alpha. `low_rank_groups` makes such groups.
        lr: a float, or a 0-dim float32 or float64 tensor on the device of the parameters.
        rank: columns of P; None for plain AdamW.
        refresh_every: steps between two choices of P.
        scale: GaLore's alpha, on the low-rank part of the update.
        side: "std" compresses the smaller axis, "reverse_std" the larger, "left" the rows, "right" the columns.
        projector: "gram" (eigenvectors of the gradient's Gram matrix), or a function (grad, rank, right) -> P
            ([columns, rank] if right, else [rows, rank]), or P itself. Belongs to the whole optimizer and is
            not part of its state_dict.
        residual: "none" or "fira".
        eps: 1e-8 by default, 1e-6 with `parity`, as in the packages.
        decay: "before" or "after": whether weight decay precedes the update.
        parity: "galore_torch" or "fira" reproduces these packages: W is decayed after the update; eps is added to
            sqrt(v), and the bias corrections are folded into the step size, lr sqrt(1 - beta2^t) / (1 - beta1^t);
            Fira subtracts scale * up(R) in the residual. The packages keep moments in the weight's dtype; here
            they are float32.
        maximize: ascend.

    State per parameter, tensors only: step, exp_avg, exp_avg_sq (float32; float64 for a float64 parameter), and
    projector (the parameter's dtype), next_refresh (on the CPU), residual_norm (Fira; negative until known). It
    survives torch.load(weights_only=True), and load_state_dict keeps its dtypes.

    GaLore: arXiv 2403.03507. Fira: arXiv 2410.01623.

    Raises:
        ValueError, TypeError: an argument out of range or of the wrong kind.
        RuntimeError: a sparse gradient, or a graph captured before the first step.
        NotImplementedError: a parameter on a device whose kernels this build lacks.
    """

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-3,
        *,
        rank: int | None = None,
        refresh_every: int = 200,
        scale: float = 1.0,
        side: str = "std",
        projector: str | Projector | Tensor = "gram",
        residual: str = "none",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float | None = None,
        weight_decay: float = 0.0,
        decay: str = "before",
        parity: str | None = None,
        maximize: bool = False,
    ):
        if not (isinstance(projector, Tensor) or callable(projector) or projector == "gram"):
            raise ValueError(f'projector: expected "gram", a function or a tensor, got {projector!r}')
        self.projector = projector
        self._counted: dict[Tensor, int] = {}
        defaults = {
            "lr": lr,
            "rank": rank,
            "refresh_every": refresh_every,
            "scale": scale,
            "side": side,
            "residual": residual,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "decay": decay,
            "parity": parity,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict) -> None:
        """Adds a group; see torch.optim.Optimizer.add_param_group."""
        if isinstance(param_group, dict):
            param_group = dict(param_group)
            for theirs, ours in _ALIASES.items():
                if theirs in param_group:
                    param_group.setdefault(ours, param_group.pop(theirs))
        super().add_param_group(param_group)
        try:
            _complete_group(self.param_groups[-1])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def __getstate__(self):
        return {**super().__getstate__(), "projector": self.projector}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        # torch.optim.Optimizer.load_state_dict comes by here too: the counts may be others now.
        self._counted = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None):
        """Steps every parameter that has a gradient; returns what `closure` returned, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            rates: dict[torch.device, Tensor] = {}
            beta1, beta2 = group["betas"]
            rule = {
                "beta1": beta1,
                "beta2": beta2,
                "eps": group["eps"],
                "weight_decay": group["weight_decay"],
                "decay_after": group["decay"] == "after",
                "corrected_eps": group["corrected_eps"],
                "maximize": group["maximize"],
            }
            for param in group["params"]:
                if param.grad is None:
                    continue
                _check_gradient(param)
                if param not in self.state and _capturing(param):
                    raise RuntimeError("LowRankAdamW: take one step before capturing a graph; it makes the state")
                if param.device not in rates:
                    rates[param.device] = _rate(group["lr"], param.device)
                lr = rates[param.device]
                if group["rank"] is not None and param.dim() == 2 and param.numel() > 0:
                    with _without_autocast(param.device.type):
                        self._step_low_rank(param, group, lr, rule)
                else:
                    self._step_plain(param, lr, rule)
        return loss

    def _step_plain(self, param: Tensor, lr: Tensor, rule: dict) -> None:
        state = self.state[param]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
            state["exp_avg"] = torch.zeros_like(param, dtype=_moment_dtype(param))
            state["exp_avg_sq"] = torch.zeros_like(param, dtype=_moment_dtype(param))
        # The kernel walks through memory, so all must lie alike; the moments have the strides of a
        # gapless tensor that is laid out like the parameter.
        strides = state["exp_avg"].stride()

        def laid_out(tensor: Tensor) -> Tensor:
            if tensor.stride() == strides and tensor.dtype == param.dtype:
                return tensor
            return torch.empty_like(state["exp_avg"], dtype=param.dtype).copy_(tensor)

        weight, grad = laid_out(param), laid_out(param.grad)
        ops.adam_step(weight, grad, state["exp_avg"], state["exp_avg_sq"], state["step"], lr, **rule)
        if weight is not param:
            param.copy_(weight)

    def _step_low_rank(self, param: Tensor, group: dict, lr: Tensor, rule: dict) -> None:
        rows, columns = param.shape
        right = compresses_right(rows, columns, group["side"])
        rank = min(group["rank"], rows, columns)
        grad = param.grad.to(param.dtype)
        if grad.stride(1) != 1:
            grad = grad.contiguous()
        state = self.state[param]
        if not state:
            shape, dtype = ((rows, rank) if right else (rank, columns)), _moment_dtype(param)
            state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
            state["exp_avg"] = torch.zeros(shape, dtype=dtype, device=param.device)
            state["exp_avg_sq"] = torch.zeros(shape, dtype=dtype, device=param.device)
            state["projector"] = torch.zeros(columns if right else rows, rank, dtype=param.dtype, device=param.device)
            state["next_refresh"] = torch.zeros((), dtype=torch.int64)
            if group["residual"] == "fira":
                state["residual_norm"] = torch.full((), -1.0, dtype=dtype, device=param.device)
        done = self._steps_done(param, state["step"])
        if done is not None and done >= int(state["next_refresh"]):
            basis = self._choose_basis(grad, rank, right)
            if basis is not None:
                state["projector"].copy_(basis)
                # On the multiples of refresh_every, also after a refresh that came late.
                state["next_refresh"].fill_((done // group["refresh_every"] + 1) * group["refresh_every"])
        weight = param if param.stride(1) == 1 else param.contiguous()
        ops.low_rank_adam_step(
            weight,
            grad,
            state["projector"],
            state["exp_avg"],
            state["exp_avg_sq"],
            state["step"],
            state.get("residual_norm"),
            lr,
            scale=group["scale"],
            right=right,
            scaled_residual=group["scaled_residual"],
            **rule,
        )
        if weight is not param:
            param.copy_(weight)

    def _steps_done(self, param: Tensor, step: Tensor) -> int | None:
        """Steps taken before this one, counted on the host where it can; None while a graph is captured."""
        if step.device.type == "cpu":
            return int(step)
        if _capturing(param):
            # From now on replays may count steps that the host does not see.
            self._counted[param] = _UNCOUNTED
            return None
        done = self._counted.get(param)
        if done is None or done == _UNCOUNTED:
            read = int(step)
            if done is None:
                self._counted[param] = read + 1
            return read
        self._counted[param] = done + 1
        return done

    def _choose_basis(self, grad: Tensor, rank: int, right: bool) -> Tensor | None:
        if isinstance(self.projector, str):
            return gram_projector(grad, rank, right)
        basis = self.projector if isinstance(self.projector, Tensor) else self.projector(grad, rank, right)
        expected = (grad.shape[1] if right else grad.shape[0], rank)
        if tuple(basis.shape) != expected:
            raise ValueError(
                f"projector: expected shape {expected} for a {tuple(grad.shape)} gradient projected from the "
                f"{'right' if right else 'left'}, got {tuple(basis.shape)}"
            )
        return basis

    def load_state_dict(self, state_dict: dict) -> None:
        """Loads what state_dict() returned. Unlike torch's own, it keeps the dtype of every state tensor."""
        super().load_state_dict(state_dict)
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        current = chain.from_iterable(group["params"] for group in self.param_groups)
        for index, param in zip(saved, current, strict=True):
            for key, value in state_dict["state"].get(index, {}).items():
                if isinstance(value, Tensor):
                    device = "cpu" if key == "next_refresh" else param.device
                    self.state[param][key] = value.detach().to(device, copy=True)
        for group in self.param_groups:
            if isinstance(group["lr"], Tensor) and group["params"]:
                group["lr"] = group["lr"].to(group["params"][0].device)


def _moment_dtype(param: Tensor) -> torch.dtype:
    return torch.float64 if param.dtype == torch.float64 else torch.float32


# In place of a count of steps: ask the device each time.
_UNCOUNTED = -1


def _capturing(param: Tensor) -> bool:
    return param.is_cuda and torch.cuda.is_current_stream_capturing()


def _without_autocast(device_type: str) -> AbstractContextManager:
    """The products of a step are of the weight's dtype, also where the step is taken inside an autocast block."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def _rate(lr: float | Tensor, device: torch.device) -> Tensor:
    """The learning rate as a tensor on the device, without a copy from the host: that would wait for it."""
    if not isinstance(lr, Tensor):
        return torch.full((), lr, dtype=torch.float64, device=device)
    _check_rate_device(lr, device)
    return lr


def _check_rate_device(lr: Tensor, device: torch.device) -> None:
    if lr.device != device:
        raise ValueError(f"lr: expected a float, or a tensor on {device} as the parameters are; got one on {lr.device}")


def _check_gradient(param: Tensor) -> None:
    if param.grad.is_sparse:
        raise RuntimeError("LowRankAdamW: sparse gradients are not supported; use torch.optim.SparseAdam for them")
    if param.device.type not in ("cpu", "cuda"):
        raise NotImplementedError(
            f"LowRankAdamW: this build of pykern has no {param.device.type} kernels for it; "
            "keep the parameters on the CPU or a CUDA device"
        )
    _native.require_kernels(param, "a parameter", "low_rank_adam_step", "adam_step")


def _complete_group(group: dict) -> None:
    """Checks a group and fills in what `parity` decides."""
    if group["parity"] is not None:
        if group["parity"] not in PARITY:
            raise ValueError(f"parity: expected None or one of {sorted(PARITY)}, got {group['parity']!r}")
        if group["parity"] == "galore_torch" and group["residual"] != "none":
            raise ValueError(f"residual: expected 'none' with parity='galore_torch', got {group['residual']!r}")
        group.update(PARITY[group["parity"]])
    group.setdefault("corrected_eps", True)
    group.setdefault("scaled_residual", False)
    if group["eps"] is None:
        group["eps"] = 1e-8 if group["parity"] is None else 1e-6
    for name, choices in (("side", SIDES), ("residual", RESIDUALS), ("decay", ("before", "after"))):
        if group[name] not in choices:
            raise ValueError(f"{name}: expected one of {choices}, got {group[name]!r}")
    for name in ("rank", "refresh_every"):
        if name == "rank" and group[name] is None:
            continue
        if not isinstance(group[name], int) or isinstance(group[name], bool):
            raise TypeError(f"{name}: expected an int, got {type(group[name]).__name__}")
        if group[name] < 1:
            raise ValueError(f"{name}: expected at least 1, got {group[name]}")
    lr = group["lr"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1 or lr.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"lr: expected one float32 or float64 element, got {lr.dtype} {tuple(lr.shape)}")
        for param in group["params"]:
            _check_rate_device(lr, param.device)
    elif not lr >= 0:
        raise ValueError(f"lr: expected a rate of at least 0, got {lr}")
    if len(group["betas"]) != 2 or not all(0 <= beta < 1 for beta in group["betas"]):
        raise ValueError(f"betas: expected two numbers in [0, 1), got {group['betas']}")
    for name in ("eps", "weight_decay"):
        if not group[name] >= 0:
            raise ValueError(f"{name}: expected a number of at least 0, got {group[name]}")
    for param in group["params"]:
        if param.dtype not in _FLOATS:
            raise TypeError(f"params: expected float32, float64, bfloat16 or float16, got {param.dtype}")


def _preset(name: str, keywords: dict) -> dict:
    """The keywords of a preset: its scale unless another is given, its residual, a parity that fits."""
    fixed = PRESETS[name]
    if keywords.get("residual", fixed["residual"]) != fixed["residual"]:
        raise ValueError(
            f"residual: {name} has {fixed['residual']!r}, got {keywords['residual']!r}; use LowRankAdamW to choose"
        )
    if keywords.get("parity") not in (None, fixed["parity"]):
        raise ValueError(f"parity: expected None or {fixed['parity']!r} for {name}, got {keywords['parity']!r}")
    return {"scale": fixed["scale"], **keywords, "residual": fixed["residual"]}


class GaLoreAdamW(LowRankAdamW):
    """GaLore: LowRankAdamW without residual, scale 0.25 by default. Takes LowRankAdamW's other keywords."""

    def __init__(self, params, lr: float | Tensor = 1e-3, **keywords):
        super().__init__(params, lr, **_preset("GaLoreAdamW", keywords))


class FiraAdamW(LowRankAdamW):
    """Fira: LowRankAdamW with Fira's residual, scale 1 by default. Takes LowRankAdamW's other keywords."""

    def __init__(self, params, lr: float | Tensor = 1e-3, **keywords):
        super().__init__(params, lr, **_preset("FiraAdamW", keywords))
