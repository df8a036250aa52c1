"""When actions and copies run, given an order, its transfers and the times of both; and which blocks live meanwhile.

Every rank starts its next action as soon as the one before has ended and what it needs has arrived: a forward needs
that of the stage before, a backward (of the input) needs the stage's own forward and the backward of the stage after,
a backward of the weights needs that of the input. A rank also waits for copies: for the one out before it drops a
block, for the one back before the backward that needs it. Its copies of one direction run one after the other as they
were asked for, those of both directions too if it copies in one direction at a time.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .types import Order, Times, Transfer

Spans = tuple[tuple[tuple[float, float], ...], ...]
Key = tuple[int, int]
"""A rank's block: chunk and microbatch."""


class CopyTimes(NamedTuple):
    """Seconds that a block's copies take: out, back, and, if it goes on to a file, to be written and read."""

    out: float
    back: float
    write: float = 0.0
    read: float = 0.0


class CopySpans(NamedTuple):
    """When a block's copies run. Those that aren't asked for: both at the time of the one before."""

    out: tuple[float, float]
    write: tuple[float, float]
    read: tuple[float, float]
    back: tuple[float, float]


@dataclass(frozen=True)
class Run:
    """What `run_copies` finds, one entry per rank."""

    spans: Spans
    copies: tuple[Mapping[Key, CopySpans], ...]
    waits: tuple[Mapping[int, float], ...]
    """By the number of an action: seconds that it starts later than it could without waiting for copies."""

    @property
    def stalls(self) -> tuple[float, ...]:
        return tuple(sum(waits.values()) for waits in self.waits)

    @property
    def seconds(self) -> float:
        return max((spans[-1][1] for spans in self.spans if spans), default=0.0)


class _RankCopies:
    """The copies of one rank, queued as the rank asks for them."""

    def __init__(self, copy_times: Mapping[Key, CopyTimes], both_directions: bool):
        self.copy_times = copy_times
        self.back_queue = 1 if both_directions else 0
        self.link_free = [0.0, 0.0]
        self.file_free = 0.0
        self.out: dict[Key, tuple[float, float]] = {}
        self.write: dict[Key, tuple[float, float]] = {}
        self.read: dict[Key, tuple[float, float]] = {}
        self.done: dict[Key, CopySpans] = {}

    def perform(self, transfer: Transfer, now: float) -> float:
        """Starts a copy that is asked for at `now`, or waits for one: returns when the rank goes on."""
        kind, key = transfer.kind, (transfer.chunk, transfer.microbatch)
        if kind == "release":
            return max(now, self.out[key][1])
        times = self.copy_times[key]
        if kind == "offload":
            start = max(now, self.link_free[0])
            end = self.link_free[0] = start + times.out
            self.out[key] = start, end
        elif kind == "reload":
            out = self.out[key]
            write = self.write.get(key, (out[1], out[1]))
            read = self.read.get(key)
            start = max(now, self.link_free[self.back_queue], read[1] if read else write[1])
            end = self.link_free[self.back_queue] = start + times.back
            self.done[key] = CopySpans(out, write, read or (start, start), (start, end))
        elif kind == "spill":
            start = max(now, self.file_free, self.out[key][1])
            self.file_free = start + times.write
            self.write[key] = start, self.file_free
        else:
            start = max(now, self.file_free, self.write[key][1])
            self.file_free = start + times.read
            self.read[key] = start, self.file_free
        return now


def run_copies(
    order: Order,
    times: Times,
    transfers: Sequence[Sequence[Transfer]],
    copy_times: Sequence[Mapping[Key, CopyTimes]],
    both_directions: bool,
) -> Run:
    """Runs an order with its transfers, `copy_times` by chunk and microbatch; errors as those of `simulate`."""
    microbatches, stages = order.microbatches, order.devices * order.chunks
    backward = tuple(a + b for a, b in zip(times.backward_input, times.backward_weight, strict=True))
    seconds = {"F": times.forward, "I": times.backward_input, "W": times.backward_weight, "B": backward}
    for name, values in (("forward", times.forward), ("backward", backward)):
        if len(values) != stages:
            raise ValueError(
                f"times: expected {stages} {name} times, one per stage, got {len(values)}; "
                f"pass devices * chunks = {order.devices} * {order.chunks} of each"
            )
    stage_of = [[order.stage(rank, chunk) for chunk in range(order.chunks)] for rank in range(order.devices)]
    rank_of = {stage: rank for rank, row in enumerate(stage_of) for stage in row}
    # How long results of the stage before, and after, are on their way.
    hop = [times.transfer if stage and rank_of[stage - 1] != rank_of[stage] else 0.0 for stage in range(stages)] + [0.0]
    # Ends of forwards, and of backwards of the input, by stage and microbatch; and which rank waits for one.
    count = stages * microbatches
    ended: list[float | None] = [None] * (2 * count)
    waiting: dict[int, int] = {}
    spans: list[list[tuple[float, float]]] = [[] for _ in order.ranks]
    engines = [_RankCopies(table, both_directions) for table in copy_times]
    following = [0] * order.devices
    # When a rank has also waited for what stands before its next action.
    passed = [0.0] * order.devices
    waits: list[dict[int, float]] = [{} for _ in order.ranks]
    ready = list(range(order.devices))
    while ready:
        rank = ready.pop()
        actions, done, engine, queue = order.ranks[rank], spans[rank], engines[rank], transfers[rank]
        stages_of_rank, copied_back, computed = stage_of[rank], engine.done, done[-1][1] if done else 0.0
        for number in range(len(done), len(actions)):
            kind, chunk, microbatch = actions[number]
            stage = stages_of_rank[chunk]
            # What stands before an action is asked for when the last one has ended, even if the action must wait.
            while following[rank] < len(queue) and queue[following[rank]].before <= number:
                passed[rank] = engine.perform(queue[following[rank]], passed[rank])
                following[rank] += 1
            key = stage * microbatches + microbatch
            start, needed, late = computed, -1, 0.0
            if kind == "F":
                if stage:
                    needed, late = key - microbatches, hop[stage]
            else:
                if ended[key if kind != "W" else count + key] is None:
                    break
                if kind != "W" and stage + 1 < stages:
                    needed, late = count + key + microbatches, hop[stage + 1]
            if needed >= 0:
                end = ended[needed]
                if end is None:
                    waiting[needed] = rank
                    break
                start = max(start, end + late)
            copied = passed[rank]
            if (kind == "I" or kind == "B") and (copy := copied_back.get((chunk, microbatch))):
                copied = max(copied, copy.back[1])
            if copied > start:
                waits[rank][number] = copied - start
                start = copied
            computed = passed[rank] = start + seconds[kind][stage]
            done.append((start, computed))
            if kind != "W":
                if kind != "F":
                    key += count
                ended[key] = computed
                if key in waiting:
                    ready.append(waiting.pop(key))
    for rank, done in enumerate(spans):
        if len(done) < len(order.ranks[rank]):
            action = order.ranks[rank][len(done)]
            raise ValueError(
                f"order: rank {rank} waits forever before its action {len(done)}, {action.kind} of chunk "
                f"{action.chunk}, microbatch {action.microbatch}; what that needs never runs, or runs later"
            )
    return Run(tuple(map(tuple, spans)), tuple(engine.done for engine in engines), tuple(waits))


def simulate(order: Order, times: Times) -> Spans:
    """Start and end of every action of `order.ranks` without copies, in seconds from the first one's start.

    A whole backward takes both of its halves' times. Between two ranks results travel for `times.transfer`, without
    keeping either of them busy. Raises ValueError for times that don't fit the order, and for an order in which ranks
    wait for each other forever.
    """
    return run_copies(order, times, [()] * order.devices, [{}] * order.devices, False).spans


class Block(NamedTuple):
    """What one chunk saves for one microbatch, and the numbers of the rank's actions that make, need and drop it."""

    chunk: int
    microbatch: int
    forward: int
    backward: int
    last: int


def find_blocks(order: Order, rank: int) -> list[Block]:
    """The blocks of a rank, by their forwards."""
    forward: dict[Key, int] = {}
    backward: dict[Key, int] = {}
    last: dict[Key, int] = {}
    for number, (kind, chunk, microbatch) in enumerate(order.ranks[rank]):
        key = chunk, microbatch
        if kind == "F":
            forward[key] = number
        else:
            backward.setdefault(key, number)
            last[key] = number
    return [Block(*key, number, backward[key], last[key]) for key, number in forward.items()]


def live_blocks(
    order: Order,
    rank: int,
    transfers: Iterable[Transfer] = (),
    block_sizes: Sequence[int] | None = None,
) -> tuple[int, ...]:
    """How many blocks the device holds at most during each action of a rank, and while the rank waits for it; with
    `block_sizes`, one per stage, how many bytes.

    A block lives from its forward to the end of its backward of the weights, or of its whole backward; `transfers`,
    sorted by `before`, take it away between release and reload.
    """
    sizes = [1 if block_sizes is None else block_sizes[order.stage(rank, chunk)] for chunk in range(order.chunks)]
    moves = [step for step in transfers if step.kind in ("release", "reload")]
    following = 0
    result = []
    held = 0
    for number, (kind, chunk, _) in enumerate(order.ranks[rank]):
        most = 0
        while following < len(moves) and moves[following].before <= number:
            step = moves[following]
            following += 1
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
