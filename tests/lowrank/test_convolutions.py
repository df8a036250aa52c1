"""Weights of more than two axes: stepped as matrices [out, in * ...], whatever their memory format."""

import pytest
import torch

import pykern

SHAPES = {3: (6, 4, 5), 4: (6, 3, 3, 3), 5: (5, 2, 3, 2, 2)}


def steps(param, count, **options):
    optimizer = pykern.LowRankOptimizer([param], 0.01, rank=3, refresh_every=2, weight_decay=0.1, **options)
    for step in range(count):
        grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(step))
        # The gradient of a channels-last weight is channels-last too.
        param.grad = torch.empty_like(param).copy_(grad)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("residual", ["none", "fira", "apollo_channel", "error_feedback"])
@pytest.mark.parametrize("axes", SHAPES)
def test_as_the_flattened_matrix(axes, residual):
    shape = SHAPES[axes]
    start = torch.randn(shape, generator=torch.Generator().manual_seed(9))
    weight, matrix = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.reshape(shape[0], -1).clone())
    steps(weight, 5, residual=residual)
    optimizer = pykern.LowRankOptimizer([matrix], 0.01, rank=3, refresh_every=2, weight_decay=0.1, residual=residual)
    for step in range(5):
        grad = torch.randn(shape, generator=torch.Generator().manual_seed(step))
        matrix.grad = grad.reshape(shape[0], -1)
        optimizer.step()
    assert torch.equal(weight.reshape(shape[0], -1), matrix)


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "gapped"])
@pytest.mark.parametrize("residual", ["none", "fira", "error_feedback"])
def test_memory_formats(layout, residual):
    start = torch.randn(SHAPES[4], generator=torch.Generator().manual_seed(9))
    plain = torch.nn.Parameter(start.clone())
    if layout == "channels_last":
        strided = start.clone().to(memory_format=torch.channels_last)
    elif layout == "transposed":
        strided = start.transpose(0, 3).contiguous().transpose(0, 3)
    else:
        strided = torch.zeros(6, 3, 3, 6)[..., ::2].copy_(start)
    param = torch.nn.Parameter(strided)
    assert not param.is_contiguous()
    place = param.data_ptr()
    steps(plain, 5, residual=residual)
    optimizer = steps(param, 5, residual=residual)
    assert param.data_ptr() == place and param.stride() == strided.stride()
    torch.testing.assert_close(param, plain, rtol=1e-6, atol=1e-6)
    assert optimizer.state[param]["projector"].shape == (6, 3)
