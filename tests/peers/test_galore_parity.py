"""GaLoreAdamW(parity="galore_torch") against the galore_torch package, step by step."""

import pytest
import torch
from galore_torch import GaLoreAdamW as PeerGaLoreAdamW

import pykern

STEPS, GAP = 9, 3


def gradients(shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) * (1 + step) for step in range(STEPS)]


def run_both(shape, rank, side, weight_decay, seed=0):
    """Nine steps over three refreshes; ours gets the peer's basis at every refresh."""
    start = 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1))
    theirs, ours = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    group = {"rank": rank, "update_proj_gap": GAP, "scale": 0.25, "proj_type": side}
    peer = PeerGaLoreAdamW(
        [{"params": [theirs], **group}], lr=0.01, weight_decay=weight_decay, no_deprecation_warning=True
    )
    refreshed = []

    def peers_basis(grad, rank, right):
        refreshed.append(len(steps))
        basis = peer.state[theirs]["projector"].ortho_matrix
        return basis.t() if right else basis

    optimizer = pykern.GaLoreAdamW(
        [{"params": [ours], **group}], lr=0.01, weight_decay=weight_decay, parity="galore_torch", projector=peers_basis
    )
    steps = []
    for gradient in gradients(shape, seed):
        theirs.grad, ours.grad = gradient.clone(), gradient.clone()
        peer.step()
        optimizer.step()
        steps.append((theirs.detach().clone(), ours.detach().clone()))
    assert refreshed == [0, 3, 6]
    return steps, peer.state[theirs], optimizer.state[ours]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("side", ["std", "reverse_std", "left", "right"])
@pytest.mark.parametrize("shape, rank", [((96, 40), 8), ((40, 96), 8), ((33, 65), 5), ((64, 64), 1)], ids=str)
def test_nine_steps_over_three_refreshes(shape, rank, side, weight_decay):
    steps, theirs, ours = run_both(shape, rank, side, weight_decay)
    for peer, param in steps:
        assert (peer - param).abs().max() <= 1e-6
    torch.testing.assert_close(ours["exp_avg"], theirs["exp_avg"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours["exp_avg_sq"], theirs["exp_avg_sq"], rtol=1e-4, atol=1e-5)
    assert ours["step"].item() == theirs["step"] == STEPS


def test_plain_group():
    start = 0.1 * torch.randn(50)
    theirs, ours = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    peer = PeerGaLoreAdamW([theirs], lr=0.01, weight_decay=0.1, no_deprecation_warning=True)
    optimizer = pykern.GaLoreAdamW([ours], lr=0.01, weight_decay=0.1, parity="galore_torch")
    for gradient in gradients((50,), 3):
        theirs.grad, ours.grad = gradient.clone(), gradient.clone()
        peer.step()
        optimizer.step()
        assert (theirs - ours).abs().max() <= 1e-6


@pytest.mark.parametrize("shape", [(60, 30), (30, 60)], ids=str)
def test_own_basis_spans_the_peers_subspace(shape):
    """The same subspace from the Gram matrix as from the package's singular value decomposition."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = torch.randn(shape[0], 6, generator=generator), torch.randn(6, shape[1], generator=generator)
    gradient = rows @ torch.diag(2.0 ** -torch.arange(6)) @ columns + 1e-3 * torch.randn(shape, generator=generator)
    theirs, ours = torch.nn.Parameter(torch.zeros(shape)), torch.nn.Parameter(torch.zeros(shape))
    theirs.grad, ours.grad = gradient.clone(), gradient.clone()
    group = {"rank": 4, "update_proj_gap": GAP, "scale": 0.25, "proj_type": "std"}
    peer = PeerGaLoreAdamW([{"params": [theirs], **group}], lr=0.01, no_deprecation_warning=True)
    optimizer = pykern.GaLoreAdamW([{"params": [ours], **group}], lr=0.01)
    peer.step()
    optimizer.step()
    basis = peer.state[theirs]["projector"].ortho_matrix
    basis = basis.t() if shape[0] >= shape[1] else basis
    own = optimizer.state[ours]["projector"]
    torch.testing.assert_close(own @ own.t(), basis @ basis.t(), rtol=0, atol=1e-4)
