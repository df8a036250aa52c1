"""The weights' update, with the projection up inside it, against its definition in float64."""

import pytest
import torch

from pykern.lowrank import ops
from pykern.reference import lowrank_parts as reference
from tests.lowrank.parts import DTYPES, SHAPES, columns, laid_out, low_rank, matrices, one, projectors, wide
from tests.support import assert_accurate, check_op, threads

SIDES = pytest.mark.parametrize("right", [False, True], ids=["left", "right"])
OPTIONS = {
    "scale": 0.7,
    "weight_decay": 0.1,
    "decay_after": False,
    "sign_scale": 0.3,
    "rounding": 0,
    "maximize": False,
}
LR = 0.05
PARTS = {
    "up": ("projector", "direction"),
    "up and gradient": ("projector", "direction", "grad", "factors"),
    "gradient": ("grad", "factors"),
    "up and sign": ("projector", "direction", "grad", "low"),
    "everything": ("projector", "direction", "grad", "factors", "low"),
    "decay alone": (),
}
"""What the residual rules hand to the op."""


class Weights:
    """One list of weights in midcourse, with every part that an update may have."""

    def __init__(self, dtype, device="cpu", *, right=False, parts="everything", shapes=SHAPES, gap=0):
        self.device, self.dtype = device, dtype
        self.param = matrices(dtype, device, right=right, shapes=shapes, gap=gap)
        self.lists = {
            "projector": projectors(dtype, device, shapes=shapes),
            "direction": low_rank(dtype, device, shapes=shapes),
            "grad": matrices(dtype, device, right=right, seed=500, shapes=shapes, gap=gap),
            "factors": columns(dtype, device, shapes=shapes),
            "low": low_rank(dtype, device, seed=600, shapes=shapes),
        }
        self.lists = {name: tensors if name in PARTS[parts] else [] for name, tensors in self.lists.items()}
        self.compensation = []
        self.step = [one(3.0 + i, device) for i in range(len(shapes))]
        self.seeds = [17 + (i << 40) for i in range(len(shapes))]
        self.step_factor = torch.linspace(0.5, 1.5, len(shapes), dtype=torch.float64).to(device)

    def arguments(self, grad_scale=None, found_inf=None):
        return (
            self.param, *self.lists.values(), self.compensation, self.step, self.seeds, self.step_factor,
            one(LR, self.device, torch.float64), grad_scale, found_inf,
        )  # fmt: skip

    def apply(self, grad_scale=None, found_inf=None, **options):
        ops.low_rank_apply(*self.arguments(grad_scale, found_inf), **{**OPTIONS, **options})

    def defined(self, i, dtype=torch.float64, grad_scale=1.0, **options):
        """The new weight `i` by the reference in `dtype`, before it is rounded."""
        rules = {**OPTIONS, **options}
        rules.pop("rounding")
        factor = self.step_factor[i].item()
        parts = {name: tensors[i].cpu().to(dtype) if tensors else None for name, tensors in self.lists.items()}
        # The decay takes the rate without the factor.
        for name in ("direction", "factors"):
            parts[name] = None if parts[name] is None else parts[name] * factor
        rules["sign_scale"] *= factor
        return reference.apply(self.param[i].cpu().to(dtype), **parts, lr=LR, grad_scale=grad_scale, **rules)


def hold(weights: Weights, scale=None, **options):
    dtype, count = weights.dtype, len(weights.param)
    known = {**options, "grad_scale": scale or 1.0}
    exact = [weights.defined(i, **known) for i in range(count)]
    own = [weights.defined(i, wide(dtype), **known).to(dtype) for i in range(count)]
    weights.apply(None if scale is None else one(scale, weights.device), **options)
    for i in range(count):
        assert_accurate(weights.param[i], exact[i], own[i], units=2.0)


@SIDES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_the_definition(device, dtype, right):
    hold(Weights(dtype, device, right=right))


@SIDES
@pytest.mark.parametrize("parts", [name for name in PARTS if name != "everything"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_every_choice_of_parts(device, dtype, parts, right):
    hold(Weights(dtype, device, right=right, parts=parts, shapes=SHAPES[1:4]))


# More than one tile, slice and panel on each side, and rests of each.
@SIDES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_on_every_instruction_set(cpu_level, dtype, right):
    hold(Weights(dtype, right=right, parts="everything", shapes=[(601, 333, 37), (130, 450, 130)]))


@SIDES
@pytest.mark.parametrize("options", [{"decay_after": True}, {"maximize": True}, {"weight_decay": 0.0}], ids=str)
@pytest.mark.parametrize("scale", [None, 8.0])
def test_options(device, options, scale, right):
    hold(Weights(torch.float32, device, right=right, shapes=SHAPES[1:4]), scale, **options)


@SIDES
@pytest.mark.parametrize("parts", ["up and gradient", "everything"])
def test_gradients_of_the_other_orientation(device, parts, right):
    weights = Weights(torch.bfloat16, device, right=right, parts=parts)
    weights.lists["grad"] = [laid_out(grad, right=not right) for grad in weights.lists["grad"]]
    hold(weights)


@SIDES
def test_nothing_between_the_lines_is_touched(device, right):
    weights = Weights(torch.bfloat16, device, right=right, parts="everything", gap=3)
    memory = [param.mT if right else param for param in weights.param]
    hold(weights)
    for lines in memory:
        whole = torch.as_strided(lines, (lines.shape[0], lines.shape[1] + 3), lines.stride())
        assert whole[:, lines.shape[1] :].isnan().all()


def test_sign_of_nothing_is_nothing(device):
    """A gradient inside the subspace of unit vectors: what it misses is zero exactly."""
    weights = Weights(torch.float32, device, parts="up and sign", shapes=[(4, 9, 2)])
    weights.lists["projector"][0].zero_()
    weights.lists["projector"][0][:2] = torch.eye(2, device=device)
    weights.lists["low"] = [weights.lists["grad"][0][:2].clone()]
    weights.lists["direction"][0].zero_()
    before = weights.param[0].clone()
    weights.apply(weight_decay=0.0)
    assert torch.equal(before[:2], weights.param[0][:2])
    expected = before[2:] - LR * 0.5 * 0.3 * weights.lists["grad"][0][2:].sign()
    torch.testing.assert_close(weights.param[0][2:], expected)


def test_an_infinite_gradient_has_a_sign(device):
    weights = Weights(torch.float32, device, parts="up and sign", shapes=[(4, 9, 2)])
    weights.lists["grad"][0][1, 3] = float("inf")
    weights.lists["grad"][0][2, 4] = float("nan")
    weights.apply()
    assert weights.param[0].isnan().nonzero().tolist() == [[2, 4]]


@pytest.mark.parametrize("rounding", [0, 1, 2])
def test_found_inf_changes_nothing(device, rounding):
    for flag, kept in ((1.0, True), (0.0, False)):
        weights = Weights(torch.bfloat16, device, shapes=SHAPES[:2])
        weights.compensation = [torch.ones_like(param) for param in weights.param] if rounding == 2 else []
        before = [param.clone() for param in weights.param]
        weights.apply(found_inf=one(flag, device), rounding=rounding)
        assert all(torch.equal(a, b) is kept for a, b in zip(before, weights.param, strict=True))
        assert all(bool((buffer == 1).all()) is kept for buffer in weights.compensation)


@pytest.mark.parametrize("rounding", [0, 1, 2])
def test_empty_matrices(device, rounding):
    weights = Weights(torch.bfloat16, device, shapes=[(0, 5, 2), (5, 0, 2), (6, 7, 2)])
    weights.compensation = [torch.zeros_like(param) for param in weights.param] if rounding == 2 else []
    before = weights.param[2].clone()
    weights.apply(rounding=rounding)
    assert not torch.equal(before, weights.param[2])


def test_empty_lists(device):
    weights = Weights(torch.float32, device, shapes=[])
    weights.apply()


@SIDES
@pytest.mark.parametrize("rounding", [0, 1, 2])
def test_bit_equal_for_any_number_of_threads(rounding, right):
    results = []
    for count in (1, 2, 3):
        with threads(count):
            weights = Weights(torch.bfloat16, right=right, shapes=[(601, 333, 37), (90, 450, 20)])
            weights.compensation = [torch.zeros_like(param) for param in weights.param] if rounding == 2 else []
            weights.apply(rounding=rounding)
        results.append([*weights.param, *weights.compensation])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# --- stochastic rounding ----------------------------------------------------------------------------


def test_philox_known_answers():
    """The test vectors of the authors' library."""
    for word, key, expected in (
        (0, 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (0xFFFFFFFF, 0xFFFFFFFF, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ):
        made = reference.philox((torch.tensor([word]),) * 4, (key, key))
        assert tuple(tensor.item() for tensor in made) == expected


def exact_updates(dtype, device, right, shapes):
    """Weights whose update is exact in float32, so that only the rounding is left to differ."""
    weights = Weights(dtype, device, right=right, parts="gradient", shapes=shapes)
    weights.param = [laid_out(torch.ones_like(param), right=right) for param in weights.param]
    values = (torch.arange(param.numel(), device=device).view(param.shape) % 251 - 125 for param in weights.param)
    weights.lists["grad"] = [laid_out(value.to(dtype), right=right) for value in values]
    weights.lists["factors"] = [torch.full_like(factors, 2.0**-15) for factors in weights.lists["factors"]]
    weights.step_factor = torch.full_like(weights.step_factor, 1.0 / LR)
    return weights


@SIDES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_stochastic_rounding_bit_for_bit(device, dtype, right):
    weights = exact_updates(dtype, device, right, SHAPES)
    # Small magnitudes too, among them subnormal ones, and both signs.
    powers = [2.0 ** -(torch.arange(param.shape[1], device=device) % 30) for param in weights.param]
    weights.param = [laid_out((param * power).to(dtype), right=right) for param, power in zip(weights.param, powers)]
    weights.lists["factors"] = [2.0**-14 * power.float() for power in powers]
    exact = [
        param.cpu().float() - grad.cpu().float() * factors.cpu()
        for param, grad, factors in zip(weights.param, weights.lists["grad"], weights.lists["factors"], strict=True)
    ]
    weights.apply(rounding=1, weight_decay=0.0)
    for i, value in enumerate(exact):
        words = reference.rounding_words(*value.shape, weights.seeds[i], 3 + i)
        assert torch.equal(weights.param[i].cpu(), reference.round_stochastic(value, dtype, words))


def test_stochastic_rounding_on_every_instruction_set(cpu_level):
    for right in (False, True):
        weights = exact_updates(torch.bfloat16, torch.device("cpu"), right, [(40, 70, 1)])
        exact = 1 - weights.lists["grad"][0].float() * 2.0**-15
        weights.apply(rounding=1, weight_decay=0.0)
        words = reference.rounding_words(40, 70, weights.seeds[0], 3)
        assert torch.equal(weights.param[0], reference.round_stochastic(exact, torch.bfloat16, words))


def test_stochastic_rounding_is_unbiased(device):
    """The mean over many elements, in a share of the unit that rounding to nearest would lose altogether."""
    shape = (200, 1000)
    for share in (0.1, 0.5, 0.9):
        weights = exact_updates(torch.bfloat16, device, False, [(*shape, 1)])
        # Downward from one, the unit is 2^-8.
        weights.lists["grad"][0].fill_(1.0)
        weights.lists["factors"] = [torch.full((shape[1],), share * 2.0**-8, device=device)]
        weights.apply(rounding=1, weight_decay=0.0)
        moved = (1 - weights.param[0].double()) * 2**8
        assert set(moved.unique().tolist()) == {0.0, 1.0}
        deviation = (share * (1 - share) / moved.numel()) ** 0.5
        assert abs(moved.mean().item() - share) < 4 * deviation


def test_stochastic_rounding_depends_on_seed_and_step(device):
    results = []
    for seed, step in ((1, 1), (2, 1), (1, 2), (1 + (1 << 32), 1), (1, 1)):
        weights = exact_updates(torch.bfloat16, device, False, [(40, 70, 1)])
        weights.seeds, weights.step = [seed], [one(float(step), device)]
        weights.apply(rounding=1, weight_decay=0.0)
        results.append(weights.param[0])
    assert torch.equal(results[0], results[4])
    for i in range(4):
        assert not any(torch.equal(results[i], results[j]) for j in range(i))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_stochastic_rounding_keeps_what_is_not_finite(device, dtype):
    weights = exact_updates(dtype, device, False, [(3, 40, 1)])
    for row, bad in enumerate((float("nan"), float("inf"), -float("inf"))):
        weights.lists["grad"][0][row] = bad
    weights.apply(rounding=1, weight_decay=0.0)
    assert weights.param[0][0].isnan().all()
    assert (weights.param[0][1] == -float("inf")).all() and (weights.param[0][2] == float("inf")).all()


# --- Kahan's rounding -------------------------------------------------------------------------------


@SIDES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kahan_matches_the_definition(device, dtype, right):
    weights = exact_updates(dtype, device, right, SHAPES[1:4])
    weights.compensation = [torch.full_like(param, 2.0**-12) for param in weights.param]
    expected = [
        reference.round_kahan(param.cpu(), buffer.cpu(), param.cpu().double() - grad.cpu().double() * 2.0**-15)
        for param, buffer, grad in zip(weights.param, weights.compensation, weights.lists["grad"], strict=True)
    ]
    weights.apply(rounding=2, weight_decay=0.0)
    for i, (param, buffer) in enumerate(expected):
        assert torch.equal(weights.param[i].cpu(), param)
        assert torch.equal(weights.compensation[i].cpu(), buffer)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_kahan_adds_up_tiny_updates_as_float32_would(device, dtype):
    """Forty updates far below half a unit of the weight, which rounding to nearest loses."""
    ends = {}
    for kind, rounding, of in (("nearest", 0, dtype), ("kahan", 2, dtype), ("float32", 0, torch.float32)):
        weights = exact_updates(of, device, True, [(30, 40, 1)])
        weights.compensation = [torch.zeros_like(param) for param in weights.param] if rounding == 2 else []
        weights.lists["grad"][0].fill_(1.0)
        weights.lists["factors"] = [torch.full((40,), 1.7e-4, device=device)]
        for _ in range(40):
            weights.apply(rounding=rounding, weight_decay=0.0)
        buffer = weights.compensation[0].double() if weights.compensation else 0.0
        ends[kind] = weights.param[0].double() + buffer
    assert (ends["nearest"] == 1).all()
    torch.testing.assert_close(ends["float32"].cpu(), torch.full((30, 40), 1 - 0.0068).double(), rtol=1e-5, atol=0)
    torch.testing.assert_close(ends["kahan"], ends["float32"], rtol=0, atol=torch.finfo(dtype).eps ** 2 * 8)


# --- the op -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounding", [0, 2])
def test_opcheck(device, rounding):
    weights = Weights(torch.bfloat16, device, right=True, shapes=SHAPES[:2])
    weights.compensation = [torch.zeros_like(param) for param in weights.param] if rounding == 2 else []
    given = weights.arguments(one(2.0, device), one(0.0, device))
    check_op(ops.low_rank_apply, given, {**OPTIONS, "rounding": rounding})


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("param", torch.zeros(34, 66)[::2, ::2], r"param\[0\]: expected unit stride along one axis"),
        ("param", torch.zeros(1, 33).expand(17, 33), r"param\[0\]: expected elements that don't share memory"),
        ("param", torch.zeros(17, 33, dtype=torch.int32), r"param\[0\]: expected float32"),
        ("projector", torch.zeros(5, 17).T, r"projector\[0\]: expected a contiguous tensor"),
        ("projector", torch.zeros(16, 5), r"projector\[0\]: expected size 17"),
        ("direction", torch.zeros(5, 32), r"direction\[0\]: expected size 33"),
        ("direction", torch.zeros(5, 33).bfloat16(), r"direction\[0\]: expected [a-z0-9]+, got [a-z0-9]+"),
        ("grad", torch.zeros(17, 32), r"grad\[0\]: expected size 33"),
        ("grad", torch.zeros(17, 33).bfloat16(), r"grad\[0\]: expected [a-z0-9]+, got [a-z0-9]+"),
        ("grad", torch.zeros(34, 66)[::2, ::2], r"grad\[0\]: expected unit stride along one axis"),
        ("factors", torch.zeros(17), r"factors\[0\]: expected size 33"),
        ("low", torch.zeros(4, 33), r"low\[0\]: expected size 5"),
        ("compensation", torch.zeros(33, 17).T, r"compensation\[0\]: expected the strides of param"),
        ("compensation", torch.zeros(17, 33).bfloat16(), r"compensation\[0\]: expected [a-z0-9]+, got [a-z0-9]+"),
        ("step", torch.zeros(2), r"step\[0\]: expected one element, got 2"),
    ],
)
def test_refusals(device, name, value, message):
    weights = Weights(torch.float32, device, shapes=SHAPES[:2])
    weights.compensation = [torch.zeros_like(param) for param in weights.param]
    tensors = weights.lists[name] if name in weights.lists else getattr(weights, name)
    tensors[0] = value.to(device)
    with pytest.raises(RuntimeError, match=message):
        weights.apply(rounding=2)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"projector": []}, "projector: expected 2 tensors, got 0"),
        ({"direction": [], "low": []}, "projector: expected 0 tensors, got 2"),
        ({"grad": []}, "grad: expected 2 tensors, got 0"),
        ({"factors": [], "low": []}, "grad: expected 0 tensors, got 2"),
        ({"step": []}, "step: expected 2 tensors, got 0"),
        ({"seeds": [1]}, "seeds: expected 2 numbers, got 1"),
        ({"compensation": [torch.zeros(17, 33)]}, "compensation: expected 0 tensors, got 1"),
        ({"step_factor": torch.ones(2)}, "step_factor: expected [a-z0-9]+, got [a-z0-9]+"),
        ({"rounding": 2}, "compensation: expected 2 tensors, got 0"),
        ({"rounding": 3}, "rounding: expected 0"),
    ],
)
def test_refuses_lists_that_do_not_match(device, changes, message):
    weights, rounding = Weights(torch.float32, device, shapes=SHAPES[:2]), 0
    for name, value in changes.items():
        if name == "rounding":
            rounding = value
        elif name in weights.lists:
            weights.lists[name] = value
        else:
            setattr(weights, name, value.to(device) if isinstance(value, torch.Tensor) else value)
    with pytest.raises(RuntimeError, match=message):
        weights.apply(rounding=rounding)
