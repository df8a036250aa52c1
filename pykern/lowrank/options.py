"""The options of a parameter group: their defaults, the peers' names for them, and what they may be."""

import torch
from torch import Tensor

from .bases import PROJECTOR_FORMATS
from .feedback import FEEDBACK_DTYPES
from .matrices import SIDES, matrix_shape
from .matrix_rules import SHAPE_SCALES
from .projectors import PROJECTORS
from .quantized import int8_weight
from .refresh import MOMENTS, REFRESHES
from .residuals import RESIDUALS
from .rules import RULES, STATE_DTYPES

ROUNDINGS = ("nearest", "stochastic", "kahan")

PARITY: dict[str, dict] = {
    "galore_torch": {"residuals": ("none",), "decay": "after", "corrected_eps": False},
    "fira": {
        "residuals": ("none", "fira"),
        "decay": "after",
        "corrected_eps": False,
        "scaled_residual": True,
        "zero_norm_limits": True,
    },
    "apollo_torch": {
        "residuals": ("apollo_channel", "apollo_tensor"),
        "decay": "after",
        "corrected_eps": False,
        "zero_norm_limits": True,
    },
}
"""What `parity` fixes: the residuals that the package has, the order of epsilon and decay, the limiter's details."""

ALIASES = {"update_proj_gap": "refresh_every", "proj_type": "side", "alpha": "scale"}
"""The GaLore, Fira and APOLLO packages' names for options of a group."""

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

CHOICES: dict[str, tuple] = {
    "rule": tuple(RULES),
    "side": SIDES,
    "projector_format": PROJECTOR_FORMATS,
    "refresh": REFRESHES,
    "moments": tuple(MOMENTS),
    "residual": tuple(RESIDUALS),
    "feedback_dtype": FEEDBACK_DTYPES,
    "state_dtype": STATE_DTYPES,
    "shape_scale": tuple(SHAPE_SCALES),
    "rounding": ROUNDINGS,
    "decay": ("before", "after"),
}


def complete_group(group: dict) -> None:
    """Checks a group and fills in what `parity` decides."""
    parity = group["parity"]
    if parity is not None:
        if parity not in PARITY:
            raise ValueError(f"parity: expected None or one of {sorted(PARITY)}, got {parity!r}")
        fixed = dict(PARITY[parity])
        allowed = fixed.pop("residuals")
        if group["residual"] not in allowed:
            raise ValueError(f"residual: expected one of {allowed} with parity={parity!r}, got {group['residual']!r}")
        group.update(fixed)
    for name, default in (("corrected_eps", True), ("scaled_residual", False), ("zero_norm_limits", False)):
        group.setdefault(name, default)
    if group["eps"] is None:
        group["eps"] = 1e-8 if parity is None else 1e-6
    for name, choices in CHOICES.items():
        if group[name] not in choices:
            raise ValueError(f"{name}: expected one of {choices}, got {group[name]!r}")
    if group["projector"] is not None and group["projector"] not in PROJECTORS:
        raise ValueError(
            f"projector: expected one of {tuple(PROJECTORS)}, or for the whole optimizer a function or a tensor; "
            f"got {group['projector']!r}"
        )
    rule = RULES[group["rule"]]
    if group["state_dtype"] not in rule.state_dtypes:
        raise ValueError(
            f"state_dtype: expected one of {rule.state_dtypes} with rule={group['rule']!r}, "
            f"got {group['state_dtype']!r}"
        )
    if group["side"] == "full" and RESIDUALS[group["residual"]].measured:
        raise ValueError(
            f'side: "full" has no channels to scale, so not with residual={group["residual"]!r}; expected one of '
            f"{tuple(side for side in SIDES if side != 'full')}"
        )
    if group["side"] == "full" and group["projector"] is not None and PROJECTORS[group["projector"]].basis is not None:
        raise ValueError(
            f'side: "full" keeps vectors, and projector={group["projector"]!r} gives indices; expected one of '
            f"{tuple(name for name, row in PROJECTORS.items() if row.basis is None)}"
        )
    if group["momentum"] is None:
        group["momentum"] = rule.default_momentum
    _check_numbers(group)
    for param in group["params"]:
        if param.dtype not in FLOATS:
            raise TypeError(f"params: expected float32, float64, bfloat16 or float16, got {param.dtype}")
        if int8_weight(param) is not None:
            _check_int8(group)


def _check_int8(group: dict) -> None:
    """What a group with 8-bit weights (Int8Linear) must be."""
    residual = RESIDUALS[group["residual"]]
    if group["rank"] is None:
        raise ValueError(
            "params: expected an 8-bit weight in a group with a rank, got one in a group without; low_rank_groups "
            "puts it there"
        )
    if not residual.linear and not residual.feedback:
        raise ValueError(
            f'residual: expected "none" or "error_feedback" with an 8-bit weight, got {group["residual"]!r}'
        )
    if group["rounding"] == "kahan":
        raise ValueError('rounding: an 8-bit weight is rounded stochastically, so not with "kahan"')


def is_low_rank(param: Tensor, group: dict) -> bool:
    """Whether a parameter of this group is stepped in a subspace: it has two or more axes, and the group a rank."""
    return group["rank"] is not None and param.dim() >= 2 and param.numel() > 0 and min(matrix_shape(param.shape)) > 0


def _check_numbers(group: dict) -> None:
    for name in ("rank", "refresh_every", "seed"):
        if name == "rank" and group[name] is None:
            continue
        if not isinstance(group[name], int) or isinstance(group[name], bool):
            raise TypeError(f"{name}: expected an int, got {type(group[name]).__name__}")
        if name != "seed" and group[name] < 1:
            raise ValueError(f"{name}: expected at least 1, got {group[name]}")
    lr = group["lr"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1 or lr.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"lr: expected one float32 or float64 element, got {lr.dtype} {tuple(lr.shape)}")
        for param in group["params"]:
            check_rate_device(lr, param.device)
    elif not lr >= 0:
        raise ValueError(f"lr: expected a rate of at least 0, got {lr}")
    if len(group["betas"]) != 2 or not all(0 <= beta < 1 for beta in group["betas"]):
        raise ValueError(f"betas: expected two numbers in [0, 1), got {group['betas']}")
    if group["momentum"] is not None and not 0 <= group["momentum"] < 1:
        raise ValueError(f"momentum: expected None or a number in [0, 1), got {group['momentum']}")
    for name in ("projector_memory", "feedback_share"):
        if not 0 <= group[name] <= 1:
            raise ValueError(f"{name}: expected a number in [0, 1], got {group[name]}")
    if (group["projector_memory"] > 0 or group["feedback_momentum"]) and not _keeps_momentum(group):
        raise ValueError(
            'projector_memory, feedback_momentum: expected rule "adamw" or "adabelief", moments that are not 8-bit, '
            f'and a side that is not "full"; got {group["rule"]!r}, {group["state_dtype"]!r}, {group["side"]!r}'
        )
    for name in ("eps", "weight_decay", "scale", "growth_limit", "residual_scale"):
        if not group[name] >= 0:
            raise ValueError(f"{name}: expected a number of at least 0, got {group[name]}")


def _keeps_momentum(group: dict) -> bool:
    """Whether the state has an average of the gradient that can be projected up as it is."""
    averages = group["rule"] in ("adamw", "adabelief")
    return averages and group["state_dtype"] != "8bit" and group["side"] != "full"


def check_rate_device(lr: Tensor, device: torch.device) -> None:
    if lr.device != device:
        raise ValueError(f"lr: expected a float, or a tensor on {device} as the parameters are; got one on {lr.device}")
