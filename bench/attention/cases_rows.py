"""gather_rows against index_select, and the bounds of tiles against what plain PyTorch makes of them."""

from collections.abc import Callable

import torch
from torch import Tensor

import pykern
from bench.harness import Case
from pykern.attention.tiles import tree_tiles
from pykern.reference.attention import tree_tiles as plain_tree_tiles


def gather_case(prompts: int, prompt: int, responses: int, length: int, columns: int, backward: bool) -> Case:
    """The predictor rows of groups of equal responses, in bfloat16: forward, or the gradient alone."""
    host_batch = pykern.pack([[1] * prompt] * prompts, [[[2] * length] * responses] * prompts)
    tokens, predictors = host_batch.tree.num_tokens, len(host_batch.targets)

    def make() -> dict[str, Callable[[], object]]:
        device = torch.get_default_device()
        generator = torch.Generator(device).manual_seed(0)
        batch = host_batch.to(device)
        hidden = torch.randn(tokens, columns, generator=generator).bfloat16().requires_grad_(backward)
        grad_out = torch.randn(predictors, columns, generator=generator).bfloat16()
        ways: dict[str, Callable[[Tensor], Tensor]] = {
            "pykern": batch.gather,
            "pykern, bare rows": lambda hidden: pykern.gather_rows(hidden, batch.predictor_rows),
            "index_select": lambda hidden: hidden.index_select(0, batch.predictor_rows),
            "indexing": lambda hidden: hidden[batch.predictor_rows],
        }

        def timed(gather: Callable[[Tensor], Tensor]) -> Callable[[], object]:
            if not backward:
                return lambda: gather(hidden)
            out = gather(hidden)
            return lambda: torch.autograd.grad(out, hidden, grad_out, retain_graph=True)

        return {name: timed(gather) for name, gather in ways.items()}

    # The forward reads and writes a row for each token; the backward reads those and writes all packed ones.
    rows = predictors + tokens if backward else 2 * predictors
    indices = 2 * predictors + tokens if backward else predictors
    return Case(
        "attention",
        "gather_rows backward" if backward else "gather_rows",
        f"{prompts} x P={prompt} G={responses} R={length} C={columns} bfloat16",
        make,
        bytes=2.0 * rows * columns + 8.0 * indices,
    )


def tiles_case(tokens: int) -> Case:
    def make() -> dict[str, Callable[[], object]]:
        tree = pykern.PrefixTree.from_groups([tokens // 2], [[tokens // 16] * 8]).to(torch.get_default_device())
        return {
            "pykern": lambda: tree_tiles(tree.subtree_end, tree.position),
            "plain PyTorch": lambda: plain_tree_tiles(tree.subtree_end, tree.position),
        }

    return Case("attention", "prefix_attention_tiles", f"T={tokens}", make, bytes=8.0 * tokens)


def cases(device: str) -> list[Case]:
    shapes = [(4, 256, 8, 256, 1024), (2, 1024, 16, 64, 4096)]
    if device == "cuda":
        shapes.append((16, 1024, 16, 512, 4096))
    gathers = [gather_case(*shape, backward) for shape in shapes for backward in (False, True)]
    return [*gathers, tiles_case(65536)]
