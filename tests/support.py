"""Comparisons and checks that the tests of all families share."""

from contextlib import contextmanager

import torch
from torch import Tensor


def assert_accurate(
    actual: Tensor, exact: Tensor, baseline: Tensor | None = None, *, factor: float = 2.0, units: float = 1.0
) -> None:
    """Holds `actual` to the error that PyTorch itself makes.

    The largest error of `actual` against the float64 result `exact` may be `factor` times that of
    `baseline` (PyTorch's own computation in the same dtype), plus `units` roundings of the largest
    finite magnitude of `exact` in actual's dtype. NaN and infinities must be in the same places.
    """
    assert actual.shape == exact.shape, f"shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    got, want = actual.detach().double().cpu(), exact.detach().double().cpu()
    assert torch.equal(got.isnan(), want.isnan()), "NaN in other places than expected"
    assert torch.equal(got.isinf(), want.isinf()), "infinities in other places than expected"
    assert torch.equal(got[got.isinf()], want[want.isinf()]), "infinities of other sign than expected"
    finite = want.isfinite()
    if not finite.any():
        return
    error = (got - want)[finite].abs().max().item()
    bound = units * torch.finfo(actual.dtype).eps * want[finite].abs().max().item()
    if baseline is not None:
        other = baseline.detach().double().cpu()
        bound += factor * (other - want)[finite & other.isfinite()].abs().max().item()
    assert error <= bound, f"error {error:.3e} above {bound:.3e}"


def check_op(op, arguments: tuple, keywords: dict | None = None) -> None:
    """opcheck: schema, autograd registration, fake kernel against a real run, ahead-of-time dispatch."""
    torch.library.opcheck(op, arguments, keywords or {})


def assert_grads(tensors: dict[str, Tensor]) -> None:
    """Every named tensor has received a gradient. opcheck does not notice a missing one."""
    missing = [name for name, tensor in tensors.items() if tensor.grad is None]
    assert not missing, f"no gradient for {missing}"


def compile_whole(function):
    """fullgraph compile with a backend that needs no compiler of its own."""
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


@contextmanager
def threads(count: int):
    """Runs a block with `count` torch threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def poison(tensor: Tensor) -> Tensor:
    """Fills a floating-point tensor with NaN: whoever reads it shows it."""
    return tensor.fill_(float("nan"))
