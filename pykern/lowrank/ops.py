"""The raw ops of the family and their fake kernels.

One convention for all but `adamw_step`: a weight and its gradient are seen with the compressed axis first, [n,
length], as views whose unit stride is along either axis. Then P is [n, rank], R = P^T G and every state are [rank,
length], and up(X) = P X, on both sides. Lists have one entry per matrix, of any shapes but one dtype and one device,
and an op is one call (on CUDA a few launches) for all of them; a list that is not needed is empty. Low-rank tensors
(low, direction, ratios, squares) are float32, float64 for float64 matrices, contiguous, and made by the caller.
`step`s are one-element float32 tensors that count up in the op which advances the moments. `lr` is one float32 or
float64 element. `grad_scale` and `found_inf` are torch.amp's: one float32 element each, or None; the gradient is
divided by grad_scale, and where found_inf is not zero no state, count or weight changes. `maximize` turns the
gradient's sign. On CUDA a float32 or float64 weight takes a temporary of its size, the vendor's product, one weight
after the other; bfloat16 and float16 take none, nor do projectors that pick rows.

low_rank_adamw_step(param!, grad, projector, exp_avg!, exp_avg_sq!, step!, residual_norm!, lr, grad_scale, found_inf,
        *, beta1, beta2, eps, corrected_eps, weight_decay, decay_after, scale, residual, removed, growth,
        zero_norm_limits, amplitude, amplitude_first, orthonormal, maximize)
    The whole step of AdamW on float32 moments: the five parts below in one. residual: 0 none, 1 Fira, 2 APOLLO's
    channel scale, 3 APOLLO's tensor scale (`projector` then projects down only, and `scale` and `removed` are not
    read). `orthonormal` False: P^T P is taken into account in the residual's norm.
low_rank_project(matrix, projector, grad_scale, low!, squares!, *, maximize)
    low = P^T G; squares = the columns' squared norms (an empty list: not wanted). Here and in low_rank_apply the
    projectors of a list may instead be int64 [rank], without squares: the rows of G that are low's, each once, -1 for
    a row of zeros. P then has a one in each of its columns or none. On the CPU other lists are refused; on CUDA what is
    no row of G counts as -1, and nobody looks whether a row comes twice.
low_rank_rule(low, exp_avg!, exp_avg_sq!, exp_avg_scale!, exp_avg_sq_scale!, step!, direction!, step_factor!,
        found_inf, *, rule, beta1, beta2, eps, corrected_eps)
    The inner rule: 0 adamw, 1 adabelief, 2 lion, 3 momentum (reference.lowrank_parts.RULES; the last two have no
    exp_avg_sq). step_factor [matrices] float64 gets the factor on the learning rate. Moments are float32 (float64 for
    float64), bfloat16 (both scale lists empty), or 8-bit: uint8 codes [rank, length] of the dynamic map, with one
    float32 scale per 256 neighbours in a row, [rank, ceil(length / 256)], so that no block mixes two basis vectors.
    In bfloat16 a second moment never decays where beta2 > 1 - 2^-9, as 0.999 is: beta2 v rounds back to v. Peers do
    the same.
    With found_inf the direction is zero.
low_rank_ratios(low, direction, squares, low_gram, ratios!, sums!, *, per_tensor, removed)
    phi [length], and sums [matrices, 3] float64, which processes that share the columns add up before the next op.
    removed None: APOLLO. low_gram: P^T P R, or an empty list where P is orthonormal.
low_rank_limit(low, direction!, ratios!, sums, residual_norm!, grad_scale, found_inf, *, scale, removed, per_tensor,
        amplitude, amplitude_first, growth, zero_norm_limits, maximize)
    direction becomes X (untouched if removed is None), ratios become the factors on G's columns. residual_norm: one
    element each, of low's dtype, negative until known; an empty list or growth 0: no limit.
low_rank_apply(param!, projector, direction, grad, factors, low, compensation!, step, seeds, step_factor, lr,
        grad_scale, found_inf, *, scale, weight_decay, decay_after, sign_scale, rounding, maximize)
    W - lr * step_factor * (scale up(direction) + G factors + sign_scale sign(g - up(low))), decay before or after.
    With projectors that pick rows up(X) is exact, and rows that are not picked change by the decay, G and Kahan's
    compensation alone.
    projector and direction: empty for APOLLO; grad and factors, low: empty where not used. rounding: 0 nearest; 1
    stochastic (bfloat16 and float16 alone round): by the first word of Philox4x32-10 with key seeds[i] and counter
    (index of the element in [n, length] order, step), so that the bits depend on nothing else; 2 Kahan: compensation
    [n, length], of the weight's dtype and strides, holds what rounding lost and joins the next change. Both as
    reference.lowrank_parts.round_stochastic and round_kahan say.
adamw_step(param!, grad, exp_avg!, exp_avg_sq!, step!, lr, grad_scale, found_inf, *, beta1, beta2, eps, weight_decay,
        decay_after, corrected_eps, maximize)
    Plain AdamW of tensors of any shape; each one's four tensors lie alike in memory, without gaps.
"""

import torch

from .. import _native  # noqa: F401 (loads the library that defines the ops)

low_rank_adamw_step = torch.ops.pykern.low_rank_adamw_step.default
low_rank_project = torch.ops.pykern.low_rank_project.default
low_rank_rule = torch.ops.pykern.low_rank_rule.default
low_rank_ratios = torch.ops.pykern.low_rank_ratios.default
low_rank_limit = torch.ops.pykern.low_rank_limit.default
low_rank_apply = torch.ops.pykern.low_rank_apply.default
adamw_step = torch.ops.pykern.adamw_step.default


@torch.library.register_fake("pykern::low_rank_adamw_step")
@torch.library.register_fake("pykern::low_rank_project")
@torch.library.register_fake("pykern::low_rank_rule")
@torch.library.register_fake("pykern::low_rank_ratios")
@torch.library.register_fake("pykern::low_rank_limit")
@torch.library.register_fake("pykern::low_rank_apply")
@torch.library.register_fake("pykern::adamw_step")
def _fake_in_place(*arguments, **keywords):
    """These ops change their arguments and return nothing."""
