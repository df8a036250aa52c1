"""LowRankAdamW as a torch.optim.Optimizer."""

import copy
import io

import pytest
import torch

import pykern
from pykern.lowrank.refresh import HOST_STATE
from pykern.reference import lowrank as reference
from tests.support import assert_accurate, threads

OPTIMIZERS = [pykern.GaLoreAdamW, pykern.FiraAdamW]


def matrix(rows=24, columns=16, dtype=torch.float32, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.Parameter(torch.randn(rows, columns, generator=generator).to(dtype).to(device))


def run(optimizer, params, steps, seed=0, first=0):
    """`steps` steps on fixed random gradients, those of the steps from `first` on."""
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(1000 * seed + step)
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype).to(param.device)
        optimizer.step()


def state_tensors(optimizer):
    return [value for state in optimizer.state.values() for value in state.values()]


@pytest.mark.parametrize("parity", [False, True], ids=["corrected", "parity"])
@pytest.mark.parametrize("fira", [False, True], ids=["galore", "fira"])
@pytest.mark.parametrize("shape", [(24, 16), (16, 24)], ids=str)
def test_seven_steps_are_those_of_the_definition(device, shape, fira, parity):
    param = matrix(*shape, dtype=torch.float64, device=device)
    weight, right = param.detach().cpu().clone(), shape[0] >= shape[1]
    make = pykern.FiraAdamW if fira else pykern.GaLoreAdamW
    optimizer = make(
        [param],
        0.01,
        rank=5,
        refresh_every=3,
        scale=0.5,
        weight_decay=0.1,
        eps=1e-6,
        parity=("fira" if fira else "galore_torch") if parity else None,
        projector=lambda grad, rank, right: reference.leading_vectors(grad, rank, right),
    )
    moments = torch.zeros((shape[0], 5) if right else (5, shape[1]), dtype=torch.float64)
    first, second, norm = moments, moments, -1.0 if fira else None
    for step in range(7):
        run(optimizer, [param], 1, first=step)
        if step % 3 == 0:
            projector = optimizer.state[param]["projector"].cpu().clone()
        weight, first, second, norm = reference.low_rank_adam_step(
            weight,
            param.grad.cpu(),
            projector,
            first,
            second,
            step + 1,
            norm,
            lr=0.01,
            beta1=0.9,
            beta2=0.999,
            eps=1e-6,
            weight_decay=0.1,
            scale=0.5,
            right=right,
            decay_after=parity,
            corrected_eps=not parity,
            scaled_residual=parity,
        )
        torch.testing.assert_close(param.detach().cpu(), weight, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("maximize", [False, True])
def test_plain_group_is_torchs_adamw(device, dtype, maximize):
    ours, theirs = matrix(7, 9, dtype, device=device), matrix(7, 9, dtype, device=device)
    settings = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-8, "weight_decay": 0.1, "maximize": maximize}
    mine, peer = pykern.LowRankAdamW([ours], **settings), torch.optim.AdamW([theirs], **settings)
    for step in range(5):
        run(mine, [ours], 1, first=step)
        run(peer, [theirs], 1, first=step)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_full_rank_with_the_identity_is_plain_adamw(device):
    ours, theirs = matrix(12, 8, device=device), matrix(12, 8, device=device)
    low_rank = pykern.LowRankAdamW([ours], 0.01, rank=8, projector=torch.eye(8, device=device), weight_decay=0.1)
    plain = pykern.LowRankAdamW([theirs], 0.01, weight_decay=0.1)
    run(low_rank, [ours], 5)
    run(plain, [theirs], 5)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_training_lowers_the_loss(make):
    model = torch.nn.Sequential(torch.nn.Linear(12, 32), torch.nn.Tanh(), torch.nn.Linear(32, 4))
    inputs = torch.randn(64, 12)
    targets = torch.tanh(inputs @ torch.randn(12, 4))
    groups = pykern.low_rank_groups(model, rank=4, refresh_every=10, scale=1.0)
    optimizer = make(groups, 0.01)
    losses = []
    for _ in range(120):
        loss = (model(inputs) - targets).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_state_dtypes_and_devices(device, dtype):
    param = matrix(dtype=dtype, device=device)
    bias = torch.nn.Parameter(torch.zeros(16, dtype=dtype, device=device))
    optimizer = pykern.FiraAdamW([param, bias], 0.01, rank=4)
    run(optimizer, [param, bias], 2)
    state = optimizer.state[param]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == state["residual_norm"].dtype == wide
    assert optimizer.state[bias]["exp_avg"].dtype == wide
    assert state["projector"].dtype == dtype
    assert state["exp_avg"].shape == (4, 24) and state["projector"].shape == (16, 4)
    assert all(isinstance(value, torch.Tensor) for value in state_tensors(optimizer))
    assert state["next_refresh"].device.type == "cpu"
    for one in optimizer.state.values():
        assert all(value.device == param.device for name, value in one.items() if name not in HOST_STATE)


def test_second_moment_decays_under_bfloat16_weights(device):
    param = matrix(dtype=torch.bfloat16, device=device)
    optimizer = pykern.GaLoreAdamW([param], 0.0, rank=4)
    run(optimizer, [param], 1)
    before = optimizer.state[param]["exp_avg_sq"].clone()
    param.grad.zero_()
    for _ in range(100):
        optimizer.step()
    torch.testing.assert_close(optimizer.state[param]["exp_avg_sq"], before * 0.999**100, rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("make", OPTIMIZERS)
def test_checkpoint_continues_bit_for_bit(device, make, dtype):
    params = [matrix(dtype=dtype, device=device), matrix(16, 24, dtype, 1, device)]
    params.append(torch.nn.Parameter(torch.ones(5, dtype=dtype, device=device)))
    settings = {"rank": 4, "refresh_every": 4, "weight_decay": 0.1}
    optimizer = make(params, 0.01, **settings)
    run(optimizer, params, 5)
    buffer = io.BytesIO()
    torch.save({"params": [param.detach().clone() for param in params], "optimizer": optimizer.state_dict()}, buffer)
    run(optimizer, params, 5, first=5)

    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True, map_location="cpu")
    others = [torch.nn.Parameter(value.to(device, copy=True)) for value in saved["params"]]
    fresh = make(others, 0.5, **settings)
    fresh.load_state_dict(saved["optimizer"])
    for theirs, ours in zip(saved["optimizer"]["state"].values(), fresh.state.values(), strict=True):
        for key, value in theirs.items():
            assert ours[key].dtype == value.dtype and torch.equal(ours[key].cpu(), value)
            assert ours[key].data_ptr() != value.data_ptr()
            assert ours[key].device == (value if key in HOST_STATE else others[0]).device
    run(fresh, others, 5, first=5)
    for param, other in zip(params, others, strict=True):
        assert torch.equal(param, other)
    for value, other in zip(state_tensors(optimizer), state_tensors(fresh), strict=True):
        assert torch.equal(value, other)


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_deepcopy_continues_bit_for_bit(make):
    model = torch.nn.Linear(16, 24, bias=False)
    optimizer = make(model.parameters(), 0.01, rank=4, refresh_every=3)
    run(optimizer, list(model.parameters()), 4)
    copied_model, copied = copy.deepcopy((model, optimizer))
    run(optimizer, list(model.parameters()), 4, first=4)
    run(copied, copied.param_groups[0]["params"], 4, first=4)
    assert torch.equal(model.weight, copied_model.weight)


@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float", "tensor"])
def test_schedulers_write_the_learning_rate(device, tensor_lr):
    param, other = matrix(device=device), matrix(device=device)
    lr = torch.tensor(0.1, dtype=torch.float64, device=device) if tensor_lr else 0.1
    optimizer = pykern.GaLoreAdamW([param], lr, rank=4)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
    by_hand = pykern.GaLoreAdamW([other], 0.1, rank=4)
    for step in range(5):
        run(optimizer, [param], 1, first=step)
        scheduler.step()
        by_hand.param_groups[0]["lr"] = 0.1 * 0.5 ** (step // 2)
        run(by_hand, [other], 1, first=step)
    torch.testing.assert_close(param, other, rtol=1e-6, atol=1e-7)


def test_closure():
    param = matrix()
    optimizer = pykern.GaLoreAdamW([param], 0.01, rank=4)

    def closure():
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    before = param.square().sum().item()
    assert optimizer.step(closure).item() == pytest.approx(before)
    assert param.square().sum().item() < before


def test_a_projector_function_may_keep_the_basis():
    param, given = matrix(), iter([None, torch.eye(16)[:, :4], None])
    optimizer = pykern.GaLoreAdamW([param], rank=4, projector=lambda grad, rank, right: next(given), refresh_every=1)
    for refreshes in (0, 1, 1):
        run(optimizer, [param], 1)
        state = optimizer.state[param]
        assert int(state["refreshes"]) == refreshes == state["projector"].sum() / 4


def test_add_param_group_and_none_gradients():
    first, second = matrix(), matrix(seed=1)
    optimizer = pykern.LowRankAdamW([first], 0.01, rank=4)
    optimizer.add_param_group({"params": [second], "rank": None, "lr": 0.5})
    assert optimizer.param_groups[1]["betas"] == (0.9, 0.999) and optimizer.param_groups[1]["lr"] == 0.5
    first.grad = torch.ones_like(first)
    untouched = second.detach().clone()
    optimizer.step()
    assert torch.equal(second, untouched) and second not in optimizer.state
    run(optimizer, [first, second], 1)
    assert "projector" in optimizer.state[first] and "projector" not in optimizer.state[second]


def test_groups_made_for_the_peers_are_understood():
    optimizer = pykern.LowRankAdamW(
        [{"params": [matrix()], "rank": 4, "update_proj_gap": 50, "proj_type": "left", "alpha": 0.5}], 0.01
    )
    group = optimizer.param_groups[0]
    assert (group["refresh_every"], group["side"], group["scale"]) == (50, "left", 0.5)
    assert not {"update_proj_gap", "proj_type", "alpha"} & group.keys()


def test_zero_gradient_locks_no_basis(device):
    param = matrix(device=device)
    optimizer = pykern.FiraAdamW([param], 0.01, rank=4, refresh_every=100)
    start = param.detach().clone()
    param.grad = torch.zeros_like(param)
    optimizer.step()
    assert not optimizer.state[param]["projector"].any() and torch.equal(param, start)
    run(optimizer, [param], 1)
    projector = optimizer.state[param]["projector"]
    torch.testing.assert_close(projector.T @ projector, torch.eye(4, device=device), rtol=0, atol=1e-5)
    assert optimizer.state[param]["next_refresh"].item() == 100
    assert not torch.equal(param, start)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_gradient_keeps_the_basis_and_the_next_step_refreshes(device, bad):
    param = matrix(device=device)
    optimizer = pykern.GaLoreAdamW([param], 0.01, rank=4, refresh_every=2)
    run(optimizer, [param], 2)
    before = optimizer.state[param]["projector"].clone()
    param.grad = torch.full_like(param, bad)
    optimizer.step()
    assert torch.equal(optimizer.state[param]["projector"], before)
    assert param.isnan().all()
    run(optimizer, [param], 1, first=3)
    assert not torch.equal(optimizer.state[param]["projector"], before)
    assert optimizer.state[param]["next_refresh"].item() == 4


def test_refresh_phase(device):
    seen = []

    def projector(grad, rank, right):
        seen.append(int(optimizer.state[param]["step"]))
        return torch.eye(16, device=device)[:, :rank]

    param = matrix(device=device)
    optimizer = pykern.GaLoreAdamW([param], 0.01, rank=4, refresh_every=3, projector=projector)
    run(optimizer, [param], 8)
    assert seen == [0, 3, 6]


@pytest.mark.parametrize("make", OPTIMIZERS)
@pytest.mark.parametrize("rank", [1, 16, 100])
def test_extreme_ranks(device, make, rank):
    param = matrix(device=device)
    optimizer = make([param], 0.01, rank=rank)
    run(optimizer, [param], 2)
    assert optimizer.state[param]["projector"].shape == (16, min(rank, 16))
    assert param.isfinite().all()


@pytest.mark.parametrize("make", OPTIMIZERS)
@pytest.mark.parametrize("side", ["std", "reverse_std", "left", "right"])
def test_every_side_descends(device, make, side):
    for shape in ((24, 16), (16, 24)):
        param = matrix(*shape, device=device)
        optimizer = make([param], 0.05, rank=6, side=side, refresh_every=5)
        before = param.square().sum().item()
        for _ in range(10):
            optimizer.zero_grad()
            param.square().sum().mul(0.5).backward()
            optimizer.step()
        assert param.square().sum().item() < before


@pytest.mark.parametrize("make", OPTIMIZERS)
@pytest.mark.parametrize("low_rank", [True, False], ids=["low rank", "plain"])
def test_strided_parameters(device, make, low_rank):
    """Transposed, gapped and sliced weights step as their contiguous copies do."""
    base = torch.randn(24, 16).to(device)
    expected = torch.nn.Parameter(base.clone())
    gapped = torch.full((24, 40), float("nan"), device=device)
    gapped[:, :16] = base
    sliced = torch.zeros(24, 32, device=device)
    sliced[:, ::2] = base
    views = [base.t().contiguous().t(), gapped[:, :16], sliced[:, ::2]]
    params = [torch.nn.Parameter(view) for view in views]
    rank = 4 if low_rank else None
    optimizers = [make([param], 0.01, rank=rank, refresh_every=2) for param in [expected, *params]]
    run(optimizers[0], [expected], 3)
    for optimizer, param in zip(optimizers[1:], params, strict=True):
        run(optimizer, [param], 3)
        torch.testing.assert_close(param, expected, rtol=0, atol=0)
    assert gapped[:, 16:].isnan().all() and not sliced[:, 1::2].any()


def test_strided_gradient(device):
    param, other = matrix(device=device), matrix(device=device)
    param.grad = torch.randn(16, 24).to(device).t()
    other.grad = param.grad.contiguous()
    for one in (param, other):
        pykern.GaLoreAdamW([one], 0.01, rank=4).step()
    assert torch.equal(param, other)


@pytest.mark.parametrize("shape", [(), (7,), (0, 4), (0,)], ids=str)
def test_parameters_that_are_no_matrix_get_plain_adamw(device, shape):
    ours, theirs = (torch.nn.Parameter(torch.ones(shape, device=device)) for _ in range(2))
    mine, peer = pykern.GaLoreAdamW([ours], 0.01, rank=2), torch.optim.AdamW([theirs], 0.01, weight_decay=0.0)
    for step in range(3):
        run(mine, [ours], 1, first=step)
        run(peer, [theirs], 1, first=step)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_bit_equal_for_any_number_of_threads(make):
    results = []
    for count in (1, 2, 3):
        with threads(count):
            param = matrix(200, 300, torch.bfloat16)
            optimizer = make([param], 0.01, rank=9, projector=torch.eye(200)[:, :9].bfloat16())
            run(optimizer, [param], 3)
            results.append(param.detach().clone())
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize(
    "make, options",
    [
        (pykern.LDAdamW, {}),
        (pykern.GradNormLoRPAdamW, {}),
        (pykern.Flora, {"refresh_every": 1}),
        (pykern.FiraAdamW, {"projector": "random", "state_dtype": "8bit"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.parametrize("shape", [(60, 100), (9, 20)], ids=str)
def test_torchs_products_of_short_axes_are_not_used(make, options, shape):
    """They depend on the number of threads."""
    results = []
    for count in (1, 2):
        with threads(count):
            param = matrix(*shape)
            run(make([param], 0.01, rank=5, **options), [param], 3)
            results.append(param.detach())
    assert torch.equal(*results)


def test_bfloat16_weights_follow_the_definition(device):
    param = matrix(64, 48, torch.bfloat16, device=device)
    start = param.detach().cpu().double()
    optimizer = pykern.GaLoreAdamW([param], 0.05, rank=8, scale=1.0)
    run(optimizer, [param], 1)
    projector = optimizer.state[param]["projector"].cpu().double()
    zeros = torch.zeros(64, 8, dtype=torch.float64)
    settings = {"lr": 0.05, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "right": True}
    exact = reference.low_rank_adam_step(start, param.grad.cpu().double(), projector, zeros, zeros, 1, **settings)
    assert_accurate(param, exact[0], units=2.0)


@pytest.mark.parametrize("fira", [False, True], ids=["galore", "fira"])
def test_autocast_changes_nothing(device, fira):
    make = pykern.FiraAdamW if fira else pykern.GaLoreAdamW
    ours, other = matrix(device=device), matrix(device=device)
    optimizer, expected = make([ours], 0.01, rank=4, refresh_every=2), make([other], 0.01, rank=4, refresh_every=2)
    run(expected, [other], 3)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        run(optimizer, [ours], 3)
    assert torch.equal(ours, other)


@pytest.mark.parametrize(
    "keywords, error, message",
    [
        ({"rank": 0}, ValueError, "rank: expected at least 1, got 0"),
        ({"rank": 2.5}, TypeError, "rank: expected an int, got float"),
        ({"refresh_every": 0}, ValueError, "refresh_every: expected at least 1"),
        ({"seed": 1.5}, TypeError, "seed: expected an int, got float"),
        ({"side": "both"}, ValueError, "side: expected one of"),
        ({"residual": "half"}, ValueError, "residual: expected one of"),
        ({"decay": "never"}, ValueError, "decay: expected one of"),
        ({"parity": "apollo"}, ValueError, "parity: expected None or one of"),
        ({"parity": "galore_torch", "residual": "fira"}, ValueError, "residual: expected one of .* with parity"),
        ({"projector": "best"}, ValueError, "projector: expected one of .*, a function or a tensor"),
        ({"betas": (0.9, 1.0)}, ValueError, "betas: expected two numbers"),
        ({"eps": -1.0}, ValueError, "eps: expected a number of at least 0"),
        ({"weight_decay": float("nan")}, ValueError, "weight_decay: expected a number of at least 0"),
        ({"lr": -0.1}, ValueError, "lr: expected a rate of at least 0"),
        ({"lr": torch.ones(2)}, ValueError, "lr: expected one float32 or float64 element"),
    ],
)
def test_refused_arguments(keywords, error, message):
    with pytest.raises(error, match=message):
        pykern.LowRankAdamW([matrix()], **keywords)


@pytest.mark.parametrize("make, other", [(pykern.GaLoreAdamW, "fira"), (pykern.FiraAdamW, "galore_torch")])
def test_presets_refuse_what_they_fix(make, other):
    with pytest.raises(ValueError, match="parity: expected None or"):
        make([matrix()], parity=other)
    with pytest.raises(ValueError, match="residual: .* use LowRankOptimizer to choose"):
        make([matrix()], residual="fira" if make is pykern.GaLoreAdamW else "none")
    with pytest.raises(ValueError, match="rule: .* use LowRankOptimizer to choose"):
        make([{"params": [matrix()], "rule": "lion"}])
    for keywords, group in (({"rule": "lion"}, {}), ({}, {"rule": "lion"})):
        with pytest.raises(ValueError, match="rule: LowRankAdamW has 'adamw', got 'lion'"):
            pykern.LowRankAdamW([{"params": [matrix()], **group}], **keywords)
    optimizer = make([matrix()])
    with pytest.raises(ValueError, match="parity: expected None or"):
        optimizer.add_param_group({"params": [matrix()], "parity": other})
    assert len(optimizer.param_groups) == 1


def test_refused_parameters_gradients_and_bases():
    with pytest.raises(TypeError, match="params: expected float32"):
        pykern.LowRankAdamW([torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64))])
    param = matrix()
    with pytest.raises(ValueError, match=r"projector: expected shape \(16, 4\) for a \(24, 16\) gradient"):
        run(pykern.GaLoreAdamW([param], rank=4, projector=torch.eye(24)), [param], 1)
    param = matrix()
    optimizer = pykern.GaLoreAdamW([param], rank=4, projector=torch.eye(16)[:, :4], refresh_every=1)
    run(optimizer, [param], 1)
    named = pykern.GaLoreAdamW([param], rank=4)
    named.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="projector: a group names none"):
        named.step()
    param = matrix()
    param.grad = torch.zeros(24, 16).to_sparse()
    optimizer = pykern.GaLoreAdamW([param], rank=4)
    for take in (optimizer.step, lambda: optimizer.project(param)):
        with pytest.raises(RuntimeError, match="sparse gradients"):
            take()
    meta = torch.nn.Parameter(torch.zeros(4, 4, device="meta"))
    meta.grad = torch.zeros(4, 4, device="meta")
    with pytest.raises(NotImplementedError, match="has no meta kernels"):
        pykern.GaLoreAdamW([meta], rank=2).step()
