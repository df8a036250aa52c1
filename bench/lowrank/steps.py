"""The steps of GaLore, Fira and APOLLO on one weight: pykern's, plain PyTorch's and their packages' own."""

from collections.abc import Callable

import torch
from torch import Tensor

import pykern
from pykern.lowrank.matrices import compresses_right

NEVER = 10**9
PRESETS = {"galore": pykern.GaLoreAdamW, "fira": pykern.FiraAdamW, "apollo": pykern.ApolloAdamW}


def plain_step(method: str, param: Tensor, projector: Tensor, right: bool) -> Callable[[], None]:
    """The update as plain PyTorch writes it, in the weight's dtype and with full-size temporaries."""
    grad = param.grad
    first = torch.zeros_like(grad @ projector if right else projector.mT @ grad)
    second = torch.zeros_like(first)
    scale, norm, count = 0.25 if method == "galore" else 1.0, None, 0

    def up(matrix: Tensor) -> Tensor:
        return (matrix @ projector.mT if right else projector @ matrix) * scale

    @torch.no_grad()
    def step() -> None:
        nonlocal norm, count
        count += 1
        low = grad @ projector if right else projector.mT @ grad
        first.mul_(0.9).add_(low, alpha=0.1)
        second.mul_(0.999).addcmul_(low, low, value=0.001)
        direction = first / second.sqrt().add_(1e-6)
        update = None if method == "apollo" else up(direction)
        if method != "galore":
            axis = 1 if right else 0
            ratio = direction.norm(dim=axis, keepdim=True) / (low.norm(dim=axis, keepdim=True) + 1e-8)
            residual = (grad if method == "apollo" else grad - up(low)) * ratio
            size = residual.norm()
            if norm is not None:
                limiter = (size / (norm + 1e-8)).clamp_min(1.01) / 1.01
                residual, size = residual / limiter, size / limiter
            norm = size
            update = residual if update is None else update + residual
        param.add_(update, alpha=-1e-3 * (1 - 0.999**count) ** 0.5 / (1 - 0.9**count))

    return step


def peer_step(method: str, param: Tensor, projector: Tensor, right: bool) -> dict[str, Callable[[], None]]:
    """The package's own optimizer on the same basis, by the package's name; nothing where it is not installed."""
    rank = projector.shape[1]
    parts = {"params": [param], "rank": rank, "update_proj_gap": NEVER, "proj_type": "std"}
    try:
        if method == "galore":
            from galore_torch import GaLoreAdamW
            from galore_torch.galore_projector import GaLoreProjector

            name, chosen = "galore_torch", GaLoreProjector(rank, update_proj_gap=NEVER, scale=0.25, proj_type="std")
            optimizer = GaLoreAdamW([{**parts, "scale": 0.25}], lr=1e-3, no_deprecation_warning=True)
        elif method == "fira":
            from fira import FiraAdamW
            from fira.gradient_projection import GradientProjector

            name, chosen = "fira", GradientProjector(rank, update_proj_gap=NEVER, alpha=1.0, proj_type="std")
            optimizer = FiraAdamW([{**parts, "alpha": 1.0}], lr=1e-3, no_deprecation_warning=True)
        else:
            from apollo_torch import APOLLOAdamW

            optimizer = APOLLOAdamW([{**parts, "proj": "random", "scale_type": "channel", "scale": 1.0}], lr=1e-3)
            return {"apollo_torch": optimizer.step}  # its basis costs nothing to draw
    except ImportError:
        return {}
    # A singular value decomposition of a large weight takes minutes and is no part of an ordinary step.
    chosen.ortho_matrix = projector.mT.contiguous() if right else projector
    # A step count that is no multiple of the gap: the package refreshes at step 0.
    optimizer.state[param].update(projector=chosen, step=1)
    return {name: optimizer.step}


def adam_8bit_step(param: Tensor) -> dict[str, Callable[[], None]]:
    """Plain AdamW on 8-bit moments by bitsandbytes; nothing where it is not installed."""
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        return {}
    return {"bitsandbytes AdamW8bit": AdamW8bit([param], lr=1e-3).step}


def make_step(method: str, rows: int, columns: int, rank: int, dtype: torch.dtype) -> dict[str, Callable]:
    right = compresses_right(rows, columns, "std")
    start = torch.randn(rows, columns).mul_(0.02).to(dtype)
    grad = torch.randn(rows, columns).to(dtype)

    def fresh() -> Tensor:
        param = torch.nn.Parameter(start.clone())
        param.grad = grad
        return param

    ours, basis = fresh(), "random" if method == "apollo" else "random_orthonormal"
    optimizer = PRESETS[method]([ours], 1e-3, rank=rank, refresh_every=NEVER, projector=basis)
    optimizer.step()
    projector = optimizer.state[ours]["projector"]
    return {
        "pykern": optimizer.step,
        "plain PyTorch": plain_step(method, fresh(), projector, right),
        **peer_step(method, fresh(), projector, right),
        **(adam_8bit_step(fresh()) if method == "galore" else {}),
    }
