"""The step kernels against their definition in float64."""

import pytest
import torch

from pykern.lowrank import ops
from tests.lowrank.problems import LR, RESIDUALS, RULE, SUBSPACE, Problem
from tests.support import assert_accurate, check_op, compile_whole, poison, threads

SIZES = [(1, 1, 1), (5, 3, 1), (3, 5, 3), (64, 64, 16), (70, 45, 7), (45, 70, 45)]
# Several tiles and slices of the CPU code; several blocks of every kernel.
LARGER = [(600, 130, 33), (97, 530, 64)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SCALED = RESIDUALS[1:]

sides = pytest.mark.parametrize("right", [True, False], ids=["right", "left"])
residuals = pytest.mark.parametrize("residual", RESIDUALS)


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


@residuals
@sides
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_step_matches_the_definition(device, norm_error, dtype, size, right, residual):
    hold(Problem.make(*size, right=right, dtype=dtype, residual=residual, device=device), norm_error)


@residuals
@sides
@pytest.mark.parametrize("size, dtype", list(zip(LARGER, [torch.float32, torch.bfloat16], strict=True)), ids=str)
def test_larger_steps_match_the_definition(device, norm_error, dtype, size, right, residual):
    hold(Problem.make(*size, right=right, dtype=dtype, residual=residual, device=device), norm_error)


@residuals
@sides
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_step_on_every_instruction_set(cpu_level, dtype, right, residual):
    hold(Problem.make(301, 131, 37, right=right, dtype=dtype, residual=residual))


@pytest.mark.parametrize(
    "rule",
    [
        {"decay_after": True},
        {"corrected_eps": False},
        {"maximize": True},
        {"removed": 0.5},
        {"growth": 1.5},
        {"growth": 0.0},
        {"amplitude": 3.0},
        {"amplitude": 3.0, "amplitude_first": True},
        {"grad_scale": 4.0},
        {"grad_scale": 0.375, "decay_after": True, "corrected_eps": False, "removed": 0.5, "maximize": True},
        {"beta1": 0.0, "beta2": 0.0, "weight_decay": 0.0},
        {"eps": 1.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("residual", SCALED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_rule(device, dtype, rule, residual):
    hold(Problem.make(50, 60, 9, right=True, dtype=dtype, residual=residual, norm=1.0, device=device), **rule)


@pytest.mark.parametrize("rule", [{"maximize": True}, {"grad_scale": 0.375}, {"decay_after": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_rule_without_residual(device, dtype, rule):
    hold(Problem.make(50, 60, 9, dtype=dtype, device=device), **rule)


@sides
@pytest.mark.parametrize("norm", [None, -1.0, 0.0, 0.01, 1e9], ids=["none", "first", "zero", "limited", "free"])
@pytest.mark.parametrize("zero_norm_limits", [False, True], ids=["corrected", "as packages"])
@pytest.mark.parametrize("residual", SCALED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_residual_limiter(device, dtype, residual, norm, zero_norm_limits, right):
    problem = Problem.make(30, 40, 5, right=right, dtype=dtype, residual=residual, norm=norm, device=device)
    hold(problem, zero_norm_limits=zero_norm_limits)


@sides
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_residual_norm_is_exact_for_any_projector(device, norm_error, dtype, right):
    problem = Problem.make(90, 80, 12, right=right, dtype=dtype, residual="fira", orthonormal=False, device=device)
    _, _, _, norm = problem.kernel()
    allowed = max(norm_error[dtype], 2e-3 if dtype == torch.bfloat16 else 0.0)
    assert norm.item() == pytest.approx(problem.defined()[3], rel=allowed)


@sides
@pytest.mark.parametrize("dtype, allowed", [(torch.float32, 1e-6), (torch.bfloat16, 1e-3), (torch.float64, 1e-12)])
def test_residual_norm_of_an_orthonormal_projector(device, dtype, allowed, right):
    """The short way to the norm takes P for orthonormal; what rounding left of that is all that it gets wrong."""
    problem = Problem.make(300, 200, 24, right=right, dtype=dtype, residual="fira", device=device)
    param, _, _, norm = problem.kernel(orthonormal=True)
    assert norm.item() == pytest.approx(problem.defined()[3], rel=allowed)
    assert_accurate(param, problem.defined()[0], problem.defined(dtype=dtype)[0], units=2.0)


@residuals
@sides
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("width", [51, 48], ids=["odd", "aligned"])
def test_rows_with_gaps_are_neither_read_nor_written(device, dtype, right, residual, width):
    n, length = (width, 37) if right else (37, width)
    problem = Problem.make(n, length, 6, right=right, dtype=dtype, residual=residual, device=device)

    def with_gaps(matrix):
        rows = poison(torch.empty(37, 64, dtype=dtype, device=device))
        rows[:, :width] = matrix.mT if right else matrix
        view = rows[:, :width]
        return rows, view.mT if right else view

    problem.grad = with_gaps(problem.grad)[1]
    expected = problem.kernel()[0]
    rows, view = with_gaps(problem.param)
    arguments, keywords = problem.arguments()
    ops.low_rank_adamw_step([view], [problem.grad], *arguments[2:], **keywords)
    # The kernels of CUDA have the vendor's products for float32 and float64, whose sums depend on addresses.
    rounding = 16 * torch.finfo(dtype).eps
    torch.testing.assert_close(view, expected, rtol=rounding, atol=rounding)
    assert rows[:, width:].isnan().all()
    hold(problem, {dtype: 5e-3 if dtype == torch.bfloat16 else 1e-5})


@residuals
@sides
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_weight_and_gradient_may_lie_differently(device, dtype, right, residual):
    problem = Problem.make(70, 90, 6, right=right, dtype=dtype, residual=residual, device=device)
    problem.grad = problem.grad.mT.contiguous().mT if not right else problem.grad.contiguous()
    hold(problem, {dtype: 5e-3 if dtype == torch.bfloat16 else 1e-5})


@residuals
@sides
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_repeats_bit_for_bit(device, dtype, right, residual):
    problem = Problem.make(200, 300, 24, right=right, dtype=dtype, residual=residual, device=device)
    for a, b in zip(problem.kernel(), problem.kernel(), strict=True):
        assert a is None and b is None or torch.equal(a, b)


@residuals
@sides
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bit_equal_for_any_number_of_threads(dtype, right, residual):
    problem = Problem.make(400, 500, 24, right=right, dtype=dtype, residual=residual)
    results = []
    for count in (1, 2, 3, 2):
        with threads(count):
            results.append(problem.kernel())
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert a is None and b is None or torch.equal(a, b)


@residuals
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_list_is_stepped_as_its_matrices_alone(device, dtype, residual):
    shapes = [(40, 30, 7), (9, 200, 3), (130, 64, 33), (0, 5, 0), (1, 1, 1), (64, 64, 64)]
    problems = [
        Problem.make(*shape, right=i % 2 == 0, dtype=dtype, residual=residual, seed=i, device=device)
        for i, shape in enumerate(shapes)
    ]
    for i, problem in enumerate(problems):
        problem.step += i
    each = [problem.arguments() for problem in problems]
    together, keywords = each[0]
    lists = [sum((arguments[place] for arguments, _ in each), []) for place in range(7)]
    ops.low_rank_adamw_step(*lists, *together[7:], **keywords)
    for i, problem in enumerate(problems):
        param, first, second, norm = problem.kernel()
        assert torch.equal(lists[0][i], param)
        assert torch.equal(lists[3][i], first) and torch.equal(lists[4][i], second)
        assert lists[5][i].item() == problem.step + 1
        if norm is not None and param.numel() > 0:
            assert torch.equal(lists[6][i], norm)


@residuals
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_found_inf_changes_nothing(device, dtype, residual):
    problem = Problem.make(20, 30, 4, dtype=dtype, residual=residual, norm=2.0, device=device)
    problem.grad[3, 4] = float("inf")
    param, first, second, norm = problem.kernel(grad_scale=8.0, found_inf=1.0)
    assert torch.equal(param, problem.param)
    assert torch.equal(first, problem.exp_avg) and torch.equal(second, problem.exp_avg_sq)
    assert norm is None or norm.item() == 2.0
    problem.grad[3, 4] = 0.5
    for a, b in zip(problem.kernel(found_inf=0.0), problem.kernel(), strict=True):
        assert a is None and b is None or torch.equal(a, b)


@sides
def test_nan_stays_on_its_line_without_residual(device, right):
    problem = Problem.make(44, 33, 5, right=right, device=device)
    clean = problem.kernel()[0]
    problem.grad[9, 7] = float("nan")
    param, first, _, _ = problem.kernel()
    hit = torch.zeros(44, 33, dtype=torch.bool, device=device)
    hit[:, 7] = True
    assert first[:, 7].isnan().all()
    assert param[hit].isnan().all()
    assert torch.equal(param[~hit], clean[~hit])


@pytest.mark.parametrize("residual", SCALED)
def test_nan_reaches_the_norm(device, residual):
    problem = Problem.make(44, 33, 5, residual=residual, norm=3.0, device=device)
    problem.grad[9, 7] = float("nan")
    param, _, _, norm = problem.kernel()
    assert norm.isnan() and param.isnan().all()


def test_zero_projector_leaves_decay_alone(device):
    problem = Problem.make(10, 20, 3, right=True, residual="fira", device=device)
    problem.projector.zero_()
    problem.exp_avg.zero_()
    param, first, _, norm = problem.kernel()
    assert torch.allclose(param, problem.param * (1 - LR * RULE["weight_decay"]), rtol=1e-6, atol=0)
    assert norm.item() == 0 and not first.any()


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)], ids=str)
def test_empty_weight(device, shape):
    param, grad = torch.empty(shape, device=device), torch.empty(shape, device=device)
    moments, count = torch.empty(0, shape[1], device=device), torch.zeros((), device=device)
    ops.low_rank_adamw_step(
        [param],
        [grad],
        [torch.empty(shape[0], 0, device=device)],
        [moments],
        [moments.clone()],
        [count],
        [],
        torch.tensor(LR, device=device),
        None,
        None,
        residual=0,
        **RULE,
        **SUBSPACE,
    )
    assert count.item() == 1


def test_empty_list(device):
    rate = torch.tensor(LR, device=device)
    ops.low_rank_adamw_step(*([] for _ in range(7)), rate, None, None, residual=1, **RULE, **SUBSPACE)


@residuals
@sides
def test_opcheck_low_rank(device, right, residual):
    problem = Problem.make(9, 12, 3, right=right, residual=residual, device=device)
    arguments, keywords = problem.arguments(grad_scale=2.0, found_inf=0.0)
    check_op(ops.low_rank_adamw_step, arguments, keywords)


@pytest.mark.parametrize("residual", ["none", "fira"])
def test_compiles_whole(device, residual):
    problem = Problem.make(18, 24, 4, right=True, residual=residual, device=device)
    expected = problem.kernel()
    arguments, keywords = problem.arguments()

    def step(*tensors):
        ops.low_rank_adamw_step(*tensors, **keywords)
        return tensors[0][0] * 1

    result = compile_whole(step)(*arguments)
    assert torch.equal(result, expected[0])
    for index, value in ((0, expected[0]), (3, expected[1]), (4, expected[2])):
        assert torch.equal(arguments[index][0], value)
    assert arguments[5][0].item() == problem.step + 1


@pytest.mark.parametrize(
    "index, value, message",
    [
        (0, [torch.zeros(3)], r"param\[0\]: expected 2 dimensions"),
        (0, [torch.zeros(9, 24)[:, ::2]], r"param\[0\]: expected unit stride along one axis"),
        (1, [torch.zeros(9, 8)], r"grad\[0\]: expected size 12"),
        (1, [torch.zeros(9, 12, dtype=torch.float64)], r"grad\[0\]: expected [a-z0-9]+, got [a-z0-9]+"),
        (1, [], "grad: expected 1 tensors, got 0"),
        (2, [torch.zeros(12, 3)], r"projector\[0\]: expected size 9"),
        (3, [torch.zeros(3, 12, dtype=torch.bfloat16)], r"exp_avg\[0\]: expected [a-z0-9]+, got [a-z0-9]+"),
        (4, [torch.zeros(12, 3).t()], r"exp_avg_sq\[0\]: expected a contiguous"),
        (5, [torch.zeros((), dtype=torch.int64)], r"step\[0\]: expected [a-z0-9]+, got [a-z0-9]+"),
        (6, [torch.zeros(2)], r"residual_norm\[0\]: expected one element"),
        (7, torch.zeros(2), "lr: expected one element"),
        (8, torch.zeros((), dtype=torch.float64), "grad_scale: expected [a-z0-9]+, got [a-z0-9]+"),
        (9, torch.zeros(2), "found_inf: expected one element"),
    ],
)
def test_op_refuses(device, index, value, message):
    arguments, keywords = Problem.make(9, 12, 3, device=device).arguments()
    value = [tensor.to(device) for tensor in value] if isinstance(value, list) else value.to(device)
    if index == 0 and value[0].dim() == 2:
        value = [torch.zeros(9, 24, device=device)[:, ::2]]  # strides get lost on the way to another device
    elif index == 4:
        value = [torch.zeros(12, 3, device=device).t()]
    changed = [*arguments[:index], value, *arguments[index + 1 :]]
    with pytest.raises(RuntimeError, match=message):
        ops.low_rank_adamw_step(*changed, **keywords)


def test_unknown_residual_is_refused(device):
    arguments, keywords = Problem.make(9, 12, 3, device=device).arguments()
    with pytest.raises(RuntimeError, match="residual: expected 0"):
        ops.low_rank_adamw_step(*arguments, **{**keywords, "residual": 4})
