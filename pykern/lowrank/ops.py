"""The raw ops of the family and their fake kernels."""

import torch

from .. import _native  # noqa: F401 (loads the library that defines the ops)

low_rank_adam_step = torch.ops.pykern.low_rank_adam_step.default
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
