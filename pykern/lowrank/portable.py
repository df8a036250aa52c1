"""8-bit moments in state dictionaries, where the blocks of one layout meet those of another.

A shard's blocks begin with it, so their scales fit no other number of shards. What state_dict gives of a DTensor are
therefore the moments themselves, in float32 and with a scale of one, of which any number of processes can take their
parts; load_state_dict quantises those. The names stay, as torch.distributed.checkpoint asks the state itself for them;
a checkpoint in codes does not fit those scales, so that it cannot be read as values unnoticed.

A block that is whole on both sides comes back bit for bit: its largest magnitude is its scale, for code 0, the nearest
to minus one, stands here for minus one, which it was made of.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..reference.lowrank import QUANT_BLOCK, dynamic_map, quantize
from .distributed import gathered, is_distributed, like_shards, local_tensor


def _moments(state: Mapping[str, Tensor]) -> list[str]:
    """The names of 8-bit moments, as codes or values."""
    return [
        name for name in state if isinstance(state[name], Tensor) and isinstance(state.get(f"{name}_scale"), Tensor)
    ]


def _signed(name: str) -> bool:
    return name == "exp_avg"


def _values(codes: Tensor, scale: Tensor, signed: bool) -> Tensor:
    table = dynamic_map(signed).to(scale)
    if signed:
        table[0] = -1.0
    return table[codes.long()] * scale.repeat_interleave(QUANT_BLOCK, dim=1)[:, : codes.shape[1]]


def shards_as_values(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the optimizer keeps of a DTensor, with its 8-bit moments as values: DTensors where their codes are."""
    result = dict(state)
    for name in _moments(state):
        codes, scale = state[name], state[f"{name}_scale"]
        values = _values(local_tensor(codes), scale, _signed(name))
        result[name] = like_shards(values, codes) if is_distributed(codes) else values
        result[f"{name}_scale"] = torch.ones((), device=scale.device)
    return result


def whole_as_values(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A loaded state with its 8-bit moments as values, if it has codes as parameters without shards have them."""
    result = dict(state)
    for name in _moments(state):
        codes, scale = gathered(state[name]), gathered(state[f"{name}_scale"])
        blocks = (codes.shape[0], -(-codes.shape[-1] // QUANT_BLOCK)) if codes.dim() == 2 else ()
        if codes.dtype == torch.uint8 and scale.shape == blocks:
            result[name], result[f"{name}_scale"] = _values(codes, scale, _signed(name)), scale.new_ones(())
    return result


def whole_as_codes(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A loaded state with its 8-bit moments as parameters without shards have them, if it has values."""
    result = dict(state)
    for name in _moments(state):
        values = gathered(state[name])
        if values.dtype == torch.float32 and values.dim() == 2:
            result[name], result[f"{name}_scale"] = quantize(values, _signed(name))
    return result


def shards_as_codes(kept: dict[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state`, of the form that shards_as_values gives `kept`, its 8-bit moments quantised into those of `kept`."""
    result = dict(state)
    for name in _moments(kept):
        codes, scale = quantize(local_tensor(state[name]), _signed(name))
        local_tensor(kept[name]).copy_(codes)
        kept[f"{name}_scale"].copy_(scale)
        result[name], result[f"{name}_scale"] = kept[name], kept[f"{name}_scale"]
    return result
