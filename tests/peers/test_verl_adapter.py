"""Every estimator and policy loss of verl against what pykern.integrations.verl puts in its place, on the CPU."""

import uuid

import numpy as np
import pytest
import torch
from verl.trainer.config import AlgoConfig
from verl.trainer.ppo import core_algos
from verl.utils import groupwise
from verl.utils.experimental.torch_functional import FusedLinearForPPO
from verl.workers.config import ActorConfig, PolicyLossConfig

import pykern
from pykern.integrations import verl as adapter

ROWS, COLUMNS = 96, 24


def close(ours, theirs, dtype=torch.float32):
    """1e-6 of the largest value: in float32 verl's own sums of cancelling terms are no better."""
    bound = 1e-6 * max(1.0, theirs.abs().max().item()) * (2 if dtype == torch.float32 else 1)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=bound)


# --- advantages -------------------------------------------------------------------------------------------------


def samples(dtype=torch.float32, binary=False, singletons=True):
    """Ragged groups in no order under verl's labels; a reward at each response's last token, none equal in a group."""
    labels = torch.cat([torch.randint(0, 14, (ROWS - 2,)), torch.tensor([90, 91] if singletons else [0, 1])])
    labels = labels.clone()
    labels[:28] = torch.arange(14).repeat(2)  # two of each at least
    lengths = torch.randint(1, COLUMNS + 1, (ROWS,))
    mask = (torch.arange(COLUMNS) < lengths[:, None]).to(dtype)
    rewards = (torch.rand(ROWS) < 0.4).to(dtype) if binary else torch.rand(ROWS).to(dtype)
    token_rewards = torch.zeros(ROWS, COLUMNS, dtype=dtype)
    token_rewards[torch.arange(ROWS), lengths - 1] = rewards
    index = np.array([f"prompt {int(label)}" for label in labels], dtype=object)
    return {"token_level_rewards": token_rewards, "response_mask": mask, "index": index}


def both(name, arguments, extra_ours=None):
    theirs = core_algos.get_adv_estimator_fn(name)(**{k: _copy(v) for k, v in arguments.items()})
    ours = adapter.ADVANTAGES[name](**{k: _copy(v) for k, v in arguments.items()})
    return ours, theirs


def _copy(value):
    return value.clone() if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "name", ["grpo", "grpo_vectorized", "rloo", "rloo_vectorized", "opo", "gpg", "reinforce_plus_plus_baseline"]
)
def test_outcome_estimators(name, dtype):
    ours, theirs = both(name, samples(dtype))
    close(ours[0], theirs[0].to(dtype), dtype)
    close(ours[1], theirs[1].to(dtype), dtype)


def test_labels_that_are_a_tensor():
    """Whose elements are all different objects."""
    arguments = samples()
    numbers = np.unique(arguments["index"], return_inverse=True)[1]
    want = adapter.ADVANTAGES["grpo"](**arguments)[0]
    for index in (torch.from_numpy(numbers), numbers, numbers.tolist()):
        assert torch.equal(adapter.ADVANTAGES["grpo"](**(arguments | {"index": index}))[0], want)


def test_grpo_without_scale():
    ours, theirs = both("grpo", samples() | {"norm_adv_by_std_in_grpo": False})
    close(ours[0], theirs[0])


def test_grpo_passk():
    config = AlgoConfig(norm_adv_by_std_in_grpo=True)
    ours, theirs = both("grpo_passk", samples(singletons=False) | {"config": config})
    close(ours[0], theirs[0])


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_reinforce_plus_plus(gamma):
    arguments = samples()
    arguments["response_mask"] = (torch.rand(ROWS, COLUMNS) < 0.7).float()
    ours, theirs = both("reinforce_plus_plus", arguments | {"config": AlgoConfig(gamma=gamma)})
    close(ours[0], theirs[0])
    close(ours[1], theirs[1])


def test_remax():
    ours, theirs = both("remax", samples() | {"reward_baselines": torch.rand(ROWS)})
    close(ours[0], theirs[0])
    close(ours[1], theirs[1])


@pytest.mark.parametrize("weights", [None, [1.0, 0.25]])
def test_gdpo(weights):
    arguments = samples()
    lengths = arguments["response_mask"].sum(dim=1).long()
    prompts = torch.zeros(ROWS, 3)
    scores = {"correct": np.random.rand(ROWS).astype(object), "format": np.random.rand(ROWS).astype(object)}
    arguments["config"] = {"gdpo_reward_keys": ["correct", "format"], "gdpo_reward_weights": weights}
    arguments["non_tensor_batch"] = scores
    attention = (torch.arange(3 + COLUMNS) < 3 + lengths[:, None]).long()
    arguments["batch"] = {"prompts": prompts, "attention_mask": attention}
    ours, theirs = both("gdpo", arguments)
    close(ours[0], theirs[0])


@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (0.99, 0.95)])
def test_generalized_advantages(gamma, lam):
    arguments = {
        "token_level_rewards": torch.randn(7, 33),
        "values": torch.randn(7, 33),
        "response_mask": (torch.rand(7, 33) < 0.7).float(),
    }
    theirs = core_algos.compute_gae_advantage_return(**arguments, gamma=torch.tensor(gamma), lam=torch.tensor(lam))
    ours = adapter.generalized_advantages(**arguments, gamma=gamma, lam=lam)
    counted = arguments["response_mask"] != 0  # verl whitens what is masked as well
    close(ours[0][counted], theirs[0][counted])
    close(ours[1][counted], theirs[1][counted])


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("name", ["optimal_token_baseline", "tir_optimal_token_baseline"])
def test_optimal_token_baseline(name, tail, weighted):
    arguments = samples() | {
        "old_log_probs": -3 * torch.rand(ROWS, COLUMNS),
        "sum_pi_squared": torch.rand(ROWS, COLUMNS),
        "handle_zero_tail": tail,
    }
    if name.startswith("tir"):
        holes = (torch.rand(ROWS, COLUMNS) < 0.8).float()
        arguments["response_mask"] = arguments["response_mask"] * holes
    if weighted:
        arguments["rollout_is_weights"] = torch.rand(ROWS, COLUMNS)
    ours, theirs = both(name, arguments)
    close(ours[0], theirs[0])
    close(ours[1], theirs[1])


# --- statistics of groups ---------------------------------------------------------------------------------------

NAMES = [uuid.UUID(int=number) for number in (7, 3, 7, 9, 3)]


@pytest.mark.parametrize(
    "labels",
    [
        [2, 2, 5, 7, 5, 2],
        [True, False, True],
        ["3", "0042", "42", "-1"],
        ["b", "a", "b", "c", "0042", 42],
        np.array(["3", 4, "4"], dtype=object),
        np.array([1.0000001, 2.0, 1.0, 3.0000000001]),
        np.array(NAMES, dtype=object),
        np.array([NAMES[0], "x", 4, "x", NAMES[0]], dtype=object),
        np.array([[4, 4], [9, 4]]),
        torch.tensor([[5, 5, 1]], dtype=torch.int16),
        torch.tensor([True, False]),
        torch.tensor([3.0, 1.0, 3.0], dtype=torch.bfloat16),
        torch.tensor([0.5, 10.5, 2.25, 0.5]),
        torch.tensor([]),
        [],
    ],
    ids=str,
)
def test_as_torch_index(labels):
    ours, theirs = adapter.as_torch_index(labels, "cpu"), groupwise.as_torch_index(labels, "cpu")
    assert ours.dtype == torch.int64 and ours.shape == theirs.shape
    assert torch.equal(ours[:, None] == ours, theirs[:, None] == theirs)
    if len(ours):
        assert ours.min() >= min(0, theirs.min()) and ours.max() == theirs.max()


def test_as_torch_index_keeps_integers_and_tells_fractions_apart():
    assert adapter.as_torch_index([9, -4, 9], "cpu").tolist() == [9, -4, 9]
    assert adapter.as_torch_index(["9", "07", "9"], "cpu").tolist() == [9, 7, 9]
    fractions = np.array([0.7, 0.5, 0.7])
    for kind in (np.float16, np.float32, np.float64, object):
        assert adapter.as_torch_index(fractions.astype(kind), "cpu").tolist() == [0, 1, 0]
        assert groupwise.as_torch_index(fractions.astype(kind), "cpu").tolist() == [0, 0, 0]


def test_groups_lie_on_the_device_that_is_named(monkeypatch):
    monkeypatch.setenv("VERL_FORCE_DEVICE", "meta")
    assert adapter.as_torch_index([1, 2]).device.type == "meta"
    assert adapter.as_torch_index([1, 2], "cpu").device.type == "cpu"
    for name in ("VERL_FORCE_DEVICE", "PYTEST_CURRENT_TEST"):
        monkeypatch.delenv(name)
    monkeypatch.setattr(groupwise, "get_device_name", lambda: "meta")
    assert adapter.as_torch_index([1, 2]).device.type == "meta"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("eps", [1e-6, 0.0, 0.25])
@pytest.mark.parametrize("rows, groups", [(0, 1), (1, 1), (2, 1), (40, 60), (500, 7)])
def test_group_mean_std(rows, groups, eps, dtype):
    scores, ids = (4 * torch.rand(rows)).to(dtype), torch.randint(groups, (rows,))
    if rows == 500:
        scores[ids == 3] = 1  # equal, so that the floor shows
    ours = adapter.group_mean_std(scores, ids, eps, device="cpu")
    theirs = groupwise.group_mean_std(scores, ids, eps, device="cpu")
    for own, other in zip(ours, theirs, strict=True):
        assert own.dtype == other.dtype and own.shape == other.shape
        torch.testing.assert_close(own, other, rtol=2e-6, atol=1e-6)
    assert not ours[0].requires_grad


def test_group_mean_std_leaves_out_what_is_not_finite():
    scores = torch.tensor([1.0, float("nan"), 3.0, float("inf"), 5.0], requires_grad=True)
    mean, std, count = adapter.group_mean_std(scores, torch.tensor([0, 0, 0, 2, 3]), device="cpu")
    assert mean.tolist() == [2.0, 0.0, 0.0, 0.0] and count.tolist() == [2.0, 0.0, 0.0, 1.0]
    torch.testing.assert_close(std, torch.tensor([2.0**0.5, 1.0, 1.0, 1.0]))
    with pytest.raises(ValueError, match=r"group_ids: .* \[5\], got \[4\]"):
        adapter.group_mean_std(scores, torch.zeros(4, dtype=torch.int64), device="cpu")
    with pytest.raises(IndexError):
        adapter.group_mean_std(scores, torch.tensor([0, 0, 1, 1, -1]), device="cpu")


# --- losses -----------------------------------------------------------------------------------------------------


def tokens(spread=0.3, rows=7, columns=19, dtype=torch.float32):
    mask = (torch.rand(rows, columns) < 0.7).to(dtype)
    mask[0] = 1
    logprobs = -3 * torch.rand(rows, columns, dtype=dtype)
    old = logprobs + spread * torch.randn(rows, columns, dtype=dtype)
    advantages = torch.randn(rows, dtype=dtype)[:, None].expand(rows, columns)
    return old, logprobs.requires_grad_(), advantages, mask


def settings(**changes):
    loss = PolicyLossConfig(dro_beta=0.3, kl_cov_ratio=0.05, clip_cov_ratio=0.05)
    return ActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, clip_ratio_low=0.2, clip_ratio_high=0.28,
        policy_loss=loss, **changes,
    )  # fmt: skip


LOSSES = [name for name in adapter.LOSS_FUNCTIONS if name != "clip_cov"]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("spread", [0.3, 3.0])
@pytest.mark.parametrize("aggregate", pykern.AGGREGATES)
@pytest.mark.parametrize("name", LOSSES)
def test_losses(name, aggregate, spread, weighted):
    old, logprobs, advantages, mask = tokens(spread)
    weights = torch.rand_like(old) + 0.2 if weighted else None
    if weighted and name == "gspo":
        weights = weights[:, :1].expand_as(old)  # differing ones verl differentiates otherwise
    results = []
    for function in (adapter.LOSS_FUNCTIONS[name], core_algos.get_policy_loss_fn(name)):
        logprobs.grad = None
        loss, metrics = function(old, logprobs, advantages, mask, aggregate, settings(), weights)
        loss.backward()
        results.append((loss.detach(), logprobs.grad, metrics))
    close(results[0][0], results[1][0])
    close(results[0][1], results[1][1])
    named = {"vanilla": 3, "gspo": 3, "cispo": 2, "sapo": 2, "dro": 1}.get(name, 0)
    for metric in ("actor/ppo_kl", "actor/pg_clipfrac", "actor/pg_clipfrac_lower")[:named]:
        assert results[0][2][metric] == pytest.approx(results[1][2][metric], rel=1e-5, abs=1e-6)


def test_clip_cov_where_nothing_is_picked_and_where_all_are():
    old, logprobs, advantages, mask = tokens(0.05)
    ours = adapter.LOSS_FUNCTIONS["clip_cov"]
    theirs = core_algos.get_policy_loss_fn("clip_cov")
    for low, high, share in ((50.0, 60.0, 0.05), (0.2, 60.0, 0.999)):
        config = settings()
        picked = PolicyLossConfig(clip_cov_ratio=share, clip_cov_lb=low, clip_cov_ub=high)
        object.__setattr__(config, "policy_loss", picked)
        results = []
        for function in (ours, theirs):
            logprobs.grad = None
            loss, _ = function(old, logprobs, advantages, mask, "token-mean", config, None)
            loss.backward()
            results.append((loss.detach(), logprobs.grad))
        close(results[0][0], results[1][0])
        close(results[0][1], results[1][1])


def test_clip_cov_draws_anew():
    old, logprobs, advantages, mask = tokens()
    config = settings()
    picked = PolicyLossConfig(clip_cov_ratio=0.05, clip_cov_lb=0.0, clip_cov_ub=60.0)
    object.__setattr__(config, "policy_loss", picked)

    def gradient():
        loss, _ = adapter.LOSS_FUNCTIONS["clip_cov"](old, logprobs, advantages, mask, "token-sum", config, None)
        return torch.autograd.grad(loss, logprobs)[0]

    torch.manual_seed(1)
    first, second = gradient(), gradient()
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(gradient(), first)


@pytest.mark.parametrize("aggregate", ["token-mean", "seq-mean-token-mean"])
def test_a_global_batch_with_nothing_left(aggregate):
    old, logprobs, advantages, mask = tokens()
    config = settings()
    counts = {"dp_size": 2, "batch_num_tokens": 0, "global_batch_size": 0}
    config.global_batch_info.update(counts)
    nothing = torch.zeros_like(mask)
    loss, _ = adapter.LOSS_FUNCTIONS["vanilla"](old, logprobs, advantages, nothing, aggregate, config, None)
    assert loss == 0 and not torch.autograd.grad(loss, logprobs)[0].any()
    assert adapter.agg_loss(logprobs, nothing, aggregate, **counts) == 0


@pytest.mark.parametrize("aggregate", pykern.AGGREGATES)
@pytest.mark.parametrize("name", ["vanilla", "dro", "kl_cov"])
def test_a_share_of_the_global_batch(name, aggregate):
    old, logprobs, advantages, mask = tokens()
    batch = {"dp_size": 2, "batch_num_tokens": 211, "global_batch_size": 16, "loss_scale_factor": 50}
    config = settings()
    config.global_batch_info.update(batch)
    results = [
        function(old, logprobs, advantages, mask, aggregate, config, None)[0].detach()
        for function in (adapter.LOSS_FUNCTIONS[name], core_algos.get_policy_loss_fn(name))
    ]
    close(*results)


@pytest.mark.parametrize("aggregate", pykern.AGGREGATES)
@pytest.mark.parametrize(
    "batch", [{}, {"dp_size": 4, "batch_num_tokens": 100, "global_batch_size": 9, "loss_scale_factor": 7}]
)
def test_aggregation(aggregate, batch):
    values, mask = torch.randn(6, 11).requires_grad_(), (torch.rand(6, 11) < 0.6).float()
    mask[2] = 0
    results = []
    for function in (adapter.agg_loss, core_algos.agg_loss):
        values.grad = None
        loss = function(values, mask, aggregate, **batch)
        loss.backward()
        results.append((loss.detach(), values.grad))
    close(results[0][0], results[1][0])
    close(results[0][1], results[1][1])


KL = {
    "k1": {"kl": "k1"},
    "abs": {"kl": "abs"},
    "k2": {"kl": "k2"},
    "k3": {"kl": "k3"},
    "k1+": {"kl": "k1", "kl_gradient": "straight_through"},
    "k3+": {"kl": "k3", "kl_gradient": "straight_through"},
}


@pytest.mark.parametrize("spread", [0.3, 12.0])
@pytest.mark.parametrize("kind", KL)
def test_kl(kind, spread):
    reference, logprobs, advantages, mask = tokens(spread, dtype=torch.float64)
    theirs = core_algos.agg_loss(core_algos.kl_penalty(logprobs, reference, kind), mask, "seq-mean-token-mean")
    (gradient,) = torch.autograd.grad(theirs, logprobs)
    ours, _ = pykern.policy_loss(
        logprobs, None, torch.zeros(len(mask), dtype=torch.float64), mask=mask, kl_coef=1.0, ref_logprobs=reference,
        aggregate="seq-mean-token-mean", preset="verl", **KL[kind],
    )  # fmt: skip
    ours.backward()
    torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(logprobs.grad, gradient, rtol=1e-6, atol=1e-12)


# --- the head ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_fused_linear(temperature):
    hidden, weight = torch.randn(2, 9, 16), torch.randn(50, 16)
    labels = torch.randint(0, 50, (2, 9))
    results = []
    for module in (adapter.FusedLinearForPPO(), FusedLinearForPPO()):
        x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        logprobs, entropy = module(x, w, labels, temperature)
        (logprobs.sum() + 0.2 * entropy.sum()).backward()
        results.append((logprobs, entropy, x.grad, w.grad))
    for own, other in zip(*results):
        # Of two float32 products, each with roundings of its own.
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-5 * other.abs().max().item())


def test_fused_linear_follows_autocast():
    hidden, weight, labels = torch.randn(9, 16).bfloat16(), torch.randn(50, 16), torch.randint(0, 50, (9,))
    with torch.autocast("cpu", torch.bfloat16):
        logprobs, _ = adapter.FusedLinearForPPO()(hidden, weight, labels)
    assert torch.equal(logprobs, pykern.linear_token_logprobs(hidden, weight.bfloat16(), labels))


# --- registration -----------------------------------------------------------------------------------------------


@pytest.fixture
def registries(monkeypatch):
    monkeypatch.setattr(core_algos, "ADV_ESTIMATOR_REGISTRY", dict(core_algos.ADV_ESTIMATOR_REGISTRY))
    monkeypatch.setattr(core_algos, "POLICY_LOSS_REGISTRY", dict(core_algos.POLICY_LOSS_REGISTRY))


def test_register(registries):
    before = dict(core_algos.POLICY_LOSS_REGISTRY), dict(core_algos.ADV_ESTIMATOR_REGISTRY)
    names = adapter.register()
    adapter.register()
    assert {"pykern_rloo", "pykern_maxrl", "pykern_vanilla", "pykern_dapo"} <= set(names)
    for name, function in before[0].items():
        assert core_algos.get_policy_loss_fn(name) is function
    for name, function in before[1].items():
        assert core_algos.get_adv_estimator_fn(name) is function
    arguments = samples()
    advantages, _ = core_algos.get_adv_estimator_fn("pykern_maxrl")(**arguments)
    assert advantages.shape == (ROWS, COLUMNS) and advantages.isfinite().all()
    old, logprobs, advantages, mask = tokens()
    loss, metrics = core_algos.get_policy_loss_fn("pykern_dapo")(
        old, logprobs, advantages, mask, "token-mean", settings(), None
    )
    assert loss.requires_grad and set(metrics) == {"actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower"}


def test_register_in_place_of(registries):
    adapter.register(replace=("gdpo", "vanilla"))
    assert core_algos.get_adv_estimator_fn("gdpo") is adapter.gdpo
    assert core_algos.get_policy_loss_fn("vanilla") is adapter.LOSS_FUNCTIONS["vanilla"]
    with pytest.raises(ValueError, match="replace: expected names of grpo, "):
        adapter.register(replace=("unknown",))
