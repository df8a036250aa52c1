"""What `check_plan` finds wrong with a plan, and slots of an arena."""

import random
from dataclasses import replace

import pytest

from pykern.offload.planning import Copy, Plan, Transfer, check_plan, plan
from pykern.offload.planning.arena import Stay, colour


@pytest.fixture(scope="module")
def good() -> Plan:
    made = plan("gis", 4, 2, 12, times=(1.0, 1.0, 1.0), bytes=[120] * 4 + [100] * 4, bandwidth=200.0, offload="full")
    check_plan(made)
    assert {copy.chunk for copy in made.copies[0]} == {0, 1} and max(made.slot_bytes[0]) == 120
    return made


def with_transfers(made: Plan, change) -> Plan:
    """`change`: from a list of rank 0's transfers to a list."""
    return replace(made, transfers=(tuple(change(list(made.transfers[0]))), *made.transfers[1:]))


def with_copies(made: Plan, change) -> Plan:
    return replace(made, copies=(tuple(change(list(made.copies[0]))), *made.copies[1:]))


def first(steps: list, kind: str) -> int:
    return next(number for number, step in enumerate(steps) if step.kind == kind)


def moved(kind: str, before: int):
    def change(steps: list[Transfer]) -> list[Transfer]:
        step = steps.pop(first(steps, kind))
        return sorted([*steps, step._replace(before=before)], key=lambda step: step.before)

    return change


def reloaded_before_its_release(steps: list[Transfer]) -> list[Transfer]:
    release = steps[first(steps, "release")]
    reload = next(step for step in steps if step[:3] == ("reload", *release[1:3]))
    steps.remove(reload)
    steps.insert(steps.index(release), reload._replace(before=release.before))
    return steps


def dropped_at_once(steps: list[Transfer]) -> list[Transfer]:
    """Before the copy out can have ended."""
    release = steps.pop(first(steps, "release"))
    offload = next(number for number, step in enumerate(steps) if step[:3] == ("offload", *release[1:3]))
    steps.insert(offload + 1, release._replace(before=steps[offload].before))
    return steps


TRANSFERS = [
    (lambda steps: steps[1:], "expected offload, release, reload, got release, reload"),
    (lambda steps: [*steps, steps[-1]], "expected offload, release, reload, got offload, release, reload, reload"),
    (lambda steps: steps[::-1], "transfers not sorted"),
    (lambda steps: [step for step in steps if step[1:3] != steps[0][1:3]], "copies and transfers of other blocks"),
    (moved("offload", 0), "is copied out before its forward has ended"),
    (reloaded_before_its_release, "expected offload, release, reload, got offload, reload, release"),
    (dropped_at_once, "is dropped too early"),
]


@pytest.mark.parametrize(("change", "message"), TRANSFERS)
def test_transfers_that_cannot_be(good, change, message):
    with pytest.raises(ValueError, match=f"^plan: rank 0: .*{message}"):
        check_plan(with_transfers(good, change))


def taken_back_late(made: Plan) -> Plan:
    def change(steps: list[Transfer]) -> list[Transfer]:
        number = first(steps, "reload")
        backward = next(n for n, action in enumerate(made.order.ranks[0])
                        if action.kind == "I" and action[1:] == steps[number][1:3])  # fmt: skip
        return moved("reload", backward + 1)(steps)

    return with_transfers(made, change)


def changed(number: int, **values):
    def change(copies: list[Copy]) -> list[Copy]:
        copies[number] = copies[number]._replace(
            **{name: value(copies) if callable(value) else value for name, value in values.items()}
        )
        return copies

    return change


COPIES = [
    (changed(0, out_start=0.0), "leaves during its forward"),
    (changed(0, out_end=lambda copies: copies[0].back_start + 1), "comes back before it is out"),
    (changed(0, back_end=1e3), "comes back during its backward"),
    (changed(0, slot=99), "slot 99 of the host does not exist"),
    (changed(0, slot=-1), "slot -1 of the host does not exist"),
    (changed(1, slot=lambda copies: copies[0].slot), "slot .* of the host is used twice at once"),
    (changed(-1, back_start=lambda copies: copies[-2].back_start), "two copies at once"),
    (changed(0, tier="file"), "expected offload, release, spill, fetch, reload, got offload, release, reload"),
    (lambda copies: copies[1:], "copies and transfers of other blocks"),
]


@pytest.mark.parametrize(("change", "message"), COPIES)
def test_copies_that_cannot_be(good, change, message):
    with pytest.raises(ValueError, match=f"^plan: rank 0: .*{message}"):
        check_plan(with_copies(good, change))


def test_predictions_that_are_wrong(good):
    cases = [
        (taken_back_late(good), "is taken back after its backward has begun"),
        (replace(good, slot_bytes=((99,) * 20, *good.slot_bytes[1:])), "slot 0 of the host is too small"),
        (replace(good, peak_blocks=(1, *good.peak_blocks[1:])), "a peak of . blocks, not as predicted"),
        (replace(good, peak_bytes=(1, *good.peak_bytes[1:])), "a peak of ... bytes, not as predicted"),
        (replace(good, stall_seconds=(7.0, *good.stall_seconds[1:])), "actions wait for copies for .* s, not 7 s"),
    ]
    for wrong, message in cases:
        with pytest.raises(ValueError, match=f"^plan: rank 0: .*{message}"):
            check_plan(wrong)


def test_a_slot_is_asked_for_after_it_is_due_to_be_freed():
    # In time, the second comes after the first; but it is asked for before the way back of the first is.
    stays = [Stay(0.0, 2.0, asked=0, freed=5, size=10), Stay(3.0, 4.0, asked=4, freed=6, size=10)]
    assert colour(stays) == ([0, 1], [10, 10])
    stays[1] = stays[1]._replace(asked=6, freed=7)
    assert colour(stays) == ([0, 0], [10])
    assert colour([]) == ([], [])


def test_slots_of_random_stays():
    chance = random.Random(5)
    for sizes in ([7], [100, 7], [40, 50, 60]):
        for _ in range(200):
            stays = []
            for number in range(chance.randint(1, 30)):
                start = chance.randint(0, 40)
                end = start + chance.randint(1, 15)
                stays.append(Stay(start, end, 100 * start + number, 100 * end - 100 + number, chance.choice(sizes)))
            slots, rooms = colour(stays)
            for number, stay in enumerate(stays):
                assert stay.size <= rooms[slots[number]]
                for other in range(number):
                    if slots[other] == slots[number]:
                        assert stays[other].end <= stay.start or stay.end <= stays[other].start
            together = max(sum(s.size for s in stays if s.start <= now < s.end) for now in range(60))
            apart = sum(
                max(sum(s.size for s in stays if s.start <= now < s.end and s.size == size) for now in range(60))
                for size in sizes
            )
            as_one = max(sizes) * max(sum(s.start <= now < s.end for s in stays) for now in range(60))
            assert together <= sum(rooms) <= min(apart, as_one)
            if len(sizes) == 1:
                assert sum(rooms) == together
