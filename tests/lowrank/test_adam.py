"""Adam on whole parameters: the raw op against its definition in float64."""

import pytest
import torch

from pykern.lowrank import ops
from tests.lowrank.problems import LR, RULE, adam_definition
from tests.support import assert_accurate, check_op, poison, threads

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def tensors(size, dtype, device):
    """Parameter, gradient and moments of a step in midcourse."""
    moments = torch.float64 if dtype == torch.float64 else torch.float32
    param, grad = torch.randn(size).to(dtype), torch.randn(size).to(dtype)
    first, second = torch.randn(size).to(dtype).to(moments), torch.rand(size).add(0.5).to(dtype).to(moments)
    return [tensor.to(device) for tensor in (param, grad, first, second)]


def step(lists, counts, rate=LR, grad_scale=None, found_inf=None, **rule) -> None:
    """The op on lists of parameters, gradients and moments, in place."""
    device = counts[0].device
    if not isinstance(rate, torch.Tensor):
        rate = torch.tensor(rate, dtype=torch.float64, device=device)
    amp = (None if value is None else torch.tensor(value, device=device) for value in (grad_scale, found_inf))
    ops.adamw_step(*lists, counts, rate, *amp, **{**RULE, **rule})


def hold(param, grad, first, second, grad_scale=None, **changes) -> None:
    """Steps the tensors in place and holds them to the error of PyTorch's own computation in the same dtype."""
    before = [tensor.cpu().clone() for tensor in (param, grad, first, second)]
    scale = 1.0 if grad_scale is None else grad_scale
    exact = adam_definition(before, 4, grad_scale=scale, **changes)
    own = adam_definition(before, 4, dtype=param.dtype, grad_scale=scale, **changes)
    count = torch.tensor(3.0, device=param.device)
    step([[param], [grad], [first], [second]], [count], grad_scale=grad_scale, **changes)
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
        {"grad_scale": 0.375},
        {"grad_scale": 1024.0, "maximize": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_rule(device, dtype, changes):
    hold(*tensors(300, dtype, device), **changes)


@pytest.mark.parametrize("rate_type", [torch.float32, torch.float64], ids=str)
def test_rate_in_both_types(device, rate_type):
    param, grad, first, second = tensors(50, torch.float64, device)
    expected = adam_definition((param, grad, first, second), 8, lr=0.25)
    count = torch.full((1,), 7.0, device=device)
    rate = torch.full((1,), 0.25, dtype=rate_type, device=device)
    step([[param], [grad], [first], [second]], [count], rate)
    torch.testing.assert_close(param.cpu(), expected[0], rtol=1e-13, atol=1e-13)
    assert count.item() == 8 and rate.item() == 0.25


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_list_is_stepped_as_its_tensors_alone(device, dtype):
    sizes = [5, 0, 40000, 1, 16384, 17000, 33]
    each = [tensors(size, dtype, device) for size in sizes]
    counts = [torch.tensor(float(i), device=device) for i in range(len(sizes))]
    results = []
    for count in (1, 3):
        together = [[tensor.clone() for tensor in column] for column in zip(*each, strict=True)]
        with threads(count):
            step(together, [count.clone() for count in counts])
        results.append(together)
    for i, (param, grad, first, second) in enumerate(each):
        step([[param], [grad], [first], [second]], [counts[i]])
        assert counts[i].item() == i + 1
        for together in results:
            for place, tensor in ((0, param), (2, first), (3, second)):
                assert torch.equal(together[place][i], tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_found_inf_changes_nothing(device, dtype):
    before = tensors(100, dtype, device)
    before[1][3] = float("inf")
    after = [tensor.clone() for tensor in before]
    count = torch.zeros((), device=device)
    step([[tensor] for tensor in after], [count], grad_scale=2.0, found_inf=1.0)
    assert count.item() == 0
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    step([[tensor] for tensor in after], [count], found_inf=0.0)
    assert count.item() == 1 and not torch.equal(before[0], after[0])


def test_dense_strides(device):
    param, grad, first, second = (tensor.view(30, 20).t() for tensor in tensors(600, torch.bfloat16, device))
    hold(param, grad, first, second)


def test_nan_and_infinity_stay_where_they_are(device):
    param, grad, first, second = tensors(100, torch.float32, device)
    clean = [tensor.clone() for tensor in (param, grad, first, second)]
    step([[tensor] for tensor in clean], [torch.zeros((), device=device)])
    grad[5], grad[70] = float("nan"), float("inf")
    step([[param], [grad], [first], [second]], [torch.zeros((), device=device)])
    hit = torch.zeros(100, dtype=torch.bool, device=device)
    hit[5] = hit[70] = True
    assert param[hit].isnan().all() and torch.equal(param[~hit], clean[0][~hit])


def test_no_elements_still_count_the_step(device):
    count = torch.zeros((), device=device)
    step([[torch.empty(0, 3, device=device)] for _ in range(4)], [count])
    assert count.item() == 1


def test_no_tensors(device):
    ops.adamw_step([], [], [], [], [], torch.tensor(LR, device=device), None, None, **RULE)


def arguments_of(device) -> list:
    lists = [[torch.randn(9)], [torch.randn(9)], [torch.randn(9)], [torch.rand(9)], [torch.zeros(())]]
    rest = [torch.tensor(LR), torch.tensor(2.0), torch.tensor(0.0)]
    return [*([tensor.to(device) for tensor in one] for one in lists), *(tensor.to(device) for tensor in rest)]


def test_opcheck(device):
    check_op(ops.adamw_step, tuple(arguments_of(device)), RULE)


@pytest.mark.parametrize(
    "index, value, message",
    [
        (1, [torch.zeros(8)], r"grad\[0\]: expected size 9"),
        (1, [torch.zeros(9, dtype=torch.bfloat16)], r"grad\[0\]: expected [a-z0-9]+, got [a-z0-9]+"),
        (1, [], "grad: expected 1 tensors, got 0"),
        (2, None, r"exp_avg\[0\]: expected the strides of param"),
        (3, [torch.zeros(9, dtype=torch.float64)], r"exp_avg_sq\[0\]: expected [a-z0-9]+, got [a-z0-9]+"),
        (4, [torch.zeros(2)], r"step\[0\]: expected one element"),
        (4, [torch.zeros((), dtype=torch.float64)], r"step\[0\]: expected [a-z0-9]+, got [a-z0-9]+"),
        (5, torch.zeros((), dtype=torch.bfloat16), "lr: expected [a-z0-9]+, got [a-z0-9]+"),
        (6, torch.zeros(2), "grad_scale: expected one element"),
        (7, torch.zeros((), dtype=torch.int32), "found_inf: expected [a-z0-9]+, got [a-z0-9]+"),
    ],
)
def test_refusals(device, index, value, message):
    arguments = arguments_of(device)
    if index == 2:
        # Strides survive the way to another device only in a view of a copy.
        arguments[2] = [torch.zeros(18, device=device)[::2]]
    else:
        arguments[index] = [tensor.to(device) for tensor in value] if isinstance(value, list) else value.to(device)
    with pytest.raises(RuntimeError, match=message):
        ops.adamw_step(*arguments, **RULE)
