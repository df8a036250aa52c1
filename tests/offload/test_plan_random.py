"""Plans of 10,000 random requests: each is answered, can be carried out, and keeps its promises."""

import gc
import random

from pykern.offload.planning import Times, check_plan, plan
from pykern.offload.planning.orders import SCHEDULES


def random_request(chance: random.Random) -> tuple[tuple, dict]:
    """Odd counts, unequal stages, zero times and sizes, copies far too slow or free, and any budgets."""
    schedule = chance.choice(list(SCHEDULES))
    devices, microbatches = chance.randint(1, 4), chance.choice([1, 2, 3, 3, 4, 5, 7])
    chunks = 2 if schedule in ("zb_v", "v_half", "v_min") else chance.randint(1, 3)
    stages = devices * chunks

    def of_stages(draw):
        return draw() if chance.random() < 0.5 else [draw() for _ in range(stages)]

    def of_ranks(most):
        return chance.choice([0, chance.randint(0, most), [chance.randint(0, most) for _ in range(devices)]])

    times = [of_stages(lambda: chance.choice([1.0, chance.random(), chance.randint(0, 3)])) for _ in range(3)]
    if chance.random() < 0.3:
        times = Times(*(tuple(t) if isinstance(t, list) else (t,) * stages for t in times), chance.choice([0.1, 2.0]))
    request = {
        "times": times,
        "bytes": of_stages(lambda: chance.choice([0, 1, 1000, 1000, chance.randint(1, 1000)])),
        "bandwidth": chance.choice([10.0, 300.0, 1000.0, 1e4, 1e12, (500.0, 800.0)]),
        "offload": chance.choice(["none", "half", "full", "full", chance.randint(0, chunks)]),
        "directions": chance.choice(["one", "two"]),
        "pairs": chance.choice([True, False, [(0, devices - 1)] if devices > 1 else []]),
        "group": chance.choice([None, None, chance.randint(1, 8)]),
        "split_backward": chance.choice([None, True, False]),
        "stall": chance.choice(["avoid", "avoid", "allow"]),
        "slack": chance.choice([0.0, 0.02, 0.1]),
        "shortest": chance.choice([0.0, 1.0, 3.0]),
    }
    if chance.random() < 0.25:
        request["budget"] = of_ranks(8000)
    if chance.random() < 0.25:
        request["host_budget"] = of_ranks(5000)
        request["file_bandwidth"] = chance.choice([None, 10.0, 1000.0, 1e6])
    return (schedule, devices, chunks, microbatches), request


def per_rank(value, devices: int) -> list[int]:
    return value if isinstance(value, list) else [value] * devices


def test_10000_random_requests():
    chance = random.Random(7)
    leaving = in_file = over_budget = stalled = equal_sizes = 0
    for _ in range(10_000):
        counts, request = random_request(chance)
        made = plan(*counts, **request)
        check_plan(made)
        devices = counts[1]
        leaving += any(made.copies)
        in_file += any(made.file_bytes)
        if request["stall"] == "avoid" or "budget" in request:
            assert made.seconds <= made.seconds_alone * (1 + request["slack"]) * (1 + 1e-6)
        else:
            stalled += made.seconds > made.seconds_alone * 1.02
        if "budget" in request:
            for rank, budget in enumerate(per_rank(request["budget"], devices)):
                told = any(f"rank {rank} cannot keep its blocks within {budget} bytes" in note for note in made.notes)
                assert told == (made.peak_bytes[rank] > budget)
                over_budget += told
        if "host_budget" in request:
            budgets = per_rank(request["host_budget"], devices)
            assert all(used <= most for used, most in zip(made.host_bytes, budgets, strict=True))
        if not isinstance(request["bytes"], list):
            equal_sizes += any(made.copies)
            assert max(map(abs, made.host_waste)) < 1e-9
    assert min(leaving, in_file, over_budget, stalled, equal_sizes) > 100


def test_numbers_however_large_or_small():
    chance = random.Random(11)
    numbers = [0.0, 1e-30, 1e-12, 1.0, 1e12, 1e30]
    for _ in range(500):
        devices, chunks = chance.randint(1, 4), chance.randint(1, 3)
        times = [[chance.choice(numbers) for _ in range(devices * chunks)] for _ in range(3)]
        request = {
            "bytes": chance.choice([1, 10**15, (1 << 63) - 1]), "bandwidth": chance.choice(numbers[1:]),
            "offload": "full", "directions": chance.choice(["one", "two"]), "stall": chance.choice(["avoid", "allow"]),
            "group": chance.choice([None, 10**15]), "budget": chance.choice([None, 1000]),
            "host_budget": chance.choice([None, 1000]), "file_bandwidth": chance.choice(numbers[1:]),
        }  # fmt: skip
        schedule = chance.choice(["gis", "po", "1f1b_interleaved", "zb_v", "v_half"])
        check_plan(plan(schedule, devices, chunks, chance.choice([1, 2, 5]), times=times, **request))
    assert gc.isenabled()
