"""What a planner works on and returns: plain data, without tensors.

Words: `devices` ranks each hold `chunks` stages of the model; a stage is one piece of the model, numbered over the
whole pipeline; a block is what one stage saves for the backward of one microbatch. Times are seconds, sizes bytes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, NamedTuple

Kind = Literal["F", "B", "I", "W"]
"""As torch.distributed.pipelining writes them: forward, whole backward, backward of the input, of the weights."""


class Action(NamedTuple):
    """One computation of one rank."""

    kind: Kind
    chunk: int
    microbatch: int


class Transfer(NamedTuple):
    """One thing to do for a block, right before the rank's action number `before` (their count: after the last).

    offload: start copying the block out. release: wait for that copy, and drop the block's device memory.
    reload: take device memory and start copying back; the backward waits for it when it needs the block.
    spill, fetch: the same between host memory and a file.
    """

    kind: Literal["offload", "release", "reload", "spill", "fetch"]
    chunk: int
    microbatch: int
    before: int


class Copy(NamedTuple):
    """When a block goes and comes back, and in which slot it lies meanwhile: of the host's arena, or of the file."""

    chunk: int
    microbatch: int
    out_start: float
    out_end: float
    back_start: float
    back_end: float
    slot: int
    tier: Literal["host", "file"] = "host"


@dataclass(frozen=True)
class Order:
    """Which actions each rank performs, in which order."""

    schedule: str
    devices: int
    chunks: int
    microbatches: int
    ranks: tuple[tuple[Action, ...], ...]
    placement: Literal["loop", "v"] = "loop"
    notes: tuple[str, ...] = ()
    """How the request was degraded, a sentence each; empty if it wasn't."""

    def stage(self, rank: int, chunk: int) -> int:
        """The stage that is a rank's chunk: chunk * devices + rank, or, in a V, back from the last rank."""
        if self.placement == "v" and chunk % 2:
            rank = self.devices - 1 - rank
        return chunk * self.devices + rank


@dataclass(frozen=True)
class Times:
    """Seconds of each stage's forward, and of its backward of the input and of the weights; `transfer` from one rank
    to the next. A whole backward takes both."""

    forward: tuple[float, ...]
    backward_input: tuple[float, ...]
    backward_weight: tuple[float, ...]
    transfer: float = 0.0


@dataclass(frozen=True)
class Plan:
    """An order with its copies, and what is to be expected of it. Tuples have one entry per rank."""

    order: Order
    times: Times
    block_bytes: tuple[int, ...]
    """Of each stage."""
    spans: tuple[tuple[tuple[float, float], ...], ...]
    """Start and end of every action of `order.ranks`."""
    copies: tuple[tuple[Copy, ...], ...]
    transfers: tuple[tuple[Transfer, ...], ...]
    """Sorted by `before`, and within it in the order in which they are to be done."""
    slot_bytes: tuple[tuple[int, ...], ...]
    """The host arena: the size of each slot."""
    peak_blocks: tuple[int, ...]
    peak_bytes: tuple[int, ...]
    stall_seconds: tuple[float, ...]
    """Time that actions wait for copies."""
    file_bytes: tuple[int, ...]
    notes: tuple[str, ...]
    file_slot_bytes: tuple[tuple[int, ...], ...] = ()
    """The size of each slot of the file."""
    staging_bytes: tuple[int, ...] = ()
    """Host memory in which blocks lie on their way to and from the file, beside the arena."""
    seconds_alone: float = 0.0
    """What `seconds` would be without copies."""
    both_directions: bool = False
    """A rank copies out and back at once; else in one direction at a time."""
    request: Mapping[str, object] | None = None
    """The arguments that `plan` was called with."""

    @property
    def host_bytes(self) -> tuple[int, ...]:
        return tuple(sum(slots) for slots in self.slot_bytes)

    @property
    def host_waste(self) -> tuple[float, ...]:
        """The part of each rank's arena that is not in use even when most bytes lie there."""
        result = []
        for rank, copies in enumerate(self.copies):
            changes = []
            for copy in copies:
                if copy.tier == "host":
                    size = self.block_bytes[self.order.stage(rank, copy.chunk)]
                    changes += [(copy.out_start, size), (copy.back_end, -size)]
            used = max(accumulate(size for _, size in sorted(changes)), default=0)
            result.append(1 - used / self.host_bytes[rank] if used else 0.0)
        return tuple(result)

    @property
    def seconds(self) -> float:
        return max((spans[-1][1] for spans in self.spans if spans), default=0.0)
