"""step_in_backward: accumulated low-rank gradients, clipping, learning rates, checkpoints in the midst of a window."""

import copy
import io

import pytest
import torch
from torch import nn

import pykern
from tests.lowrank.test_groups_and_backward import Tiny, batches, loss_of


def make(params, kind=pykern.GaLoreAdamW, **options):
    return kind(params, **{"lr": 0.01, "rank": 3, "refresh_every": 3, "weight_decay": 0.1, **options})


def pair():
    torch.manual_seed(1)
    one, other = Tiny(), Tiny()
    other.load_state_dict(one.state_dict())
    return one, other


def assert_close(one, other):
    for (name, mine), theirs in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6, msg=name)


def low_rank(param):
    return param.dim() == 2


@pytest.mark.parametrize("options", [{}, {"maximize": True}, {"state_dtype": "8bit"}], ids=str)
def test_accumulating_low_rank_gradients_equals_accumulating_gradients(options):
    plain, hooked = pair()
    optimizer = make(list(plain.parameters()), **options)
    stepper = pykern.step_in_backward(hooked, lambda params: make(params, **options), accumulate=3)
    for index, tokens in enumerate(batches(15)):
        refreshing = index // 3 % 3 == 0
        expert = index % 3 != 2
        (loss_of(plain, tokens, expert) / 3).backward()
        (loss_of(hooked, tokens, expert) / 3).backward()
        if index % 3 != 2:
            for name, param in hooked.named_parameters():
                waits = param.grad is not None
                assert waits == (refreshing or not low_rank(param)), (index, name)
        else:
            optimizer.step()
            optimizer.zero_grad()
            assert all(param.grad is None for param in hooked.parameters())
            assert_close(hooked, plain)
    assert len(stepper.optimizers) == len(list(hooked.parameters()))


def test_refreshing_by_the_first_pass_frees_every_gradient_in_its_pass():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 12, bias=False), nn.Tanh(), nn.Linear(12, 8, bias=False))
    seen = []

    def projector(grad, rank, right):
        seen.append(grad.clone())
        return pykern.lowrank.projectors.gram_projector(grad, rank, right)

    stepper = pykern.step_in_backward(
        model, lambda params: make(params, projector=projector, refresh_every=2), accumulate=2, refresh_by="first"
    )
    start = [param.detach().clone() for param in model.parameters()]
    for index in range(8):
        inputs = torch.randn(5, 8, generator=torch.Generator().manual_seed(index))
        expected = torch.autograd.grad(model(inputs).square().mean(), list(model.parameters()))
        model(inputs).square().mean().backward()
        assert all(param.grad is None for param in model.parameters())
        # Both weights, in the first pass of every second window.
        assert len(seen) == 2 * (index // 4 + 1)
        if index % 4 == 0:
            assert torch.equal(seen[-1], expected[0]) and torch.equal(seen[-2], expected[1])
    assert all(
        int(optimizer.state[p]["step"]) == 4 for optimizer in stepper.optimizers.values() for p in optimizer.state
    )
    assert not any(torch.equal(one, param) for one, param in zip(start, model.parameters(), strict=True))


def test_a_first_pass_without_a_gradient_leaves_the_choice_to_the_window():
    model = nn.Linear(6, 6, bias=False)
    stepper = pykern.step_in_backward(model, make, accumulate=2, refresh_by="first")
    (model(torch.randn(3, 6)).sum() * 0).backward()
    assert not model.weight.grad.any()
    model(torch.randn(3, 6)).sum().backward()
    state = stepper.optimizers["weight"].state[model.weight]
    assert model.weight.grad is None and int(state["step"]) == 1 and state["projector"].any()


def test_fira_and_other_optimizers_accumulate_gradients():
    for kind in (lambda params: make(params, pykern.FiraAdamW), lambda params: torch.optim.SGD(params, 0.1)):
        plain, hooked = pair()
        optimizer = kind(list(plain.parameters()))
        pykern.step_in_backward(hooked, kind, accumulate=2)
        for index, tokens in enumerate(batches(8)):
            loss_of(plain, tokens).backward()
            loss_of(hooked, tokens).backward()
            if index % 2:
                optimizer.step()
                optimizer.zero_grad()
                assert_close(hooked, plain)
            else:
                assert all(param.grad is not None for param in hooked.parameters())


def clipped_by_hand(model, optimizer, max_norm, previous):
    """A step on gradients clipped as documented; the total norm before clipping."""
    norms = [param.grad.norm() for param in model.parameters()]
    for param, norm in zip(model.parameters(), norms, strict=True):
        bound = norm if previous is None else max(norm, previous)
        param.grad.mul_((max_norm / (bound + 1e-6)).clamp(max=1.0))
    optimizer.step()
    optimizer.zero_grad()
    return torch.stack(norms).norm()


@pytest.mark.parametrize("clip_by", ["parameter", "previous"])
def test_clipping(clip_by):
    plain, hooked = pair()
    optimizer = make(list(plain.parameters()))
    max_norm = 0.05
    pykern.step_in_backward(hooked, make, max_norm=max_norm, clip_by=clip_by)
    previous, clipped = None, 0
    for index, tokens in enumerate(batches(6)):
        scale = 4.0 if index == 3 else 1.0
        (scale * loss_of(plain, tokens)).backward()
        (scale * loss_of(hooked, tokens)).backward()
        clipped += any(param.grad.norm() > max_norm for param in plain.parameters())
        total = clipped_by_hand(plain, optimizer, max_norm, previous)
        previous = total if clip_by == "previous" else None
        assert_close(hooked, plain)
    assert clipped == 6


def test_clipping_an_accumulated_low_rank_gradient_by_its_own_norm():
    torch.manual_seed(0)
    model = nn.Linear(8, 8, bias=False)
    stepper = pykern.step_in_backward(model, make, accumulate=2, max_norm=1.0)
    optimizer = stepper.optimizers["weight"]
    seen = []
    inner = optimizer.step_projected
    optimizer.step_projected = lambda low: (seen.append(next(iter(low.values())).norm().item()), inner(low))
    for index in range(4):
        (100 * model(torch.randn(3, 8)).sum()).backward()
    assert seen == [pytest.approx(1.0, rel=1e-4)]


def checkpointed(stepper):
    file = io.BytesIO()
    torch.save(stepper.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("refresh_by", ["window", "first"])
@pytest.mark.parametrize("passes", [1, 2, 3, 4, 5, 7])
def test_a_checkpoint_after_any_pass_continues_bit_for_bit(passes, refresh_by):
    model, other = pair()
    settings = {"accumulate": 3, "refresh_by": refresh_by, "max_norm": 0.1, "clip_by": "previous"}
    stepper = pykern.step_in_backward(model, make, **settings)
    tokens = batches(12)
    for batch in tokens[:passes]:
        loss_of(model, batch).backward()
    other.load_state_dict(model.state_dict())
    resumed = pykern.step_in_backward(other, make, **settings)
    resumed.load_state_dict(checkpointed(stepper))
    for batch in tokens[passes:]:
        loss_of(model, batch).backward()
        loss_of(other, batch).backward()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def rates(stepper):
    return {float(group["lr"]) for group in stepper.param_groups}


def test_a_checkpoint_that_does_not_fit_changes_nothing():
    model = Tiny()
    stepper = pykern.step_in_backward(model, make)
    loss_of(model, batches(1)[0]).backward()
    saved = copy.deepcopy(stepper.state_dict())
    loss_of(model, batches(1)[0]).backward()
    del list(saved["optimizers"].values())[-1]["state"][0]["exp_avg"]
    steps = [float(state["step"]) for one in stepper.optimizers.values() for state in one.state.values()]
    with pytest.raises(ValueError, match="expected the state"):
        stepper.load_state_dict(saved)
    assert steps == [float(state["step"]) for one in stepper.optimizers.values() for state in one.state.values()]
    assert set(steps) == {2.0}


@pytest.mark.parametrize("kind", [make, torch.optim.AdamW], ids=["low-rank", "torch"])
def test_one_tensor_is_the_learning_rate_of_all_also_after_loading(kind):
    rate = torch.tensor(0.1, dtype=torch.float64)
    model = Tiny()
    stepper = pykern.step_in_backward(model, lambda params: kind(params, lr=rate))
    loss_of(model, batches(1)[0]).backward()
    saved = stepper.state_dict()
    rate.fill_(0.5)
    assert rates(stepper) == {0.5}
    saved = {**saved, "optimizers": {name: dict(one) for name, one in saved["optimizers"].items()}}
    stepper.load_state_dict(saved)
    rate.fill_(0.25)
    assert rates(stepper) == {0.25} and all(group["lr"] is rate for group in stepper.param_groups)


@pytest.mark.parametrize("tensor", [False, True], ids=["float", "tensor"])
def test_one_scheduler_for_all_also_after_loading(tensor):
    model, other = pair()
    rate = torch.tensor(0.1, dtype=torch.float64) if tensor else 0.1
    stepper = pykern.step_in_backward(model, lambda params: make(params, lr=rate))
    optimizer = pykern.BackwardOptimizer(stepper)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    by_hand = make(list(other.parameters()), lr=0.1)
    for index, tokens in enumerate(batches(4)):
        loss_of(model, tokens).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        by_hand.param_groups[0]["lr"] = 0.1 * 0.5**index
        loss_of(other, tokens).backward()
        by_hand.step()
        by_hand.zero_grad()
        if index == 1:
            optimizer.load_state_dict(optimizer.state_dict())
        assert_close(model, other)


def test_the_rest_of_an_epoch_is_a_short_window():
    plain, hooked = pair()
    optimizer = make(list(plain.parameters()))
    facade = pykern.BackwardOptimizer(pykern.step_in_backward(hooked, make, accumulate=3))
    for index, tokens in enumerate(batches(8)):
        loss_of(plain, tokens).backward()
        loss_of(hooked, tokens).backward()
        if index in (2, 4, 7):
            optimizer.step()
            optimizer.zero_grad()
            facade.step()
            assert_close(hooked, plain)
    with pytest.raises(ValueError, match="closure: expected None"):
        facade.step(lambda: 0.0)


def test_draws_and_staggered_refreshes_are_those_of_one_optimizer():
    plain, hooked = (nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(4))).bfloat16() for _ in range(2))
    hooked.load_state_dict(plain.state_dict())
    options = {"projector": "random", "refresh": "staggered", "refresh_every": 4, "rounding": "stochastic"}
    optimizer = pykern.LowRankAdamW(plain.parameters(), 0.1, rank=2, **options)
    stepper = pykern.step_in_backward(hooked, lambda params: pykern.LowRankAdamW(params, 0.1, rank=2, **options))
    for step in range(3):
        x = torch.randn(5, 8).bfloat16()
        for model in (plain, hooked):
            model(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert all(torch.equal(*pair) for pair in zip(plain.parameters(), hooked.parameters(), strict=True)), step
    own = [state for one in stepper.optimizers.values() for state in one.state.values()]
    assert [int(state["next_refresh"]) for state in own] == [5, 6, 3, 4]
    copied = copy.deepcopy(list(stepper.optimizers.values())[1])
    assert copied._job(copied.param_groups[0]["params"][0]).index == 1


def test_distributed_data_parallel_is_refused(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="model: expected one without DistributedDataParallel"):
            pykern.step_in_backward(nn.parallel.DistributedDataParallel(nn.Linear(2, 2)), make)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    "keywords, message",
    [
        ({"refresh_by": "last"}, "refresh_by: expected one of"),
        ({"clip_by": "total"}, "clip_by: expected one of"),
        ({"max_norm": 0.0}, "max_norm: expected a number above 0"),
    ],
)
def test_refused_arguments(keywords, message):
    with pytest.raises(ValueError, match=message):
        pykern.step_in_backward(nn.Linear(2, 2), make, **keywords)
