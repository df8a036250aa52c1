"""What every low-rank optimizer owes to torch.optim: checkpoints, mixed precision, clipping, odd gradients."""

import copy
import io
import pickle

import pytest
import torch

import pykern
from pykern.lowrank import presets
from pykern.lowrank.checks import rate_on
from pykern.lowrank.projectors import PROJECTORS

PRESETS = [getattr(presets, name) for name in presets.PRESETS]
FORMATS = [
    {"state_dtype": "float32"},
    {"state_dtype": "bfloat16"},
    {"state_dtype": "8bit"},
    {"residual": "error_feedback"},
    {"moments": "reset", "refresh": "staggered"},
    {"side": "full"},
]


def parameters(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = [(24, 16), (16, 24), (6, 2, 3, 3), (5,)]
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def give_gradients(params, step, factor=1.0):
    generator = torch.Generator().manual_seed(step)
    for param in params:
        param.grad = (factor * torch.randn(param.shape, generator=generator)).to(param.dtype)


def run(optimizer, params, steps):
    for step in steps:
        give_gradients(params, step)
        optimizer.step()


def make(params, kind=pykern.LowRankOptimizer, **options):
    return kind(params, 0.01, **{"rank": 3, "refresh_every": 3, "weight_decay": 0.1, **options})


def tensors(optimizer):
    return [value for state in optimizer.state.values() for value in state.values()]


def snapshot(optimizer, params):
    return [value.detach().clone() for value in (*params, *tensors(optimizer))]


def assert_equal(ours, theirs):
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


def restored(optimizer, params, kind=pykern.LowRankOptimizer, **options):
    """A new optimizer on copies of the parameters, from a checkpoint file read without code."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    others = [torch.nn.Parameter(param.detach().clone()) for param in params]
    fresh = make(others, kind, **options)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    return fresh, others


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", FORMATS, ids=lambda options: "-".join(options.values()))
def test_every_state_survives_a_checkpoint_bit_for_bit(options, dtype):
    params = parameters(dtype)
    optimizer = make(params, **options)
    run(optimizer, params, range(4))
    fresh, others = restored(optimizer, params, **options)
    assert_equal(snapshot(optimizer, params), snapshot(fresh, others))
    for state in fresh.state.values():
        assert state.get("next_refresh", torch.zeros(())).device.type == "cpu"
    run(optimizer, params, range(4, 8))
    run(fresh, others, range(4, 8))
    assert_equal(snapshot(optimizer, params), snapshot(fresh, others))


@pytest.mark.parametrize("kind", PRESETS, ids=lambda kind: kind.__name__)
def test_every_preset_survives_a_checkpoint_a_copy_and_a_pickle(kind):
    params = parameters()
    optimizer = make(params, kind)
    run(optimizer, params, range(4))
    copies = [restored(optimizer, params, kind)]
    for copied, others in (copy.deepcopy((optimizer, params)), pickle.loads(pickle.dumps((optimizer, params)))):
        copies.append((copied, others))
        assert copied.param_groups[0]["params"][0] is others[0]
    run(optimizer, params, range(4, 8))
    for copied, others in copies:
        run(copied, others, range(4, 8))
        assert_equal(snapshot(optimizer, params), snapshot(copied, others))


def test_eight_bit_codes_stay_codes():
    params = parameters(torch.bfloat16)
    optimizer = make(params, state_dtype="8bit")
    run(optimizer, params, range(2))
    fresh, _ = restored(optimizer, params)
    state = fresh.state[fresh.param_groups[0]["params"][0]]
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.uint8 and state["exp_avg"].any()


def test_the_options_of_a_checkpoint_replace_those_of_the_optimizer():
    params = parameters()
    optimizer = make(params, rank=5, state_dtype="8bit")
    run(optimizer, params, range(2))
    fresh, others = restored(optimizer, params, rank=2, state_dtype="float32")
    assert fresh.param_groups[0]["rank"] == 5 and fresh.param_groups[0]["state_dtype"] == "8bit"
    run(optimizer, params, range(2, 5))
    run(fresh, others, range(2, 5))
    assert_equal(params, others)


def test_a_parameter_laid_out_in_another_way_takes_the_state():
    params = parameters()
    optimizer = make(params, residual="error_feedback")
    run(optimizer, params, range(2))
    others = [torch.nn.Parameter(param.detach().mT.contiguous().mT if param.dim() == 2 else param.detach().clone())
              for param in params]  # fmt: skip
    fresh = make(others, residual="error_feedback")
    fresh.load_state_dict(optimizer.state_dict())
    run(optimizer, params, range(2, 5))
    run(fresh, others, range(2, 5))
    for one, other in zip(params, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def broken(change):
    params = parameters()
    optimizer = make(params)
    run(optimizer, params, range(2))
    state_dict = copy.deepcopy(optimizer.state_dict())
    change(state_dict)
    return make(parameters()), state_dict


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda d: d["state"][1].update(projector=torch.zeros(9, 3)), r"parameter 1 of shape \(16, 24\): .* projector"),
        (
            lambda d: d["state"][0].update(exp_avg=torch.zeros(24, 3)),
            r"parameter 0 .* exp_avg .*\(3, 24\), got .*24, 3",
        ),
        (lambda d: d["state"][0].update(exp_avg=torch.zeros(3, 24).half()), "expected exp_avg to be torch.float32"),
        (lambda d: d["state"][0].update(projector=object()), "expected projector .* got object"),
        (lambda d: d["state"][3].update(exp_avg=torch.zeros(6)), r"parameter 3 of shape \(5,\): expected exp_avg"),
        (lambda d: d["state"][0].pop("exp_avg_sq"), r"parameter 0 .*expected the state .*exp_avg_sq.*got"),
        (lambda d: d["param_groups"][0].update(state_dtype="8bit"), "parameter 0 .*expected the state .*exp_avg_scale"),
        (
            lambda d: d["param_groups"][0].update(rank=2),
            r"parameter 0 .*expected projector .*\(16, 2\), got .*\(16, 3\)",
        ),
        (lambda d: d["param_groups"][0].update(rule="adamax"), "rule: expected one of"),
        (lambda d: d["param_groups"][0]["params"].pop(), "doesn't match the size of optimizer's group"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(change, message):
    fresh, state_dict = broken(change)
    with pytest.raises(ValueError, match=message):
        fresh.load_state_dict(state_dict)
    assert not fresh.state and fresh.param_groups[0]["rank"] == 3


def test_a_checkpoint_of_other_shapes_is_refused():
    params = parameters()
    optimizer = make(params)
    run(optimizer, params, range(1))
    others = [torch.nn.Parameter(torch.zeros(24, 18)), *parameters()[1:]]
    with pytest.raises(ValueError, match=r"parameter 0 of shape \(24, 18\): expected projector to be"):
        make(others).load_state_dict(optimizer.state_dict())


def test_hooks_of_others_see_the_state_before_and_after():
    params = parameters()
    optimizer = make(params)
    run(optimizer, params, range(1))
    fresh = make(parameters())
    seen = []

    def double(other, state_dict):
        state = {key: dict(value) for key, value in state_dict["state"].items()}
        state[0]["exp_avg"] = 2 * state[0]["exp_avg"]
        return {**state_dict, "state": state}

    fresh.register_load_state_dict_pre_hook(double)
    fresh.register_load_state_dict_post_hook(lambda other: seen.append(len(other.state)))
    fresh.load_state_dict(optimizer.state_dict())
    first = fresh.param_groups[0]["params"][0]
    assert seen == [4] and torch.equal(fresh.state[first]["exp_avg"], 2 * optimizer.state[params[0]]["exp_avg"])


def test_an_older_checkpoint_gets_the_defaults_of_new_options():
    params = parameters()
    optimizer = make(params)
    run(optimizer, params, range(1))
    state_dict = optimizer.state_dict()
    for name in ("seed", "rounding"):
        state_dict["param_groups"][0].pop(name)
    fresh = make(parameters())
    fresh.load_state_dict(state_dict)
    assert fresh.param_groups[0]["rounding"] == "nearest"
    run(fresh, fresh.param_groups[0]["params"], range(1))


AMP_OPTIONS = [
    {},
    {"residual": "fira"},
    {"residual": "apollo_channel"},
    {"residual": "sign"},
    {"residual": "sgd"},
    {"residual": "error_feedback"},
    {"maximize": True},
    {"state_dtype": "8bit"},
]


@pytest.mark.parametrize("unscale", [False, True], ids=["scaled", "unscaled"])
@pytest.mark.parametrize("options", AMP_OPTIONS, ids=lambda options: "-".join(map(str, options.values())) or "none")
def test_a_grad_scaler_skips_overflows_whole_and_scales_back_the_rest(options, unscale):
    params, others = parameters(), parameters()
    optimizer, plain = make(params, **options), make(others, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=10**6, backoff_factor=0.5)
    scaler.scale(torch.ones(()))  # makes its tensors, as the first scaled loss does
    done = 0
    # The first refresh, an ordinary step and a later refresh each meet an overflow in one parameter.
    for overflow in (True, False, False, True, False, True, False, False):
        give_gradients(params, done, scaler.get_scale())
        if overflow:
            params[1].grad[3, 4] = float("inf")
        before = snapshot(optimizer, params)
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert not hasattr(optimizer, "found_inf")
        if overflow:
            after = snapshot(optimizer, params)
            assert_equal(after[: len(params)], before[: len(params)])
            if done:
                assert_equal(after, before)
            else:
                assert all(int(state["step"]) == 0 for state in optimizer.state.values())
                assert all(int(state.get("next_refresh", 0)) == 0 for state in optimizer.state.values())
                assert not any(state["projector"].any() for state in optimizer.state.values() if "projector" in state)
        else:
            run(plain, others, [done])
            done += 1
        for one, other in zip(params, others, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    assert done == 5 and all(int(state["step"]) == 5 for state in optimizer.state.values())


@pytest.mark.parametrize(
    "size, options",
    [
        (1e-6, {"residual": "none"}),
        (1e-2, {"residual": "error_feedback"}),  # which keeps gradients, unscaled, in the weight's dtype
        (1e-6, {"projector": "plain_power", "projector_memory": 0.9, "refresh_every": 1}),
    ],
    ids=["none", "error_feedback", "projector_memory"],
)
def test_float16_takes_a_scale_beyond_its_range(size, options):
    """65536 is where torch.amp.GradScaler begins, and no float16."""
    half, single = ([torch.nn.Parameter(torch.zeros(16, 24, dtype=dtype))] for dtype in (torch.float16, torch.float32))
    scaled, plain = (make(params, **{"rank": 4, **options}) for params in (half, single))
    scaled.grad_scale, scaled.found_inf = torch.tensor(65536.0), torch.zeros(())
    for step in range(3):
        scaled_grad = torch.randn(16, 24, generator=torch.Generator().manual_seed(step)) * (size * 65536)
        half[0].grad = scaled_grad.half()
        single[0].grad = half[0].grad.float() / 65536
        scaled.step()
        plain.step()
    assert single[0].any() and (half[0] - single[0]).norm() < 0.01 * single[0].norm()


def test_clipping_before_a_step():
    params, others = parameters(), parameters()
    optimizer, by_hand = make(params), make(others)
    for step in range(4):
        give_gradients(params, step, 10.0)
        total = torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        give_gradients(others, step, 10.0)
        for other in others:
            other.grad.mul_(1.0 / (total + 1e-6))
        by_hand.step()
    assert total > 1
    for one, other in zip(params, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_schedulers_that_write_rates_and_betas():
    params = parameters()
    optimizer = make(params)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=5)
    seen = []
    for step in range(4):
        run(optimizer, params, [step])
        scheduler.step()
        seen.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["betas"][0]))
    assert len(set(seen)) == 4 and all(param.isfinite().all() for param in params)


def test_gradients_accumulate_in_grad():
    params, others = parameters(), parameters()
    optimizer, whole = make(params), make(others)
    give_gradients(params, 0)
    give_gradients(others, 0)
    for param in params:
        (param * param.grad.clone()).sum().backward()
        param.grad.mul_(0.5)
    optimizer.step()
    whole.step()
    for one, other in zip(params, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("options", AMP_OPTIONS, ids=lambda options: "-".join(map(str, options.values())) or "none")
def test_a_zero_first_gradient_and_a_rank_above_the_dimension(options):
    param = torch.nn.Parameter(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)))
    optimizer = make([param], rank=100, weight_decay=0.0, **options)
    start = param.detach().clone()
    param.grad = torch.zeros_like(param)
    optimizer.step()
    state = optimizer.state[param]
    assert torch.equal(param, start) and state["projector"].shape == (4, 4)
    assert not state["projector"].any() and int(state["next_refresh"]) == 0
    run(optimizer, [param], range(2))
    assert state["projector"].any() and param.isfinite().all() and not torch.equal(param, start)


def test_a_nan_reaches_its_own_weight_and_no_other():
    params = parameters()
    optimizer = make(params)
    run(optimizer, params, range(2))
    basis = optimizer.state[params[0]]["projector"].clone()
    give_gradients(params, 2)
    params[0].grad[2, 2] = float("nan")
    optimizer.step()
    assert params[0].isnan().any() and all(param.isfinite().all() for param in params[1:])
    assert torch.equal(optimizer.state[params[0]]["projector"], basis)


def test_step_projected_is_the_step_of_the_gradients_it_was_made_from():
    params, others = parameters(), parameters()
    optimizer, whole = make(params, maximize=True), make(others, maximize=True)
    low_rank, plain = params[:3], params[3:]
    assert all(optimizer.needs_gradient(param) for param in params)
    for step in range(5):
        give_gradients(params, step)
        give_gradients(others, step)
        whole.step()
        ready = [param for param in params if not optimizer.needs_gradient(param)]
        assert len(ready) == (0 if step % 3 == 0 else len(low_rank))
        low = {param: optimizer.project(param) for param in ready}
        for param in ready:
            param.grad = None
        optimizer.step_projected(low)
        optimizer.step()
        for one, other in zip(params, others, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    assert all(optimizer.needs_gradient(param) for param in plain)


def test_steps_from_a_low_rank_gradient_are_refused_where_that_says_too_little():
    params = parameters()
    optimizer = make(params)
    with pytest.raises(ValueError, match="low: expected parameters for which needs_gradient is False"):
        optimizer.step_projected({params[0]: torch.zeros(3, 24)})
    run(optimizer, params, range(1))
    with pytest.raises(ValueError, match=r"low: expected \(3, 24\) for a parameter of shape \(24, 16\), got \(24, 3\)"):
        optimizer.step_projected({params[0]: torch.zeros(24, 3)})
    with pytest.raises(ValueError, match="param: expected a low-rank parameter with a gradient"):
        optimizer.project(params[3])
    with pytest.raises(ValueError, match="param: expected a parameter of this optimizer"):
        optimizer.project(parameters()[0])
    fira = make(params, residual="fira")
    run(fira, params, range(1))
    assert fira.needs_gradient(params[0])


ANYWHERE = [
    *({"projector": name} for name in PROJECTORS),
    {"refresh": "lazy"},
    {"state_dtype": "8bit", "moments": "rotate"},
    {"rule": "adafactor"},
    {"projector_format": "int4", "residual": "error_feedback", "feedback_dtype": "8bit"},
]


@pytest.mark.parametrize("options", ANYWHERE, ids=lambda options: "-".join(options.values()))
def test_the_default_device_is_none_of_its_business(options):
    """What is read on the host, or drawn there, is made there also under torch.set_default_device."""

    def stepped(device):
        # The last is large enough for an iteration towards its leading vectors.
        params = [*parameters(), torch.nn.Parameter(torch.zeros(400, 420))]
        optimizer = make(params, **{"refresh_every": 1, **options})
        for step in range(2):
            give_gradients(params, step)
            with torch.device(device):
                optimizer.step()
                optimizer.load_state_dict(optimizer.state_dict())
        return snapshot(optimizer, params)

    assert_equal(stepped("meta"), stepped("cpu"))


def test_a_rate_on_the_cpu_is_a_number_to_another_device():
    """torch.distributed.checkpoint puts one in the place of any tensor while it has an optimizer make its states."""
    rate = rate_on(torch.tensor(0.25), torch.device("meta"))
    assert rate.device.type == "meta" and rate.dtype == torch.float64
    own = torch.tensor(0.25)
    assert rate_on(own, torch.device("cpu")) is own
