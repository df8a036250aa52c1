"""What looks at the whole batch or at whole groups, against eager PyTorch, and verl where it is installed."""

import importlib.util
from collections.abc import Callable

import torch

import pykern
from bench.harness import Case

ROWS, COLUMNS = 256, 1024


def batch() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    logprobs = -3 * torch.rand(ROWS, COLUMNS)
    return {
        "logprobs": logprobs,
        "old": logprobs + 0.1 * torch.randn(ROWS, COLUMNS),
        "mask": torch.arange(COLUMNS) < torch.randint(COLUMNS // 2, COLUMNS + 1, (ROWS, 1)),
        "rewards": (torch.rand(ROWS) < 0.4).float(),
        "ids": torch.arange(ROWS) // 8,
    }


def quantile() -> dict[str, Callable]:
    b = batch()
    return {
        "pykern": lambda: pykern.masked_quantile(b["logprobs"], 0.8, b["mask"]),
        "torch sort": lambda: sorted_quantile(b["logprobs"], b["mask"], 0.8),
    }


def sorted_quantile(values: torch.Tensor, mask: torch.Tensor, q: float) -> torch.Tensor:
    """torch.quantile takes no more than 16 million values and no mask; masked ones go to the end."""
    ordered = torch.where(mask, values, torch.inf).flatten().sort().values
    place = q * (mask.sum() - 1)
    low, high = ordered[place.floor().long()], ordered[place.ceil().long()]
    return low + (high - low) * (place - place.floor())


def share() -> dict[str, Callable]:
    b = batch()
    count = max(int(2e-4 * int(b["mask"].sum())), 1)

    def topk() -> torch.Tensor:
        chosen = torch.zeros(ROWS * COLUMNS, dtype=torch.bool, device=b["mask"].device)
        places = torch.where(b["mask"], b["logprobs"], -torch.inf).flatten().topk(count).indices
        return chosen.index_fill(0, places, True)

    return {"pykern": lambda: pykern.share_mask(b["logprobs"], 2e-4, b["mask"]), "torch topk": topk}


def moments() -> dict[str, Callable]:
    b = batch()

    def eager() -> tuple[torch.Tensor, torch.Tensor]:
        kept = b["logprobs"][b["mask"]]
        return kept.mean(), kept.var()

    return {"pykern": lambda: pykern.masked_moments(b["logprobs"], b["mask"]), "torch": eager}


def token_weights() -> dict[str, Callable]:
    b = batch()

    def eager() -> torch.Tensor:
        lengths = b["mask"].sum(dim=1, keepdim=True)
        return torch.where(b["mask"], 1 / (lengths * (lengths > 0).sum()), 0.0)

    aggregate = "seq-mean-token-mean"
    return {
        "pykern": lambda: pykern.policy_loss_token_weights(b["logprobs"], mask=b["mask"], aggregate=aggregate),
        "torch": eager,
    }


def rollout() -> dict[str, Callable]:
    b = batch()
    providers = {
        "pykern": lambda: pykern.rollout_correction(
            b["logprobs"], b["old"], mask=b["mask"], correction="verl_geo_rs_token_tis"
        )
    }
    if importlib.util.find_spec("verl"):
        from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_rejection_mask as theirs

        mask = b["mask"].float()
        providers["verl"] = lambda: theirs(
            b["logprobs"], b["old"], mask, "token", 2.0, rollout_rs="seq_mean_k1", rollout_rs_threshold="0.999_1.001"
        )
    return providers


def disco() -> dict[str, Callable]:
    b = batch()
    logprobs = b["logprobs"].requires_grad_()

    def step() -> tuple[torch.Tensor, ...]:
        loss, _ = pykern.disco_loss(logprobs, b["old"], b["rewards"], b["ids"], mask=b["mask"])
        return torch.autograd.grad(loss, logprobs)

    def eager() -> tuple[torch.Tensor, ...]:
        lengths = b["mask"].sum(dim=1)
        scores = torch.where(b["mask"], logprobs, 0.0).sum(dim=1) / lengths
        distance = logprobs - b["old"]
        k3 = torch.exp(distance) - distance - 1
        divergence = torch.where(b["mask"], k3, 0.0).sum() / lengths.sum()
        right, grouped = b["rewards"].view(-1, 8) > 0, scores.view(-1, 8)
        positive = torch.where(right, grouped, 0.0).sum(dim=1) / right.sum(dim=1).clamp(min=1)
        wrong = torch.where(right, -torch.inf, grouped / 10)
        negative = 10 * (torch.logsumexp(wrong, dim=1) - torch.log((~right).sum(dim=1)))
        both = right.any(dim=1) & ~right.all(dim=1)
        gain = torch.where(both, positive - negative, 0.0).mean()
        loss = -gain + 500 * torch.relu(divergence - 1e-4).square()
        return torch.autograd.grad(loss, logprobs)

    return {"pykern": step, "torch": eager}


def cases() -> list[Case]:
    shape, tokens = f"{ROWS}x{COLUMNS}", float(ROWS * COLUMNS)
    return [
        Case("policy", "masked_quantile", shape, quantile, bytes=5 * tokens),
        Case("policy", "share_mask", shape, share, bytes=6 * tokens),
        Case("policy", "masked_moments", shape, moments, bytes=5 * tokens),
        Case("policy", "policy_loss_token_weights", shape, token_weights, bytes=5 * tokens),
        Case("policy", "rollout_correction", shape, rollout, bytes=14 * tokens),
        Case("policy", "disco_loss", shape, disco, bytes=25 * tokens),
    ]
