"""What is special to the projection on CUDA: tables of many matrices, tiles of the rank, rows that blocks share."""

import pytest
import torch

from tests.lowrank.parts import matrices, projectors
from tests.lowrank.test_project import SIDES, hold, project
from tests.support import DEVICES, emulator

pytestmark = pytest.mark.parametrize("device", [name for name in DEVICES if name != "cpu"], indirect=True)

# Both sides of every width of the rank tiles, and a rank of more than one.
RANKS = [1, 64, 65, 128, 129, 256, 257]


@SIDES
def test_ranks_around_the_tiles(device, right):
    shapes = [(40, 24, rank) for rank in RANKS]
    hold(
        matrices(torch.bfloat16, device, right=right, shapes=shapes), projectors(torch.bfloat16, device, shapes=shapes)
    )


@SIDES
@pytest.mark.parametrize("rank", [5, 80])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_blocks_share_the_rows_of_a_small_grid(device, dtype, rank, right):
    """On a large GPU as well: a single tile is less than it has multiprocessors."""
    shapes = [(777, 30, rank)]
    grads, basis = matrices(dtype, device, right=right, shapes=shapes), projectors(dtype, device, shapes=shapes)
    hold(grads, basis, 4.0, True)
    before = emulator().counters()["launches"] if device.type == "cpu" else 0
    first = project(grads, basis)
    if device.type == "cpu":
        assert emulator().counters()["launches"] == before + 2, "the parts are added by a kernel of their own"
    for _ in range(2):
        again = project(grads, basis)
        assert torch.equal(first[0][0], again[0][0]) and torch.equal(first[1][0], again[1][0])


def test_shared_rows_without_squares(device):
    shapes = [(777, 30, 5)]
    grads, basis = matrices(torch.bfloat16, device, shapes=shapes), projectors(torch.bfloat16, device, shapes=shapes)
    low, squares = project(grads, basis, squares=False)
    assert torch.equal(low[0], project(grads, basis)[0][0])
    assert squares[0].isnan().all()


def test_one_list_of_everything(device):
    """Sides, widths of the rank and alignments that different kernels and branches take, in one call."""
    shapes = [(33, 17, 3), (64, 136, 70), (40, 24, 130), (40, 24, 136), (8, 8, 8), (0, 5, 2), (1, 1, 1), (0, 8, 80)]
    sides = [matrices(torch.bfloat16, device, right=right, shapes=shapes) for right in (False, True)]
    basis = projectors(torch.bfloat16, device, shapes=shapes)
    hold(sides[0] + sides[1], basis + basis)


def test_more_matrices_than_a_table_holds(device):
    real = (0, 1, 200, 426, 427, 428, 449)
    # A matrix without rows has a result too, zeros, and a place in the table.
    shapes = [(9 + i % 8 if i in real else 0, 1 + i % 7, 1 + i % 3) for i in range(450)]
    grads, basis = matrices(torch.bfloat16, device, shapes=shapes), projectors(torch.bfloat16, device, shapes=shapes)
    before = emulator().counters()["launches"] if device.type == "cpu" else 0
    low, squares = project(grads, basis)
    if device.type == "cpu":
        assert emulator().counters()["launches"] == before + 2
    assert not any(low[i].any() or squares[i].any() for i in range(450) if i not in real)
    for i in real:
        alone = project(grads[i : i + 1], basis[i : i + 1])
        assert torch.equal(low[i], alone[0][0]) and torch.equal(squares[i], alone[1][0])
