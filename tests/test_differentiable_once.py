"""Where a second derivative does not exist, autograd says so: without that it would be silently zero.

It still is where the gradient of the output is a constant, as in f(x).sum(): torch looks at that gradient alone.
"""

import pytest
import torch

import pykern


def attention(x):
    q = x.view(5, 2, 8)
    return pykern.prefix_attention(q, q, q, pykern.PrefixTree.from_groups([2], [[1, 2]]))


TARGETS = torch.tensor([0, 3, 1, 2, 3])
WEIGHT = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
ROWS = torch.tensor([4, 0, 0])

FUNCTIONS = {
    "prefix_attention": attention,
    "gather_rows": lambda x: pykern.gather_rows(x, ROWS),
    "token_logprobs": lambda x: pykern.token_logprobs(x, TARGETS),
    "linear_token_logprobs": lambda x: pykern.linear_token_logprobs(x, WEIGHT, TARGETS),
    "rms_norm": pykern.rms_norm,
    "layer_norm": pykern.layer_norm,
    "gelu": pykern.gelu,
    "swiglu": lambda x: pykern.swiglu(x, x),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_second_derivative_is_refused(name):
    x = torch.randn(5, 16, requires_grad=True)
    (gradient,) = torch.autograd.grad(FUNCTIONS[name](x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
