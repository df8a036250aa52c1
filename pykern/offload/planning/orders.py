"""Pipeline schedules by name: which actions each rank performs, in which order, in closed form."""

import math
from collections.abc import Callable
from dataclasses import replace

from .group_orders import fuse, gis, gis_h, least_group, one_f_one_b, one_f_one_b_interleaved, too_small
from .types import Action, Order
from .v_orders import v_half, v_min, zb_v

Slot = tuple[int, Action]


def pipe_offload_slots(devices: int, chunks: int, microbatches: int, rank: int, group: int) -> list[Slot]:
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
        return Order("po", 1, chunks, microbatches, order.ranks, notes=(note,))
    asked = group or least_group(devices)
    group = max(asked, least_group(devices))
    notes = too_small(asked, devices) if group != asked else ()
    ranks = []
    for rank in range(devices):
        actions = tuple(action for _, action in pipe_offload_slots(devices, chunks, microbatches, rank, group))
        ranks.append(fuse(actions) if split_backward is False else actions)
    return Order("po", devices, chunks, microbatches, tuple(ranks), notes=notes)


SCHEDULES: dict[str, Callable[..., Order]] = {
    "gis": gis,
    "gis_h": gis_h,
    "po": pipe_offload,
    "po_h": pipe_offload,
    "po_f": pipe_offload,
    "1f1b": one_f_one_b,
    "1f1b_interleaved": one_f_one_b_interleaved,
    "zb_v": zb_v,
    "v_half": v_half,
    "v_min": v_min,
}
"""By name, f(devices, chunks, microbatches, *, group=None, split_backward=None) -> Order. po_h and po_f are po, with
half or all of the chunks offloaded. split_backward=None is what the schedule was published with: whole backwards for
1F1B, split ones for the others. `group` is for
GIS and PO."""


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
    has no meaning: an unknown name, or counts that aren't positive integers.
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
    if split_backward is not None and not isinstance(split_backward, bool):
        raise TypeError(f"split_backward: expected a bool or None, got {type(split_backward).__name__}; pass True, "
                        "False, or None for the schedule's own")  # fmt: skip
    order = SCHEDULES[schedule](devices, chunks, microbatches, group=group, split_backward=split_backward)
    if group is not None and order.schedule not in ("gis", "gis_h", "po"):
        order = replace(order, notes=(*order.notes, f"group={group} is left out: {order.schedule} has no such choice"))
    return order
