"""FiraAdamW(parity="fira") against the fira package, step by step."""

import pytest
from fira import FiraAdamW as PeerFiraAdamW

import pykern
from tests.peers.steps import GAP, SHAPES, assert_same_steps, two_parameters


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("alpha", [1.0, 0.25])
@pytest.mark.parametrize("side", ["std", "reverse_std", "left", "right"])
@pytest.mark.parametrize("shape, rank", SHAPES, ids=str)
def test_nine_steps_over_three_refreshes(shape, rank, side, alpha, weight_decay):
    """With our own singular vectors. The package has no residual on side "full": its shapes don't fit."""
    theirs, ours = two_parameters(shape)
    group = {"rank": rank, "update_proj_gap": GAP, "alpha": alpha, "proj_type": side}
    peer = PeerFiraAdamW(
        [{"params": [theirs], **group}], lr=0.01, weight_decay=weight_decay, no_deprecation_warning=True
    )
    optimizer = pykern.FiraAdamW([{"params": [ours], **group}], lr=0.01, weight_decay=weight_decay, parity="fira")
    norms = [0.0]

    def compare_norms(step):
        norms.append(peer.state[theirs]["scaling_grad"].item())
        assert optimizer.state[ours]["residual_norm"].item() == pytest.approx(norms[-1], rel=1e-5)

    assert_same_steps(peer, theirs, optimizer, ours, compare_norms)
    limited = [after >= 1.009 * before for before, after in zip(norms[1:], norms[2:])]
    assert any(limited), "the limiter never acted, so it was not compared"
