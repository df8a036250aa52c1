"""Policy losses. A loss is a ratio level and a clip rule, beside a KL estimate and an aggregate: rows of tables."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _native
from .advantages import _FLOATS, _INTEGERS, _kind, _lookup

KL_ESTIMATORS = ("k1", "k2", "k3")
"""With d = logprob - ref_logprob: d; d^2 / 2; exp(-d) + d - 1."""

AGGREGATES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
"""How token losses become one: see policy_loss."""

METRICS = (
    "policy_loss",
    "kl_loss",
    "kl",
    "ratio_mean",
    "approx_kl",
    "clip_fraction",
    "clip_fraction_low",
    "clip_fraction_high",
    "dual_clip_fraction",
    "rollout_weight_mean",
)


@dataclass(frozen=True)
class Loss:
    """A row of LOSSES.

    ratio: "token", or "sequence" for the geometric mean over a sequence (one ratio for all its tokens).
    clip: "ppo" takes the larger of the free and the clipped loss; "weight" clips the ratio as a constant weight.
    clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high]; infinite for no bound.
    dual_clip: highest ratio that a negative advantage may count with; infinite for none.
    """

    ratio: str
    clip: str
    clip_low: float
    clip_high: float
    dual_clip: float
    aggregate: str
    paper: str


LOSSES: dict[str, Loss] = {
    "ppo": Loss("token", "ppo", 0.2, 0.2, math.inf, "token-mean", "arXiv 1707.06347"),
    "grpo": Loss("token", "ppo", 0.2, 0.2, math.inf, "token-mean", "arXiv 2402.03300"),
    "dual_clip": Loss("token", "ppo", 0.2, 0.2, 3.0, "token-mean", "arXiv 1912.09729"),
    "dapo": Loss("token", "ppo", 0.2, 0.28, math.inf, "token-mean", "arXiv 2503.14476"),
    "dr_grpo": Loss("token", "ppo", 0.2, 0.2, math.inf, "seq-mean-token-sum-norm", "arXiv 2503.20783"),
    "cispo": Loss("token", "weight", math.inf, 4.0, math.inf, "token-mean", "arXiv 2506.13585"),
    "gspo": Loss("sequence", "ppo", 3e-4, 4e-4, math.inf, "seq-mean-token-mean", "arXiv 2507.18071"),
}


@dataclass(frozen=True)
class Limits:
    """Clamps of a peer; beyond one, a gradient is zero. The k3 estimate is limited in its input and its value."""

    log_ratio: float = math.inf
    sequence_log_ratio: float = math.inf
    kl_log_ratio: float = math.inf
    kl: float = math.inf
    dual_clip: float | None = None


PRESETS: dict[str | None, Limits] = {
    None: Limits(),
    "verl": Limits(log_ratio=20.0, sequence_log_ratio=10.0, kl_log_ratio=20.0, kl=10.0, dual_clip=3.0),
    "trl": Limits(),
}


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    loss: str = "grpo",
    clip_low: float | None = None,
    clip_high: float | None = None,
    dual_clip: float | None = None,
    kl: str | None = None,
    kl_coef: float = 0.0,
    ref_logprobs: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    rollout_clip: float = 2.0,
    aggregate: str | None = None,
    denominator: float | None = None,
    horizon: float | None = None,
    preset: str | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Policy loss to minimise, and metrics, in one pass that also computes the gradient for `logprobs`.

    With ratio = exp(logprob - old_logprob), A the advantage and c = clamp(ratio, 1 - clip_low, 1 + clip_high), a
    token's loss is

    - rule "ppo" (ppo, grpo, dapo, dr_grpo, dual_clip): max(-A ratio, -A c), and with dual_clip, where A < 0, at most
      -A dual_clip;
    - rule "weight" (cispo): -c A logprob, c being a constant. 1 + clip_high is the bound that some call epsilon;
      no lower bound by default;
    - gspo: rule "ppo" with ratio = exp(mean over the sequence of logprob - old_logprob), differentiated exactly;
    - times min(exp(old_logprob - rollout_logprob), rollout_clip), a constant, if rollout_logprobs are given
      (truncated importance sampling);
    - plus kl_coef times the KL estimate: k1 = d, k2 = d^2 / 2, k3 = exp(-d) + d - 1, d = logprob - ref_logprob.

    Aggregates (S: sum over a sequence's tokens, L: its unmasked tokens, sequences with L = 0 counting nowhere):
    "token-mean" sum S / sum L; "token-sum" sum S; "seq-mean-token-sum" mean S; "seq-mean-token-mean" mean S / L;
    "seq-mean-token-sum-norm" mean S / horizon.

    Masked tokens may hold NaN or infinities in every input: they are selected away, their gradient is exactly 0. A
    NaN or infinity at an unmasked token shows in the loss. Nothing is clamped unless a preset says so. Results are the
    same bit for bit on any number of threads. The metrics are tensors on the same device; nothing waits for them.

    Args:
        logprobs: log-probability of each taken token under the policy, the only input that receives a gradient:
            padded [B, T], or packed [N] with cu_seqlens. float32, float64, bfloat16 or float16; computed in float32,
            float64 for float64.
        old_logprobs: the same under the policy that the ratio is against; None stands for logprobs, detached.
        advantages: one per sequence, [B], or per token, of the shape of logprobs. Packed with as many tokens as
            sequences, they are read as per sequence.
        mask: of the shape of logprobs; a token counts where it is not 0. None: all tokens.
        cu_seqlens: [B + 1] integers from 0 to N, the packed sequences' bounds. On a GPU their values are not checked,
            since that would wait for them.
        loss: a row of LOSSES, which holds the defaults of clip_low, clip_high, dual_clip and aggregate.
        clip_low, clip_high, dual_clip: replace the row's; math.inf takes a bound away.
        kl, kl_coef, ref_logprobs: the KL estimate, its weight, and the reference's log-probabilities.
        rollout_logprobs, rollout_clip: log-probabilities as the sampler reported them, and the weight's bound.
        denominator: replaces the number of tokens ("token-mean") or of sequences ("seq-mean-..."), for batches that
            are cut into several calls: pass the count of the whole batch.
        horizon: divisor of "seq-mean-token-sum-norm"; T by default, required when packed.
        preset: "verl": its clamps (log-ratio +-20, for gspo at most 10; k3 input +-20, value at most 10) and its dual
            clip of 3. "trl": neither.

    Returns:
        The loss, a scalar (float64 for float64, else float32), and scalars: "policy_loss" and "kl_loss" (they add up to
        the loss), then means over the unmasked tokens: "kl" (the estimate, unweighted), "ratio_mean", "approx_kl"
        (old_logprob - logprob), "clip_fraction" (tokens whose clip is in force), of that "clip_fraction_low" and
        "clip_fraction_high", "dual_clip_fraction", "rollout_weight_mean". What was not asked for is 0.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    row = _lookup(LOSSES, loss, "loss")
    limits = _lookup(PRESETS, preset, "preset")
    aggregate = row.aggregate if aggregate is None else aggregate
    if aggregate not in AGGREGATES:
        raise ValueError(f"aggregate: expected one of {', '.join(AGGREGATES)}, got {aggregate!r}")
    _check_floats(logprobs, "logprobs")
    if cu_seqlens is None:
        if logprobs.dim() != 2:
            raise ValueError(
                f"logprobs: expected [B, T], got {list(logprobs.shape)}; packed tokens [N] need cu_seqlens"
            )
        sequences = logprobs.shape[0]
    else:
        if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in _INTEGERS:
            raise TypeError(f"cu_seqlens: expected a tensor of integers, got {_kind(cu_seqlens)}")
        if logprobs.dim() != 1 or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
            raise ValueError(
                f"cu_seqlens: expected [B + 1] beside logprobs [N], got {list(cu_seqlens.shape)} beside "
                f"{list(logprobs.shape)}; padded log-probabilities take a mask instead"
            )
        sequences = cu_seqlens.shape[0] - 1
    for name, tensor in (
        ("old_logprobs", old_logprobs),
        ("ref_logprobs", ref_logprobs),
        ("rollout_logprobs", rollout_logprobs),
    ):
        if tensor is not None:
            _check_floats(tensor, name)
            _check_shape(tensor, logprobs, name)
    _check_floats(advantages, "advantages")
    if advantages.shape != logprobs.shape and list(advantages.shape) != [sequences]:
        raise ValueError(
            f"advantages: expected one per sequence, [{sequences}], or per token, {list(logprobs.shape)}, "
            f"got {list(advantages.shape)}"
        )
    if mask is not None:
        if not isinstance(mask, Tensor):
            raise TypeError(f"mask: expected a tensor, got {_kind(mask)}")
        _check_shape(mask, logprobs, "mask")
    if kl is not None:
        if kl not in KL_ESTIMATORS:
            raise ValueError(f"kl: expected None or one of {', '.join(KL_ESTIMATORS)}, got {kl!r}")
        if ref_logprobs is None:
            raise ValueError(f"ref_logprobs: kl={kl!r} needs the reference's log-probabilities")
    elif ref_logprobs is not None or kl_coef:
        raise ValueError("kl: expected k1, k2 or k3 beside ref_logprobs and kl_coef, got None")
    clip_low = row.clip_low if clip_low is None else clip_low
    clip_high = row.clip_high if clip_high is None else clip_high
    for name, bound in (("clip_low", clip_low), ("clip_high", clip_high)):
        if not bound >= 0:
            raise ValueError(f"{name}: expected a distance from 1 of at least 0, got {bound!r}")
    if dual_clip is None:
        dual_clip = row.dual_clip
        if limits.dual_clip is not None and row.ratio == "token" and row.clip == "ppo":
            dual_clip = min(dual_clip, limits.dual_clip)
    if not dual_clip > 1:
        raise ValueError(f"dual_clip: expected a ratio above 1, got {dual_clip!r}")
    if not rollout_clip > 0:
        raise ValueError(f"rollout_clip: expected a positive weight, got {rollout_clip!r}")
    if denominator is not None and not denominator > 0:
        raise ValueError(f"denominator: expected a positive count, got {denominator!r}")
    if aggregate == "seq-mean-token-sum-norm" and horizon is None:
        if cu_seqlens is not None:
            raise ValueError(f"horizon: {aggregate!r} of packed sequences needs it, the longest response allowed")
        horizon = max(logprobs.shape[1], 1)
    if horizon is not None and not horizon > 0:
        raise ValueError(f"horizon: expected a positive number of tokens, got {horizon!r}")
    tensors = {
        "old_logprobs": old_logprobs,
        "advantages": advantages,
        "mask": mask,
        "cu_seqlens": cu_seqlens,
        "ref_logprobs": ref_logprobs,
        "rollout_logprobs": rollout_logprobs,
    }
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != logprobs.device:
            raise ValueError(f"{name}: expected the device of logprobs, {logprobs.device}, got {tensor.device}")
    _native.require_kernels(logprobs, "logprobs", "policy_loss_forward", "policy_loss_backward")

    dtype = torch.float64 if logprobs.dtype == torch.float64 else torch.float32

    def prepare(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(dtype).contiguous()

    constants = (
        prepare((logprobs if old_logprobs is None else old_logprobs).detach()),
        prepare(advantages.detach()),
        None if mask is None else (mask if mask.dtype == torch.bool else mask != 0).contiguous(),
        None if cu_seqlens is None else cu_seqlens.to(torch.int64).contiguous(),
        None if kl is None else prepare(ref_logprobs.detach()),
        None if rollout_logprobs is None else prepare(rollout_logprobs.detach()),
        row.ratio == "sequence",
        row.clip == "weight",
        0 if kl is None else 1 + KL_ESTIMATORS.index(kl),
        AGGREGATES.index(aggregate),
        [
            1.0 - clip_low,
            1.0 + clip_high,
            float(dual_clip),
            limits.log_ratio,
            limits.sequence_log_ratio,
            float(kl_coef),
            limits.kl_log_ratio,
            limits.kl,
            float(rollout_clip),
            0.0 if denominator is None else float(denominator),
            1.0 if horizon is None else float(horizon),
        ],
    )
    if torch.is_grad_enabled() and logprobs.requires_grad:
        value, metrics = _PolicyLoss.apply(prepare(logprobs), *constants)
    else:
        value, _, metrics = torch.ops.pykern.policy_loss_forward.default(prepare(logprobs.detach()), *constants, False)
    return value, dict(zip(METRICS, metrics.unbind()))


class _PolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logprobs, *constants):
        value, coefficient, metrics = torch.ops.pykern.policy_loss_forward.default(logprobs, *constants, True)
        ctx.save_for_backward(coefficient)
        ctx.mark_non_differentiable(metrics)
        ctx.constants = len(constants)
        return value, metrics

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, _):
        (coefficient,) = ctx.saved_tensors
        gradient = torch.ops.pykern.policy_loss_backward.default(grad_loss, coefficient)
        return gradient, *([None] * ctx.constants)


@torch.library.register_fake("pykern::policy_loss_forward")
def _policy_loss_forward_fake(
    logprobs, old_logprobs, advantages, mask, cu_seqlens, ref_logprobs, rollout_logprobs, sequence_ratio, weight_clip,
    kl, aggregate, settings, with_gradient,
):  # fmt: skip
    coefficient = torch.empty_like(logprobs) if with_gradient else logprobs.new_empty(0)
    return logprobs.new_empty(()), coefficient, logprobs.new_empty(len(METRICS))


@torch.library.register_fake("pykern::policy_loss_backward")
def _policy_loss_backward_fake(grad_loss, coefficient):
    return torch.empty_like(coefficient)


def _check_floats(tensor: Tensor, name: str) -> None:
    if not isinstance(tensor, Tensor) or tensor.dtype not in _FLOATS:
        raise TypeError(f"{name}: expected a floating-point tensor, got {_kind(tensor)}")


def _check_shape(tensor: Tensor, logprobs: Tensor, name: str) -> None:
    if tensor.shape != logprobs.shape:
        raise ValueError(f"{name}: expected the shape of logprobs, {list(logprobs.shape)}, got {list(tensor.shape)}")
