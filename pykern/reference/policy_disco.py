"""What disco_loss means, in plain PyTorch under autograd: one group after the other."""

import math

import torch
from torch import Tensor


def disco_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    rewards: Tensor,
    group_ids: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    score: str,
    negatives: str,
    positives: str,
    tau: float,
    beta: float = 1e3,
    delta: float = 1e-4,
    length_temperature: float = 0.1,
    max_length: float,
    divergence: str = "k3",
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and its metrics, of the true value; pykern.disco_loss takes the parts from its table."""
    valid = torch.ones_like(logprobs, dtype=torch.bool) if mask is None else mask != 0
    if cu_seqlens is None:
        pieces = list(range(logprobs.shape[0]))
    else:
        pieces = [slice(begin, end) for begin, end in zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:])]
    tokens = [(logprobs[piece][valid[piece]], old_logprobs[piece][valid[piece]]) for piece in pieces]
    scores = [((l - old).exp() if score == "ratio" else l).mean() for l, old in tokens]  # noqa: E741
    distances = torch.cat([l - old for l, old in tokens]) if tokens else logprobs.new_zeros(0)  # noqa: E741
    value, mixed, groups = (
        logprobs.sum() * 0 if mask is None else logprobs.new_zeros(()),
        0,
        group_ids.unique().tolist(),
    )
    classes = {1.0: [], 0.0: []}
    for group in groups:
        members = {reward: [] for reward in classes}
        for index in (group_ids == group).nonzero().flatten().tolist():
            reward = rewards[index].item()
            if reward in members and len(tokens[index][0]):
                members[reward].append(index)
                classes[reward].append(scores[index].detach())
        if not members[1.0] or not members[0.0]:
            continue
        mixed += 1
        above = torch.stack([scores[index] for index in members[1.0]])
        below = torch.stack([scores[index] for index in members[0.0]])
        shares = torch.full_like(above, 1 / len(above)).detach()
        if positives == "length":
            lengths = torch.tensor([len(tokens[index][0]) for index in members[1.0]], dtype=logprobs.dtype)
            shares = ((1 - lengths / max_length) / length_temperature).softmax(0).to(above)
        value = value + (shares * above).sum()
        if negatives == "mean":
            value = value - below.mean()
        else:
            value = value - tau * ((below / tau).logsumexp(0) - math.log(len(below)))
    policy = -value / max(len(groups), 1)
    kl, penalty = logprobs.new_zeros(()), logprobs.new_zeros(())
    if len(distances):
        kl = (distances.exp() - distances - 1 if divergence == "k3" else -distances).mean()
        penalty = beta / 2 * (kl - delta).clamp(min=0).square()
    metrics = {
        "policy_loss": policy,
        "penalty": penalty,
        "kl": kl,
        "constraint_violated": (kl > delta).to(kl.dtype),
        "groups": kl.new_tensor(len(groups)),
        "mixed_groups": kl.new_tensor(mixed),
        "positive_score": torch.stack(classes[1.0]).mean() if classes[1.0] else kl.new_zeros(()),
        "negative_score": torch.stack(classes[0.0]).mean() if classes[0.0] else kl.new_zeros(()),
    }
    return policy + penalty, metrics
