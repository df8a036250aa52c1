"""The Q-GaLore preset against the q_galore_torch package: steps, rare refreshes, the basis and the weights in few bits.

The package was written for a bitsandbytes that has no optimizers on the CPU, and calls it as that one was called;
`peer_optimizer` passes the calls on as today's takes them. All of the package's own arithmetic is run as it is.
"""

from types import SimpleNamespace

import pytest
import torch
from bitsandbytes import functional
from q_galore_torch import QGaLoreAdamW8bit as PeerQGaLoreAdamW8bit
from q_galore_torch import q_galore_adamw8bit as peer_module

import pykern
from pykern.reference.lowrank_quantized import dequantize, unpack
from tests.peers.steps import GAP, gradients, two_parameters


class Peer(PeerQGaLoreAdamW8bit):
    def get_config(self, *arguments):
        return {**super().get_config(*arguments), "percentile_clipping": 100, "block_wise": True}


@pytest.fixture
def peer_optimizer(monkeypatch):
    """A function (parameter, rank, gap, bits of the basis or None) -> the package's optimizer."""

    def blockwise(name, g, p, state1, state2, beta1, beta2, *rest, **keywords):
        # beta3 and alpha of optimizers with three averages came in between.
        functional.optimizer_update_8bit_blockwise(
            name, g, p, state1, state2, beta1, beta2, 0.0, 0.0, *rest, **keywords
        )

    monkeypatch.setattr(peer_module, "F", SimpleNamespace(optimizer_update_8bit_blockwise=blockwise))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    # The package gives the base class more positional arguments than it still has.
    settings = SimpleNamespace(optim_bits=8, min_8bit_size=4096, max_unorm=0.0, skip_zeros=False)

    def make(param, rank, gap=GAP, bits=None):
        group = {
            "params": [param], "rank": rank, "update_proj_gap": gap, "scale": 0.25, "proj_type": "std",
            "quant": bits is not None, "quant_group_size": 256, "quant_n_bit": bits or 8,
            "cos_threshold": 0.4, "gamma_proj": 2, "queue_size": 5,
        }  # fmt: skip
        return Peer([group], lr=0.01, weight_decay=0.1, args=settings)

    return make


def own_optimizer(param, rank, gap=GAP, **options):
    group = {"params": [param], "rank": rank, "update_proj_gap": gap}
    return pykern.QGaLoreAdamW8bit([group], lr=0.01, weight_decay=0.1, projector="svd", **options)


@pytest.mark.parametrize("shape, rank", [((16, 512), 8), ((24, 512), 12)], ids=str)
def test_nine_steps(peer_optimizer, shape, rank):
    """Where the package's flat blocks are rows of ours: more columns than rows, and a multiple of 256."""
    theirs, ours = two_parameters(shape)
    start = theirs.detach().clone()
    peer, optimizer = peer_optimizer(theirs, rank), own_optimizer(ours, rank, projector_format="dense")
    for gradient in gradients(shape):
        theirs.grad, ours.grad = gradient.clone(), gradient.clone()
        peer.step()
        optimizer.step()
        assert (theirs - ours).norm() <= 5e-3 * (theirs - start).norm()
    assert (theirs - start).abs().max() > 1e-3, "the peer did not move"
    state, peers = optimizer.state[ours], peer.state[theirs]
    for number, name in ((1, "exp_avg"), (2, "exp_avg_sq")):
        torch.testing.assert_close(state[f"{name}_scale"], peers[f"absmax{number}"].view(rank, -1), rtol=1e-2, atol=0)
        # On the CPU bitsandbytes looks codes up in a grid, which takes a farther code here and there.
        assert (peers[f"state{number}"] != state[name]).float().mean() < 0.1


@pytest.mark.parametrize("stays", [True, False])
def test_refreshes_grow_rare(peer_optimizer, stays):
    """In the steps that the package refreshes in, while the first vector stays and while it does not."""
    theirs, ours = two_parameters((16, 512))
    peer, optimizer = peer_optimizer(theirs, 8, gap=1), own_optimizer(ours, 8, gap=1)
    generator = torch.Generator().manual_seed(2)
    kept = torch.randn(16, 1, generator=generator) @ torch.randn(1, 512, generator=generator)
    counts = []
    for _ in range(20):
        gradient = torch.randn(16, 512, generator=generator) + (kept if stays else 0.0)
        theirs.grad, ours.grad = gradient.clone(), gradient.clone()
        peer.step()
        optimizer.step()
        counts.append((peer.state[theirs]["projector"].svd_count, int(optimizer.state[ours]["refreshes"])))
    assert all(peers == own for peers, own in counts)
    assert (counts[-1][0] < 10) == stays


@pytest.mark.parametrize("bits", [4, 8])
def test_basis_in_few_bits(peer_optimizer, bits):
    """The same levels an equal width apart; the package rounds where they begin, so ours are as near or nearer."""
    theirs, ours = two_parameters((768, 512))
    peer, optimizer = peer_optimizer(theirs, 8, bits=bits), own_optimizer(ours, 8, projector_format=f"int{bits}")
    gradient = gradients((768, 512))[0]
    theirs.grad, ours.grad = gradient.clone(), gradient.clone()
    peer.step()
    optimizer.step()
    basis = torch.linalg.svd(gradient, full_matrices=False)[2][:8]
    projector, state = peer.state[theirs]["projector"], optimizer.state[ours]
    peers = projector.ortho_matrix_scales * (projector.ortho_matrix.float() - projector.ortho_matrix_zeros)
    codes = state["projector_codes"] if bits == 8 else unpack(state["projector_codes"], 512)
    own = dequantize(codes, state["projector_scale"], state["projector_zero"])
    torch.testing.assert_close(state["projector_scale"], projector.ortho_matrix_scales.view(8, 2), rtol=1e-6, atol=0)
    far, near = ((quantised - basis).norm() / basis.norm() for quantised in (peers.view(8, 512), own))
    assert near <= far * 1.02 and near < {4: 0.15, 8: 0.01}[bits]


def test_weights_in_8_bits(peer_optimizer):
    """A step of weights that are kept in 8 bits: both within a level of what the step is in floating point."""
    shape, rank = (16, 512), 8
    theirs, exact = two_parameters(shape)
    layer = torch.nn.Linear(512, 16, bias=False)
    layer.weight = torch.nn.Parameter(theirs.detach().clone())
    layer = pykern.lowrank.Int8Linear.from_linear(layer)
    # Of weights that straddle zero the package's groups have the same width of a level as ours.
    codes, scales, zeros = Peer._quantize(None, theirs.detach(), q_group_size=256)
    torch.testing.assert_close(layer.weight_scale, scales.view(16, 2), rtol=1e-6, atol=0)
    exact.data.copy_(layer.dequantized())
    theirs.requires_grad_(False)
    theirs.data, theirs.scales, theirs.zeros = codes, scales, zeros
    theirs.group_size, theirs.stochastic_round = 256, True
    gradient = gradients(shape)[0]
    theirs.float_grad, exact.grad, layer.weight.grad = gradient.clone(), gradient.clone(), gradient.clone()
    peer = peer_optimizer(theirs, rank)
    peer.step()
    for param in (exact, layer.weight):
        own_optimizer(param, rank, projector_format="dense").step()
    peers = peer._dequantize(theirs.data, torch.float32, 256, theirs.scales, theirs.zeros)
    moved = (exact - two_parameters(shape)[0]).norm()
    far, near = ((stepped - exact).norm() for stepped in (peers, layer.dequantized()))
    level = layer.weight_scale.max()
    assert (layer.dequantized() - exact).abs().max() <= level
    assert near <= far and near < moved
