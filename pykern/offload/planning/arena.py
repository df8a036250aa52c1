"""Which slot of an arena each block lies in: colouring the intervals during which they lie there."""

import heapq
from bisect import bisect_left, insort
from collections.abc import Iterable
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

    A stay takes the smallest free slot that is large enough, else the largest free one, which grows. Slots are as few
    as stays are together at most, and none is wasted if all are equally large.
    """
    stays = list(stays)
    slots, sizes = [0] * len(stays), []
    leaving: list[tuple[float, int, int]] = []
    """(end, freed, slot) of slots that are taken."""
    free: list[tuple[int, int]] = []
    """(size, slot), sorted."""
    for position in sorted(range(len(stays)), key=lambda position: (stays[position].start, stays[position].asked)):
        stay = stays[position]
        delayed = []
        while leaving and leaving[0][0] <= stay.start:
            taken = heapq.heappop(leaving)
            if taken[1] < stay.asked:
                insort(free, (sizes[taken[2]], taken[2]))
            else:
                delayed.append(taken)
        for taken in delayed:
            heapq.heappush(leaving, taken)
        if free:
            _, slot = free.pop(min(bisect_left(free, (stay.size, -1)), len(free) - 1))
            sizes[slot] = max(sizes[slot], stay.size)
        else:
            slot = len(sizes)
            sizes.append(stay.size)
        slots[position] = slot
        heapq.heappush(leaving, (stay.end, stay.freed, slot))
    return slots, sizes


def most_at_once(stays: Iterable[Stay]) -> int:
    """Bytes that lie in an arena together at most: below that no arena can be."""
    changes = sorted(change for stay in stays for change in ((stay.start, stay.size), (stay.end, -stay.size)))
    most = now = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most
