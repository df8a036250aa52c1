"""Before which of a rank's actions its blocks are copied out, dropped, and taken back: a layout's times, kept as far as
the rank's order allows; and what that makes of the rank's memory and waits."""

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from .layout import ROUNDING, Placed, RankTimes
from .simulation import Block, Run, live_blocks
from .types import Order, Transfer


class Window(NamedTuple):
    """Before which of the rank's actions a block's copy out starts, its memory is dropped, and is taken again."""

    offload: int
    release: int
    reload: int


def find_window(rank: RankTimes, copy: Placed, rounding: float) -> Window | None:
    """None if the block would be taken back at once.

    A copy starts with the action during which it is planned to start; a block is dropped before the first action that
    starts after its copy out has ended.
    """
    block = copy.block
    reload = min(block.backward, bisect_right(rank.ends, copy.back_start + rounding))
    offload = min(max(block.forward + 1, bisect_right(rank.ends, copy.out_start + rounding)), reload)
    release = max(offload, bisect_left(rank.starts, copy.out_end - rounding))
    return Window(offload, release, reload) if release < reload else None


def _rounding(placed: Sequence[Placed]) -> float:
    return ROUNDING * max((copy.out_end - copy.out_start for copy in placed), default=0.0)


def peak_bytes(rank: RankTimes, placed: Sequence[Placed]) -> int:
    """The rank's peak if `placed` leave: that of `anchor`'s transfers, found faster."""
    rounding = _rounding(placed)
    moves: defaultdict[int, list[tuple[float, int]]] = defaultdict(list)
    for copy in placed:
        if window := find_window(rank, copy, rounding):
            size = rank.sizes[copy.block.chunk]
            moves[window.release].append((copy.out_end - rounding, -size))
            moves[window.reload].append((copy.back_start, size))
    held = peak = 0
    for number, (made, dropped) in enumerate(zip(rank.made, rank.dropped, strict=True)):
        if of_action := moves.get(number):
            if len(of_action) > 1:
                of_action.sort()
            for _, size in of_action:
                held += size
                if held > peak:
                    peak = held
        held += made
        if held > peak:
            peak = held
        held -= dropped
    return peak


def anchor(rank: RankTimes, placed: Sequence[Placed]) -> tuple[Transfer, ...]:
    """The transfers of a rank that keep to the times planned, as far as its order allows."""
    rounding = _rounding(placed)
    events: list[tuple[int, float, int, Transfer]] = []

    def add(kind: str, copy: Placed, before: int, moment: float) -> None:
        transfer = Transfer(kind, copy.block.chunk, copy.block.microbatch, before)
        events.append((before, moment, len(events), transfer))

    for copy in placed:
        window = find_window(rank, copy, rounding)
        if window is None:
            continue
        offload, release, reload = window
        add("offload", copy, offload, copy.out_start)
        # What is dropped makes room for what is taken back at the same time.
        add("release", copy, release, max(copy.out_start, copy.out_end - rounding))
        if copy.write_start is not None and copy.read_start is not None:
            spill = min(max(release, bisect_right(rank.ends, copy.write_start + rounding)), reload)
            fetch = min(max(spill, bisect_right(rank.ends, copy.read_start + rounding)), reload)
            # In this order, even if moments differ by rounding only.
            written = max(copy.out_end, copy.write_start)
            read = max(written, copy.read_start)
            add("spill", copy, spill, written)
            add("fetch", copy, fetch, read)
            add("reload", copy, reload, max(read, copy.back_start))
        else:
            add("reload", copy, reload, copy.back_start)
    return tuple(event[-1] for event in sorted(events))


def relax(
    order: Order, rank: int, blocks: Sequence[Block], transfers: tuple[Transfer, ...], run: Run, sizes: Sequence[int]
) -> tuple[Transfer, ...]:
    """A rank's transfers, with as many of its waits for copies in `run` shortened as its peak leaves room for: where
    memory below the peak is free, blocks are dropped later, or taken back earlier, than their layout says.

    sizes: bytes of each stage's blocks.
    """
    if not run.waits[rank]:
        return transfers
    waits, spans, copies = run.waits[rank], run.spans[rank], run.copies[rank]
    held = list(live_blocks(order, rank, transfers, sizes))
    peak = max(held, default=0)
    backward = {(block.chunk, block.microbatch): block.backward for block in blocks}
    released = {step[1:3]: step.before for step in transfers if step.kind == "release"}
    reloaded = {step[1:3]: step.before for step in transfers if step.kind == "reload"}
    # Of blocks that go on to a file, one step depends on the next.
    in_file = {step[1:3] for step in transfers if step.kind == "spill"}
    moved: dict[tuple[str, int, int], int] = {}

    def room(number: int, size: int) -> bool:
        if held[number] + size > peak:
            return False
        held[number] += size
        return True

    for kind, chunk, microbatch, before in transfers:
        key, size = (chunk, microbatch), sizes[order.stage(rank, chunk)]
        if key in in_file:
            continue
        if kind == "release" and before in waits:
            out_end, wait, later = copies[key].out[1], waits[before], before
            while later + 1 < reloaded[key] and spans[later][0] - wait < out_end and room(later, size):
                later += 1
            moved["release", chunk, microbatch] = released[key] = later
        elif kind == "reload" and backward[key] in waits:
            asked, earlier = copies[key].back[0] - waits[backward[key]], before
            while earlier - 1 > released[key] and spans[earlier - 1][1] > asked and room(earlier - 1, size):
                earlier -= 1
            moved["reload", chunk, microbatch] = earlier
    result: list[tuple[int, int, int, Transfer]] = []
    for position, step in enumerate(transfers):
        before = moved.get(step[:3], step.before)
        # Before the same action: what is dropped later than planned first, what is taken back earlier last.
        urgency = 0 if before > step.before else 2 if before < step.before else 1
        result.append((before, urgency, position, step._replace(before=before)))
    return tuple(step for *_, step in sorted(result))
