"""What each PTX function must do, from the manual's definitions, for the kernels of vectors.cu.

A case is one launch with fixed pseudo-random input. Expected results are computed here with numpy, from formulas of
their own: nothing is shared with the host twins.
"""

import zlib
from dataclasses import dataclass, field
from functools import cache
from math import prod

import numpy as np


@dataclass
class Case:
    name: str
    kernel: str
    options: list[int]
    data: np.ndarray
    expected: np.ndarray
    # How far from `expected` a result may be, element by element; 0: equal bit for bit.
    bound: np.ndarray | float = 0.0
    sm90: bool = False
    # Whether the hardware's result is worth keeping in the repository.
    golden: bool = field(default=True)

    def compare(self, output: np.ndarray, slack: float = 1.0) -> None:
        got = output.view(np.uint8).view(self.expected.dtype).reshape(self.expected.shape)
        if np.all(self.bound == 0):
            np.testing.assert_array_equal(got, self.expected)
            return
        np.testing.assert_array_equal(np.isnan(got), np.isnan(self.expected))
        infinite = np.isinf(self.expected)
        np.testing.assert_array_equal(got[infinite], self.expected[infinite])
        with np.errstate(invalid="ignore"):
            error = np.abs(got.astype(np.float64) - self.expected)
        finite = np.isfinite(self.expected)
        assert (error <= slack * self.bound)[finite].all(), f"{self.name}: error {error[finite].max():.3e}"


def generator(name: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(name.encode()))


# --- numbers ----------------------------------------------------------------------------------------------

BF16, F16, TF32 = 0, 1, 2


def to_bits(values: np.ndarray, kind: int) -> np.ndarray:
    """16-bit patterns of values, rounded."""
    if kind == F16:
        return values.astype(np.float16).view(np.uint16)
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bits(bits: np.ndarray, kind: int) -> np.ndarray:
    if kind == F16:
        return bits.view(np.float16).astype(np.float64)
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def pack(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return low.astype(np.uint32) | high.astype(np.uint32) << 16


def raw(*arrays: np.ndarray) -> np.ndarray:
    return np.concatenate([np.ascontiguousarray(array).view(np.uint8).ravel() for array in arrays])


# --- ldmatrix, stmatrix -----------------------------------------------------------------------------------

LANES = np.arange(32)


def matrix_cases():
    for count in (1, 2, 4):
        for transposed in (0, 1):
            name = f"ldmatrix_x{count}{'_trans' if transposed else ''}"
            rows = generator(name).integers(0, 1 << 16, (32, 8), dtype=np.uint16)
            registers = np.empty((count, 32), np.uint32)
            for i in range(count):
                named = rows[(5 * (8 * i + np.arange(8)) + 3) % 32]
                fragment = named.T if transposed else named
                registers[i] = pack(fragment[LANES // 4, 2 * (LANES % 4)], fragment[LANES // 4, 2 * (LANES % 4) + 1])
            yield Case(name, "ldmatrix", [count, transposed], raw(rows), registers)

            name = f"stmatrix_x{count}{'_trans' if transposed else ''}"
            registers = generator(name).integers(0, 1 << 32, (count, 32), dtype=np.uint32)
            rows = np.zeros((32, 8), np.uint16)
            for i in range(count):
                fragment = np.empty((8, 8), np.uint16)
                fragment[LANES // 4, 2 * (LANES % 4)] = registers[i] & 0xFFFF
                fragment[LANES // 4, 2 * (LANES % 4) + 1] = registers[i] >> 16
                rows[(5 * (8 * i + np.arange(8)) + 3) % 32] = fragment.T if transposed else fragment
            yield Case(name, "stmatrix", [count, transposed], raw(registers), rows, sm90=True)


# --- mma --------------------------------------------------------------------------------------------------


def fragment_a(lane: int, i: int) -> tuple[int, int]:
    """Row and column of element i (of 8) that a lane holds of A m16k16; PTX manual, mma.m16n8k16."""
    group, thread = lane >> 2, lane % 4
    row = group if i in (0, 1, 4, 5) else group + 8
    return row, thread * 2 + (i & 1) + (8 if i >= 4 else 0)


def fragment_b(lane: int, i: int) -> tuple[int, int]:
    group, thread = lane >> 2, lane % 4
    return thread * 2 + (i & 1) + (8 if i >= 2 else 0), group


def fragment_c(lane: int, i: int) -> tuple[int, int]:
    group, thread = lane >> 2, lane % 4
    return group if i < 2 else group + 8, thread * 2 + (i & 1)


def registers_of(matrix: np.ndarray, place, elements: int) -> np.ndarray:
    """[elements / 2][32] registers of a matrix of 16-bit patterns."""
    values = np.array([[matrix[place(lane, i)] for lane in range(32)] for i in range(elements)])
    return pack(values[0::2], values[1::2])


def accumulators_of(matrix: np.ndarray) -> np.ndarray:
    return np.array([[matrix[fragment_c(lane, i)] for lane in range(32)] for i in range(4)])


def product_bound(a: np.ndarray, b: np.ndarray, d: np.ndarray) -> np.ndarray:
    """Of a sum in float whose terms may be cut below the largest."""
    a, b, d = (np.nan_to_num(np.abs(x), posinf=0) for x in (a, b, d))
    return 2.0**-20 * (a @ b + d)


def mma_cases():
    for kind, label in ((BF16, "bf16"), (F16, "f16")):
        for content in ("integers", "normal", "wide", "infinite"):
            name = f"mma_{label}_{content}"
            random = generator(name)
            shapes = ((16, 16), (16, 8), (16, 8))
            if content == "integers":
                a, b, d = (random.integers(-8, 9, shape).astype(np.float64) for shape in shapes)
            else:
                a, b, d = (random.standard_normal(shape) for shape in shapes)
            if content == "infinite":
                a[3, 5], a[7, 2], b[2, 1], d[9, 6] = np.inf, -np.inf, np.nan, np.inf
            if content == "wide":
                a *= 2.0 ** random.integers(-20, 8, a.shape)
            bits_a, bits_b, d = to_bits(a, kind), to_bits(b, kind), d.astype(np.float32)
            a, b = from_bits(bits_a, kind), from_bits(bits_b, kind)
            data = raw(registers_of(bits_a, fragment_a, 8), registers_of(bits_b, fragment_b, 4), accumulators_of(d))
            with np.errstate(invalid="ignore"):
                exact, bound = d + a @ b, product_bound(a, b, d)
            yield Case(
                name, "mma", [kind], data, accumulators_of(exact).astype(np.float32),
                0.0 if content == "integers" else accumulators_of(bound),
            )  # fmt: skip
    name = "mma_tf32"
    random = generator(name)
    a, b, d = (random.standard_normal(shape).astype(np.float32) for shape in ((16, 8), (8, 8), (16, 8)))
    group, thread = LANES >> 2, LANES % 4
    fragments_a = [a[group + 8 * (i % 2), thread + 4 * (i // 2)] for i in range(4)]
    fragments_b = [b[thread + 4 * i, group] for i in range(2)]
    cut = [(x.view(np.uint32) & 0xFFFFE000).view(np.float32).astype(np.float64) for x in (a, b)]
    yield Case(
        name, "mma", [TF32], raw(*fragments_a, *fragments_b, accumulators_of(d)),
        accumulators_of(d + cut[0] @ cut[1]).astype(np.float32), accumulators_of(product_bound(*cut, d)),
    )  # fmt: skip


def gemm_case(kernel: str, m: int, n: int, k: int) -> Case:
    name = f"{kernel}_{m}_{n}_{k}"
    random, pitch = generator(name), (k + 7) // 8 * 8
    bits = to_bits(random.standard_normal((m + n, pitch)), BF16)
    bits[:, k:] = 0x7FC0  # NaN: nobody may read them as part of the matrix
    values = from_bits(bits, BF16)[:, :k]
    exact = values[:m] @ values[m:].T
    bound = k * 2.0**-22 * (np.abs(values[:m]) @ np.abs(values[m:]).T)
    sm90 = kernel == "pipelined_gemm"
    return Case(name, kernel, [m, n, k], raw(bits), exact.astype(np.float32), bound, sm90=sm90, golden=m * n < 2000)


def gemm_cases():
    for m, n, k in ((16, 8, 16), (1, 1, 1), (33, 17, 19), (45, 30, 72), (64, 48, 33)):
        yield gemm_case("gemm", m, n, k)
    for m, n, k in ((64, 64, 64), (1, 1, 8), (33, 17, 19), (70, 65, 200), (64, 64, 320)):
        yield gemm_case("pipelined_gemm", m, n, k)


# --- copies, barriers, arithmetic -------------------------------------------------------------------------


def simple_cases():
    for size, everywhere in ((4, 1), (8, 1), (16, 0), (16, 1)):
        name = f"cp_async_{size}{'_ca' if everywhere else '_cg'}"
        data = generator(name).integers(1, 256, 32 * size, dtype=np.uint8)
        place = np.arange(32 * size)
        expected = np.where(place % size < place // size % (size + 1), data, 0).astype(np.uint8)
        yield Case(name, "cp_async", [size, everywhere], data, expected)

    values = generator("named_barrier").standard_normal(96).astype(np.float32)
    expected = np.concatenate([np.zeros(32, np.float32), 2 * values[31::-1], values[64:]])
    yield Case("named_barrier", "named_barrier", [], raw(values), expected)

    for prefetch in (0, 1):
        data = generator("load_once").integers(0, 1 << 16, 256, dtype=np.uint16)
        yield Case(f"load_once_{prefetch}", "load_once", [prefetch], raw(data), data)

    yield Case("poll", "poll", [], np.zeros(16, np.uint8), np.array([0, 1, 1], np.uint32), sm90=True)
    data = generator("bulk").integers(0, 1 << 31, (5, 256), dtype=np.uint32)
    for chunks in (1, 2, 5):
        yield Case(f"bulk_{chunks}", "bulk", [], raw(data[:chunks]), data[:chunks] + 1, sm90=True)


def math_cases():
    random = generator("math")
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan], np.float32)
    with np.errstate(all="ignore"):
        x = np.concatenate([random.uniform(-130, 130, 251).astype(np.float32), special])
        exact = np.exp2(x.astype(np.float64))
        exact[exact < 2.0**-126] = 0
        exact[exact >= 2.0**128] = np.inf
        yield Case("fast_exp2", "math", [0], raw(x), exact.astype(np.float32), 2.0**-22 * np.abs(exact) + 2.0**-126)
        x = np.concatenate([2.0 ** random.uniform(-120, 120, 200), random.uniform(0.5, 2, 51)]).astype(np.float32)
        x = np.concatenate([x, special])
        exact = np.log2(x.astype(np.float64))
        yield Case("fast_log2", "math", [1], raw(x), exact.astype(np.float32), 2.0**-22 * np.maximum(1, np.abs(exact)))
        x = np.concatenate([random.standard_normal(251) * 3, special]).astype(np.float32)
        exact = np.tanh(x.astype(np.float64))
        yield Case("fast_tanh", "math", [2], raw(x), exact.astype(np.float32), 2.0**-10.9 * np.abs(exact))

    # Halves away from zero, by the definition: the nearest multiples of the unit of 10 fraction bits.
    x = np.concatenate([
        random.standard_normal(120).astype(np.float32),
        (random.integers(0x3F800000, 0x40000000, 120, dtype=np.uint32) & 0xFFFFF000 | 0x1000).view(np.float32),
        special[:4],
    ])  # fmt: skip
    with np.errstate(invalid="ignore"):
        mantissa, exponent = np.frexp(x.astype(np.float64))
        scaled = mantissa * 2**11
        rounded = np.sign(scaled) * np.floor(np.abs(scaled) + 0.5)
        exact = np.where(np.isfinite(x), np.ldexp(rounded, exponent - 11), x).astype(np.float32)
    exact[x == 0] = x[x == 0]
    yield Case("round_tf32", "math", [3], raw(x), exact.view(np.uint32))


# --- tensor copies ----------------------------------------------------------------------------------------

NONE, BYTES32, BYTES64, BYTES128 = range(4)


def swizzle_place(address: np.ndarray, swizzle: int) -> np.ndarray:
    """Where the 16 bytes that belong at `address` lie: a pattern of 2, 4 or 8 chunks that changes every 128 bytes."""
    if swizzle == NONE:
        return address
    chunks = 2**swizzle
    line, chunk = address // 128, address // 16 % 8
    return line * 128 + (chunk // chunks * chunks + (chunk % chunks ^ line % chunks)) * 16 + address % 16


def box_case(kind, element, sizes, box, at, swizzle=NONE, shift=0, gap=0) -> Case:
    """A box of a tensor; sizes, box and coordinates innermost first, `gap` spare elements after each row."""
    rank = len(sizes)
    name = f"tensor_{kind}_{element}_" + "_".join("x".join(map(str, part)) for part in (sizes, box, at))
    name += f"_swizzle{swizzle}_{shift}_{gap}"
    random, dtype = generator(name), {2: np.uint16, 4: np.uint32}[element]
    strides = [1]
    unit = 16 // element
    for size in sizes[:-1]:
        strides.append((strides[-1] * size + gap + unit - 1) // unit * unit)
    total = strides[-1] * sizes[-1]
    content = random.integers(1, 100, total, dtype=np.uint16).astype(dtype)
    shape = sizes[::-1]
    index = sum(
        (np.arange(size) * stride).reshape([-1] + [1] * (rank - 1 - (rank - 1 - d)))
        for d, (size, stride) in enumerate(zip(sizes, strides, strict=True))
    )
    assert index.shape == tuple(shape)
    # The box within a frame of zeros, so that nothing lies outside.
    frame = [(256, 256)] * rank if rank < 3 else [(16, 16)] * rank
    inside = tuple(slice(c + f[0], c + f[0] + b) for c, b, f in zip(at[::-1], box[::-1], frame, strict=True))
    count = prod(box)
    places = swizzle_place(shift + np.arange(count) * element, swizzle) - shift
    options = [element, rank, swizzle, shift]
    for part in (sizes, strides, box, at):
        options += [*part, *[0] * (5 - rank)]
    if kind == "load":
        values = np.pad(content[index], frame)[inside].ravel()
        image = np.zeros(count, dtype)
        image[places // element] = values
        return Case(name, "tensor_load", options, raw(content), image, sm90=True)
    image = random.integers(1, 100, count, dtype=np.uint16).astype(dtype)
    target = np.pad(np.full(shape, np.iinfo(dtype).max, dtype), frame)
    target[inside] = image[places // element].reshape(box[::-1])
    result = np.full(total, np.iinfo(dtype).max, dtype)
    result[index.ravel()] = target[tuple(slice(f[0], f[0] + s) for f, s in zip(frame, shape, strict=True))].ravel()
    return Case(name, "tensor_store", options, raw(image), result, sm90=True)


def tensor_cases():
    for kind in ("load", "store"):
        yield box_case(kind, 2, [100], [64], [8])
        yield box_case(kind, 2, [100], [64], [70])
        yield box_case(kind, 4, [37], [32], [-5])
        for swizzle in (NONE, BYTES32, BYTES64, BYTES128):
            inner = 64 if swizzle == NONE else 8 * 2**swizzle
            yield box_case(kind, 2, [70, 21], [inner, 16], [0, 0], swizzle)
            yield box_case(kind, 2, [70, 21], [inner, 16], [-3, 9], swizzle, gap=10)
            yield box_case(kind, 2, [70, 21], [inner, 16], [65, -8], swizzle, shift=128)
            yield box_case(kind, 4, [30, 9], [inner // 2, 8], [7, 3], swizzle)
        yield box_case(kind, 2, [20, 5, 4], [16, 4, 2], [8, -1, 3], gap=3)
        yield box_case(kind, 4, [9, 4, 3, 3], [8, 2, 2, 2], [3, 3, -1, 2])
        yield box_case(kind, 2, [20, 3, 3, 3, 3], [16, 2, 2, 2, 2], [6, 2, -1, 1, 2], BYTES32)


# --- wgmma ------------------------------------------------------------------------------------------------


def tile_image(matrix: np.ndarray, swizzle: int, mn_major: bool, padding: int = 0):
    """A tile [mn, k] of 16-bit patterns as wgmma reads it: bytes, leading, stride, and how far a step of k = 16 is.

    In chunks of 16 bytes, the canonical layouts of the manual: K innermost ((8, mn), k) : ((span, stride), 1), without
    swizzle ((8, mn), k) : ((1, stride), leading); MN innermost ((span, mn), (8, k)) : ((1, leading), (span, stride)),
    without swizzle ((1, mn), (8, k)) : ((-, stride), (1, leading)).
    """
    size, depth = matrix.shape
    span = 2**swizzle  # chunks
    mn, k = np.meshgrid(np.arange(size), np.arange(depth), indexing="ij")
    if not mn_major and swizzle:
        assert depth == 8 * span
        leading, stride, step = 1, 8 * span + padding, 2
        chunk, within = mn % 8 * span + mn // 8 * stride + k // 8, k % 8
    elif not mn_major:
        leading, stride = 8, 8 * (depth // 8) + padding
        chunk, within, step = mn % 8 + mn // 8 * stride + k // 8 * leading, k % 8, 2 * leading
    elif swizzle:
        stride, leading = 8 * span, 8 * span * (depth // 8) + padding
        step = 2 * stride
        chunk = mn // 8 % span + mn // 8 // span * leading + k % 8 * span + k // 8 * stride
        within = mn % 8
    else:
        leading, stride = 8, 8 * (depth // 8) + padding
        chunk, within, step = mn // 8 * stride + k % 8 + k // 8 * leading, mn % 8, 2 * leading
    place = swizzle_place(chunk * 16 + within * 2, swizzle)
    image = np.zeros((int(place.max()) // 1024 + 1) * 512, np.uint16)
    image[place // 2] = matrix
    return image, [swizzle, 16 * leading, 16 * stride, image.nbytes, 16 * step]


def wgmma_case(
    kind, n, a_swizzle, a_mn, b_swizzle, b_mn, content="integers", a_registers=0, accumulate=1, padding=0, overlap=0
) -> Case:
    label_a = "registers" if a_registers else f"{'mn' if a_mn else 'k'}{a_swizzle}"
    label_b = f"{'mn' if b_mn else 'k'}{b_swizzle}"
    name = f"wgmma_{'bf16' if kind == BF16 else 'f16'}_n{n}_{label_a}_{label_b}_{content}_{accumulate}_{padding}"
    name += "_overlap" * overlap
    random = generator(name)
    # Rows of K hold as many elements as the swizzle spans.
    depths = [8 * 2**swizzle for swizzle, mn in ((a_swizzle, a_mn), (b_swizzle, b_mn)) if swizzle and not mn]
    depth = min(depths, default=32)
    shapes = ((64, depth), (n, depth), (64, n))
    if content == "integers":
        a, b, d = (random.integers(-3, 4, shape).astype(np.float64) for shape in shapes)
    else:
        a, b, d = (random.standard_normal(shape) for shape in shapes)
    bits_a, bits_b, d = to_bits(a, kind), to_bits(b, kind), d.astype(np.float32)
    a, b = from_bits(bits_a, kind), from_bits(bits_b, kind)

    def image(bits, swizzle, mn):
        span = 8 * 2**swizzle
        if swizzle and not mn and depth < span:
            bits = np.pad(bits, ((0, 0), (0, span - depth)))
        if swizzle and mn and len(bits) % span:
            bits = np.pad(bits, ((0, span - len(bits) % span), (0, 0)))
        return tile_image(bits, swizzle, bool(mn), padding)

    if a_registers:
        registers = np.empty((depth // 16, 4, 128), np.uint32)
        for step in range(depth // 16):
            for warp in range(4):
                block = bits_a[16 * warp : 16 * warp + 16, 16 * step : 16 * step + 16]
                registers[step, :, 32 * warp : 32 * warp + 32] = registers_of(block, fragment_a, 8)
        image_a, options_a = registers, [0, 0, 0, registers.nbytes, 0]
    else:
        image_a, options_a = image(bits_a, a_swizzle, a_mn)
    image_b, options_b = image(bits_b, b_swizzle, b_mn)
    thread, i = np.meshgrid(np.arange(128), np.arange(n // 2))
    rows = thread // 32 * 16 + thread % 32 // 4 + i // 2 % 2 * 8
    columns = i // 4 * 8 + thread % 4 * 2 + i % 2
    exact, bound = a @ b.T + (d if accumulate else 0), 2 * product_bound(a, b.T, d)
    options = [kind, n, a_registers, a_mn, b_mn, accumulate, depth // 16, *options_a, *options_b, overlap]
    return Case(
        name, "wgmma", options, raw(image_a, image_b, d[rows, columns]), exact[rows, columns].astype(np.float32),
        0.0 if content == "integers" else bound[rows, columns], sm90=True, golden=n <= 64,
    )  # fmt: skip


def wgmma_cases():
    for swizzle in (NONE, BYTES32, BYTES64, BYTES128):
        for a_mn in (0, 1):
            for b_mn in (0, 1):
                yield wgmma_case(BF16, 64, swizzle, a_mn, swizzle, b_mn)
                yield wgmma_case(BF16, 8, BYTES128, a_mn, swizzle, b_mn)
        yield wgmma_case(BF16, 128, NONE, 0, swizzle, 1, padding=64)
        yield wgmma_case(F16, 64, swizzle, 0, BYTES128, 1, accumulate=0)
        yield wgmma_case(BF16, 64, NONE, 0, swizzle, swizzle % 2, a_registers=1)
    yield wgmma_case(BF16, 256, BYTES128, 0, BYTES128, 0)
    yield wgmma_case(BF16, 256, BYTES128, 0, BYTES128, 1, accumulate=0)
    yield wgmma_case(BF16, 64, BYTES128, 0, BYTES128, 0, overlap=1)
    yield wgmma_case(BF16, 8, BYTES128, 0, BYTES128, 0, content="normal")
    yield wgmma_case(F16, 64, BYTES128, 0, BYTES128, 0, content="normal")


@cache
def all_cases() -> dict[str, Case]:
    cases = {}
    for make in (matrix_cases, mma_cases, gemm_cases, simple_cases, math_cases, tensor_cases, wgmma_cases):
        for case in make():
            assert case.name not in cases, case.name
            cases[case.name] = case
    return cases
