"""A baseline of its own for each step of a group of responses: the one of least variance."""

import torch
from torch import Tensor

from .. import _native
from .checks import check_device, check_floats, check_group_ids, check_like, checked_flags

ALIGNMENTS = ("position", "token")
"""What makes tokens of two responses the same step: their column; their number among the unmasked tokens of their
row, which leaves out what tools and users say between the turns."""

METRICS = ("non_finite",)


def optimal_token_baseline(
    returns: Tensor,
    logprobs: Tensor,
    sum_p2: Tensor,
    group_ids: Tensor,
    *,
    mask: Tensor | None = None,
    importance_weights: Tensor | None = None,
    align: str = "position",
    zero_tail: bool = True,
    eps: float = 1e-8,
    singleton: str = "zero",
    return_metrics: bool = False,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """Advantages per token against the variance-minimal baseline of each step. Constants: no gradient.

    The squared norm of the score of a token of probability p, with respect to the logits, is 1 - 2 p + sum p^2. With
    W_jt its sum over the unmasked tokens of response j up to step t (each times the squared importance weight), and
    G_jt the return from t on:

        b_t = sum_j G_jt W_jt / (sum_j W_jt + eps),    A_jt = G_jt - b_t

    over the responses of the group that have step t. Masked tokens get 0; nothing of theirs is read.

    - Tail: by zero_tail, where a group's longest response is the only one of its length, its tokens from the second
      longest length on have the baseline 0.
    - Equal returns: where all responses that have a step have the same return, and it is not such a tail, A is exactly
      0.
    - A response with a NaN or an infinity among what is read gets 0 and stays out of its group; it is counted. A
      response without tokens is no member of its group.
    - Sums run in float64, in an order that no thread decides: results are the same bit for bit.

    Args:
        returns: [B, T], such as discounted_returns(rewards, mask=mask); float32, float64, bfloat16 or float16.
        logprobs: [B, T] log-probability of each token under the policy that took it.
        sum_p2: [B, T] sum of the squared probabilities of the vocabulary, of token_logprobs(sum_p2=True).
        group_ids: [B] integers, of any value and in any order; equal ids make a group.
        mask: [B, T]; a token counts where it is not 0. None: all tokens.
        importance_weights: [B, T] weights of the tokens against the sampler, such as a truncated ratio.
        align: "position" (verl's optimal_token_baseline), or "token" (its tir_optimal_token_baseline, for responses
            of several turns).
        zero_tail: see above; False gives the longest response's tail its own baseline, which leaves 0.
        eps: added to the sum of W.
        singleton: a response alone in its group gets "zero", or by "self" (as verl) its returns, the baseline being 0.
        return_metrics: also return {"non_finite": responses left out}, an integer on the same device.

    Returns:
        Advantages [B, T], float64 if an input is, else float32.

    Raises:
        TypeError, ValueError: naming the argument.

    Paper: the variance-minimal baseline of each step, arXiv 1301.2315, as verl's optimal_token_baseline estimates it.
    """
    tokens = {"returns": returns, "logprobs": logprobs, "sum_p2": sum_p2, "importance_weights": importance_weights}
    for name, tensor in tokens.items():
        if tensor is None and name == "importance_weights":
            continue
        check_floats(tensor, name)
        if name == "returns" and tensor.dim() != 2:
            raise ValueError(f"returns: expected one per token, [B, T], got {list(tensor.shape)}")
        check_like(tensor, name, returns, "returns")
    check_group_ids(group_ids, "group_ids", len(returns), "response")
    check_device(group_ids, "group_ids", returns, "returns")
    mask = checked_flags(mask, "mask", returns, "returns")
    if align not in ALIGNMENTS:
        raise ValueError(f"align: expected one of {', '.join(ALIGNMENTS)}, got {align!r}")
    if singleton not in ("zero", "self"):
        raise ValueError(f'singleton: expected "zero" or "self", got {singleton!r}')
    if not eps >= 0:
        raise ValueError(f"eps: expected a number of at least 0, got {eps!r}")
    _native.require_kernels(returns, "returns", "optimal_token_baseline")

    wide = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tokens.values())
    prepared = [
        None if tensor is None else tensor.detach().to(torch.float64 if wide else torch.float32).contiguous()
        for tensor in tokens.values()
    ]
    advantages, counts = torch.ops.pykern.optimal_token_baseline.default(
        *prepared[:3],
        group_ids.to(torch.int64).contiguous(),
        mask,
        prepared[3],
        align == "token",
        bool(zero_tail),
        float(eps),
        singleton == "self",
    )
    if return_metrics:
        return advantages, dict(zip(METRICS, counts.unbind()))
    return advantages


@torch.library.register_fake("pykern::optimal_token_baseline")
def _optimal_token_baseline_fake(
    returns, logprobs, sum_p2, group_ids, mask, weights, by_token, zero_tail, eps, singleton_self
):
    return torch.empty_like(returns), group_ids.new_empty(len(METRICS))
