"""The raw ops of the family and their fake kernels."""

import torch

from .. import _native  # noqa: F401 (loads the library that defines the ops)

low_rank_adam_step = torch.ops.pykern.low_rank_adam_step.default
low_rank_adam_phase = torch.ops.pykern.low_rank_adam_phase.default
"""(low, exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale, step, *, beta1, beta2, eps, corrected_eps, maximize)
-> direction: Adam in the subspace alone, in one pass.

`low` is the projected gradient. The moments advance in place and `step` counts up. The direction includes the bias
corrections, so the weight's change is -lr * scale * up(direction).

Moments of `low`'s shape in float32 (float64 for float64), with both scales None; or in 8 bits: uint8 codes of `low`'s
shape [rank, length], and one float32 scale per block, [rank, ceil(length / 256)]. Each row of `low` then belongs to one
basis vector, and a block is 256 neighbours in a row, so that no block mixes the energies of two basis vectors. On the
left side that is R = P^T G as it is; on the right side R is made and used transposed: low = P^T G^T, up(X) = X^T P^T.
All tensors are contiguous. Scales of zero make a fresh state, whatever its codes. A block whose magnitudes all are
below 1.2e-38 is stored as zero; one with a NaN or an infinity becomes NaN."""
adam_step = torch.ops.pykern.adam_step.default


@torch.library.register_fake("pykern::low_rank_adam_step")
def _(
    param,
    grad,
    projector,
    exp_avg,
    exp_avg_sq,
    step,
    residual_norm,
    lr,
    *,
    beta1,
    beta2,
    eps,
    weight_decay,
    scale,
    right,
    decay_after,
    corrected_eps,
    scaled_residual,
    maximize,
):
    return None


@torch.library.register_fake("pykern::adam_step")
def _(
    param,
    grad,
    exp_avg,
    exp_avg_sq,
    step,
    lr,
    *,
    beta1,
    beta2,
    eps,
    weight_decay,
    decay_after,
    corrected_eps,
    maximize,
):
    return None


@torch.library.register_fake("pykern::low_rank_adam_phase")
def _(
    low,
    exp_avg,
    exp_avg_sq,
    exp_avg_scale,
    exp_avg_sq_scale,
    step,
    *,
    beta1,
    beta2,
    eps,
    corrected_eps,
    maximize,
):
    return torch.empty_like(low)
