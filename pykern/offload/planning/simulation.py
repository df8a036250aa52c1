"""When actions run, given an order and times; how many blocks live meanwhile; and how long ranks idle.

Every rank starts its next action as soon as the one before has ended and what it needs has arrived: a forward needs
that of the stage before, a backward (of the input) needs the stage's own forward and the backward of the stage after,
a backward of the weights needs that of the input.
"""

from collections import deque
from collections.abc import Iterable, Sequence

from .types import Order, Times, Transfer

Spans = tuple[tuple[tuple[float, float], ...], ...]


def uniform_times(
    order: Order, forward: float = 1.0, backward_input: float = 1.0, backward_weight: float = 1.0, transfer: float = 0.0
) -> Times:
    """The same times for every stage."""
    stages = order.devices * order.chunks
    return Times((forward,) * stages, (backward_input,) * stages, (backward_weight,) * stages, transfer)


def simulate(order: Order, times: Times) -> Spans:
    """Start and end of every action of `order.ranks`, in seconds from the first one's start.

    A whole backward takes both of its halves' times. Between two ranks results travel for `times.transfer`, without
    keeping either of them busy. Raises ValueError for times that don't fit the order, and for an order in which ranks
    wait for each other forever.
    """
    stages = order.devices * order.chunks
    seconds = {
        "F": times.forward,
        "I": times.backward_input,
        "W": times.backward_weight,
        "B": tuple(a + b for a, b in zip(times.backward_input, times.backward_weight, strict=True)),
    }
    for name, values in (("forward", seconds["F"]), ("backward", seconds["B"])):
        if len(values) != stages:
            raise ValueError(
                f"times: expected {stages} {name} times, one per stage, got {len(values)}; "
                f"pass devices * chunks = {order.devices} * {order.chunks} of each"
            )
    stage_of = [[order.stage(rank, chunk) for chunk in range(order.chunks)] for rank in range(order.devices)]
    rank_of = {stage: rank for rank, row in enumerate(stage_of) for stage in row}
    # Ends by (direction, stage, microbatch): True is a forward, False a backward of the input, alone or not.
    ended: dict[tuple[bool, int, int], float] = {}
    waiting: dict[tuple[bool, int, int], list[int]] = {}
    spans: list[list[tuple[float, float]]] = [[] for _ in order.ranks]
    free = [0.0] * order.devices
    ready = list(range(order.devices))
    while ready:
        rank = ready.pop()
        actions, done = order.ranks[rank], spans[rank]
        while len(done) < len(actions):
            kind, chunk, microbatch = actions[len(done)]
            stage = stage_of[rank][chunk]
            if kind == "F":
                needed = [(True, stage - 1, microbatch)] if stage else []
            elif kind == "W":
                needed = [(False, stage, microbatch)]
            else:
                needed = [(True, stage, microbatch)]
                if stage + 1 < stages:
                    needed.append((False, stage + 1, microbatch))
            start = free[rank]
            missing = next((key for key in needed if key not in ended), None)
            if missing is not None:
                waiting.setdefault(missing, []).append(rank)
                break
            for key in needed:
                start = max(start, ended[key] + (times.transfer if rank_of[key[1]] != rank else 0.0))
            end = free[rank] = start + seconds[kind][stage]
            done.append((start, end))
            if kind != "W":
                key = (kind == "F", stage, microbatch)
                ended[key] = end
                ready += waiting.pop(key, [])
    for rank, done in enumerate(spans):
        if len(done) < len(order.ranks[rank]):
            action = order.ranks[rank][len(done)]
            raise ValueError(
                f"order: rank {rank} waits forever before its action {len(done)}, {action.kind} of chunk "
                f"{action.chunk}, microbatch {action.microbatch}; what that needs never runs, or runs later"
            )
    return tuple(map(tuple, spans))


def live_blocks(
    order: Order,
    rank: int,
    transfers: Iterable[Transfer] = (),
    block_sizes: Sequence[int] | None = None,
) -> tuple[int, ...]:
    """How many blocks the device holds at most during each action of a rank, and while the rank waits for it; with
    `block_sizes`, one per stage, how many bytes.

    A block lives from its forward to the end of its backward of the weights, or of its whole backward; `transfers`, in
    their order, take it away between release and reload.
    """
    sizes = [1 if block_sizes is None else block_sizes[order.stage(rank, chunk)] for chunk in range(order.chunks)]
    moves = deque(
        sorted((step for step in transfers if step.kind in ("release", "reload")), key=lambda step: step.before)
    )
    result = []
    held = 0
    for number, (kind, chunk, _) in enumerate(order.ranks[rank]):
        most = 0
        while moves and moves[0].before <= number:
            step = moves.popleft()
            held += sizes[step.chunk] if step.kind == "reload" else -sizes[step.chunk]
            most = max(most, held if step.kind == "reload" else 0)
        if kind == "F":
            held += sizes[chunk]
        result.append(max(most, held))
        if kind in ("W", "B"):
            held -= sizes[chunk]
    return tuple(result)


def bubbles(order: Order, spans: Spans) -> tuple[float, ...]:
    """Seconds that each rank idles between the pipeline's first start and its last end."""
    length = max((ended for rank in spans for _, ended in rank), default=0.0)
    return tuple(length - sum(ended - started for started, ended in rank) for rank in spans)


def table_blocks(schedule: str, devices: int, chunks: int, rank: int, group: int | None = None) -> int:
    """Most blocks that a rank holds without offloading, by Table 1 of PipeOffload (arXiv 2503.01328), for the schedules
    that have a closed form: 1f1b (with stages of `chunks` blocks), 1f1b_interleaved, gis, gis_h. Fewer if there are
    fewer microbatches."""
    if schedule == "1f1b":
        return chunks * (devices - rank)
    if schedule == "1f1b_interleaved":
        return devices * (chunks - 1) + 2 * (devices - rank) - 1
    return _group(schedule, devices, group) * (chunks - 1) + devices - rank


def table_bubble(
    schedule: str,
    devices: int,
    chunks: int,
    forward: float = 1.0,
    backward_input: float = 1.0,
    backward_weight: float = 1.0,
    group: int | None = None,
) -> float:
    """Seconds that a rank idles, for the same schedules, with one chunk's times and whole groups of microbatches.

    Exact as long as group * (forward + backward_input + backward_weight) covers devices * max(forward, backward_input),
    and backward_weight <= forward + backward_input. The table has (devices - group) * (chunks - 1) * (forward +
    backward_input - backward_weight) for what is beyond GIS with the largest group. That is the same for half of the
    devices, and where both halves of a backward take equally long; between, ranks that wait for no grid idle less.
    """
    whole = forward + backward_input + backward_weight
    if schedule == "1f1b":
        return chunks * (devices - 1) * whole
    if schedule == "1f1b_interleaved":
        return (devices - 1) * whole
    group = _group(schedule, devices, group)
    # Between two chunks of one group: until the first forward is through all ranks, and the first backward.
    gap = max(0, devices - group) * forward
    gap += max(0.0, devices * backward_input - group * (backward_input + backward_weight))
    return (devices - 1) * (forward + backward_input) + (chunks - 1) * gap


def _group(schedule: str, devices: int, group: int | None) -> int:
    return group or {"gis": devices, "gis_h": -(-devices // 2)}[schedule]
