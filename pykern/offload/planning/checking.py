"""Whether a plan can be carried out as it stands, and does what it predicts."""

import math
from collections.abc import Iterable
from itertools import pairwise

from .simulation import find_blocks, live_blocks
from .types import Copy, Plan, Transfer


def check_plan(plan: Plan) -> None:
    """Raises ValueError for the first rank whose transfers are out of order, whose copies overlap in a slot or on the
    link, or whose peak or stalls aren't those of its transfers and copies."""
    waits = _waits(plan)
    for rank in range(plan.order.devices):
        try:
            _check_rank(plan, rank)
            stall = plan.stall_seconds[rank]
            _demand(math.isclose(waits[rank], stall, rel_tol=1e-6, abs_tol=1e-9 * plan.seconds),
                    f"actions wait for copies for {waits[rank]:.6g} s, not {stall:.6g} s as predicted")  # fmt: skip
        except _Wrong as wrong:
            raise ValueError(f"plan: rank {rank}: {wrong}") from None


class _Wrong(Exception):
    pass


def _demand(condition: bool, message: str) -> None:
    if not condition:
        raise _Wrong(message)


def _check_rank(plan: Plan, rank: int) -> None:
    order, spans, copies, transfers = plan.order, plan.spans[rank], plan.copies[rank], plan.transfers[rank]
    sizes = plan.block_bytes
    _demand(all(a.before <= b.before for a, b in pairwise(transfers)), "transfers not sorted")
    told: dict[tuple[int, int], list[tuple[int, Transfer]]] = {}
    for position, transfer in enumerate(transfers):
        told.setdefault((transfer.chunk, transfer.microbatch), []).append((position, transfer))
    of_block = {(copy.chunk, copy.microbatch): copy for copy in copies}
    _demand(len(of_block) == len(copies) and of_block.keys() == told.keys(), "copies and transfers of other blocks")
    blocks = {(block.chunk, block.microbatch): block for block in find_blocks(order, rank)}
    rounding = max(1e-6 * max((copy.out_end - copy.out_start for copy in copies), default=0.0), 1e-12 * plan.seconds)
    for key, copy in of_block.items():
        name, block, steps = f"chunk {key[0]}, microbatch {key[1]}", blocks[key], [step for _, step in told[key]]
        kinds = [step.kind for step in steps]
        wanted = ["offload", "release", "reload"]
        if copy.tier == "file":
            wanted = ["offload", "release", "spill", "fetch", "reload"]
        _demand(kinds == wanted, f"{name}: expected {', '.join(wanted)}, got {', '.join(kinds)}")
        _demand(steps[0].before > block.forward, f"{name} is copied out before its forward has ended")
        _demand(steps[-1].before <= block.backward, f"{name} is taken back after its backward has begun")
        _demand(copy.out_start >= spans[block.forward][1] - rounding, f"{name} leaves during its forward")
        _demand(copy.out_end <= copy.back_start + rounding, f"{name} comes back before it is out")
        _demand(copy.back_end <= spans[block.backward][0] + rounding, f"{name} comes back during its backward")
        dropped = steps[1].before
        _demand(dropped >= len(spans) or copy.out_end <= spans[dropped][0] + rounding, f"{name} is dropped too early")
    positions = {(step.kind, *key): position for key, steps in told.items() for position, step in steps}
    for tier, rooms in (("host", plan.slot_bytes[rank]), ("file", plan.file_slot_bytes[rank])):
        among = [copy for copy in copies if copy.tier == tier]
        for copy in among:
            _demand(0 <= copy.slot < len(rooms), f"slot {copy.slot} of the {tier} does not exist")
            size = sizes[order.stage(rank, copy.chunk)]
            _demand(size <= rooms[copy.slot], f"slot {copy.slot} of the {tier} is too small")
        for before, after in _neighbours(among):
            _demand(
                before.back_end <= after.out_start + rounding, f"slot {after.slot} of the {tier} is used twice at once"
            )
            freed = positions["reload", before.chunk, before.microbatch]
            asked = positions["offload", after.chunk, after.microbatch]
            _demand(freed < asked, f"slot {after.slot} of the {tier} is asked for before it is due to be freed")
    out, back = [(c.out_start, c.out_end) for c in copies], [(c.back_start, c.back_end) for c in copies]
    for link in (out, back) if plan.both_directions else (out + back,):
        link.sort()
        _demand(all(a[1] <= b[0] + rounding for a, b in pairwise(link)), "two copies at once")
    held = live_blocks(order, rank, transfers)
    _demand(
        max(held, default=0) == plan.peak_blocks[rank], f"a peak of {max(held, default=0)} blocks, not as predicted"
    )
    held = live_blocks(order, rank, transfers, sizes)
    _demand(min(held, default=0) >= 0, "a block is dropped twice")
    _demand(max(held, default=0) == plan.peak_bytes[rank], f"a peak of {max(held, default=0)} bytes, not as predicted")


def _waits(plan: Plan) -> list[float]:
    """Seconds for which each rank's actions start later than the rank and what they need from others allow."""
    order, hop = plan.order, plan.times.transfer
    ended = {
        (action.kind == "F", order.stage(rank, action.chunk), action.microbatch): (rank, span[1])
        for rank, actions in enumerate(order.ranks)
        for action, span in zip(actions, plan.spans[rank], strict=True)
        if action.kind != "W"
    }
    waits = []
    for rank, actions in enumerate(order.ranks):
        total = free = 0.0
        for (kind, chunk, microbatch), (start, end) in zip(actions, plan.spans[rank], strict=True):
            possible, stage = free, order.stage(rank, chunk)
            needed = (kind == "F", stage + (-1 if kind == "F" else 1), microbatch)
            if kind != "W" and needed in ended:
                other, moment = ended[needed]
                possible = max(possible, moment + (hop if other != rank else 0.0))
            total += start - possible
            free = end
        waits.append(total)
    return waits


def _neighbours(copies: Iterable[Copy]) -> list[tuple[Copy, Copy]]:
    """Copies that follow each other in a slot."""
    slots: dict[int, list[Copy]] = {}
    for copy in copies:
        slots.setdefault(copy.slot, []).append(copy)
    pairs = []
    for among in slots.values():
        among.sort(key=lambda copy: copy.out_start)
        pairs += pairwise(among)
    return pairs
