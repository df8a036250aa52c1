"""Choices among the tokens of a batch against their definition, written out with Python loops and sorts."""

import math

import pytest
import torch

import pykern
from tests.support import compile_whole


def batch(rows=6, columns=83, dtype=torch.float64, poisoned=True):
    """Log-probabilities, old ones, advantages per row, entropies and a mask under which all hold garbage."""
    mask = torch.rand(rows, columns) < 0.7
    logprobs = -3 * torch.rand(rows, columns, dtype=torch.float64)
    tensors = [
        logprobs,
        logprobs + 0.4 * torch.randn(rows, columns),
        3 * torch.rand(rows, columns, dtype=torch.float64),
    ]
    if poisoned:
        garbage = torch.tensor([math.nan, math.inf, -math.inf]).double()[torch.randint(0, 3, mask.shape)]
        tensors = [torch.where(mask, tensor, garbage) for tensor in tensors]
    return *(tensor.to(dtype) for tensor in tensors), torch.randn(rows).to(dtype), mask


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_top_entropy(dtype, share):
    entropy, mask = batch(dtype=dtype)[2], batch()[4]
    entropy = torch.where(mask, torch.rand(mask.shape).to(dtype), math.nan)
    actual = pykern.top_entropy_mask(entropy, mask, share=share)
    threshold = entropy[mask].double().quantile(1 - share)
    assert torch.equal(actual, (entropy.double() >= threshold) & mask)
    assert actual.sum() >= share * mask.sum()


@pytest.mark.usefixtures("everywhere")
def test_top_entropy_of_nothing_and_of_equal_ones():
    entropy = torch.full((3, 5), 0.5)
    assert pykern.top_entropy_mask(entropy, share=0.2).all()
    assert not pykern.top_entropy_mask(entropy, torch.zeros(3, 5)).any()


def covariances(logprobs, advantages, mask):
    per_token = advantages[:, None].expand_as(logprobs)
    return (per_token - per_token[mask].mean()) * (logprobs - logprobs[mask].mean())


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("share, seed", [(2e-4, 0), (0.05, 1), (0.05, 2), (1.0, 3)])
def test_clip_cov(share, seed):
    logprobs, old, _, advantages, mask = batch()
    keywords = {"covariance_low": 0.2, "covariance_high": 2.0, "clip_low": 0.2, "clip_high": 0.28}
    keep = pykern.clip_cov_mask(logprobs, old, advantages, mask, share=share, seed=seed, **keywords)
    ratio, per_token = (logprobs - old).exp(), advantages[:, None].expand_as(logprobs)
    clipped = ((per_token > 0) & (ratio > 1.28)) | ((per_token < 0) & (ratio < 0.8))
    covariance = covariances(logprobs, advantages, mask)
    candidates = mask & (covariance > 0.2) & (covariance < 2.0) & ~clipped
    assert 20 < candidates.sum() < mask.sum() / 2
    assert not (~keep & ~candidates).any()
    assert (~keep).sum() == min(max(int(share * mask.sum()), 1), int(candidates.sum()))
    assert torch.equal(keep, pykern.clip_cov_mask(logprobs, old, advantages, mask, share=share, seed=seed, **keywords))


@pytest.mark.usefixtures("everywhere")
def test_clip_cov_draws_anew_with_another_seed():
    logprobs, old, _, advantages, mask = batch()
    draw = lambda seed: pykern.clip_cov_mask(logprobs, old, advantages, mask, covariance_low=0.1, seed=seed)  # noqa: E731
    drawn = {tuple((~draw(seed)).nonzero()[0].tolist()) for seed in range(20)}
    assert len(drawn) > 10


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("share", [2e-4, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kl_cov(dtype, share):
    logprobs, _, _, advantages, mask = batch(dtype=dtype)
    actual = pykern.kl_cov_mask(logprobs, advantages, mask, share=share)
    covariance = covariances(logprobs.double(), advantages.double(), mask).masked_fill(~mask, -math.inf)
    count = max(int(share * mask.sum()), 1)
    expected = torch.zeros(mask.numel(), dtype=torch.bool)
    expected[covariance.flatten().topk(count).indices] = True
    assert torch.equal(actual.flatten(), expected)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("share", [0.001, 0.1])
def test_low_probability(share):
    logprobs, proxy, _, advantages, mask = batch()
    actual = pykern.low_probability_mask(logprobs, proxy, advantages, mask, share=share)
    negative = (mask & (advantages < 0)[:, None]).flatten().nonzero().flatten().tolist()
    count = max(int(share * len(negative)), 1)
    lowest = sorted(negative, key=lambda place: logprobs.flatten()[place])[:count]
    expected = torch.zeros(mask.numel(), dtype=torch.bool)
    for place in lowest:
        expected[place] = logprobs.flatten()[place] < proxy.flatten()[place]
    assert torch.equal(actual.flatten(), expected)
    published = pykern.low_probability_mask(logprobs, proxy, advantages, mask, share=share, published=True)
    assert torch.equal(published, actual if count > 1 else torch.zeros_like(actual))
    assert published.any() == (count > 1)


@pytest.mark.usefixtures("everywhere")
def test_low_probability_given_up_by_its_proxy():
    logprobs, advantages = torch.full((1, 4), -2.0), torch.tensor([-1.0])
    proxy = torch.tensor([[-math.inf, -1.0, -math.inf, -3.0]])
    actual = pykern.low_probability_mask(logprobs, proxy, advantages, share=1.0)
    assert actual.tolist() == [[False, True, False, False]]


def hapo(entropy, logprobs, old, mask, published):
    """Token by token, with the division by the root of the mean square that cancels."""
    levels = entropy.clamp(min=1e-8).log()
    kept = levels[mask].sort().values
    pivot = kept[round(0.8 * (len(kept) - 1))]
    scale = (levels[mask] - pivot).square().mean().sqrt()
    h = (levels - pivot) / scale
    highest, lowest = h[mask].max(), h[mask].min()
    low, high, factor = (torch.empty_like(entropy) for _ in range(3))
    for place in mask.nonzero().tolist():
        place = tuple(place)
        h_hat = h[place] / (highest if h[place] > 0 else lowest if published else lowest.abs())
        low[place] = 0.2 * (1 - 0.5 * h_hat) if h_hat <= 0 else 0.2
        high[place] = 0.28 * (1 + 0.5 * h_hat) if h_hat > 0 else 0.28
        inside = 1 - low[place] / 2 < (logprobs[place] - old[place]).exp() < 1 + high[place] / 2
        factor[place] = 1 + 0.9 * h_hat if (h_hat > 0) != inside else 1
    return low, high, factor


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_hapo(dtype, published):
    logprobs, old, entropy, _, mask = batch(dtype=dtype)
    keywords = {"clip_high": 0.28, "clip_strength": 0.5, "advantage_strength": 0.9, "published": published}
    actual = pykern.hapo_modulation(entropy, logprobs, old, mask, **keywords)
    expected = hapo(entropy.double(), logprobs.double(), old.double(), mask, published)
    for ours, theirs in zip(actual, expected):
        assert ours.dtype == dtype and ours.isfinite().all()
        torch.testing.assert_close(
            ours[mask].double(), theirs[mask], rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=0
        )
    low, high, factor = (tensor[mask] for tensor in actual)
    assert (high > 0.28).any() and (factor > 1).any()
    assert (low > 0.2).any() == (factor < 1).any() == (not published)


@pytest.mark.usefixtures("everywhere")
def test_hapo_of_equal_entropies_changes_nothing():
    logprobs = torch.zeros(2, 3)
    low, high, factor = pykern.hapo_modulation(torch.ones(2, 3), logprobs, logprobs)
    assert low.eq(0.2).all() and high.eq(0.2).all() and factor.eq(1).all()


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("entropy", [0.4, 0.5, 0.6, torch.tensor([0.6])])
@pytest.mark.parametrize("samples", [0, 2, 5, 100])
@pytest.mark.parametrize("batch_size, resampled", [(8, 6), (3, 12), (5, 0), (0, 4)])
def test_aepo(batch_size, resampled, samples, entropy):
    advantages, again = torch.randn(batch_size), torch.randn(resampled)
    rows, replaced = pykern.aepo_rows(advantages, again, entropy=entropy, target=0.5, samples=samples, threshold=0.1)
    fits = [row for row in range(resampled) if again[row] > 0.1][:samples]
    fits = fits[: len(fits) // 2 if entropy > 0.5 else len(fits)][:batch_size]
    assert rows.tolist() == fits + [resampled + row for row in range(len(fits), batch_size)]
    assert replaced.tolist() == [1.0] * len(fits) + advantages.tolist()[len(fits) :]


CALLS = {
    "top_entropy_mask": lambda l, o, e, a, m: pykern.top_entropy_mask(e, m),
    "clip_cov_mask": lambda l, o, e, a, m: pykern.clip_cov_mask(l, o, a, m, covariance_low=0.1),
    "kl_cov_mask": lambda l, o, e, a, m: pykern.kl_cov_mask(l, a, m),
    "low_probability_mask": lambda l, o, e, a, m: pykern.low_probability_mask(l, o, a, m, share=0.1),
    "hapo_modulation": lambda l, o, e, a, m: torch.stack(pykern.hapo_modulation(e, l, o, m)),
}


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("name", [name for name in CALLS if name != "clip_cov_mask"])
def test_packed_tokens_get_the_same(name):
    """Clip-Cov aside, whose draw depends on a token's place."""
    logprobs, old, entropy, advantages, mask = batch()
    padded = CALLS[name](logprobs, old, entropy, advantages, mask)
    per_token = advantages[:, None].expand_as(mask)[mask]
    packed = CALLS[name](logprobs[mask], old[mask], entropy[mask], per_token, None)
    assert torch.equal(packed, padded[..., mask])


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("name", CALLS)
def test_compiles_whole_and_is_constant(name):
    tensors = batch(poisoned=False)
    direct = CALLS[name](*tensors)
    assert torch.equal(compile_whole(CALLS[name])(*tensors), direct)
    leaves = [tensor.requires_grad_() if tensor.is_floating_point() else tensor for tensor in tensors]
    assert not CALLS[name](*leaves).requires_grad


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (1, 1)])
@pytest.mark.parametrize("name", CALLS)
def test_sizes(name, shape):
    result = CALLS[name](*batch(*shape, poisoned=False))
    assert result.shape[-2:] == shape


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda l, a: pykern.top_entropy_mask(l, share=2), ValueError, "share: .* got 2"),
        (lambda l, a: pykern.top_entropy_mask(l.long()), TypeError, "entropy: .* got torch.int64"),
        (lambda l, a: pykern.top_entropy_mask(l, a), ValueError, "mask: expected the shape of entropy"),
        (lambda l, a: pykern.kl_cov_mask(l, a[:1]), ValueError, r"advantages: .* \[2, 3\].* got \[1\]"),
        (lambda l, a: pykern.clip_cov_mask(l, a, a), ValueError, r"old_logprobs: .* \[2, 3\], got \[2\]"),
        (lambda l, a: pykern.low_probability_mask(l, a, a), ValueError, "proxy_logprobs: expected the shape"),
        (lambda l, a: pykern.hapo_modulation(a, l, l), ValueError, "entropy: expected the shape of logprobs"),
        (lambda l, a: pykern.opsm_mask(l, a, a, delta=0.1), ValueError, "rollout_logprobs: expected the shape"),
        (lambda l, a: pykern.opsm_mask(a, a, a, delta=0.1), ValueError, r"logprobs: expected \[B, T\], got \[2\]"),
        (lambda l, a: pykern.aepo_rows(l, a, entropy=0, target=0, samples=1), ValueError, r"advantages: .* \[2, 3\]"),
        (lambda l, a: pykern.aepo_rows(a, a, entropy=0, target=0, samples=-1), ValueError, "samples: .* got -1"),
        (lambda l, a: pykern.hapo_modulation(l, l, l, pivot=3), ValueError, "q: .* got 3"),
        (lambda l, a: pykern.clip_cov_mask(l, l.to("meta"), a), ValueError, "old_logprobs: .* cpu, got meta"),
        (lambda l, a: pykern.kl_cov_mask(l, a.to("meta")), ValueError, "advantages: .* cpu, got meta"),
    ],
)
def test_refuses(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.zeros(2, 3), torch.zeros(2))


def written_out(name, logprobs, old, proxy, entropy, advantages, mask):
    """The papers' losses of a batch, token by token, under autograd."""
    ratio = (logprobs - old).exp()

    def clipped(advantages, low, high):
        return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - low, 1 + high))

    advantages = advantages[:, None].expand_as(logprobs)
    if name == "clip_cov":
        keep = pykern.clip_cov_mask(logprobs, old, advantages, mask, covariance_low=0.1, share=0.1)
        losses = torch.where(keep, clipped(advantages, 0.2, 0.2), 0.0)
    elif name == "kl_cov":
        held = pykern.kl_cov_mask(logprobs, advantages, mask, share=0.1)
        losses = -advantages * ratio + torch.where(held, (logprobs - old).abs(), 0.0)
    elif name == "lp_reg":
        held = pykern.low_probability_mask(logprobs, proxy, advantages, mask, share=0.1)
        divergence = (proxy - logprobs).exp() + logprobs - proxy - 1
        losses = torch.where(held, -advantages * ratio + 0.7 * divergence, clipped(advantages, 1.0, 9.0))
    else:
        low, high, factor = pykern.hapo_modulation(entropy, logprobs, old, mask, clip_high=0.28)
        losses = clipped(factor * advantages, low, high)
    return losses[mask].mean()


def by_policy_loss(name, logprobs, old, proxy, entropy, advantages, mask):
    """The same by the row of that name, as the docstrings say."""
    keywords = {}
    if name == "clip_cov":
        keywords["keep"] = pykern.clip_cov_mask(logprobs, old, advantages, mask, covariance_low=0.1, share=0.1)
    elif name == "kl_cov":
        keywords["anchor_keep"] = pykern.kl_cov_mask(logprobs, advantages, mask, share=0.1)
    elif name == "lp_reg":
        held = pykern.low_probability_mask(logprobs, proxy, advantages, mask, share=0.1)
        keywords |= {"anchor_logprobs": proxy, "anchor_coef": 0.7, "anchor_keep": held}
    else:
        low, high, factor = pykern.hapo_modulation(entropy, logprobs, old, mask, clip_high=0.28)
        keywords |= {"clip_low": low, "clip_high": high}
        advantages = factor * advantages[:, None]
    return pykern.policy_loss(logprobs, old, advantages, mask=mask, loss=name, **keywords)[0]


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("name", ["clip_cov", "kl_cov", "lp_reg", "hapo"])
def test_policy_loss_takes_them(name):
    logprobs, old, entropy, advantages, mask = batch()
    # Ratios up to 20, so that a clip of 1 + 9 would show.
    logprobs, proxy = logprobs + torch.where(torch.rand(mask.shape) < 0.1, 3.0, 0.0), logprobs + torch.randn(mask.shape)
    results = []
    for loss, poisoned in ((by_policy_loss, True), (written_out, False)):
        clean = lambda tensor: tensor if poisoned else torch.where(mask, tensor, -1.0)  # noqa: B023,E731
        leaf = clean(logprobs).clone().requires_grad_()
        value = loss(name, leaf, clean(old), clean(proxy), clean(entropy), advantages, mask)
        value.backward()
        results.append((value.detach(), leaf.grad))
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
