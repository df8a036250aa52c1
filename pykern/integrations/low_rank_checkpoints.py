"""Checkpoints of the galore-torch and fira packages, for pykern's optimizers."""

import torch
from torch import Tensor

_GROUP = {
    "lr": "lr",
    "betas": "betas",
    "eps": "eps",
    "weight_decay": "weight_decay",
    "rank": "rank",
    "update_proj_gap": "refresh_every",
    "proj_type": "side",
    "scale": "scale",
    "alpha": "scale",
}
"""The packages' names for options of a group, and ours."""


def convert_optimizer_state(state_dict: dict) -> dict:
    """The state_dict of galore_torch.GaLoreAdamW or fira.FiraAdamW as one for GaLoreAdamW or FiraAdamW of pykern.

    The groups get `parity`, and the projector "svd", so that training goes on with the packages' numbers. Moments
    become float32, whatever the packages kept; of a weight that is projected from the right they are transposed.
    The file has to be read by torch.load(weights_only=False), since these packages keep a Python object per parameter::

        saved = torch.load("optimizer.pt", weights_only=False)
        optimizer = GaLoreAdamW(groups, parity="galore_torch", projector="svd")
        optimizer.load_state_dict(convert_optimizer_state(saved))

    Args:
        state_dict: of the package's optimizer. It is not changed.

    Returns:
        A state_dict of tensors only, for an optimizer with the same groups.

    Raises:
        ValueError: the state of another optimizer, such as the 8-bit ones, or one without bias correction.
    """
    fira = any("alpha" in group for group in state_dict["param_groups"])
    groups, states = [], {}
    for theirs in state_dict["param_groups"]:
        if not theirs.get("correct_bias", True):
            raise ValueError("param_groups: expected correct_bias=True, got False, which pykern does not have")
        group = {ours: theirs[name] for name, ours in _GROUP.items() if name in theirs}
        group.update(
            params=list(theirs["params"]),
            rank=theirs.get("rank"),
            parity="fira" if fira else "galore_torch",
            residual="fira" if fira else "none",
            projector="svd",
        )
        groups.append(group)
        for key in theirs["params"]:
            if key in state_dict["state"]:
                states[key] = _converted(key, state_dict["state"][key], group)
    return {"state": states, "param_groups": groups}


def _converted(key: int, theirs: dict, group: dict) -> dict[str, Tensor]:
    if not {"step", "exp_avg", "exp_avg_sq"} <= theirs.keys():
        raise ValueError(
            f"state: expected step, exp_avg and exp_avg_sq of parameter {key}, got {sorted(theirs)}; only the "
            "AdamW of galore_torch and fira can be converted, not their 8-bit or Adafactor variants"
        )
    device = theirs["exp_avg"].device
    state = {"step": torch.tensor(float(theirs["step"]), device=device)}
    moments = {name: _wide(theirs[name]) for name in ("exp_avg", "exp_avg_sq")}
    if "projector" not in theirs:
        return {**state, **moments}
    basis, kind, gap = theirs["projector"].ortho_matrix, theirs["projector"].proj_type, group["refresh_every"]
    # Theirs choose a basis before the steps that begin with step % gap == 0.
    state["refreshes"] = torch.tensor(-(-int(theirs["step"]) // gap), device="cpu")
    state["next_refresh"] = state["refreshes"] * gap
    if kind == "full":
        state["projector"] = basis[0].contiguous().clone()
        state["other_projector"] = _wide(basis[1]).mT.contiguous()
    elif _is_right(moments["exp_avg"].shape, basis.shape, kind):
        state["projector"] = basis.mT.contiguous()
        moments = {name: moment.mT.contiguous() for name, moment in moments.items()}
    else:
        # Theirs is a view of all singular vectors.
        state["projector"] = basis.contiguous().clone()
    if group["residual"] == "fira":
        norm = theirs["scaling_grad"]
        state["residual_norm"] = _wide(torch.as_tensor(norm, device=device)).reshape(())
    return {**state, **moments}


def _is_right(moment: torch.Size, basis: torch.Size, kind: str) -> bool:
    """Whether a weight is projected from the right: moments [rows, rank], basis [rank, columns]."""
    if kind in ("left", "right"):
        return kind == "right"
    rows, columns = moment[0], basis[1]
    return moment[1] == basis[0] and (rows >= columns) == (kind == "std")


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.float64 if tensor.dtype == torch.float64 else torch.float32).clone()
