"""LowRankOptimizer(process_group=...): local gradients in, the low-rank ones averaged; against one process."""

import pytest
import torch
from torch import distributed

import pykern
from tests.support_distributed import run_processes

SHAPES = [(24, 16), (16, 40), (6, 2, 3, 3), (5,)]
RANK, GAP, STEPS = 3, 3, 7
CASES = {
    "galore": {},
    "right": {"side": "right", "maximize": True},
    "bfloat16 states": {"state_dtype": "bfloat16"},
    "fira": {"residual": "fira"},
    "apollo": {"residual": "apollo_channel"},
    "feedback": {"residual": "error_feedback"},
    "two sides": {"side": "full", "projector": "random_orthonormal"},
}


def parameters():
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def gradients(step, process):
    generator = torch.Generator().manual_seed(100 * step + process)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def make(params, **options):
    return pykern.LowRankOptimizer(params, 0.01, **{"rank": RANK, "refresh_every": GAP, "weight_decay": 0.1, **options})


def on_one_process():
    """Every case with `process_group`; per step the bytes that all_reduce and broadcast were given."""
    process, group = distributed.get_rank(), distributed.group.WORLD
    sent = [0]

    def counting(collective):
        def counted(tensor, *arguments, **keywords):
            sent[0] += tensor.numel() * tensor.element_size()
            return collective(tensor, *arguments, **keywords)

        return counted

    distributed.all_reduce = counting(distributed.all_reduce)
    distributed.broadcast = counting(distributed.broadcast)
    results = {}
    for name, options in CASES.items():
        params = parameters()
        # What is drawn is the first process's.
        optimizer = make(params, process_group=group, seed=process, **options)
        traffic = []
        for step in range(STEPS):
            for param, grad in zip(params, gradients(step, process), strict=True):
                param.grad = grad
            sent[0] = 0
            optimizer.step()
            traffic.append(sent[0])
        bases = [state["projector"] for state in optimizer.state.values() if "projector" in state]
        results[name] = [param.detach() for param in params], bases, traffic
    results["overflow"] = overflow(process, group)
    results["backward"] = accumulated_in_backward(process, group)
    results["ddp"] = under_ddp(process, group)
    results["refused"] = refused(group)
    return results


def overflow(process, group):
    """The steps done after an overflow in the last process only."""
    params = parameters()
    optimizer = make(params, process_group=group)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    for step in range(2):
        for param, grad in zip(params, gradients(step, process), strict=True):
            param.grad = grad * scaler.get_scale()
        if step == 0 and process == distributed.get_world_size() - 1:
            params[0].grad[0, 0] = float("inf")
        scaler.unscale_(optimizer)
        # torch leaves the step out only where it sees the overflow itself, which would leave the others waiting.
        scaler.step(optimizer)
        scaler.update()
    return int(optimizer.state[params[0]]["step"]), [param.detach() for param in params]


def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 12), torch.nn.Tanh(), torch.nn.Linear(12, 8))


def loss_of(net, step, process):
    return net(torch.randn(5, 8, generator=torch.Generator().manual_seed(100 * step + process))).square().mean()


def accumulated_in_backward(process, group):
    net = model()
    pykern.step_in_backward(net, lambda params: make(params, process_group=group), accumulate=2)
    for step in range(8):
        (loss_of(net, step, process) / 2).backward()
    return [param.detach() for param in net.parameters()]


def under_ddp(process, group):
    net = model()
    wrapped = torch.nn.parallel.DistributedDataParallel(net)
    optimizer = make(list(net.parameters()), process_group=group)
    for step in range(4):
        optimizer.zero_grad()
        with wrapped.no_sync():
            loss_of(wrapped, step, process).backward()
        optimizer.step()
    return [param.detach() for param in net.parameters()]


def refused(group):
    """The messages of what process groups exclude."""
    params = parameters()
    optimizer = make(params, process_group=group)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.grad_scale, optimizer.found_inf = torch.ones(()), torch.zeros(())
    messages = []
    for call in (optimizer.step, optimizer.__getstate__):
        try:
            call()
        except (RuntimeError, TypeError) as error:
            messages.append(str(error))
    return messages


@pytest.fixture(scope="module")
def results():
    return run_processes(2, on_one_process)


def assert_close(ours, theirs, tolerance=2e-6):
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def mean_gradients(step, count):
    return [torch.stack(parts).mean(0) for parts in zip(*(gradients(step, process) for process in range(count)))]


@pytest.mark.parametrize("name", CASES)
def test_as_one_process_with_the_mean_of_the_gradients(results, name):
    params = parameters()
    optimizer = make(params, **CASES[name])
    for step in range(STEPS):
        for param, grad in zip(params, mean_gradients(step, len(results)), strict=True):
            param.grad = grad
        optimizer.step()
    weights, bases, _ = results[0][name]
    assert_close(weights, [param.detach() for param in params], 1e-4 if name == "bfloat16 states" else 2e-6)
    for others, other_bases, _ in (result[name] for result in results[1:]):
        assert all(map(torch.equal, weights, others)) and all(map(torch.equal, bases, other_bases))


def test_bytes_between_refreshes_are_those_of_the_low_rank_gradients(results):
    matrices = [(24, 16), (16, 40), (6, 18)]
    whole, plain = 4 * sum(rows * columns for rows, columns in matrices), 4 * 5
    low = 4 * sum(RANK * max(shape) for shape in matrices)
    bases = 4 * sum(RANK * min(shape) for shape in matrices)
    for result in results:
        for step, sent in enumerate(result["galore"][2]):
            assert sent == plain + (whole + bases if step % GAP == 0 else low)
        for step, sent in enumerate(result["fira"][2]):
            assert sent == plain + whole + (bases if step % GAP == 0 else 0)


def test_an_overflow_anywhere_skips_the_step_everywhere(results):
    for steps, weights in (result["overflow"] for result in results):
        assert steps == 1
        assert all(map(torch.equal, weights, results[0]["overflow"][1]))


def reference_steps(accumulate, count, steps):
    net = model()
    optimizer = make(list(net.parameters()))
    for step in range(steps):
        for process in range(count):
            (loss_of(net, step, process) / accumulate / count).backward()
        if (step + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
    return [param.detach() for param in net.parameters()]


@pytest.mark.parametrize("name, accumulate, steps", [("backward", 2, 8), ("ddp", 1, 4)])
def test_steps_in_the_backward_pass_and_under_ddp(results, name, accumulate, steps):
    expected = reference_steps(accumulate, len(results), steps)
    for result in results:
        assert_close(result[name], expected, 1e-5)
        assert all(map(torch.equal, result[name], results[0][name]))


def test_refused_uses(results):
    amp, pickled = results[0]["refused"]
    assert "scaler.unscale_(optimizer)" in amp and "save state_dict()" in pickled
