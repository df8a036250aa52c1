"""What `token_logprobs` and `linear_token_logprobs` mean, in plain PyTorch."""

import torch
from torch import Tensor


def token_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    entropy: bool = False,
    sum_p2: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """logits [..., V], targets [...]; rows with a negative target give 0 and receive no gradient."""
    if isinstance(temperature, Tensor):
        temperature = temperature.to(logits.dtype).expand(targets.shape).unsqueeze(-1)
    active = targets >= 0
    # The rows left out are replaced before they meet any arithmetic: 0 * NaN would be NaN.
    logits = torch.where(active.unsqueeze(-1), logits, torch.zeros_like(logits))
    log_p = torch.log_softmax(logits / temperature, dim=-1)
    p = log_p.exp()
    zero = torch.zeros_like(log_p[..., 0])
    results = [torch.where(active, log_p.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1), zero)]
    if entropy:
        finite_log_p = torch.where(p == 0, torch.zeros_like(log_p), log_p)
        results.append(torch.where(active, -(p * finite_log_p).sum(-1), zero))
    if sum_p2:
        results.append(torch.where(active, (p * p).sum(-1), zero))
    return tuple(results) if len(results) > 1 else results[0]


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """hidden [N, H], weight [V, H], targets [N], bias [V]; makes the whole [N, V] logits."""
    hidden = torch.where((targets >= 0).unsqueeze(-1), hidden, torch.zeros_like(hidden))
    logits = torch.nn.functional.linear(hidden, weight, bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return token_logprobs(logits, targets, temperature=temperature, entropy=entropy)
