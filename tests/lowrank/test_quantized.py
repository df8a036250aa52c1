"""Quantisation in groups of 8 and 4 bits: the ops, bases in few bits, and error feedback in few bits."""

import pytest
import torch

from pykern.lowrank.quantized import dequantize_groups, quantize_groups, quantized_zeros
from pykern.reference import lowrank_quantized as reference
from tests.support import check_op, poison, threads

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [(1, 1), (3, 257), (2, 256), (33, 8), (5, 600), (1, 3)]


def make(values: torch.Tensor, bits: int) -> dict[str, torch.Tensor]:
    """Values quantised; what is to be written is poisoned before."""
    made = quantized_zeros(*values.shape, bits, values.device)
    made["codes"].fill_(0xA5)
    poison(made["scale"]), poison(made["zero"])
    quantize_groups([values], [made["codes"]], [made["scale"]], [made["zero"]], None, bits=bits)
    return made


def back(made: dict[str, torch.Tensor], target: torch.Tensor, bits: int, **keywords) -> torch.Tensor:
    lists = ([made["codes"]], [made["scale"]], [made["zero"]])
    dequantize_groups(*lists, [target], None, **{"bits": bits, "adds": False, "maximize": False, **keywords})
    return target


def laid_out(values: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values along the rows, along the columns, or with gaps."""
    if layout == "columns":
        return values.mT.contiguous().mT
    if layout == "gaps":
        wide = poison(values.new_empty(values.shape[0], 2 * values.shape[1] + 3))
        wide[:, 1 : 2 * values.shape[1] + 1 : 2] = values
        return wide[:, 1 : 2 * values.shape[1] + 1 : 2]
    return values.clone()


def unpacked(made: dict[str, torch.Tensor], columns: int, bits: int) -> torch.Tensor:
    codes = made["codes"].cpu()
    return codes if bits == 8 else reference.unpack(codes, columns)


def hold(values: torch.Tensor, made: dict[str, torch.Tensor], bits: int) -> None:
    codes, scale, zero = reference.quantize(values.cpu(), bits)
    torch.testing.assert_close(made["scale"].cpu(), scale, rtol=1e-6, atol=0, equal_nan=True)
    torch.testing.assert_close(made["zero"].cpu(), zero, rtol=0, atol=0, equal_nan=True)
    got = unpacked(made, values.shape[1], bits)
    # Another code than the reference's only where a value is half way, up to rounding.
    spread = scale.double().repeat_interleave(256, dim=1)[:, : values.shape[1]]
    error = (reference.dequantize(got, scale, zero, torch.float64) - values.cpu().float().double()).abs()
    nearest = error <= (0.5 + 1e-4) * spread + 1e-6 * values.cpu().abs().double()
    assert (nearest | spread.isnan()).all()
    assert ((got.int() - codes.int()).abs() <= 1).all()


# --- the ops ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip(device, bits, dtype):
    for rows, columns, layout in (
        (1, 1, "rows"), (3, 257, "gaps"), (2, 256, "rows"), (5, 264, "rows"), (3, 519, "rows"), (34, 8, "columns"),
        (9, 301, "columns"),
    ):  # fmt: skip
        values = torch.randn(rows, columns).to(dtype).to(device)
        source = laid_out(values, layout)
        made = make(source, bits)
        hold(values, made, bits)
        target = laid_out(torch.zeros_like(values), layout)
        back(made, target, bits)
        codes = unpacked(made, columns, bits)
        exact = reference.dequantize(codes, made["scale"].cpu(), made["zero"].cpu(), torch.float64)
        bound = {torch.float64: 1e-6, torch.float32: 1e-6}.get(dtype, torch.finfo(dtype).eps)
        torch.testing.assert_close(target.double().cpu(), exact, rtol=bound, atol=bound * 5)
        if layout == "gaps":
            assert source._base.isnan().sum() == source._base.numel() - source.numel()
            assert target._base.isnan().sum() == target._base.numel() - target.numel()


def test_packing(device):
    """Code k of a row is k mod 16: two to a byte, the even column low, half a byte at an odd end."""
    values = (torch.arange(275, device=device) % 16).float().repeat(2, 1)
    made = make(values, 4)
    packed = made["codes"].cpu()
    assert packed.shape == (2, 138) and torch.equal(packed, reference.pack((values.cpu() % 16).to(torch.uint8)))
    assert packed[0, :3].tolist() == [0x10, 0x32, 0x54] and packed[0, -1] == 274 % 16
    assert torch.equal(back(made, torch.empty_like(values), 4), values)


@pytest.mark.parametrize("bits", [8, 4])
def test_levels_of_a_group_off_zero(device, bits):
    """A group that does not straddle zero keeps all its levels: a zero that is a code would clip or coarsen it."""
    values = torch.linspace(5, 6, 256, device=device).repeat(2, 1)
    error = (back(make(values, bits), torch.empty_like(values), bits) - values).abs().max()
    assert error <= 0.5001 / (2**bits - 1)


@pytest.mark.parametrize("bits", [8, 4])
def test_equal_values_are_exact(device, bits):
    for value in (0.0, 0.3, -7.0, 1e-40, 3e38):
        values = torch.full((3, 300), value, device=device)
        made = make(values, bits)
        assert made["codes"].count_nonzero() == 0 and made["scale"].count_nonzero() == 0
        assert torch.equal(back(made, torch.empty_like(values), bits), values)


@pytest.mark.parametrize("bits", [8, 4])
def test_what_is_not_finite_stays_in_its_group(device, bits):
    for bad in (float("nan"), float("inf"), -float("inf")):
        for layout in ("rows", "columns"):
            values = torch.randn(2, 520, device=device)
            values[1, 258] = bad
            target = back(make(laid_out(values, layout), bits), torch.empty_like(values), bits)
            assert target[1, 256:512].isnan().all() and target.isnan().sum() == 256
    # A range beyond float32 is not finite either.
    values = torch.tensor([[-3e38, 3e38, 0.0]], device=device)
    assert back(make(values, bits), torch.empty_like(values), bits).isnan().all()


def test_addition_to_a_gradient(device):
    """target = target / grad_scale + values, or -target / grad_scale + values."""
    for dtype in DTYPES:
        for layout in ("rows", "columns"):
            values, grad = (torch.randn(5, 264).to(dtype).to(device) for _ in range(2))
            made = make(values, 8)
            plain = back(made, torch.empty_like(values), 8).double()
            for maximize, scale in ((False, None), (True, 8.0)):
                target = laid_out(grad, layout)
                lists = ([made["codes"]], [made["scale"]], [made["zero"]], [target])
                number = None if scale is None else torch.full((), scale, device=device)
                dequantize_groups(*lists, number, bits=8, adds=True, maximize=maximize)
                expected = plain + (-1 if maximize else 1) * grad.double() / (scale or 1)
                bound = 4 * max(torch.finfo(dtype).eps, 1e-8)
                torch.testing.assert_close(target.double(), expected, rtol=bound, atol=bound)


def test_found_inf_keeps_what_is_stored(device):
    made = make(torch.randn(3, 300, device=device), 4)
    kept = {name: value.clone() for name, value in made.items()}
    lists = ([made["codes"]], [made["scale"]], [made["zero"]])
    quantize_groups([torch.randn(3, 300, device=device)], *lists, torch.ones((), device=device), bits=4)
    assert all(torch.equal(made[name], kept[name]) for name in made)
    quantize_groups([torch.randn(3, 300, device=device)], *lists, torch.zeros((), device=device), bits=4)
    assert not torch.equal(made["codes"], kept["codes"])


def test_lists_of_all_shapes_and_none(device):
    """One call for many: each as if alone; matrices without elements among them."""
    values = [torch.randn(*shape, device=device) for shape in [*SHAPES, (0, 5), (4, 0)]]
    values += [torch.randn(300, 20, device=device).mT]
    made = [quantized_zeros(*matrix.shape, 4, matrix.device) for matrix in values]
    lists = [[one[name] for one in made] for name in ("codes", "scale", "zero")]
    quantize_groups(values, *lists, None, bits=4)
    targets = [torch.empty_like(matrix) for matrix in values]
    dequantize_groups(*lists, targets, None, bits=4, adds=False, maximize=False)
    for matrix, one, target in zip(values, made, targets, strict=True):
        alone = make(matrix, 4)
        assert all(torch.equal(one[name], alone[name]) for name in one)
        assert torch.equal(target, back(alone, torch.empty_like(matrix), 4))


def test_levels_and_threads_agree(cpu_level):
    values = torch.randn(70, 777)
    made = make(values, 8)
    hold(values, made, 8)
    for count in (1, 3):
        with threads(count):
            again = make(values, 8)
        assert all(torch.equal(made[name], again[name]) for name in made)


@pytest.mark.parametrize("bits", [8, 4])
def test_ops_are_well_formed(bits):
    values = torch.randn(3, 300)
    made = make(values, bits)
    lists = tuple([made[name]] for name in ("codes", "scale", "zero"))
    check_op(torch.ops.pykern.quantize_groups.default, ([values], *lists, None), {"bits": bits})
    check_op(
        torch.ops.pykern.dequantize_groups.default,
        (*lists, [torch.empty(3, 300)], torch.ones(())),
        {"bits": bits, "adds": True, "maximize": True},
    )


def test_refused_arguments(device):
    values = torch.randn(3, 300, device=device)
    made = quantized_zeros(3, 300, 8, values.device)
    lists = [[made[name]] for name in ("codes", "scale", "zero")]

    def refused(message, values=values, bits=8, **changed):
        given = {"codes": lists[0], "scale": lists[1], "zero": lists[2], **changed}
        with pytest.raises(RuntimeError, match=message):
            quantize_groups([values], *given.values(), None, bits=bits)

    refused("bits: expected 8 or 4, got 3", bits=3)
    refused("values.0.: expected 2 dimensions, got 1", values=values[0])
    refused("values.0.: expected float32", values=values.int())
    refused(r"codes.0.: expected size 150 in dimension 1, got 300", bits=4)
    refused(r"scale.0.: expected size 2 in dimension 1, got 1", scale=[made["scale"][:, :1]])
    refused("zero.0.: unexpected dtype", zero=[made["zero"].double()])
    refused("codes: expected 1 tensors, got 0", codes=[])
    refused("codes.0.: expected a contiguous tensor", codes=[made["codes"].mT.contiguous().mT])
