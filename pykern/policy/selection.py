"""Choices among the tokens of a whole batch: masks, bounds and factors for policy_loss.

All take tokens padded [B, T] or packed [N], count them on the device, and return constants. Masked tokens may hold
anything; they are never selected.
"""

import math

import torch
from torch import Tensor

from .checks import check_device, check_floats, check_like, checked_flags, constant
from .order_statistics import masked_moments, masked_quantile, share_mask
from .rollout import corrected


def top_entropy_mask(entropy: Tensor, mask: Tensor | None = None, *, share: float = 0.2) -> Tensor:
    """Tokens in the top `share` by entropy, bool: H_t >= quantile_{1 - share}(H), over the unmasked tokens.

    For policy_loss(keep=...), which keeps a token in the denominators where it drops it from the loss. Tokens as
    high as the quantile all count, so more than the share are kept where entropies are equal.

    Paper: arXiv 2506.01939. TRL: GRPOConfig(top_entropy_quantile=share) keeps the same tokens.

    Args:
        entropy: of each token's distribution, of any shape.
        mask: of the shape of entropy; a token counts where it is not 0. None: all tokens.
        share: from 0 to 1.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    check_floats(entropy, "entropy")
    flags = checked_flags(mask, "mask", entropy, "entropy")
    if not 0 <= share <= 1:
        raise ValueError(f"share: expected a number from 0 to 1, got {share!r}")
    high = entropy.detach() >= masked_quantile(entropy, 1.0 - share, flags)
    return high if flags is None else high & flags


def clip_cov_mask(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    share: float = 2e-4,
    covariance_low: float = 1.0,
    covariance_high: float = 5.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    seed: int = 0,
) -> Tensor:
    """Clip-Cov: tokens that stay in the loss, bool. A few of high covariance are drawn, and leave it.

    With means over the n unmasked tokens, cov_t = (A_t - mean A)(l_t - mean l), and ratio = exp(l - lo): candidates
    have covariance_low < cov_t < covariance_high and are not clipped already, -A clamp(ratio) > -A ratio; of them
    max(floor(share n), 1) leave, or all if they are fewer, by a draw that `seed` and a token's place decide (see
    share_mask): pass another seed at each step.

    For policy_loss(loss="clip_cov", keep=..., clip_low=..., clip_high=...). Paper: arXiv 2505.22617. verl's "clip_cov"
    has the same candidates and count and draws by torch.randperm; its clip_cov_ratio is `share`, clip_cov_lb and _ub
    are covariance_low and _high.

    Args:
        logprobs, old_logprobs: of the taken tokens, [B, T] or [N]; no gradient passes through the choice.
        advantages: of the shape of logprobs, or [B] beside [B, T].
        mask: of the shape of logprobs; a token counts where it is not 0. None: all tokens.
        clip_low, clip_high: the bounds that the loss is clipped by.
        seed: of the draw.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    flags = _check_tokens(logprobs, mask, old_logprobs=old_logprobs)
    per_token = constant(_per_token(advantages, logprobs))
    ratio = (constant(logprobs) - constant(old_logprobs)).exp()
    clipped = -per_token * ratio.clamp(1 - clip_low, 1 + clip_high) > -per_token * ratio
    covariance = _covariance(logprobs, per_token, flags)
    candidates = (covariance > covariance_low) & (covariance < covariance_high) & ~clipped
    return ~share_mask(covariance, share, flags, order="random", minimum=1, candidates=candidates, seed=seed)


def kl_cov_mask(logprobs: Tensor, advantages: Tensor, mask: Tensor | None = None, *, share: float = 2e-4) -> Tensor:
    """KL-Cov: the max(floor(share n), 1) tokens of largest covariance, bool, that a divergence holds back.

    With means over the n unmasked tokens, cov_t = (A_t - mean A)(l_t - mean l); of equal ones the first. Their loss
    becomes -A ratio + coef |l - lo|.

    For policy_loss(loss="kl_cov", anchor_keep=...). Paper: arXiv 2505.22617. verl's "kl_cov" has the same tokens; its
    kl_cov_ratio is `share`, its ppo_kl_coef is anchor_coef.

    Args:
        logprobs: of the taken tokens, [B, T] or [N]; no gradient passes through the choice.
        advantages: of the shape of logprobs, or [B] beside [B, T].
        mask: of the shape of logprobs; a token counts where it is not 0. None: all tokens.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    flags = _check_tokens(logprobs, mask)
    return share_mask(_covariance(logprobs, _per_token(advantages, logprobs), flags), share, flags, minimum=1)


def low_probability_mask(
    logprobs: Tensor,
    proxy_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    share: float = 0.01,
    published: bool = False,
) -> Tensor:
    """Lp-Reg: low-probability tokens, bool, that are held near a proxy distribution which keeps them.

    Among the n unmasked tokens of negative advantage, the max(floor(share n), 1) of lowest log-probability l, of equal
    ones the first; of those, the ones with l < lp, lp being the taken token's log-probability under the proxy (the
    policy's distribution without tokens below a share of its highest probability, renormalised). Their loss is
    replaced by -A ratio + coef k3, k3 = exp(lp - l) + l - lp; as A < 0, bounds of 1 - 1 and 1 + 9 never clip them.

    For policy_loss(loss="lp_reg", anchor_logprobs=proxy_logprobs, anchor_coef=coef, anchor_keep=...).
    Paper: arXiv 2510.03222. Its code selects nobody where floor(share n) is at most 1; `published=True` does so, too.
    Otherwise its compute_policy_loss_lp_reg has the same tokens; logp_neg_k_percent is `share`.

    Args:
        logprobs: of the taken tokens, [B, T] or [N]; no gradient passes through the choice.
        proxy_logprobs: of the shape of logprobs; -inf where the proxy gives the token up.
        advantages: of the shape of logprobs, or [B] beside [B, T].
        mask: of the shape of logprobs; a token counts where it is not 0. None: all tokens.
        share: of the tokens of negative advantage.
        published: as the paper's code counts.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    flags = _check_tokens(logprobs, mask, proxy_logprobs=proxy_logprobs)
    negative = _per_token(advantages, logprobs) < 0
    if flags is not None:
        negative = negative & flags
    lowest, counts = share_mask(
        logprobs, share, negative, order="smallest", minimum=0 if published else 1, return_counts=True
    )
    selected = lowest & (logprobs < proxy_logprobs).detach()
    return selected & (counts[0] > 1) if published else selected


def hapo_modulation(
    entropy: Tensor,
    logprobs: Tensor,
    old_logprobs: Tensor,
    mask: Tensor | None = None,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    pivot: float = 0.8,
    clip_strength: float = 1.0,
    advantage_strength: float = 1.0,
    published: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """HAPO: clip bounds and an advantage factor for each token by its entropy, three tensors of its shape.

    With e = log(max(H, 1e-8)) and p its quantile of rank `pivot` ("nearest") over the unmasked tokens,

    - h = (e - p) / max(e - p) where e > p, (e - p) / |min(e - p)| elsewhere, from -1 to 1;
    - low = clip_low (1 - clip_strength h) where h <= 0, else clip_low: more room downwards for certain tokens;
    - high = clip_high (1 + clip_strength h) where h > 0, else clip_high: more room upwards for uncertain ones;
    - factor = 1 + advantage_strength h where h > 0 and ratio lies outside (1 - low / 2, 1 + high / 2), or h <= 0 and it
      lies inside; else 1.

    For policy_loss(loss="hapo", clip_low=low, clip_high=high), with factor * A as the advantages. The division by the
    root of the mean square that the paper has between the two steps cancels in h.

    Paper: arXiv 2509.16591. Its code divides by min(e - p) with its sign, so h is never negative there and the rules
    for h <= 0 do nothing; `published=True` does so, too. Then it is its compute_policy_loss with adaptive_clip,
    clip_alpha = clip_strength, adaptive_advantage, adv_beta = advantage_strength, entropy_pivot = pivot.

    Args:
        entropy: of each token's distribution, [B, T] or [N].
        logprobs, old_logprobs: of the taken tokens, of the shape of entropy.
        mask: of the shape of entropy; a token counts where it is not 0. None: all tokens. Masked ones get h = 0.
        published: as the paper's code computes h.

    Returns:
        low, high, factor: float64 for float64 log-probabilities, else float32.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    flags = _check_tokens(logprobs, mask, old_logprobs=old_logprobs, entropy=entropy)
    dtype = torch.float64 if logprobs.dtype == torch.float64 else torch.float32
    level = entropy.detach().to(dtype).clamp(min=1e-8).log()
    above = level - masked_quantile(level, pivot, flags, interpolation="nearest")
    _, _, _, lowest, highest = masked_moments(above, flags).to(dtype).unbind()
    h = torch.where(above > 0, above / highest, -above / lowest if not published else above / lowest)
    steady = above == 0 if flags is None else (above == 0) | ~flags
    h = torch.where(steady, 0.0, h)
    low = clip_low * torch.where(h <= 0, 1 - clip_strength * h, 1.0)
    high = clip_high * torch.where(h > 0, 1 + clip_strength * h, 1.0)
    ratio = (constant(logprobs) - constant(old_logprobs)).exp()
    inside = (ratio > 1 - low / 2) & (ratio < 1 + high / 2)
    factor = torch.where((h > 0) == inside, 1.0, 1 + advantage_strength * h)
    return low, high, factor


def opsm_mask(
    logprobs: Tensor,
    rollout_logprobs: Tensor,
    advantages: Tensor,
    *,
    delta: float,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Off-policy sequence masking: tokens that stay in the loss, bool.

    A token goes where its advantage is negative and its sequence's mean of lv - l over the unmasked tokens is above
    `delta`, l being the policy's log-probability and lv the sampler's. A token whose l or lv is NaN adds 0 to the
    mean. For policy_loss(keep=...).

    Paper: arXiv 2512.02556 (DeepSeek-V3.2). TRL: GRPOConfig(off_policy_mask_threshold=delta), the same tokens.

    Args:
        logprobs: of the taken tokens, [B, T], or packed [N] with cu_seqlens; no gradient passes through the choice.
        rollout_logprobs: of the shape of logprobs.
        advantages: one per sequence, [B], or per token. As many tokens as sequences: per sequence.
        delta: the largest mean that a sequence of negative advantage may have.
        mask: of the shape of logprobs; a token counts where it is not 0. None: all tokens. Masked ones are False.
        cu_seqlens: [B + 1] integers from 0 to N, the packed sequences' bounds; on a GPU not checked.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    _, near, _ = corrected(
        logprobs, rollout_logprobs, mask, cu_seqlens, None, (0.0, math.inf), "truncate",
        {"seq_mean_k1": (-math.inf, float(delta))}, None, False, math.inf, "one", name="logprobs",
    )  # fmt: skip
    if cu_seqlens is None:
        per_token = _per_token(advantages, logprobs)
    else:
        check_floats(advantages, "advantages")
        per_token, sequences = advantages.detach(), cu_seqlens.shape[0] - 1
        if list(advantages.shape) == [sequences]:
            per_token = per_token.repeat_interleave(cu_seqlens.diff(), output_size=logprobs.shape[0])
        elif advantages.shape != logprobs.shape:
            raise ValueError(
                f"advantages: expected one per sequence, [{sequences}], or per token, {list(logprobs.shape)}, "
                f"got {list(advantages.shape)}"
            )
    near = near | (per_token >= 0)
    return near if mask is None else near & (mask != 0)


def aepo_rows(
    advantages: Tensor,
    regulariser_advantages: Tensor,
    *,
    entropy: float | Tensor,
    target: float,
    samples: int,
    threshold: float = 0.05,
) -> tuple[Tensor, Tensor]:
    """AEPO: which responses make up the batch of a step, rows and their advantages, both [B].

    Beside the B responses of the batch, M are sampled again for a part of its prompts, at a high temperature where the
    last step's mean entropy is at most `target`, else at a low one. Of these, those of advantage above `threshold` are
    taken in their order, at most `samples` of them, and half as many (rounded down) where entropy > target. They
    replace the first responses of the batch, with advantage 1, so the loss has a REINFORCE term that moves the policy
    towards that temperature's. `rows` counts in the M followed by the B:

        rows, advantages = aepo_rows(...)
        policy_loss(torch.cat([regulariser_logprobs, logprobs])[rows], ..., advantages)

    Paper: arXiv 2510.08141. Its trainer resamples a quarter of the prompts; `samples` is its reinforce_sample_num.

    Args:
        advantages: of the batch's responses, [B].
        regulariser_advantages: of those sampled again, [M].
        entropy: the policy's mean entropy at the last step, a number or a tensor of one element, which stays on
            the device.
        target: what it is held at.
        samples: at least 0.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    for name, tensor in (("advantages", advantages), ("regulariser_advantages", regulariser_advantages)):
        check_floats(tensor, name)
        if tensor.dim() != 1:
            raise ValueError(f"{name}: expected one per response, got {list(tensor.shape)}")
    if samples < 0:
        raise ValueError(f"samples: expected a count of at least 0, got {samples!r}")
    batch, resampled = advantages.shape[0], regulariser_advantages.shape[0]
    place = torch.arange(batch, device=advantages.device)
    if resampled == 0:
        return place, advantages.detach().clone()
    fits = regulariser_advantages.detach() > threshold
    first = torch.argsort((~fits).to(torch.uint8), stable=True)  # those that fit, in their order
    count = fits.sum().clamp(max=samples)
    high = entropy > target
    if isinstance(high, Tensor):
        count = torch.where(high.to(advantages.device).reshape(()), count // 2, count)
    elif high:
        count = count // 2
    replaced = place < count
    rows = torch.where(replaced, first[place.clamp(max=resampled - 1)], resampled + place)
    return rows, torch.where(replaced, 1.0, advantages.detach())


def _check_tokens(logprobs: Tensor, mask: Tensor | None, **others: Tensor) -> Tensor | None:
    check_floats(logprobs, "logprobs")
    for name, tensor in others.items():
        check_floats(tensor, name)
        check_like(tensor, name, logprobs, "logprobs")
    return checked_flags(mask, "mask", logprobs, "logprobs")


def _per_token(advantages: Tensor, logprobs: Tensor) -> Tensor:
    check_floats(advantages, "advantages")
    check_device(advantages, "advantages", logprobs, "logprobs")
    if advantages.shape == logprobs.shape:
        return advantages.detach()
    if logprobs.dim() == 2 and advantages.shape == logprobs.shape[:1]:
        return advantages.detach()[:, None].expand_as(logprobs)
    raise ValueError(
        f"advantages: expected the shape of logprobs, {list(logprobs.shape)}, or one per row, "
        f"got {list(advantages.shape)}"
    )


def _covariance(logprobs: Tensor, advantages: Tensor, flags: Tensor | None) -> Tensor:
    """(A - mean A)(l - mean l) of each token."""

    def centred(tensor: Tensor) -> Tensor:
        values = constant(tensor)
        return values - masked_moments(values, flags)[1].to(values.dtype)

    return centred(advantages) * centred(logprobs)
