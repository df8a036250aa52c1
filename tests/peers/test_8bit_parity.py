"""The 8-bit moments against bitsandbytes: the maps, and the blocks of 256 that they quantise."""

import bitsandbytes.functional as peer
import pytest
import torch

from pykern.lowrank import ops
from pykern.reference import lowrank as reference


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_maps(signed):
    """Up to the rounding of the float32 steps by which the package makes them."""
    torch.testing.assert_close(reference.dynamic_map(signed), peer.create_dynamic_map(signed=signed), rtol=1e-6, atol=0)


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_quantized_blocks(signed):
    """Rows that are whole blocks lie in memory as the package's flat blocks do."""
    values = torch.randn(7, 1024) * 10 ** -torch.arange(7.0).unsqueeze(1)
    values = values if signed else values.square()
    theirs, state = peer.quantize_blockwise(values, code=peer.create_dynamic_map(signed=signed), blocksize=256)
    codes, scale = reference.quantize(values, signed)
    assert torch.equal(state.absmax.view(7, 4), scale)
    # On the CPU the package looks values up in a grid, which takes a farther code here and there; never a nearer one.
    theirs = theirs.view(7, 1024)
    differing = theirs != codes
    assert differing.float().mean() < 0.05
    relative = values / scale.repeat_interleave(256, dim=1)
    table = peer.create_dynamic_map(signed=signed)
    ours_off, theirs_off = ((table[taken.long()] - relative).abs() for taken in (codes, theirs))
    assert (ours_off <= theirs_off + 1e-7)[differing].all()
    torch.testing.assert_close(
        reference.dequantize(codes, scale, signed)[~differing],
        peer.dequantize_blockwise(theirs.flatten(), state).view(7, 1024)[~differing],
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
    direction, factor = torch.empty(1, 8192), torch.empty(1, dtype=torch.float64)
    state = [torch.zeros(1, 8192, dtype=torch.uint8) for _ in range(2)] + [torch.zeros(1, 32) for _ in range(2)]
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        gradient = torch.randn(1, 8192, generator=generator)
        theirs.grad = gradient.clone()
        optimizer.step()
        rule = {"rule": 0, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "corrected_eps": True}
        lists = ([tensor] for tensor in (gradient, *state, step, direction))
        ops.low_rank_rule(*lists, factor, None, **rule)
        ours -= 0.01 * direction
    difference = (ours - theirs.detach()).norm() / (theirs.detach() - start).norm()
    assert difference < 5e-3
    peers = optimizer.state[theirs]
    torch.testing.assert_close(peers["absmax1"].view(1, 32), state[2], rtol=1e-2, atol=0)
    torch.testing.assert_close(peers["absmax2"].view(1, 32), state[3], rtol=1e-2, atol=0)
    assert (peers["state1"] != state[0]).float().mean() < 0.05
    assert (peers["state2"] != state[1]).float().mean() < 0.1
