"""What a plan says about itself in sentences: how it differs from what was asked for, and what would be faster."""

from collections.abc import Sequence

from .choosing import Choice
from .orders import least_group, make_order
from .request import Request
from .simulation import live_blocks, simulate
from .types import Order, Times


def tell(
    request: Request, choices: Sequence[Choice], peaks: Sequence[int], seconds: float, alone: float, layout: int
) -> tuple[str, ...]:
    """`seconds` and `alone`: of a step with copies and without; `layout`: how many tighter ones were given up."""
    reasons = {
        "brief": f"the device would miss them for less than {request.shortest:g} times their copies out and back",
        "late": "their copies do not fit beside the computation",
        "unread": "the host has no room for them, and a file could not be read in time",
        "unhoused": "the host has no room for them",
    }
    notes = []
    for name, reason in reasons.items():
        ranks_of: dict[int, list[int]] = {}
        count = 0
        for rank, choice in enumerate(choices):
            if request.budget is not None and peaks[rank] <= request.budget[rank]:
                # No more need leave.
                continue
            staying = getattr(choice, name)
            count += len(staying)
            for chunk in sorted({block.chunk for block in staying}):
                ranks_of.setdefault(chunk, []).append(rank)
        if not count:
            continue
        where = "; ".join(f"chunk {chunk} of {_ranks(ranks)}" for chunk, ranks in sorted(ranks_of.items()))
        notes.append(f"{_blocks(count)} left on the device, because {reason}: {where}")
    for rank, (peak, budget) in enumerate(zip(peaks, request.budget or peaks, strict=True)):
        if peak > budget:
            notes.append(f"rank {rank} cannot keep its blocks within {budget} bytes of its device: {peak} at best")
    if layout:
        notes.append("the schedule's tightest layout of copies would let computation wait for too long: laid out wider")
    if seconds > alone * (1 + 1e-9) + 1e-12:
        percent = 100 * (seconds / alone - 1)
        notes.append(f"copies lengthen the step by {percent:.2g} %" if percent < 99 else
                     f"copies lengthen the step by {percent:.0f} %")  # fmt: skip
    return tuple(notes)


def _blocks(count: int) -> str:
    return "1 block is" if count == 1 else f"{count} blocks are"


def _ranks(ranks: Sequence[int]) -> str:
    """2, 3, 4, 7 as ranks 2-4, 7."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    listed = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"rank {listed}" if len(ranks) == 1 else f"ranks {listed}"


def smallest_group(devices: int, times: Times, split_backward: bool = True) -> int:
    """The smallest group that keeps a pipeline of these stages filled, at most `devices`.

    A group has to keep its slowest stage busy for as long as a microbatch needs to pass one chunk on all ranks:
    group * max(forward + backward) >= max over chunks (sum of the forwards, sum of the backwards, of the input alone
    if split).
    """
    wholes = map(sum, zip(times.forward, times.backward_input, times.backward_weight, strict=True))
    slowest = max(wholes, default=0.0)
    backward = times.backward_input
    if not split_backward:
        backward = tuple(a + b for a, b in zip(times.backward_input, times.backward_weight, strict=True))
    passing = max(
        (
            sum(values[first : first + devices])
            for values in (times.forward, backward)
            for first in range(0, len(values), devices)
        ),
        default=0.0,
    )
    group = least_group(devices)
    while group < devices and group * slowest < passing * (1 - 1e-9):
        group += 1
    return group


def advise_group(order: Order, times: Times) -> tuple[str, ...]:
    """A sentence if an order of PO or GIS-H with the least group would run faster with a larger one."""
    if order.schedule not in ("po", "gis_h"):
        return ()
    split = all(action.kind != "B" for action in order.ranks[0])
    group = smallest_group(order.devices, times, split)
    if group == least_group(order.devices):
        return ()
    other = make_order(order.schedule, order.devices, order.chunks, order.microbatches, group=group,
                       split_backward=split)  # fmt: skip
    seconds, faster = (max(spans[-1][1] for spans in simulate(each, times)) for each in (order, other))
    if faster > 0.99 * seconds:
        return ()
    more = max(max(live_blocks(other, rank)) - max(live_blocks(order, rank)) for rank in range(order.devices))
    return (
        f"without copies, group={group} would take {1 - faster / seconds:.1%} less time with these stages, for up to "
        f"{more} more block{'s' * (more != 1)} per device",
    )
