"""Quantisation in groups of 8 and 4 bits: the ops, bases in few bits, and error feedback in few bits."""

import copy

import pytest
import torch

from pykern.lowrank import LowRankOptimizer
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
    # Across memory, in squares and at their edges.
    for rows, columns in ((64, 512), (70, 777)):
        values = torch.randn(rows, columns)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            across = laid_out(values.to(dtype), "columns")
            turned = make(across, 8)
            assert all(torch.equal(turned[name], other) for name, other in make(across.contiguous(), 8).items())
            target, plain = laid_out(torch.zeros_like(across), "columns"), torch.zeros(rows, columns, dtype=dtype)
            assert torch.equal(back(turned, target, 8), back(turned, plain, 8))
            assert torch.equal(back(turned, target, 8, adds=True), back(turned, plain, 8, adds=True))
    values = torch.randn(70, 777)
    made = make(values, 8)
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
    refused("zero.0.: expected [a-z0-9]+, got [a-z0-9]+", zero=[made["zero"].double()])
    refused("codes: expected 1 tensors, got 0", codes=[])
    refused("codes.0.: expected a contiguous tensor", codes=[made["codes"].mT.contiguous().mT])


# --- bases in few bits --------------------------------------------------------------------------------


def state_bytes(state: dict[str, torch.Tensor], name: str) -> int:
    return sum(value.untyped_storage().nbytes() for key, value in state.items() if key.startswith(name))


def gradients(param: torch.nn.Parameter, steps: int):
    """Gradients with a few strong directions, as real ones have."""
    generator = torch.Generator().manual_seed(5)
    rows, columns = param.shape
    strong = torch.randn(rows, 12, generator=generator) @ torch.randn(12, columns, generator=generator)
    for _ in range(steps):
        noise = torch.randn(rows, columns, generator=generator)
        yield (strong + 0.5 * noise).to(param.dtype).to(param.device)


def stepped(device, steps=3, rows=60, columns=270, dtype=torch.float32, **options):
    param = torch.nn.Parameter(torch.zeros(rows, columns, dtype=dtype, device=device))
    optimizer = LowRankOptimizer([param], 0.01, **{"rank": 16, "refresh_every": 2, **options})
    for grad in gradients(param, steps):
        param.grad = grad
        optimizer.step()
    return param, optimizer


@pytest.mark.parametrize("name, bits, most", [("int4", 4, 0.6), ("int8", 8, 1.1)])
@pytest.mark.parametrize("side", ["left", "right"])
def test_basis_in_few_bits(device, name, bits, most, side):
    param, optimizer = stepped(device, projector_format=name, side=side)
    state, n = optimizer.state[param], 60 if side == "left" else 270
    assert sorted(key for key in state if key.startswith("projector")) == [
        "projector_codes", "projector_scale", "projector_zero",
    ]  # fmt: skip
    # A group for each 256 of a vector; the second is short here.
    assert state_bytes(state, "projector") <= most * n * 16 + 8 * 16
    assert state["projector_codes"].shape == (16, n if bits == 8 else n // 2)
    codes = unpacked({"codes": state["projector_codes"]}, n, bits)
    basis = reference.dequantize(codes, state["projector_scale"].cpu(), state["projector_zero"].cpu())
    exact, _ = stepped(device, side=side)
    gram = basis @ basis.mT
    assert (gram - torch.eye(16)).abs().max() < (0.2 if bits == 4 else 0.02)
    # The step is that of the plain basis, up to the rounding of the basis.
    difference = (param - exact).norm() / exact.norm()
    assert 0 < difference < (0.4 if bits == 4 else 0.07)


def test_a_basis_in_few_bits_takes_at_most_as_many(device):
    """Whole groups: 4.25 bits an element."""
    param, optimizer = stepped(device, steps=1, rows=64, columns=512, projector_format="int4", side="right")
    assert state_bytes(optimizer.state[param], "projector") == 16 * (256 + 4 * 4)


def test_fira_takes_the_basis_as_it_is(device):
    """A quantised basis is not orthonormal: the residual's norm is that of the basis which the step uses."""
    param, optimizer = stepped(device, steps=1, residual="fira", projector_format="int4", side="left", scale=1.0)
    state = optimizer.state[param]
    codes = reference.unpack(state["projector_codes"].cpu(), 60)
    basis = reference.dequantize(codes, state["projector_scale"].cpu(), state["projector_zero"].cpu(), torch.float64).mT
    grad = next(gradients(param, 1)).double().cpu()
    low = basis.mT @ grad
    phi = 1 / (low.norm(dim=0) + 1e-8) * 4.0  # |N_j| is the root of the rank: at the first step N is the sign
    norm = ((grad - basis @ low) * phi).norm().item()
    assert state["residual_norm"].item() == pytest.approx(norm, rel=1e-3)


def test_checkpoint_of_few_bits():
    options = {
        "projector_format": "int4",
        "residual": "error_feedback",
        "feedback_dtype": "4bit",
        "state_dtype": "8bit",
    }
    param, optimizer = stepped("cpu", **options)
    other = torch.nn.Parameter(param.detach().clone())
    loaded = LowRankOptimizer([other], 0.01, rank=16, refresh_every=2, **options)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for grad in gradients(param, 2):
        param.grad, other.grad = grad.clone(), grad.clone()
        optimizer.step(), loaded.step()
    assert torch.equal(param, other)
    for name, value in optimizer.state[param].items():
        assert torch.equal(value, loaded.state[other][name]) and value.dtype == loaded.state[other][name].dtype


# --- error feedback in few bits -------------------------------------------------------------------------


@pytest.mark.parametrize("feedback, bits", [("8bit", 8), ("4bit", 4)])
@pytest.mark.parametrize("side", ["left", "right"])
def test_feedback_in_few_bits(device, feedback, bits, side):
    """After a step the buffer is what was missed of gradient and buffer, rounded; .grad is the same, not rounded."""
    options = {"residual": "error_feedback", "side": side, "feedback_dtype": feedback, "refresh_every": 100}
    param, optimizer = stepped(device, steps=1, **options)
    state = optimizer.state[param]
    n, length = (60, 270) if side == "left" else (270, 60)
    assert "error" not in state
    assert state_bytes(state, "error") == length * (n * bits // 8 + 8 * -(-n // 256))

    def buffer():
        codes = unpacked({"codes": state["error_codes"]}, n, bits)
        values = reference.dequantize(codes, state["error_scale"].cpu(), state["error_zero"].cpu())
        return values.mT if side == "left" else values

    basis = state["projector"].cpu()

    def missed(source):
        return source - (basis @ (basis.mT @ source) if side == "left" else source @ basis @ basis.mT)

    expected = missed(next(gradients(param, 1)).cpu())
    torch.testing.assert_close(param.grad.cpu(), expected, rtol=1e-4, atol=1e-4)
    width = (expected.max() - expected.min()) / (2**bits - 1)
    assert (buffer() - expected).abs().max() <= 0.51 * width
    before, grad = buffer(), torch.randn(60, 270)
    param.grad = grad.clone().to(device)
    optimizer.step()
    expected = missed(grad + before)
    torch.testing.assert_close(param.grad.cpu(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("feedback", ["weight", "8bit", "4bit"])
def test_feedback_of_scaled_and_skipped_gradients(feedback):
    """torch.amp's scale is divided out, a skipped step keeps the buffer, and maximize turns the sign."""
    options = {"rank": 4, "residual": "error_feedback", "feedback_dtype": feedback, "refresh_every": 100}
    grads = [torch.randn(20, 300) for _ in range(3)]
    results = []
    for scale, maximize in ((None, False), (1024.0, False), (None, True)):
        param = torch.nn.Parameter(torch.zeros(20, 300))
        optimizer = LowRankOptimizer([param], 0.01, maximize=maximize, **options)
        for grad in grads:
            param.grad = (-grad if maximize else grad) * (scale or 1)
            if scale is not None:
                optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.zeros(())
            optimizer.step()
            if scale is not None:
                param.grad = torch.full((20, 300), float("inf"))
                optimizer.found_inf = torch.ones(())
                optimizer.step()
        results.append((param.detach(), optimizer.state[param]))
    for param, state in results[1:]:
        torch.testing.assert_close(param, results[0][0], rtol=1e-5, atol=1e-7)
        for name, value in state.items():
            if name.startswith("error"):
                torch.testing.assert_close(value.float(), results[0][1][name].float(), rtol=1e-4, atol=1.0)


def least_squares(**options):
    """The loss, relative to that at the start, of a least-squares problem whose gradients have all directions."""
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(64, 256, generator=generator)
    targets = inputs @ torch.randn(256, 32, generator=generator) / 16
    weight, losses = torch.nn.Parameter(torch.zeros(32, 256)), []
    optimizer = LowRankOptimizer([weight], **options)
    for _ in range(80):
        loss = (inputs @ weight.mT - targets).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses[-1] / losses[0]


def test_training_with_feedback_in_few_bits():
    """Gradient descent in 4 of 32 directions: the feedback brings the others, from a buffer in few bits as well."""

    def train(residual, feedback="weight"):
        options = {"lr": 0.05, "rule": "momentum", "momentum": 0.0, "rank": 4, "refresh_every": 1}
        return least_squares(residual=residual, feedback_dtype=feedback, **options)

    plain, exact = train("none"), train("error_feedback")
    assert exact < 0.5 * plain
    for feedback, bound in (("8bit", 0.02), ("4bit", 0.05)):
        assert train("error_feedback", feedback) == pytest.approx(exact, rel=bound)


def test_training_with_a_basis_in_few_bits():
    exact, eight, four = (
        least_squares(lr=0.02, rank=8, refresh_every=20, projector_format=name) for name in ("dense", "int8", "int4")
    )
    assert exact < 0.1
    assert eight == pytest.approx(exact, rel=0.2, abs=0.005) and four == pytest.approx(exact, rel=0.5, abs=0.02)
