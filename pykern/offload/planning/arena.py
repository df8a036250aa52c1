"""Which slot of an arena each block lies in: colouring the intervals during which they lie there."""

import heapq
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple


class Stay(NamedTuple):
    """How long something lies in an arena: from `start` to `end` seconds.

    What takes a slot over has to be asked for after what frees it: `asked` and `freed` are the numbers, in the order in
    which the rank asks for its copies, of the copy that brings it and of the one after which the slot is free.
    """

    start: float
    end: float
    asked: int
    freed: int
    size: int


def colour(stays: Iterable[Stay]) -> tuple[list[int], list[int]]:
    """The slot of each stay, and the size of each slot: no slot holds two at once.

    With equal sizes no arena is smaller: there are as many slots as stays are together at most. With unequal ones
    (max-colouring of an interval graph, which is NP-hard) stays of neighbouring sizes share slots, grouped so that the
    arena takes the fewest bytes. What is wasted then is mostly the price of blocks that lie in one piece.
    """
    stays = list(stays)
    order = sorted(range(len(stays)), key=lambda number: (stays[number].start, stays[number].asked))
    untils = _untils([stays[number] for number in order])
    sizes = [stays[number].size for number in order]
    distinct = sorted(set(sizes))
    # The best slots for the stays up to each size.
    best: list[list[_Slot]] = [[]]
    for count in range(1, len(distinct) + 1):
        options = []
        for below, least in zip(best, distinct, strict=False):
            group = [position for position, size in enumerate(sizes) if least <= size <= distinct[count - 1]]
            options.append(below + _sweep(untils, sizes, group))
        best.append(min(options, key=lambda slots: sum(slot.size for slot in slots)))
    slots = [0] * len(stays)
    for number, slot in enumerate(best[-1]):
        for position in slot.positions:
            slots[order[position]] = number
    return slots, [slot.size for slot in best[-1]]


@dataclass
class _Slot:
    size: int
    positions: list[int]


def _untils(stays: Sequence[Stay]) -> list[int]:
    """Of each stay, sorted by their starts: the position from which on all may take its slot over."""
    starts = [stay.start for stay in stays]
    # The least that any is asked for from here on.
    asked = list(accumulate((stay.asked for stay in reversed(stays)), min))[::-1]
    return [
        max(bisect_left(starts, stay.end), bisect_right(asked, stay.freed), position + 1)
        for position, stay in enumerate(stays)
    ]


def _sweep(untils: Sequence[int], sizes: Sequence[int], positions: Iterable[int]) -> list[_Slot]:
    """A stay takes the smallest free slot that is large enough, else the largest free one, which grows."""
    slots: list[_Slot] = []
    # Those that are taken, as (until, number), and those that are free, as (size, number), sorted.
    taken: list[tuple[int, int]] = []
    free: list[tuple[int, int]] = []
    for position in positions:
        until, size = untils[position], sizes[position]
        while taken and taken[0][0] <= position:
            _, number = heapq.heappop(taken)
            insort(free, (slots[number].size, number))
        if free:
            _, number = free.pop(min(bisect_left(free, (size, -1)), len(free) - 1))
            slots[number].size = max(slots[number].size, size)
        else:
            number = len(slots)
            slots.append(_Slot(size, []))
        slots[number].positions.append(position)
        heapq.heappush(taken, (until, number))
    return slots
