"""Schedules of two chunks laid out in a V: the second chunk goes back over the ranks, so the last one holds the two
middle stages, and the first one both ends (arXiv 2405.15362)."""

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from .group_orders import fuse, gis, gis_h
from .types import Action, Kind, Order


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
    name: str,
    title: str,
    otherwise: Callable[..., Order],
    devices: int,
    chunks: int,
    microbatches: int,
    ranks: Callable[[], list[list[Action]]],
    split_backward: bool | None,
) -> Order:
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
    """ZB-V: no bubble where all computations take equally long; 2 * devices blocks, the memory of 1F1B."""
    return _in_v("zb_v", "ZB-V", gis, devices, chunks, microbatches,
                 lambda: _zb_v(devices, microbatches), split_backward)  # fmt: skip


def v_half(
    devices: int, chunks: int, microbatches: int, *, group: int | None = None, split_backward: bool | None = None
) -> Order:
    """V-Half: half of 1F1B's memory, half of its bubble."""
    return _in_v("v_half", "V-Half", gis_h, devices, chunks, microbatches,
                 lambda: _repeat(_V_HALF, devices, microbatches), split_backward)  # fmt: skip


def v_min(
    devices: int, chunks: int, microbatches: int, *, group: int | None = None, split_backward: bool | None = None
) -> Order:
    """V-Min: a third of 1F1B's memory, two thirds of its bubble."""
    return _in_v("v_min", "V-Min", gis_h, devices, chunks, microbatches,
                 lambda: _repeat(_V_MIN, devices, microbatches), split_backward)  # fmt: skip
