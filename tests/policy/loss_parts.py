"""The op of policy_loss under the names of its definition: every part beside every other, in no row of LOSSES too."""

import math

import torch
from torch import Tensor

from pykern.policy.losses import (
    AGGREGATES,
    KL_ESTIMATORS,
    KL_GRADIENTS,
    METRICS,
    RATIOS,
    ROLLOUT_RULES,
    RULES,
    STABILISATIONS,
)
from pykern.reference import policy_loss as reference
from tests.support import assert_accurate

NEVER = math.inf

FLAGS = ("keep", "anchor_keep")
OF_TOKENS = ("logprobs", "old_logprobs", "ref_logprobs", "anchor_logprobs", "rollout_logprobs")
POSITIVE = ("rollout_weights", "advantage_weights", "token_weights", "entropy", "clip_low", "clip_high")


def parts_of(lengths: list[int], dtype=torch.float64, *, padded=False, spread=0.3, unmasked=0.7) -> dict[str, Tensor]:
    """Everything that a call may have, one value per token; NaN where tokens are masked or lie in the padding.

    Packed, or one row of the longest length for each.
    """
    columns = max(lengths, default=0)
    total = len(lengths) * columns if padded else sum(lengths)
    shape = (len(lengths), columns) if padded else (total,)
    logprobs = -0.05 - 3 * torch.rand(shape, dtype=torch.float64)
    tensors = {name: logprobs + spread * torch.randn(shape, dtype=torch.float64) for name in OF_TOKENS}
    tensors["logprobs"] = logprobs
    tensors |= {name: torch.randn(shape, dtype=torch.float64) for name in ("advantages", "second_advantages")}
    tensors |= {name: 0.1 + torch.rand(shape, dtype=torch.float64) for name in POSITIVE}
    mask = torch.rand(shape) < unmasked
    if padded:
        mask &= torch.arange(columns) < torch.tensor(lengths)[:, None]
    tensors = {name: tensor.to(dtype).masked_fill(~mask, math.nan) for name, tensor in tensors.items()}
    tensors |= {name: torch.rand(shape) < 0.8 for name in FLAGS} | {"mask": mask}
    if not padded:
        tensors["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0)
    return tensors


def per_sequence(tensors: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    """The same with these tensors one value per sequence."""
    count = len(tensors["cu_seqlens"]) - 1 if "cu_seqlens" in tensors else len(tensors["logprobs"])
    return tensors | {
        name: (torch.rand if name in POSITIVE else torch.randn)(count).to(tensors[name].dtype) for name in names
    }


def choose(tensors: dict[str, Tensor], names: str, **parts) -> dict:
    """Keyword arguments of the definition: what every call has, the tensors of these names, and parts."""
    always = ("logprobs", "old_logprobs", "advantages", "mask", "cu_seqlens")
    chosen = {name: tensors[name] for name in (*always, *names.split()) if name in tensors}
    if parts.get("kl"):
        chosen["ref_logprobs"] = tensors["ref_logprobs"]
        parts.setdefault("kl_coef", 0.3)
    if parts.get("anchor"):
        chosen["anchor_logprobs"] = tensors["anchor_logprobs"]
        parts.setdefault("anchor_coef", 0.2)
    return chosen | parts


def exact(named: dict, dtype=torch.float64) -> list[Tensor]:
    """Of the definition: loss, gradients of the log-probabilities and of the entropy, metrics."""
    named = {
        name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in named.items()
    }
    leaves = [named[name].clone().requires_grad_() for name in ("logprobs", "entropy") if name in named]
    named |= dict(zip(("logprobs", "entropy") if "entropy" in named else ("logprobs",), leaves))
    loss, metrics = reference.policy_loss(**named)
    zero = logprob_zero = torch.zeros((), dtype=dtype)
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True) if loss.requires_grad else [None] * len(leaves)
    gradients = [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, gradients)]
    gradients = [torch.where(named["mask"], gradient, logprob_zero) for gradient in gradients]
    return [loss.detach(), *gradients, torch.stack([metrics.get(name, zero).to(dtype) for name in METRICS])]


def run(named: dict, with_gradient=True) -> list[Tensor]:
    """Of the op: the same."""
    given = lambda name, default: named.get(name, default)  # noqa: E731
    clipped_log = given("ratio", "token") == "clipped_sequence"
    tensors = [
        named.get(name)
        for name in (
            *("logprobs", "old_logprobs", "advantages", "mask", "cu_seqlens", "keep", "ref_logprobs"),
            *("anchor_logprobs", "anchor_keep", "rollout_logprobs", "rollout_weights", "entropy"),
        )
    ]
    clips, bounds = [], []
    for name, sign in (("clip_low", -1), ("clip_high", 1)):
        value = given(name, 0.2)
        clips.append(value if isinstance(value, Tensor) else None)
        bounds.append((0 if clipped_log else 1) + sign * (0.0 if isinstance(value, Tensor) else value))
    tensors += [*clips, *(named.get(name) for name in ("second_advantages", "advantage_weights", "token_weights"))]
    kl, anchor = (0 if named.get(name) is None else 1 + KL_ESTIMATORS.index(named[name]) for name in ("kl", "anchor"))
    choices = [
        RATIOS.index(given("ratio", "token")),
        RULES.index(given("rule", "clip")),
        int(given("weight_negative_only", False)),
        STABILISATIONS.index(given("stabilisation", "none")),
        kl,
        KL_GRADIENTS.index(given("kl_gradient", "value")),
        anchor,
        ROLLOUT_RULES.index(given("rollout_rule", "truncate")),
        AGGREGATES.index(given("aggregate", "token-mean")),
        int(given("count_empty", False)),
    ]
    columns = 1.0 if "cu_seqlens" in named else float(max(named["logprobs"].shape[1], 1))
    settings = [
        *bounds,
        given("ratio_limit", NEVER),
        given("dual_clip", NEVER),
        *given("shape", (0.0, 0.0, 0.0, 0.0)),
        given("negative_scale", 1.0),
        given("stabilisation_low", NEVER),
        given("stabilisation_high", NEVER),
        given("log_ratio_limit", NEVER),
        given("sequence_log_ratio_low", -NEVER),
        given("sequence_log_ratio_high", NEVER),
        given("kl_coef", 0.0),
        given("kl_log_ratio_limit", NEVER),
        given("kl_limit", NEVER),
        given("anchor_coef", 0.0),
        given("rollout_low", 0.0),
        given("rollout_high", 2.0),
        given("entropy_coef", 0.0),
        float(given("denominator", 0.0)),
        float(given("horizon", columns)),
    ]
    results = torch.ops.pykern.policy_loss_forward.default(
        *tensors, choices, [float(value) for value in settings], with_gradient
    )
    loss, coefficient, entropy_coefficient, metrics = results
    return [loss, coefficient, *([entropy_coefficient] if "entropy" in named else []), metrics]


def assert_parts_match(named: dict) -> None:
    """Loss, gradients and metrics of the op against the definition, within the error of the definition itself."""
    dtype = named["logprobs"].dtype
    # In float64 the definition has no error against itself; the exponential of a sum takes all its roundings.
    units = 8.0 if dtype == torch.float32 else 2.0**14 if named.get("ratio") == "product" else 64.0
    want, same, actual = exact(named), exact(named, dtype), run(named)
    count = len(want) - 2
    for got, true, other in zip(actual[1:-1], want[1:-1], same[1:-1]):
        assert_accurate(got, true, other, units=units)
    # The tokens' terms may cancel in a sum, their roundings do not.
    terms = sum(gradient.abs().sum().item() for gradient in want[1 : 1 + count])
    for name, got, true, other in zip(
        ("loss", *METRICS), (actual[0], *actual[-1]), (want[0], *want[-1]), (same[0], *same[-1])
    ):
        bound = 2 * (other - true).abs() + 4 * units * torch.finfo(dtype).eps * max(true.abs().item(), terms)
        assert (got.double() - true).abs() <= bound, f"{name}: {got} for {true}"
