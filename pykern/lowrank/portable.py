"""8-bit moments in state dictionaries, where the blocks of one layout meet those of another.

A shard's blocks begin with it, so their scales fit no other number of shards. What state_dict gives of a DTensor are
therefore the moments themselves, float32 under a name of their own, of which any number of processes can take their
parts; load_state_dict quantises those. A block that is whole on both sides comes back bit for bit: its largest
magnitude is its scale, for code 0, the nearest to minus one, stands here for minus one, which it was made of.
"""

from collections.abc import Mapping

from torch import Tensor

from ..reference.lowrank import QUANT_BLOCK, dynamic_map, quantize
from .distributed import gathered, is_distributed, like_shards, local_tensor

_VALUES = "_dequantized"


def _moments(state: Mapping[str, Tensor]) -> list[str]:
    """The names of 8-bit moments."""
    return [name for name in state if f"{name}_scale" in state]


def _signed(name: str) -> bool:
    return name == "exp_avg"


def _values(codes: Tensor, scale: Tensor, signed: bool) -> Tensor:
    table = dynamic_map(signed).to(scale)
    if signed:
        table[0] = -1.0
    return table[codes.long()] * scale.repeat_interleave(QUANT_BLOCK, dim=1)[:, : codes.shape[1]]


def widened(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A parameter's state with its 8-bit moments in float32: DTensors where their codes are."""
    names = _moments(state)
    result = {name: value for name, value in state.items() if name.removesuffix("_scale") not in names}
    for name in names:
        codes, scale = state[name], state[f"{name}_scale"]
        values = _values(local_tensor(codes), scale, _signed(name))
        # Where both forms are there, torch.distributed.checkpoint has left its own beside what was loaded: this one.
        result[name + _VALUES] = like_shards(values, codes) if is_distributed(codes) else values
    return result


def narrowed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of a parameter that is no DTensor, from either form."""
    result = dict(state)
    for name in [name for name in state if name.endswith(_VALUES)]:
        name_of_codes = name.removesuffix(_VALUES)
        codes, scale = quantize(gathered(result.pop(name)), _signed(name_of_codes))
        result[name_of_codes], result[f"{name_of_codes}_scale"] = codes, scale
    return result


def narrowed_into(kept: dict[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the optimizer keeps of a DTensor, `kept`, with the values of `state`, which has its form and shards."""
    for name in _moments(kept):
        codes, scale = quantize(local_tensor(state[name + _VALUES]), _signed(name))
        local_tensor(kept[name]).copy_(codes)
        kept[f"{name}_scale"].copy_(scale)
    return {name: state.get(name, value) for name, value in kept.items()}
