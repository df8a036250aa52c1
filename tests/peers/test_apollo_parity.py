"""ApolloAdamW and ApolloMini with parity="apollo_torch" against the apollo_torch package, step by step."""

import pytest
from apollo_torch import APOLLOAdamW as PeerApolloAdamW

import pykern
from tests.peers.steps import GAP, SHAPES, assert_same_steps, gradients, two_parameters

PRESETS = {"channel": pykern.ApolloAdamW, "tensor": pykern.ApolloMini}


def run_both(shape, rank, *, drawn, scale_type, scale, scale_front, disable_nl, side="std"):
    theirs, ours = two_parameters(shape)
    group = {"rank": rank, "update_proj_gap": GAP, "scale": scale, "proj_type": side}
    peer = PeerApolloAdamW(
        [{"params": [theirs], **group, "proj": "random" if drawn else "svd", "scale_type": scale_type}],
        lr=0.01, weight_decay=0.1, scale_front=scale_front, disable_nl=disable_nl,
    )  # fmt: skip
    optimizer = PRESETS[scale_type](
        [{"params": [ours], **group}], lr=0.01, weight_decay=0.1, parity="apollo_torch",
        scale_first=scale_front, growth_limit=0.0 if disable_nl else 1.01, **({} if drawn else {"projector": "svd"}),
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
    """On the side "std": the package takes channels along the smaller axis of the gradient whatever the side is."""
    norms = run_both(
        shape, rank, drawn=drawn, scale_type=scale_type, scale=scale, scale_front=scale_front, disable_nl=disable_nl
    )
    limited = [after >= 1.009 * before for before, after in zip(norms, norms[1:])]
    assert disable_nl or any(limited), "the limiter never acted, so it was not compared"


@pytest.mark.parametrize("drawn", [True, False], ids=["random", "svd"])
@pytest.mark.parametrize("side", ["reverse_std", "left", "right"])
@pytest.mark.parametrize("shape, rank", SHAPES, ids=str)
def test_sides_of_the_tensor_scale(shape, rank, side, drawn):
    """One factor for all fits the gradient on any side; between two bases the package draws none."""
    run_both(shape, rank, drawn=drawn, scale_type="tensor", scale=2.0, scale_front=False, disable_nl=False, side=side)


def test_two_parameters():
    """Each has draws of its own."""
    theirs, ours = two_parameters((40, 96)), two_parameters((40, 96))
    group = {"rank": 4, "update_proj_gap": GAP, "scale": 1.0, "proj_type": "std"}
    peer = PeerApolloAdamW([{"params": theirs, **group, "proj": "random", "scale_type": "channel"}], lr=0.01)
    optimizer = pykern.ApolloAdamW([{"params": ours, **group}], lr=0.01, parity="apollo_torch")
    for gradient in gradients((40, 96)):
        for param in (*theirs, *ours):
            param.grad = gradient.clone()
        peer.step()
        optimizer.step()
        for first, second in zip(theirs, ours, strict=True):
            assert (first - second).abs().max() <= 1e-6
    assert (ours[0] - ours[1]).abs().max() > 1e-3


def test_mini():
    """Rank 1 and scale 128, as the paper has them."""
    run_both((40, 96), 1, drawn=True, scale_type="tensor", scale=128.0, scale_front=False, disable_nl=False)
