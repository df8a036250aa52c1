"""Which slot of an arena each block lies in: colouring the intervals during which they lie there."""

import heapq
from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
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

    Slots are as few as stays are together at most, or as few for each size if that takes fewer bytes.
    """
    stays = list(stays)
    slots, sizes = _colour(stays, range(len(stays)))
    of_size: dict[int, list[int]] = {}
    for position, stay in enumerate(stays):
        of_size.setdefault(stay.size, []).append(position)
    if len(of_size) < 2:
        return slots, sizes
    apart, apart_sizes = [0] * len(stays), []
    for positions in of_size.values():
        some, some_sizes = _colour(stays, positions)
        for position in positions:
            apart[position] = len(apart_sizes) + some[position]
        apart_sizes += some_sizes
    return (apart, apart_sizes) if sum(apart_sizes) < sum(sizes) else (slots, sizes)


def _colour(stays: Sequence[Stay], positions: Iterable[int]) -> tuple[list[int], list[int]]:
    """A stay takes the smallest free slot that is large enough, else the largest free one, which grows."""
    slots, sizes = [0] * len(stays), []
    # Slots that are taken, as (end, freed, slot), and those that are free, as (size, slot), sorted.
    leaving: list[tuple[float, int, int]] = []
    free: list[tuple[int, int]] = []
    for position in sorted(positions, key=lambda position: (stays[position].start, stays[position].asked)):
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
