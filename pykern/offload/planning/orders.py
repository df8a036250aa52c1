"""Pipeline schedules by name: which actions each rank performs, in which order, in closed form."""

import math
from collections.abc import Callable

from .group_orders import fuse, gis, gis_h, least_group, one_f_one_b, one_f_one_b_interleaved
from .types import Action, Order
from .v_orders import v_half, v_min, zb_v


def pipe_offload(
    devices: int, chunks: int, microbatches: int, *, group: int | None = None, split_backward: bool | None = None
) -> Order:
    """PipeOffload's order: a microbatch's chunks are spread evenly over time, so that lifespans fall by chunk and
    offloading the first half of the chunks leaves a quarter of the memory (arXiv 2503.01328).

    Made on a grid of slots of equal times, where every 3 * chunks slots a microbatch begins, and forwards of one chunk
    follow those of the chunk before by 3 * ceil(devices / 2) slots; read in that order, ranks run it without waiting
    for the grid.
    """
    if devices == 1:
        # On one device the grid would only overlap microbatches, for more memory and no time gained.
        order = gis(1, chunks, microbatches, group=1, split_backward=split_backward)
        note = "one device has no pipeline to fill: each microbatch's backward follows its forward"
        return Order("po", 1, chunks, microbatches, order.ranks, notes=(note,))
    period = 3 * chunks
    step = 3 * least_group(devices)
    collision = chunks // math.gcd(chunks, least_group(devices))

    def offset(chunk: int) -> int:
        # Every `collision` chunks the step comes back to a slot of the period that is taken: one slot further.
        return step * chunk + 3 * (chunk // collision)

    # Ranks start later than their input arrives, by one slot each, as far as the next chunk's input leaves room.
    shift = min([devices - 1, *(offset(c) - offset(c - 1) - devices for c in range(1, chunks))])
    ranks = []
    for rank in range(devices):
        late = min(rank, shift)
        first_backward = offset(chunks - 1) + rank + 3 * (devices - 1 - rank) + 1
        slots = []
        for microbatch in range(microbatches):
            for chunk in range(chunks):
                start = period * microbatch + late
                forward = start + offset(chunk) + rank
                backward = start + first_backward + offset(chunks - 1 - chunk)
                slots.append((forward, Action("F", chunk, microbatch)))
                slots.append((backward, Action("I", chunk, microbatch)))
                slots.append((backward + 1, Action("W", chunk, microbatch)))
        actions = tuple(action for _, action in sorted(slots, key=lambda slot: slot[0]))
        ranks.append(fuse(actions) if split_backward is False else actions)
    return Order("po", devices, chunks, microbatches, tuple(ranks))


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
1F1B, split ones for the others. Only GIS looks at `group`."""


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
    return SCHEDULES[schedule](devices, chunks, microbatches, group=group, split_backward=split_backward)
