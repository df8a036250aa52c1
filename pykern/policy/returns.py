"""Values per token that run along a sequence from its end: discounted returns, generalised advantages; whitening."""

import torch
from torch import Tensor

from .. import _native
from .checks import (
    FLOATS,
    check_device,
    check_floats,
    check_integers,
    check_like,
    checked_flags,
    checked_offsets,
    constant,
    kind,
)

CARRIES = ("through", "decay")
"""What a masked token does to the running value that passes it from the right: nothing; what a token with reward 0 and
value 0 does, one step of discount included."""


def discounted_returns(
    rewards: Tensor,
    *,
    gamma: float = 1.0,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    carry: str = "through",
) -> Tensor:
    """Rewards to go, from the right: G_t = r_t + gamma G_{t+1}. Constants: no gradient.

    A masked token gets 0; its reward is not read. What happens to the running value there is `carry`'s choice:

    - "through" (as verl's REINFORCE++): it passes unchanged, so gamma counts the unmasked tokens alone, and rewards
      reach the turns before an observation;
    - "decay" (as OpenRLHF): the masked token is a step with reward 0, so gamma counts positions.

    A parallel scan with running values in float64: results are the same bit for bit on any number of threads. A NaN or
    an infinity at an unmasked token makes the earlier tokens of its sequence NaN or infinite, and no others.

    Args:
        rewards: padded [B, T], or packed [N] with cu_seqlens; float32, float64, bfloat16 or float16.
        gamma: discount, a number from 0 to 1.
        mask: of the shape of rewards; a token counts where it is not 0. None: all tokens.
        cu_seqlens: [B + 1] integers from 0 to N, the packed sequences' bounds. On a GPU their values are not checked,
            since that would wait for them.
        carry: a row of CARRIES.

    Returns:
        Returns of the shape of rewards, float64 for float64, else float32.

    Raises:
        TypeError, ValueError: naming the argument.

    Paper: REINFORCE++, arXiv 2501.03262.
    """
    arguments = _check(rewards, gamma, mask, cu_seqlens, carry)
    return _scan(None, None, 1.0, *arguments)[1]


def gae(
    rewards: Tensor,
    values: Tensor,
    *,
    gamma: float = 1.0,
    lam: float | Tensor = 1.0,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    carry: str = "through",
    whiten: bool = False,
) -> tuple[Tensor, Tensor]:
    """Generalised advantages and the returns that a value function learns. Constants: no gradient.

    From the right, with V and A zero behind the end of a sequence:

        A_t = r_t + gamma V_next - V_t + gamma lam A_next,    return_t = A_t + V_t

    A masked token gets 0 in both; its reward and value are not read. By carry="through" (as verl) "next" is the next
    unmasked token; by "decay" (as OpenRLHF) it is the next position, masked tokens having reward 0 and value 0.

    A parallel scan with running values in float64: results are the same bit for bit on any number of threads. A NaN or
    an infinity at an unmasked token makes the earlier tokens of its sequence NaN or infinite, and with `whiten` all.

    Args:
        rewards: padded [B, T], or packed [N] with cu_seqlens; float32, float64, bfloat16 or float16.
        values: of the shape of rewards, the value of the state in which the token was taken.
        gamma: discount, a number from 0 to 1.
        lam: a number from 0 to 1, or one per sequence, [B] (see length_adaptive_lambda).
        mask: of the shape of rewards; a token counts where it is not 0. None: all tokens.
        cu_seqlens: [B + 1] integers from 0 to N, the packed sequences' bounds. On a GPU their values are not checked,
            since that would wait for them.
        carry: a row of CARRIES.
        whiten: advantages go through masked_whiten; the returns are those before.

    Returns:
        Advantages and returns of the shape of rewards; float64 if one of rewards and values is, else float32.

    Raises:
        TypeError, ValueError: naming the argument.

    Paper: arXiv 1506.02438.
    """
    arguments = _check(rewards, gamma, mask, cu_seqlens, carry)
    check_floats(values, "values")
    check_like(values, "values", rewards, "rewards")
    lambdas, number = None, 1.0
    if isinstance(lam, Tensor) and lam.dim() > 0:
        sequences = rewards.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        if lam.dtype not in FLOATS:
            raise TypeError(f"lam: expected a number or a floating-point tensor, got {kind(lam)}")
        if list(lam.shape) != [sequences]:
            raise ValueError(f"lam: expected one per sequence, [{sequences}], got {list(lam.shape)}")
        check_device(lam, "lam", rewards, "rewards")
        lambdas = lam.detach().double().contiguous()
    elif isinstance(lam, Tensor):
        raise ValueError("lam: expected a number or one per sequence, [B], got a tensor without dimensions")
    else:
        number = _check_share(lam, "lam")
    advantages, returns = _scan(values, lambdas, number, *arguments)
    if whiten:
        advantages = masked_whiten(advantages, mask)
    return advantages, returns


def length_adaptive_lambda(lengths: Tensor, alpha: float = 0.05) -> Tensor:
    """lam for gae that looks further along longer responses: 1 - 1 / (alpha length), but at least 0. float64 [B].

    Args:
        lengths: [B] integers, unmasked tokens of each sequence.
        alpha: at a length of 1 / alpha, and below, lam is 0.

    Raises:
        TypeError, ValueError: naming the argument.

    Paper: VAPO, arXiv 2504.05118.
    """
    check_integers(lengths, "lengths")
    if lengths.dim() != 1:
        raise ValueError(f"lengths: expected one per sequence, [B], got {list(lengths.shape)}")
    if not alpha > 0:
        raise ValueError(f"alpha: expected a positive number, got {alpha!r}")
    return (1 - 1 / (alpha * lengths.double().clamp(min=1))).clamp(min=0)


def masked_whiten(
    values: Tensor, mask: Tensor | None = None, *, shift_mean: bool = True, eps: float = 1e-8, ddof: int = 1
) -> Tensor:
    """(x - mean) / sqrt(variance + eps) over all tokens that count. Constants: no gradient.

    Masked tokens are not read and get 0. Equal values become exactly 0 (or stay, without shift_mean). Moments are
    sums in float64 of distances from one of the values, in an order that no thread decides: the same bit for bit.

    Args:
        values: of any shape; float32, float64, bfloat16 or float16.
        mask: of the shape of values; a token counts where it is not 0. None: all.
        shift_mean: False adds the mean again after the division.
        eps: added to the variance.
        ddof: 1 divides the squared distances by the number of tokens less one (as verl), 0 by their number.

    Returns:
        The shape of values, float64 for float64, else float32.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    check_floats(values, "values")
    mask = checked_flags(mask, "mask", values, "values")
    if not eps >= 0:
        raise ValueError(f"eps: expected a number of at least 0, got {eps!r}")
    if ddof not in (0, 1):
        raise ValueError(f"ddof: expected 0 or 1, got {ddof!r}")
    _native.require_kernels(values, "values", "masked_whiten")
    return torch.ops.pykern.masked_whiten.default(constant(values), mask, bool(shift_mean), float(eps), int(ddof))


def _check_share(value: object, name: str) -> float:
    if isinstance(value, Tensor) or not 0 <= value <= 1:
        raise ValueError(f"{name}: expected a number from 0 to 1, got {value!r}")
    return float(value)


def _check(rewards: Tensor, gamma: float, mask: Tensor | None, cu_seqlens: Tensor | None, carry: str) -> tuple:
    """What both scans take, ready for the op."""
    check_floats(rewards, "rewards")
    cu_seqlens, _ = checked_offsets(cu_seqlens, rewards, "rewards")
    if carry not in CARRIES:
        raise ValueError(f"carry: expected one of {', '.join(CARRIES)}, got {carry!r}")
    return rewards, _check_share(gamma, "gamma"), checked_flags(mask, "mask", rewards, "rewards"), cu_seqlens, carry


def _scan(values, lambdas, lam, rewards, gamma, mask, cu_seqlens, carry) -> tuple[Tensor, Tensor]:
    _native.require_kernels(rewards, "rewards", "discounted_scan")
    wide = rewards.dtype == torch.float64 or (values is not None and values.dtype == torch.float64)
    rewards, values = (
        None if tensor is None else tensor.detach().to(torch.float64 if wide else torch.float32).contiguous()
        for tensor in (rewards, values)
    )
    return torch.ops.pykern.discounted_scan.default(
        rewards, values, mask, cu_seqlens, lambdas, gamma, lam, carry == "decay"
    )


@torch.library.register_fake("pykern::discounted_scan")
def _discounted_scan_fake(rewards, values, mask, cu_seqlens, lambdas, gamma, lambda_, decay):
    advantages = rewards.new_empty(0) if values is None else torch.empty_like(rewards)
    return advantages, torch.empty_like(rewards)


@torch.library.register_fake("pykern::masked_whiten")
def _masked_whiten_fake(values, mask, shift_mean, eps, ddof):
    return torch.empty_like(values)
