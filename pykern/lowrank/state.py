"""What the optimizer keeps of each parameter: tensors only."""

import torch
from torch import Tensor

from .bases import basis_of
from .distributed import gathered, is_distributed, spread
from .feedback import feedback_state
from .matrices import Job
from .options import complete_group, is_low_rank
from .portable import shards_as_codes, shards_as_values, whole_as_codes, whole_as_values
from .refresh import HOST_STATE, refresh_state
from .residuals import RESIDUALS
from .rules import RULES


def wide_dtype(param: Tensor) -> torch.dtype:
    """The dtype of moments and low-rank gradients."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def seed_of(seed: int, index: int, shard: int = 0) -> int:
    """A seed of its own for every parameter, and every shard of one, in 63 bits."""
    return (seed * 0x9E3779B97F4A7C15 + index * 0xBF58476D1CE4E5B9 + shard * 0x94D049BB133111EB) % 2**63


def plain_state(param: Tensor) -> dict[str, Tensor]:
    """The state of a plain AdamW parameter before its first step."""
    return {
        "step": torch.zeros((), dtype=torch.float32, device=param.device),
        "exp_avg": torch.zeros_like(param, dtype=wide_dtype(param), requires_grad=False),
        "exp_avg_sq": torch.zeros_like(param, dtype=wide_dtype(param), requires_grad=False),
    }


def local_state(job: Job) -> dict[str, Tensor]:
    """The state of a low-rank parameter before its first step; of a DTensor, this process's shards."""
    param, group = job.param, job.group
    device, wide = param.device, wide_dtype(param)
    state = {"step": torch.zeros((), dtype=torch.float32, device=device)}
    state.update(basis_of(group).init(job))
    state.update(refresh_state(group))
    # A rule that mixes columns sees those of all shards, and all processes keep its moments.
    shape = (job.rank, job.length if RULES[group["rule"]].columnwise else job.whole_length)
    if group["side"] == "full":
        state["other_projector"] = torch.zeros(job.length, job.rank, dtype=wide, device=device)
        shape = (job.rank, job.rank)
    state.update(RULES[group["rule"]].init(shape, wide, device, group))
    if RESIDUALS[group["residual"]].measured:
        state["residual_norm"] = torch.full((), -1.0, dtype=wide, device=device)
    if RESIDUALS[group["residual"]].feedback:
        state.update(feedback_state(job))
    if group["rounding"] == "kahan":
        state["compensation"] = torch.zeros_like(job.weight)
    return state


def _sharded_axes(job: Job) -> dict[str, dict[int, int]]:
    """The tensors of a DTensor's state that are in shards: {axis of the weight: their dimension that goes with it}."""
    dims: dict[str, dict[int, int]] = {}
    # What has one place for both lengths, as the scale of 8-bit moments, is each process's own.
    outline = local_state(job.outline((1, 1)))
    for axis, shape in ((job.shards.compressed, (2, 1)), (job.shards.along, (1, 2))):
        if job.shards.cut(axis):
            for name, value in local_state(job.outline(shape)).items():
                for dim, (size, other) in enumerate(zip(value.shape, outline[name].shape, strict=True)):
                    if size != other:
                        dims.setdefault(name, {})[axis] = dim
    return dims


def distributed_state(job: Job, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the optimizer keeps of a DTensor: of the shards in `state`, DTensors that share their memory."""
    axes, sizes = _sharded_axes(job), (job.rows, job.columns)
    return {
        name: job.shards.distribute(value, axes[name], sizes) if name in axes else value
        for name, value in state.items()
    }


def make_state(job: Job, kept: dict) -> None:
    """Gives a job its first state, and the optimizer what it keeps of that."""
    job.state = local_state(job)
    kept.update(job.state if job.shards is None else distributed_state(job, job.state))
    if job.shards is None:
        # The same dictionary, so that neither can go without the other.
        job.state = kept


def fitted_states(optimizer: torch.optim.Optimizer, state_dict: dict) -> dict[Tensor, dict[str, Tensor]]:
    """The states in a state_dict as the optimizer's own: dtypes as saved, devices, strides and shards as made here.

    The groups' options come from the state_dict, as everywhere in torch.optim; so the states must be those that its
    options and the optimizer's parameters ask for, and are refused here if not.
    """
    states: dict[Tensor, dict[str, Tensor]] = {}
    index = 0
    for saved, current in zip(state_dict["param_groups"], optimizer.param_groups, strict=True):
        group = {**optimizer.defaults, **saved, "params": current["params"]}
        complete_group({**group, "lr": 0.0 if isinstance(group["lr"], Tensor) else group["lr"]})
        for key, param in zip(saved["params"], current["params"], strict=True):
            if state_dict["state"].get(key):
                states[param] = _fitted(param, index, group, state_dict["state"][key])
            index += 1
    return states


def _fitted(param: Tensor, index: int, group: dict, state: dict) -> dict[str, Tensor]:
    job = Job.of(param, index, group, {}) if is_low_rank(param, group) else None
    if job is None:
        expected = plain_state(param if is_distributed(param) else torch.empty_like(param, device="meta"))
    elif job.shards is None:
        expected, state = local_state(job.outline()), whole_as_codes(state)
    else:
        kept: dict[str, Tensor] = {}
        make_state(job, kept)
        expected, state = shards_as_values(kept), whole_as_values(state)
    where = f"state_dict: parameter {index} of shape {tuple(param.shape)}"
    if expected.keys() != state.keys():
        raise ValueError(
            f"{where}: expected the state {sorted(expected)}, which its group's options need, got {sorted(state)}; "
            "load it into an optimizer with the groups of the one that saved it"
        )
    fitted = {}
    for name, outline in expected.items():
        value = state[name]
        if not isinstance(value, Tensor) or value.shape != outline.shape or value.dtype != outline.dtype:
            got = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"{where}: expected {name} to be {outline.dtype} {tuple(outline.shape)}, got {got}; it was saved for "
                "a parameter of another shape or dtype, or under other options"
            )
        if is_distributed(outline):
            fitted[name] = outline.copy_(spread(value.detach().to(param.device), outline))
        else:
            device = "cpu" if name in HOST_STATE else param.device
            fitted[name] = torch.empty_strided(
                outline.shape, outline.stride(), dtype=outline.dtype, device=device
            ).copy_(gathered(value.detach()))
    return fitted if job is None or job.shards is None else shards_as_codes(kept, fitted)
