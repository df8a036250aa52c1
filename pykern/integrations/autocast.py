"""What torch.autocast makes of the tensors of a product, for ops that it does not know."""

import torch
from torch import Tensor


def under_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the type in which nn.Linear would multiply them: where autocast is on in its type, except for
    float64, else in their own."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(tensor if tensor.dtype == torch.float64 else tensor.to(dtype) for tensor in tensors)
