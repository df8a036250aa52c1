"""FiraAdamW(parity="fira") against the fira package, step by step."""

import pytest
import torch
from fira import FiraAdamW as PeerFiraAdamW

import pykern

STEPS, GAP = 9, 3


def run_both(shape, rank, side, alpha, weight_decay):
    """Nine steps over three refreshes; gradients grow, so that the limiter acts."""
    generator = torch.Generator().manual_seed(0)
    start = 0.1 * torch.randn(shape, generator=generator)
    theirs, ours = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    group = {"rank": rank, "update_proj_gap": GAP, "alpha": alpha, "proj_type": side}
    peer = PeerFiraAdamW(
        [{"params": [theirs], **group}], lr=0.01, weight_decay=weight_decay, no_deprecation_warning=True
    )

    def peers_basis(grad, rank, right):
        basis = peer.state[theirs]["projector"].ortho_matrix
        return basis.t() if right else basis

    optimizer = pykern.FiraAdamW(
        [{"params": [ours], **group}], lr=0.01, weight_decay=weight_decay, parity="fira", projector=peers_basis
    )
    limited = 0
    for step in range(STEPS):
        gradient = torch.randn(shape, generator=generator) * (1 + step)
        theirs.grad, ours.grad = gradient.clone(), gradient.clone()
        before = peer.state[theirs].get("scaling_grad") if theirs in peer.state else None
        peer.step()
        optimizer.step()
        after = peer.state[theirs]["scaling_grad"]
        limited += before is not None and bool(after >= 1.009 * before)
        assert (theirs - ours).abs().max() <= 1e-6, f"step {step}"
        assert optimizer.state[ours]["residual_norm"].item() == pytest.approx(after.item(), rel=1e-5)
    return limited


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("alpha", [1.0, 0.25])
@pytest.mark.parametrize("side", ["std", "reverse_std", "left", "right"])
@pytest.mark.parametrize("shape, rank", [((96, 40), 8), ((40, 96), 8), ((33, 65), 5)], ids=str)
def test_nine_steps_over_three_refreshes(shape, rank, side, alpha, weight_decay):
    limited = run_both(shape, rank, side, alpha, weight_decay)
    assert limited > 0, "the limiter never acted, so it was not compared"
