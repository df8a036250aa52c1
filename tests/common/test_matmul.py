"""csrc/common/matmul.h and pack.h on every level, and amx.h over the scalar twin of its tiles.

Operands are small integers: every sum is exact in float32, so results are compared for equality.
"""

import random

import pytest
import torch

from tests.support import assert_accurate

from .calls import TYPES, integer, pointer

LAYOUTS = ["rows", "columns", "strided"]


def integers(*shape, dtype=torch.float32):
    return torch.randint(-4, 5, shape).to(dtype)


def surrounded(matrix, layout):
    """The matrix as a view into memory that is NaN elsewhere, and its strides."""
    rows, columns = matrix.shape
    if layout == "columns":
        memory = torch.full((columns + 2, rows + 3), float("nan"), dtype=matrix.dtype)
        view = memory[1 : columns + 1, 1 : rows + 1].T
    elif layout == "strided":
        memory = torch.full((rows + 2, 2 * columns + 5), float("nan"), dtype=matrix.dtype)
        view = memory[1 : rows + 1, 1 : 2 * columns + 1 : 2]
    else:
        memory = torch.full((rows + 2, columns + 3), float("nan"), dtype=matrix.dtype)
        view = memory[1 : rows + 1, 1 : columns + 1]
    view.copy_(matrix)
    return view


def sizes(seed, count, limit=70):
    generator = random.Random(seed)
    edges = [(1, 1, 1), (1, 1, 2), (7, 64, 32), (8, 65, 33), (32, 32, 64), (6, 16, 300), (33, 70, 257), (2, 3, 0)]
    return edges + [tuple(generator.randint(1, limit) for _ in range(3)) for _ in range(count)]


def multiply(floor, a, b, *, accumulate_onto=None):
    """floor.cpp's product, with a check that it writes nothing behind its panels."""
    (m, k), n = a.shape, b.shape[1]
    width = -(-n // floor.panel()) * floor.panel()
    row = width + 5
    c = torch.full((m, row), 77.0)
    if accumulate_onto is not None:
        c[:, :n] = accumulate_onto
    floor.multiply(
        TYPES[a.dtype], integer(m), integer(n), integer(k), pointer(a), integer(a.stride(0)),
        pointer(b), integer(b.stride(0)), integer(b.stride(1)), pointer(c), integer(row), accumulate_onto is not None,
    )  # fmt: skip
    assert (c[:, width:] == 77).all()
    return c[:, :n]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_matmul(floor, dtype, layout):
    for m, n, k in sizes(0, 25):
        a, b = integers(m, k, dtype=dtype), integers(k, n, dtype=dtype)
        got = multiply(floor, surrounded(a, "rows"), surrounded(b, layout))
        assert torch.equal(got, a.float() @ b.float()), (m, n, k)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_matmul_accumulates(floor, dtype):
    for m, n, k in sizes(1, 15):
        a, b, c = integers(m, k, dtype=dtype), integers(k, n, dtype=dtype), integers(m, n)
        got = multiply(floor, surrounded(a, "rows"), surrounded(b, "columns"), accumulate_onto=c)
        assert torch.equal(got, c + a.float() @ b.float()), (m, n, k)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_matmul_keeps_nan_and_inf_in_their_places(floor, dtype):
    a, b = integers(13, 37, dtype=dtype), integers(37, 71, dtype=dtype) + 5
    a[3, 36], b[36, 70], b[0, 5] = float("nan"), float("inf"), float("-inf")
    a[:, 0], a[:, 36] = a[:, 0] + 9, a[:, 36] + 9
    got = multiply(floor, a, b)
    assert torch.equal(got.isnan(), (a.float() @ b.float()).isnan())
    assert torch.equal(got.nan_to_num(), (a.float() @ b.float()).nan_to_num())


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_matmul_is_as_accurate_as_torch(floor, dtype):
    a, b = torch.randn(65, 700).to(dtype), torch.randn(700, 67).to(dtype)
    exact = a.double() @ b.double()
    assert_accurate(multiply(floor, a, b), exact, a.float() @ b.float())


def test_matmul_repeats_bit_for_bit(floor):
    a, b = torch.randn(65, 300).bfloat16(), torch.randn(300, 67).bfloat16()
    assert torch.equal(multiply(floor, a, b), multiply(floor, a, b))


def test_matmul_reads_a_by_both_strides(floor):
    for m, n, k in sizes(2, 15):
        if k == 0:
            continue
        a, b = integers(m, k), integers(k, n)
        view = surrounded(a, "columns")
        row = -(-n // floor.panel()) * floor.panel()
        c = torch.empty(m, row)
        floor.multiply_strided(
            integer(m), integer(n), integer(k), pointer(view), integer(view.stride(0)), integer(view.stride(1)),
            pointer(b), pointer(c), integer(row),
        )  # fmt: skip
        assert torch.equal(c[:, :n], a @ b), (m, n, k)


def packed_pairs(matrix, panel):
    """The layout of pack.h in plain PyTorch: [panel, pair of rows, column, row of the pair]."""
    k, n = matrix.shape
    pairs, panels = -(-k // 2), -(-n // panel)
    whole = matrix.new_zeros(2 * pairs, panels * panel)
    whole[:k, :n] = matrix
    return whole.view(pairs, 2, panels, panel).permute(2, 0, 3, 1).bfloat16().contiguous()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_pack_to_pairs(floor, dtype, layout):
    for _, n, k in sizes(3, 25, 150):
        matrix = torch.randn(k, n).to(dtype)
        view = surrounded(matrix, layout)
        arguments = (
            TYPES[dtype],
            pointer(view),
            integer(k),
            integer(n),
            integer(view.stride(0)),
            integer(view.stride(1)),
        )
        packed = torch.full((floor.pack_pairs(*arguments, None),), float("nan"), dtype=torch.bfloat16)
        floor.pack_pairs(*arguments, pointer(packed))
        assert torch.equal(packed, packed_pairs(matrix, floor.panel()).flatten()), (n, k)


# --- tiles --------------------------------------------------------------------------------------


def tile_multiply(floor, a, b, panel, onto=None):
    (m, k), n = a.shape, b.shape[1]
    even = -(-k // 2) * 2
    left = torch.zeros(m, even + 4, dtype=torch.bfloat16)
    left[:, even:] = float("nan")
    left[:, :k] = a
    packed = packed_pairs(b, panel)
    c = torch.full((m + 1, packed.shape[0] * panel + 3), float("nan"))
    if onto is not None:
        c[:m, :-3] = 0
        c[:m, :n] = onto
    floor.tile_multiply(
        integer(m), integer(packed.shape[0] * panel), integer(even), pointer(left), integer(left.stride(0)),
        pointer(packed), integer(panel), pointer(c), integer(c.stride(0)), onto is not None,
    )  # fmt: skip
    assert c[m].isnan().all() and c[:, -3:].isnan().all()
    return c[:m, :n]


@pytest.mark.parametrize("panel", [32, 64])
def test_tile_product(tile_floor, panel):
    for m, n, k in sizes(4, 40, 100) + [(64, 64, 512), (40, 33, 523), (32, 64, 256)]:
        if k == 0:
            continue
        a, b = integers(m, k, dtype=torch.bfloat16), integers(k, n, dtype=torch.bfloat16)
        assert torch.equal(tile_multiply(tile_floor, a, b, panel), a.float() @ b.float()), (m, n, k)


def test_tile_product_accumulates(tile_floor):
    for m, n, k in sizes(5, 30, 100):
        a, b, c = integers(m, k, dtype=torch.bfloat16), integers(k, n, dtype=torch.bfloat16), integers(m, n)
        assert torch.equal(tile_multiply(tile_floor, a, b, 64, onto=c), c + a.float() @ b.float()), (m, n, k)


def test_tile_product_keeps_nan_in_its_row(tile_floor):
    a, b = integers(45, 45, dtype=torch.bfloat16), integers(45, 70, dtype=torch.bfloat16)
    a[44, 44] = float("nan")
    got = tile_multiply(tile_floor, a, b, 64)
    assert got[44].isnan().all()
    assert torch.equal(got[:44], a[:44].float() @ b.float())


def test_tile_self_check(tile_floor):
    assert tile_floor.tile_self_check()
