"""What only a GPU has: steps that the host does not wait for, graphs, and states that change devices."""

from functools import partial

import pytest
import torch

import pykern
from tests.lowrank.test_optimizer import OPTIMIZERS, matrix, run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

STEPS = {
    "galore": pykern.GaLoreAdamW,
    "fira": pykern.FiraAdamW,
    "apollo": pykern.ApolloAdamW,
    "apollo_mini": pykern.ApolloMini,
    "adabelief, 8-bit": partial(pykern.LowRankOptimizer, rule="adabelief", state_dtype="8bit"),
    "lion, sign, stochastic": partial(pykern.LowRankOptimizer, rule="lion", residual="sign", rounding="stochastic"),
    "momentum, bfloat16, kahan": partial(
        pykern.LowRankOptimizer, rule="momentum", state_dtype="bfloat16", rounding="kahan"
    ),
}
"""Steps that take every op of the family: the fused one, and the parts."""

every_step = pytest.mark.parametrize("make", STEPS.values(), ids=STEPS)


def gradients(params, seed):
    generator = torch.Generator(device="cuda").manual_seed(seed)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator, device="cuda", dtype=param.dtype)


@every_step
@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float", "tensor"])
def test_steps_between_refreshes_wait_for_nothing(make, tensor_lr):
    params = [matrix(256, 128, torch.bfloat16, device="cuda"), torch.nn.Parameter(torch.ones(77, device="cuda"))]
    lr = torch.tensor(0.01, device="cuda") if tensor_lr else 0.01
    optimizer = make(params, lr, rank=16, refresh_every=100)
    run(optimizer, params, 1)
    gradients(params, 0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(state["step"].item() == 4 for state in optimizer.state.values())


# The vendor's products, our kernels for all architectures, and those that 9.0 has from a rank of 65 on.
@pytest.mark.parametrize(
    "dtype, rank", [(torch.float32, 8), (torch.bfloat16, 8), (torch.bfloat16, 72)], ids=["float32", "narrow", "wide"]
)
@every_step
def test_graph_replays_count_their_steps(make, dtype, rank):
    ours, other = (matrix(128, 80, dtype, device="cuda") for _ in range(2))
    lr = torch.tensor(0.01, dtype=torch.float64, device="cuda")
    optimizer, eager = (make([param], lr.clone(), rank=rank, refresh_every=100) for param in (ours, other))
    for one, param in ((optimizer, ours), (eager, other)):
        run(one, [param], 2)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    optimizer.param_groups[0]["lr"].fill_(0.02)
    eager.param_groups[0]["lr"].fill_(0.02)
    for _ in range(5):
        graph.replay()
        eager.step()
    assert optimizer.state[ours]["step"].item() == 7
    assert torch.equal(ours, other)
    run(optimizer, [ours], 1, first=9)
    run(eager, [other], 1, first=9)
    assert torch.equal(ours, other)


@every_step
def test_a_replay_reads_what_the_scaler_found(make):
    """found_inf and the scale lie on the device: a captured step sees what they are when it runs."""
    ours, other = (matrix(128, 64, device="cuda") for _ in range(2))
    optimizer, plain = (make([param], 0.01, rank=8, refresh_every=100) for param in (ours, other))
    for one, param in ((optimizer, ours), (plain, other)):
        run(one, [param], 2)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0, device="cuda"), torch.zeros(1, device="cuda")
    ours.grad.mul_(4)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    graph.replay()
    plain.step()
    torch.testing.assert_close(ours, other)
    before = {name: value.clone() for name, value in optimizer.state[ours].items()}
    optimizer.found_inf.fill_(1)
    weight = ours.detach().clone()
    graph.replay()
    assert torch.equal(ours, weight)
    assert all(torch.equal(value, before[name]) for name, value in optimizer.state[ours].items())


def test_graph_before_the_first_step_is_refused():
    param = matrix(device="cuda")
    param.grad = torch.ones_like(param)
    optimizer = pykern.GaLoreAdamW([param], 0.01, rank=4)
    with pytest.raises(RuntimeError, match="take one step before capturing"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()


def test_refresh_after_replays_reads_the_count_from_the_device():
    param = matrix(device="cuda")
    optimizer = pykern.GaLoreAdamW([param], 0.01, rank=4, refresh_every=4)
    run(optimizer, [param], 1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for _ in range(3):
        graph.replay()
    assert optimizer.state[param]["step"].item() == 4
    run(optimizer, [param], 1)
    assert optimizer.state[param]["next_refresh"].item() == 8


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_state_moves_from_the_cpu(make):
    ours = matrix()
    optimizer = make([ours], 0.01, rank=4)
    run(optimizer, [ours], 3)
    moved = torch.nn.Parameter(ours.detach().cuda())
    other = make([moved], 0.01, rank=4)
    other.load_state_dict(optimizer.state_dict())
    run(optimizer, [ours], 2, first=3)
    run(other, [moved], 2, first=3)
    torch.testing.assert_close(moved.cpu(), ours, rtol=1e-5, atol=1e-6)


def test_rate_on_another_device_is_refused():
    with pytest.raises(ValueError, match="lr: expected a float, or a tensor on cuda:0"):
        pykern.GaLoreAdamW([matrix(device="cuda")], torch.tensor(0.1), rank=4)


def test_a_step_takes_the_rate_that_checkpoints_put_on_the_cpu():
    param, other = (matrix(device="cuda") for _ in range(2))
    optimizer = pykern.GaLoreAdamW([param], torch.tensor(0.1, device="cuda"), rank=4)
    optimizer.param_groups[0]["lr"] = torch.tensor(0.25)
    run(optimizer, [param], 1)
    run(pykern.GaLoreAdamW([other], 0.25, rank=4), [other], 1)
    assert torch.equal(param, other)


def test_another_stream():
    ours, other = (matrix(512, 256, device="cuda") for _ in range(2))
    for param, stream in ((ours, None), (other, torch.cuda.Stream())):
        optimizer = pykern.FiraAdamW([param], 0.01, rank=16)
        gradients([param], 1)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            for _ in range(3):
                optimizer.step()
        torch.cuda.synchronize()
    assert torch.equal(ours, other)
