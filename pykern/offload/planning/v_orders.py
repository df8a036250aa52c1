"""Schedules of two chunks laid out in a V: the second chunk goes back over the ranks, so the last one holds the two
middle stages, and the first one both ends (arXiv 2405.15362)."""

from collections import deque
from dataclasses import replace

from .group_orders import fuse, gis, gis_h
from .types import Action, Order


def _zb_v(devices: int, microbatches: int) -> list[list[Action]]:
    """Zero bubble, with the memory of 1F1B: no rank waits between its first forward and its last backward.

    Made for the 2 * devices - 1 microbatches at least that fill the pipeline; those beyond the last are left out.
    """
    total = max(microbatches, 2 * devices - 1)
    ranks = []
    for rank in range(devices):
        actions: list[Action] = []
        counts: dict[tuple[str, int], int] = {}

        def add(*kinds: tuple[str, int], actions=actions, counts=counts) -> None:
            for kind, chunk in kinds:
                number = counts.get((kind, chunk), 0)
                if number < total:
                    actions.append(Action(kind, chunk, number))
                    counts[kind, chunk] = number + 1

        # Until the first microbatch is back at this rank.
        add(*[("F", 0)] * (2 * (devices - rank) - 1))
        add(*[("F", 1), ("F", 0)] * rank)
        # Until its first backward of the second chunk is back.
        add(*[("F", 1), ("I", 1), ("W", 1)] * (devices - rank))
        while counts["F", 1] < total:
            add(("F", 0), ("I", 0), ("W", 0), ("F", 1), ("I", 1), ("W", 1))
        # What the others wait for goes first, and the backwards of the weights fill the gaps.
        add(*[("I", 0), ("I", 1)] * rank)
        add(*[("I", 0), ("W", 0)] * (devices - rank))
        add(*[("W", 1), ("W", 0)] * total)
        ranks.append([action for action in actions if action.microbatch < microbatches])
    return ranks


def _v_min_slots(devices: int, rank: int) -> tuple[int, int, int, int]:
    late = 2 if devices % 3 == 0 else 0
    return rank, 2 * devices - 1 - rank, 2 * devices + late + rank, 4 * devices + late - 1 - rank


def _v_half_slots(devices: int, rank: int) -> tuple[int, int, int, int]:
    late = 3 if devices % 2 == 0 else 0
    return 2 * rank, 3 * devices - 2 - rank, 3 * devices + late + 2 * rank - 1, 6 * devices + late - 2 - rank


def _repeat(devices: int, microbatches: int, slots) -> list[list[Action]]:
    """Every six slots of equal time a microbatch begins: a rank's two forwards and two backwards of the input lie at
    `slots(devices, rank)`, and backwards of the weights take the first free slots after theirs of the input."""
    ranks = []
    for rank in range(devices):
        first, second, second_backward, first_backward = slots(devices, rank)
        pattern = [(first, "F", 0), (second, "F", 1), (second_backward, "I", 1), (first_backward, "I", 0)]
        timed = sorted(
            (slot + 6 * microbatch, kind, chunk, microbatch)
            for microbatch in range(microbatches)
            for slot, kind, chunk in pattern
        )
        waiting: deque[tuple[int, int]] = deque()
        actions = []
        clock = 0
        for slot, kind, chunk, microbatch in timed:
            while waiting and clock < slot:
                actions.append(Action("W", *waiting.popleft()))
                clock += 1
            clock = slot + 1
            actions.append(Action(kind, chunk, microbatch))
            if kind == "I":
                waiting.append((chunk, microbatch))
        ranks.append(actions + [Action("W", *item) for item in waiting])
    return ranks


def _in_v(name: str, title: str, otherwise, devices: int, chunks: int, microbatches: int, ranks, split_backward) -> Order:
    if chunks != 2:
        order = otherwise(devices, chunks, microbatches, split_backward=split_backward)
        note = f"{title} has two chunks per device, not {chunks}: planned as {order.schedule}, chunks in a loop"
        return replace(order, notes=(note, *order.notes))
    made = ranks()
    return Order(name, devices, chunks, microbatches,
                 tuple(fuse(actions) if split_backward is False else tuple(actions) for actions in made),
                 placement="v")  # fmt: skip


def zb_v(
    devices: int, chunks: int, microbatches: int, *, group: int | None = None, split_backward: bool | None = None
) -> Order:
    """ZB-V: no bubble when the three computations take equally long, with as many bytes as 1F1B."""
    return _in_v("zb_v", "ZB-V", gis, devices, chunks, microbatches,
                 lambda: _zb_v(devices, microbatches), split_backward)  # fmt: skip


def v_half(
    devices: int, chunks: int, microbatches: int, *, group: int | None = None, split_backward: bool | None = None
) -> Order:
    """V-Half: half of 1F1B's memory, half of its bubble."""
    return _in_v("v_half", "V-Half", gis_h, devices, chunks, microbatches,
                 lambda: _repeat(devices, microbatches, _v_half_slots), split_backward)  # fmt: skip


def v_min(
    devices: int, chunks: int, microbatches: int, *, group: int | None = None, split_backward: bool | None = None
) -> Order:
    """V-Min: a third of 1F1B's memory, two thirds of its bubble."""
    return _in_v("v_min", "V-Min", gis_h, devices, chunks, microbatches,
                 lambda: _repeat(devices, microbatches, _v_min_slots), split_backward)  # fmt: skip
