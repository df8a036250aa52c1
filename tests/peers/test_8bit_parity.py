"""The 8-bit moments against bitsandbytes and torchao: the maps, the blocks of 256 that they quantise, and steps."""

import bitsandbytes.functional as peer
import pytest
import torch

import pykern
from pykern.reference import lowrank as reference
from tests.peers.steps import gradients, two_parameters


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


@pytest.mark.parametrize("peer", ["bitsandbytes", "torchao"])
def test_nine_steps_of_an_eight_bit_adamw(peer, monkeypatch):
    """Full-rank 8-bit AdamW of the packages against ours in the subspace that is everything: P is the identity.

    Rows of two blocks lie in memory as the packages' flat blocks do. On the CPU bitsandbytes looks codes up in a grid,
    which takes a farther code here and there. torchao compiles a function per parameter, which takes 20 seconds and
    does not change what it computes, so it is called as it is.
    """
    settings = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    theirs, ours = two_parameters((16, 512))
    start = theirs.detach().clone()
    if peer == "bitsandbytes":
        from bitsandbytes.optim import AdamW8bit
    else:
        from torchao.optim import AdamW8bit

        monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    optimizer = AdamW8bit([theirs], **settings)
    own = pykern.LowRankAdamW([ours], rank=16, projector=torch.eye(16), state_dtype="8bit", **settings)
    for gradient in gradients((16, 512)):
        theirs.grad, ours.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        own.step()
        difference = (ours - theirs).norm() / (theirs - start).norm()
        assert difference < (5e-3 if peer == "bitsandbytes" else 1e-4)
    state, peers = own.state[ours], optimizer.state[theirs]
    if peer == "bitsandbytes":
        stored = [(peers["state1"], peers["absmax1"]), (peers["state2"], peers["absmax2"])]
    else:
        stored = [(peers[name].codes, peers[name].scale) for name in ("exp_avg", "exp_avg_sq")]
    for (codes, scales), name in zip(stored, ("exp_avg", "exp_avg_sq")):
        torch.testing.assert_close(scales.view(16, 2), state[f"{name}_scale"], rtol=1e-2, atol=0)
        assert (codes != state[name]).float().mean() < (0.1 if peer == "bitsandbytes" else 1e-3)
