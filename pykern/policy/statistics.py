"""Mean, standard deviation and count of each row's group."""

import torch
from torch import Tensor

from .. import _native
from .checks import check_device, check_floats, check_group_ids, constant


def group_statistics(values: Tensor, group_ids: Tensor, *, ddof: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, standard deviation and count of each row's group, of the group's n finite values x:

        mean = sum x / n,    std = sqrt(sum (x - mean)^2 / (n - ddof))

    - Values that are NaN or infinite stay out of the statistics of their group; their rows get them all the same.
    - Where all of a group's values are equal, its mean is exactly that value and its deviation exactly 0; that of a
      single value is 0 too. A group without a finite value has mean NaN, deviation NaN and count 0.
    - Sums run in float64 or finer, in an order that no thread decides, so results are the same bit for bit.

    Args:
        values: [N] float32, float64, bfloat16 or float16. Gradients do not reach them: what is returned is constant.
        group_ids: [N] integers, of any value and in any order; equal ids make a group.
        ddof: 1 (default) divides squared distances by n - 1, 0 by n.

    Returns:
        (mean, std, count), [N] each: float64 for float64 values, else float32; count int64.

    Raises:
        TypeError, ValueError: naming the argument.

    Paper: the statistics that normalise GRPO's rewards, arXiv 2402.03300.
    """
    check_floats(values, "values")
    if values.dim() != 1:
        raise ValueError(f"values: expected one per row, [N], got {list(values.shape)}; flatten them")
    check_group_ids(group_ids, "group_ids", len(values), "value")
    check_device(group_ids, "group_ids", values, "values")
    if ddof not in (0, 1):
        raise ValueError(f"ddof: expected 0 or 1, got {ddof!r}")
    _native.require_kernels(values, "values", "group_statistics")

    return torch.ops.pykern.group_statistics.default(
        constant(values), group_ids.to(torch.int64).contiguous(), int(ddof)
    )


@torch.library.register_fake("pykern::group_statistics")
def _group_statistics_fake(values, group_ids, ddof):
    return torch.empty_like(values), torch.empty_like(values), torch.empty_like(group_ids)
