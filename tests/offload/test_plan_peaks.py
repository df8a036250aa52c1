"""Peaks of plans, beside those of the published planner and the figures of PipeOffload's paper."""

import time

import pytest

from pykern.offload.planning import Plan, Times, check_plan, plan

# Blocks that the fullest rank holds, by the number of chunks that leave, where copies out and back take 0.8 of a
# computation: forward, and both backwards.
PEAKS = {
    (4, 2): (7, 4, 4),
    (4, 4): (11, 8, 5, 4, 4),
    (8, 2): (13, 6, 4),
    (8, 4): (23, 15, 9, 5, 4),
    (8, 8): (39, 31, 24, 18, 13, 9, 6, 5, 4),
    (16, 2): (25, 10, 5),
    (16, 4): (43, 27, 15, 7, 5),
    # The paper's figure 3: half of the chunks leave less than a third.
    (8, 16): (71, 63, 56, 49, 42, 36, 31, 26, 21, 17, 14, 11, 8, 7, 6, 5, 4),
}


def plan_of(
    schedule: str, devices: int, chunks: int, microbatches: int, k: float, unit: float = 1.0, **keywords
) -> Plan:
    """k: a block's copies out and back over a computation of three `unit` seconds."""
    bandwidth = 1000 / (k / 2 * 3 * unit)
    made = plan(
        schedule, devices, chunks, microbatches, times=(unit, unit, unit), bytes=1000, bandwidth=bandwidth, **keywords
    )
    check_plan(made)
    assert made.peak_bytes == tuple(1000 * blocks for blocks in made.peak_blocks)
    # That many copies fit beside the computation: what they add falls into the filling and draining of the pipeline.
    assert made.seconds <= 1.02 * made.seconds_alone
    return made


def peaks(schedule: str, devices: int, chunks: int, microbatches: int, k: float, counts, **keywords) -> tuple[int, ...]:
    return tuple(
        max(plan_of(schedule, devices, chunks, microbatches, k, offload=count, **keywords).peak_blocks)
        for count in counts
    )


@pytest.mark.parametrize(("devices", "chunks"), PEAKS)
def test_golden_peaks(devices, chunks):
    assert peaks("po", devices, chunks, 2 * devices, 0.8, range(chunks + 1)) == PEAKS[devices, chunks]


def test_peaks_do_not_depend_on_the_unit_or_on_more_microbatches():
    for unit in (1e-3, 0.0137, 3.0):
        assert peaks("po", 8, 4, 16, 0.8, range(5), unit=unit) == PEAKS[8, 4]
    assert peaks("po", 8, 2, 33, 0.8, range(3)) == PEAKS[8, 2]


def test_slower_copies_keep_more_blocks_under_way():
    assert [peaks("po", 8, 4, 32, k, [2]) for k in (0.8, 1.2, 1.6)] == [(9,), (10,), (11,)]


def test_interleaved_schedules_save_in_proportion():
    assert peaks("gis", 8, 4, 32, 0.8, range(4)) == (32, 24, 16, 12)
    assert peaks("gis_h", 8, 4, 32, 0.8, range(4)) == (20, 16, 12, 8)


def test_everything_away_leaves_a_few_blocks_however_large_the_pipeline():
    for devices, chunks in ((4, 2), (8, 5), (16, 3), (32, 2)):
        assert max(plan_of("po_f", devices, chunks, 2 * devices, 0.7).peak_blocks) <= 4


def test_two_directions_at_once_need_no_more_memory():
    both = peaks("po", 8, 4, 16, 0.8, range(5), directions="two")
    assert all(at_once <= in_turn for at_once, in_turn in zip(both, PEAKS[8, 4], strict=True))
    # Twice as many blocks fit: all of interleaved 1F1B's, whose copies out alone take most of the time.
    assert peaks("1f1b_interleaved", 8, 2, 32, 1.2, [2], directions="two") < peaks(
        "1f1b_interleaved", 8, 2, 32, 1.2, [2]
    )


def test_where_not_all_fit_the_longest_lived_leave():
    # k = 1.2: 1.67 of two chunks fit. More than one chunk leaves, and it helps.
    full, half = (plan_of("po", 16, 2, 64, 1.2, offload=chunks) for chunks in ("full", "half"))
    assert max(full.peak_blocks) < max(half.peak_blocks)
    assert any("left on the device, because their copies do not fit beside the computation: chunk 1" in note
               for note in full.notes)  # fmt: skip
    for copies in full.copies:
        assert sum(copy.chunk == 0 for copy in copies) == 64


def test_asking_for_more_than_fits_does_no_harm():
    # Copies at their limit (k = 1), and beyond it: here the published planner stops with an error.
    for schedule, counts in (("po", (5, 6)), ("gis", (15, 15)), ("gis_h", (8, 7))):
        assert peaks(schedule, 8, 4, 32, 1.0, [3, 4]) == counts
    for k, least in ((1.2, 7), (1.6, 11), (3.0, 16)):
        assert peaks("po", 8, 4, 16, k, ["full"])[0] <= least


def test_every_schedule_saves():
    for schedule, chunks in (("1f1b", 1), ("1f1b_interleaved", 2), ("gis", 2), ("gis_h", 2), ("po", 2), ("v_half", 2)):
        for split_backward in (False, True):
            none, full = (
                plan_of(schedule, 4, chunks, 16, 0.4, offload=count, split_backward=split_backward)
                for count in ("none", "full")
            )
            assert not any(none.copies) and not any(none.transfers) and none.seconds == none.seconds_alone
            assert max(full.peak_blocks) < max(none.peak_blocks)


def test_blocks_of_a_large_pipeline_in_seconds():
    begin = time.process_time()
    made = plan_of("po_h", 32, 2, 256, 0.8)
    assert time.process_time() - begin < 5
    assert made.peak_blocks[0] == 18 and len(made.copies[0]) == 256


def test_unequal_stages_stay_within_what_copies_may_cost():
    forward = tuple(1.0 + 0.4 * ((7 * stage) % 5) for stage in range(16))
    times = Times(forward, tuple(1.1 * f for f in forward), tuple(0.8 * f for f in forward), 0.05)
    sizes = tuple(1000 + 300 * (stage % 3) for stage in range(16))
    for schedule in ("po", "gis_h", "1f1b_interleaved"):
        for slack in (0.0, 0.02):
            arguments = dict(times=times, bytes=sizes, bandwidth=900.0, slack=slack)
            none, half = (plan(schedule, 4, 4, 16, offload=count, **arguments) for count in ("none", "half"))
            check_plan(half)
            assert half.seconds <= (1 + slack) * none.seconds * (1 + 1e-9)
            assert max(half.peak_bytes) < 0.8 * max(none.peak_bytes)
