"""Adam on whole parameters: the raw op against its definition in float64."""

import pytest
import torch

from pykern.lowrank import ops
from pykern.reference import lowrank as reference
from tests.lowrank.problems import LR, RULE
from tests.support import assert_accurate, check_op, poison

PLAIN_RULE = {name: value for name, value in RULE.items() if name not in ("scale", "scaled_residual")}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def tensors(size, dtype, device):
    """Parameter, gradient and moments of a step in midcourse."""
    moments = torch.float64 if dtype == torch.float64 else torch.float32
    param, grad = torch.randn(size).to(dtype), torch.randn(size).to(dtype)
    first, second = torch.randn(size).to(dtype).to(moments), torch.rand(size).add(0.5).to(dtype).to(moments)
    return [tensor.to(device) for tensor in (param, grad, first, second)]


def hold(param, grad, first, second, **changes) -> None:
    """Steps the tensors in place and holds them to the error of PyTorch's own computation in the same dtype."""
    rule = {**PLAIN_RULE, **changes}
    before = [tensor.cpu().clone() for tensor in (param, grad, first, second)]
    exact = reference.adam_step(*(tensor.double() for tensor in before), 4, lr=LR, **rule)
    own = reference.adam_step(*(tensor.to(param.dtype) for tensor in before), 4, lr=LR, **rule)
    count = torch.tensor(3.0, device=param.device)
    ops.adam_step(param, grad, first, second, count, torch.tensor(LR, dtype=torch.float64, device=param.device), **rule)
    assert count.item() == 4
    assert_accurate(param, exact[0], own[0])
    assert_accurate(first, exact[1], own[1].to(first.dtype))
    assert_accurate(second, exact[2], own[2].to(second.dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 15, 1000, 40000])
def test_on_every_instruction_set(dtype, size, cpu_level):
    hold(*tensors(size, dtype, "cpu"))


# Around a pack of sixteen bytes, a block of packs and a block of single elements.
@pytest.mark.parametrize("size", [1, 7, 8, 9, 1023, 1024, 1025, 2047, 2049, 5000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes(device, dtype, size):
    hold(*tensors(size, dtype, device))


@pytest.mark.parametrize("offsets", [(1, 1, 1, 1), (1, 0, 0, 0), (0, 1, 0, 0), (4, 4, 4, 4), (3, 5, 2, 1)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_alignment(device, dtype, offsets):
    size = 2100
    whole = [poison(torch.empty(size + 16, dtype=tensor.dtype, device=device)) for tensor in tensors(1, dtype, device)]
    inside = [tensor[offset : offset + size] for tensor, offset in zip(whole, offsets, strict=True)]
    for view, values in zip(inside, tensors(size, dtype, device), strict=True):
        view.copy_(values)
    hold(*inside)
    for tensor, offset in zip(whole, offsets, strict=True):
        assert tensor[:offset].isnan().all() and tensor[offset + size :].isnan().all()


@pytest.mark.parametrize(
    "changes",
    [
        {"decay_after": True},
        {"corrected_eps": False},
        {"maximize": True},
        {"weight_decay": 0.0, "eps": 1.0},
        {"beta1": 0.0, "beta2": 0.0},
    ],
    ids=str,
)
def test_every_rule(device, changes):
    hold(*tensors(300, torch.float32, device), **changes)


@pytest.mark.parametrize("count_type", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rate_type", [torch.float32, torch.float64], ids=str)
def test_step_and_rate_in_both_types(device, count_type, rate_type):
    param, grad, first, second = tensors(50, torch.float64, device)
    expected = reference.adam_step(*(tensor.cpu() for tensor in (param, grad, first, second)), 8, lr=0.25, **PLAIN_RULE)
    count = torch.full((1,), 7, dtype=count_type, device=device)
    rate = torch.full((1,), 0.25, dtype=rate_type, device=device)
    ops.adam_step(param, grad, first, second, count, rate, **PLAIN_RULE)
    torch.testing.assert_close(param.cpu(), expected[0], rtol=1e-13, atol=1e-13)
    assert count.item() == 8 and rate.item() == 0.25


def test_dense_strides(device):
    param, grad, first, second = (tensor.view(30, 20).t() for tensor in tensors(600, torch.bfloat16, device))
    hold(param, grad, first, second)


def test_nan_and_infinity_stay_where_they_are(device):
    param, grad, first, second = tensors(100, torch.float32, device)
    clean = [tensor.clone() for tensor in (param, grad, first, second)]
    rate = torch.tensor(LR, device=device)
    ops.adam_step(*clean, torch.zeros((), device=device), rate, **PLAIN_RULE)
    grad[5], grad[70] = float("nan"), float("inf")
    ops.adam_step(param, grad, first, second, torch.zeros((), device=device), rate, **PLAIN_RULE)
    hit = torch.zeros(100, dtype=torch.bool, device=device)
    hit[5] = hit[70] = True
    assert param[hit].isnan().all() and torch.equal(param[~hit], clean[0][~hit])


def test_no_elements_still_count_the_step(device):
    count = torch.zeros((), device=device)
    empty = [torch.empty(0, 3, device=device) for _ in range(4)]
    ops.adam_step(*empty, count, torch.tensor(LR, device=device), **PLAIN_RULE)
    assert count.item() == 1


def test_opcheck(device):
    arguments = [torch.randn(9), torch.randn(9), torch.randn(9), torch.rand(9), torch.zeros(()), torch.tensor(LR)]
    check_op(ops.adam_step, tuple(tensor.to(device) for tensor in arguments), PLAIN_RULE)


@pytest.mark.parametrize(
    "index, value, message",
    [
        (1, torch.zeros(8), "grad: expected size 9"),
        (1, torch.zeros(9, dtype=torch.bfloat16), "grad: unexpected dtype"),
        (2, torch.zeros(18)[::2], "exp_avg: expected the strides of param"),
        (3, torch.zeros(9, dtype=torch.float64), "exp_avg_sq: unexpected dtype"),
        (4, torch.zeros(2), "step: expected one element"),
        (5, torch.zeros((), dtype=torch.bfloat16), "lr: unexpected dtype"),
    ],
)
def test_refusals(device, index, value, message):
    arguments = [torch.zeros(9), torch.zeros(9), torch.zeros(9), torch.zeros(9), torch.zeros(()), torch.tensor(LR)]
    arguments[index] = value
    # Strides survive the way to another device only in a view of a copy.
    arguments = [tensor.to(device) for tensor in arguments]
    if index == 2:
        arguments[2] = torch.zeros(18, device=device)[::2]
    with pytest.raises(RuntimeError, match=message):
        ops.adam_step(*arguments, **PLAIN_RULE)
