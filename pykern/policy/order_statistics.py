"""Quantiles, shares and moments of the unmasked tokens, found on the device without waiting for it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _native
from .checks import check_floats, checked_flags, constant, kind

ORDERS = ("largest", "smallest", "random")
"""Which tokens of a share are selected: those of the largest or smallest values, or any, by a seed."""

INTERPOLATIONS = ("linear", "nearest", "lower", "higher")
"""A quantile between two values: on the line between them; the nearer one, of two equally near that of even rank;
the lower one; the higher one. As in torch.quantile."""


def masked_quantile(
    values: Tensor, q: float | Sequence[float], mask: Tensor | None = None, *, interpolation: str = "linear"
) -> Tensor:
    """Quantiles of the unmasked values: a scalar for one q, else [Q]. Constants: no gradient.

    With the n unmasked values in order, x_0 <= ... <= x_{n-1}, and p = q (n - 1): x_p, between two ranks by
    `interpolation`. The order statistics are exact whatever n is; float64 for float64 values, else float32. What is
    masked may hold anything; an unmasked NaN makes the quantile NaN, and so does n = 0. One selection per q.

    Args:
        values: floating-point, of any shape.
        q: from 0 to 1, one or several.
        mask: of the shape of values; a token counts where it is not 0. None: all tokens.
        interpolation: one of INTERPOLATIONS.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    check_floats(values, "values")
    flags = checked_flags(mask, "mask", values, "values")
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"interpolation: expected one of {', '.join(INTERPOLATIONS)}, got {interpolation!r}")
    if isinstance(q, Tensor) and q.dim() > 0:
        raise TypeError(f"q: expected a number or a sequence of numbers, got {kind(q)}; pass q.tolist()")
    single = not isinstance(q, Sequence)
    quantiles = [float(number) for number in ((q,) if single else q)]
    for number in quantiles:
        if not 0 <= number <= 1:
            raise ValueError(f"q: expected numbers from 0 to 1, got {number!r}")
    _native.require_kernels(values, "values", "masked_quantile")
    result = torch.ops.pykern.masked_quantile.default(
        constant(values), flags, quantiles, INTERPOLATIONS.index(interpolation)
    )
    return result[0] if single else result


def share_mask(
    values: Tensor,
    share: float,
    mask: Tensor | None = None,
    *,
    order: str = "largest",
    minimum: int = 0,
    candidates: Tensor | None = None,
    seed: int = 0,
    return_counts: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Selects k = max(floor(share n), minimum) of the n unmasked tokens: bool, of the shape of values.

    n is counted on the device. Of equal values (-0 equals 0), those that come first are selected, in the flat order of
    the tensor, so the result is the same on any device and number of threads. Fewer than k are selected where there
    are not as many candidates. A NaN is never selected, though an unmasked one counts in n.

    Args:
        values: floating-point, of any shape. In "random" order only its shape matters.
        share: from 0 to 1.
        mask: of the shape of values; a token counts in n where it is not 0. None: all tokens.
        order: one of ORDERS.
        minimum: how many are selected where the share is less.
        candidates: of the shape of values; masked or not, only a token where it is not 0 can be selected, if unmasked.
        seed: in "random" order, every token draws a number of 64 bits from its place and the seed, and the smallest
            are selected: the same for the same seed.
        return_counts: also return int64 [2]: how many are selected, and n.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    check_floats(values, "values")
    flags = checked_flags(mask, "mask", values, "values")
    allowed = checked_flags(candidates, "candidates", values, "values")
    if order not in ORDERS:
        raise ValueError(f"order: expected one of {', '.join(ORDERS)}, got {order!r}")
    if not 0 <= share <= 1:
        raise ValueError(f"share: expected a number from 0 to 1, got {share!r}")
    if minimum < 0:
        raise ValueError(f"minimum: expected a count of at least 0, got {minimum!r}")
    _native.require_kernels(values, "values", "masked_select_share")
    selected, counts = torch.ops.pykern.masked_select_share.default(
        constant(values), flags, allowed, ORDERS.index(order), float(share), minimum, seed
    )
    return (selected, counts) if return_counts else selected


def masked_moments(values: Tensor, mask: Tensor | None = None, *, centre: Tensor | None = None) -> Tensor:
    """Moments of the unmasked values, float64 [5]: their number, mean, mean of (x - centre)^2, smallest, largest.

    Summed in float64 in an order that no thread decides. Of no values: 0, 0, 0, inf, -inf.

    Args:
        values: floating-point, of any shape.
        mask: of the shape of values; a token counts where it is not 0. None: all tokens.
        centre: one element; None stands for 0.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    check_floats(values, "values")
    flags = checked_flags(mask, "mask", values, "values")
    if centre is not None:
        if not isinstance(centre, Tensor) or centre.numel() != 1:
            got = list(centre.shape) if isinstance(centre, Tensor) else kind(centre)
            raise ValueError(f"centre: expected a tensor of one element, got {got}")
        centre = centre.detach().to(torch.float64)
    _native.require_kernels(values, "values", "masked_moments")
    return torch.ops.pykern.masked_moments.default(constant(values), flags, centre)


@torch.library.register_fake("pykern::masked_quantile")
def _masked_quantile_fake(values, mask, quantiles, interpolation):
    return values.new_empty(len(quantiles))


@torch.library.register_fake("pykern::masked_select_share")
def _masked_select_share_fake(values, mask, candidates, order, share, minimum, seed):
    return torch.empty_like(values, dtype=torch.bool), values.new_empty(2, dtype=torch.int64)


@torch.library.register_fake("pykern::masked_moments")
def _masked_moments_fake(values, mask, centre):
    return values.new_empty(5, dtype=torch.float64)
