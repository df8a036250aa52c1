"""linear_token_logprobs over an output head whose vocabulary is split across processes, against one process."""

import pytest
import torch
from torch import distributed

import pykern
from pykern.reference import policy_logprobs as reference
from tests.policy.test_linear_token_logprobs import make, run
from tests.support import assert_accurate
from tests.support_distributed import run_processes

EVERYTHING = {"temperature": 0.8, "softcap": 2.0, "entropy": True}
CASES = {
    "plain": (torch.float32, False, {}),
    "everything": (torch.float32, True, EVERYTHING),
    "bfloat16": (torch.bfloat16, True, EVERYTHING),
    "per token": (torch.float32, True, {"temperature": torch.linspace(0.3, 3.0, 70), "entropy": True}),
    "float64": (torch.float64, True, EVERYTHING),
    "float64, masked": (torch.float64, True, {"entropy": True}),
}
# Shards of one size first: they need no vocabulary_start.
SIZES = {2: ([203, 203], [1, 405]), 4: ([100, 100, 100, 100], [211, 0, 5, 190])}


def inputs(name, sizes):
    """The whole head, and targets on both sides of each border between shards."""
    torch.manual_seed(1)
    dtype, with_bias, keywords = CASES[name]
    hidden, weight, targets, bias = make(70, 40, sum(sizes), dtype, bias=with_bias)
    borders = torch.tensor([0, *sizes]).cumsum(0)
    targets[: 2 * len(sizes)] = torch.cat((borders[:-1], borders[1:] - 1)).clamp(min=0)
    targets[-9::3] = -100
    if "masked" in name:
        bias[: sizes[0]] = -torch.inf
        targets[targets >= 0] = targets[targets >= 0].clamp(min=sizes[0])
        targets[5] = 0
    return hidden, weight, targets, bias, [torch.randn(70) for _ in range(2)], keywords


def shards_of_one_process(sizes_of_all):
    rank, group = distributed.get_rank(), distributed.group.WORLD
    found = []
    for sizes in sizes_of_all:
        start = sum(sizes[:rank])
        shard = slice(start, start + sizes[rank])
        place = {} if len(set(sizes)) == 1 else {"vocabulary_start": start}
        for name in CASES:
            hidden, weight, targets, bias, weights, keywords = inputs(name, sizes)
            bias = None if bias is None else bias[shard]
            given = (hidden, weight[shard], targets, bias, weights)
            found.append(run(pykern.linear_token_logprobs, *given, process_group=group, **place, **keywords))
    return found, refusals(rank, group), policy_loss(shard, process_group=group, **place)


def policy_loss(shard, **keywords):
    """Loss and gradients of linear_policy_loss with this shard of the last head."""
    hidden, weight, targets, _, weights, _ = inputs("plain", (406,))
    hidden, weight = hidden.view(7, 10, 40).requires_grad_(), weight[shard].requires_grad_()
    loss, metrics = pykern.linear_policy_loss(
        hidden, weight, targets.view(7, 10), weights[0].view(7, 10) - 6, weights[1][:7], **keywords
    )
    loss.backward()
    return loss.detach(), hidden.grad, weight.grad


def refusals(rank, group):
    """Messages of calls that every process refuses, or None for one that it let pass."""
    messages = []
    for entries, keywords, target in ((5, {"vocabulary_start": 6 * rank}, 0), (5 + rank, {}, 0), (5, {}, 99)):
        try:
            pykern.linear_token_logprobs(
                torch.zeros(1, 3), torch.zeros(entries, 3), torch.tensor([target]), process_group=group, **keywords
            )
            messages.append(None)
        except ValueError as error:
            messages.append(str(error))
    return messages


@pytest.fixture(scope="module", params=sorted(SIZES))
def processes(request):
    return request.param, run_processes(request.param, shards_of_one_process, SIZES[request.param])


def test_shards_match_one_process(processes):
    count, found = processes
    for case, (sizes, name) in enumerate((sizes, name) for sizes in SIZES[count] for name in CASES):
        *given, keywords = inputs(name, sizes)
        exact, exact_grads = run(reference.linear_token_logprobs, *given, dtype=torch.float64, **keywords)
        eager, eager_grads = run(reference.linear_token_logprobs, *given, **keywords)
        ranks = [results[case] for results, *_ in found]
        # In bfloat16 each shard rounds its part of a gradient; in float64 torch's own error counts as none.
        units = 16 if CASES[name][0] == torch.float64 else 4
        for rank in range(count):
            for result, want, other, first in zip(ranks[rank][0], exact, eager, ranks[0][0]):
                assert_accurate(result, want, other, units=units)
                assert torch.equal(result.nan_to_num(), first.nan_to_num()), "other bits than in the first process"
            assert torch.equal(ranks[rank][1][0], ranks[0][1][0]), "other bits than in the first process"
        whole = [torch.cat([grads[leaf] for _, grads in ranks]) for leaf in range(1, len(exact_grads))]
        for grad, want, other in zip([ranks[0][1][0], *whole], exact_grads, eager_grads):
            assert grad.shape == want.shape and grad.dtype == other.dtype
            assert_accurate(grad, want, other, units=units)


def test_refused_by_every_process(processes):
    count, found = processes
    gap, unequal, outside = found[0][1]
    assert "expected shards that follow each other from 0 on in the order of the ranks, got [0, 5), [6, 11)" in gap
    assert "got [0, 5), [6, 12)" in unequal and "pass vocabulary_start where the shards differ in size" in unequal
    assert f"targets: expected values below the vocabulary size {5 * count}, got 99" in outside
    assert all(messages == found[0][1] for _, messages, _ in found)


def test_policy_loss_of_shards(processes):
    loss, grad_hidden, grad_weight = policy_loss(slice(0, 406))
    shards = [result for *_, result in processes[1]]
    for other_loss, other_grad_hidden, _ in shards:
        assert_accurate(other_loss, loss.double(), units=8)
        assert_accurate(other_grad_hidden, grad_hidden.double(), units=8)
    assert_accurate(torch.cat([grad for *_, grad in shards]), grad_weight.double(), units=8)


@pytest.mark.parametrize(
    "keywords, error, message",
    [
        ({"process_group": "world"}, TypeError, "process_group: expected a torch.distributed.ProcessGroup or None"),
        ({"vocabulary_start": 4}, ValueError, "vocabulary_start: expected None without a process_group, got 4"),
    ],
)
def test_refuses(keywords, error, message):
    with pytest.raises(error, match=message):
        pykern.linear_token_logprobs(torch.zeros(1, 3), torch.zeros(4, 3), torch.tensor([0]), **keywords)


def test_compiled_code_marks_a_target_past_the_vocabulary():
    hidden, weight, targets, _ = make(5, 8, 20)
    targets[2] = 20
    hidden.requires_grad_()
    torch._dynamo.reset()
    compiled = torch.compile(pykern.linear_token_logprobs, fullgraph=True, backend="aot_eager")
    logprobs = compiled(hidden, weight, targets)
    logprobs.sum().backward()
    assert logprobs.isnan().tolist() == [False, False, True, False, False]
    assert hidden.grad.isnan().all(1).tolist() == [False, False, True, False, False]
