"""Orders of pipeline schedules: published ones action by action, closed forms, and every request that can be made."""

import random
from itertools import product

import pytest

from pykern.offload.planning.notes import advise_group, smallest_group
from pykern.offload.planning.orders import SCHEDULES, least_group, make_order, pipe_offload_slots
from pykern.offload.planning.simulation import bubbles, live_blocks, simulate
from pykern.offload.planning.types import Action, Order, Times

# Forward, backward of the input, of the weights. Binary fractions, so that sums of them are exact.
UNEQUAL = [(1.0, 1.0, 1.0), (1.0, 1.5, 0.75), (2.0, 1.25, 1.0), (1.0, 2.0, 2.0), (2.0, 1.0, 0.5)]


def uniform_times(order: Order, *seconds: float, transfer: float = 0.0) -> Times:
    """Every stage's forward, backward of the input, and of the weights; a second each by default."""
    stages = order.devices * order.chunks
    return Times(*((value,) * stages for value in seconds or (1.0, 1.0, 1.0)), transfer)


def table_blocks(schedule: str, devices: int, chunks: int, rank: int, group: int | None = None) -> int:
    """Most blocks that a rank holds without offloading, by Table 1 of PipeOffload (arXiv 2503.01328), for the schedules
    that have a closed form: 1f1b (with stages of `chunks` blocks), 1f1b_interleaved, gis, gis_h. Fewer if there are
    fewer microbatches."""
    if schedule == "1f1b":
        return chunks * (devices - rank)
    if schedule == "1f1b_interleaved":
        return devices * (chunks - 1) + 2 * (devices - rank) - 1
    return group_of(schedule, devices, group) * (chunks - 1) + devices - rank


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
    group = group_of(schedule, devices, group)
    # Between two chunks of one group: until the first forward is through all ranks, and the first backward.
    gap = max(0, devices - group) * forward
    gap += max(0.0, devices * backward_input - group * (backward_input + backward_weight))
    return (devices - 1) * (forward + backward_input) + (chunks - 1) * gap


def group_of(schedule: str, devices: int, group: int | None) -> int:
    return group or {"gis": devices, "gis_h": -(-devices // 2)}[schedule]


def peaks(order: Order) -> list[int]:
    return [max(live_blocks(order, rank)) for rank in range(order.devices)]


def written(actions: tuple[Action, ...]) -> str:
    """As the paper's figures: chunk 0 in lower case, 1 in upper; B is the input's backward; microbatches from 1."""
    letter = {"F": "f", "I": "b", "W": "w"}
    return " ".join(
        (letter[a.kind].upper() if a.chunk else letter[a.kind]) + str(a.microbatch + 1) for a in actions
    )  # fmt: skip


def gis_by_definition(devices: int, chunks: int, microbatches: int, group: int, rank: int) -> list[Action]:
    """Every action by its place in time: forward number n comes right after backward number n minus the warm-up's."""
    whole = -(-microbatches // group) * group * chunks
    warm_up = min(group * (chunks - 1) + devices - rank, whole)
    places = {}
    for microbatch, chunk in product(range(microbatches), range(chunks)):
        visits = microbatch // group * group * chunks + microbatch % group
        forward, backward = visits + group * chunk - warm_up, visits + group * (chunks - 1 - chunk)
        places[Action("F", chunk, microbatch)] = forward + 0.5
        places[Action("I", chunk, microbatch)] = backward
        places[Action("W", chunk, microbatch)] = backward + 0.25
    return sorted(places, key=places.__getitem__)


def test_gis_by_definition():
    cases = 0
    for devices, chunks, multiple in product((1, 2, 3, 4, 5, 8, 12, 16), (1, 2, 3, 4, 8), (0, 1, 3)):
        for group in (least_group(devices), devices):
            microbatches = multiple * group or group + group // 2
            order = make_order("gis", devices, chunks, microbatches, group=group)
            for rank in range(devices):
                assert list(order.ranks[rank]) == gis_by_definition(devices, chunks, microbatches, group, rank)
            cases += 1
    assert cases == 240


def test_published_orders():
    gis = make_order("gis", 4, 2, 8)
    assert written(gis.ranks[0]) == (
        "f1 f2 f3 f4 F1 F2 F3 F4 B1 W1 f5 B2 W2 f6 B3 W3 f7 B4 W4 f8 b1 w1 F5 b2 w2 F6 b3 w3 F7 b4 w4 F8 "
        "B5 W5 B6 W6 B7 W7 B8 W8 b5 w5 b6 w6 b7 w7 b8 w8"
    )
    assert written(gis.ranks[3]).startswith("f1 f2 f3 f4 F1 B1 W1 F2 B2 W2 F3 B3 W3 F4 B4 W4 f5 b1 w1 f6")
    assert written(make_order("gis_h", 4, 2, 8).ranks[0]).startswith(
        "f1 f2 F1 F2 f3 f4 B1 W1 F3 B2 W2 F4 b1 w1 f5 b2 w2 f6 B3 W3 F5 B4 W4 F6"
    )
    assert make_order("gis_h", 8, 3, 20).ranks == make_order("gis", 8, 3, 20, group=4).ranks
    # A group of more microbatches than there are.
    for devices, microbatches in product((1, 2, 5), (1, 3, 8)):
        order = make_order("gis", devices, 3, microbatches, group=10**12)
        assert order.ranks == make_order("gis", devices, 3, microbatches, group=microbatches + devices).ranks
        assert list(order.ranks[0]) == gis_by_definition(devices, 3, microbatches, 10**12, 0)


@pytest.mark.parametrize("devices", [1, 2, 3, 4, 5, 8])
def test_gis_has_the_memory_and_bubble_of_its_closed_form(devices):
    for chunks, group, groups in product((1, 2, 3, 4), range(least_group(devices), devices + 1), (2, 4)):
        order = make_order("gis", devices, chunks, group * groups, group=group)
        total = chunks * order.microbatches
        assert peaks(order) == [
            min(table_blocks("gis", devices, chunks, rank, group), total) for rank in range(devices)
        ]
        for times in UNEQUAL:
            if group * sum(times) < devices * max(times[:2]):
                continue
            idle = bubbles(order, simulate(order, uniform_times(order, *times)))
            assert set(idle) == {table_bubble("gis", devices, chunks, *times, group=group)}


def test_the_table_of_the_paper():
    # (d-1)(F+B) + (d-g)(v-1)(F+B-W), for half of the devices, and for equal times.
    for devices, chunks, (forward, first, second) in product((2, 4, 8), (1, 2, 4), UNEQUAL[:3]):
        beyond = devices // 2 * (chunks - 1) * (forward + first - second)
        assert (
            table_bubble("gis_h", devices, chunks, forward, first, second) == (devices - 1) * (forward + first) + beyond
        )
    for devices, group in ((8, 5), (8, 7), (6, 4)):
        assert table_bubble("gis", devices, 3, group=group) == 2 * (devices - 1) + 2 * (devices - group)
    assert table_blocks("gis", 8, 4, 0) == 4 * 8
    assert table_blocks("gis_h", 8, 4, 0) == (4 + 1) * 8 // 2
    assert table_blocks("1f1b_interleaved", 8, 4, 0) == (4 + 1) * 8 - 1


@pytest.mark.parametrize("devices", [2, 3, 4, 8])
def test_1f1b(devices):
    for times in UNEQUAL:
        order = make_order("1f1b", devices, 1, 3 * devices)
        assert {a.kind for actions in order.ranks for a in actions} == {"F", "B"}
        assert peaks(order) == [table_blocks("1f1b", devices, 1, rank) for rank in range(devices)]
        assert set(bubbles(order, simulate(order, uniform_times(order, *times)))) == {
            table_bubble("1f1b", devices, 1, *times)
        }
        for chunks in (2, 4):
            order = make_order("1f1b_interleaved", devices, chunks, 3 * devices)
            assert peaks(order) == [table_blocks("1f1b_interleaved", devices, chunks, rank) for rank in range(devices)]
            idle = bubbles(order, simulate(order, uniform_times(order, *times)))
            assert set(idle) == {table_bubble("1f1b_interleaved", devices, chunks, *times)}


def test_pipe_offload_grid():
    def starts(rank: int) -> str:
        slots = pipe_offload_slots(4, 2, 8, rank, 2)
        return " ".join(f"{a.kind}{a.microbatch},{a.chunk}={slot}" for slot, a in slots)

    assert starts(0).startswith("F0,0=0 F1,0=6 F0,1=9 F2,0=12 F1,1=15 F3,0=18 I0,1=19 W0,1=20 F2,1=21 F4,0=24 I1,1=25")
    assert starts(3).startswith("F0,0=6 F1,0=12 F0,1=15 I0,1=16 W0,1=17 F2,0=18 F1,1=21 I1,1=22")
    # One computation per slot, so that the grid is an order; also where chunks and devices have common divisors.
    for devices, chunks in product(range(2, 18), range(1, 10)):
        for group in {least_group(devices), least_group(devices) + 1, devices}:
            for rank in range(devices):
                slots = [slot for slot, _ in pipe_offload_slots(devices, chunks, 4, rank, group)]
                assert len(set(slots)) == len(slots)


@pytest.mark.parametrize(
    ("devices", "chunks", "blocks"),
    [(4, 2, 7), (4, 4, 11), (8, 2, 13), (8, 4, 23), (8, 8, 39), (16, 2, 25), (16, 4, 43), (8, 16, 71)],
)
def test_pipe_offload_memory_and_bubble(devices, chunks, blocks):
    order = make_order("po", devices, chunks, 32)
    assert max(peaks(order)) == blocks
    idle = max(bubbles(order, simulate(order, uniform_times(order))))
    assert idle < table_bubble("1f1b", devices, chunks)
    # The grid itself, in which ranks wait for their slot, against the order run as soon as it can.
    known = {(8, 2): (48, 23), (8, 4): (102, 41), (8, 8): (186, 87)}.get((devices, chunks))
    if known is not None:
        last = max(pipe_offload_slots(devices, chunks, 32, rank, devices // 2)[-1][0] + 1 for rank in range(devices))
        assert (last - 3 * chunks * 32, idle) == known


@pytest.mark.parametrize(
    ("schedule", "blocks", "bubble"),
    [
        ("v_min", {4: 4, 6: 6, 8: 8}, lambda devices: 4 * (devices - 1)),
        ("v_half", {4: 6, 6: 8, 8: 10}, lambda devices: 3 * (devices - 1)),
        ("zb_v", {4: 8, 6: 12, 8: 16}, lambda devices: devices - 1),
    ],
)
def test_v_schedules(schedule, blocks, bubble):
    for devices, most in blocks.items():
        order = make_order(schedule, devices, 2, 4 * devices)
        assert order.placement == "v" and not order.notes
        assert order.stage(0, 1) == 2 * devices - 1 and order.stage(devices - 1, 1) == devices
        assert max(peaks(order)) == most
        # 1F1B has a bubble of 6 * (devices - 1): V-Half a half of it, V-Min two thirds, up to a slot.
        idle = max(bubbles(order, simulate(order, uniform_times(order))))
        assert abs(idle - bubble(devices)) <= (schedule == "v_min")


@pytest.mark.parametrize("devices", [1, 2, 3, 4, 7, 8])
def test_zb_v_never_waits_once_begun(devices):
    order = make_order("zb_v", devices, 2, 2 * devices + 3)
    for done in simulate(order, uniform_times(order)):
        assert all(before[1] == after[0] for before, after in zip(done, done[1:], strict=False))
    # A single microbatch goes through all forwards and backwards of the input, and waits everywhere else.
    single = make_order("zb_v", devices, 2, 1)
    assert set(bubbles(single, simulate(single, uniform_times(single)))) == {4 * (devices - 1)}


def test_whole_backwards_take_the_place_of_the_inputs():
    for schedule in SCHEDULES:
        split = make_order(schedule, 4, 2, 6, split_backward=True)
        whole = make_order(schedule, 4, 2, 6, split_backward=False)
        for halves, fused in zip(split.ranks, whole.ranks, strict=True):
            kept = [action for action in halves if action.kind != "W"]
            assert [Action("B", *a[1:]) if a.kind == "I" else a for a in kept] == list(fused)
        published = make_order(schedule, 4, 2, 6)
        assert published == (whole if "1f1b" in schedule else split)


def test_what_cannot_be_had_becomes_the_nearest_and_is_told():
    def note(schedule: str, *counts: int, **options) -> str:
        order = make_order(schedule, *counts, **options)
        assert len(order.notes) == 1
        assert (order.devices, order.chunks, order.microbatches) == counts
        return f"{order.schedule}, {order.placement}: {order.notes[0]}"

    assert note("gis", 8, 2, 16, group=2) == (
        "gis, loop: group=2 cannot keep 8 devices busy: taken as 4, half of the devices"
    )
    assert note("po", 8, 2, 16, group=2).startswith("po, loop: group=2 cannot keep 8 devices busy")
    assert note("gis_h", 8, 2, 9) == (
        "gis_h, loop: microbatches=9 is not a multiple of the group of 4: the last group has 1, and the ranks idle "
        "for the rest of it"
    )
    assert note("1f1b", 4, 3, 8).startswith("1f1b_interleaved, loop: 1F1B has one chunk per device, not 3")
    assert note("1f1b_interleaved", 4, 1, 8).startswith("1f1b, loop: interleaved 1F1B needs several chunks")
    assert note("po", 1, 4, 8).startswith("po, loop: one device has no pipeline to fill")
    assert max(live_blocks(make_order("po", 1, 4, 8), 0)) == 4
    assert note("zb_v", 4, 3, 8).startswith("gis, loop: ZB-V has two chunks per device, not 3")
    assert note("v_half", 4, 1, 8).startswith("gis_h, loop: V-Half has two chunks per device, not 1")
    assert note("v_min", 4, 4, 8).startswith("gis_h, loop: V-Min has two chunks per device, not 4")
    assert note("zb_v", 4, 2, 8, group=3) == "zb_v, v: group=3 is left out: zb_v has no such choice"


def test_unequal_stages_need_larger_groups():
    even = Times((1.0,) * 16, (1.0,) * 16, (1.0,) * 16)
    assert smallest_group(8, even) == 4
    # One chunk's eight forwards take 16, more than four microbatches of the slowest stage, 4 * 3.5.
    slow = Times((2.0,) * 8 + (1.0,) * 8, (1.0,) * 16, (0.5,) * 16)
    assert smallest_group(8, slow) == 5
    assert smallest_group(4, Times((9.0,) * 4, (0.0,) * 4, (0.0,) * 4)) == 4
    assert smallest_group(1, Times((1.0,), (1.0,), (1.0,))) == 1
    # A whole backward takes two thirds of a stage's time.
    assert smallest_group(8, even, split_backward=False) == 6


def test_advice_on_the_group():
    order = make_order("po", 8, 4, 32)
    times = uniform_times(order)
    assert advise_group(order, times) == () == advise_group(make_order("gis", 8, 4, 32, split_backward=False), times)
    fused = make_order("po", 8, 4, 32, split_backward=False)
    with_six = make_order("po", 8, 4, 32, split_backward=False, group=6)
    seconds, less = (max(spans[-1][1] for spans in simulate(each, times)) for each in (fused, with_six))
    assert max(bubbles(with_six, simulate(with_six, times))) == table_bubble("1f1b", 8, 4)
    assert advise_group(fused, times) == (
        f"without copies, group=6 would take {1 - less / seconds:.1%} less time with these stages, for up to 4 more "
        "blocks per device",
    )
    assert advise_group(make_order("gis_h", 8, 4, 32, split_backward=False), times) != ()
    # No difference where there is nothing to fill.
    assert advise_group(make_order("po", 8, 4, 1, split_backward=False), times) == ()


def check(order: Order, times: Times) -> None:
    """What holds for every order: each action once; dependencies met; no two actions at once; nothing left over."""
    spans = simulate(order, times)
    ends = {}
    for rank, (actions, done) in enumerate(zip(order.ranks, spans, strict=True)):
        assert len(set(actions)) == len(actions)
        kinds = [sorted(a.kind for a in actions if a[1:] == block)
                 for block in product(range(order.chunks), range(order.microbatches))]  # fmt: skip
        assert all(found in (["B", "F"], ["F", "I", "W"]) for found in kinds)
        assert sum(map(len, kinds)) == len(actions)
        assert all(before[1] <= after[0] for before, after in zip(done, done[1:], strict=False))
        for action, (_, end) in zip(actions, done, strict=True):
            ends["I" if action.kind == "B" else action.kind, order.stage(rank, action.chunk), action.microbatch] = end
        live = live_blocks(order, rank)
        assert live[-1] == 1 and 1 <= min(live) and max(live) <= order.chunks * order.microbatches
    last = order.devices * order.chunks - 1
    for rank, (actions, done) in enumerate(zip(order.ranks, spans, strict=True)):
        for (kind, chunk, microbatch), (start, _) in zip(actions, done, strict=True):
            stage = order.stage(rank, chunk)
            if kind == "F" and stage:
                assert ends["F", stage - 1, microbatch] <= start
            if kind in "BI":
                assert ends["F", stage, microbatch] <= start
                assert stage == last or ends["I", stage + 1, microbatch] <= start
            if kind == "W":
                assert ends["I", stage, microbatch] <= start


def test_any_request_is_answered():
    chance = random.Random(7)
    for number in range(2_000):
        large = number % 20 == 0
        devices, chunks = chance.randint(1, 16 if large else 5), chance.randint(1, 6 if large else 3)
        order = make_order(
            chance.choice(list(SCHEDULES)), devices, chunks, chance.randint(1, 40 if large else 5),
            group=chance.choice([None, chance.randint(1, 2 * devices)]),
            split_backward=chance.choice([None, True, False]),
        )  # fmt: skip
        assert (order.devices, order.chunks) == (devices, chunks)
        times = [tuple(chance.choice([0.0, 0.5, 1.0, 2.0]) for _ in range(devices * chunks)) for _ in range(3)]
        if number % 10 == 0:
            check(order, Times(*times, transfer=chance.choice([0.0, 0.25])))
        else:
            simulate(order, Times(*times))


def test_transfers_take_time_between_ranks_only():
    order = Order("", 2, 1, 1, ((Action("F", 0, 0), Action("B", 0, 0)), (Action("F", 0, 0), Action("B", 0, 0))))
    times = Times((1.0, 2.0), (1.0, 1.0), (0.5, 0.5), transfer=0.25)
    assert simulate(order, times) == (((0.0, 1.0), (5.0, 6.5)), ((1.25, 3.25), (3.25, 4.75)))
    assert bubbles(order, simulate(order, times)) == (4.0, 3.0)
    alone = make_order("zb_v", 1, 2, 3)
    assert simulate(alone, uniform_times(alone, transfer=9.0)) == simulate(alone, uniform_times(alone))


def test_what_has_no_meaning_is_refused():
    for counts, options, error, message in [
        (("gpipe", 2, 1, 4), {}, ValueError, r"schedule: expected one of gis, gis_h, po, .*, got 'gpipe'"),
        (("gis", 0, 1, 4), {}, ValueError, "devices: expected at least 1, got 0; pass a positive count"),
        (("gis", 2, -1, 4), {}, ValueError, "chunks: expected at least 1, got -1; pass a positive count"),
        (("gis", 2, 1, 0), {}, ValueError, "microbatches: expected at least 1, got 0; pass a positive count"),
        (("gis", 2, 1, 4), {"group": 0}, ValueError, "group: expected at least 1, got 0; pass a positive count"),
        (("gis", 2.0, 1, 4), {}, TypeError, "devices: expected an int, got float; pass a positive count"),
        (("gis", True, 1, 4), {}, TypeError, "devices: expected an int, got bool; pass a positive count"),
        (("gis", 2, 1, 4), {"split_backward": 1}, TypeError, "split_backward: expected a bool or None, got int"),
    ]:
        with pytest.raises(error, match=f"^{message}"):
            make_order(*counts, **options)
    order = make_order("gis", 2, 2, 4)
    with pytest.raises(ValueError, match=r"^times: expected 4 forward times, one per stage, got 2; pass devices"):
        simulate(order, Times((1.0,) * 2, (1.0,) * 4, (1.0,) * 4))
    backwards = Order("", 2, 1, 1, tuple((Action("B", 0, 0), Action("F", 0, 0)) for _ in range(2)))
    with pytest.raises(
        ValueError, match="^order: rank 0 waits forever before its action 0, B of chunk 0, microbatch 0"
    ):
        simulate(backwards, uniform_times(backwards))
