"""ApolloAdamW and ApolloMini with parity="apollo_torch" against the apollo_torch package, step by step."""

import pytest
import torch
from apollo_torch import APOLLOAdamW as PeerApolloAdamW

import pykern
from tests.peers.steps import GAP, SHAPES, assert_same_steps, two_parameters

PRESETS = {"channel": pykern.ApolloAdamW, "tensor": pykern.ApolloMini}


def peers_draws(index):
    """The bases that the package draws for its parameter of this number: by a seed that the last one's follows."""
    seed = index

    def draw(grad, rank, right):
        nonlocal seed
        shape = (rank, grad.shape[1]) if right else (grad.shape[0], rank)
        basis = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / rank**0.5
        largest = torch.iinfo(torch.int64).max
        seed = torch.randint(0, largest, (15,), generator=torch.Generator().manual_seed(seed))[-1].item()
        return basis.mT if right else basis

    return draw


def run_both(shape, rank, *, drawn, scale_type, scale, scale_front, disable_nl, weight_decay=0.1, after=None):
    theirs, ours = two_parameters(shape)
    group = {"rank": rank, "update_proj_gap": GAP, "scale": scale, "proj_type": "std"}
    peer = PeerApolloAdamW(
        [{"params": [theirs], **group, "proj": "random" if drawn else "svd", "scale_type": scale_type}],
        lr=0.01, weight_decay=weight_decay, scale_front=scale_front, disable_nl=disable_nl,
    )  # fmt: skip
    optimizer = PRESETS[scale_type](
        [{"params": [ours], **group}], lr=0.01, weight_decay=weight_decay, parity="apollo_torch",
        projector=peers_draws(1) if drawn else "svd", scale_first=scale_front,
        growth_limit=0.0 if disable_nl else 1.01,
    )  # fmt: skip
    norms = []

    def compare_norms(step):
        if not disable_nl:
            norms.append(peer.state[theirs]["scaled_grad"].item())
            assert optimizer.state[ours]["residual_norm"].item() == pytest.approx(norms[-1], rel=1e-5)

    assert_same_steps(peer, theirs, optimizer, ours, compare_norms)
    return norms


@pytest.mark.parametrize("disable_nl", [False, True], ids=["limited", "free"])
@pytest.mark.parametrize("scale_front", [False, True], ids=["scale-after", "scale-front"])
@pytest.mark.parametrize("scale_type, scale", [("channel", 1.0), ("channel", 3.0), ("tensor", 128.0)])
@pytest.mark.parametrize("drawn", [True, False], ids=["random", "svd"])
@pytest.mark.parametrize("shape, rank", SHAPES, ids=str)
def test_nine_steps_over_three_refreshes(shape, rank, drawn, scale_type, scale, scale_front, disable_nl):
    """The package knows one side, "std": it takes norms along the smaller axis of the gradient whatever the side is."""
    norms = run_both(
        shape, rank, drawn=drawn, scale_type=scale_type, scale=scale, scale_front=scale_front, disable_nl=disable_nl
    )
    limited = [after >= 1.009 * before for before, after in zip(norms, norms[1:])]
    assert disable_nl or any(limited), "the limiter never acted, so it was not compared"


def test_mini():
    """Rank 1 and scale 128, as the paper has them."""
    run_both((40, 96), 1, drawn=True, scale_type="tensor", scale=128.0, scale_front=False, disable_nl=False)
