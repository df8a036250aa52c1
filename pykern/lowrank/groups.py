"""Parameter groups: which weights of a model are stepped in a subspace."""

import re
from collections.abc import Sequence

import torch


def is_target(name: str, targets: str | Sequence[str]) -> bool:
    """Whether `targets`, as low_rank_groups has it, names the module."""
    if isinstance(targets, str):
        return targets == "all-linear" or re.fullmatch(targets, name) is not None
    return any(target in name for target in targets)


def low_rank_groups(
    model: torch.nn.Module, *, rank: int, targets: str | Sequence[str] = "all-linear", **options
) -> list[dict]:
    """Splits a model's trainable parameters into a low-rank group and a plain AdamW group.

    Args:
        model: the module whose parameters are to be trained.
        rank: rank of the low-rank group.
        targets: which torch.nn.Linear modules have their weight in the low-rank group: "all-linear" for all of
            them; a regular expression that must match a module's whole name; or a list of strings, one of which
            must occur in the name. A weight shared with an embedding always gets plain AdamW.
        options: further keys of the low-rank group (scale, refresh_every, side, lr, ...).

    Returns:
        [{"params", "rank", **options}, {"params", "rank": None}], each parameter once; the second group is left
        out if it is empty.

    Raises:
        ValueError: nothing matches `targets`.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    low_rank = {
        id(module.weight)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and is_target(name, targets) and id(module.weight) not in embeddings
    }
    trainable = [param for param in model.parameters() if param.requires_grad]
    inside = [param for param in trainable if id(param) in low_rank]
    outside = [param for param in trainable if id(param) not in low_rank]
    if not inside:
        raise ValueError(
            f'targets: expected "all-linear", a regular expression or names of torch.nn.Linear modules of the model '
            f"with trainable weights, but nothing matches {targets!r}"
        )
    groups = [{"params": inside, "rank": rank, **options}]
    if outside:
        groups.append({"params": outside, "rank": None})
    return groups
