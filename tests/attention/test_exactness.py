"""Random trees with all options against float64, and many repeats bit for bit."""

import pytest
import torch

from tests.attention.exactness import check_all, draw, ours
from tests.support import KERNELS, on, threads

# A tree takes the emulator seconds; `python -m tests.attention.exactness --device emulated` checks as many there.
TREES = {"cpu": 2000, "cuda": 2000, "emulated": 24, "emulated 8.0": 24}
TOKENS = {"cpu": 70, "cuda": 600, "emulated": 100, "emulated 8.0": 100}
REPEATS = {"cpu": 200, "cuda": 200, "emulated": 3, "emulated 8.0": 3}


@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("device", KERNELS)
def test_random_trees(device, part):
    trees = TREES[device] // 4
    check_all(device, part * trees, trees, TOKENS[device])


@pytest.mark.parametrize("device", KERNELS)
def test_repeats_bit_for_bit(device):
    """With sinks and a window; on the CPU with one to three threads."""
    call = next(
        call
        for call in (draw(seed, device != "cpu", TOKENS[device]) for seed in range(1000))
        if len(call.inputs) == 4 and "window" in call.options and call.tree.num_tokens > 100
    )
    with on(device) as place:
        once = ours(call, place)
        for repeat in range(REPEATS[device]):
            with threads(1 + repeat % 3):
                again = ours(call, place)
            assert all(torch.equal(again[name], once[name]) for name in once), f"repeat {repeat}"
