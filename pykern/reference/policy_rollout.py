"""What rollout_correction means, in plain PyTorch: one sequence after the other."""

import math

import torch
from torch import Tensor


def rollout_correction(
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    weight: str | None = "token",
    weight_clip: tuple[float, float] = (0.0, 2.0),
    weight_rule: str = "truncate",
    reject: tuple[str, ...] = (),
    reject_bounds: tuple[tuple[float, float], ...] = (),
    veto: float | None = None,
    normalize: bool = False,
    limit: float = math.inf,
    unscored: str = "nan",
) -> tuple[Tensor | None, Tensor, dict[str, Tensor]]:
    """Weights, the tokens that stay, and metrics, as pykern.rollout_correction gives them."""
    valid = torch.ones_like(old_logprobs, dtype=torch.bool) if mask is None else mask != 0
    if cu_seqlens is None:
        pieces = list(range(old_logprobs.shape[0]))
    else:
        pieces = [slice(begin, end) for begin, end in zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:])]
    low, high = weight_clip
    weights = torch.zeros_like(old_logprobs) if weight == "token" else old_logprobs.new_zeros(len(pieces))
    keep = torch.zeros_like(valid)
    rows = []
    for index, piece in enumerate(pieces):
        old, rollout = old_logprobs[piece][valid[piece]], rollout_logprobs[piece][valid[piece]]
        if unscored == "one":
            rollout = torch.where(rollout.isnan(), old, rollout)
        d = old - rollout
        within = d.clamp(-limit, limit)
        divergences = {"k1": -within, "k2": within.square() / 2, "k3": within.exp() - within - 1}
        if weight == "sequence":
            raw = d.sum().clamp(-limit, limit).exp()
        elif weight == "geometric":
            raw = (d.sum() / max(len(d), 1)).clamp(-limit, limit).exp()
        else:
            raw = within.exp()
        if weight_rule == "truncate":
            bounded = raw.clamp(low, high)
        else:
            bounded = torch.where((raw >= low) & (raw <= high), raw, 0.0)
        stays, failures = torch.ones_like(d, dtype=torch.bool), {}
        for criterion, (least, most) in zip(reject, reject_bounds):
            level, name = criterion.rsplit("_", 1)
            if name == "k1":
                least, most = (math.log(bound) if bound > 0 else -math.inf for bound in (least, most))
            statistic = divergences[name]
            if level != "token" and len(d):
                of_sequence = {"seq_sum": torch.sum, "seq_mean": torch.mean, "seq_max": torch.max}[level]
                statistic = of_sequence(statistic).expand_as(d)
            passes = (statistic >= least) & (statistic <= most)
            failures[criterion] = ~passes
            stays = stays & passes
        vetoed = veto is not None and bool((d < math.log(veto)).any())
        stays = stays & (not vetoed)
        if weight == "token":
            weights[piece] = weights[piece].masked_scatter(valid[piece], bounded)
        elif weight is not None:
            weights[index] = bounded
        keep[piece] = keep[piece].masked_scatter(valid[piece], stays)
        if len(d):
            rows.append((old, rollout, d, within, raw, bounded, stays, failures, vetoed))

    def over_tokens(of_row) -> Tensor:
        return torch.cat([of_row(*row).to(old_logprobs.dtype) for row in rows]).mean()

    def over_sequences(of_row) -> Tensor:
        return torch.stack([torch.as_tensor(of_row(*row)).to(old_logprobs.dtype) for row in rows]).mean()

    if not rows:
        return None if weight is None else weights, keep, {}
    applied = torch.cat([row[5].expand_as(row[2]) for row in rows]) if weight else torch.ones(1).to(old_logprobs)
    each = [row[4].flatten() for row in rows] if weight else [torch.ones(1).to(old_logprobs)]
    diffs = torch.stack([row[1].mean() - row[0].mean() for row in rows])
    floor = low if low > 0 else 1 / high
    metrics = {
        "weight_mean": applied.mean(),
        "weight_std": applied.std(correction=0),
        "weight_max": applied.max(),
        "weight_min": applied.min(),
        "weight_fraction_high": (torch.cat(each) > high).double().mean() if weight else applied.sum() * 0,
        "weight_fraction_low": (torch.cat(each) < floor).double().mean() if weight else applied.sum() * 0,
        "effective_sample_size": applied.mean().square() / applied.square().mean(),
        "normalization": torch.ones(()),
        "rejected_fraction": over_tokens(lambda *row: ~row[6]),
        "rejected_sequence_fraction": over_sequences(lambda *row: (~row[6]).any()),
        "vetoed_fraction": over_sequences(lambda *row: row[8]),
        "kl": over_tokens(lambda *row: -row[2]),
        "k3_kl": over_tokens(lambda *row: row[2].exp() - row[2] - 1),
        "training_ppl": over_sequences(lambda *row: (-row[0].mean()).exp()),
        "training_log_ppl": over_sequences(lambda *row: -row[0].mean()),
        "rollout_ppl": over_sequences(lambda *row: (-row[1].mean()).exp()),
        "rollout_log_ppl": over_sequences(lambda *row: -row[1].mean()),
        "log_ppl_diff": diffs.mean(),
        "log_ppl_abs_diff": diffs.abs().mean(),
        "log_ppl_diff_max": diffs.max(),
        "log_ppl_diff_min": diffs.min(),
        "ppl_ratio": diffs.exp().mean(),
        "chi2_token": over_tokens(lambda *row: (2 * row[3]).exp()) - 1,
        "chi2_seq": over_sequences(lambda *row: (2 * row[2].sum().clamp(-limit, limit)).exp()) - 1,
    }
    for criterion in reject:
        metrics[f"rejected_{criterion}"] = over_tokens(lambda *row: row[7][criterion])
        metrics[f"rejected_{criterion}_sequences"] = over_sequences(lambda *row: row[7][criterion].any())
    if normalize and weight:
        mean = applied.mean() if weight == "token" else torch.stack([row[5] for row in rows]).mean()
        if mean > 1e-8:
            weights, metrics["normalization"] = weights / mean, mean
    return None if weight is None else weights, keep, metrics
