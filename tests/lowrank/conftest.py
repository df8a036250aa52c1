"""What differs between the devices of the low-rank steps."""

import pytest
import torch


@pytest.fixture
def norm_error(request, device):
    """The relative error that a residual's norm may have in each dtype.

    On CUDA the low-rank gradient is the result of a matrix product in the weight's dtype, so it is rounded to that.
    """
    if request.node.callspec.params["device"] == "cpu":
        return dict.fromkeys((torch.float32, torch.float64, torch.bfloat16, torch.float16), 1e-5)
    return {torch.float32: 1e-5, torch.float64: 1e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}
