"""What plans make of requests: chunks and budgets, waits that are allowed, measured numbers, and refused arguments."""

import pytest

import pykern
from pykern.offload import planning
from pykern.offload.planning import Times, check_plan, plan, replan
from pykern.offload.planning.simulation import CopyTimes, run_copies
from pykern.offload.planning.types import Action, Order, Plan, Transfer


def plan_of(schedule: str = "po", devices: int = 4, chunks: int = 4, microbatches: int = 16, **keywords) -> Plan:
    """By default a block's copies out and back take 0.8 of its computation."""
    request = {"times": (1.0, 1.0, 1.0), "bytes": 1000, "bandwidth": 1000 / 1.2, **keywords}
    made = plan(schedule, devices, chunks, microbatches, **request)
    check_plan(made)
    return made


def moved_chunks(made: Plan, rank: int) -> set[int]:
    return {copy.chunk for copy in made.copies[rank]}


def test_public_names():
    assert pykern.plan is plan and pykern.replan is replan and pykern.Plan is Plan


def test_which_chunks_leave():
    for chunks, half in ((1, 1), (2, 1), (3, 2), (4, 2)):
        made = plan_of(chunks=chunks, offload="half", shortest=0.0, bandwidth=1e9)
        assert moved_chunks(made, 0) == set(range(half))
        # The last rank's blocks of the last chunk are needed at once.
        assert all(moved_chunks(made, rank) <= set(range(half)) for rank in range(4))
        assert made.copies == plan_of("po_h", chunks=chunks, shortest=0.0, bandwidth=1e9).copies
    assert plan_of("po_f").copies == plan_of(offload=4).copies == plan_of(offload="full").copies
    assert not any(plan_of(offload="none").copies)
    made = plan_of(offload=[0, 1, 2, 0], bandwidth=1e9)
    assert [moved_chunks(made, rank) for rank in range(4)] == [set(), {0}, {0, 1}, set()]
    # What has no bytes need not go anywhere.
    made = plan_of(offload="full", bytes=[1000 * (stage >= 4) for stage in range(16)], bandwidth=1e9)
    assert all(0 not in moved_chunks(made, rank) for rank in range(4)) and any(made.copies)


def test_transfers_of_one_block():
    made = plan_of("gis", 1, 2, 2, offload=1, shortest=0.0, bandwidth=1e3)
    assert " ".join(f"{action.kind}{action.chunk}{action.microbatch}" for action in made.order.ranks[0]) == (
        "F00 F10 I10 W10 F01 I00 W00 F11 I11 W11 I01 W01"
    )
    # Copies take as long as an action. From the end of the first forward on, slots out and back alternate; the last way
    # back leaves one action's time before the backward. The other block would be back at once, and stays.
    assert made.transfers == (
        (Transfer("offload", 0, 1, 5), Transfer("release", 0, 1, 6), Transfer("reload", 0, 1, 8)),
    )  # fmt: skip
    assert [copy[:6] for copy in made.copies[0]] == [(0, 1, 5.0, 6.0, 8.0, 9.0)]
    assert made.spans[0][10] == (10.0, 11.0) and made.stall_seconds == (0.0,)
    assert made.slot_bytes == ((1000,),) and made.peak_blocks == (2,)


def test_copies_that_computation_waits_for():
    order = Order("by hand", 1, 1, 2, ((Action("F", 0, 0), Action("F", 0, 1), Action("B", 0, 1), Action("B", 0, 0)),))
    times = Times((1.0,), (1.0,), (1.0,))
    transfers = [Transfer("offload", 0, 0, 1), Transfer("release", 0, 0, 2), Transfer("reload", 0, 0, 3)]
    run = run_copies(order, times, [transfers], [{(0, 0): CopyTimes(1.5, 1.0)}], False)
    # The second backward waits for half a second until the block is dropped, and the last one for its way back.
    assert run.spans == (((0.0, 1.0), (1.0, 2.0), (2.5, 4.5), (5.5, 7.5)),)
    assert run.copies[0][0, 0].out == (1.0, 2.5) and run.copies[0][0, 0].back == (4.5, 5.5)
    assert run.stalls == (1.5,)


def test_copies_that_wait_for_each_other():
    actions = tuple(
        Action(*action) for action in (("F", 0, 0), ("F", 0, 1), ("B", 0, 0), ("F", 0, 2), ("B", 0, 1), ("B", 0, 2))
    )
    order, times = Order("by hand", 1, 1, 3, (actions,)), Times((1.0,), (1.0,), (1.0,))
    transfers = [
        Transfer("offload", 0, 0, 1), Transfer("release", 0, 0, 2), Transfer("reload", 0, 0, 2),
        Transfer("offload", 0, 1, 2), Transfer("release", 0, 1, 3), Transfer("reload", 0, 1, 4),
    ]  # fmt: skip
    copy_times = [{(0, 0): CopyTimes(0.5, 1.0), (0, 1): CopyTimes(0.5, 1.0)}]
    # The second block's way out was asked for after the first one's way back.
    for both_directions, out in ((False, (3.0, 3.5)), (True, (2.0, 2.5))):
        run = run_copies(order, times, [transfers], copy_times, both_directions)
        assert run.copies[0][0, 0].back == (2.0, 3.0) and run.copies[0][0, 1].out == out
        assert run.spans[0] == ((0.0, 1.0), (1.0, 2.0), (3.0, 5.0), (5.0, 6.0), (7.0, 9.0), (9.0, 11.0))
        assert run.stalls == (2.0,)
    # To a file and back, of which only one thing happens at a time.
    transfers[2:2] = [Transfer("spill", 0, 0, 2), Transfer("fetch", 0, 0, 2)]
    copy_times[0][0, 0] = CopyTimes(0.5, 1.0, 2.0, 0.25)
    run = run_copies(order, times, [transfers], copy_times, False)
    assert run.copies[0][0, 0] == ((1.0, 1.5), (2.0, 4.0), (4.0, 4.25), (4.25, 5.25))


def test_copies_too_slow():
    slow = {"bandwidth": 1000 / 3.0, "offload": "full", "chunks": 2, "shortest": 1.0}
    kept = plan_of("gis", **slow)
    assert kept.seconds <= 1.02 * kept.seconds_alone
    assert any("left on the device, because" in note for note in kept.notes)
    insisted = plan_of("gis", **slow, stall="allow")
    # Twelve seconds of copies for six of computation.
    assert 1.9 < insisted.seconds / insisted.seconds_alone < 2.1 and max(insisted.stall_seconds) > 80
    assert max(insisted.peak_blocks) == 3 < max(kept.peak_blocks)
    length = 100 * (insisted.seconds / insisted.seconds_alone - 1)
    assert any(note == f"copies lengthen the step by {length:.2g} %" for note in insisted.notes)
    # However slow.
    hopeless = plan_of("gis", **{**slow, "bandwidth": 1e-3}, stall="allow")
    assert hopeless.seconds > 1e5 * hopeless.seconds_alone and hopeless.peak_blocks == insisted.peak_blocks
    # No slack: not even while the pipeline fills.
    strict = plan_of("po_f", slack=0.0)
    assert strict.seconds <= strict.seconds_alone * (1 + 1e-9)
    assert max(strict.peak_blocks) >= max(plan_of("po_f").peak_blocks)


def test_memory_below_the_peak_shortens_waits(monkeypatch):
    request = {"times": ((1.0, 1.1, 0.9, 1.0) * 4, (1.0,) * 16, (1.0,) * 16), "offload": "full"}
    relaxed = plan_of("po", **request)
    monkeypatch.setattr(planning.planner, "_RELAXING_ROUNDS", 0)
    hasty = plan_of("po", **request)
    assert relaxed.peak_blocks == hasty.peak_blocks and len(relaxed.copies[0]) == len(hasty.copies[0])
    assert relaxed.seconds <= hasty.seconds and sum(relaxed.stall_seconds) < 0.5 * sum(hasty.stall_seconds)


def test_blocks_missed_too_briefly_stay():
    made = plan_of("gis", 4, 1, 8, offload="full")
    assert any("3 times their copies out and back: chunk 0 of rank" in note for note in made.notes)
    assert not made.copies[3] and made.copies[0]
    assert sum(map(len, plan_of("gis", 4, 1, 8, offload="full", shortest=0.0).copies)) > sum(map(len, made.copies))


def test_budget():
    whole = plan_of().peak_bytes
    least = plan_of("po_f").peak_bytes
    counts = []
    for budget in (max(whole), 9000, 7000, 5500, max(least)):
        made = plan_of(budget=budget)
        assert max(made.peak_bytes) <= budget and not any("budget" in note or "cannot" in note for note in made.notes)
        counts.append(sum(map(len, made.copies)))
    assert counts[0] == 0 and counts == sorted(set(counts))
    # The longest lifespans first: with little to save, only the first chunk's.
    made = plan_of(budget=max(whole) - 2000)
    assert moved_chunks(made, 0) == {0} and len(made.copies[0]) < 16
    per_rank = plan_of(budget=[5000, 10**6, 6000, 0])
    assert per_rank.peak_bytes[0] <= 5000 and per_rank.peak_bytes[2] <= 6000
    assert not per_rank.copies[1] and per_rank.peak_bytes[1] == whole[1]
    best = per_rank.peak_bytes[3]
    assert f"rank 3 cannot keep its blocks within 0 bytes of its device: {best} at best" in per_rank.notes
    assert best <= least[3]
    # Of two chunks that may leave, no more than needed.
    assert moved_chunks(plan_of(offload="half", budget=5500), 0) <= {0, 1}


def test_host_budget():
    free = plan_of("gis_h", offload="half")
    assert max(free.host_bytes) > 4000 and not any(free.file_bytes)
    tight = plan_of("gis_h", offload="half", host_budget=4000)
    assert 0 < max(tight.host_bytes) <= 4000 and not any(tight.file_bytes)
    assert (
        "63 blocks are left on the device, because the host has no room for them: chunk 1 of ranks 0-3" in tight.notes
    )
    filed = plan_of("gis_h", offload="half", host_budget=4000, file_bandwidth=1000.0)
    assert 0 < max(filed.host_bytes) <= 4000 and max(filed.file_bytes) > 0
    assert max(filed.peak_blocks) == max(free.peak_blocks) < max(tight.peak_blocks)
    assert all(0 < staging <= 4000 for staging in filed.staging_bytes)
    kinds = [step.kind for step in filed.transfers[0]]
    files = sum(copy.tier == "file" for copy in filed.copies[0])
    assert kinds.count("spill") == kinds.count("fetch") == files > 0
    # All of it, if the host may hold nothing.
    filed = plan_of("gis_h", offload="half", host_budget=[0] * 4, file_bandwidth=1e6)
    assert filed.host_bytes == (0,) * 4 and max(filed.peak_blocks) == max(free.peak_blocks)
    # A file that is too slow has no place for what it cannot give back in time.
    slow = plan_of("gis_h", offload="half", host_budget=2000, file_bandwidth=50.0)
    assert any("a file could not be read in time" in note for note in slow.notes)


def test_unequal_sizes_waste_little_of_the_arena():
    made = plan_of("gis", 4, 4, 32, offload="full", bytes=[700 + 150 * (stage % 4) for stage in range(16)])
    assert any(made.copies) and max(made.host_waste) < 0.02
    made = plan_of("gis", 4, 4, 32, offload="full", bytes=[1000 - 60 * (stage // 4) for stage in range(16)])
    assert any(made.copies) and max(made.host_waste) < 0.06


def test_ranks_at_a_switch_take_turns():
    paired, alone = (plan_of("po_h", pairs=pairs) for pairs in (True, False))
    assert plan_of("po_h", pairs=[(0, 1), (2, 3)]).copies == paired.copies
    assert plan_of("po_h", pairs=[(0, 3), (1, 2)]).copies not in (paired.copies, alone.copies)
    assert paired.copies[1] != alone.copies[1]
    # Nobody copies back yet: the first copies are faster.
    first = paired.copies[0][0]
    assert first.out_end - first.out_start == pytest.approx(0.7 * 1.2)
    last = paired.copies[0][-1]
    assert last.out_end - last.out_start == pytest.approx(1.2)


def test_replan():
    first = plan_of("po_h", host_budget=10**6)
    assert replan(first) == first
    times = Times(tuple(1.0 + stage / 64 for stage in range(16)), (1.1,) * 16, (0.9,) * 16)
    measured = replan(first, times=times, bytes=[1000 + stage for stage in range(16)], bandwidth=(900.0, 850.0))
    check_plan(measured)
    assert (measured.order, measured.times) == (first.order, times)
    assert measured.block_bytes == tuple(1000 + stage for stage in range(16))
    assert measured.request["host_budget"] == 10**6 and measured.request["bandwidth"] == (900.0, 850.0)
    assert replan(measured, times=(1.0, 1.0, 1.0), bytes=1000, bandwidth=1000 / 1.2).copies == first.copies
    with pytest.raises(TypeError, match=r"plan_: expected what plan\(\) returned, got int; call plan\(\) first"):
        replan(3)


def test_the_smallest_requests():
    for schedule in ("gis", "po", "po_f", "1f1b", "zb_v"):
        for devices, chunks, microbatches in ((1, 1, 1), (1, 2, 1), (2, 1, 1), (2, 2, 3), (3, 2, 1)):
            made = plan_of(schedule, devices, chunks, microbatches, offload="full")
            assert made.seconds <= 1.02 * made.seconds_alone
    made = plan_of("po_f", 2, 2, 4, times=(0.0, 0.0, 0.0))
    assert made.seconds == 0.0 and not any(made.copies)
    assert not any(plan_of("po_f", 2, 2, 4, bytes=0).copies)


REFUSED = [
    ({"times": 1.0}, TypeError, "times: expected Times, or the three of forward, .*, got 1.0"),
    ({"times": (1.0, 1.0)}, TypeError, "times: expected Times, or the three of forward"),
    ({"times": (1.0, [1.0] * 3, 1.0)}, ValueError, r"times: backward_input: expected one value, or one for each of "
     r"devices \* chunks = 4 \* 4 = 16 stages, got 3"),
    ({"times": (1.0, -1.0, 1.0)}, ValueError, "times: backward_input: expected a finite number of at least 0, got -1"),
    ({"times": (float("nan"), 1.0, 1.0)}, ValueError, "times: forward: expected a finite number of at least 0, got n"),
    ({"times": (1.0, 1.0, "1")}, TypeError, "times: backward_weight: expected a number, got str; pass seconds"),
    ({"bytes": 1.5}, TypeError, "bytes: expected an int, got float; pass bytes per block"),
    ({"bytes": -1}, ValueError, "bytes: expected at least 0, got -1"),
    ({"bytes": 1 << 63}, ValueError, r"bytes: expected less than 2\*\*63, got 9223372036854775808"),
    ({"times": (1e31, 1.0, 1.0)}, ValueError, "times: forward: expected a number between 1e-30 and 1e30, got 1e"),
    ({"bandwidth": 1e-31}, ValueError, "bandwidth: expected a number between 1e-30 and 1e30, got 1e-31; pass bytes"),
    ({"bytes": [1] * 15}, ValueError, "bytes: expected one value, or one for each of .* 16 stages, got 15"),
    ({"bandwidth": 0}, ValueError, "bandwidth: expected a finite number above 0, got 0; pass bytes per second"),
    ({"bandwidth": (1.0, 2.0, 3.0)}, ValueError, "bandwidth: expected a number, or a pair of out and back, got 3"),
    ({"offload": "all"}, ValueError, "offload: expected one of 'none', 'half', 'full', got 'all'"),
    ({"offload": 5}, ValueError, "offload: expected at most the 4 chunks of a rank, got 5"),
    ({"offload": True}, TypeError, "offload: expected an int, got bool; pass 'none', 'half', 'full', or how many"),
    ({"offload": [1, 1]}, ValueError, "offload: expected one value, or one for each of 4 ranks, got 2"),
    ({"budget": -5}, ValueError, "budget: expected at least 0, got -5; pass bytes per rank"),
    ({"budget": [1, 2]}, ValueError, "budget: expected one value, or one for each of 4 ranks, got 2"),
    ({"host_budget": 1e9}, TypeError, "host_budget: expected an int, got float; pass bytes per rank"),
    ({"file_bandwidth": 0.0}, ValueError, "file_bandwidth: expected a finite number above 0, got 0.0"),
    ({"directions": "both"}, ValueError, "directions: expected one of 'one', 'two', got 'both'"),
    ({"pairs": [(0, 1), (1, 2)]}, ValueError, "pairs: expected each of the ranks 0 to 3 once at most"),
    ({"pairs": [(0, 4)]}, ValueError, "pairs: expected each of the ranks 0 to 3 once at most"),
    ({"pairs": [3]}, ValueError, "pairs: expected a bool, or pairs of ranks, got 3 among them"),
    ({"stall": "never"}, ValueError, "stall: expected one of 'avoid', 'allow', got 'never'"),
    ({"slack": -0.1}, ValueError, "slack: expected a finite number of at least 0, got -0.1"),
    ({"shortest": None}, TypeError, "shortest: expected a number, got NoneType; pass a number of round trips"),
    ({"lone_speedup": 0.5}, ValueError, "lone_speedup: expected a finite number of at least 1, got 0.5"),
    ({"group": 0}, ValueError, "group: expected at least 1, got 0"),
    ({"schedule": "gpipe"}, ValueError, "schedule: expected one of gis, .*, got 'gpipe'"),
    ({"devices": 0}, ValueError, "devices: expected at least 1, got 0"),
]  # fmt: skip


@pytest.mark.parametrize(("keywords", "error", "message"), REFUSED)
def test_refused_arguments(keywords, error, message):
    with pytest.raises(error, match=f"^{message}") as caught:
        plan_of(**keywords)
    assert "\n" not in str(caught.value)
