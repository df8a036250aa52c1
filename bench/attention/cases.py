"""prefix_attention against what a trainer does in plain PyTorch: the PrefixGrouper split, repeated prefixes, and a
dense mask; and against a matrix product of as many operations."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import pykern
from bench.attention import cases_gpu, cases_rows, cases_trees
from bench.harness import Case


def split_attention(q: Tensor, k: Tensor, v: Tensor, prefix: int, responses: int) -> Tensor:
    """PrefixGrouper's two calls for one prompt with equal responses: prefix on prefix, then every response on
    the prefix (gathered for each) and itself."""
    length = (q.shape[0] - prefix) // responses

    def split(x: Tensor) -> tuple[Tensor, Tensor]:
        heads = x.transpose(0, 1)
        return heads[:, :prefix][None], heads[:, prefix:].unflatten(1, (responses, length)).transpose(0, 1)

    def gathered(x: Tensor) -> tuple[Tensor, Tensor]:
        first, rest = split(x)
        return first, torch.cat([first.expand(responses, -1, -1, -1), rest], dim=2)

    q_prefix, q_responses = split(q)
    (k_prefix, k_all), (v_prefix, v_all) = gathered(k), gathered(v)
    mask = torch.ones(length, prefix + length, dtype=torch.bool, device=q.device).tril(prefix)
    out_prefix = scaled_dot_product_attention(q_prefix, k_prefix, v_prefix, is_causal=True, enable_gqa=True)
    out_responses = scaled_dot_product_attention(q_responses, k_all, v_all, attn_mask=mask, enable_gqa=True)
    return torch.cat([out_prefix[0].transpose(0, 1), out_responses.permute(0, 2, 1, 3).flatten(0, 1)])


def repeated_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of whole sequences [G, P + R, heads, size], the prefix repeated in each."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """The packed tokens under a dense mask."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)


def group_case(
    prefix: int, responses: int, length: int, heads: int, key_heads: int, size: int, dtype: torch.dtype, backward: bool
) -> Case:
    """One prompt with equal responses: the forward, or the backward alone."""
    tree = pykern.PrefixTree.from_groups([prefix], [[length] * responses])
    flops = tree.flops(heads, size, backward=True) - tree.flops(heads, size) if backward else tree.flops(heads, size)

    def make() -> dict[str, Callable[[], object]]:
        generator = torch.Generator().manual_seed(0)
        device = torch.get_default_device()
        on_device = tree.to(device)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device="cpu").to(device, dtype)

        count = tree.num_tokens
        packed = [randn(count, number, size) for number in (heads, key_heads, key_heads, heads)]
        rows = on_device.sequence_rows.to(device)
        whole = [x[rows].unflatten(0, (responses, prefix + length)) for x in packed]
        at = torch.arange(count)
        mask = (at <= at[:, None]) & (at[:, None] < on_device.subtree_end)

        def timed(function: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor):
            inputs = [x.detach().clone().requires_grad_(backward) for x in (q, k, v)]
            if not backward:
                return lambda: function(*inputs)
            out = function(*inputs)
            return lambda: torch.autograd.grad(out, inputs, grad_out, retain_graph=True)

        # As many operations as the case has, nearly square, of sizes that suit the vendor's kernels: time over
        # pykern's is pykern's share of the product's rate.
        edge = max(64, round((flops / 2) ** (1 / 3) / 64) * 64)
        left, right = randn(round(flops / (2 * edge**2)), edge), randn(edge, edge)
        product = torch.empty(left.shape[0], edge, dtype=dtype)
        return {
            "pykern": timed(lambda q, k, v: pykern.prefix_attention(q, k, v, on_device), *packed),
            "split": timed(lambda q, k, v: split_attention(q, k, v, prefix, responses), *packed),
            "prefix repeated": timed(repeated_attention, *whole),
            "dense mask": timed(lambda q, k, v: masked_attention(q, k, v, mask), *packed),
            "matrix product": lambda: torch.mm(left, right, out=product),
        }

    kind = str(dtype).removeprefix("torch.")
    element = torch.finfo(dtype).bits // 8
    # Read q, k, v, and out in the backward, and its gradient; written: out, or the other gradients.
    tensors = (heads + key_heads) * 2 + (2 * heads + 2 * key_heads if backward else 0)
    return Case(
        family="attention",
        name=f"prefix_attention {'backward' if backward else 'forward'} {kind}",
        shape=f"P={prefix} G={responses} R={length} H={heads}/{key_heads} D={size}",
        make=make,
        flops=flops,
        bytes=tree.num_tokens * size * element * tensors,
        dtype="float32" if dtype == torch.float32 else "bfloat16",
    )


def cases(device: str) -> list[Case]:
    others = [*cases_rows.cases(device), *cases_trees.cases(device)]
    if device == "cuda":
        return [*cases_gpu.cases(), *others]
    groups = [(1024, 8, 128), (512, 8, 512), (4096, 16, 256), (256, 64, 64)]
    attention = [
        group_case(*group, 8, 2, size, dtype, backward)
        for group in groups
        for size in (64, 128)
        for dtype in (torch.float32, torch.bfloat16)
        for backward in (False, True)
    ]
    return [*attention, *others]
