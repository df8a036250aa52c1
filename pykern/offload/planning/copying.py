"""When actions and copies run, given an order, its transfers and the times of both.

As in `simulation`, every rank goes on as soon as it can; and here it waits for copies, too: for the one out before it
drops a block, for the one back before the backward that needs it. A rank's copies of one direction run one after the
other as they were asked for, those of both directions too if it copies in one direction at a time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .types import Order, Times, Transfer

Key = tuple[int, int]


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

    spans: tuple[tuple[tuple[float, float], ...], ...]
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
        self.back: dict[Key, tuple[float, float]] = {}

    def perform(self, transfer: Transfer, now: float) -> float:
        """Starts a copy that is asked for at `now`, or waits for one: returns when the rank goes on."""
        kind, key = transfer.kind, (transfer.chunk, transfer.microbatch)
        if kind == "release":
            return max(now, self.out[key][1])
        times = self.copy_times[key]
        if kind == "offload":
            start = max(now, self.link_free[0])
            self.link_free[0] = start + times.out
            self.out[key] = start, start + times.out
        elif kind == "reload":
            start = max(now, self.link_free[self.back_queue], self._arrived(key))
            self.link_free[self.back_queue] = start + times.back
            self.back[key] = start, start + times.back
        elif kind == "spill":
            start = max(now, self.file_free, self.out[key][1])
            self.file_free = start + times.write
            self.write[key] = start, self.file_free
        else:
            start = max(now, self.file_free, self._arrived(key))
            self.file_free = start + times.read
            self.read[key] = start, self.file_free
        return now

    def _arrived(self, key: Key) -> float:
        return max(self.out[key][1], self.write.get(key, (0.0, 0.0))[1], self.read.get(key, (0.0, 0.0))[1])

    def spans(self) -> dict[Key, CopySpans]:
        result = {}
        for key, back in self.back.items():
            out = self.out[key]
            write = self.write.get(key, (out[1], out[1]))
            read = self.read.get(key, (back[0], back[0]))
            result[key] = CopySpans(out, write, read, back)
        return result


def run_copies(
    order: Order,
    times: Times,
    transfers: Sequence[Sequence[Transfer]],
    copy_times: Sequence[Mapping[Key, CopyTimes]],
    both_directions: bool,
) -> Run:
    """Runs an order that `simulation.simulate` accepts with its transfers, `copy_times` by chunk and microbatch."""
    microbatches, stages = order.microbatches, order.devices * order.chunks
    seconds = {
        "F": times.forward,
        "I": times.backward_input,
        "W": times.backward_weight,
        "B": tuple(map(sum, zip(times.backward_input, times.backward_weight, strict=True))),
    }
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
    passed = [0.0] * order.devices
    """When a rank has also waited for what stands before its next action."""
    waits: list[dict[int, float]] = [{} for _ in order.ranks]
    ready = list(range(order.devices))
    while ready:
        rank = ready.pop()
        actions, done, engine, queue = order.ranks[rank], spans[rank], engines[rank], transfers[rank]
        computed = done[-1][1] if done else 0.0
        while len(done) < len(actions):
            kind, chunk, microbatch = actions[len(done)]
            stage = stage_of[rank][chunk]
            # What stands before an action is asked for when the last one has ended, even if the action must wait.
            while following[rank] < len(queue) and queue[following[rank]].before <= len(done):
                passed[rank] = engine.perform(queue[following[rank]], passed[rank])
                following[rank] += 1
            start, needed, late = computed, -1, 0.0
            if kind == "F":
                if stage:
                    needed, late = (stage - 1) * microbatches + microbatch, hop[stage]
            elif kind != "W" and stage + 1 < stages:
                needed, late = count + (stage + 1) * microbatches + microbatch, hop[stage + 1]
            if needed >= 0:
                end = ended[needed]
                if end is None:
                    waiting[needed] = rank
                    break
                start = max(start, end + late)
            copied = passed[rank]
            if (kind == "I" or kind == "B") and (back := engine.back.get((chunk, microbatch))):
                copied = max(copied, back[1])
            if copied > start:
                waits[rank][len(done)] = copied - start
                start = copied
            computed = passed[rank] = start + seconds[kind][stage]
            done.append((start, computed))
            if kind != "W":
                key = stage * microbatches + microbatch + (0 if kind == "F" else count)
                ended[key] = computed
                if key in waiting:
                    ready.append(waiting.pop(key))
    return Run(tuple(map(tuple, spans)), tuple(engine.spans() for engine in engines), tuple(waits))
