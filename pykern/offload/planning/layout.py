"""When blocks leave a device and come back: slots of copying time beside the computation.

The rules are those of PipeOffload (arXiv 2503.01328). A rank copies either in one direction at a time, alternating
slots out and slots back, or in both at once. Two ranks that share a switch alternate against each other: one copies
out while the other copies back. Copies out take slots from left to right, each the first one after its forward; copies
back from right to left, each the last one that leaves room before its backward.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from .request import Request
from .simulation import Block, Spans
from .types import Order, Times

# Times are sums of many floats: what differs by less than this part of a copy's time is equal.
ROUNDING = 1e-6


class Placed(NamedTuple):
    """A block with the times planned for its copies; if it goes on to a file, when it is written and read."""

    block: Block
    out_start: float
    out_end: float
    back_start: float
    back_end: float
    write_start: float | None = None
    read_start: float | None = None


def postpone_warm_up(order: Order, times: Times, spans: Spans) -> Spans:
    """The forwards before each rank's first backward, as late as the next stage and the rank's own next action allow.

    While a pipeline fills up, ranks run ahead, and their blocks wait. From the last chunk's first microbatch on,
    forwards hurry. One backward's time is left before the first backward.
    """
    started = {
        (order.stage(rank, chunk), microbatch): (rank, span[0])
        for rank, actions in enumerate(order.ranks)
        for (kind, chunk, microbatch), span in zip(actions, spans[rank], strict=True)
        if kind == "F"
    }
    result = [list(rank) for rank in spans]
    for rank in reversed(range(order.devices)):
        actions = order.ranks[rank]
        first = next((number for number, action in enumerate(actions) if action.kind != "F"), 0)
        if not first:
            continue
        limit = result[rank][first][0] - times.backward_input[order.stage(rank, actions[first].chunk)]
        for number in reversed(range(first)):
            _, chunk, microbatch = actions[number]
            if chunk == order.chunks - 1 and microbatch == 0:
                break
            stage = order.stage(rank, chunk)
            before, end = result[rank][number]
            seconds = end - before
            start = limit - seconds
            if (stage + 1, microbatch) in started:
                next_rank, next_start = started[stage + 1, microbatch]
                start = min(start, next_start - seconds - (times.transfer if next_rank != rank else 0.0))
            if start > before:
                result[rank][number] = start, start + seconds
                started[stage, microbatch] = rank, start
            limit = result[rank][number][0]
    return tuple(map(tuple, result))


class RankTimes:
    """A rank's blocks with the times that bound their copies."""

    def __init__(self, request: Request, rank: int, blocks: list[Block], spans: Sequence[tuple[float, float]]):
        times = request.times
        self.request, self.rank, self.blocks, self.spans = request, rank, blocks, spans
        self.starts = [start for start, _ in spans]
        self.ends = [end for _, end in spans]
        # By chunk.
        self.sizes = request.sizes_of(rank)
        self.out_seconds, self.back_seconds = ([size / rate for size in self.sizes] for rate in request.rates)
        # One backward's time in reserve: what comes back a little late stalls nothing.
        self.reserve = [times.backward_input[request.order.stage(rank, chunk)] for chunk in range(len(self.sizes))]
        # The longest action.
        self.unit = max(times.forward + times.backward_input + times.backward_weight) or 1.0
        # Bytes that come to be with each action, and that go with its end.
        self.made, self.dropped = [0] * len(self.spans), [0] * len(self.spans)
        for block in self.blocks:
            self.made[block.forward] = self.dropped[block.last] = self.sizes[block.chunk]

    def ready(self, block: Block) -> float:
        return self.ends[block.forward]

    def deadline(self, block: Block) -> float:
        return self.starts[block.backward] - self.reserve[block.chunk]

    def slot(self, blocks: Sequence[Block]) -> float:
        """One direction's time: that of the longest of the blocks' copies."""
        return max((self.longest(chunk) for chunk in {block.chunk for block in blocks}), default=0.0)

    def longest(self, chunk: int) -> float:
        return max(self.out_seconds[chunk], self.back_seconds[chunk])

    def worthwhile(self, blocks: Sequence[Block], slot: float) -> list[Block]:
        """Without those that live too briefly."""
        trips = [
            out + back if self.request.both_directions else 2 * slot
            for out, back in zip(self.out_seconds, self.back_seconds, strict=True)
        ]
        least = [self.request.shortest * trip * (1 + ROUNDING) for trip in trips]
        return [block for block in blocks if self.deadline(block) - self.ready(block) > least[block.chunk]]


def place(rank: RankTimes, blocks: Sequence[Block], origin: float, slot: float) -> tuple[list[Placed], list[Block]]:
    """Times of copies out and back for `blocks` (by their forwards), and the blocks that cannot be back in time.

    `origin`: where the slots out and back in turn begin, each `slot` seconds, if there is one direction.
    """
    ready, deadlines = [rank.ready(block) for block in blocks], [rank.deadline(block) for block in blocks]
    outs, backs = [rank.out_seconds[block.chunk] for block in blocks], [rank.back_seconds[b.chunk] for b in blocks]
    if rank.request.both_directions:
        out_starts, back_starts = place_apart(ready, deadlines, outs, backs)
    else:
        out_starts, back_starts = place_in_turn(ready, deadlines, origin, slot, rank.unit)
    placed, late = [], []
    for block, out_start, out, back_start, back in zip(blocks, out_starts, outs, back_starts, backs, strict=True):
        out_end = out_start + out
        if back_start < out_end - ROUNDING * slot:
            late.append(block)
        else:
            placed.append(Placed(block, out_start, out_end, back_start, back_start + back))
    return placed, late


def place_in_turn(
    ready: Sequence[float], deadlines: Sequence[float], origin: float, slot: float, unit: float
) -> tuple[list[float], list[float]]:
    """Starts out and back in slots of equal length that alternate.

    Where times are multiples of each other, forwards end in the very moments in which slots begin, and peaks depend on
    which of both is held to come first. The published planner adds up slot by slot, and so leaves it to rounding; its
    peaks come out again if this is done likewise, and in its unit, the length of an action: `unit` seconds.
    """
    if not slot or not ready:
        return list(ready), list(deadlines)

    def in_units(seconds: float) -> float:
        return round(seconds / unit, 9)

    slot, begin = max(in_units(slot), 1e-9), in_units(origin)
    turn = 2 * slot
    outs = []
    for moment in map(in_units, ready):
        begin = _advance(begin, moment, turn)
        outs.append(begin * unit)
        begin += turn
    latest_first = sorted(range(len(deadlines)), key=lambda number: deadlines[number], reverse=True)
    end = _advance(begin, in_units(deadlines[latest_first[0]]), turn)
    backs = [0.0] * len(deadlines)
    for number in latest_first:
        end = -_advance(-end, -in_units(deadlines[number]), turn)
        backs[number] = (end - slot) * unit
        end -= turn
    return outs, backs


def _advance(begin: float, moment: float, turn: float) -> float:
    """The first of begin, begin + turn, begin + turn + turn ... that is not before `moment`."""
    # Too many to add up one by one; and a turn may be too short to make a difference.
    steps = math.ceil((moment - begin) / turn)
    if steps > 1000:
        begin += (steps - 1000) * turn
    for _ in range(1001):
        if begin >= moment:
            break
        begin += turn
    return max(begin, moment) if steps > 1000 else begin


def place_apart(
    ready: Sequence[float], deadlines: Sequence[float], out_seconds: Sequence[float], back_seconds: Sequence[float]
) -> tuple[list[float], list[float]]:
    """Starts out and back where neither direction waits for the other."""
    outs, free = [], -math.inf
    for moment, seconds in zip(ready, out_seconds, strict=True):
        outs.append(max(free, moment))
        free = outs[-1] + seconds
    backs, free = [0.0] * len(deadlines), math.inf
    for position in sorted(range(len(deadlines)), key=lambda number: deadlines[number], reverse=True):
        free = backs[position] = min(free, deadlines[position]) - back_seconds[position]
    return outs, backs


def place_in_file(rank: RankTimes, placed: Sequence[Placed]) -> tuple[list[Placed], list[Placed]]:
    """Times of writing and reading for blocks that go on to a file, between their copies out and back; and the blocks
    that would not be read in time. The file is written and read in turn."""
    seconds = [rank.sizes[copy.block.chunk] / rank.request.file_rate for copy in placed]
    slot = max(seconds, default=0.0)
    ready, deadlines = [copy.out_end for copy in placed], [copy.back_start for copy in placed]
    writes, reads = place_in_turn(ready, deadlines, min(ready, default=0.0), slot, rank.unit)
    kept, late = [], []
    for copy, write, read, length in zip(placed, writes, reads, seconds, strict=True):
        if read < write + length - ROUNDING * slot:
            late.append(copy)
        else:
            kept.append(copy._replace(write_start=write, read_start=read))
    return kept, late


def hurry_warm_up(ranks: Sequence[RankTimes], placed: Sequence[Sequence[Placed]], sharing: int) -> list[list[Placed]]:
    """Copies out before the first copy back of the `sharing` ranks at a switch: without gaps, and at the faster rate.

    Nothing travels the other way yet; so the ranks take turns. If not all of them are given, the others are taken to
    copy as much.
    """
    copies = [copy for of_rank in placed for copy in of_rank]
    first_back = min((copy.back_start for copy in copies), default=math.inf)
    first_back -= ROUNDING * max((copy.out_end - copy.out_start for copy in copies), default=0.0)
    result = [list(of_rank) for of_rank in placed]
    early = [
        (copy.out_start, number, position)
        for number, of_rank in enumerate(placed)
        for position, copy in enumerate(of_rank)
        if copy.out_start < first_back
    ]
    free = -math.inf
    for out_start, number, position in sorted(early):
        copy = placed[number][position]
        seconds = (copy.out_end - out_start) / (ranks[number].request.lone_speedup if sharing > 1 else 1.0)
        start = min(max(free, ranks[number].ready(copy.block)), out_start)
        free = start + seconds * (sharing / len(ranks))
        result[number][position] = copy._replace(out_start=start, out_end=start + seconds)
    return result
