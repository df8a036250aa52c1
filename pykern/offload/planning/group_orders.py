"""Orders that go through the chunks in groups of microbatches: GIS and 1F1B, plain and interleaved.

A group of microbatches passes the first chunk, then the second, and so on; backwards come in the reverse order of
chunks. What tells the schedules apart is the group's size and how many forwards precede the first backward.
"""

from collections.abc import Callable, Sequence

from .types import Action, Order


def fuse(actions: Sequence[Action]) -> tuple[Action, ...]:
    """Both halves of a backward as one, where the backward of the input was."""
    return tuple(
        Action("B", action.chunk, action.microbatch) if action.kind == "I" else action
        for action in actions
        if action.kind != "W"
    )


def least_group(devices: int) -> int:
    """Fewer microbatches than this and the pipeline runs dry between two chunks: ceil(devices / 2)."""
    return -(-devices // 2)


def _visits(chunks: Sequence[int], groups: int, group: int) -> list[tuple[int, int]]:
    return [(chunk, n * group + j) for n in range(groups) for chunk in chunks for j in range(group)]


def _in_groups(
    devices: int, chunks: int, microbatches: int, group: int, first: Callable[[int], int], split_backward: bool
) -> tuple[tuple[Action, ...], ...]:
    """`first(rank)` forwards, then one backward and one forward in turn, as long as there are any.

    Made for whole groups; microbatches beyond the last are then left out, which can't make ranks wait for each other.
    """
    groups = -(-microbatches // group)
    forwards = _visits(range(chunks), groups, group)
    backwards = _visits(range(chunks - 1, -1, -1), groups, group)
    ranks = []
    for rank in range(devices):
        warm_up = min(first(rank), len(forwards))
        actions = [Action("F", *visit) for visit in forwards[:warm_up]]
        for number, visit in enumerate(backwards, start=warm_up):
            actions += [Action("I", *visit), Action("W", *visit)]
            if number < len(forwards):
                actions.append(Action("F", *forwards[number]))
        kept = tuple(action for action in actions if action.microbatch < microbatches)
        ranks.append(kept if split_backward else fuse(kept))
    return tuple(ranks)


def too_small(group: int, devices: int) -> tuple[str]:
    return (f"group={group} cannot keep {devices} devices busy: taken as {least_group(devices)}, half of the devices",)


def _remainder(microbatches: int, group: int) -> tuple[str, ...]:
    if microbatches % group == 0:
        return ()
    return (
        f"microbatches={microbatches} is not a multiple of the group of {group}: the last group has "
        f"{microbatches % group}, and the ranks idle for the rest of it",
    )


def gis(
    devices: int, chunks: int, microbatches: int, *, group: int | None = None, split_backward: bool | None = None
) -> Order:
    """Generalized interleaved schedule: chunks in turn by groups of `group` microbatches (default: `devices`).

    Rank i runs group * (chunks - 1) + devices - i forwards before its first backward, and holds at most as many blocks.
    The weights' backward follows that of the input at once. (PipeOffload, arXiv 2503.01328.)
    """
    asked = devices if group is None else group
    group = max(asked, least_group(devices))
    notes = too_small(asked, devices) if group != asked else ()
    ranks = _in_groups(devices, chunks, microbatches, group, lambda rank: group * (chunks - 1) + devices - rank,
                       split_backward is not False)  # fmt: skip
    return Order("gis", devices, chunks, microbatches, ranks, notes=notes + _remainder(microbatches, group))


def gis_h(
    devices: int, chunks: int, microbatches: int, *, group: int | None = None, split_backward: bool | None = None
) -> Order:
    """GIS with the smallest group, ceil(devices / 2): about half of the memory, for a longer bubble."""
    order = gis(devices, chunks, microbatches, group=group or least_group(devices), split_backward=split_backward)
    return Order("gis_h", devices, chunks, microbatches, order.ranks, notes=order.notes)


def one_f_one_b(
    devices: int, chunks: int, microbatches: int, *, group: int | None = None, split_backward: bool | None = None
) -> Order:
    """1F1B: rank i runs devices - i forwards, then a backward and a forward in turn (arXiv 2104.04473)."""
    if chunks != 1:
        order = one_f_one_b_interleaved(devices, chunks, microbatches, split_backward=split_backward)
        note = f"1F1B has one chunk per device, not {chunks}: planned as interleaved 1F1B"
        return Order(order.schedule, devices, chunks, microbatches, order.ranks, notes=(note, *order.notes))
    ranks = _in_groups(devices, 1, microbatches, 1, lambda rank: devices - rank, split_backward is True)
    return Order("1f1b", devices, chunks, microbatches, ranks)


def one_f_one_b_interleaved(
    devices: int, chunks: int, microbatches: int, *, group: int | None = None, split_backward: bool | None = None
) -> Order:
    """Interleaved 1F1B: groups of `devices` microbatches, and devices * (chunks - 1) + 2 * (devices - i) - 1 forwards
    before rank i's first backward (arXiv 2104.04473)."""
    if chunks == 1:
        order = one_f_one_b(devices, 1, microbatches, split_backward=split_backward)
        note = "interleaved 1F1B needs several chunks per device: with one it is planned as 1F1B"
        return Order(order.schedule, devices, 1, microbatches, order.ranks, notes=(note, *order.notes))

    def first(rank: int) -> int:
        return devices * (chunks - 1) + 2 * (devices - rank) - 1

    ranks = _in_groups(devices, chunks, microbatches, devices, first, split_backward is True)
    return Order("1f1b_interleaved", devices, chunks, microbatches, ranks, notes=_remainder(microbatches, devices))
