"""Says in sentences how a plan differs from what was asked for."""

from collections.abc import Sequence

from .choosing import Choice
from .request import Request


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
