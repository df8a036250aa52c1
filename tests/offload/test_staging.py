"""StagingLayout: many tensors in one block of bytes, bit for bit those of the reference, and back."""

import pytest
import torch
from torch import Tensor

from pykern import StagingLayout
from pykern.offload.staging import ALIGNMENT, CODECS, encoded_bytes
from pykern.reference import offload as reference
from tests.support import check_op, compile_whole, threads

ENCODED = ["float8_e4m3", "int8"]
ENCODED_DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Around the borders of packs, alignment, scale blocks and the 16384 bytes that a block of threads takes.
SIZES = [1, 3, 7, 8, 9, 127, 128, 129, 255, 256, 257, 1000, 4095, 4096, 4097, 8191, 8192, 8193, 16385]


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def meant(layout: StagingLayout, tensors: list[Tensor]) -> Tensor:
    """The block by the reference: codes, scales, zeros between."""
    block = torch.zeros(layout.nbytes, dtype=torch.uint8)
    for tensor, codec, order, offset in zip(tensors, layout.codecs, layout.orders, layout.offsets, strict=True):
        dense = tensor.detach().cpu().permute(order).contiguous().view(-1)
        if codec == "none":
            parts = [dense.view(torch.uint8)]
        else:
            codes, scales = reference.encode(dense, codec)
            parts = [codes, scales.view(torch.uint8)]
        for part in parts:
            block[offset : offset + len(part)] = part
            offset += -(-len(part) // ALIGNMENT) * ALIGNMENT
    return block


def decoded(tensor: Tensor, codec: str) -> Tensor:
    return reference.decode(*reference.encode(tensor, codec), codec, tensor.dtype).view(tensor.shape)


def same_bits(a: Tensor, b: Tensor) -> bool:
    a, b = a.cpu(), b.cpu()
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(1e30), b.nan_to_num(1e30))


def dirty_block(layout: StagingLayout, device: torch.device, more: int = 0) -> Tensor:
    return torch.full((layout.nbytes + more,), 0xFF, dtype=torch.uint8, device=device)


@pytest.mark.parametrize("codec", ENCODED)
@pytest.mark.parametrize("dtype", ENCODED_DTYPES, ids=str)
def test_codes_are_those_of_the_reference(device, dtype, codec):
    tensors = [randn(size, dtype=dtype, seed=size).to(device) * 10 ** (size % 9 - 4) for size in SIZES]
    layout = StagingLayout.of(tensors, codec)
    block = layout.pack(tensors, dirty_block(layout, device))
    assert torch.equal(block.cpu(), meant(layout, tensors))
    for tensor, back in zip(tensors, layout.unpack(block), strict=True):
        assert back.dtype == dtype and back.device == tensor.device
        assert torch.equal(back.cpu(), decoded(tensor.cpu(), codec))


@pytest.mark.parametrize("codec", ENCODED)
@pytest.mark.parametrize("dtype", ENCODED_DTYPES, ids=str)
def test_every_instruction_set_gives_the_same_bytes(cpu_level, dtype, codec):
    tensor = randn(70001, dtype=dtype)
    layout = StagingLayout.of([tensor], codec)
    for count in (1, 3):
        with threads(count):
            block = layout.pack([tensor], dirty_block(layout, tensor.device))
            assert torch.equal(block, meant(layout, [tensor]))
            assert torch.equal(layout.unpack(block)[0], decoded(tensor, codec))


BIT_COPIED = [
    torch.bool, torch.uint8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32,
    torch.float64, torch.complex64, torch.complex128, torch.float8_e4m3fn,
]  # fmt: skip


@pytest.mark.parametrize("dtype", BIT_COPIED, ids=str)
def test_bit_copies(device, dtype):
    width = dtype.itemsize
    tensors = []
    for size in [1, 15, 16, 17, 255, 256, 257, 1023, 16383, 16384, 16385, 40000]:
        generator = torch.Generator().manual_seed(size)
        raw = torch.randint(0, 2 if dtype == torch.bool else 256, (size * width,), generator=generator)
        tensors.append(raw.to(torch.uint8).view(dtype).to(device))
        if size > 20000:
            # Begins at a multiple of its elements' size alone.
            tensors.extend(tensors[-1][lead:] for lead in (1, 2, 4, 8))
    layout = StagingLayout.of(tensors)
    block = layout.pack(tensors, dirty_block(layout, device))
    assert torch.equal(block.cpu(), meant(layout, tensors))
    for tensor, back in zip(tensors, layout.unpack(block), strict=True):
        assert back.dtype == dtype
        assert torch.equal(back.view(torch.uint8), tensor.view(torch.uint8))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("lead", [1, 2, 4])
def test_tensors_that_begin_anywhere(device, codec, lead):
    """Neither reading nor writing needs sixteen-byte alignment; neighbours stay as they are."""
    for dtype in ENCODED_DTYPES:
        whole = torch.full((9000,), float("nan"), dtype=dtype, device=device)
        view = whole[lead : lead + 8500]
        view.copy_(randn(8500, dtype=dtype))
        layout = StagingLayout.of([view], codec)
        block = layout.pack([view])
        assert torch.equal(block.cpu(), meant(layout, [view]))
        target = torch.full_like(whole, 5.0)
        layout.unpack(block, [target[lead : lead + 8500]])
        assert (target[:lead] == 5).all() and (target[lead + 8500 :] == 5).all()
        assert torch.equal(target[lead : lead + 8500], layout.unpack(block)[0])


def test_all_float8_codes(device):
    """Where the scale is 1: every float16 up to 448 as torch rounds it, and every code back."""
    halves = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    halves = halves[halves.abs() <= 448]
    halves = torch.cat([halves, torch.zeros(-len(halves) % 127, dtype=torch.float16)]).view(-1, 127)
    blocks = torch.nn.functional.pad(halves, (0, 1), value=448.0)
    layout = StagingLayout.of([blocks], "float8_e4m3")
    block = layout.pack([blocks.to(device)])
    want = blocks.to(torch.float8_e4m3fn)
    codes = block[: blocks.numel()].view(torch.float8_e4m3fn).view(blocks.shape).cpu()
    assert torch.equal(codes.view(torch.uint8), want.view(torch.uint8))
    assert torch.equal(layout.unpack(block)[0].cpu(), want.to(torch.float16))

    layout = StagingLayout.of([torch.zeros(256)], "float8_e4m3")
    block = torch.zeros(layout.nbytes, dtype=torch.uint8)
    block[:256] = torch.arange(256)
    block[256:264] = torch.ones(2).view(torch.uint8)
    (back,) = layout.unpack(block.to(device))
    assert same_bits(back, torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float())


def test_all_int8_codes(device):
    values = torch.cat([torch.arange(-127.0, 128.0), torch.tensor([0.5, 1.5, -0.5, -2.5, 126.5]), torch.zeros(124)])
    blocks = torch.cat([values.view(3, 128), torch.full((3, 128), 127.0)], dim=1)
    layout = StagingLayout.of([blocks], "int8")
    block = layout.pack([blocks.to(device)])
    # 127 is not in every block of 128, so the scale is 1 in those that have it.
    assert torch.equal(block.cpu(), meant(layout, [blocks]))
    scales = block[layout.nbytes - ALIGNMENT :][: 4 * 6].cpu().view(torch.float32)
    assert scales[1::2].tolist() == [1, 1, 1]
    rounded = layout.unpack(block)[0].cpu()[1:, :128]
    ones = scales[2::2] == 1
    assert torch.equal(rounded[ones], blocks[1:, :128][ones].round())


@pytest.mark.parametrize("codec", ENCODED)
@pytest.mark.parametrize("dtype", ENCODED_DTYPES, ids=str)
def test_errors_are_within_the_stated_bounds(device, dtype, codec):
    shape = (64, 128)
    spread = 2.0 ** torch.linspace(-18, 0, 128, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(shape, generator=generator, dtype=torch.float64) * spread
    values = (values * 2.0 ** torch.randint(-6, 6, (64, 1), generator=generator)).to(dtype)
    layout = StagingLayout.of([values], codec)
    (back,) = layout.unpack(layout.pack([values.to(device)]))
    exact, got = values.double(), back.cpu().double()
    absmax = exact.abs().amax(dim=1, keepdim=True)
    rounding = got.abs() * torch.finfo(dtype).eps / 2 + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    slack = rounding + 4 * 2.0**-24 * absmax
    if codec == "int8":
        bound = absmax / 254
    else:
        bound = torch.where(exact.abs() >= absmax / 28672, exact.abs() / 16, absmax / 458752)
    error = (got - exact).abs()
    assert (error <= bound + slack).all()
    # The bounds are not generous: somewhere half of each is reached.
    assert (error > bound / 2).any()


@pytest.mark.parametrize("codec", ENCODED)
@pytest.mark.parametrize("dtype", ENCODED_DTYPES, ids=str)
def test_extremes(device, dtype, codec):
    limits = torch.finfo(dtype)
    rows = torch.zeros(7, 128, dtype=dtype)
    rows[0] = randn(128, dtype=dtype)
    rows[0, 5], rows[0, 6], rows[0, 7] = float("nan"), float("inf"), -float("inf")
    rows[1] = limits.max
    rows[1, ::2] = -limits.max
    rows[2] = limits.smallest_normal
    rows[3] = limits.smallest_normal * limits.eps  # the smallest subnormal
    rows[4, ::2] = -0.0
    rows[5] = float("nan")
    rows[6] = float("inf")
    layout = StagingLayout.of([rows], codec)
    block = layout.pack([rows.to(device)])
    assert torch.equal(block.cpu(), meant(layout, [rows]))
    back = layout.unpack(block)[0].cpu()
    assert torch.equal(back.isnan(), ~rows.isfinite())
    assert not back.isinf().any()
    plain = rows.clone()
    plain[0, 5:8] = 0
    assert torch.equal(back[0, 8:], decoded(plain[0], codec)[8:])
    # A little below for float32, where the scale times 448 or 127 could be infinite.
    assert (back[1].double() / rows[1].double() - 1).abs().max() <= 2.0**-19
    assert (back[2].double() - rows[2].double()).abs().max() <= rows[2, 0].double() / 14
    assert torch.equal(back[4].float(), torch.zeros(128))


@pytest.mark.parametrize("codec", CODECS)
def test_more_tensors_than_a_launch_has_room_for(device, codec):
    tensors = [randn(index % 40, dtype=ENCODED_DTYPES[index % 3], seed=index).to(device) for index in range(125)]
    layout = StagingLayout.of(tensors, codec)
    block = layout.pack(tensors, dirty_block(layout, device))
    assert torch.equal(block.cpu(), meant(layout, tensors))
    for tensor, back in zip(tensors, layout.unpack(block), strict=True):
        assert torch.equal(back.cpu(), tensor.cpu() if codec == "none" else decoded(tensor.cpu(), codec))


def test_codecs_side_by_side(device):
    tensors = [randn(5, 100), torch.arange(50), randn(3, dtype=torch.float64), randn(2, 70, dtype=torch.float16)]
    tensors += [torch.zeros(0, 4), torch.tensor(3.5), randn(600, dtype=torch.bfloat16)]
    tensors = [tensor.to(device) for tensor in tensors]
    layout = StagingLayout.of(tensors, ["int8", "int8", "float8_e4m3", "none", "int8", "none", "float8_e4m3"])
    assert layout.codecs == ("int8", "none", "none", "none", "int8", "none", "float8_e4m3")
    block = layout.pack(tensors, dirty_block(layout, device, more=300))
    assert torch.equal(block[: layout.nbytes].cpu(), meant(layout, tensors))
    assert (block[layout.nbytes :] == 0xFF).all()
    back = layout.unpack(block)
    assert [tuple(tensor.shape) for tensor in back] == [tuple(tensor.shape) for tensor in tensors]
    for index in (1, 2, 3, 5):
        assert torch.equal(back[index], tensors[index])


@pytest.mark.parametrize("codec", CODECS)
def test_strides(device, codec):
    """A dense tensor comes back in its order of dimensions; others contiguous; given ones are written as they lie."""
    base = randn(6, 5, 40).to(device)
    tensors = [base.transpose(0, 2), base.permute(1, 0, 2), base[:, :, 3:17], base[:, 2], base[0, 0].expand(4, 40)]
    tensors += [base[:1].transpose(0, 1), torch.full((3, 4), 2.0, device=device).t()]
    layout = StagingLayout.of(tensors, codec)
    block = layout.pack(tensors)
    assert torch.equal(block.cpu(), meant(layout, tensors))
    back = layout.unpack(block)
    strides = [tensor.stride() for tensor in back]
    assert strides[:2] == [tensors[0].stride(), tensors[1].stride()] and strides[-1] == (1, 4)
    assert all(tensor.is_contiguous() for tensor in back[2:5])
    for tensor, restored in zip(tensors, back, strict=True):
        assert restored.shape == tensor.shape
        if codec == "none":
            assert torch.equal(restored, tensor)
    poisoned = torch.full((6, 5, 40), float("nan"), device=device)
    given = [torch.empty_like(tensor) for tensor in back]
    given[2] = poisoned[:, :, 3:17]
    given[0] = torch.empty(40, 5, 6, device=device)
    assert all(a is b for a, b in zip(layout.unpack(block, given), given, strict=True))
    for written, restored in zip(given, back, strict=True):
        assert torch.equal(written, restored)
    assert poisoned[:, :, :3].isnan().all() and poisoned[:, :, 17:].isnan().all()


def test_layout_is_kept_for_other_tensors(device):
    layout = StagingLayout.of([randn(20, 30), randn(7)], "int8")
    other = [randn(30, 20, seed=3).t().to(device), randn(7, seed=4).to(device)]
    for tensor, back in zip(other, layout.unpack(layout.pack(other)), strict=True):
        assert back.is_contiguous()
        assert torch.equal(back.cpu(), decoded(tensor.cpu(), "int8"))


def test_sizes():
    assert encoded_bytes(0, torch.float32, "int8") == 0
    assert encoded_bytes(1, torch.float32, "none") == 256
    assert encoded_bytes(256, torch.bfloat16, "float8_e4m3") == 256 + 256
    assert encoded_bytes(8193 * 128, torch.bfloat16, "int8") == 4097 * 256 + 129 * 256
    layout = StagingLayout.of([torch.zeros(65), torch.zeros(64), torch.zeros(0), torch.zeros(1)])
    assert layout.offsets == (0, 512, 768, 768) and layout.nbytes == 1024
    empty = StagingLayout.of([])
    assert empty.nbytes == 0 and empty.pack([]).shape == (0,) and empty.unpack(torch.empty(0, dtype=torch.uint8)) == []


def test_gradients_are_not_recorded(device):
    tensor = randn(10).to(device).requires_grad_()
    layout = StagingLayout.of([tensor], "int8")
    block = layout.pack([tensor])
    assert not block.requires_grad and not layout.unpack(block)[0].requires_grad


@pytest.mark.parametrize("codec", CODECS)
def test_opcheck(device, codec):
    tensors = [randn(70).to(device), randn(3, 50, dtype=torch.bfloat16).to(device)]
    layout = StagingLayout.of(tensors, codec)
    offsets, codecs = list(layout.offsets), layout._codec_numbers()
    block = layout.pack(tensors)
    check_op(torch.ops.pykern.offload_pack.default, (tensors, offsets, codecs, block))
    check_op(torch.ops.pykern.offload_unpack.default, (block, offsets, codecs, tensors))


def test_compiles_whole(device):
    tensors = [randn(70).to(device), randn(3, 50, dtype=torch.bfloat16).to(device)]
    layout = StagingLayout.of(tensors, "float8_e4m3")

    def function(a, b):
        return layout.unpack(layout.pack([a + a, b]))

    for got, want in zip(compile_whole(function)(*tensors), function(*tensors), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("codec", CODECS)
def test_repeats_bit_for_bit(device, codec):
    tensor = randn(20000, dtype=torch.bfloat16).to(device)
    layout = StagingLayout.of([tensor], codec)
    assert torch.equal(layout.pack([tensor], dirty_block(layout, device)), layout.pack([tensor]))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("codec", CODECS)
def test_captured_in_a_graph(codec):
    """Nothing waits for the host, and a replay reads and writes what lies at the captured addresses then."""
    tensors = [randn(5000, dtype=torch.bfloat16).cuda(), randn(3, 70).cuda()]
    layout = StagingLayout.of(tensors, codec)
    block = layout.pack(tensors)
    targets = layout.unpack(block)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layout.pack(tensors, block)
        layout.unpack(block, targets)
    for tensor in tensors:
        tensor.mul_(-3)
    graph.replay()
    for tensor, target in zip(tensors, targets, strict=True):
        assert torch.equal(target.cpu(), tensor.cpu() if codec == "none" else decoded(tensor.cpu(), codec))


LAYOUT = StagingLayout.of([torch.zeros(3, 4), torch.zeros(5, dtype=torch.int64)])
TENSORS = [torch.zeros(3, 4), torch.zeros(5, dtype=torch.int64)]
BLOCK = torch.zeros(512, dtype=torch.uint8)

REFUSED = [
    (lambda: StagingLayout.of(torch.zeros(3)), TypeError, "tensors: expected a list of tensors, got Tensor"),
    (lambda: StagingLayout.of([1.0]), TypeError, r"tensors\[0\]: expected a tensor, got float"),
    (lambda: StagingLayout.of([torch.eye(3).to_sparse()]), TypeError, r"tensors\[0\]: expected a dense tensor"),
    (lambda: StagingLayout.of(TENSORS, "fp8"), ValueError, "codec: expected one of none, float8_e4m3, int8, got 'fp8'"),
    (lambda: StagingLayout.of(TENSORS, ["int8"]), ValueError, "codec: expected one for each of the 2 tensors, got 1"),
    (lambda: LAYOUT.pack(TENSORS[:1]), ValueError, "tensors: expected 2 as the layout has, got 1"),
    (lambda: LAYOUT.pack(TENSORS[::-1]), ValueError, r"tensors\[0\]: expected the layout's shape \(3, 4\), got \(5,\)"),
    (lambda: LAYOUT.pack([TENSORS[0], torch.zeros(5)]), TypeError, r"tensors\[1\]: expected the layout's torch.int64"),
    (lambda: LAYOUT.pack(TENSORS, BLOCK[:511]), ValueError, "staging: expected at least 512 bytes, got 511"),
    (lambda: LAYOUT.unpack(BLOCK.float()), TypeError, "staging: expected a uint8 tensor, got torch.float32"),
    (lambda: LAYOUT.unpack(BLOCK.view(2, 256)), ValueError, "staging: expected one contiguous dimension"),
    (lambda: LAYOUT.unpack(torch.zeros(600, dtype=torch.uint8)[8:]), ValueError, "a multiple of 16 bytes"),
    (lambda: LAYOUT.pack(TENSORS, BLOCK.to("meta")), ValueError, r"tensors\[0\]: expected staging's device meta"),
]


@pytest.mark.parametrize(("call", "error", "message"), REFUSED, ids=[message for *_, message in REFUSED])
def test_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_raw_op_checks_places(device):
    pack = torch.ops.pykern.offload_pack.default
    tensor, block = torch.zeros(100, device=device), BLOCK.to(device)
    for offsets, codecs, message in [
        ([64], [0], "expected an offset that is a multiple of 256, got 64"),
        ([256], [0], "expected room up to byte 768 of staging, which has 512"),
        ([0], [3], "no codec 3"),
        ([0, 0], [0], "expected one for each of 1 tensors, got 2 and 1"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            pack([tensor], offsets, codecs, block)
    with pytest.raises(RuntimeError, match="float64 has no codec"):
        pack([tensor.double()], [0], [1], block)
