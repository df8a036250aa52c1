"""Which blocks of a rank leave the device: those that it misses longest, as many as time and budgets allow.

A block that is away for longer lowers the device's memory during more actions, at the same cost in copies. Where not
all of a chunk's blocks can leave, those that do are spread evenly over the microbatches, for the peak is as high as
the worst moment.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median

from .simulation import live_blocks
from .transfers import Block, Placed, RankTimes, anchor, place, place_in_file
from .types import Order


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
    over_budget: int | None = None
    """The least possible peak, where it is above the budget."""


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


def choose(
    order: Order,
    rank: RankTimes,
    asked: Sequence[Block],
    origin: float,
    slot: float,
    *,
    sizes: Sequence[int],
    budget: int | None = None,
    insist: bool = False,
    housed: int | None = None,
) -> Choice:
    """Blocks of `asked` and times for their copies, such that each is back in time, or all of them if `insist`.

    budget: no more than are needed to keep the rank's peak within so many bytes. housed: how many blocks the host has
    room for; the others go on to a file if there is one, and else stay.
    """
    worth = rank.worthwhile(asked, slot)
    worthwhile = set(worth)
    choice = Choice([], brief=[block for block in asked if block not in worthwhile])
    if budget is not None:
        live = live_blocks(order, rank.rank, block_sizes=sizes)
        over = [number for number, held in enumerate(live) if held > budget]
        worth = [block for block in worth if bisect_left(over, block.forward) < bisect_left(over, block.last)]
    ordered = by_lifespan(rank, worth)
    if housed is not None and rank.link.file_rate is None and housed < len(ordered):
        choice.unhoused = ordered[housed:]
        ordered = ordered[:housed]

    def lay_out(count: int) -> tuple[list[Placed], list[Block]]:
        return place(rank, _in_order(ordered[:count]), origin, slot, late="place" if insist else "leave")

    count = len(ordered) if insist else most(len(ordered), lambda count: not lay_out(count)[1])
    if budget is not None:

        def peak(count: int) -> int:
            transfers = anchor(rank, lay_out(count)[0])
            return max(live_blocks(order, rank.rank, transfers, sizes), default=0)

        enough = fewest(count, lambda number: peak(number) <= budget)
        reached = peak(enough)
        if reached > budget:
            choice.over_budget = reached
            choice.late = ordered[count:]
        ordered, count = ordered[:enough], enough
    else:
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
