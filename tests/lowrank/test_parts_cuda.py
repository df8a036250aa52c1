"""What is special to the low-rank parts on CUDA: launches over lists, whatever the lists hold, and their number."""

import pytest
import torch

from pykern.lowrank import ops
from tests.lowrank.parts import low_rank, normal
from tests.support import DEVICES, emulator

KERNEL_DEVICES = [name for name in DEVICES if name != "cpu"]
pytestmark = pytest.mark.parametrize("device", KERNEL_DEVICES, indirect=True)

RULES = ("adamw", "adabelief", "lion", "momentum")
STEP = {
    "beta1": 0.9, "beta2": 0.99, "eps": 1e-6, "corrected_eps": False, "weight_decay": 0.1, "decay_after": False,
    "scale": 0.5, "removed": 1.0, "growth": 1.01, "zero_norm_limits": False, "amplitude": 1.5,
    "amplitude_first": False, "orthonormal": True, "maximize": True,
}  # fmt: skip


def fresh(tensors):
    return [tensor.clone() for tensor in tensors]


# --- lists ---------------------------------------------------------------------------------------------

# More matrices than one table of the kernels holds, beside some that have no elements and take no place in it.
MANY = [(0, 1 + 7 * i % 20, i % 8) for i in range(460)]
LAST = len(MANY) - 1


def rule_arguments(shapes, storage, kind, device):
    low = low_rank(torch.float64 if storage == "float64" else torch.float32, device, shapes=shapes)
    first, second = ([normal(*m.shape, seed=i).to(device) for i, m in enumerate(low)] for _ in range(2))
    second = [moment.abs() for moment in second]
    scales = [[], []]
    if storage == "8bit":
        blocks = [(m.shape[0], -(-m.shape[1] // 256)) for m in low]
        scales = [[normal(*shape, seed=i).abs().float().to(device) for i, shape in enumerate(blocks)] for _ in range(2)]
        first, second = ([(100 * moment.abs()).to(torch.uint8) for moment in moments] for moments in (first, second))
    else:
        stored = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}[storage]
        first, second = ([moment.to(stored) for moment in moments] for moments in (first, second))
    if kind >= 2:
        second, scales[1] = [], []
    steps = [torch.full((), float(i % 5), device=device) for i in range(len(low))]
    direction = [torch.full_like(m, float("nan")) for m in low]
    factor = torch.full((len(low),), float("nan"), dtype=torch.float64, device=device)
    return [low, first, second, *scales, steps, direction, factor]


def run_rule(arguments, kind):
    ops.low_rank_rule(
        *arguments, None, rule=kind, beta1=0.9, beta2=0.99, eps=1e-6, corrected_eps=False
    )  # fmt: skip


@pytest.mark.parametrize("storage, kind", [("float32", 0), ("bfloat16", 2), ("8bit", 1), ("8bit", 3), ("float64", 3)])
def test_rule_of_a_long_list_is_that_of_each_matrix(device, storage, kind):
    together = rule_arguments(MANY, storage, kind, device)
    apart = rule_arguments(MANY, storage, kind, device)
    run_rule(together, kind)
    for i in (0, 1, 2, 3, LAST - 1, LAST):
        one = [part[i : i + 1] for part in apart]
        run_rule(one, kind)
        for ours, alone in zip(together, one, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours[i : i + 1], alone, strict=True))
    assert torch.equal(together[7].isnan(), torch.zeros_like(together[7], dtype=torch.bool))


def test_ratios_and_limit_of_a_long_list_are_those_of_each_matrix(device):
    low, direction = (low_rank(torch.float32, device, seed=seed, shapes=MANY) for seed in (0, 1000))
    squares = [2 * m.square().sum(0) + 1 for m in low]
    norms = [torch.tensor((-1.0, 0.5)[i % 2], device=device) for i in range(len(low))]

    def run(low, direction, squares, norms):
        direction, norms = fresh(direction), fresh(norms)
        ratios = [torch.full_like(square, float("nan")) for square in squares]
        sums = torch.full((len(low), 3), float("nan"), dtype=torch.float64, device=device)
        ops.low_rank_ratios(low, direction, squares, [], ratios, sums, per_tensor=False, removed=0.5)
        ops.low_rank_limit(
            low, direction, ratios, sums, norms, None, None, scale=0.7, removed=0.5, per_tensor=False, amplitude=1.0,
            amplitude_first=False, growth=1.01, zero_norm_limits=False, maximize=True,
        )  # fmt: skip
        return direction, ratios, sums, norms

    together = run(low, direction, squares, norms)
    for i in (0, 1, LAST):
        alone = run(*(part[i : i + 1] for part in (low, direction, squares, norms)))
        for ours, its in zip(together, alone, strict=True):
            assert torch.equal(ours[i], its[0])


def test_adamw_of_a_long_list_is_that_of_each_tensor(device):
    tensors = [[normal(1 + i % 50, seed=i + 1000 * k).float().to(device) for i in range(500)] for k in range(3)]
    second = [tensor.abs() for tensor in tensors[2]]
    steps = [torch.full((), float(i % 7), device=device) for i in range(500)]
    lr = torch.tensor(0.05, device=device)
    rule = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-6, "weight_decay": 0.1}

    def run(*arguments):
        param, grad, first, second, steps = (fresh(part) for part in arguments)
        ops.adamw_step(
            param, grad, first, second, steps, lr, None, None, **rule, decay_after=False, corrected_eps=True,
            maximize=False,
        )  # fmt: skip
        return param, first, second, steps

    together = run(*tensors, second, steps)
    for i in (0, 1, 470, 499):
        alone = run(*(part[i : i + 1] for part in (*tensors, second, steps)))
        for ours, its in zip(together, alone, strict=True):
            assert torch.equal(ours[i], its[0])


@pytest.mark.parametrize("storage, kind", [("float32", 0), ("bfloat16", 0), ("8bit", 0), ("float64", 1)])
def test_matrices_that_allow_no_wide_access(device, storage, kind):
    """One of the list begins off the sixteen bytes; what lies before and behind it stays."""
    shapes = [(0, 64, 3), (0, 264, 2), (0, 8, 4)]
    aligned, shifted = (rule_arguments(shapes, storage, kind, device) for _ in range(2))
    memory = []
    for part in (0, 1, 2, 6):
        for i in (0, 1):
            tensor = shifted[part][i]
            whole = torch.full((tensor.numel() + 6,), 77, device=device).to(tensor.dtype)
            view = whole[3:-3].view_as(tensor)
            shifted[part][i] = view.copy_(tensor)
            memory.append(whole)
    run_rule(aligned, kind)
    run_rule(shifted, kind)
    for ours, other in zip(shifted, aligned, strict=True):
        for a, b in zip(ours, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, equal_nan=True)
    for whole in memory:
        assert (whole[:3] == 77).all() and (whole[-3:] == 77).all()


# --- the whole step --------------------------------------------------------------------------------------

LAYERS = [(4096, 4096)] * 4 + [(4096, 11008)] * 3
"""Of LLaMA-7B, compressed axis first."""


def llama(device, dtype, layers=32, shrink=128):
    """Weights of the model's shapes, made small; one layer in two lies the other way in memory."""
    shapes = [(n // shrink, length // shrink) for _ in range(layers) for n, length in LAYERS]
    generator = torch.Generator().manual_seed(0)

    def draw(i, n, length):
        flipped = i // len(LAYERS) % 2 == 1
        matrix = (
            torch.randn(length, n, generator=generator).mT if flipped else torch.randn(n, length, generator=generator)
        )
        return matrix.to(dtype).to(device)

    param, grad = ([draw(i, *shape) for i, shape in enumerate(shapes)] for _ in range(2))
    rank = 4
    projector = [
        torch.linalg.qr(torch.randn(n, rank, generator=generator))[0].to(dtype).contiguous().to(device)
        for n, _ in shapes
    ]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    first = [torch.randn(rank, length, generator=generator).to(wide).to(device) for _, length in shapes]
    second = [moment.square() + 0.5 for moment in first]
    steps = [torch.full((), 3.0, device=device) for _ in shapes]
    norms = [torch.full((), -1.0, dtype=wide, device=device) for _ in shapes]
    return [param, grad, projector, first, second, steps, norms]


@pytest.fixture
def one_order():
    """One thread order for each launch: what is counted does not depend on it."""
    before = emulator().orders()
    emulator().set_orders(before[:1])
    yield
    emulator().set_orders(before)


@pytest.mark.parametrize("residual", [0, 1], ids=["none", "fira"])
def test_a_whole_model_takes_few_launches(device, one_order, residual):
    if device.type != "cpu":
        pytest.skip("the emulator counts the launches")
    arguments = llama(device, torch.bfloat16, shrink=512)
    assert len(arguments[0]) == 224
    before = emulator().counters()["launches"]
    ops.low_rank_adamw_step(*arguments, torch.tensor(0.01), None, None, residual=residual, **STEP)
    taken = emulator().counters()["launches"] - before
    assert taken < 10, f"{taken} launches"
    assert all(step.item() == 4 for step in arguments[5])


@pytest.mark.parametrize("orthonormal", [True, False])
@pytest.mark.parametrize("residual", [0, 1, 2, 3], ids=["none", "fira", "apollo_channel", "apollo_tensor"])
def test_the_whole_step_is_its_parts(device, residual, orthonormal):
    scale, found = torch.tensor(4.0, device=device), torch.tensor(0.0, device=device)
    arguments = llama(device, torch.bfloat16, layers=2)
    lr = torch.tensor(0.01, device=device)
    whole = [fresh(part) for part in arguments]
    options = {**STEP, "orthonormal": orthonormal}
    ops.low_rank_adamw_step(*whole, lr, scale, found, residual=residual, **options)

    param, grad, projector, first, second, steps, norms = (fresh(part) for part in arguments)
    low = [torch.empty_like(moment) for moment in first]
    direction = [torch.empty_like(moment) for moment in first]
    squares = [torch.empty_like(moment[0]) for moment in first]
    ratios = [torch.empty_like(square) for square in squares]
    factor = torch.empty(len(low), dtype=torch.float64, device=device)
    sums = torch.empty(len(low), 3, dtype=torch.float64, device=device)
    ops.low_rank_project(grad, projector, scale, low, squares if residual else [], maximize=True)
    ops.low_rank_rule(
        low, first, second, [], [], steps, direction, factor, found,
        rule=0, **{name: STEP[name] for name in ("beta1", "beta2", "eps", "corrected_eps")},
    )  # fmt: skip
    if residual:
        removed = STEP["removed"] if residual == 1 else None
        gram = [p.float().mT @ p.float() @ r for p, r in zip(projector, low, strict=True)]
        gram = gram if residual == 1 and not orthonormal else []
        per_tensor = residual == 3
        ops.low_rank_ratios(low, direction, squares, gram, ratios, sums, per_tensor=per_tensor, removed=removed)
        names = ("scale", "amplitude", "amplitude_first", "growth", "zero_norm_limits", "maximize")
        ops.low_rank_limit(
            low, direction, ratios, sums, norms, scale, found, removed=removed, per_tensor=per_tensor,
            **{name: STEP[name] for name in names},
        )  # fmt: skip
    up = residual < 2
    ops.low_rank_apply(
        param, projector if up else [], direction if up else [], grad if residual else [], ratios if residual else [],
        [], [], steps, [0] * len(param), factor, lr, scale, found, scale=1.0 if residual else STEP["scale"],
        weight_decay=STEP["weight_decay"], decay_after=False, sign_scale=0.0, rounding=0, maximize=True,
    )  # fmt: skip
    for ours, parts in zip(whole, (param, grad, projector, first, second, steps, norms), strict=True):
        for a, b in zip(ours, parts, strict=True):
            # The same kernels on the same lists: the same bits, but for the vendor's products of P^T P.
            torch.testing.assert_close(a, b, rtol=0 if orthonormal else 1e-2, atol=0 if orthonormal else 1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("residual", [0, 1], ids=["none", "fira"])
def test_a_step_that_is_left_out_changes_nothing(device, dtype, residual):
    arguments = llama(device, dtype, layers=1)
    arguments[1][2].fill_(float("inf"))
    before = [fresh(part) for part in arguments]
    found = torch.ones((), device=device)
    ops.low_rank_adamw_step(
        *arguments, torch.tensor(0.01, device=device), torch.tensor(2.0, device=device), found, residual=residual,
        **STEP,
    )  # fmt: skip
    for ours, other in zip(arguments, before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, other, strict=True))


def test_empty_lists(device):
    nothing = [[] for _ in range(7)]
    ops.low_rank_adamw_step(*nothing, torch.tensor(0.01, device=device), None, None, residual=1, **STEP)
