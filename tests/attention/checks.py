"""prefix_attention held to its float64 reference, with any options, on any device."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import pykern
from pykern.reference import attention as reference
from tests.attention.trees import make_inputs
from tests.support import assert_accurate

RESULTS = ["out", "lse", "grad_q", "grad_k", "grad_v"]

OPTIONS = {
    "window of two": {"window": 2},
    "window": {"window": 21},
    "wide window": {"window": 150},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": True},
    "alibi": {"alibi": True},
    "all": {"window": 45, "softcap": 4.0, "sinks": True, "alibi": True},
}
"""Every option alone and all together, as keywords of `ours`, `plain` and `check`."""


def run(function: Callable, inputs: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
    """The function's outputs, and the gradients of its inputs for `grads` of its first outputs."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = function(*leaves)
    return [*(x.detach() for x in outputs), *torch.autograd.grad(outputs[: len(grads)], leaves, grads)]


def make_sinks(heads: int) -> Tensor:
    """float32 [heads], below, among and above the logits of `make_inputs`."""
    return torch.linspace(-2.0, 5.0, heads) if heads > 1 else torch.ones(1)


def make_slopes(heads: int) -> Tensor:
    """float32 [heads]: a geometric series, as ALiBi takes them."""
    return torch.exp2(-4.0 * torch.arange(1, heads + 1) / heads)


def ours(tree, *, sinks: bool = False, alibi: bool = False, **options) -> Callable:
    """prefix_attention as a function of q, k, v and, with `sinks`, those: (out, lse), and what options ask for."""

    def function(q, k, v, *given):
        slopes = make_slopes(q.shape[1]).to(q.device) if alibi else None
        return pykern.prefix_attention(
            q, k, v, tree, sinks=given[0] if sinks else None, alibi_slopes=slopes, return_lse=True, **options
        )

    return function


def plain(tree, *, sinks: bool = False, alibi: bool = False, **options) -> Callable:
    """The same of the reference: (out, lse, max_logits)."""
    tree = tree.to("cpu")

    def function(q, k, v, *given):
        slopes = make_slopes(q.shape[1]) if alibi else None
        return reference.prefix_attention(
            q, k, v, tree.subtree_end, tree.position, sinks=given[0] if sinks else None, alibi_slopes=slopes, **options
        )

    return function


def check(
    tree: pykern.PrefixTree,
    heads: int,
    key_heads: int,
    size: int,
    value_size: int,
    dtype: torch.dtype,
    *,
    device: torch.device | str = "cpu",
    order_invariant: bool = False,
    factor: float = 2.0,
    magnitude: float = 1.0,
    **options,
) -> list[Tensor]:
    """Forward and backward, the gradient of lse included, against float64 and PyTorch's own error."""
    q, k, v, grad_out = make_inputs(tree, heads, key_heads, size, value_size, dtype)
    inputs = [q * magnitude, k, v, *([make_sinks(heads)] if options.get("sinks") else [])]
    # lse is -inf, and has no gradient, where a row sees nothing.
    grads = (grad_out, torch.randn(tree.num_tokens, heads))
    mine = ours(tree.to(device), return_max_logits=True, order_invariant=order_invariant, **options)
    statistic = torch.float64 if dtype == torch.float64 else torch.float32
    actual = run(mine, [x.to(device) for x in inputs], (grad_out.to(device), grads[1].to(device, statistic)))
    exact = run(plain(tree, **options), [x.double() for x in inputs], [x.double() for x in grads])
    baseline = run(plain(tree, **options), [x.to(dtype) for x in inputs], [x.to(dtype) for x in grads])
    names = ["out", "lse", "max_logits", "grad_q", "grad_k", "grad_v", *(["grad_sinks"] if len(inputs) > 3 else [])]
    for name, got, want, other in zip(names, actual, exact, baseline, strict=True):
        of_inputs = name in ("out", "grad_q", "grad_k", "grad_v")
        expected = dtype if of_inputs else torch.float32 if name == "grad_sinks" else statistic
        assert got.dtype == expected, name
        assert got.device.type == torch.device(device).type, name
        if name.startswith("grad"):
            want, other = want.nan_to_num(), other.nan_to_num()
        # Where few keys are seen, as in a short window, gradients of logits cancel to a rounding of their terms,
        # float32's own unit.
        few = 2.0 if name.startswith("grad") and options.get("window") else 1.0
        units = 1.0 if dtype in (torch.bfloat16, torch.float16) else 4.0 * few if dtype == torch.float32 else 20.0
        assert_accurate(got, want, other, factor=factor, units=units)
    return actual
