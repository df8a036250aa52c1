"""Parameter groups: which weights of a model are stepped in a subspace."""

import re
from collections.abc import Sequence

import torch

_CONVOLUTIONS = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)


def is_target(name: str, targets: str | Sequence[str]) -> bool:
    """Whether `targets`, as low_rank_groups has it, names the module."""
    if isinstance(targets, str):
        return targets == "all-linear" or re.fullmatch(targets, name) is not None
    return any(target in name for target in targets)


def low_rank_groups(
    model: torch.nn.Module,
    *,
    rank: int,
    targets: str | Sequence[str] = "all-linear",
    exclude: str | Sequence[str] = (),
    convolutions: bool = False,
    **options,
) -> list[dict]:
    """Splits a model's trainable parameters into a low-rank group and a plain AdamW group.

    Args:
        model: the module whose parameters are to be trained.
        rank: rank of the low-rank group.
        targets: which torch.nn.Linear modules have their weight in the low-rank group: "all-linear" for all of
            them; a regular expression that must match a module's whole name; or a list of strings, one of which
            must occur in the name. A weight shared with an embedding always gets plain AdamW.
        exclude: which of these stay out of it all the same, such as "lm_head": a regular expression or a list, as
            above.
        convolutions: targets are Conv1d, Conv2d and Conv3d modules too. Their weights [out, in, ...] are stepped as
            matrices [out, in * ...].
        options: further keys of the low-rank group (scale, refresh_every, side, lr, ...).

    Returns:
        [{"params", "rank", **options}, {"params", "rank": None}], each parameter once; the second group is left
        out if it is empty.

    Raises:
        ValueError: nothing matches `targets`, or all of it matches `exclude`.
    """
    kinds = (torch.nn.Linear, *(_CONVOLUTIONS if convolutions else ()))
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    low_rank = {
        id(module.weight)
        for name, module in model.named_modules()
        if isinstance(module, kinds)
        and is_target(name, targets)
        and not is_target(name, exclude)
        and id(module.weight) not in embeddings
    }
    trainable = [param for param in model.parameters() if param.requires_grad]
    inside = [param for param in trainable if id(param) in low_rank]
    outside = [param for param in trainable if id(param) not in low_rank]
    if not inside:
        without = f" without {exclude!r}" if exclude else ""
        modules = "modules" if convolutions else "torch.nn.Linear modules"
        raise ValueError(
            f'targets: expected "all-linear", a regular expression or names of {modules} of the model with trainable '
            f"weights, but nothing matches {targets!r}{without}"
        )
    groups = [{"params": inside, "rank": rank, **options}]
    if outside:
        groups.append({"params": outside, "rank": None})
    return groups
