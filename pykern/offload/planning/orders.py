"""Pipeline schedules by name: which actions each rank performs, in which order, in closed form.

Three families. GIS and 1F1B, plain and interleaved, go through the chunks in groups of microbatches: a group passes the
first chunk, then the second, and so on, and backwards come in the reverse order of chunks; what tells them apart is the
group's size and how many forwards precede the first backward. PipeOffload spreads a microbatch's chunks evenly over
time. In a V the second of two chunks goes back over the ranks, so the last one holds the two middle stages, and the
first one both ends (arXiv 2405.15362).
"""

import math
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from .types import Action, Kind, Order


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


def _large_enough(group: int, devices: int) -> tuple[int, tuple[str, ...]]:
    least = least_group(devices)
    if group >= least:
        return group, ()
    return least, (f"group={group} cannot keep {devices} devices busy: taken as {least}, half of the devices",)


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
    group, notes = _large_enough(group or devices, devices)
    notes += _remainder(microbatches, group)
    # The same order, without the microbatches that there aren't.
    group = min(group, max(microbatches, least_group(devices)))
    ranks = _in_groups(devices, chunks, microbatches, group, lambda rank: group * (chunks - 1) + devices - rank,
                       split_backward is not False)  # fmt: skip
    return Order("gis", devices, chunks, microbatches, ranks, notes=notes)


def gis_h(
    devices: int, chunks: int, microbatches: int, *, group: int | None = None, split_backward: bool | None = None
) -> Order:
    """GIS with the smallest group, ceil(devices / 2): about half of the memory, for a longer bubble."""
    order = gis(devices, chunks, microbatches, group=group or least_group(devices), split_backward=split_backward)
    return replace(order, schedule="gis_h")


def one_f_one_b(
    devices: int, chunks: int, microbatches: int, *, group: int | None = None, split_backward: bool | None = None
) -> Order:
    """1F1B: rank i runs devices - i forwards, then a backward and a forward in turn (arXiv 2104.04473)."""
    if chunks != 1:
        order = one_f_one_b_interleaved(devices, chunks, microbatches, split_backward=split_backward)
        note = f"1F1B has one chunk per device, not {chunks}: planned as interleaved 1F1B"
        return replace(order, notes=(note, *order.notes))
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
        return replace(order, notes=(note, *order.notes))

    def first(rank: int) -> int:
        return devices * (chunks - 1) + 2 * (devices - rank) - 1

    ranks = _in_groups(devices, chunks, microbatches, devices, first, split_backward is True)
    return Order("1f1b_interleaved", devices, chunks, microbatches, ranks, notes=_remainder(microbatches, devices))


def pipe_offload_slots(devices: int, chunks: int, microbatches: int, rank: int, group: int) -> list[tuple[int, Action]]:
    """The grid that `pipe_offload` takes its order from: a slot of equal time for every action, sorted.

    Every 3 * chunks slots a microbatch begins, and its forwards (backwards) of one chunk lie 3 * group slots after
    those of the chunk before (after).
    """
    # After so many chunks the distance comes back to a slot of the period that is taken: one microbatch's further.
    collision = chunks // math.gcd(chunks, group)

    def offset(chunk: int) -> int:
        return 3 * (group * chunk + chunk // collision)

    # Ranks start later than their input arrives, by one slot each, as far as the next chunk's input leaves room.
    late = min([rank, *(offset(chunk) - offset(chunk - 1) - devices for chunk in range(1, chunks))])
    first_backward = offset(chunks - 1) + rank + 3 * (devices - 1 - rank) + 1
    slots = []
    for microbatch in range(microbatches):
        start = 3 * chunks * microbatch + late
        for chunk in range(chunks):
            backward = start + first_backward + offset(chunks - 1 - chunk)
            slots += [
                (start + offset(chunk) + rank, Action("F", chunk, microbatch)),
                (backward, Action("I", chunk, microbatch)),
                (backward + 1, Action("W", chunk, microbatch)),
            ]
    return sorted(slots, key=lambda slot: slot[0])


def pipe_offload(
    devices: int, chunks: int, microbatches: int, *, group: int | None = None, split_backward: bool | None = None
) -> Order:
    """PipeOffload's order: a microbatch's chunks are spread evenly over time, so that lifespans fall by chunk, and
    offloading the first half of the chunks leaves a quarter of the memory (arXiv 2503.01328).

    The order of a grid of equal times; ranks run it without waiting for the grid. `group`: how many microbatches' time
    lies between two chunks, half of the devices by default.
    """
    if devices == 1:
        # The grid would only overlap microbatches: more memory, and no time gained.
        order = gis(1, chunks, microbatches, group=1, split_backward=split_backward)
        note = "one device has no pipeline to fill: each microbatch's backward follows its forward"
        return replace(order, schedule="po", notes=(note,))
    group, notes = _large_enough(group or least_group(devices), devices)
    ranks = []
    for rank in range(devices):
        actions = tuple(action for _, action in pipe_offload_slots(devices, chunks, microbatches, rank, group))
        ranks.append(fuse(actions) if split_backward is False else actions)
    return Order("po", devices, chunks, microbatches, tuple(ranks), notes=notes)


def _zb_v(devices: int, microbatches: int) -> list[list[Action]]:
    """Zero bubble, with the memory of 1F1B: no rank waits between its first forward and its last backward.

    Made for the 2 * devices - 1 microbatches at least that fill the pipeline; those beyond the last are left out.
    """
    total = max(microbatches, 2 * devices - 1)
    first, second = (("F", 0), ("I", 0), ("W", 0)), (("F", 1), ("I", 1), ("W", 1))
    forward, backward_input, backward_weight = zip(first, second, strict=True)
    ranks = []
    for rank in range(devices):
        kinds = (
            # Until the first microbatch is back at this rank.
            forward[:1] * (2 * (devices - rank) - 1)
            + forward[::-1] * rank
            # Until the backward of the second chunk has been through the ranks before this one.
            + second * (devices - rank)
            + (first + second) * (total - devices)
            # What others wait for goes first, and the backwards of the weights fill the gaps.
            + backward_input * rank
            + (backward_input[:1] + backward_weight[:1]) * (devices - rank)
            + backward_weight[1:] * rank
            + backward_weight[:1] * rank
        )
        counts: Counter[tuple[Kind, int]] = Counter()
        actions = []
        for kind in kinds:
            if counts[kind] < microbatches:
                actions.append(Action(*kind, counts[kind]))
            counts[kind] += 1
        ranks.append(actions)
    return ranks


class _Pattern(NamedTuple):
    """One microbatch in slots of equal time; the next begins six slots later."""

    slots: Callable[[int, int], tuple[int, int, int, int]]
    """Of (devices, rank): where its forwards of chunks 0 and 1 lie, its backwards of the input of chunks 1 and 0."""
    blocks: Callable[[int], int]
    """Of devices: how many blocks a rank may hold."""


def _v_min_slots(devices: int, rank: int) -> tuple[int, int, int, int]:
    late = 2 if devices % 3 == 0 else 0
    return rank, 2 * devices - 1 - rank, 2 * devices + late + rank, 4 * devices + late - 1 - rank


def _v_half_slots(devices: int, rank: int) -> tuple[int, int, int, int]:
    late = 3 if devices % 2 == 0 else 0
    return 2 * rank, 3 * devices - 2 - rank, 3 * devices + late + 2 * rank - 1, 6 * devices + late - 2 - rank


_V_MIN = _Pattern(_v_min_slots, lambda devices: 2 * ((devices + 1) // 3 + 1))
_V_HALF = _Pattern(_v_half_slots, lambda devices: 2 * (devices // 2 + 1))


def _repeat(pattern: _Pattern, devices: int, microbatches: int) -> list[list[Action]]:
    """Forwards and backwards of the input in the pattern's order, each as soon as it can run. Backwards of the weights
    run while a rank would otherwise idle, or hold too many blocks."""
    sequences = []
    for rank in range(devices):
        first, second, second_backward, first_backward = pattern.slots(devices, rank)
        kinds = ((first, "F", 0), (second, "F", 1), (second_backward, "I", 1), (first_backward, "I", 0))
        slots = [(slot + 6 * n, Action(kind, chunk, n)) for n in range(microbatches) for slot, kind, chunk in kinds]
        sequences.append(deque(action for _, action in sorted(slots)))
    most = pattern.blocks(devices)
    stage = Order("", devices, 2, microbatches, (), placement="v").stage
    ended: set[tuple[str, int, int]] = set()
    weights: list[deque[Action]] = [deque() for _ in range(devices)]
    live = [0] * devices
    ranks: list[list[Action]] = [[] for _ in range(devices)]
    while any(sequences) or any(weights):
        ending = []
        for rank, (sequence, waiting) in enumerate(zip(sequences, weights, strict=True)):
            action = None
            if sequence:
                kind, chunk, microbatch = sequence[0]
                own, last = stage(rank, chunk), 2 * devices - 1
                before = own - 1 if kind == "F" else own + 1
                arrived = before in (-1, last + 1) or (kind, before, microbatch) in ended
                if arrived and not (kind == "F" and live[rank] >= most and waiting):
                    action = sequence.popleft()
                    ending.append((kind, own, microbatch))
                    if kind == "F":
                        live[rank] += 1
                    else:
                        waiting.append(Action("W", chunk, microbatch))
            if action is None and waiting:
                action = waiting.popleft()
                live[rank] -= 1
            if action is not None:
                ranks[rank].append(action)
        ended.update(ending)
    return ranks


def _in_v(
    schedule: str, title: str, otherwise: Callable[..., Order], ranks: Callable[[int, int], list[list[Action]]]
) -> Callable[..., Order]:
    """A row of `SCHEDULES`; `ranks` of devices and microbatches. Other than two chunks go `otherwise`."""

    def order(
        devices: int, chunks: int, microbatches: int, *, group: int | None = None, split_backward: bool | None = None
    ) -> Order:
        if chunks != 2:
            made = otherwise(devices, chunks, microbatches, split_backward=split_backward)
            note = f"{title} has two chunks per device, not {chunks}: planned as {made.schedule}, chunks in a loop"
            return replace(made, notes=(note, *made.notes))
        made = (
            fuse(actions) if split_backward is False else tuple(actions) for actions in ranks(devices, microbatches)
        )
        return Order(schedule, devices, chunks, microbatches, tuple(made), placement="v")

    return order


SCHEDULES: dict[str, Callable[..., Order]] = {
    "gis": gis,
    "gis_h": gis_h,
    "po": pipe_offload,
    "po_h": pipe_offload,
    "po_f": pipe_offload,
    "1f1b": one_f_one_b,
    "1f1b_interleaved": one_f_one_b_interleaved,
    # No bubble where all computations take equally long; 2 * devices blocks, the memory of 1F1B.
    "zb_v": _in_v("zb_v", "ZB-V", gis, _zb_v),
    # Half of 1F1B's memory and half of its bubble; a third of its memory and two thirds of its bubble.
    "v_half": _in_v("v_half", "V-Half", gis_h, partial(_repeat, _V_HALF)),
    "v_min": _in_v("v_min", "V-Min", gis_h, partial(_repeat, _V_MIN)),
}
"""By name, f(devices, chunks, microbatches, *, group=None, split_backward=None) -> Order. po_h and po_f are po, with
half or all of the chunks offloaded. split_backward=None is what the schedule was published with: whole backwards for
1F1B, split ones for the others. `group` is for GIS and PO."""


# More than that would not fit into memory.
MOST_BLOCKS = 10**7


def make_order(
    schedule: str,
    devices: int,
    chunks: int,
    microbatches: int,
    *,
    group: int | None = None,
    split_backward: bool | None = None,
) -> Order:
    """The order of a schedule of `SCHEDULES`, after checking the arguments.

    What cannot be had becomes the nearest that can, told in `Order.notes`. Raises TypeError or ValueError for what
    has no meaning: an unknown name, or counts that aren't positive integers, or ask for more than ten million blocks.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule: expected one of {', '.join(SCHEDULES)}, got {schedule!r}")
    counts = {"devices": devices, "chunks": chunks, "microbatches": microbatches}
    if group is not None:
        counts["group"] = group
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: expected an int, got {type(value).__name__}; pass a positive count")
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}; pass a positive count")
    if devices * chunks * microbatches > MOST_BLOCKS:
        raise ValueError(f"devices: expected at most {MOST_BLOCKS} blocks, got devices * chunks * microbatches = "
                         f"{devices} * {chunks} * {microbatches}; pass smaller counts")  # fmt: skip
    if split_backward is not None and not isinstance(split_backward, bool):
        raise TypeError(f"split_backward: expected a bool or None, got {type(split_backward).__name__}; pass True, "
                        "False, or None for the schedule's own")  # fmt: skip
    order = SCHEDULES[schedule](devices, chunks, microbatches, group=group, split_backward=split_backward)
    if group is not None and order.schedule not in ("gis", "gis_h", "po"):
        order = replace(order, notes=(*order.notes, f"group={group} is left out: {order.schedule} has no such choice"))
    return order
