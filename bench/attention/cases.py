"""prefix_attention against what a trainer does in plain PyTorch: the PrefixGrouper split, and repeated prefixes."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import pykern
from bench.attention import cases_rows, cases_trees
from bench.harness import Case


def split_attention(q: Tensor, k: Tensor, v: Tensor, prefix: int, responses: int, enable_gqa: bool) -> Tensor:
    """PrefixGrouper's two calls for one prompt with equal responses: prefix on prefix, then every response on
    the prefix (gathered for each) and itself."""
    length = (q.shape[0] - prefix) // responses
    group = q.shape[1] // k.shape[1]

    def split(x: Tensor) -> tuple[Tensor, Tensor]:
        heads = x.transpose(0, 1)
        return heads[:, :prefix][None], heads[:, prefix:].unflatten(1, (responses, length)).transpose(0, 1)

    def gathered(x: Tensor) -> tuple[Tensor, Tensor]:
        if not enable_gqa:
            x = x.repeat_interleave(group, dim=1)
        first, rest = split(x)
        return first, torch.cat([first.expand(responses, -1, -1, -1), rest], dim=2)

    q_prefix, q_responses = split(q)
    (k_prefix, k_all), (v_prefix, v_all) = gathered(k), gathered(v)
    mask = torch.ones(length, prefix + length, dtype=torch.bool).tril(prefix)
    out_prefix = scaled_dot_product_attention(q_prefix, k_prefix, v_prefix, is_causal=True, enable_gqa=enable_gqa)
    out_responses = scaled_dot_product_attention(q_responses, k_all, v_all, attn_mask=mask, enable_gqa=enable_gqa)
    return torch.cat([out_prefix[0].transpose(0, 1), out_responses.permute(0, 2, 1, 3).flatten(0, 1)])


def repeated_attention(q: Tensor, k: Tensor, v: Tensor, enable_gqa: bool) -> Tensor:
    """Causal attention of whole sequences [G, P + R, heads, size], the prefix repeated in each."""
    if not enable_gqa:
        group = q.shape[2] // k.shape[2]
        k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    out = scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=enable_gqa
    )
    return out.transpose(1, 2)


def group_case(
    prefix: int, responses: int, length: int, heads: int, key_heads: int, size: int, dtype: torch.dtype, backward: bool
) -> Case:
    """One prompt with equal responses: forward, or forward and backward."""
    tree = pykern.PrefixTree.from_groups([prefix], [[length] * responses])

    def make() -> dict[str, Callable[[], object]]:
        generator = torch.Generator().manual_seed(0)

        def randn(count: int) -> Tensor:
            return torch.randn(tree.num_tokens, count, size, generator=generator).to(dtype)

        q, k, v, grad_out = randn(heads), randn(key_heads), randn(key_heads), randn(heads)
        rows = tree.sequence_rows
        whole = [x[rows].unflatten(0, (responses, prefix + length)) for x in (q, k, v, grad_out)]

        def timed(function: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor):
            inputs = [x.detach().clone().requires_grad_(backward) for x in (q, k, v)]

            def call():
                out = function(*inputs)
                return torch.autograd.grad(out, inputs, grad_out) if backward else out

            return call

        packed = (q, k, v, grad_out)
        providers = {"pykern": timed(lambda q, k, v: pykern.prefix_attention(q, k, v, tree), *packed)}
        for gqa, suffix in ((True, "gqa"), (False, "heads repeated")):
            providers[f"split, {suffix}"] = timed(
                lambda q, k, v, gqa=gqa: split_attention(q, k, v, prefix, responses, gqa), *packed
            )
            providers[f"prefix repeated, {suffix}"] = timed(
                lambda q, k, v, gqa=gqa: repeated_attention(q, k, v, gqa), *whole
            )
        return providers

    passes = "forward+backward" if backward else "forward"
    kind = str(dtype).removeprefix("torch.")
    element = torch.finfo(dtype).bits // 8
    tensors = (heads + key_heads) * 2 * (3 if backward else 1)
    return Case(
        family="attention",
        name=f"prefix_attention {passes} {kind}",
        shape=f"P={prefix} G={responses} R={length} H={heads}/{key_heads} D={size}",
        make=make,
        flops=tree.flops(heads, size, backward=backward),
        bytes=tree.num_tokens * size * element * tensors,
        dtype="float32" if dtype == torch.float32 else "bfloat16",
    )


def cases(device: str) -> list[Case]:
    shapes = [(1024, 8, 128, 8, 2, 128), (512, 8, 512, 8, 2, 64), (256, 16, 64, 8, 8, 64)]
    attention = [
        group_case(*shape, dtype, backward)
        for shape in shapes
        for dtype in (torch.float32, torch.bfloat16)
        for backward in (False, True)
    ]
    return attention + cases_rows.cases(device) + cases_trees.cases(device)
