"""Takes waits for copies out of a plan where memory below the peak is free for it: blocks that are dropped later, or
taken back earlier, than the layout of their copies says."""

from collections.abc import Sequence

from .copying import Run
from .simulation import live_blocks
from .transfers import find_blocks
from .types import Order, Transfer


def relax(order: Order, rank: int, transfers: Sequence[Transfer], run: Run, sizes: Sequence[int]) -> list[Transfer]:
    """A rank's transfers, with as many of its waits in `run` shortened as its peak leaves room for.

    sizes: bytes of each stage's blocks.
    """
    waits, spans, copies = run.waits[rank], run.spans[rank], run.copies[rank]
    held = list(live_blocks(order, rank, transfers, sizes))
    peak = max(held, default=0)
    backward = {(block.chunk, block.microbatch): block.backward for block in find_blocks(order, rank)}
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
    if not moved:
        return list(transfers)
    result: list[tuple[int, int, int, Transfer]] = []
    for position, step in enumerate(transfers):
        before = moved.get(step[:3], step.before)
        # Before the same action: what is dropped later than planned first, what is taken back earlier last.
        urgency = 0 if before > step.before else 2 if before < step.before else 1
        result.append((before, urgency, position, step._replace(before=before)))
    return [step for *_, step in sorted(result)]
