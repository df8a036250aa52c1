"""What the low-rank optimizer steps mean, in plain PyTorch. Works in any dtype; tests run it in float64."""

import math

import torch
from torch import Tensor


def adam_direction(
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    corrected_eps: bool,
) -> tuple[Tensor, Tensor, Tensor, float]:
    """The direction N, the new moments, and the factor on the learning rate; `step` counts from 1.

    m = beta1 m + (1 - beta1) g,  v = beta2 v + (1 - beta2) g^2, and
    N = (m / (1 - beta1^step)) / (sqrt(v / (1 - beta2^step)) + eps), factor 1, if `corrected_eps`,
    N = m / (sqrt(v) + eps), factor sqrt(1 - beta2^step) / (1 - beta1^step), otherwise.
    """
    exp_avg = beta1 * exp_avg + (1 - beta1) * gradient
    exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * gradient * gradient
    correction1, correction2 = 1 - beta1**step, 1 - beta2**step
    if corrected_eps:
        direction = (exp_avg / correction1) / ((exp_avg_sq / correction2).sqrt() + eps)
        return direction, exp_avg, exp_avg_sq, 1.0
    return exp_avg / (exp_avg_sq.sqrt() + eps), exp_avg, exp_avg_sq, math.sqrt(correction2) / correction1


def apply_direction(
    param: Tensor, direction: Tensor, step_size: float, lr: float, weight_decay: float, decay_after: bool
) -> Tensor:
    """W - step_size * direction, with W multiplied by 1 - lr * weight_decay before or after."""
    decay = 1 - lr * weight_decay
    if decay_after:
        return (param - step_size * direction) * decay
    return param * decay - step_size * direction


def adam_step(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float = 0.0,
    decay_after: bool = False,
    corrected_eps: bool = True,
    maximize: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """One AdamW step: the new parameter and moments. `step` counts from 1."""
    direction, exp_avg, exp_avg_sq, factor = adam_direction(
        -grad if maximize else grad,
        exp_avg,
        exp_avg_sq,
        step,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        corrected_eps=corrected_eps,
    )
    return apply_direction(param, direction, lr * factor, lr, weight_decay, decay_after), exp_avg, exp_avg_sq


def low_rank_adam_step(
    param: Tensor,
    grad: Tensor,
    projector: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    residual_norm: float | None = None,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float = 0.0,
    scale: float = 1.0,
    right: bool,
    decay_after: bool = False,
    corrected_eps: bool = True,
    scaled_residual: bool = False,
    maximize: bool = False,
) -> tuple[Tensor, Tensor, Tensor, float | None]:
    """One step of GaLore, or of Fira where `residual_norm` is given (negative: no norm known yet).

    R = G P (right) or P^T G (left); N = Adam(R); up(X) = X P^T or P X; direction = scale * up(N).
    Fira adds S = (G - a up(R)) * |N_j| / (|R_j| + 1e-8) per row j (right) or column j (left), where a is
    `scale` if `scaled_residual` (the fira package), else 1; and limits |S| to 1.01 times the norm before.
    Returns the new parameter, moments and residual norm.
    """
    gradient = -grad if maximize else grad
    low = gradient @ projector if right else projector.mT @ gradient

    def up(matrix: Tensor) -> Tensor:
        return matrix @ projector.mT if right else projector @ matrix

    normalized, exp_avg, exp_avg_sq, factor = adam_direction(
        low, exp_avg, exp_avg_sq, step, beta1=beta1, beta2=beta2, eps=eps, corrected_eps=corrected_eps
    )
    direction = scale * up(normalized)
    if residual_norm is not None:
        rank_axis = 1 if right else 0
        ratio = normalized.norm(dim=rank_axis, keepdim=True) / (low.norm(dim=rank_axis, keepdim=True) + 1e-8)
        residual = (gradient - (scale if scaled_residual else 1.0) * up(low)) * ratio
        norm = residual.norm().item()
        if residual_norm < 0 or (residual_norm == 0 and not scaled_residual):
            residual_norm = norm
        else:
            limiter = max(norm / (residual_norm + 1e-8), 1.01) / 1.01
            residual = residual / limiter
            residual_norm = norm / limiter
        direction = direction + residual
    param = apply_direction(param, direction, lr * factor, lr, weight_decay, decay_after)
    return param, exp_avg, exp_avg_sq, residual_norm


QUANT_BLOCK = 256


def dynamic_map(signed: bool) -> Tensor:
    """The 256 values of the dynamic 8-bit map in rising order, float32.

    Seven levels: level l spans the decade [10^(l-7), 10^(l-6)] in 2^l (signed) or 2^(l+1) (unsigned) cells of equal
    width, whose middles are the values; then 0 and 1, and, signed, the mirrored cells. The rule of bitsandbytes.
    """
    values = [0.0, 1.0]
    for level in range(7):
        cells = 2 ** (level if signed else level + 1)
        middles = [10.0 ** (level - 6) * (0.1 + 0.9 * (cell + 0.5) / cells) for cell in range(cells)]
        values += middles + ([-value for value in middles] if signed else [])
    return torch.tensor(sorted(values), dtype=torch.float64, device="cpu").float()


def quantize(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Codes uint8 [rank, length] and scales float32 [rank, ceil(length / 256)] of values [rank, length].

    A block is 256 neighbours in a row (the last of a row may be shorter), its scale the largest magnitude, and a
    code the nearest value of the map times the scale; half way goes to the larger magnitude.
    """
    rank, length = values.shape
    blocks = -(-length // QUANT_BLOCK)
    padded = torch.nn.functional.pad(values, (0, blocks * QUANT_BLOCK - length)).view(rank, blocks, QUANT_BLOCK)
    scale = padded.abs().amax(dim=2) if values.numel() > 0 else values.new_zeros(rank, blocks)
    scale = torch.where(scale < 1.2e-38, 0.0, scale)
    relative = (padded / scale.unsqueeze(2)).nan_to_num(0.0)
    magnitudes = dynamic_map(signed).to(values)
    zero = 127 if signed else 0
    magnitudes = magnitudes[zero:]
    number = torch.bucketize(relative.abs(), (magnitudes[1:] + magnitudes[:-1]) / 2, right=True)
    # There is no minus one: its nearest value is the last cell's.
    code = torch.where(relative < 0, zero - number.clamp_max(127), zero + number)
    return code.view(rank, -1)[:, :length].to(torch.uint8).contiguous(), scale.float()


def dequantize(codes: Tensor, scale: Tensor, signed: bool, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values [rank, length] that quantize stored."""
    spread = scale.to(dtype).repeat_interleave(QUANT_BLOCK, dim=1)[:, : codes.shape[1]]
    return dynamic_map(signed).to(spread)[codes.long()] * spread


def leading_vectors(gradient: Tensor, rank: int, right: bool) -> Tensor:
    """The first `rank` right (columns x rank) or left (rows x rank) singular vectors of a gradient."""
    left_vectors, _, right_vectors = torch.linalg.svd(gradient, full_matrices=False)
    return right_vectors[:rank].mT.contiguous() if right else left_vectors[:, :rank].contiguous()
