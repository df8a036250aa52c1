"""What is special to the weights' update on CUDA: tables of many weights, tiles, and directions of any magnitude."""

import pytest
import torch

from tests.lowrank.test_apply import SIDES, Weights, hold
from tests.support import DEVICES, emulator

pytestmark = pytest.mark.parametrize("device", [name for name in DEVICES if name != "cpu"], indirect=True)


@SIDES
def test_more_than_one_tile_and_step_of_the_rank(device, right):
    hold(Weights(torch.bfloat16, device, right=right, parts="up and gradient", shapes=[(260, 136, 40), (136, 150, 72)]))


@SIDES
@pytest.mark.parametrize("magnitude", [1e-7, 1e5])
def test_directions_beyond_the_range_of_float16(device, magnitude, right):
    """A gradient's momentum before its scale is divided out, or long after: the weights change as they should."""
    weights = Weights(torch.float16, device, right=right, parts="up", shapes=[(40, 24, 5), (33, 17, 40)])
    for direction in weights.lists["direction"]:
        direction *= magnitude
    hold(weights, scale=0.7 / magnitude)


@SIDES
def test_signs_where_the_low_rank_gradient_underflows_float16(device, right):
    """g is far below float16's range; G and the scale are not."""
    scale = 2.0**24
    weights = Weights(torch.float16, device, right=right, parts="up and sign", shapes=[(24, 40, 5)])
    weights.lists["low"][0] /= scale
    other = Weights(torch.float16, device, right=right, parts="up and sign", shapes=[(24, 40, 5)])
    weights.apply(torch.tensor(scale, device=device))
    other.apply()
    assert torch.equal(weights.param[0], other.param[0])


@pytest.mark.parametrize("rounding", [0, 1, 2], ids=["nearest", "stochastic", "kahan"])
def test_one_list_of_everything(device, rounding):
    """Each weight of a list gets what it gets alone, whichever kernel or branch it takes."""
    shapes = [(33, 17, 3), (64, 136, 40), (8, 8, 8), (0, 5, 2), (1, 1, 1), (130, 24, 33), (16, 24, 72)]
    both = [Weights(torch.bfloat16, device, right=right, shapes=shapes) for right in (False, True)]
    for weights in both:
        weights.compensation = [torch.zeros_like(param) for param in weights.param] if rounding == 2 else []
    left, right = both
    alone = [[param.clone() for param in weights.param] for weights in both]
    for side, weights in enumerate(both):
        for i in range(len(shapes)):
            one = Weights(torch.bfloat16, device, right=side == 1, shapes=shapes[i : i + 1])
            one.param, one.lists = weights.param[i : i + 1], {k: v[i : i + 1] for k, v in weights.lists.items()}
            one.param = [one.param[0].clone()]
            one.compensation = [torch.zeros_like(one.param[0])] if rounding == 2 else []
            one.step, one.seeds = weights.step[i : i + 1], weights.seeds[i : i + 1]
            one.step_factor = weights.step_factor[i : i + 1]
            one.apply(rounding=rounding)
            alone[side][i] = one.param[0]
    left.param += right.param
    left.lists = {name: tensors + right.lists[name] for name, tensors in left.lists.items()}
    left.compensation, left.step = left.compensation + right.compensation, left.step + right.step
    left.seeds, left.step_factor = left.seeds + right.seeds, torch.cat([left.step_factor, right.step_factor])
    left.apply(rounding=rounding)
    for param, expected in zip(left.param, alone[0] + alone[1], strict=True):
        assert torch.equal(param, expected)


def test_more_weights_than_a_table_holds(device):
    shapes = [(1 + i % 9, 1 + i % 7, 1 + i % 3) for i in range(300)]
    weights = Weights(torch.bfloat16, device, parts="gradient", shapes=shapes)
    before = emulator().counters()["launches"] if device.type == "cpu" else 0
    hold(weights)
    if device.type == "cpu":
        assert emulator().counters()["launches"] == before + 2
