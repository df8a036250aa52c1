"""The normalized low-rank layer, refactorization of factors, and the reset of moments."""

import pytest
import torch

import pykern
from pykern.lowrank.backward import BackwardOptimizer
from pykern.reference.lowrank_weights import normalized_weight
from tests.support import assert_accurate


def layer_of(rows, columns, rank, norm, dtype=torch.float32, bias=True):
    layer = pykern.NormalizedLowRankLinear(
        torch.randn(rows, columns).to(dtype), rank, norm=norm, bias=torch.randn(rows).to(dtype) if bias else None
    )
    with torch.no_grad():
        layer.up.normal_(std=0.3)
        layer.magnitude.add_(torch.rand_like(layer.magnitude))
    return layer


@pytest.mark.parametrize("norm", ["output", "input"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rows, columns, rank", [(12, 30, 3), (30, 12, 5), (3, 4, 1)])
def test_values_and_gradients_are_those_of_the_whole_weight(rows, columns, rank, norm, dtype):
    layer = layer_of(rows, columns, rank, norm, dtype)
    x, weights = torch.randn(7, columns).to(dtype), torch.randn(7, rows).to(dtype)

    def plain(kind):
        leaves = [t.detach().to(kind).requires_grad_() for t in (x, layer.up, layer.down, layer.magnitude, layer.bias)]
        weight = normalized_weight(layer.weight.to(kind), *leaves[1:4], norm)
        out = leaves[0] @ weight.mT + leaves[4]
        out.backward(weights.to(kind))
        return [out.detach(), *(leaf.grad for leaf in leaves)]

    source = x.clone().requires_grad_()
    out = layer(source)
    out.backward(weights)
    got = [out, source.grad, layer.up.grad, layer.down.grad, layer.magnitude.grad, layer.bias.grad]
    for actual, exact, baseline in zip(got, plain(torch.float64), plain(dtype), strict=True):
        assert_accurate(actual, exact, baseline, units=16.0)
    torch.testing.assert_close(x @ layer.dense_weight().mT + layer.bias, out.detach())


@pytest.mark.parametrize("norm", ["output", "input"])
def test_a_fresh_layer_is_the_one_it_was_made_from(norm):
    linear = torch.nn.Linear(20, 30)
    layer = pykern.NormalizedLowRankLinear.from_linear(linear, 4, norm=norm)
    x = torch.randn(5, 20)
    torch.testing.assert_close(layer(x), linear(x))
    assert layer.weight.data_ptr() == linear.weight.data_ptr()
    assert {name for name, _ in layer.named_parameters()} == {"up", "down", "magnitude", "bias"}


@pytest.mark.parametrize("norm", ["output", "input"])
def test_autocast_gives_what_it_gives_of_a_linear_layer(norm):
    linear, x = torch.nn.Linear(5, 7), torch.randn(3, 5)
    ours = pykern.NormalizedLowRankLinear.from_linear(linear, 2, norm=norm)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(ours(x), linear(x), rtol=2e-2, atol=2e-2)


def test_state_dict_restores_the_norms():
    layer, other = (layer_of(6, 9, 2, "output") for _ in range(2))
    other.load_state_dict(layer.state_dict())
    x = torch.randn(3, 9)
    torch.testing.assert_close(other(x), layer(x))


@pytest.mark.parametrize(
    "arguments, keywords, message",
    [
        ((torch.zeros(3), 1), {}, "weight: expected"),
        ((torch.zeros(3, 3), 0), {}, "rank: expected"),
        ((torch.zeros(3, 3), 1), {"norm": "both"}, "norm: expected"),
    ],
)
def test_refusals(arguments, keywords, message):
    with pytest.raises(ValueError, match=message):
        pykern.NormalizedLowRankLinear(*arguments, **keywords)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_refactorize_keeps_the_product_and_balances(dtype):
    model = torch.nn.Sequential(pykern.SLTrainLinear(24, 18, 5, dtype=dtype), layer_of(18, 24, 30, "output", dtype))
    with torch.no_grad():
        for layer in model:
            layer.up.normal_(std=3.0)
    before = [layer.up.double() @ layer.down.double() for layer in model]
    assert pykern.refactorize(model) == 2
    for layer, product in zip(model, before, strict=True):
        error = (layer.up.double() @ layer.down.double() - product).norm() / product.norm()
        assert error < 32 * torch.finfo(dtype).eps
        up, down = layer.up.detach().double(), layer.down.detach().double()
        left, right = up.mT @ up, down @ down.mT
        torch.testing.assert_close(left, right, rtol=0.1, atol=0.05 * float(left.diagonal().max()))


def test_refactorize_leaves_non_finite_factors():
    layer = pykern.SLTrainLinear(8, 8, 2)
    with torch.no_grad():
        layer.up.fill_(float("nan"))
    down = layer.down.detach().clone()
    with pytest.warns(UserWarning, match="non-finite factors"):
        assert pykern.refactorize(layer) == 0
    assert torch.equal(layer.down, down)


@pytest.mark.parametrize("make", [torch.optim.AdamW, pykern.GaLoreAdamW])
@pytest.mark.parametrize("steps", [False, True])
def test_reset_moments(make, steps):
    params = [torch.nn.Parameter(torch.randn(6, 4)) for _ in range(2)]
    optimizer = make([{"params": params, **({"rank": 2} if make is pykern.GaLoreAdamW else {})}], 0.1)
    for param in params:
        param.grad = torch.randn(6, 4)
    optimizer.step()
    assert pykern.reset_moments(optimizer, params[0], steps=steps) == 1
    fresh, kept = (optimizer.state[param] for param in params)
    assert not fresh["exp_avg"].any() and not fresh["exp_avg_sq"].any() and kept["exp_avg"].any()
    assert fresh["step"].item() == (0 if steps else 1) and kept["step"].item() == 1
    if "projector" in fresh:
        assert fresh["projector"].any()
    assert pykern.reset_moments(optimizer) == 2


@pytest.mark.parametrize("steps", [False, True])
def test_reset_moments_leaves_the_next_refresh_where_it_was(steps):
    param = torch.nn.Parameter(torch.randn(6, 4))
    optimizer = pykern.GaLoreAdamW([param], 0.1, rank=2, refresh_every=4)
    chosen = []
    for done in range(6):
        if done == 3:
            pykern.reset_moments(optimizer, steps=steps)
        param.grad = torch.randn(6, 4)
        optimizer.step()
        chosen.append(int(optimizer.state[param]["refreshes"]))
    assert chosen == [1, 1, 1, 1, 2, 2]


def test_refactorize_leaves_other_layers_alone():
    layer = torch.nn.Module()
    layer.up, layer.down = (torch.nn.Parameter(torch.randn(4, 4)) for _ in range(2))
    layer.rank = 4
    before = layer.up.detach().clone()
    assert pykern.refactorize(layer) == 0 and torch.equal(layer.up, before)


def test_reset_moments_of_steps_in_the_backward():
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 3))
    stepper = pykern.step_in_backward(model, lambda params: torch.optim.AdamW(params, 1e-3))
    model(torch.randn(4, 6)).sum().backward()
    assert pykern.reset_moments(BackwardOptimizer(stepper)) == 4
    assert not any(state["exp_avg"].any() for own in stepper.optimizers.values() for state in own.state.values())
    assert pykern.reset_moments(BackwardOptimizer(stepper), model[0].parameters()) == 2
    assert pykern.reset_moments(stepper, model[0].parameters()) == 2
