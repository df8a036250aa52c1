"""The planner's schedules on torch.distributed.pipelining: the same gradients, and what they keep in memory."""

from functools import cache

import pytest

from pykern.offload.sends import Step, safe_waits

from ..support_distributed import run_processes
from .pipeline_cases import Case, run_cases

# Microbatches that no group divides; a group that is not the default; blocks of one chunk, of all, and none.
CASES = {
    2: [
        Case("gis", "attention", 2, 5),
        Case("gis_h", "attention", 2, 5, (0, 1), storage="file"),
        Case("gis", "attention", 3, 5, "full", split=False),
        Case("po", "attention", 2, 5, split=False),
        Case("po", "attention", 2, 5, (0, 1), split=True),
        Case("po", "attention", 3, 4, "half", storage="file", split=False),
        Case("po", "feedforward", 3, 7, "full"),
        Case("1f1b", "feedforward", 1, 5),
        Case("1f1b_interleaved", "attention", 2, 4),
        Case("1f1b_interleaved", "attention", 2, 4, (0, 1)),
        Case("zb_v", "attention", 2, 5),
        Case("zb_v", "attention", 2, 5, (0, 1), storage="file"),
        Case("zb_v", "feedforward", 2, 4, "full", split=False),
        Case("v_half", "attention", 2, 5, (0, 1)),
        Case("v_min", "attention", 2, 5, (0, 1), split=True),
        Case("v_min", "feedforward", 2, 5),
    ],
    4: [
        Case("gis", "feedforward", 2, 6, group=3),
        Case("gis", "attention", 2, 6, (0,), storage="file", group=3),
        Case("gis_h", "attention", 2, 6, (0, 1), split=False),
        Case("po", "attention", 2, 5),
        Case("po", "attention", 2, 6, "full", split=False),
        Case("po", "feedforward", 2, 6, "half", storage="file"),
        Case("1f1b", "feedforward", 1, 6, (0,), storage="file", split=True),
        Case("zb_v", "attention", 2, 7, (0, 1)),
        Case("v_half", "feedforward", 2, 6, (0, 1), storage="file"),
        Case("v_min", "attention", 2, 6, (1,)),
    ],
}


@cache
def results(count: int) -> list[dict]:
    return run_processes(count, run_cases, CASES[count])


def each_case():
    return [pytest.param(count, case, id=f"{count}-{case}") for count, cases in CASES.items() for case in cases]


@pytest.mark.parametrize(("count", "case"), each_case())
def test_gradients_are_those_of_plain_execution(count, case):
    for rank, result in enumerate(results(count)):
        assert result[str(case)]["problems"] == [], f"rank {rank}"


@pytest.mark.parametrize(("count", "case"), [entry for entry in each_case() if entry.values[1].offload is not None])
def test_blocks_in_memory_are_as_planned(count, case):
    moved = 0
    for result in results(count):
        counters = result[str(case)]["counters"]
        assert counters["peak_blocks"] == counters["planned_peak_blocks"]
        assert counters["stayed"] == 0
        moved += counters["offloads"]
        assert counters["engine"]["slots"] == 0
    if isinstance(case.offload, tuple):
        assert moved > 0


@pytest.mark.parametrize("count", CASES)
def test_what_left_is_not_in_memory(count):
    for result in results(count):
        alive = result["storages"]
        assert (alive["input"], alive["inside"], alive["output"]) == (0, 0, 0)
        assert alive["looked"] > 0


@pytest.mark.parametrize("count", CASES)
def test_evaluation_between_steps(count):
    assert all(result["evaluation"] for result in results(count))


REFUSALS = [
    "stages: expected this rank's stages, got none",
    "schedule: expected one of gis,",
    "stages: rank {rank} of 'zb_v' has the stages [{rank}, {mirrored}], got [{rank}, {looped}]",
    "stages: rank {rank} of 'gis' has the stages [{rank}, {looped}], got [{looped}, {rank}]",
    "offload: the plan is for another order of actions",
    "storage: expected 'memory', 'file' or 'pinned', got 'disk'",
]


@pytest.mark.parametrize("number", range(len(REFUSALS)))
def test_refused(number):
    count = 2
    for rank, result in enumerate(results(count)):
        expected = REFUSALS[number].format(rank=rank, mirrored=2 * count - 1 - rank, looped=count + rank)
        assert result["refusals"][number].startswith(expected)
        assert "\n" not in result["refusals"][number]


def test_a_send_is_waited_for_when_an_answer_tells_that_it_was_asked_for():
    compute, send, receive = (lambda *needs: Step("compute", needs=needs)), (lambda m: Step("send", m)), (
        lambda m: Step("receive", m))  # fmt: skip
    first = [compute(), send("a"), compute(), send("b"), receive("c"), compute(), compute("c"), compute()]
    # It asks for "b" only after it has sent "c", which tells of "a" alone.
    second = [receive("a"), compute("a"), send("c"), receive("b"), compute("b")]
    waits = safe_waits([first, second])
    # "c" is there for the computation number 3 (from 0); nothing ever tells of "b": five computations are the end.
    assert waits == [{"a": 4, "b": 5}, {"c": 2}]


def test_what_others_know_is_passed_on():
    first = [Step("compute"), Step("send", "a"), Step("receive", "c"), Step("compute", needs=("c",)), Step("compute")]
    second = [Step("receive", "a"), Step("compute", needs=("a",)), Step("send", "b")]
    third = [Step("receive", "b"), Step("compute", needs=("b",)), Step("send", "c")]
    assert safe_waits([first, second, third])[0] == {"a": 2}
