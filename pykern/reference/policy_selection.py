"""What the selections of tokens mean, in plain PyTorch."""

import math

import torch
from torch import Tensor


def masked_quantile(values: Tensor, q: float, mask: Tensor | None = None, interpolation: str = "linear") -> Tensor:
    kept = values.flatten() if mask is None else values[mask]
    if len(kept) == 0 or kept.isnan().any():
        return values.new_full((), math.nan)
    ordered = kept.sort().values
    position = q * (len(ordered) - 1)
    lower, upper = ordered[math.floor(position)], ordered[math.ceil(position)]
    if interpolation == "linear":
        weight = position - math.floor(position)
        return lower if weight == 0 or lower == upper else (1 - weight) * lower + weight * upper
    return {"lower": lower, "higher": upper, "nearest": ordered[round(position)]}[interpolation]


def random_key(seed: int, place: int) -> int:
    """The number that a token draws, of 64 bits; a bijection of its place."""
    low = (1 << 64) - 1
    mixed = ((place + 1) * 0x9E3779B97F4A7C15 + seed * 0xD1342543DE82EF95) & low
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & low
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & low
    return mixed ^ (mixed >> 31)


def share_mask(
    values: Tensor,
    share: float,
    mask: Tensor | None = None,
    *,
    order: str = "largest",
    minimum: int = 0,
    candidates: Tensor | None = None,
    seed: int = 0,
) -> Tensor:
    flat = values.flatten()
    counted = torch.ones_like(flat, dtype=torch.bool) if mask is None else mask.flatten()
    allowed = counted if candidates is None else counted & candidates.flatten()
    count = max(math.floor(share * int(counted.sum())), minimum)
    places = [
        place for place in allowed.nonzero().flatten().tolist() if order == "random" or flat[place] == flat[place]
    ]
    keys = {
        "largest": lambda place: (-flat[place].item(), place),
        "smallest": lambda place: (flat[place].item(), place),
        "random": lambda place: random_key(seed, place),
    }
    selected = torch.zeros_like(counted)
    selected[sorted(places, key=keys[order])[:count]] = True
    return selected.view_as(values)
