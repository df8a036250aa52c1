"""The weights' update at ranks and alignments that the kernel for compute capability 9.0 takes, on it and on that for
all architectures."""

import pytest
import torch

from pykern.reference import lowrank_parts as reference
from tests.lowrank.parts import laid_out, one
from tests.lowrank.test_apply import LR, SIDES, Weights, hold
from tests.support import DEVICES, KERNELS, emulator

EVERY_KERNEL = pytest.mark.parametrize("device", [name for name in KERNELS if name != "cpu"], indirect=True)
NEWEST = pytest.mark.parametrize("device", [name for name in DEVICES if name != "cpu"], indirect=True)
EMULATED = pytest.mark.parametrize("device", [name for name in KERNELS if name.startswith("emulated")], indirect=True)

GAP = 2
"""What aligns the rows of matrices whose sizes leave a rest of six to tensor copies."""


def threads_of(apply) -> int:
    """Of one run, whatever the number of thread orders."""
    before = emulator().counters()
    apply()
    after = emulator().counters()
    return (after["threads"] - before["threads"]) // (after["launches"] - before["launches"])


@EMULATED
@pytest.mark.parametrize(
    "rank, gap, parts, taken",
    [
        (80, GAP, "up", True),
        (72, GAP, "up and gradient", True),
        (64, GAP, "up", False),
        (84, GAP, "up", False),
        (72, 0, "up", False),
        (72, GAP, "up and sign", False),
        (72, GAP, "gradient", False),
        # The most that leaves room for two buffers.
        (640, GAP, "up", True),
        (648, GAP, "up", False),
        (512, GAP, "up and gradient", True),
        (520, GAP, "up and gradient", False),
    ],
)
def test_which_kernel_runs(request, device, rank, gap, parts, taken):
    """Ranks, rows and parts that tensor copies and the warpgroups are for have a kernel of their own on 9.0."""
    newest = request.node.callspec.params["device"] == "emulated"
    weights = Weights(torch.bfloat16, device, parts=parts, shapes=[(6, 6, rank)], gap=gap)
    before = emulator().orders()
    emulator().set_orders(before[:1])
    try:
        assert (threads_of(weights.apply) == 384) is (taken and newest)
    finally:
        emulator().set_orders(before)


# Several strips, tiles and steps along the rank, with a rest of each; several ranks in a launch; with a gradient, two
# tiles for each of a weight; ranks and types that take the narrow strip.
@NEWEST
@SIDES
@pytest.mark.parametrize(
    "dtype, parts, shapes",
    [
        (torch.bfloat16, "up", [(134, 262, 72), (70, 134, 200), (6, 6, 72)]),
        (torch.bfloat16, "up and gradient", [(262, 134, 72)]),
        (torch.bfloat16, "up", [(70, 134, 264)]),
        (torch.float16, "up and gradient", [(134, 262, 72)]),
    ],
    ids=str,
)
def test_strips_tiles_and_steps(device, dtype, parts, shapes, right):
    weights = Weights(dtype, device, right=right, parts=parts, shapes=shapes, gap=GAP)
    hold(weights)
    for param in weights.param:
        lines = param.mT if right else param
        whole = torch.as_strided(lines, (lines.shape[0], lines.shape[1] + GAP), lines.stride())
        assert whole[:, lines.shape[1] :].isnan().all()


def exact_updates(device, right, shape):
    """A weight whose update is exact in float32: unit rows project it up, and numbers have few digits."""
    n, length, rank = shape
    weights = Weights(torch.bfloat16, device, right=right, parts="up and gradient", shapes=[shape], gap=GAP)

    def number(rows, columns, step):
        values = torch.arange(rows)[:, None] * 7 + torch.arange(columns) * step
        return (values % 251 - 125).double()

    def placed(values):
        return laid_out(values.bfloat16().to(device), right=right, gap=GAP)

    weights.param = [placed(2.0 ** -(torch.arange(length) % 10).expand(n, length).double())]
    weights.lists["projector"][0].zero_()
    weights.lists["projector"][0][torch.arange(n), torch.arange(n) % rank] = 1
    weights.lists["direction"] = [(number(rank, length, 3) * 2.0**-15).float().to(device)]
    weights.lists["grad"] = [placed(number(n, length, 5))]
    weights.lists["factors"] = [torch.full((length,), 2.0**-16, device=device)]
    weights.step_factor = torch.full_like(weights.step_factor, 1.0 / LR)
    up = weights.lists["projector"][0].double() @ weights.lists["direction"][0].double()
    change = up + weights.lists["grad"][0].double() * 2.0**-16
    return weights, (weights.param[0].double() - change).cpu()


# A block has several tiles, which its warpgroups take in turn.
@EVERY_KERNEL
@SIDES
def test_stochastic_rounding_bit_for_bit(device, right):
    weights, exact = exact_updates(device, right, (390, 134, 72))
    weights.apply(rounding=1, weight_decay=0.0, scale=1.0)
    words = reference.rounding_words(*exact.shape, weights.seeds[0], 3)
    assert torch.equal(weights.param[0].cpu(), reference.round_stochastic(exact.float(), torch.bfloat16, words))


@EVERY_KERNEL
@SIDES
def test_kahan_bit_for_bit(device, right):
    weights, exact = exact_updates(device, right, (262, 134, 72))
    lost = laid_out(torch.full_like(weights.param[0], 2.0**-12), right=right, gap=GAP)
    weights.compensation = [lost]
    param, buffer = reference.round_kahan(weights.param[0].cpu(), lost.cpu(), exact)
    weights.apply(rounding=2, weight_decay=0.0, scale=1.0)
    assert torch.equal(weights.param[0].cpu(), param)
    assert torch.equal(weights.compensation[0].cpu(), buffer)


@EVERY_KERNEL
@SIDES
def test_what_is_not_finite_stays_in_its_place(device, right):
    weights = Weights(torch.bfloat16, device, right=right, parts="up", shapes=[(70, 134, 72)], gap=GAP)
    weights.param[0][3, 5], weights.param[0][69, 133] = float("nan"), float("inf")
    # A step along the rank that is only begun, and the last column.
    weights.lists["direction"][0][71, 133] = float("inf")
    weights.lists["direction"][0][64, 7] = float("nan")
    hold(weights)


@EVERY_KERNEL
def test_found_inf_changes_nothing(device):
    weights = Weights(torch.bfloat16, device, parts="up", shapes=[(6, 6, 72)], gap=GAP)
    before = weights.param[0].clone()
    weights.apply(found_inf=one(1.0, device))
    assert torch.equal(before, weights.param[0])


@NEWEST
def test_more_weights_than_a_table_holds_maps_of(device):
    weights = Weights(torch.bfloat16, device, parts="up and gradient", shapes=[(6, 6, 72)] * 44, gap=GAP)
    weights.compensation = [laid_out(torch.zeros_like(param), right=False, gap=GAP) for param in weights.param]
    emulated = device.type == "cpu"
    before = emulator().orders() if emulated else []
    if emulated:
        emulator().set_orders(before[:1])
    launches = emulator().counters()["launches"] if emulated else 0
    try:
        hold(weights, rounding=2)
    finally:
        if emulated:
            emulator().set_orders(before)
    assert not emulated or emulator().counters()["launches"] == launches + 2
