"""Plans a step of a pipeline: the order of a schedule, what leaves each device when, and what is to be expected.

>>> plan("po", 8, 4, 32, times=(1.0, 1.0, 1.0), bytes=1 << 20, bandwidth=1e6, offload="half").peak_blocks
(9, 9, 8, 8, 8, 7, 7, 6)
"""

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

from .arena import Stay, colour
from .choosing import Choice, choose, most
from .layout import RankTimes, hurry_warm_up, postpone_warm_up
from .notes import advise_group, tell
from .orders import least_group, make_order, pipe_offload_slots
from .request import Request, read_request
from .simulation import Block, CopySpans, CopyTimes, Key, Run, Spans, find_blocks, live_blocks, run_copies, simulate
from .transfers import anchor, relax
from .types import Copy, Order, Plan, Times, Transfer


def plan(
    schedule: str,
    devices: int,
    chunks: int,
    microbatches: int,
    *,
    times: Times | Sequence[float | Sequence[float]],
    bytes: int | Sequence[int],
    bandwidth: float | tuple[float, float],
    offload: str | int | Sequence[int] = "none",
    budget: int | Sequence[int] | None = None,
    host_budget: int | Sequence[int] | None = None,
    file_bandwidth: float | None = None,
    directions: str = "one",
    pairs: bool | Sequence[tuple[int, int]] = True,
    group: int | None = None,
    split_backward: bool | None = None,
    stall: str = "avoid",
    slack: float = 0.02,
    shortest: float = 3.0,
    lone_speedup: float = 1 / 0.7,
) -> Plan:
    """Plans a training step of a pipeline with activation offload (PipeOffload, arXiv 2503.01328).

    It always answers: what cannot be had is replaced by the nearest that can, and `Plan.notes` says how.

    Args:
        schedule: "gis", "gis_h", "po", "po_h" and "po_f" (po with half or all of the chunks offloaded), "1f1b",
            "1f1b_interleaved", "zb_v", "v_half" or "v_min".
        devices, chunks, microbatches: ranks of the pipeline, stages per rank, microbatches per step.
        times: seconds of a stage's forward, backward of the input, and backward of the weights: `Times`, or three
            entries, each a number for all stages or a sequence of one per stage.
        bytes: what a stage saves for the backward of one microbatch, for all stages or one per stage.
        bandwidth: bytes per second of a rank's copies out and back, or a pair of both: while they alternate, or with
            directions="two" while both run at once.
        offload: how many chunks leave, the first ones of each rank: "none", "half" (rounded up), "full", a number, or
            one per rank. With a budget, "none" lets it choose among all.
        budget: device bytes for blocks per rank, for all ranks or one per rank: only blocks that are needed to keep
            within it leave, those missed longest first.
        host_budget: host bytes for the arena of each rank. What has no room goes on to a file if there is a
            `file_bandwidth`, with `Plan.staging_bytes` on the host beside the arena, and else stays on the device.
        file_bandwidth: bytes per second of a rank's writes to or reads from its file, which alternate.
        directions: "one" at a time, for two ranks at a switch, or one slow link; "two" at once.
        pairs: with one direction, the ranks that share a switch and so alternate against each other: (0, 1), (2, 3)
            ..., none, or pairs of ranks.
        group: of GIS and PO, see their orders.
        split_backward: whether backwards of input and weights are apart; by default as the schedule was published.
        stall: "avoid" leaves blocks on the device that cannot be back in time; "allow" moves all that were asked for,
            and predicts how long computation waits for them.
        slack: with stall="avoid", the part by which copies may lengthen the step: the tightest memory has its price
            while the pipeline fills up and runs dry. With 0, actions wait only where others wait for longer.
        shortest: blocks stay if the device would miss them for less than so many times their copies, out and back.
        lone_speedup: how much faster copies out are before the first of a pair's copies back.

    Returns:
        The plan; times are those of a run in which every rank goes on as soon as it can.

    Raises:
        TypeError, ValueError: an argument has no meaning.
    """
    arguments = dict(locals())
    with _no_garbage_collection():
        order = make_order(schedule, devices, chunks, microbatches, group=group, split_backward=split_backward)
        request = read_request(order, arguments)
        drafts = _Drafts(request)
        made = _finish(request, drafts.best(), drafts.alone_seconds, arguments)
        return made if group is not None else replace(made, notes=made.notes + advise_group(order, request.times))


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Planning makes millions of small tuples and no cycles; looking for some would take half of its time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def replan(
    plan_: Plan,
    *,
    times: Times | Sequence[float | Sequence[float]] | None = None,
    bytes: int | Sequence[int] | None = None,
    bandwidth: float | tuple[float, float] | None = None,
    file_bandwidth: float | None = None,
) -> Plan:
    """The same request with what has been measured meanwhile; what isn't given stays as it was assumed."""
    if not isinstance(plan_, Plan) or plan_.request is None:
        raise TypeError(f"plan_: expected what plan() returned, got {type(plan_).__name__}; call plan() first")
    measured = {"times": times, "bytes": bytes, "bandwidth": bandwidth, "file_bandwidth": file_bandwidth}
    return plan(**{**plan_.request, **{name: value for name, value in measured.items() if value is not None}})


# By which the times of computation are stretched at most for a request that insists: what is late even so stays.
_LONGEST_STRETCH = float(1 << 24)


# How often waits are taken out of a layout before what remains is taken as it is.
_RELAXING_ROUNDS = 3


@dataclass(frozen=True)
class _Basis:
    """The times that copies are laid out by."""

    spans: Spans
    hurry: bool
    """Copies out while the pipeline fills up run at the faster rate."""


@dataclass(frozen=True)
class _Draft:
    transfers: tuple[tuple[Transfer, ...], ...]
    choices: tuple[Choice, ...]
    run: Run
    peaks: tuple[int, ...]
    """Bytes."""
    number: int
    """Of its basis."""


class _Drafts:
    """Lays copies out by several times of the same order, and takes what keeps its promise.

    Ranks run as soon as they can, so no layout is exact. PipeOffload's own, by a grid of equal times, spreads copies
    evenly: it has the lowest peak, and its few waits mostly fall into times in which ranks idle anyway. Layouts by the
    times of the order's own run come closer to it; the last one, without warm-up forwards postponed or copies hurried,
    has copies end when they must.
    """

    def __init__(self, request: Request):
        self.order, self.request = request.order, request
        alone = self.alone = simulate(request.order, request.times)
        self.alone_seconds = max((spans[-1][1] for spans in alone if spans), default=0.0)
        self.blocks = [find_blocks(request.order, rank) for rank in range(request.order.devices)]

    def _bases(self) -> Iterator[_Basis]:
        order, times = self.order, self.request.times
        if order.schedule == "po" and (grid := _grid(order, times, self.request.group)):
            yield _Basis(postpone_warm_up(order, times, grid), hurry=True)
        yield _Basis(postpone_warm_up(order, times, self.alone), hurry=True)
        yield _Basis(self.alone, hurry=False)

    def best(self) -> _Draft:
        if self.request.insist:
            return self._insist(next(self._bases()))
        for number, basis in enumerate(self._bases()):
            draft = self._within_host_budget(basis, number)
            if self._is_quick(draft):
                return draft
        return draft

    def _insist(self, basis: _Basis) -> _Draft:
        """All that was asked for, laid out by times that are stretched until it fits: computation will wait as long."""

        def attempt(stretch: float) -> tuple[int, int]:
            """How many blocks leave, and are late."""
            layouts = self._choose_all(_stretched(basis, stretch), [None] * self.order.devices)
            choices = [choice for _, of_ranks in layouts for choice in of_ranks]
            return sum(len(choice.placed) for choice in choices), sum(len(choice.late) for choice in choices)

        # At first by as much as copying alone takes: then what is away only briefly is known, too.
        stretch = max(1.0, self._copying_seconds() / self.alone_seconds) if self.alone_seconds else 1.0
        leaving, late = attempt(stretch)
        while late and stretch < _LONGEST_STRETCH:
            stretch *= 2
            leaving, late = attempt(stretch)
        too_little = 1.0
        if stretch > 1.0 and attempt(1.0) == (leaving, late):
            stretch = 1.0
        while stretch - too_little > 0.02 * stretch:
            middle = (stretch + too_little) / 2
            if attempt(middle) == (leaving, late):
                stretch = middle
            else:
                too_little = middle
        return self._within_host_budget(_stretched(basis, stretch), 0)

    def _copying_seconds(self) -> float:
        """Of the rank that copies for longest, if all that was asked for leaves."""
        request, longest = self.request, 0.0
        for rank in range(self.order.devices):
            total = request.order.microbatches * sum(request.sizes_of(rank)[: request.offload[rank]])
            seconds = [total / rate for rate in request.rates]
            longest = max(longest, max(seconds) if request.both_directions else sum(seconds))
        return longest

    def _is_quick(self, draft: _Draft) -> bool:
        return draft.run.seconds <= self.alone_seconds * (1 + self.request.slack) * (1 + 1e-9)

    def _within_host_budget(self, basis: _Basis, number: int) -> _Draft:
        housed: list[int | None] = [None] * self.order.devices
        while True:
            draft = self._lay_out(basis, number, housed)
            if self.request.host_budget is None:
                return draft
            kept = True
            for rank, (choice, room) in enumerate(zip(draft.choices, self.request.host_budget, strict=True)):
                stays = _stays(draft.run.copies[rank], draft.transfers[rank], self.request.sizes_of(rank)).host
                longest_first = [(block.chunk, block.microbatch) for block in choice.ordered]
                in_host = [stays[key] for key in longest_first if key in stays]

                def fits(count: int, in_host=in_host, room=room) -> bool:
                    return sum(colour(in_host[:count])[1]) <= room

                if not fits(len(in_host)):
                    kept = False
                    housed[rank] = most(len(in_host), fits)
            if kept:
                return draft

    def _lay_out(self, basis: _Basis, number: int, housed: Sequence[int | None]) -> _Draft:
        order, request = self.order, self.request
        choices: list[Choice] = [Choice([])] * order.devices
        transfers: list[tuple[Transfer, ...]] = [()] * order.devices
        copy_times: list[Mapping[Key, CopyTimes]] = [{}] * order.devices
        for ranks, of_ranks in self._choose_all(basis, housed):
            for rank, choice in zip(ranks, of_ranks, strict=True):
                choices[rank.rank] = choice
            placed = [choice.placed for choice in of_ranks]
            if basis.hurry:
                placed = hurry_warm_up(ranks, placed, len(ranks))
            for rank, copies in zip(ranks, placed, strict=True):
                transfers[rank.rank] = anchor(rank, copies)
                file_rate = request.file_rate or 1.0
                copy_times[rank.rank] = {
                    (copy.block.chunk, copy.block.microbatch): CopyTimes(
                        copy.out_end - copy.out_start,
                        copy.back_end - copy.back_start,
                        *[rank.sizes[copy.block.chunk] / file_rate] * 2,
                    )
                    for copy in copies
                }
        if any(transfers):
            run = run_copies(order, request.times, transfers, copy_times, request.both_directions)
            # Where copies are what everything waits for, less haste here is more there.
            for _ in range(0 if request.insist else _RELAXING_ROUNDS):
                if not any(run.waits):
                    break
                relaxed = [
                    relax(order, rank, blocks, transfers[rank], run, request.sizes)
                    for rank, blocks in enumerate(self.blocks)
                ]
                again = run_copies(order, request.times, relaxed, copy_times, request.both_directions)
                if (again.seconds, sum(again.stalls)) >= (run.seconds, sum(run.stalls)):
                    break
                transfers, run = relaxed, again
        else:
            run = Run(self.alone, ({},) * order.devices, ({},) * order.devices)
        peaks = tuple(
            max(live_blocks(order, rank, transfers[rank], request.sizes), default=0) for rank in range(order.devices)
        )
        return _Draft(tuple(transfers), tuple(choices), run, peaks, number)

    def _choose_all(
        self, basis: _Basis, housed: Sequence[int | None]
    ) -> Iterator[tuple[list[RankTimes], list[Choice]]]:
        """By ranks that share a switch."""
        for members in self.request.groups:
            ranks = [RankTimes(self.request, rank, self.blocks[rank], basis.spans[rank]) for rank in members]
            yield ranks, self._choose(ranks, housed, len(members) if basis.hurry else 0)

    def _choose(self, ranks: Sequence[RankTimes], housed: Sequence[int | None], sharing: int) -> list[Choice]:
        request = self.request
        asked = [
            [b for b in rank.blocks if b.chunk < request.offload[rank.rank] and rank.sizes[b.chunk]] for rank in ranks
        ]
        slot = _longest(ranks, asked)
        choices = self._choose_in_slots(ranks, asked, slot, housed, sharing)
        # Slots are as long as the longest copy. If not all fit, the longest may not be worth it.
        shorter = _longest(ranks, [choice.ordered for choice in choices])
        if request.insist or not 0.0 < shorter < slot or not any(choice.late for choice in choices):
            return choices
        short = [
            [block for block in blocks if rank.longest(block.chunk) <= shorter]
            for rank, blocks in zip(ranks, asked, strict=True)
        ]
        choices = self._choose_in_slots(ranks, short, shorter, housed, sharing)
        for choice, few, all_asked in zip(choices, short, asked, strict=True):
            among = set(few)
            choice.late += [block for block in all_asked if block not in among]
        return choices

    def _choose_in_slots(
        self,
        ranks: Sequence[RankTimes],
        asked: Sequence[list[Block]],
        slot: float,
        housed: Sequence[int | None],
        sharing: int,
    ) -> list[Choice]:
        request = self.request
        origin = ranks[0].ends[0] if ranks[0].ends else 0.0
        return [
            choose(
                rank, blocks, origin + slot * number, slot, sharing=sharing,
                budget=None if request.budget is None else request.budget[rank.rank],
                insist=request.insist, housed=housed[rank.rank],
            )
            for number, (rank, blocks) in enumerate(zip(ranks, asked, strict=True))
        ]  # fmt: skip


def _stretched(basis: _Basis, by: float) -> _Basis:
    if by == 1.0:
        return basis
    return _Basis(tuple(tuple((by * start, by * end) for start, end in rank) for rank in basis.spans), basis.hurry)


def _longest(ranks: Sequence[RankTimes], blocks: Sequence[Sequence[Block]]) -> float:
    return max(rank.slot(of_rank) for rank, of_rank in zip(ranks, blocks, strict=True))


def _grid(order: Order, times: Times, group: int | None) -> Spans | None:
    """PO's slots of equal time, as long as the longest action; None where it isn't made by a grid."""
    if order.devices == 1:
        return None
    unit = max(times.forward + times.backward_input + times.backward_weight) + times.transfer
    # A whole backward takes both slots: its second half ends where it would on its own.
    whole = tuple(unit + w if w else i for i, w in zip(times.backward_input, times.backward_weight, strict=True))
    seconds = {"F": times.forward, "I": times.backward_input, "W": times.backward_weight, "B": whole}
    least = least_group(order.devices)
    spans = []
    for rank, actions in enumerate(order.ranks):
        slots = pipe_offload_slots(order.devices, order.chunks, order.microbatches, rank, max(group or least, least))
        if len(actions) < len(slots):
            slots = [(slot, action) for slot, action in slots if action.kind != "W"]
        stage = [order.stage(rank, chunk) for chunk in range(order.chunks)]
        spans.append(tuple(
            (slot * unit, slot * unit + seconds[action.kind][stage[action.chunk]])
            for (slot, _), action in zip(slots, actions, strict=True)
        ))  # fmt: skip
    return tuple(spans)


class _Stays(NamedTuple):
    """Of one rank: blocks in the host's arena, in the file, and on their way to and from the file."""

    host: dict[Key, Stay]
    file: dict[Key, Stay]
    staging: list[Stay]


def _stays(copies: Mapping[Key, CopySpans], transfers: Sequence[Transfer], sizes: Sequence[int]) -> _Stays:
    position: dict[Key, dict[str, int]] = {}
    for number, step in enumerate(transfers):
        position.setdefault((step.chunk, step.microbatch), {})[step.kind] = number
    stays = _Stays({}, {}, [])
    for key, spans in copies.items():
        at, size = position[key], sizes[key[0]]
        whole = Stay(spans.out[0], spans.back[1], at["offload"], at["reload"], size)
        if "spill" not in at:
            stays.host[key] = whole
            continue
        stays.file[key] = whole
        stays.staging.append(Stay(spans.out[0], spans.write[1], at["offload"], at["spill"], size))
        stays.staging.append(Stay(spans.read[0], spans.back[1], at["fetch"], at["reload"], size))
    return stays


def _finish(request: Request, draft: _Draft, alone: float, arguments: Mapping[str, object]) -> Plan:
    order, sizes = request.order, request.sizes
    copies, slot_bytes, file_slot_bytes, staging_bytes = [], [], [], []
    for rank in range(order.devices):
        stays = _stays(draft.run.copies[rank], draft.transfers[rank], request.sizes_of(rank))
        of_rank, rooms = [], {}
        for tier, among in (("host", stays.host), ("file", stays.file)):
            slots, rooms[tier] = colour(among.values())
            for (chunk, microbatch), slot in zip(among, slots, strict=True):
                spans = draft.run.copies[rank][chunk, microbatch]
                of_rank.append(Copy(chunk, microbatch, *spans.out, *spans.back, slot, tier))
        copies.append(tuple(sorted(of_rank, key=lambda copy: copy.out_start)))
        slot_bytes.append(tuple(rooms["host"]))
        file_slot_bytes.append(tuple(rooms["file"]))
        staging_bytes.append(sum(colour(stays.staging)[1]))
    return Plan(
        order=order,
        times=request.times,
        block_bytes=sizes,
        spans=draft.run.spans,
        copies=tuple(copies),
        transfers=draft.transfers,
        slot_bytes=tuple(slot_bytes),
        peak_blocks=tuple(
            max(live_blocks(order, rank, draft.transfers[rank]), default=0) for rank in range(order.devices)
        ),
        peak_bytes=draft.peaks,
        stall_seconds=draft.run.stalls,
        file_bytes=tuple(map(sum, file_slot_bytes)),
        notes=(*order.notes, *tell(request, draft.choices, draft.peaks, draft.run.seconds, alone, draft.number)),
        file_slot_bytes=tuple(file_slot_bytes),
        staging_bytes=tuple(staging_bytes),
        seconds_alone=alone,
        both_directions=request.both_directions,
        request=arguments,
    )
