"""The inner rules on float32, bfloat16 and 8-bit moments, against their definitions in float64."""

import pytest
import torch

from pykern.lowrank import ops
from pykern.reference import lowrank as reference, lowrank_parts as parts
from tests.support import assert_accurate, check_op, compile_whole, poison, threads

RULE = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-6, "corrected_eps": True}
TWO_MOMENTS = ("adamw", "adabelief")
SIGNED, UNSIGNED = reference.dynamic_map(True), reference.dynamic_map(False)


def scales(rank, length):
    return -(-length // 256)


def advance(low, exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale, step, *, found_inf=None, kind="adamw", **rule):
    """The op on lists; returns directions and the factors on the learning rate."""
    direction = [poison(torch.empty_like(matrix)) for matrix in low]
    factor = poison(torch.empty(len(low), dtype=torch.float64, device=low[0].device))
    two = kind in TWO_MOMENTS
    ops.low_rank_rule(
        low, exp_avg, exp_avg_sq if two else [], exp_avg_scale, exp_avg_sq_scale if two else [], step, direction,
        factor, found_inf, rule=parts.RULES.index(kind), **{**RULE, **rule},
    )  # fmt: skip
    return direction, factor


def advance_one(low, first, second, first_scale, second_scale, step, **rule):
    """`advance` of one matrix, the factor on the learning rate in the direction; scales None: not 8-bit."""
    lists = ([] if tensor is None else [tensor] for tensor in (first, second, first_scale, second_scale))
    direction, factor = advance([low], *lists, [step], **rule)
    return direction[0] * factor.item()


class Quantized:
    """A low-rank gradient and 8-bit moments in midcourse; the energy differs from row to row, and within a row."""

    def __init__(self, rank, length, device="cpu", seed=0):
        generator = torch.Generator().manual_seed(seed)

        def normal():
            return torch.randn(rank, length, generator=generator)

        energy = 10 ** (-3 * torch.rand(rank, 1, generator=generator)) * (0.5 * normal()).exp()
        low, first = normal() * energy, 0.3 * normal() * energy
        second = 0.5 * (normal().square() + 0.1) * energy.square()
        self.low = low.to(device)
        self.first, self.first_scale = (tensor.to(device) for tensor in reference.quantize(first, True))
        self.second, self.second_scale = (tensor.to(device) for tensor in reference.quantize(second, False))

    def moments(self):
        """Both moments as they are stored, in float64."""
        first = reference.dequantize(self.first.cpu(), self.first_scale.cpu(), True, torch.float64)
        return first, reference.dequantize(self.second.cpu(), self.second_scale.cpu(), False, torch.float64)

    def state(self):
        return [self.first, self.second, self.first_scale, self.second_scale]

    def step(self, count=3.0, **rule):
        """Steps in place and returns the direction, times the factor on the learning rate."""
        step = torch.tensor(count, device=self.low.device)
        direction = advance_one(self.low, *self.state(), step, **rule)
        assert step.item() == count + 1
        return direction


def assert_nearest(codes, scale, exact, signed):
    """Every code is the value of the map nearest to the exact moment, up to the rounding of float32."""
    largest = exact.abs().unflatten(1, (-1, 256)) if exact.shape[1] % 256 == 0 else None
    if largest is not None:
        torch.testing.assert_close(scale.double().cpu(), largest.amax(dim=2), rtol=1e-5, atol=0)
    spread = scale.cpu().double().repeat_interleave(256, dim=1)[:, : exact.shape[1]]
    stored = reference.dequantize(codes.cpu(), scale.cpu(), signed, torch.float64)
    table = (SIGNED if signed else UNSIGNED).double()
    place = torch.bucketize(exact / spread, table).clamp(1, 255)
    best = torch.minimum((table[place] * spread - exact).abs(), (table[place - 1] * spread - exact).abs())
    excess = (stored - exact).abs() - best
    assert (excess <= 1e-5 * torch.maximum(exact.abs(), 1e-7 * spread)).all(), excess.max()


def hold(problem: Quantized, kind="adamw", **rule) -> None:
    before = problem.moments()
    rules = {**RULE, **rule, "rule": kind}
    direction, first, second, factor = parts.rule(problem.low.cpu().double(), *before, 4, **rules)
    own = parts.rule(problem.low.cpu(), *(moment.float() for moment in before), 4, **rules)
    codes = problem.second.clone()
    stepped = problem.step(kind=kind, **rule)
    assert stepped.is_contiguous()
    assert_accurate(stepped, direction * factor, own[0] * own[3], units=4.0)
    assert_nearest(problem.first, problem.first_scale, first, True)
    if second is None:
        assert torch.equal(problem.second, codes)
    else:
        assert_nearest(problem.second, problem.second_scale, second, False)


# --- the maps ---------------------------------------------------------------------------------------


def test_maps():
    for table, zero, smallest in ((SIGNED, 127, 5.5e-7), (UNSIGNED, 0, 3.25e-7)):
        assert table.dtype == torch.float32 and table.shape == (256,)
        assert (table[1:] > table[:-1]).all() and table[zero] == 0 and table[255] == 1
        assert table[zero + 1].item() == pytest.approx(smallest)
    assert torch.equal(SIGNED[:127], -SIGNED[128:255].flip(0))
    assert SIGNED[0].item() == pytest.approx(-0.99296875)


def test_every_code_decodes_to_its_value(device):
    """Codes at scale 1; beta 0.5 and a gradient of zero leave half of each value in the moments."""
    codes = torch.arange(256, dtype=torch.uint8, device=device).unsqueeze(0)
    ones = torch.ones(1, 1, device=device)
    state = [codes.clone(), torch.full_like(codes, 255), ones.clone(), ones.clone()]
    rule = {**RULE, "beta1": 0.5, "beta2": 0.5, "eps": 0.0, "corrected_eps": False}
    direction = advance_one(torch.zeros(1, 256, device=device), *state, torch.full((), 1e4, device=device), **rule)
    torch.testing.assert_close(direction[0].cpu(), SIGNED * 0.5**0.5, rtol=1e-6, atol=0)
    assert torch.equal(state[0], codes) and state[2].item() == 0.5
    state = [torch.full_like(codes, 255), codes.clone(), ones.clone(), ones.clone()]
    direction = advance_one(
        torch.zeros(1, 256, device=device), *state, torch.full((), 1e4, device=device), **{**rule, "eps": 1.0}
    )
    torch.testing.assert_close(direction[0].cpu(), 0.5 / ((UNSIGNED * 0.5).sqrt() + 1), rtol=1e-6, atol=0)
    assert torch.equal(state[1], codes) and state[3].item() == 0.5


def test_values_around_every_midpoint_take_the_nearest_code(device):
    """The first moment becomes the gradient itself: beta1 is zero, and one value of 1 makes the scale 1."""
    middle = (SIGNED[1:].double() + SIGNED[:-1]) / 2
    below, above = middle - middle.abs() * 1e-5, middle + middle.abs() * 1e-5
    low = torch.stack([torch.cat([side, torch.ones(1)]).float() for side in (below, above)]).to(device)
    state = [torch.zeros(2, 256, dtype=torch.uint8, device=device) for _ in range(2)]
    state += [torch.zeros(2, 1, device=device) for _ in range(2)]
    advance_one(low, *state, torch.zeros((), device=device), beta1=0.0)
    assert torch.equal(state[0][0, :255].cpu(), torch.arange(255, dtype=torch.uint8))
    assert torch.equal(state[0][1, :255].cpu(), torch.arange(1, 256, dtype=torch.uint8))


def test_reference_round_trip():
    values = torch.randn(5, 700, dtype=torch.float64)
    codes, scale = reference.quantize(values, True)
    assert codes.shape == (5, 700) and scale.shape == (5, 3)
    back = reference.dequantize(codes, scale, True, torch.float64)
    assert (back - values).norm() / values.norm() < 0.02
    codes, scale = reference.quantize(values.square(), False)
    back = reference.dequantize(codes, scale, False, torch.float64)
    assert (back - values.square()).norm() / values.square().norm() < 0.01


# --- 8 bits -----------------------------------------------------------------------------------------


# Around a lane's eight values, a block of 256, and more blocks than stay resident on the emulator.
@pytest.mark.parametrize(
    "shape", [(1, 1), (3, 7), (2, 8), (4, 255), (4, 256), (3, 257), (2, 264), (5, 1000), (7, 1024), (70, 300)], ids=str
)
@pytest.mark.parametrize("kind", parts.RULES)
def test_8bit_matches_the_definition(device, shape, kind):
    hold(Quantized(*shape, device), kind)


@pytest.mark.parametrize("kind", parts.RULES)
def test_8bit_on_every_instruction_set(cpu_level, kind):
    hold(Quantized(9, 600), kind)


@pytest.mark.parametrize("rule", [{"corrected_eps": False}, {"beta1": 0.0, "eps": 1.0}, {"eps": 0.1}], ids=str)
@pytest.mark.parametrize("kind", TWO_MOMENTS)
def test_8bit_every_constant(device, kind, rule):
    hold(Quantized(3, 520, device), kind, **rule)


def test_8bit_from_a_fresh_state_of_zeros(device):
    problem = Quantized(3, 300, device=device)
    for tensor in problem.state():
        tensor.zero_()
    direction = problem.step(0.0)
    zeros = torch.zeros(3, 300, dtype=torch.float64)
    exact = parts.rule(problem.low.cpu().double(), zeros, zeros, 1, rule="adamw", **RULE)
    assert_accurate(direction, exact[0], units=4.0)
    assert_nearest(problem.first, problem.first_scale, exact[1], True)


def test_8bit_zero_and_tiny_blocks(device):
    """A block of zeros, and one whose scale has no finite reciprocal, are stored as zero and stay finite."""
    problem = Quantized(2, 512, device=device)
    for tensor in (problem.low, problem.first_scale, problem.second_scale):
        tensor.zero_()
    problem.low[1, 256:] = 1e-38
    direction = problem.step()
    assert direction.isfinite().all() and not direction[0].any()
    assert not problem.first_scale.any() and not problem.second_scale.any()
    assert (problem.first == 127).all() and (problem.second == 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_8bit_non_finite_values_reach_their_block_and_no_other(device, bad):
    problem, clean = Quantized(2, 600, device=device), Quantized(2, 600, device=device)
    problem.low[1, 300] = bad
    direction, expected = problem.step(), clean.step()
    hit = torch.zeros(2, 600, dtype=torch.bool)
    hit[1, 300] = True
    assert torch.equal(direction.isnan().cpu(), hit)
    assert torch.equal(direction.cpu()[~hit], expected.cpu()[~hit])
    block = torch.zeros(2, 600, dtype=torch.bool)
    block[1, 256:512] = True
    first, second = problem.moments()
    assert torch.equal(first.isnan(), block) and torch.equal(second.isnan(), block)
    for ours, theirs in ((problem.first, clean.first), (problem.second, clean.second)):
        assert torch.equal(ours.cpu()[~block], theirs.cpu()[~block])


def test_8bit_repeats_bit_for_bit(device):
    problems = [Quantized(20, 1000, device) for _ in range(2)]
    directions = [problem.step() for problem in problems]
    assert torch.equal(*directions)
    for a, b in zip(problems[0].state(), problems[1].state(), strict=True):
        assert torch.equal(a, b)


def test_8bit_bit_equal_for_any_number_of_threads():
    results = []
    for count in (1, 2, 3):
        with threads(count):
            problem = Quantized(20, 1000)
            results.append([problem.step(), *problem.state()])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("offset", [0, 1, 8])
def test_8bit_any_alignment(device, offset):
    """Codes and gradient in the middle of other memory, which stays as it is."""
    problem, expected = (Quantized(3, 512, device) for _ in range(2))
    size = problem.low.numel()
    low = poison(torch.empty(size + 32, device=device))
    codes = [torch.full((size + 32,), 77, dtype=torch.uint8, device=device) for _ in range(2)]
    low[offset : offset + size] = problem.low.flatten()
    for whole, part in zip(codes, (problem.first, problem.second), strict=True):
        whole[offset : offset + size] = part.flatten()
    problem.low = low[offset : offset + size].view(3, 512)
    problem.first, problem.second = (whole[offset : offset + size].view(3, 512) for whole in codes)
    assert torch.equal(problem.step(), expected.step())
    for a, b in zip(problem.state(), expected.state(), strict=True):
        assert torch.equal(a, b)
    for whole in codes:
        assert (whole[:offset] == 77).all() and (whole[offset + size :] == 77).all()


def test_8bit_training_follows_float32():
    """Two hundred steps on one quadratic: the 8-bit run lands where the float32 run does."""
    target = torch.randn(4, 512)
    ends = []
    for quantized in (False, True):
        weights, step = torch.zeros(4, 512), torch.zeros(())
        dtype = torch.uint8 if quantized else torch.float32
        state = [torch.zeros(4, 512, dtype=dtype), torch.zeros(4, 512, dtype=dtype)]
        state += [torch.zeros(4, 2), torch.zeros(4, 2)] if quantized else [None, None]
        for _ in range(200):
            weights -= 0.05 * advance_one(weights - target, *state, step)
        ends.append((weights - target).square().mean().item())
    assert ends[0] < 0.01 and ends[1] < 0.01


# --- float32, float64 and bfloat16 ------------------------------------------------------------------

SHAPES = [(1, 1), (3, 5), (40, 70), (9, 2000)]


class Floats:
    """Lists of low-rank gradients, float moments in midcourse, and counts that differ from matrix to matrix."""

    def __init__(self, stored, low=torch.float32, device="cpu", shapes=SHAPES):
        self.low = [torch.randn(shape).to(low).to(device) for shape in shapes]
        self.first = [torch.randn(shape).to(stored).to(device) for shape in shapes]
        self.second = [torch.rand(shape).add(0.5).to(stored).to(device) for shape in shapes]
        self.step = [torch.tensor(3.0 + i, device=device) for i in range(len(shapes))]

    def advance(self, **rule):
        return advance(self.low, self.first, self.second, [], [], self.step, **rule)


@pytest.mark.parametrize("kind", parts.RULES)
@pytest.mark.parametrize(
    "low, stored", [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.float64, torch.float64)]
)
@pytest.mark.parametrize("corrected", [True, False], ids=["corrected", "folded"])
def test_matches_the_definition(device, kind, low, stored, corrected):
    problem = Floats(stored, low, device)
    before = [[tensor.cpu().clone() for tensor in tensors] for tensors in (problem.low, problem.first, problem.second)]
    rules = {**RULE, "corrected_eps": corrected}
    direction, factor = problem.advance(kind=kind, **rules)
    for i, tensors in enumerate(zip(*before, strict=True)):
        exact, own = (
            parts.rule(*(tensor.to(dtype) for tensor in tensors), 4 + i, rule=kind, **rules)
            for dtype in (torch.float64, low)
        )
        assert problem.step[i].item() == 4 + i
        assert factor[i].item() == pytest.approx(exact[3], rel=1e-12)
        assert_accurate(direction[i], exact[0], own[0], units=2.0)
        assert_accurate(problem.first[i], exact[1], own[1], units=4.0)
        if exact[2] is None:
            assert torch.equal(problem.second[i].cpu(), before[2][i])
        else:
            assert_accurate(problem.second[i], exact[2], own[2], units=4.0)


@pytest.mark.parametrize("kind", parts.RULES)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
def test_on_every_instruction_set(cpu_level, kind, stored):
    problem = Floats(stored)
    before = [[tensor.double() for tensor in tensors] for tensors in (problem.low, problem.first, problem.second)]
    direction, _ = problem.advance(kind=kind)
    for i, tensors in enumerate(zip(*before, strict=True)):
        exact = parts.rule(*tensors, 4 + i, rule=kind, **RULE)
        assert_accurate(direction[i], exact[0], units=8.0)
        assert_accurate(problem.first[i], exact[1], units=4.0)


def test_sign_of_nothing_is_zero_and_of_nan_nan(device):
    low, moment = torch.tensor([[0.0, -0.0, float("nan"), 2.0, -3.0]], device=device), torch.zeros(1, 5, device=device)
    direction = advance_one(low, moment, None, None, None, torch.zeros((), device=device), kind="lion")
    torch.testing.assert_close(direction.cpu(), torch.tensor([[0.0, 0.0, float("nan"), 1.0, -1.0]]), equal_nan=True)


def test_bfloat16_second_moments_do_not_decay(device):
    """The hazard that the option's description names: 0.999 v rounds back to v."""
    first, second = (torch.ones(1, 64, device=device, dtype=torch.bfloat16) for _ in range(2))
    low, step = torch.zeros(1, 64, device=device), torch.zeros((), device=device)
    for _ in range(20):
        advance_one(low, first, second, None, None, step, beta2=0.999)
    assert (second == 1).all() and (first < 0.2).all()


@pytest.mark.parametrize("kind", parts.RULES)
@pytest.mark.parametrize("eight_bit", [False, True], ids=["float", "8bit"])
def test_found_inf_changes_nothing(device, kind, eight_bit):
    problem = Quantized(3, 300, device)
    state = problem.state() if eight_bit else [*Floats(torch.float32, device=device, shapes=[(3, 300)]).first] * 2
    if not eight_bit:
        state = [state[0], state[1].clone(), None, None]
    before = [None if tensor is None else tensor.clone() for tensor in state]
    problem.low.fill_(float("inf"))
    step = torch.tensor(3.0, device=device)
    direction = advance_one(problem.low, *state, step, kind=kind, found_inf=torch.ones((), device=device))
    assert step.item() == 3 and not direction.any()
    assert all(a is None or torch.equal(a, b) for a, b in zip(before, state, strict=True))
    moved = advance_one(problem.low, *state, step, kind=kind, found_inf=torch.zeros((), device=device))
    assert step.item() == 4 and moved.any()


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)], ids=str)
@pytest.mark.parametrize("quantized", [False, True], ids=["float", "8bit"])
def test_empty(device, shape, quantized):
    dtype = torch.uint8 if quantized else torch.float32
    state = [torch.empty(shape, dtype=dtype, device=device) for _ in range(2)]
    count = scales(*shape)
    state += [torch.empty(shape[0], count, device=device) if quantized else None for _ in range(2)]
    step = torch.zeros((), device=device)
    assert advance_one(torch.empty(shape, device=device), *state, step).shape == shape
    assert step.item() == 1


def test_empty_lists(device):
    ops.low_rank_rule(
        [], [], [], [], [], [], [], torch.empty(0, dtype=torch.float64, device=device), None, rule=0, **RULE
    )


# --- the op -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantized", [False, True], ids=["float", "8bit"])
def test_opcheck(device, quantized):
    problem = Quantized(3, 40, device)
    lists = [[tensor] for tensor in problem.state()]
    if not quantized:
        lists = [[torch.zeros(3, 40, device=device)], [torch.zeros(3, 40, device=device)], [], []]
    step, factor = torch.zeros((), device=device), torch.empty(1, dtype=torch.float64, device=device)
    direction = [torch.empty(3, 40, device=device)]
    check_op(ops.low_rank_rule, ([problem.low], *lists, [step], direction, factor, None), {"rule": 0, **RULE})


def test_compiles_whole(device):
    problem, expected = (Quantized(3, 300, device) for _ in range(2))
    step = torch.tensor(3.0, device=device)

    def phase(*tensors):
        return advance([tensors[0]], *([tensor] for tensor in tensors[1:]))[0][0] * 1

    direction = compile_whole(phase)(problem.low, *problem.state(), step)
    assert torch.equal(direction, expected.step())
    assert torch.equal(problem.first, expected.first) and step.item() == 4


@pytest.mark.parametrize(
    "changes, message",
    [
        ({0: torch.zeros(3, 300, dtype=torch.float64)}, r"low\[0\]: expected float32 with 8-bit moments"),
        ({0: torch.zeros(3, 300, dtype=torch.bfloat16)}, r"low\[0\]: expected float32 or float64"),
        ({0: torch.zeros(300)}, r"low\[0\]: expected 2 dimensions"),
        ({0: torch.zeros(300, 3).T}, r"low\[0\]: expected a contiguous tensor"),
        ({1: torch.zeros(3, 300)}, r"exp_avg\[0\]: expected [a-z0-9]+, got [a-z0-9]+"),
        ({2: torch.zeros(3, 299, dtype=torch.uint8)}, r"exp_avg_sq\[0\]: expected size 300"),
        ({3: torch.zeros(3, 1)}, r"exp_avg_scale\[0\]: expected size 2 in dimension 1"),
        ({4: torch.zeros(3, 2, dtype=torch.float64)}, r"exp_avg_sq_scale\[0\]: expected [a-z0-9]+, got [a-z0-9]+"),
        ({4: None}, "exp_avg_sq_scale: expected 1 tensors, got 0"),
        ({3: None, 4: None}, r"exp_avg\[0\]: expected [a-z0-9]+, got [a-z0-9]+"),
        ({2: None}, "exp_avg_sq: expected 1 tensors, got 0"),
        ({5: torch.zeros(3)}, r"step\[0\]: expected one element, got 3"),
        ({5: torch.zeros((), dtype=torch.float64)}, r"step\[0\]: expected [a-z0-9]+, got [a-z0-9]+"),
        ({6: torch.zeros(3, 299)}, r"direction\[0\]: expected size 300"),
        ({7: torch.zeros(2, dtype=torch.float64)}, "step_factor: expected size 1 in dimension 0, got 2"),
        ({7: torch.zeros(1)}, "step_factor: expected [a-z0-9]+, got [a-z0-9]+"),
        ({8: torch.zeros(2)}, "found_inf: expected one element, got 2"),
        ({"rule": 4}, "rule: expected 0"),
        ({"rule": 2}, "exp_avg_sq: expected 0 tensors, got 1"),
    ],
)
def test_refusals(device, changes, message):
    problem = Quantized(3, 300, device)
    given = [problem.low, *problem.state(), torch.zeros(()), torch.empty(3, 300), torch.empty(1, dtype=torch.float64)]
    given, rule = [tensor.to(device) for tensor in given] + [torch.zeros((), device=device)], 0
    for index, value in changes.items():
        if index == "rule":
            rule = value
        else:
            given[index] = None if value is None else value.to(device)
    lists = [[] if tensor is None else [tensor] for tensor in given[:7]]
    with pytest.raises(RuntimeError, match=message):
        ops.low_rank_rule(*lists, given[7], given[8], rule=rule, **RULE)
