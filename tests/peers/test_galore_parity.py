"""The GaLore presets against the galore_torch package, step by step."""

import pytest
import torch
from galore_torch import GaLoreAdafactor as PeerGaLoreAdafactor
from galore_torch import GaLoreAdamW as PeerGaLoreAdamW
from galore_torch import GaLoreAdamW8bit as PeerGaLoreAdamW8bit

import pykern
from tests.peers.steps import GAP, SHAPES, STEPS, assert_same_steps, gradients, two_parameters

SIDES = ["std", "reverse_std", "left", "right", "full"]


def group_of(param, rank, side):
    return [{"params": [param], "rank": rank, "update_proj_gap": GAP, "scale": 0.25, "proj_type": side}]


def peer_adamw(params, weight_decay=0.0, eps=1e-6):
    return PeerGaLoreAdamW(params, lr=0.01, weight_decay=weight_decay, eps=eps, no_deprecation_warning=True)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape, rank", SHAPES, ids=str)
def test_adamw(shape, rank, side, weight_decay):
    """With our own singular vectors.

    Between two bases R is diagonal when they are chosen; what rounding leaves beside the diagonal would be divided by
    its own size, so epsilon is to be larger than that.
    """
    theirs, ours = two_parameters(shape)
    eps = 1e-3 if side == "full" else 1e-6
    peer = peer_adamw(group_of(theirs, rank, side), weight_decay, eps)
    optimizer = pykern.GaLoreAdamW(
        group_of(ours, rank, side), lr=0.01, weight_decay=weight_decay, eps=eps, parity="galore_torch"
    )
    assert_same_steps(peer, theirs, optimizer, ours)
    state, right = optimizer.state[ours], peer.state[theirs]["exp_avg"].shape[0] > rank
    for name in ("exp_avg", "exp_avg_sq"):
        peers = peer.state[theirs][name]
        torch.testing.assert_close(state[name], peers.mT if right else peers, rtol=1e-4, atol=1e-5)
    assert state["step"].item() == peer.state[theirs]["step"] == STEPS


@pytest.mark.parametrize("side", SIDES[:4])
def test_adamw_with_the_peers_basis(side):
    """An injected basis is asked for exactly when the package chooses one."""
    theirs, ours = two_parameters((33, 65))
    peer, refreshed, steps = peer_adamw(group_of(theirs, 5, side)), [], []

    def peers_basis(grad, rank, right):
        refreshed.append(len(steps))
        basis = peer.state[theirs]["projector"].ortho_matrix
        return basis.t() if right else basis

    optimizer = pykern.GaLoreAdamW(group_of(ours, 5, side), lr=0.01, parity="galore_torch", projector=peers_basis)
    assert_same_steps(peer, theirs, optimizer, ours, steps.append)
    assert refreshed == [0, 3, 6]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape, rank", SHAPES, ids=str)
def test_adafactor(shape, rank, side, momentum):
    theirs, ours = two_parameters(shape)
    peer = PeerGaLoreAdafactor(
        group_of(theirs, rank, side), lr=0.01, beta1=momentum or None, weight_decay=0.1,
        scale_parameter=False, relative_step=False,
    )  # fmt: skip
    optimizer = pykern.GaLoreAdafactor(
        group_of(ours, rank, side), lr=0.01, momentum=momentum, weight_decay=0.1, projector="svd"
    )
    assert_same_steps(peer, theirs, optimizer, ours)


def test_adafactor_under_a_changing_rate():
    """The package averages updates with their rates in them; so do we."""
    theirs, ours = two_parameters((40, 96))
    peer = PeerGaLoreAdafactor(
        group_of(theirs, 8, "std"), lr=0.01, beta1=0.9, scale_parameter=False, relative_step=False
    )
    rate = torch.tensor(0.01, dtype=torch.float64)
    optimizer = pykern.GaLoreAdafactor(group_of(ours, 8, "std"), lr=rate, momentum=0.9, projector="svd")

    def schedule(step):
        peer.param_groups[0]["lr"] *= 0.7
        rate.mul_(0.7)

    assert_same_steps(peer, theirs, optimizer, ours, schedule)


@pytest.mark.parametrize("shape, rank", [((16, 512), 8), ((24, 512), 12)], ids=str)
def test_adamw_8bit(shape, rank, monkeypatch):
    """Where the package's flat blocks are rows of ours: left side, length a multiple of 256, 4096 elements or more.

    On the CPU bitsandbytes looks codes up in a grid, which takes a farther code here and there.
    """
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    theirs, ours = two_parameters(shape)
    start = theirs.detach().clone()
    peer = PeerGaLoreAdamW8bit(group_of(theirs, rank, "left"), lr=0.01, weight_decay=0.1)
    optimizer = pykern.GaLoreAdamW8bit(group_of(ours, rank, "left"), lr=0.01, weight_decay=0.1, projector="svd")
    for gradient in gradients(shape):
        theirs.grad, ours.grad = gradient.clone(), gradient.clone()
        peer.step()
        optimizer.step()
        assert (theirs - ours).norm() <= 5e-3 * (theirs - start).norm()
    state, peers = optimizer.state[ours], peer.state[theirs]
    for number, name in ((1, "exp_avg"), (2, "exp_avg_sq")):
        scales = peers[f"absmax{number}"].view(rank, -1)
        torch.testing.assert_close(state[f"{name}_scale"], scales, rtol=1e-2, atol=0)
        assert (peers[f"state{number}"] != state[name]).float().mean() < 0.1


def test_plain_group():
    theirs, ours = two_parameters((50,))
    peer = peer_adamw([theirs], 0.1)
    optimizer = pykern.GaLoreAdamW([ours], lr=0.01, weight_decay=0.1, parity="galore_torch")
    assert_same_steps(peer, theirs, optimizer, ours)


@pytest.mark.parametrize("shape", [(60, 30), (30, 60)], ids=str)
def test_own_basis_spans_the_peers_subspace(shape):
    """The same subspace from the Gram matrix as from the package's singular value decomposition."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = torch.randn(shape[0], 6, generator=generator), torch.randn(6, shape[1], generator=generator)
    gradient = rows @ torch.diag(2.0 ** -torch.arange(6)) @ columns + 1e-3 * torch.randn(shape, generator=generator)
    theirs, ours = torch.nn.Parameter(torch.zeros(shape)), torch.nn.Parameter(torch.zeros(shape))
    theirs.grad, ours.grad = gradient.clone(), gradient.clone()
    peer, optimizer = peer_adamw(group_of(theirs, 4, "std")), pykern.GaLoreAdamW(group_of(ours, 4, "std"), lr=0.01)
    peer.step()
    optimizer.step()
    basis = peer.state[theirs]["projector"].ortho_matrix
    basis = basis.t() if shape[0] >= shape[1] else basis
    own = optimizer.state[ours]["projector"]
    torch.testing.assert_close(own @ own.t(), basis @ basis.t(), rtol=0, atol=1e-4)
