"""disco_loss against its definition in float64, value and gradient, and against the papers' own value."""

import math

import pytest
import torch

import pykern
from pykern.policy.disco import DISCO_LOSSES, DIVERGENCES, METRICS, NEGATIVES, POSITIVES, SCORES
from pykern.reference import policy_disco as reference
from tests.support import assert_accurate, check_op, compile_whole, threads


def batch(rows=23, columns=31, dtype=torch.float64, *, spread=0.3, groups=5):
    """Ragged groups in no order; one row is masked whole, one reward is neither class, one group lacks a class."""
    mask = torch.rand(rows, columns) < 0.7
    logprobs = -3 * torch.rand(rows, columns, dtype=torch.float64)
    old = logprobs + spread * torch.randn(rows, columns)
    rewards, ids = (torch.rand(rows) < 0.5).double(), torch.randint(-groups, 0, (rows,)) * 1_000_000_007
    if rows > 6:
        mask[1], rewards[2], ids[3], ids[4], ids[5] = False, 0.5, 7, 7, 8
        rewards[3] = rewards[4] = 1
    garbage = torch.tensor([math.nan, math.inf, -math.inf]).double()[torch.randint(0, 3, mask.shape)]
    tensors = (torch.where(mask, logprobs, garbage), torch.where(mask, old, garbage), rewards)
    return *(tensor.to(dtype) for tensor in tensors), ids, mask


def packed(logprobs, old, rewards, ids, mask):
    lengths = mask.sum(dim=1)
    return logprobs[mask], old[mask], rewards, ids, torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


def parts(name: str, columns: int, **changes) -> dict:
    row = DISCO_LOSSES[name]
    names = ("score", "negatives", "positives", "tau", "beta", "delta", "length_temperature")
    return {part: getattr(row, part) for part in names} | {"max_length": columns} | changes


def ours(logprobs, *others, **keywords):
    leaf = logprobs.detach().clone().requires_grad_()
    loss, metrics = pykern.disco_loss(leaf, *others, **keywords)
    loss.backward()
    return loss.detach(), metrics, leaf.grad


def definition(logprobs, old, rewards, ids, **keywords):
    leaf = logprobs.detach().double().requires_grad_()
    loss, metrics = reference.disco_loss(leaf, old.double(), rewards.double(), ids, **keywords)
    (gradient,) = torch.autograd.grad(loss, leaf, allow_unused=True)
    return loss.detach(), metrics, torch.zeros_like(leaf) if gradient is None else gradient


def compare(actual, exact, units=1e3) -> None:
    (loss, metrics, gradient), (exact_loss, exact_metrics, exact_gradient) = actual, exact
    assert_accurate(loss, exact_loss, units=units)
    assert_accurate(gradient, exact_gradient, units=units)
    assert tuple(metrics) == METRICS
    for key, value in metrics.items():
        assert_accurate(value, exact_metrics[key], units=units)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize(
    "dtype, layout", [(torch.float32, "padded"), (torch.float64, "padded"), (torch.float64, "packed")]
)
@pytest.mark.parametrize("name", DISCO_LOSSES)
def test_matches_definition(name, dtype, layout):
    *tensors, mask = batch(dtype=dtype)
    keywords = {"mask": mask}
    if layout == "packed":
        *tensors, cu_seqlens = packed(*tensors, mask)
        keywords = {"cu_seqlens": cu_seqlens}
    actual = ours(*tensors, loss=name, max_length=31, **keywords)
    compare(actual, definition(*tensors, **parts(name, 31), **keywords))
    if layout == "padded":
        assert torch.count_nonzero(actual[2][~mask]) == 0
    assert 0 < actual[1]["mixed_groups"] < actual[1]["groups"]


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("positives", POSITIVES)
@pytest.mark.parametrize("negatives", NEGATIVES)
@pytest.mark.parametrize("score", SCORES)
def test_parts(score, negatives, positives, divergence):
    *tensors, mask = batch()
    numbers = {"tau": 0.3, "beta": 2.0, "delta": 0.01, "length_temperature": 0.5, "max_length": 50.0}
    keywords = dict(score=score, negatives=negatives, positives=positives, divergence=divergence, mask=mask, **numbers)
    compare(ours(*tensors, **keywords), definition(*tensors, **keywords))


@pytest.mark.usefixtures("cpu_level")
@pytest.mark.parametrize("columns", [1, 7, 16, 33, 1100])
@pytest.mark.parametrize("score", SCORES)
def test_every_instruction_set(score, columns):
    *tensors, mask = batch(rows=8, columns=columns, dtype=torch.float32, spread=0.05)
    for keywords in ({"mask": mask}, {"mask": None}):
        if keywords["mask"] is None:
            tensors = [tensor.nan_to_num(-1.0, -1.0, -1.0) for tensor in tensors[:2]] + tensors[2:]
        for divergence in DIVERGENCES:
            changes = {"score": score, "tau": 0.7, "divergence": divergence, **keywords}
            exact = definition(*tensors, **parts("disco", columns, **changes))
            compare(ours(*tensors, **changes), exact)


@pytest.mark.parametrize("positives", POSITIVES)
@pytest.mark.parametrize("negatives", NEGATIVES)
@pytest.mark.parametrize("score", SCORES)
def test_gradcheck(score, negatives, positives):
    logprobs, old, rewards, ids, mask = batch(rows=7, columns=4, groups=1)
    logprobs, old = logprobs.nan_to_num(0, 0, 0).requires_grad_(), old.nan_to_num(0, 0, 0)
    keywords = {"score": score, "negatives": negatives, "positives": positives, "tau": 0.5, "beta": 3.0, "mask": mask}
    call = lambda logprobs: pykern.disco_loss(logprobs, old, rewards, ids, **keywords)  # noqa: E731
    metrics = call(logprobs)[1]
    assert metrics["mixed_groups"] > 0 and metrics["constraint_violated"] == 1
    assert torch.autograd.gradcheck(lambda logprobs: call(logprobs)[0], logprobs)


def as_published(logprobs, old, rewards, ids, name):
    """The papers' value, of groups of one size and without a mask."""
    row = DISCO_LOSSES[name]
    d = logprobs - old
    kl = (d.exp() - d - 1).mean()
    value = 0.0
    for group in ids.unique():
        members = ids == group
        scores = (d.exp() if row.score == "ratio" else logprobs)[members].mean(1)
        right, wrong = scores[rewards[members] == 1], scores[rewards[members] == 0]
        if len(right) and len(wrong):
            mass = ((wrong - wrong.max()) / row.tau).exp().sum()
            baseline = wrong.mean() if row.negatives == "mean" else row.tau * mass / (mass + torch.finfo(d.dtype).eps)
            value += right.mean() - baseline
    return -value / len(ids.unique()) + 1e3 * (kl - 1e-4).clamp(min=0) * kl


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", DISCO_LOSSES)
def test_published_value_has_the_same_gradient(name, dtype):
    logprobs = -torch.rand(12, 9).to(dtype)
    old, rewards = logprobs + 0.05 * torch.randn(12, 9).to(dtype), (torch.rand(12) < 0.5).to(dtype)
    tensors = (logprobs, old, rewards, torch.arange(12) % 3)
    true, published = ours(*tensors, loss=name), ours(*tensors, loss=name, published=True)
    # Lengths are equal here, so their weights are uniform.
    assert_accurate(published[0], as_published(*(tensor.double() for tensor in tensors), name), units=200.0)
    assert torch.equal(true[2], published[2]) and true[0] != published[0]


@pytest.mark.usefixtures("everywhere")
def test_penalty_holds_back_only_beyond_its_bound():
    logprobs = -torch.rand(4, 5, dtype=torch.float64)
    rewards, ids = torch.zeros(4, dtype=torch.float64), torch.arange(4)
    loss, metrics, gradient = ours(logprobs, logprobs + 0.1, rewards, ids)
    kl = math.exp(-0.1) + 0.1 - 1
    torch.testing.assert_close(loss.item(), 500 * (kl - 1e-4) ** 2)
    expected = 1e3 * (kl - 1e-4) * (math.exp(-0.1) - 1) / 20
    torch.testing.assert_close(gradient, torch.full_like(gradient, expected))
    assert metrics["constraint_violated"] == 1
    loss, metrics, gradient = ours(logprobs, logprobs + 0.01, rewards, ids)
    assert loss == 0 and torch.count_nonzero(gradient) == 0 and metrics["constraint_violated"] == 0


@pytest.mark.usefixtures("everywhere")
def test_closed_form():
    logprobs = torch.tensor([[-1.0, -1.0], [-2.0, -4.0], [-1.0, -1.0], [-5.0, -5.0]], dtype=torch.float64)
    rewards, ids = torch.tensor([1.0, 0.0, 0.0, 1.0]), torch.tensor([5, 5, 5, 9])
    loss, metrics, gradient = ours(logprobs, None, rewards, ids, loss="disco", tau=2.0)
    partition = (math.exp(-3 / 2) + math.exp(-1 / 2)) / 2
    torch.testing.assert_close(loss.item(), -(-1 - 2 * math.log(partition)) / 2)
    shares = [1.0, -math.exp(-3 / 2) / 2 / partition, -math.exp(-1 / 2) / 2 / partition, 0.0]
    torch.testing.assert_close(gradient, -torch.tensor(shares, dtype=torch.float64)[:, None].expand(4, 2) / 4)
    assert (metrics["groups"], metrics["mixed_groups"], metrics["positive_score"]) == (2, 1, -3)


@pytest.mark.usefixtures("everywhere")
def test_scores_far_apart_do_not_overflow():
    logprobs = torch.tensor([[-1.0], [-900.0], [-2000.0]], dtype=torch.float64)
    loss, _, gradient = ours(logprobs, None, torch.tensor([1.0, 0.0, 0.0]), torch.zeros(3, dtype=torch.int64), tau=0.5)
    torch.testing.assert_close(loss.item(), 1 - 900 - 0.5 * math.log(2))
    assert gradient.flatten().tolist() == [-1.0, 1.0, 0.0]


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("rows, columns", [(0, 4), (1, 0), (3, 0), (1, 1), (2, 1), (600, 1), (2, 700)])
def test_sizes(rows, columns):
    logprobs = -torch.rand(rows, columns, dtype=torch.float64)
    old = logprobs + 0.1 * torch.randn(rows, columns)
    rewards, ids = (torch.arange(rows) % 2).double(), torch.arange(rows) // 2 % 40
    actual = ours(logprobs, old, rewards, ids, loss="drpo")
    compare(actual, definition(logprobs, old, rewards, ids, **parts("drpo", max(columns, 1))), units=1e4)


@pytest.mark.usefixtures("everywhere")
def test_permutation_moves_the_gradient_along():
    *tensors, mask = batch()
    order = torch.randperm(len(mask))
    straight = ours(*tensors, mask=mask, loss="drpo")
    moved = ours(*(tensor[order] for tensor in tensors), mask=mask[order], loss="drpo")
    torch.testing.assert_close(moved[2], straight[2][order], rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(moved[0], straight[0], rtol=1e-10, atol=1e-14)


@pytest.mark.usefixtures("everywhere")
def test_a_nan_shows():
    *tensors, mask = batch()
    tensors[0][0, mask[0].nonzero()[0]] = math.nan
    assert ours(*tensors, mask=mask)[0].isnan()


@pytest.mark.usefixtures("everywhere")
def test_types_strides_repeats_and_threads_agree():
    *tensors, mask = batch(dtype=torch.float32)
    straight = ours(*tensors, mask=mask)
    turned = [tensor.t().contiguous().t() for tensor in tensors[:2]]
    with threads(1):
        single = ours(*tensors, mask=mask)
    others = (ours(*turned, *tensors[2:], mask=mask.to(torch.int64).t().contiguous().t()), single)
    for other in (*others, ours(*tensors, mask=mask)):
        assert torch.equal(straight[0], other[0]) and torch.equal(straight[2], other[2])
    leaf = tensors[0].bfloat16().requires_grad_()
    loss, _ = pykern.disco_loss(leaf, *tensors[1:], mask=mask)
    (3 * loss).backward()
    assert leaf.grad.dtype == torch.bfloat16 and torch.count_nonzero(leaf.grad) > 0
    without, _ = pykern.disco_loss(leaf.detach(), *tensors[1:], mask=mask)
    assert torch.equal(without, loss.detach())


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("with_gradient", [False, True])
def test_opcheck(with_gradient):
    logprobs, old, rewards, ids, mask = batch()
    logprobs, old = logprobs.nan_to_num(0, 0, 0), old.nan_to_num(0, 0, 0)
    settings = [10.0, 1e3, 1e-4, 0.1, 31.0]
    op = torch.ops.pykern.disco_loss_forward.default
    check_op(op, (logprobs, old, rewards, ids, mask, None, 0, 0, 1, 0, False, settings, with_gradient))
    *tensors, cu_seqlens = packed(logprobs, old, rewards, ids, mask)
    check_op(op, (*tensors, None, cu_seqlens, 1, 1, 0, 1, True, settings, with_gradient))


@pytest.mark.usefixtures("everywhere")
def test_compiles_whole():
    logprobs, old, rewards, ids, mask = batch()

    def step(logprobs):
        loss, metrics = pykern.disco_loss(logprobs, old, rewards, ids, mask=mask)
        return loss, metrics["kl"]

    results = []
    for function in (step, compile_whole(step)):
        leaf = logprobs.clone().requires_grad_()
        loss, kl = function(leaf)
        loss.backward()
        results.append((loss.detach(), kl, leaf.grad))
    assert all(torch.equal(direct, compiled) for direct, compiled in zip(*results))


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"logprobs": [1.0]}, TypeError, "logprobs: .* got list"),
        ({"logprobs": torch.zeros(6)}, ValueError, r"logprobs: expected \[B, T\], got \[6\]"),
        ({"old_logprobs": torch.zeros(2, 4)}, ValueError, r"old_logprobs: .* got \[2, 4\]"),
        ({"rewards": torch.zeros(3)}, ValueError, r"rewards: expected one per sequence, \[2\], got \[3\]"),
        ({"rewards": torch.zeros(2, dtype=torch.int64)}, TypeError, "rewards: .* got torch.int64"),
        ({"group_ids": torch.zeros(2)}, TypeError, "group_ids: .* got torch.float32"),
        ({"mask": torch.zeros(3)}, ValueError, r"mask: .* got \[3\]"),
        ({"cu_seqlens": torch.zeros(3)}, TypeError, "cu_seqlens: .* got torch.float32"),
        ({"cu_seqlens": torch.zeros(3, dtype=torch.int64)}, ValueError, "cu_seqlens: .* take a mask instead"),
        ({"loss": "disc"}, ValueError, "loss: expected one of disco, .* got 'disc'"),
        ({"score": "mean"}, ValueError, "score: .* got 'mean'"),
        ({"negatives": "max"}, ValueError, "negatives: .* got 'max'"),
        ({"positives": "max"}, ValueError, "positives: .* got 'max'"),
        ({"divergence": "k2"}, ValueError, "divergence: .* got 'k2'"),
        ({"tau": 0.0}, ValueError, "tau: .* got 0.0"),
        ({"length_temperature": -1.0}, ValueError, "length_temperature: .* got -1.0"),
        ({"beta": -1.0}, ValueError, "beta: .* got -1.0"),
        ({"delta": -1.0}, ValueError, "delta: .* got -1.0"),
        ({"max_length": 0}, ValueError, "max_length: .* got 0"),
    ],
)
def test_refuses(change, error, message):
    zeros, ids = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    named = {"logprobs": zeros, "old_logprobs": zeros, "rewards": torch.zeros(2), "group_ids": ids} | change
    positional = [named.pop(name) for name in ("logprobs", "old_logprobs", "rewards", "group_ids")]
    with pytest.raises(error, match=message):
        pykern.disco_loss(*positional, **named)


def test_packed_lengths_need_their_bound():
    tokens, rewards, bounds = torch.zeros(6), torch.zeros(2), torch.tensor([0, 2, 6])
    with pytest.raises(ValueError, match="max_length: positives='length' of packed sequences needs"):
        pykern.disco_loss(tokens, tokens, rewards, bounds[:2], cu_seqlens=bounds, loss="drpo")
