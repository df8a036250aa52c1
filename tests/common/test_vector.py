"""csrc/common/vector.h: conversions, exp, partial loads and stores, reductions, on every level."""

import pytest
import torch

from .calls import TYPES, integer, pointer

HALVES = [torch.bfloat16, torch.float16]


def all_halves(dtype):
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def same(actual, expected):
    """Equal bit for bit, where any NaN is as good as another."""
    assert torch.equal(actual.isnan(), expected.isnan())
    bits = {2: torch.int16, 4: torch.int32}[actual.element_size()]
    number = ~expected.isnan()
    assert torch.equal(actual[number].view(bits), expected[number].view(bits))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_widening_is_exact_for_every_value(floor, dtype):
    values = all_halves(dtype)
    vector, scalar = torch.empty(2, values.numel())
    floor.widen_type(TYPES[dtype], pointer(values), pointer(vector), pointer(scalar), integer(values.numel()))
    same(vector, values.float())
    same(scalar, values.float())


def hard_to_round(dtype):
    """Every value of dtype, the middle to its upper neighbour, and the float32 beside each of them."""
    exact = all_halves(dtype).float()
    exact = exact[exact.isfinite()].sort().values
    points = torch.cat([exact, (exact[1:] + exact[:-1]) / 2, torch.tensor([65519.9, 65520.0, 3.39e38, 3.4e38, 1e-45])])
    points = torch.cat([points, torch.tensor([float("inf"), float("-inf"), float("nan"), -0.0]), -points])
    infinity = torch.tensor(float("inf"))
    return torch.cat([points, points.nextafter(infinity), points.nextafter(-infinity), torch.randn(1000)])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_narrowing_rounds_as_torch_does(floor, dtype):
    values = hard_to_round(dtype)
    values = values[: values.numel() // 16 * 16].contiguous()
    vector, scalar = torch.empty(2, values.numel(), dtype=dtype)
    floor.narrow_type(TYPES[dtype], pointer(values), pointer(vector), pointer(scalar), integer(values.numel()))
    same(vector, values.to(dtype))
    same(scalar, values.to(dtype))


def exp(floor, values):
    result = torch.full_like(values, float("nan"))
    floor.exp_all(pointer(values), pointer(result), integer(values.numel()))
    return result


def test_exp_is_within_one_and_a_half_units(floor):
    values = torch.cat([torch.linspace(-104, 89, 1 << 20), torch.linspace(-1e-3, 1e-3, 1 << 16)])
    exact = values.double().exp()
    got = exp(floor, values)
    finite = exact < torch.finfo(torch.float32).max
    # The distance between neighbours; at least that of the subnormal numbers.
    unit = (torch.frexp(exact).exponent - 24).clamp(min=-149).double().exp2()
    assert (((got.double() - exact) / unit)[finite].abs().max()) <= 1.5
    assert torch.equal(got[~finite], torch.full_like(got[~finite], float("inf")))
    assert (got[exact < 2.0**-150] == 0).all()


def test_exp_of_special_values(floor):
    inf, nan = float("inf"), float("nan")
    values = torch.tensor(
        [0.0, -0.0, inf, -inf, nan, 1e38, -1e38, 1e-45, -1e-45, 88.72283, 88.72284, -87.4, -103.9, -104.1, 1.0, -nan]
    )
    same(
        exp(floor, values)[[0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 13, 15]],
        values.exp()[[0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 13, 15]],
    )


def test_exp_never_falls(floor):
    values = torch.linspace(-104, 89, 1 << 20)
    got = exp(floor, values)
    assert (got.diff()[got[:-1].isfinite() & (values[:-1] > -87)] >= 0).all()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_partial_touches_only_its_elements(floor, dtype):
    for count in range(floor.lanes()):
        source = torch.arange(1, 33).to(dtype)
        source[count:] = float("nan")
        target = torch.full((32,), -1.0, dtype=dtype)
        floor.partial(TYPES[dtype], pointer(source), pointer(target), integer(count))
        assert torch.equal(target[:count], source[:count])
        assert (target[count:] == -1).all()


def test_partial_load_stops_at_the_end_of_a_page(floor):
    import ctypes
    import mmap

    page = mmap.PAGESIZE
    memory = mmap.mmap(-1, 2 * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(address + page), ctypes.c_size_t(page), 0) == 0
    target = torch.zeros(32)
    for dtype, number in TYPES.items():
        for count in range(floor.lanes()):
            last = address + page - count * dtype.itemsize
            floor.partial(number, ctypes.c_void_p(last), pointer(target), integer(count))
            floor.partial(number, pointer(target), ctypes.c_void_p(last), integer(count))


def test_reductions_over_lanes(floor):
    lanes = floor.lanes()
    values = torch.randperm(lanes).float() - lanes // 2
    result = torch.empty(2)
    floor.reduce(pointer(values), pointer(result), pointer(result[1:]))
    assert result.tolist() == [values.sum().item(), values.max().item()]
