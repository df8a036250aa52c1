"""The step kernels against their definition in float64."""

import pytest
import torch

from pykern.lowrank import ops
from pykern.reference import lowrank as reference
from tests.lowrank.problems import LR, RULE, Problem
from tests.support import assert_accurate, check_op, compile_whole, poison, threads

SIZES = [(1, 1, 1), (5, 3, 1), (3, 5, 3), (64, 64, 16), (70, 45, 7), (45, 70, 45), (130, 600, 33), (530, 97, 64)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def hold(problem: Problem, **rule) -> None:
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
        assert norm.item() == pytest.approx(exact[3], rel=1e-5, abs=10 * slack)


@pytest.mark.parametrize("fira", [False, True], ids=["galore", "fira"])
@pytest.mark.parametrize("right", [True, False], ids=["right", "left"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_step_matches_the_definition(dtype, size, right, fira):
    rows, columns, rank = size
    rank = min(rank, columns if right else rows)
    hold(Problem.make(rows, columns, rank, right=right, dtype=dtype, fira=fira))


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
def test_every_rule(dtype, rule, right):
    hold(Problem.make(60, 50, 9, right=right, dtype=dtype, fira=True, norm=1.0), **rule)


@pytest.mark.parametrize("right", [True, False], ids=["right", "left"])
@pytest.mark.parametrize("norm", [-1.0, 0.0, 0.01, 1e9], ids=["first", "zero", "limited", "free"])
@pytest.mark.parametrize("scaled", [False, True], ids=["corrected", "fira package"])
def test_residual_limiter(norm, scaled, right):
    hold(Problem.make(40, 30, 5, right=right, fira=True, norm=norm), scaled_residual=scaled)


@pytest.mark.parametrize("right", [True, False], ids=["right", "left"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_residual_norm_is_exact_for_any_projector(dtype, right):
    problem = Problem.make(80, 90, 12, right=right, dtype=dtype, fira=True, orthonormal=False)
    _, _, _, norm = problem.kernel()
    assert norm.item() == pytest.approx(problem.defined()[3], rel=2e-3 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("fira", [False, True], ids=["galore", "fira"])
@pytest.mark.parametrize("right", [True, False], ids=["right", "left"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_rows_with_gaps_are_neither_read_nor_written(dtype, right, fira):
    problem = Problem.make(37, 51, 6, right=right, dtype=dtype, fira=fira)
    expected = problem.kernel()[0]
    gapped = poison(torch.empty(37, 60, dtype=dtype))
    gradient = poison(torch.empty(37, 64, dtype=dtype))
    gapped[:, :51] = problem.param
    gradient[:, :51] = problem.grad
    problem.grad = gradient[:, :51]
    norm = None if problem.residual_norm is None else problem.residual_norm.clone()
    problem.run(gapped[:, :51], problem.exp_avg.clone(), problem.exp_avg_sq.clone(), norm)
    assert torch.equal(gapped[:, :51], expected)
    assert gapped[:, 51:].isnan().all()


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
def test_nan_stays_on_its_line_without_residual(right):
    problem = Problem.make(33, 44, 5, right=right)
    clean = problem.kernel()[0]
    problem.grad[7, 9] = float("nan")
    param, first, _, _ = problem.kernel()
    hit = torch.zeros(33, 44, dtype=torch.bool)
    if right:
        hit[7] = True
        assert first[7].isnan().all()
    else:
        hit[:, 9] = True
        assert first[:, 9].isnan().all()
    assert param[hit].isnan().all()
    assert torch.equal(param[~hit], clean[~hit])


def test_zero_projector_leaves_decay_alone():
    problem = Problem.make(20, 10, 3, right=True, fira=True)
    problem.projector.zero_()
    problem.exp_avg.zero_()
    param, first, _, norm = problem.kernel()
    assert torch.allclose(param, problem.param * (1 - LR * RULE["weight_decay"]), rtol=1e-6, atol=0)
    assert norm.item() == 0 and not first.any()


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)], ids=str)
def test_empty_weight(shape):
    problem = Problem.make(4, 4, 0, right=True)
    param, grad = torch.empty(shape), torch.empty(shape)
    moments = torch.empty(shape[0], 0)
    ops.low_rank_adam_step(
        param,
        grad,
        torch.empty(shape[1], 0),
        moments,
        moments.clone(),
        torch.zeros(()),
        None,
        torch.tensor(LR),
        right=problem.right,
        **RULE,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 15, 1000, 40000])
def test_plain_adam_matches_the_definition(dtype, size, cpu_level):
    moments = torch.float64 if dtype == torch.float64 else torch.float32
    param, grad = torch.randn(size).to(dtype), torch.randn(size).to(dtype)
    first, second = torch.randn(size).to(dtype).to(moments), torch.rand(size).add(0.5).to(dtype).to(moments)
    rule = {name: value for name, value in RULE.items() if name not in ("scale", "scaled_residual")}
    exact = reference.adam_step(param.double(), grad.double(), first.double(), second.double(), 1, lr=LR, **rule)
    own = reference.adam_step(param, grad, first.to(dtype), second.to(dtype), 1, lr=LR, **rule)
    ops.adam_step(param, grad, first, second, torch.zeros(()), torch.tensor(LR, dtype=torch.float64), **rule)
    assert_accurate(param, exact[0], own[0])
    assert_accurate(first, exact[1], own[1].to(moments))
    assert_accurate(second, exact[2], own[2].to(moments))


@pytest.mark.parametrize("fira", [False, True], ids=["galore", "fira"])
@pytest.mark.parametrize("right", [True, False], ids=["right", "left"])
def test_opcheck_low_rank(right, fira):
    arguments, keywords = Problem.make(12, 9, 3, right=right, fira=fira).arguments()
    check_op(ops.low_rank_adam_step, arguments, keywords)


def test_opcheck_plain():
    rule = {name: value for name, value in RULE.items() if name not in ("scale", "scaled_residual")}
    tensors = [torch.randn(9), torch.randn(9), torch.randn(9), torch.rand(9), torch.zeros(()), torch.tensor(LR)]
    check_op(ops.adam_step, tuple(tensors), rule)


@pytest.mark.parametrize("fira", [False, True], ids=["galore", "fira"])
def test_compiles_whole(fira):
    problem = Problem.make(24, 18, 4, right=True, fira=fira)
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
        (7, torch.zeros(2), "lr: expected one element"),
    ],
)
def test_op_refuses(index, value, message):
    arguments, keywords = Problem.make(12, 9, 3, right=True).arguments()
    changed = [*arguments[:index], value, *arguments[index + 1 :]]
    with pytest.raises(RuntimeError, match=message):
        ops.low_rank_adam_step(*changed, **keywords)
