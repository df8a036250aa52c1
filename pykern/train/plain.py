"""The loss and the optimizer step of the plain update: chains of PyTorch calls, by the references' formulas."""

import math

import torch
from torch import Tensor, nn

from .. import LOSSES
from ..reference import lowrank as reference

PLAIN_LOSSES = tuple(
    name
    for name, row in LOSSES.items()
    if row.rule in ("clip", "weight")
    and row.ratio in ("token", "sequence")
    and (row.stabilisation, row.anchor, row.weight_negative_only) == ("none", None, False)
    and row.ratio_limit == math.inf
    and not row.needs
)
"""The losses that plain_policy_loss knows, and the trainer offers: those made of log-probabilities and advantages."""


def _widened(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class PlainLowRankAdamW(torch.optim.Optimizer):
    """The rule of a pykern low-rank optimizer, eagerly: singular vectors by SVD, then one call per operation."""

    def __init__(self, param_groups: list[dict]):
        """param_groups: those of the pykern optimizer, with every default filled in."""
        super().__init__([dict(group) for group in param_groups], {})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            rule = {
                "lr": group["lr"],
                "beta1": group["betas"][0],
                "beta2": group["betas"][1],
                "eps": group["eps"],
                "weight_decay": group["weight_decay"],
                "decay_after": group["decay"] == "after",
                "corrected_eps": group["corrected_eps"],
            }
            for param in group["params"]:
                if param.grad is None:
                    continue
                if group["rank"] is None:
                    self._full_step(param, rule)
                else:
                    self._low_rank_step(param, group, rule)

    def _full_step(self, param: Tensor, rule: dict) -> None:
        state, weight, gradient = self.state[param], _widened(param), _widened(param.grad)
        if not state:
            state.update(step=0, exp_avg=torch.zeros_like(weight), exp_avg_sq=torch.zeros_like(weight))
        state["step"] += 1
        weight, state["exp_avg"], state["exp_avg_sq"] = reference.adam_step(
            weight, gradient, state["exp_avg"], state["exp_avg_sq"], state["step"], **rule
        )
        param.copy_(weight)

    def _low_rank_step(self, param: Tensor, group: dict, rule: dict) -> None:
        state, weight, gradient = self.state[param], _widened(param), _widened(param.grad)
        right = param.shape[0] >= param.shape[1]
        rank = min(group["rank"], *param.shape)
        if not state:
            shape = (param.shape[0], rank) if right else (rank, param.shape[1])
            state.update(step=0, exp_avg=weight.new_zeros(shape), exp_avg_sq=weight.new_zeros(shape))
            state["projector"] = weight.new_zeros(param.shape[1] if right else param.shape[0], rank)
            state["norm"] = -1.0 if group["residual"] == "fira" else None
        if state["step"] % group["refresh_every"] == 0 and gradient.any():
            state["projector"] = reference.leading_vectors(gradient, rank, right)
        state["step"] += 1
        weight, state["exp_avg"], state["exp_avg_sq"], state["norm"] = reference.low_rank_adam_step(
            weight, gradient, state["projector"], state["exp_avg"], state["exp_avg_sq"], state["step"], state["norm"],
            scale=group["scale"], right=right, scaled_residual=group["scaled_residual"], **rule,
        )  # fmt: skip
        param.copy_(weight)


def plain_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module) -> torch.optim.Optimizer:
    """The plain twin of `optimizer`, which steps `model`."""
    if isinstance(optimizer, torch.optim.AdamW):
        return torch.optim.AdamW(model.parameters(), lr=optimizer.defaults["lr"], weight_decay=0.0)
    return PlainLowRankAdamW(optimizer.param_groups)


def plain_policy_loss(
    loss: str, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, lengths: Tensor, horizon: float
) -> Tensor:
    """The rows of pykern's table of losses, one PyTorch call per operation. Tokens flat, `lengths` per response."""
    row = LOSSES[loss]
    owner = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)

    def per_response(values: Tensor) -> Tensor:
        return torch.zeros(len(lengths), dtype=values.dtype, device=values.device).index_add(0, owner, values)

    log_ratio = logprobs - old_logprobs
    if row.ratio == "sequence":
        log_ratio = (per_response(log_ratio) / lengths)[owner]
    ratio, advantage = log_ratio.exp(), advantages[owner]
    clipped = ratio.clamp(1 - row.clip_low, 1 + row.clip_high)
    if row.rule == "weight":
        terms = -clipped.detach() * advantage * logprobs
    else:
        terms = torch.maximum(-advantage * ratio, -advantage * clipped)
        terms = torch.where(advantage < 0, torch.minimum(terms, -advantage * row.dual_clip), terms)
    return {
        "token-mean": lambda: terms.mean(),
        "token-sum": lambda: terms.sum(),
        "seq-mean-token-sum": lambda: per_response(terms).mean(),
        "seq-mean-token-mean": lambda: (per_response(terms) / lengths).mean(),
        "seq-mean-token-sum-norm": lambda: per_response(terms).mean() / horizon,
    }[row.aggregate]()
