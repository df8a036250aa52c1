"""The step kernels against their definition in float64."""

import pytest
import torch

from pykern.lowrank import ops
from tests.lowrank.problems import LR, RULE, Problem
from tests.support import assert_accurate, check_op, compile_whole, poison, threads

SIZES = [(1, 1, 1), (5, 3, 1), (3, 5, 3), (64, 64, 16), (70, 45, 7), (45, 70, 45)]
# Several tiles and slices of the CPU code; several blocks of every kernel.
LARGER = [(130, 600, 33), (530, 97, 64)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def hold(problem: Problem, norm_error=None, **rule) -> None:
    """Everything the kernel writes, to the error of PyTorch's own computation in the same dtype."""
    param, first, second, norm = problem.kernel(**rule)
    exact = problem.defined(**rule)
    own = problem.defined(dtype=problem.param.dtype, **rule)
    assert_accurate(param, exact[0], own[0], units=2.0)
    assert_accurate(first, exact[1], own[1].to(first.dtype), units=4.0)
    assert_accurate(second, exact[2], own[2].to(second.dtype), units=4.0)
    if norm is not None:
        # Where the subspace is the whole space, the residual is nothing but rounding.
        whole = problem.projector.shape[0] == problem.projector.shape[1]
        slack = torch.finfo(problem.param.dtype).eps * problem.grad.double().norm().item() if whole else 0.0
        allowed = norm_error[problem.param.dtype] if norm_error else 1e-5
        assert norm.item() == pytest.approx(exact[3], rel=allowed, abs=10 * slack)


@pytest.mark.parametrize("fira", [False, True], ids=["galore", "fira"])
@pytest.mark.parametrize("right", [True, False], ids=["right", "left"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_step_matches_the_definition(device, norm_error, dtype, size, right, fira):
    rows, columns, rank = size
    rank = min(rank, columns if right else rows)
    hold(Problem.make(rows, columns, rank, right=right, dtype=dtype, fira=fira, device=device), norm_error)


@pytest.mark.parametrize("fira", [False, True], ids=["galore", "fira"])
@pytest.mark.parametrize("right", [True, False], ids=["right", "left"])
@pytest.mark.parametrize("size, dtype", list(zip(LARGER, [torch.float32, torch.bfloat16], strict=True)), ids=str)
def test_larger_steps_match_the_definition(device, norm_error, dtype, size, right, fira):
    hold(Problem.make(*size, right=right, dtype=dtype, fira=fira, device=device), norm_error)


@pytest.mark.parametrize("fira", [False, True], ids=["galore", "fira"])
@pytest.mark.parametrize("right", [True, False], ids=["right", "left"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_step_on_every_instruction_set(cpu_level, dtype, right, fira):
    hold(Problem.make(131, 301, 37, right=right, dtype=dtype, fira=fira))


@pytest.mark.parametrize("right", [True, False], ids=["right", "left"])
@pytest.mark.parametrize(
    "rule",
    [
        {"decay_after": True},
        {"corrected_eps": False},
        {"maximize": True},
        {"scaled_residual": True},
        {"decay_after": True, "corrected_eps": False, "scaled_residual": True, "maximize": True},
        {"beta1": 0.0, "beta2": 0.0, "weight_decay": 0.0},
        {"eps": 1.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_rule(device, dtype, rule, right):
    hold(Problem.make(60, 50, 9, right=right, dtype=dtype, fira=True, norm=1.0, device=device), **rule)


@pytest.mark.parametrize("right", [True, False], ids=["right", "left"])
@pytest.mark.parametrize("norm", [-1.0, 0.0, 0.01, 1e9], ids=["first", "zero", "limited", "free"])
@pytest.mark.parametrize("scaled", [False, True], ids=["corrected", "fira package"])
def test_residual_limiter(device, norm, scaled, right):
    hold(Problem.make(40, 30, 5, right=right, fira=True, norm=norm, device=device), scaled_residual=scaled)


@pytest.mark.parametrize("right", [True, False], ids=["right", "left"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_residual_norm_is_exact_for_any_projector(device, norm_error, dtype, right):
    problem = Problem.make(80, 90, 12, right=right, dtype=dtype, fira=True, orthonormal=False, device=device)
    _, _, _, norm = problem.kernel()
    allowed = max(norm_error[dtype], 2e-3 if dtype == torch.bfloat16 else 0.0)
    assert norm.item() == pytest.approx(problem.defined()[3], rel=allowed)


@pytest.mark.parametrize("fira", [False, True], ids=["galore", "fira"])
@pytest.mark.parametrize("right", [True, False], ids=["right", "left"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("width", [51, 48], ids=["odd", "aligned"])
def test_rows_with_gaps_are_neither_read_nor_written(device, dtype, right, fira, width):
    problem = Problem.make(37, width, 6, right=right, dtype=dtype, fira=fira, device=device)
    gradient = poison(torch.empty(37, 64, dtype=dtype, device=device))
    gradient[:, :width] = problem.grad
    problem.grad = gradient[:, :width]
    expected = problem.kernel()[0]
    gapped = poison(torch.empty(37, 64, dtype=dtype, device=device))
    gapped[:, :width] = problem.param
    norm = None if problem.residual_norm is None else problem.residual_norm.clone()
    problem.run(gapped[:, :width], problem.exp_avg.clone(), problem.exp_avg_sq.clone(), norm)
    assert torch.equal(gapped[:, :width], expected)
    assert gapped[:, width:].isnan().all()
    hold(problem, {dtype: 5e-3 if dtype == torch.bfloat16 else 1e-5})


@pytest.mark.parametrize("fira", [False, True], ids=["galore", "fira"])
@pytest.mark.parametrize("right", [True, False], ids=["right", "left"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_repeats_bit_for_bit(device, dtype, right, fira):
    problem = Problem.make(300, 200, 24, right=right, dtype=dtype, fira=fira, device=device)
    for a, b in zip(problem.kernel(), problem.kernel(), strict=True):
        assert a is None and b is None or torch.equal(a, b)


@pytest.mark.parametrize("fira", [False, True], ids=["galore", "fira"])
@pytest.mark.parametrize("right", [True, False], ids=["right", "left"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bit_equal_for_any_number_of_threads(dtype, right, fira):
    problem = Problem.make(500, 400, 24, right=right, dtype=dtype, fira=fira)
    results = []
    for count in (1, 2, 3, 2):
        with threads(count):
            results.append(problem.kernel())
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert a is None and b is None or torch.equal(a, b)


@pytest.mark.parametrize("right", [True, False], ids=["right", "left"])
def test_nan_stays_on_its_line_without_residual(device, right):
    problem = Problem.make(33, 44, 5, right=right, device=device)
    clean = problem.kernel()[0]
    problem.grad[7, 9] = float("nan")
    param, first, _, _ = problem.kernel()
    hit = torch.zeros(33, 44, dtype=torch.bool, device=device)
    if right:
        hit[7] = True
        assert first[7].isnan().all()
    else:
        hit[:, 9] = True
        assert first[:, 9].isnan().all()
    assert param[hit].isnan().all()
    assert torch.equal(param[~hit], clean[~hit])


def test_zero_projector_leaves_decay_alone(device):
    problem = Problem.make(20, 10, 3, right=True, fira=True, device=device)
    problem.projector.zero_()
    problem.exp_avg.zero_()
    param, first, _, norm = problem.kernel()
    assert torch.allclose(param, problem.param * (1 - LR * RULE["weight_decay"]), rtol=1e-6, atol=0)
    assert norm.item() == 0 and not first.any()


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)], ids=str)
def test_empty_weight(device, shape):
    param, grad = torch.empty(shape, device=device), torch.empty(shape, device=device)
    moments, count = torch.empty(shape[0], 0, device=device), torch.zeros((), device=device)
    ops.low_rank_adam_step(
        param,
        grad,
        torch.empty(shape[1], 0, device=device),
        moments,
        moments.clone(),
        count,
        None,
        torch.tensor(LR, device=device),
        right=True,
        **RULE,
    )
    assert count.item() == 1


@pytest.mark.parametrize("fira", [False, True], ids=["galore", "fira"])
@pytest.mark.parametrize("right", [True, False], ids=["right", "left"])
def test_opcheck_low_rank(device, right, fira):
    arguments, keywords = Problem.make(12, 9, 3, right=right, fira=fira, device=device).arguments()
    check_op(ops.low_rank_adam_step, arguments, keywords)


@pytest.mark.parametrize("fira", [False, True], ids=["galore", "fira"])
def test_compiles_whole(device, fira):
    problem = Problem.make(24, 18, 4, right=True, fira=fira, device=device)
    expected = problem.kernel()
    arguments, keywords = problem.arguments()

    def step(*tensors):
        ops.low_rank_adam_step(*tensors, **keywords)
        return tensors[0] * 1

    result = compile_whole(step)(*arguments)
    assert torch.equal(result, expected[0])
    for index, value in ((0, expected[0]), (3, expected[1]), (4, expected[2])):
        assert torch.equal(arguments[index], value)
    assert arguments[5].item() == problem.step + 1


@pytest.mark.parametrize(
    "index, value, message",
    [
        (0, torch.zeros(3), "param: expected 2 dimensions"),
        (0, torch.zeros(9, 12).t(), "param: expected unit stride"),
        (1, torch.zeros(12, 8), "grad: expected size 9"),
        (1, torch.zeros(12, 9, dtype=torch.float64), "grad: unexpected dtype"),
        (2, torch.zeros(12, 3), "projector: expected size 9"),
        (3, torch.zeros(12, 3, dtype=torch.bfloat16), "exp_avg: unexpected dtype"),
        (4, torch.zeros(3, 12).t(), "exp_avg_sq: expected a contiguous"),
        (5, torch.zeros((), dtype=torch.int64), "step: unexpected dtype"),
        (7, torch.zeros(2), "lr: expected one element"),
    ],
)
def test_op_refuses(device, index, value, message):
    arguments, keywords = Problem.make(12, 9, 3, right=True, device=device).arguments()
    changed = [*arguments[:index], value.to(device), *arguments[index + 1 :]]
    with pytest.raises(RuntimeError, match=message):
        ops.low_rank_adam_step(*changed, **keywords)
