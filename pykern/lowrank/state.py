"""What the optimizer keeps of each parameter: tensors only."""

import torch
from torch import Tensor

from .bases import basis_of
from .distributed import is_distributed, spread
from .feedback import feedback_state
from .matrices import Job
from .options import complete_group, is_low_rank
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


def _sharded_axes(job: Job) -> dict[str, tuple[int, int]]:
    """The tensors of a DTensor's state that are in shards: along which axis, and its size over all shards."""
    empty = local_state(job.outline(0))
    sizes: dict[str, tuple[int, int]] = {}
    for length in job.shards.lengths(job.whole_length):
        for name, value in local_state(job.outline(length)).items():
            for axis, (size, none) in enumerate(zip(value.shape, empty[name].shape, strict=True)):
                if none == 0 and size > 0:
                    sizes[name] = (axis, sizes.get(name, (axis, 0))[1] + size)
    return sizes


def distributed_state(job: Job, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the optimizer keeps of a DTensor: of the shards in `state`, DTensors that share their memory."""
    axes = _sharded_axes(job) if job.shards.axis is not None else {}
    return {name: job.shards.distribute(value, *axes[name]) if name in axes else value for name, value in state.items()}


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
    outline: dict[str, Tensor] = {}
    if is_low_rank(param, group):
        job = Job.of(param, index, group, {})
        if job.shards is not None:
            make_state(job, outline)
        else:
            outline = local_state(job.outline())
    else:
        outline = plain_state(param if is_distributed(param) else torch.empty_like(param, device="meta"))
    where = f"state_dict: parameter {index} of shape {tuple(param.shape)}"
    if outline.keys() != state.keys():
        raise ValueError(
            f"{where}: expected the state {sorted(outline)}, which its group's options need, got {sorted(state)}; load "
            "it into an optimizer with the groups of the one that saved it"
        )
    fitted = {}
    for name, expected in outline.items():
        value = state[name]
        if not isinstance(value, Tensor) or value.shape != expected.shape or value.dtype != expected.dtype:
            got = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"{where}: expected {name} to be {expected.dtype} {tuple(expected.shape)}, got {got}; it was saved for "
                "a parameter of another shape or dtype, or under other options"
            )
        if is_distributed(expected):
            fitted[name] = expected.copy_(spread(value.detach().to(param.device), expected))
        else:
            device = "cpu" if name in HOST_STATE else param.device
            whole = value.detach().full_tensor() if is_distributed(value) else value.detach()
            fitted[name] = torch.empty_strided(
                expected.shape, expected.stride(), dtype=expected.dtype, device=device
            ).copy_(whole)
    return fitted
