"""Which blocks of a rank leave the device: those that it misses longest, as many as time and budgets allow.

A block that is away for longer lowers the device's memory during more actions, at the same cost in copies. Where not
all of a chunk's blocks can leave, those that do are spread evenly over the microbatches, for the peak is as high as
the worst moment.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate
from statistics import median

from .layout import Placed, RankTimes, hurry_warm_up, place, place_in_file
from .simulation import Block
from .transfers import peak_bytes


@dataclass
class Choice:
    """The blocks chosen for a rank, and those that were asked for and stay, by the reason."""

    placed: list[Placed]
    ordered: list[Block] = field(default_factory=list)
    """Those chosen, longest lifespans first."""
    brief: list[Block] = field(default_factory=list)
    late: list[Block] = field(default_factory=list)
    unread: list[Block] = field(default_factory=list)
    """Would go to a file, if that were read in time."""
    unhoused: list[Block] = field(default_factory=list)
    """The host has no room for them."""


def by_lifespan(rank: RankTimes, blocks: Sequence[Block]) -> list[Block]:
    """Longest lifespans first: chunk by chunk, each by its blocks' median, and a chunk's blocks so that every prefix is
    spread over the microbatches."""
    of_chunk: dict[int, list[Block]] = {}
    for block in blocks:
        of_chunk.setdefault(block.chunk, []).append(block)

    def lifespan(chunk: int) -> float:
        return median(rank.deadline(block) - rank.ready(block) for block in of_chunk[chunk])

    result = []
    for chunk in sorted(of_chunk, key=lambda chunk: (-lifespan(chunk), chunk)):
        among = of_chunk[chunk]
        bits = (len(among) - 1).bit_length()
        # The bits of their numbers reversed: 0, then the middle, then the quarters.
        order = sorted(range(len(among)), key=lambda number: int(f"{number:0{max(bits, 1)}b}"[::-1], 2))
        result += [among[number] for number in order]
    return result


def _in_order(blocks: Sequence[Block]) -> list[Block]:
    return sorted(blocks, key=lambda block: block.forward)


def most(count: int, fits: Callable[[int], bool]) -> int:
    """The most of `count` that fit, if fewer always fit where more do; 0 fits."""
    if fits(count):
        return count
    return bisect_left(range(1, count), True, key=lambda number: not fits(number))


def fewest(count: int, enough: Callable[[int], bool]) -> int:
    """The fewest of `count` that are enough, if more are always enough where fewer are; `count` at most."""
    return bisect_left(range(count), True, key=enough)


def lowest(ordered: Sequence[Block], peak: Callable[[int], int]) -> int:
    """How many of `ordered` give the lowest peak, the fewest such: of whole chunks, and of quarters of the chunk before
    and after the best of those.

    Where copies are too slow for all, more blocks make all of them leave later: at some number the peak turns.
    """
    starts = [number for number, block in enumerate(ordered) if not number or block.chunk != ordered[number - 1].chunk]
    bounds = [*starts, len(ordered)]
    best = min(bounds, key=lambda number: (peak(number), number))
    place = bounds.index(best)
    around = {best}
    for lower, upper in zip(bounds[max(place - 1, 0) :], bounds[max(place, 1) : place + 2], strict=False):
        around |= {lower + (upper - lower) * part // 4 for part in (1, 2, 3)}
    return min(around, key=lambda number: (peak(number), number))


def choose(
    rank: RankTimes,
    asked: Sequence[Block],
    origin: float,
    slot: float,
    *,
    sharing: int = 0,
    budget: int | None = None,
    insist: bool = False,
    housed: int | None = None,
) -> Choice:
    """Blocks of `asked` and times for their copies, such that each is back in time.

    sharing: how many ranks hurry together while the pipeline fills up; 0 if they don't. budget: no more than are needed
    to keep the rank's peak within so many bytes. insist: don't look for what is best if not all fit. housed: how many
    blocks the host has room for; the others go on to a file if there is one, and else stay.
    """
    worth = rank.worthwhile(asked, slot)
    worthwhile = set(worth)
    choice = Choice([], brief=[block for block in asked if block not in worthwhile])
    if budget is not None:
        held = accumulate(made - before for made, before in zip(rank.made, [0, *rank.dropped], strict=False))
        over = [number for number, now in enumerate(held) if now > budget]
        worth = [block for block in worth if bisect_left(over, block.forward) < bisect_left(over, block.last)]
    ordered = by_lifespan(rank, worth)
    if housed is not None and rank.request.file_rate is None and housed < len(ordered):
        choice.unhoused = ordered[housed:]
        ordered = ordered[:housed]

    def lay_out(count: int) -> tuple[list[Placed], list[Block]]:
        return place(rank, _in_order(ordered[:count]), origin, slot)

    @cache
    def peak(count: int) -> int:
        placed = lay_out(count)[0]
        return peak_bytes(rank, hurry_warm_up([rank], [placed], sharing)[0] if sharing else placed)

    count = len(ordered)
    if budget is not None:
        if peak(count) > budget:
            count = lowest(ordered, peak)
        count = fewest(count, lambda number: peak(number) <= budget)
        choice.late = ordered[count:]
    elif not insist and lay_out(count)[1]:
        count = lowest(ordered, peak)
        choice.late = ordered[count:]
    choice.ordered = ordered[:count]
    choice.placed, late = lay_out(count)
    choice.late += late
    if housed is not None and housed < len(choice.placed):
        kept = set(ordered[:housed])
        to_file, unread = place_in_file(rank, [copy for copy in choice.placed if copy.block not in kept])
        choice.unread = [copy.block for copy in unread]
        choice.placed = [copy for copy in choice.placed if copy.block in kept] + to_file
        choice.placed.sort(key=lambda copy: copy.block.forward)
    return choice
