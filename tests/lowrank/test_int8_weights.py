"""Weights in 8 bits: the op that steps them, and the linear layer that has them."""

import copy
import io

import pytest
import torch

from pykern.lowrank import Int8Linear, LowRankOptimizer, QGaLoreAdamW8bit, int8_linears, low_rank_groups
from pykern.lowrank.quantized import low_rank_apply_int8
from pykern.reference import lowrank_quantized as reference
from tests.support import check_op, compile_whole, threads

LR, SEED, STEP = 0.05, 0x1234567890ABCDEF, 7


class Weights:
    """A weight in 8 bits, and the factors of an update as the optimizer has them on either side."""

    def __init__(self, rows, columns, rank, *, dtype=torch.float32, right=False, device="cpu"):
        self.codes, self.scale, self.zero = (
            part.to(device) for part in reference.quantize(torch.randn(rows, columns), 8)
        )
        basis = torch.randn(columns if right else rows, rank).to(dtype).to(device)
        direction = torch.randn(rank, rows if right else columns).to(device)
        self.left, self.right = (direction.mT, basis.mT) if right else (basis, direction)

    def step(self, *, seed=SEED, step=STEP, found_inf=None, factor=0.5, weight_decay=0.1, decay_after=False):
        device = self.codes.device
        low_rank_apply_int8(
            [self.codes], [self.scale], [self.zero], [self.left], [self.right],
            [torch.full((), float(step), device=device)], [seed],
            torch.full((1,), 0.8, dtype=torch.float64, device=device),
            torch.full((), LR, dtype=torch.float64, device=device), found_inf,
            factor=factor, weight_decay=weight_decay, decay_after=decay_after,
        )  # fmt: skip
        return self

    def defined(self, *, seed=SEED, step=STEP, dtype=torch.float64, decay_after=False):
        bits = reference.random_bits(seed, step, self.codes.numel())
        parts = (self.codes.cpu(), self.scale.cpu(), self.zero.cpu(), self.left.cpu().to(dtype))
        return reference.apply_int8(
            *parts, self.right.cpu().to(dtype), bits, step_size=LR * 0.8 * 0.5, decay=LR * 0.1, decay_after=decay_after
        )

    def dense(self):
        return reference.dequantize(self.codes.cpu(), self.scale.cpu(), self.zero.cpu(), torch.float64)


# --- the op -----------------------------------------------------------------------------------------


def test_random_bits_are_philox():
    """Against the generator's published test vector for a key and counter of zeros."""
    words = reference.random_bits(0, 0, 8).view(4, 2)
    words = (words[:, 0] | words[:, 1] << 16).tolist()
    assert words == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("right", [False, True], ids=["left", "right"])
def test_step(device, dtype, right):
    """Codes are those of the definition's bits, but where the product's rounding decides; the weight's error is then
    that of one code."""
    for rows, columns, rank in ((1, 1, 1), (50, 256, 3), (3, 515, 7), (17, 264, 2)):
        for decay_after in (False, True):
            weights = Weights(rows, columns, rank, dtype=dtype, right=right, device=device)
            codes, scale, zero, exact = weights.defined(decay_after=decay_after)
            weights.step(decay_after=decay_after)
            # Products of bfloat16 factors may round the direction to it.
            bound = 1e-5 if dtype == torch.float32 else 16 * torch.finfo(dtype).eps * LR
            torch.testing.assert_close(weights.zero.cpu().double(), zero.double(), rtol=bound, atol=5 * bound)
            torch.testing.assert_close(weights.scale.cpu().double(), scale.double(), rtol=5 * bound, atol=bound)
            width = scale.double().repeat_interleave(256, dim=1)[:, :columns]
            assert ((weights.dense() - exact).abs() <= (1 + 1e-3) * width + 20 * bound).all()
            if dtype == torch.float32:
                assert (weights.codes.cpu() != codes).sum() <= 1 + 0.002 * codes.numel()


def test_rounding_is_unbiased(device):
    """Over many copies of a few rows, each with bits of its own, the mean of the new weights is the exact weight."""
    weights, copies = Weights(2, 272, 2, device=device), 150
    for name in ("codes", "scale", "zero", "left"):
        setattr(weights, name, getattr(weights, name).repeat(copies, 1))
    exact = weights.defined()[3].view(copies, 2, 272)
    error = weights.step().dense().view(copies, 2, 272) - exact
    width = weights.scale.cpu().double().repeat_interleave(256, dim=1)[:2, :272]
    # Half a code is the largest deviation that a value can have.
    assert (error.mean(dim=0).abs() < 5 * 0.5 * width / copies**0.5).all()
    assert abs((error / width).mean()) < 5 * 0.5 / error.numel() ** 0.5
    assert (error / width).square().mean() > 0.05


def test_bits_depend_on_seed_step_and_element_alone(device):
    weights = Weights(40, 264, 3, device=device)
    one, other = copy.deepcopy(weights).step(), copy.deepcopy(weights).step()
    assert torch.equal(one.codes, other.codes) and torch.equal(one.scale, other.scale)
    for changed in ({"seed": SEED + 1}, {"step": STEP + 1}):
        assert not torch.equal(copy.deepcopy(weights).step(**changed).codes, one.codes)
    # The first rows of a taller weight draw the same.
    short = copy.deepcopy(weights)
    short.codes, short.scale, short.zero = (part[:9].clone() for part in (short.codes, short.scale, short.zero))
    short.left = short.left[:9]
    assert torch.equal(short.step().codes, one.codes[:9])


def test_threads_and_levels_agree(cpu_level):
    weights = Weights(130, 1100, 5)
    with threads(1):
        one = copy.deepcopy(weights).step()
    with threads(3):
        other = copy.deepcopy(weights).step()
    assert torch.equal(one.codes, other.codes) and torch.equal(one.zero, other.zero)
    codes = weights.defined()[0]
    assert (one.codes != codes).sum() <= 0.002 * codes.numel()


def test_found_inf_and_nan(device):
    weights = Weights(5, 300, 2, device=device)
    kept = copy.deepcopy(weights)
    weights.step(found_inf=torch.ones((), device=device))
    assert torch.equal(weights.codes, kept.codes) and torch.equal(weights.scale, kept.scale)
    weights.right[0, 280] = float("nan")
    weights.step(found_inf=torch.zeros((), device=device))
    # A NaN takes its column's groups with it, as it takes the element of a weight in floating point.
    assert weights.dense()[:, 256:].isnan().all() and not weights.dense()[:, :256].isnan().any()


def test_lists_and_empty_weights(device):
    many = [Weights(6, 256, 2, device=device), Weights(0, 7, 2, device=device), Weights(3, 9, 1, device=device)]
    single = copy.deepcopy(many)
    lists = [[getattr(one, name) for one in many] for name in ("codes", "scale", "zero", "left", "right")]
    steps = [torch.full((), float(STEP), device=device) for _ in many]
    low_rank_apply_int8(
        *lists, steps, [SEED] * 3, torch.full((3,), 0.8, dtype=torch.float64, device=device),
        torch.full((), LR, device=device), None, factor=0.5, weight_decay=0.1, decay_after=False,
    )  # fmt: skip
    for one, alone in zip(many, single, strict=True):
        assert torch.equal(one.codes, alone.step().codes)


def test_op_is_well_formed():
    weights = Weights(5, 300, 2)
    arguments = ([weights.codes], [weights.scale], [weights.zero], [weights.left], [weights.right])
    arguments += ([torch.ones(())], [3], torch.ones(1, dtype=torch.float64), torch.tensor(0.1), None)
    rule = {"factor": 1.0, "weight_decay": 0.0, "decay_after": False}
    check_op(torch.ops.pykern.low_rank_apply_int8.default, arguments, rule)
    with pytest.raises(RuntimeError, match="right.0.: expected size 300 in dimension 1, got 299"):
        low_rank_apply_int8(*arguments[:4], [weights.right[:, 1:]], *arguments[5:], **rule)
    with pytest.raises(RuntimeError, match="left.0.: expected float32, bfloat16 or float16"):
        low_rank_apply_int8(*arguments[:3], [weights.left.double()], *arguments[4:], **rule)
    with pytest.raises(RuntimeError, match="seeds: expected 1 numbers, got 0"):
        low_rank_apply_int8(*arguments[:6], [], *arguments[7:], **rule)


# --- the layer --------------------------------------------------------------------------------------


def layer(inputs=300, outputs=40, **options):
    return Int8Linear(inputs, outputs, **options)


def test_product_and_gradients():
    ours = layer()
    plain = torch.nn.Linear(300, 40)
    plain.load_state_dict({"weight": ours.dequantized(), "bias": ours.bias.detach()})
    x, other = (torch.randn(2, 5, 300, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
    weight = torch.randn(2, 5, 40)
    y, expected = ours(x), plain(other)
    (y * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(x.grad, other.grad)
    torch.testing.assert_close(ours.weight.grad, plain.weight.grad)
    torch.testing.assert_close(ours.bias.grad, plain.bias.grad)
    assert ours.weight.grad.is_contiguous()
    (ours(x) * weight).sum().backward()
    torch.testing.assert_close(ours.weight.grad, 2 * plain.weight.grad)


def test_only_the_codes_take_memory():
    ours = layer(1024, 512, bias=False)
    stored = ours.weight.untyped_storage().nbytes() + sum(b.untyped_storage().nbytes() for b in ours.buffers())
    assert stored <= 1.04 * 1024 * 512
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ours(torch.randn(3, 1024, requires_grad=True))
    assert not any(t.is_floating_point() and t.numel() >= 1024 * 512 for t in saved)


def test_hooks_clipping_and_other_optimizers_meet_an_ordinary_gradient():
    ours, seen = layer(), []
    ours.weight.register_post_accumulate_grad_hook(lambda param: seen.append(param.grad.shape))
    ours(torch.randn(4, 300)).sum().backward()
    assert seen == [(40, 300)]
    torch.nn.utils.clip_grad_norm_(ours.parameters(), 1e-3)
    assert ours.weight.grad.norm() <= 1e-3
    with pytest.raises(RuntimeError):
        torch.optim.SGD([ours.weight], 0.1).step()
    assert ours.weight.isnan().all()


def test_autocast():
    ours = layer()
    with torch.autocast("cpu", torch.bfloat16):
        y = ours(torch.randn(4, 300))
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert ours.weight.grad.dtype == torch.float32 and ours.bias.grad.dtype == torch.float32


def test_weights_changed_before_the_backward_are_noticed():
    ours = layer()
    y = ours(torch.randn(4, 300, requires_grad=True))
    ours.weight_codes.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_state_dict():
    ours, other = layer(), layer()
    state = ours.state_dict()
    assert sorted(state) == ["bias", "weight_codes", "weight_scale", "weight_zero"]
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    kept = other.weight
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert other.weight is kept and torch.equal(other.dequantized(), ours.dequantized())
    other.load_state_dict(layer().state_dict(), assign=True)
    assert other.weight.int8.codes is other.weight_codes
    plain = torch.nn.Linear(300, 40)
    other.load_state_dict(plain.state_dict())
    assert (other.dequantized() - plain.weight).abs().max() < plain.weight.abs().max() / 250
    with pytest.raises(RuntimeError, match="Missing key.*weight_scale"):
        other.load_state_dict({name: state[name] for name in state if name != "weight_scale"})
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        other.load_state_dict(torch.nn.Linear(300, 41).state_dict())


def test_copies_and_conversions():
    ours = layer()
    ours(torch.randn(4, 300)).sum().backward()
    twin = copy.deepcopy(ours)
    assert torch.equal(twin.weight.grad, ours.weight.grad) and twin.weight is not ours.weight
    assert twin.weight.untyped_storage().nbytes() == 4 and twin.weight.int8.codes is twin.weight_codes
    twin.weight_codes.zero_()
    assert ours.weight_codes.any()
    before, weight = ours.dequantized(), ours.weight
    assert ours.bfloat16() is ours and ours.weight is weight
    assert ours.weight.dtype == ours.weight.grad.dtype == ours.bias.dtype == torch.bfloat16
    assert ours.weight_scale.dtype == torch.float32 and ours.weight.untyped_storage().nbytes() == 2
    assert torch.equal(ours.dequantized(), before.bfloat16())
    assert [name for name, _ in ours.named_parameters()] == ["weight", "bias"]
    again = torch.load(_saved(ours), weights_only=False)
    assert again.weight.int8.codes is again.weight_codes and torch.equal(again.dequantized(), ours.dequantized())


def _saved(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return buffer


def test_a_copy_of_an_optimizer_and_its_model_belong_together():
    ours = layer()
    optimizer = QGaLoreAdamW8bit([ours.weight], LR, rank=4)
    for names in (["optimizer", "layer"], ["layer", "optimizer"]):
        both = copy.deepcopy({name: {"optimizer": optimizer, "layer": ours}[name] for name in names})
        (param,) = both["optimizer"].param_groups[0]["params"]
        assert param is both["layer"].weight is not ours.weight
        assert param.int8.codes is both["layer"].weight_codes and param.untyped_storage().nbytes() == 4


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("rows, columns", [(0, 5), (5, 0)])
def test_no_features(rows, columns):
    ours = copy.deepcopy(layer(columns, rows).bfloat16())
    x = torch.ones(3, columns, dtype=torch.bfloat16)
    assert ours(x).shape == (3, rows) and ours.weight.shape == (rows, columns)


def test_frozen_and_shared_layers():
    shared, frozen = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8).requires_grad_(False)
    places = {"one": torch.nn.Sequential(shared, frozen, shared), "other": torch.nn.Sequential(shared)}
    model = torch.nn.ModuleDict(places)
    int8_linears(model, r"other\.0|one\.1")
    one, other = model["one"], model["other"]
    assert type(other[0]) is Int8Linear and one[0] is one[2] is other[0]
    assert not one[1].weight.requires_grad and other[0].weight.requires_grad


def test_replacing_layers():
    model = torch.nn.Sequential(
        torch.nn.Embedding(50, 16), torch.nn.Linear(16, 24), torch.nn.Sequential(torch.nn.Linear(24, 16)),
        torch.nn.Linear(16, 50, bias=False),
    )  # fmt: skip
    model[3].weight = model[0].weight
    weight, bias = model[1].weight.detach().clone(), model[1].bias
    assert int8_linears(model) is model
    assert [type(module).__name__ for module in model.modules()].count("Int8Linear") == 2
    assert type(model[3]) is torch.nn.Linear and model[1].bias is bias
    assert (model[1].dequantized() - weight).abs().max() <= 0.51 * model[1].weight_scale.max()
    with pytest.raises(ValueError, match="nothing matches 'nowhere'"):
        int8_linears(torch.nn.Sequential(torch.nn.Linear(3, 3)), "nowhere")
    with pytest.raises(TypeError, match="dtype: expected float32, bfloat16 or float16, got torch.float64"):
        layer(dtype=torch.float64)


def test_layer_compiles():
    ours = layer()
    x = torch.randn(4, 300)
    expected = ours(x)
    torch.testing.assert_close(compile_whole(ours)(x), expected)


# --- the optimizer ------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_optimizer_steps_the_codes(device, side):
    """Within a code of the step of a weight in floating point."""
    ours = layer(300, 40, bias=False).to(device)
    plain = torch.nn.Parameter(ours.dequantized())
    options = {"rank": 4, "side": side, "weight_decay": 0.1, "projector": "gram"}
    optimizers = [LowRankOptimizer([param], 0.01, **options) for param in (ours.weight, plain)]
    grad = torch.randn(40, 300, device=device)
    for param, optimizer in zip((ours.weight, plain), optimizers, strict=True):
        param.grad = grad.clone()
        optimizer.step()
    width = ours.weight_scale.repeat_interleave(256, dim=1)[:, :300]
    error = (ours.dequantized() - plain).abs() / width
    assert error.max() <= 1.001 and error.mean() > 0.1
    assert ours.weight.isnan().all() and ours.weight.untyped_storage().nbytes() == 4
    kept, shapes = optimizers
    for name, value in shapes.state[plain].items():
        assert kept.state[ours.weight][name].shape == value.shape
    torch.testing.assert_close(kept.state[ours.weight]["exp_avg"], shapes.state[plain]["exp_avg"])


def test_training_follows_floating_point():
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(64, 256, generator=generator)
    targets = inputs @ torch.randn(256, 32, generator=generator) / 16

    def train(model):
        optimizer, losses = LowRankOptimizer([model.weight], 0.02, rank=8, refresh_every=20), []
        for _ in range(80):
            loss = (model(inputs) - targets).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    plain = torch.nn.Linear(256, 32, bias=False)
    ours = Int8Linear.from_linear(plain)
    exact, quantised = train(plain), train(ours)
    assert exact[-1] < 0.1 * exact[0]
    # A weight in 8 bits can't come closer than its codes lie.
    assert quantised[-1] < exact[-1] + 0.02 * exact[0]


def test_steps_with_feedback_amp_and_checkpoints():
    options = {"rank": 4, "residual": "error_feedback", "feedback_dtype": "8bit", "state_dtype": "8bit"}
    ours = layer(300, 40, bias=False)
    optimizer = LowRankOptimizer([ours.weight], 0.01, **options)
    ours.weight.grad = torch.randn(40, 300)
    optimizer.step()
    twin = copy.deepcopy(ours)
    other = LowRankOptimizer([twin.weight], 0.01, **options)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    grad = torch.randn(40, 300)
    ours.weight.grad, twin.weight.grad = grad.clone(), grad.clone()
    optimizer.step(), other.step()
    assert torch.equal(ours.weight_codes, twin.weight_codes) and torch.equal(ours.weight_zero, twin.weight_zero)
    before = ours.weight_codes.clone()
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.ones(())
    ours.weight.grad = torch.full((40, 300), float("inf"))
    optimizer.step()
    assert torch.equal(ours.weight_codes, before)


def test_groups_and_refusals():
    model = int8_linears(torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.Linear(30, 20)))
    groups = low_rank_groups(model, rank=4)
    assert groups[0]["params"] == [model[0].weight, model[1].weight]
    with pytest.raises(ValueError, match="params: expected an 8-bit weight in a group with a rank"):
        LowRankOptimizer(model.parameters(), 0.01)
    with pytest.raises(ValueError, match='residual: expected "none" or "error_feedback" with an 8-bit weight'):
        LowRankOptimizer(groups, 0.01, residual="fira")
    with pytest.raises(ValueError, match="rounding: an 8-bit weight"):
        LowRankOptimizer(groups, 0.01, rounding="kahan")


def test_q_galore_trains_a_model():
    """8-bit weights and moments, a 4-bit basis, and refreshes that grow rare, as the preset has them."""
    torch.manual_seed(4)
    model = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.Tanh(), torch.nn.Linear(96, 64))
    int8_linears(model)
    optimizer = QGaLoreAdamW8bit(low_rank_groups(model, rank=8, refresh_every=2), 0.02, weight_decay=0.0)
    inputs = torch.randn(256, 64)
    targets = torch.tanh(inputs @ torch.randn(64, 64) / 8)
    losses = []
    for _ in range(100):
        loss = (model(inputs) - targets).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    state = optimizer.state[model[0].weight]
    assert state["refresh_gap"] > 2 and state["refreshes"] < 50
    # A byte for each of two moments, half a byte for the basis, and their scales; the count and the refreshes' few.
    expected = 2 * (8 * 96 + 8 * 4) + 8 * (32 + 4 + 4)
    stored = sum(value.untyped_storage().nbytes() for value in state.values())
    assert expected < stored <= expected + 64
