"""The 8-bit moments against bitsandbytes: the maps, and the blocks of 256 that they quantise."""

import bitsandbytes.functional as peer
import pytest
import torch

from pykern.lowrank import ops
from pykern.reference import lowrank as reference


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_maps(signed):
    """Up to the rounding of the float32 steps by which the package makes them."""
    torch.testing.assert_close(
        reference.dynamic_map(signed), peer.create_dynamic_map(signed=signed), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_quantized_blocks(signed):
    """Rows that are whole blocks lie in memory as the package's flat blocks do."""
    values = torch.randn(7, 1024) * 10 ** -torch.arange(7.0).unsqueeze(1)
    values = values if signed else values.square()
    theirs, state = peer.quantize_blockwise(values, code=peer.create_dynamic_map(signed=signed), blocksize=256)
    codes, scale = reference.quantize(values, signed)
    assert torch.equal(state.absmax.view(7, 4), scale)
    # A value half way between two codes, to the last bit, may go either way.
    differing = theirs.view(7, 1024) != codes
    assert differing.float().mean() < 1e-3
    torch.testing.assert_close(
        reference.dequantize(codes, scale, signed)[~differing],
        peer.dequantize_blockwise(theirs, state).view(7, 1024)[~differing],
        rtol=1e-6,
        atol=0,
    )


def test_five_steps_of_the_packages_optimizer():
    """AdamW8bit's weights and stored moments over five steps of one weight that is a row of blocks."""
    from bitsandbytes.optim import AdamW8bit

    start = torch.randn(1, 8192)
    theirs = torch.nn.Parameter(start.clone())
    optimizer = AdamW8bit([theirs], lr=0.01, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0)
    ours, step = start.clone(), torch.zeros(())
    state = [torch.zeros(1, 8192, dtype=torch.uint8) for _ in range(2)] + [torch.zeros(1, 32) for _ in range(2)]
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        gradient = torch.randn(1, 8192, generator=generator)
        theirs.grad = gradient.clone()
        optimizer.step()
        rule = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "corrected_eps": True, "maximize": False}
        ours -= 0.01 * ops.low_rank_adam_phase(gradient, *state, step, **rule)
    difference = (ours - theirs.detach()).norm() / (theirs.detach() - start).norm()
    assert difference < 1e-3
    peers = optimizer.state[theirs]
    torch.testing.assert_close(peers["absmax1"].view(1, 32), state[2], rtol=1e-4, atol=0)
    torch.testing.assert_close(peers["absmax2"].view(1, 32), state[3], rtol=1e-4, atol=0)
    assert (peers["state1"] != state[0]).float().mean() < 0.01
    assert (peers["state2"] != state[1]).float().mean() < 0.01
