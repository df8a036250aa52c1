"""Random trees with random options, held to float64 and to PyTorch's own error.

    python -m tests.attention.exactness --device emulated --trees 2000 --first 0

prints how many trees were checked and the largest share of the allowed error that was used, per result. A tree's
number is its seed: what fails is repeated by --first NUMBER --trees 1.
"""

import argparse
import sys
from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

import pykern
from pykern.reference import attention as reference
from tests.support import KERNELS, on, threads

RESULTS = ["out", "lse", "max_logits", "grad_q", "grad_k", "grad_v", "grad_sinks"]
FACTOR = 2.0


@dataclass
class Call:
    """One call of prefix_attention on random tensors."""

    tree: pykern.PrefixTree
    inputs: list[Tensor]  # q, k, v and, if the call has them, sinks
    grads: tuple[Tensor, Tensor]  # of out and lse
    options: dict

    def describe(self) -> str:
        q, k, v, *sinks = self.inputs
        options = {name: "given" if isinstance(value, Tensor) else value for name, value in self.options.items()}
        sizes = f"T={len(q)} heads {q.shape[1]}/{k.shape[1]} sizes {q.shape[2]}/{v.shape[2]} {q.dtype}"
        return f"{sizes} {options}{' sinks' if sinks else ''}"


def draw_tree(generator: torch.Generator, tokens: int) -> pykern.PrefixTree:
    """A forest of depth 1 to 6 with ragged, sometimes empty nodes, and sometimes padding behind."""

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    depth, nodes = integer(1, 6), integer(1, 24)
    levels, parents, lengths = [], [], []
    for node in range(nodes):
        candidates = [other for other in range(node) if levels[other] < depth - 1]
        parent = candidates[integer(0, len(candidates) - 1)] if candidates and integer(0, 5) else -1
        parents.append(parent)
        levels.append(levels[parent] + 1 if parent >= 0 else 0)
        lengths.append(0 if integer(0, 5) == 0 else integer(1, max(1, 2 * tokens // nodes)))
    tree = pykern.PrefixTree.from_parents(lengths, parents)
    if integer(0, 3):
        return tree
    rows = torch.arange(tree.num_tokens, tree.num_tokens + integer(1, 70), dtype=torch.int32)
    return pykern.PrefixTree(torch.cat([tree.subtree_end, rows]))


def draw(seed: int, kernels: bool, tokens: int) -> Call:
    """Call number `seed`; `kernels`: of a dtype that kernels for a GPU have, with sizes the emulator was built for."""
    generator = torch.Generator().manual_seed(seed)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    def choose(values: list):
        return values[integer(0, len(values) - 1)]

    tree = draw_tree(generator, tokens)
    dtype = choose([torch.bfloat16, torch.bfloat16, torch.float16] + ([] if kernels else [torch.float32] * 3))
    group, key_heads = choose([1, 1, 1, 2, 2, 3, 4, 6, 8, 16]), choose([1, 1, 2])
    heads = group * key_heads
    size = choose([8, 16, 32, 40, 64, 64, 80, 96, 128, 192, 256] if kernels else [1, 16, 20, 32, 64, 64, 80, 128])
    if dtype == torch.float16 and kernels:
        size = min(size, 64)
    value_size = min(size, 128) if size == 192 else size if integer(0, 3) else choose([8, min(size, 24)])
    shapes = [(heads, size), (key_heads, size), (key_heads, value_size), (heads, value_size)]
    count = tree.num_tokens
    q, k, v, grad_out = (torch.randn(count, *shape, generator=generator).to(dtype) for shape in shapes)
    options: dict = {}
    if integer(0, 2) == 0:
        options["scale"] = choose([0.5, 1.0, -0.3, 0.0])
    if integer(0, 2) == 0:
        options["window"] = choose([1, 7, 33, 64, 100])
    if integer(0, 2) == 0:
        options["softcap"] = choose([0.7, 5.0, 50.0])
    if integer(0, 2) == 0:
        options["alibi_slopes"] = 2.0 ** -torch.linspace(1, 8, heads)
    inputs = [q, k, v]
    if integer(0, 2) == 0:
        inputs.append(torch.randn(heads, generator=generator))
    return Call(tree, inputs, (grad_out, torch.randn(count, heads, generator=generator)), options)


def differentiate(outputs: tuple[Tensor, Tensor, Tensor], leaves: list[Tensor], grads: tuple[Tensor, Tensor]):
    out, lse, max_logits = outputs
    gradients = torch.autograd.grad((out, lse), leaves, grads)
    return dict(zip(RESULTS, [out.detach(), lse.detach(), max_logits, *gradients], strict=False))


def ours(call: Call, place: torch.device) -> dict[str, Tensor]:
    leaves = [tensor.detach().to(place).requires_grad_() for tensor in call.inputs]
    options = {name: value.to(place) if isinstance(value, Tensor) else value for name, value in call.options.items()}
    q, k, v, *sinks = leaves
    outputs = pykern.prefix_attention(
        q, k, v, call.tree.to(place), sinks=sinks[0] if sinks else None, return_lse=True, return_max_logits=True,
        **options,
    )  # fmt: skip
    return differentiate(outputs, leaves, tuple(grad.to(place) for grad in call.grads))


def plain(call: Call, dtype: torch.dtype) -> dict[str, Tensor]:
    leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in call.inputs]
    q, k, v, *sinks = leaves
    outputs = reference.prefix_attention(
        q, k, v, call.tree.subtree_end, call.tree.position, sinks=sinks[0] if sinks else None, **call.options
    )
    return differentiate(outputs, leaves, tuple(grad.to(dtype) for grad in call.grads))


def differences(call: Call, exact: dict[str, Tensor]) -> dict[str, float]:
    """Magnitudes of the terms whose differences some gradients are: where these cancel, the terms' roundings remain.

    A logit's gradient is weight * (grad_out . v - delta), with delta = grad_out . out - the gradient of lse; a sink's
    is the sum of weight * delta over all rows. A product's terms are as large as its vectors.
    """
    grad_out, grad_lse = (grad.double() for grad in call.grads)
    delta = (exact["out"] * grad_out).sum(dim=-1) - grad_lse
    q, k, v, *sinks = (tensor.double() for tensor in call.inputs)
    product = largest_finite(grad_out.norm(dim=-1)) * largest_finite(v.norm(dim=-1)) + largest_finite(grad_lse)
    scale = abs(call.options.get("scale", q.shape[2] ** -0.5)) * product
    terms = {"grad_q": scale * largest_finite(k), "grad_k": scale * largest_finite(q)}
    if sinks:
        # Where a row sees nothing, lse is -inf and its share 0.
        shares = torch.exp(sinks[0] - exact["lse"].masked_fill(exact["lse"].isinf(), float("inf")))
        terms["grad_sinks"] = largest_finite((shares * delta).abs().sum(dim=0))
    return terms


def largest_finite(values: Tensor) -> float:
    finite = values[values.isfinite()].abs()
    return finite.max().item() if finite.numel() else 0.0


def used(actual: Tensor, exact: Tensor, baseline: Tensor, rounding: float) -> float:
    """The error's share of what is allowed: FACTOR times PyTorch's own error, and `rounding`."""
    got, want, other = (tensor.detach().double().cpu() for tensor in (actual, exact, baseline))
    assert torch.equal(got.isinf(), want.isinf()) and not got.isnan().any(), "infinities or NaN in other places"
    error = largest_finite(got - want)
    allowed = FACTOR * largest_finite(other - want) + rounding
    return error / allowed if allowed > 0 else float(error > 0)


def check(seed: int, device: str, place: torch.device, tokens: int) -> dict[str, float]:
    """The share of the allowed error that each result of call number `seed` uses. AssertionError above 1."""
    call = draw(seed, kernels=device != "cpu", tokens=tokens)
    dtype = call.inputs[0].dtype
    actual, exact, baseline = ours(call, place), plain(call, torch.float64), plain(call, dtype)
    shares, terms = {}, differences(call, exact)
    for name, got in actual.items():
        # The reference divides 0 by 0 where a row sees nothing.
        want, other = exact[name], baseline[name]
        if name.startswith("grad"):
            want, other = want.nan_to_num(), other.nan_to_num()
        rounding = 4.0 * torch.finfo(got.dtype).eps * largest_finite(want)
        rounding += torch.finfo(dtype).eps * terms.get(name, 0.0)
        try:
            shares[name] = used(got, want, other, rounding)
        except AssertionError as error:
            raise AssertionError(f"tree {seed} on {device}: {name}: {error}; {call.describe()}") from error
        assert shares[name] <= 1.0, (
            f"tree {seed} on {device}: {name} uses {shares[name]:.2f} of the allowed error; {call.describe()}"
        )
    return shares


def check_all(device: str, first: int, trees: int, tokens: int, progress: bool = False) -> dict[str, float]:
    """Checks calls first, first + 1, ...; the largest share that each result has used."""
    largest: dict[str, float] = defaultdict(float)
    with on(device) as place, threads(1):  # tensors this small are not worth a second one
        for seed in tqdm(range(first, first + trees), disable=not progress, unit="tree"):
            for name, share in check(seed, device, place, tokens).items():
                largest[name] = max(largest[name], share)
    return dict(largest)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.attention.exactness")
    parser.add_argument("--device", choices=KERNELS, default="cpu")
    parser.add_argument("--trees", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=150, help="mean number of tokens of a tree (default: 150)")
    given = parser.parse_args(arguments)
    largest = check_all(given.device, given.first, given.trees, given.tokens, progress=True)
    shares = ", ".join(f"{name} {share:.2f}" for name, share in largest.items())
    print(f"{given.trees} trees on {given.device}; largest share of the allowed error: {shares}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
