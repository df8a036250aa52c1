"""The projection by tensor copies and warpgroups, on compute capability 9.0: which matrices it takes, and its tiles."""

import pytest
import torch

from tests.lowrank.parts import laid_out, matrices, normal, projectors
from tests.lowrank.test_project import SIDES, hold, project
from tests.support import DEVICES, emulator, on

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
pytestmark = pytest.mark.parametrize("device", [name for name in DEVICES if name != "cpu"], indirect=True)

BLOCK = 384
"""Its threads; a block of the other kernel has 256."""


def block_of(grads, basis):
    """Threads of a block, of a launch on the emulator that has a single one."""
    before = emulator().counters()
    project(grads, basis)
    after = emulator().counters()
    assert after["launches"] == before["launches"] + 1
    return (after["threads"] - before["threads"]) // len(emulator().orders())


def one_tile(rank, *, right=False, gap=0, skipped=0, dtype=torch.bfloat16):
    """Both sizes of G are 24: a tile. `skipped` elements lie before its first."""
    grad = laid_out(normal(24 + skipped, 24 + skipped).to(dtype), right=right, gap=gap)[skipped:, skipped:]
    return [grad], projectors(dtype, shapes=[(24, 24, rank)])


@SIDES
def test_which_matrices_it_takes(device, right):
    if device.type != "cpu":
        pytest.skip("only the emulator counts threads")
    for rank in (72, 128, 256):
        assert block_of(*one_tile(rank, right=right)) == BLOCK
    assert block_of(*one_tile(80, right=right, gap=8)) == BLOCK
    assert block_of(*one_tile(80, right=right, dtype=torch.float16)) == BLOCK
    assert block_of(*one_tile(80, right=right, skipped=8)) == BLOCK
    other = {
        "bound by memory": one_tile(64, right=right),
        "rows of P that are no multiple of 16 bytes": one_tile(84, right=right),
        "rows of G that are none": one_tile(80, right=right, gap=4),
        "a first element that isn't aligned": one_tile(80, right=right, skipped=4, gap=4),
    }
    for reason, given in other.items():
        assert block_of(*given) < BLOCK, reason
    with on("emulated 8.0"):
        assert block_of(*one_tile(80, right=right)) < BLOCK


# Ranks of both widths, and of several tiles of each; with the gap all strides are multiples of 16 bytes, and every
# size ends within a tile, a panel and a pack.
@SIDES
@DTYPES
def test_rests_of_tiles(device, dtype, right):
    shapes = [(205, 301, 72), (69, 13, 128), (133, 141, 136), (61, 5, 256), (5, 269, 264), (69, 133, 392)]
    grads = matrices(dtype, device, right=right, gap=3, shapes=shapes)
    hold(grads, projectors(dtype, device, shapes=shapes), 4.0, True)


def test_more_tiles_than_blocks(device):
    """A block of the emulator's four multiprocessors goes on from tile to tile, matrix to matrix and side to side."""
    shapes = [(136, 1032, 72), (72, 264, 256), (8, 8, 80)]
    sides = [matrices(torch.bfloat16, device, right=right, shapes=shapes) for right in (False, True)]
    basis = projectors(torch.bfloat16, device, shapes=shapes)
    hold(sides[0] + sides[1], basis + basis)


# A narrow tile, whose blocks go more than once around their stages, and one that isn't.
@SIDES
@pytest.mark.parametrize("shape", [(1000, 136, 80), (776, 40, 136)], ids=str)
def test_blocks_share_the_rows_of_a_small_grid(device, shape, right):
    shapes = [shape]
    grads = matrices(torch.bfloat16, device, right=right, shapes=shapes)
    basis = projectors(torch.bfloat16, device, shapes=shapes)
    hold(grads, basis, 4.0, True)
    before = emulator().counters()["launches"] if device.type == "cpu" else 0
    first = project(grads, basis)
    if device.type == "cpu":
        assert emulator().counters()["launches"] == before + 2, "the parts are added by a kernel of their own"
    again, squares = project(grads, basis, squares=False)
    assert torch.equal(first[0][0], again[0]) and squares[0].isnan().all()


@SIDES
@pytest.mark.parametrize("rank", [128, 256])
def test_nothing_around_the_matrices_is_read(device, rank, right):
    n, length = 72, 136
    around = laid_out(torch.full((n + 80, length + 280), float("nan"), dtype=torch.bfloat16), right=right).to(device)
    grad = around[8 : n + 8, 8 : length + 8]
    grad.copy_(normal(n, length))
    basis = torch.full((n + 80, rank), float("nan"), dtype=torch.bfloat16, device=device)[:n]
    basis.copy_(normal(n, rank) / n**0.5)
    hold([grad], [basis])


@SIDES
def test_a_nan_reaches_its_column_alone(device, right):
    shapes = [(72, 264, 136)]
    grads = matrices(torch.bfloat16, device, right=right, shapes=shapes)
    grads[0][3, 200] = float("nan")
    low, squares = project(grads, projectors(torch.bfloat16, device, shapes=shapes))
    hit = torch.zeros(264, dtype=torch.bool)
    hit[200] = True
    assert torch.equal(low[0].isnan().any(0).cpu(), hit) and torch.equal(low[0].isnan().all(0).cpu(), hit)
    assert torch.equal(squares[0].isnan().cpu(), hit)


def test_more_matrices_than_a_table_holds(device):
    shapes = [(8, 8, 72 + 8 * (i % 2)) for i in range(85)]
    grads, basis = matrices(torch.bfloat16, device, shapes=shapes), projectors(torch.bfloat16, device, shapes=shapes)
    before = emulator().counters()["launches"] if device.type == "cpu" else 0
    low, squares = project(grads, basis)
    if device.type == "cpu":
        assert emulator().counters()["launches"] == before + 2
    for i in (0, 1, 40, 82, 83, 84):
        alone = project(grads[i : i + 1], basis[i : i + 1])
        assert torch.equal(low[i], alone[0][0]) and torch.equal(squares[i], alone[1][0])
    assert all(matrix.isfinite().all() for matrix in low + squares)
