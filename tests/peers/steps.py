"""Nine steps over three refreshes of a peer's optimizer and one of ours, on the same gradients."""

import torch

from tests.support import threads

STEPS, GAP = 9, 3
SHAPES = [((96, 40), 8), ((40, 96), 8), ((33, 65), 5), ((64, 64), 3)]


def gradients(shape, seed=0):
    """Random, and larger from step to step, so that limits on growth act."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) * (1 + step) for step in range(STEPS)]


def two_parameters(shape, seed=1):
    start = 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())


def assert_same_steps(peer, theirs, optimizer, ours, after=lambda step: None):
    """Every step of both within 1e-6; `after` may look at the states after each."""
    before = theirs.detach().clone()
    for step, gradient in enumerate(gradients(theirs.shape)):
        theirs.grad, ours.grad = gradient.clone(), gradient.clone()
        # The packages call LAPACK for small matrices, whose threads take longer to meet than to work.
        with threads(1):
            peer.step()
            optimizer.step()
        assert (theirs - ours).abs().max() <= 1e-6, f"step {step}"
        after(step)
    assert (theirs - before).abs().max() > 1e-3, "the peer did not move"
