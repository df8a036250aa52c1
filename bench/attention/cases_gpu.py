"""prefix_attention on a GPU at the sizes of training: groups under prompts and causal documents, 4k and 32k tokens.

Rates count visible pairs alone, the backward as 2.5 forwards, so they compare with the published ones of other masks.
"""

from collections.abc import Callable

import torch
from torch import Tensor

import pykern
from bench.harness import Case

HEADS, KEY_HEADS, SIZE = 64, 8, 128


def trees() -> dict[str, pykern.PrefixTree]:
    """Names as they stand in the records."""

    def documents(tokens: int, mean: int) -> pykern.PrefixTree:
        # Ragged: every fourth has a half, three quarters, once and one and three quarter times the mean.
        shares = (0.5, 0.75, 1.0, 1.75)
        lengths = [int(mean * shares[index % 4]) for index in range(tokens // mean)]
        return pykern.PrefixTree.from_groups(lengths, [[] for _ in lengths])

    return {
        "groups 32k": pykern.PrefixTree.from_groups([2048] * 4, [[768] * 8] * 4),
        "documents 32k": documents(32768, 2048),
        "causal 32k": pykern.PrefixTree.from_groups([32768], [[]]),
        "groups 4k": pykern.PrefixTree.from_groups([1024], [[384] * 8]),
        "documents 4k": documents(4096, 1024),
    }


def flex(tree: pykern.PrefixTree) -> Callable[..., Tensor]:
    """FlexAttention, compiled, with its block mask made beforehand."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    subtree_end = tree.subtree_end

    def visible(batch, head, query, key):
        return (key <= query) & (query < subtree_end[key])

    tokens = tree.num_tokens
    mask = create_block_mask(visible, None, None, tokens, tokens, device=str(subtree_end.device))
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads_first = (x.transpose(0, 1)[None] for x in (q, k, v))
        return compiled(*heads_first, block_mask=mask, enable_gqa=True)[0].transpose(0, 1)

    return attend


def variable_lengths(tree: pykern.PrefixTree) -> Callable[..., Tensor]:
    """PyTorch's attention over sequences of any length, each prefix repeated; gathering them is part of the time.

    Its output stays repeated, as a trainer without trees has it.
    """
    from torch.nn.attention.varlen import varlen_attn

    rows, cu_seqlens = tree.sequence_rows, tree.cu_seqlens
    longest = int(cu_seqlens.diff().max())
    repeated = len(rows) != tree.num_tokens

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if repeated:
            q, k, v = q[rows], k[rows], v[rows]
        return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, window_size=(-1, 0), enable_gqa=True)

    return attend


def training_case(name: str, tree: pykern.PrefixTree, backward: bool) -> Case:
    def make() -> dict[str, Callable[[], object]]:
        device = torch.get_default_device()
        own = tree.to(device)
        generator = torch.Generator(device).manual_seed(0)

        def randn(heads: int) -> Tensor:
            return torch.randn(own.num_tokens, heads, SIZE, generator=generator, device=device).bfloat16()

        inputs = [randn(heads).requires_grad_(backward) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
        grad_out = randn(HEADS)

        def timed(attend: Callable[..., Tensor]) -> Callable[[], object]:
            if not backward:
                return lambda: attend(*inputs)
            out = attend(*inputs)
            grad = grad_out if len(out) == len(grad_out) else grad_out[own.sequence_rows]
            return lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True)

        return {
            "pykern": timed(lambda q, k, v: pykern.prefix_attention(q, k, v, own)),
            "FlexAttention": timed(flex(own)),
            "PyTorch, variable lengths": timed(variable_lengths(own)),
        }

    forward = tree.flops(HEADS, SIZE)
    passes = 3 if backward else 1
    return Case(
        family="attention",
        name=f"prefix_attention {'backward' if backward else 'forward'} bfloat16",
        shape=f"{name} H={HEADS}/{KEY_HEADS} D={SIZE}",
        make=make,
        flops=2.5 * forward if backward else forward,
        bytes=tree.num_tokens * SIZE * 2.0 * 2 * (HEADS + KEY_HEADS) * passes,
        dtype="bfloat16",
    )


def cases() -> list[Case]:
    return [training_case(name, tree, backward) for name, tree in trees().items() for backward in (False, True)]
