"""Built-in functions of the emulated machine against their definitions, and its settings."""

import numpy as np
import pytest
import torch

from tests.support import emulator

SIZE = 200  # the last block of 64 threads is partly beyond the end


def values(low: float = -3, high: float = 3) -> np.ndarray:
    return np.random.default_rng(1).uniform(low, high, SIZE).astype(np.float32)


def in_warps(x: np.ndarray, blocks_of: int = 64) -> np.ndarray:
    """[warps, 32], the input padded with zeros to whole blocks as the probes read it."""
    padded = np.zeros(-(-len(x) // blocks_of) * blocks_of, np.float32)
    padded[: len(x)] = x
    return padded.reshape(-1, 32)


def probe(name: str, x: np.ndarray, argument: int = 0, threads: int = 64) -> np.ndarray:
    return emulator().run_probe(name, x, threads, argument)


def check(name: str, x: np.ndarray, expected: np.ndarray, argument: int = 0) -> None:
    np.testing.assert_array_equal(probe(name, x, argument), expected.reshape(-1)[:SIZE].astype(np.float32))


LANES = np.arange(32)


@pytest.mark.parametrize("bits", [1, 5, 16, 31])
def test_shuffle_xor(bits):
    x = values()
    check("shuffle_xor", x, in_warps(x)[:, LANES ^ bits], bits)


@pytest.mark.parametrize("delta", [1, 7, 31])
def test_shuffle_up(delta):
    x = values()
    check("shuffle_up", x, in_warps(x)[:, np.where(LANES >= delta, LANES - delta, LANES)], delta)


@pytest.mark.parametrize("delta", [1, 15, 16])
def test_shuffle_down_in_half_warps(delta):
    x = values()
    check("shuffle_down_16", x, in_warps(x)[:, np.where(LANES % 16 + delta < 16, LANES + delta, LANES)], delta)


@pytest.mark.parametrize("source", [0, 3, 9])
def test_shuffle_from_a_lane_of_each_eighth(source):
    x = values()
    check("shuffle_index_8", x, in_warps(x)[:, LANES // 8 * 8 + source % 8], source)


def test_ballot():
    x = values()
    ballots = ((in_warps(x) > 0) * (1 << LANES)).sum(1, keepdims=True)
    for bit in (0, 8, 24):
        check("ballot", x, np.broadcast_to(ballots >> bit & 0xFF, in_warps(x).shape), bit)


def test_match_any():
    x = values()
    whole = in_warps(x).astype(np.int32)
    masks = ((whole[:, :, None] == whole[:, None, :]) * (1 << LANES)).sum(2)
    for bit in (0, 16):
        check("match_any", x, masks >> bit & 0xFF, bit)


def test_integer_minimum_is_signed():
    x = values()
    whole = in_warps(x).astype(np.int32)
    check("integer_min", x, np.broadcast_to(whole.min(1, keepdims=True), whole.shape))


def test_block_sums_are_exact_in_any_order():
    x = values().round()
    blocks = in_warps(x).reshape(-1, 64)
    check("block_sum", x, np.broadcast_to(blocks.sum(1, keepdims=True), blocks.shape))
    warps = in_warps(x)
    check("warp_sum", x, np.broadcast_to(warps.sum(1, keepdims=True), warps.shape))
    check("ticket", x, np.broadcast_to(blocks.sum(1, keepdims=True), blocks.shape))


def test_block_votes():
    x = values()
    blocks = in_warps(x).reshape(-1, 64)
    check("block_count", x, np.broadcast_to((blocks > 0).sum(1, keepdims=True), blocks.shape))
    both = (blocks > -2).all(1, keepdims=True) * 2 + (blocks > 2).any(1, keepdims=True)
    check("block_all", x, np.broadcast_to(both, blocks.shape))


@pytest.mark.parametrize("name, dtype", [("through_bfloat16", torch.bfloat16), ("through_float16", torch.float16)])
def test_conversions_round_to_nearest_even(name, dtype):
    everything = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype).float()
    finite = everything[everything.isfinite()]
    nudged = torch.cat(
        [finite, finite * (1 + 2**-11), finite * (1 + 2**-9), torch.rand(500) * 1e-7, torch.rand(500) * 1e5]
    )
    special = torch.tensor(
        [float("inf"), -float("inf"), float("nan"), 65519.9, 65520.0, 2.0**-25, 1.5 * 2.0**-25, -0.0]
    )
    x = torch.cat([nudged, special])
    got = torch.from_numpy(probe(name, x.numpy(), threads=1024))
    want = x.to(dtype).float()
    assert torch.equal(got.isnan(), want.isnan())
    keep = ~want.isnan()
    assert torch.equal(got[keep], want[keep])
    assert torch.equal(got[keep].signbit(), want[keep].signbit())


def test_every_probe_is_used():
    text = open(__file__).read()
    assert all(f'"{name}"' in text for name in emulator().probes())


def test_orders_are_checked():
    with pytest.raises(ValueError, match="orders: expected 'forward'"):
        emulator().set_orders(["sideways"])
    with pytest.raises(ValueError, match="at least one"):
        emulator().set_orders([])
    assert len(emulator().orders()) >= 3


def test_counters_count_every_order():
    before = emulator().counters()
    probe("warp_sum", values())
    after = emulator().counters()
    assert after["launches"] == before["launches"] + 1
    assert after["threads"] == before["threads"] + 256 * len(emulator().orders())
