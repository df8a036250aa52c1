"""Every op that has a CUDA kernel, at small odd sizes, for tools that watch its memory.

    compute-sanitizer python -m tests.kernel_cases                       on a GPU
    python -m tests.kernel_cases --device emulated                       on the emulator, under AddressSanitizer

Prints one line per case and fails if an op with a kernel was left out, or a result is not finite.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import pykern
from pykern.lowrank import ops
from tests.support import emulated_ops, on

Case = tuple[str, Callable[[], list[Tensor]]]


def normal(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*sizes).to(dtype)


def advantages() -> Iterator[Case]:
    def step(rewards: Tensor, ids: Tensor, name: str, filter: str) -> list[Tensor]:
        row, size = pykern.ESTIMATORS[name], len(ids)
        advantages, keep, metrics = pykern.group_advantages(
            rewards, ids, estimator=name, filter=filter, lengths=torch.randint(1, 9, (size,)), overlong=(8.0, 4.0, 1.0),
            baseline_rewards=torch.rand(size) if row.baseline == "given" else None, return_keep=True,
            return_metrics=True,
        )  # fmt: skip
        return [advantages, keep.double(), *metrics.values()]

    for size, groups in ((1, 1), (77, 9), (700, 3)):
        ids, rewards = torch.randint(-groups, groups, (size,)), torch.rand(size, 3)
        plain = pykern.group_advantages
        yield f"group_advantages plain {size}", lambda r=rewards, i=ids: [plain(r[:, 0], i), plain(r[:, 1].double(), i)]
        for name in pykern.ESTIMATORS:
            for filter in ("none", "difficulty"):
                label = f"group_advantages {name} {size}{'' if filter == 'none' else ' filtered'}"
                yield label, lambda r=rewards, i=ids, n=name, f=filter: step(r, i, n, f)
        answers = torch.randint(0, 4, (size,))
        yield f"group_entropy {size}", lambda i=ids, a=answers: list(torch.ops.pykern.group_entropy.default(i, a))
        for values in (rewards[:, 0], rewards[:, 1].double()):
            label = f"group_statistics {values.dtype} {size}"
            yield label, lambda v=values, i=ids: list(pykern.group_statistics(v, i))


def loss() -> Iterator[Case]:
    def tensors(rows: int, columns: int, packed: bool) -> dict[str, Tensor]:
        shape = (rows * columns,) if packed else (rows, columns)
        values = {name: -torch.rand(shape) for name in ("logprobs", "old_logprobs", "ref_logprobs", "rollout_logprobs")}
        values["advantages"] = normal(rows)
        values["mask"] = torch.rand(shape) < 0.7
        if packed:
            values["cu_seqlens"] = torch.arange(rows + 1) * columns
        return values

    def step(arguments: dict) -> list[Tensor]:
        leaves = [arguments[name].requires_grad_() for name in ("logprobs", "entropy") if name in arguments]
        value, metrics = pykern.policy_loss(kl="k3", kl_coef=0.1, **arguments)
        value.backward()
        return [value.detach(), *(leaf.grad for leaf in leaves), *metrics.values()]

    def common(rows: int, columns: int, name: str, packed: bool) -> list[Tensor]:
        arguments = tensors(rows, columns, packed)
        if packed:
            del arguments["mask"]
        return step(arguments | {"loss": name})

    def composed(rows: int, columns: int, name: str, packed: bool) -> list[Tensor]:
        arguments = tensors(rows, columns, packed)
        shape = arguments["logprobs"].shape
        extra = {name: torch.rand(shape) for name in ("entropy", "token_weights", "rollout_weights", "anchor_logprobs")}
        extra |= {name: torch.rand(shape) < 0.8 for name in ("keep", "anchor_keep")}
        if name in ("hapo", "gmpo"):
            extra |= {name: torch.rand(shape) for name in ("clip_low", "clip_high")}
        if name != "gmpo":
            extra |= {name: torch.rand(shape) for name in ("second_advantages", "advantage_weights")}
        extra |= {"anchor": "abs", "anchor_coef": 0.1, "entropy_coef": 0.1, "kl_gradient": "importance"}
        return step(arguments | extra | {"loss": name, "rollout_rule": "mask"})

    def weights(rows: int, columns: int, packed: bool) -> list[Tensor]:
        arguments = tensors(rows, columns, packed)
        chosen = {name: arguments[name] for name in ("mask", "cu_seqlens") if name in arguments}
        return [pykern.policy_loss_token_weights(arguments["logprobs"], aggregate="seq-mean-token-mean", **chosen)]

    for rows, columns in ((1, 1), (5, 33), (3, 700)):
        for packed in (False, True):
            shape = f"{rows}x{columns}{' packed' if packed else ''}"
            for name in ("grpo", "gspo", "cispo", "sapo", "vespo"):
                label = f"policy_loss {name} {shape}"
                yield label, lambda r=rows, c=columns, n=name, p=packed: common(r, c, n, p)
            for name in ("hapo", "sapo", "gmpo", "topr", "dppo_kl"):
                label = f"policy_loss {name} with every part {shape}"
                yield label, lambda r=rows, c=columns, n=name, p=packed: composed(r, c, n, p)
            yield f"policy_loss_token_weights {shape}", lambda r=rows, c=columns, p=packed: weights(r, c, p)


def selection() -> Iterator[Case]:
    for size in (1, 77, 3000):
        values, mask, candidates = torch.randn(size).round(decimals=1), torch.rand(size) < 0.7, torch.rand(size) < 0.6
        mask[0] = True
        for dtype in (torch.float32, torch.float64):
            yield (
                f"masked_quantile {size} {str(dtype)[6:]}",
                lambda v=values.to(dtype), m=mask: [pykern.masked_quantile(v, [0.0, 0.33, 1.0], m)],
            )
            yield (
                f"masked_moments {size} {str(dtype)[6:]}",
                lambda v=values.to(dtype), m=mask: [pykern.masked_moments(v, m, centre=v[0])],
            )
            for order in ("largest", "smallest", "random"):
                yield (
                    f"share_mask {order} {size} {str(dtype)[6:]}",
                    lambda v=values.to(dtype), m=mask, c=candidates, o=order: [
                        pykern.share_mask(v, 0.3, m, order=o, minimum=1, candidates=c, seed=5)
                    ],
                )


def rollout() -> Iterator[Case]:
    for rows, columns in ((1, 1), (5, 33), (3, 700)):
        old, sampled, mask = -torch.rand(rows, columns), -torch.rand(rows, columns), torch.rand(rows, columns) < 0.7
        packed = {"cu_seqlens": torch.arange(rows + 1) * columns}
        for name in ("tis", "verl_seq_is_rs", "verl_k3_rs", "slime_mis"):
            for keywords in ({"mask": mask}, packed):
                shape = (-1,) if keywords is packed else (rows, columns)

                def step(old=old, sampled=sampled, keywords=keywords, shape=shape, name=name) -> list[Tensor]:
                    weights, keep, metrics = pykern.rollout_correction(
                        old.reshape(shape), sampled.reshape(shape), correction=name, **keywords
                    )
                    return [*([] if weights is None else [weights]), keep, *metrics.values()]

                yield f"rollout_correction {name} {rows}x{columns}{' packed' if keywords is packed else ''}", step


def disco() -> Iterator[Case]:
    def step(rows: int, columns: int, name: str, packed: bool) -> list[Tensor]:
        leaf, old = -torch.rand(rows, columns), -torch.rand(rows, columns)
        keywords = {"mask": torch.rand(rows, columns) < 0.7}
        if packed:
            leaf, old, keywords = leaf.reshape(-1), old.reshape(-1), {"cu_seqlens": torch.arange(rows + 1) * columns}
        leaf.requires_grad_()
        rewards, ids = torch.randint(2, (rows,)).float(), torch.randint(3, (rows,))
        value, metrics = pykern.disco_loss(leaf, old, rewards, ids, loss=name, max_length=columns, **keywords)
        value.backward()
        return [value, leaf.grad, *metrics.values()]

    for rows, columns in ((1, 1), (9, 33), (300, 3)):
        for name in ("disco", "discob_ratio", "drpo"):
            for packed in (False, True):
                label = f"disco_loss {name} {rows}x{columns}{' packed' if packed else ''}"
                yield label, lambda r=rows, c=columns, n=name, p=packed: step(r, c, n, p)


def returns() -> Iterator[Case]:
    def scans(lengths: list[int], carry: str) -> list[Tensor]:
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
        rewards, values = normal(sum(lengths)), normal(sum(lengths))
        keywords = {"gamma": 0.9, "mask": torch.rand(sum(lengths)) < 0.7, "cu_seqlens": cu_seqlens, "carry": carry}
        lam = torch.rand(len(lengths))
        advantages = pykern.gae(rewards, values, lam=lam, whiten=True, **keywords)
        return [*advantages, pykern.discounted_returns(rewards, **keywords)]

    for lengths in ([1], [0, 7, 0, 300, 33], [9001, 0, 5]):
        for carry in pykern.CARRIES:
            yield f"gae {lengths} {carry}", lambda n=lengths, c=carry: scans(n, c)


def token_baseline() -> Iterator[Case]:
    def baseline(rows: int, columns: int, align: str) -> list[Tensor]:
        mask, ids = torch.rand(rows, columns) < 0.7, torch.randint(-2, 3, (rows,))
        tensors = (normal(rows, columns), -torch.rand(rows, columns), torch.rand(rows, columns), ids)
        weights = torch.rand(rows, columns)
        return [pykern.optimal_token_baseline(*tensors, mask=mask, align=align, importance_weights=weights)]

    for rows, columns in ((1, 1), (17, 33), (5, 1301)):
        for align in pykern.ALIGNMENTS:
            label = f"optimal_token_baseline {rows}x{columns} {align}"
            yield label, lambda r=rows, c=columns, a=align: baseline(r, c, a)


def risk() -> Iterator[Case]:
    def step(size: int, bundles: int, credit: str) -> list[Tensor]:
        groups, bundle_ids = torch.randint(-3, 3, (size,)), torch.randint(bundles, (size,))
        tracker = pykern.QuantileTracker(device=torch.get_default_device())
        for _ in range(2):
            advantages, metrics = pykern.risk_advantages(
                normal(size), groups, bundle_ids, credit=credit, tracker=tracker, return_metrics=True
            )
            tracker.update(metrics["scores"])
        return [advantages, tracker.values]

    for size, bundles in ((1, 1), (77, 5), (300, 2)):
        for credit in pykern.CREDITS:
            yield f"risk_advantages {size} in {bundles} {credit}", lambda n=size, b=bundles, c=credit: step(n, b, c)


def logprobs() -> Iterator[Case]:
    def step(rows: int, vocabulary: int, dtype: torch.dtype, in_place: bool) -> list[Tensor]:
        source = (
            normal(rows, vocabulary + 1, dtype=dtype)[:, 1:] if not in_place else normal(rows, vocabulary, dtype=dtype)
        )
        leaf = source.requires_grad_()
        targets = torch.randint(vocabulary, (rows,))
        targets[::3] = -100
        results = pykern.token_logprobs(
            leaf * 1, targets, temperature=0.7, entropy=True, sum_p2=True, backward_in_place=in_place
        )
        sum(result.sum() for result in results).backward()
        return [*results, leaf.grad]

    for rows, vocabulary in ((1, 1), (4, 37), (3, 5000)):
        for dtype in (torch.bfloat16, torch.float32):
            for in_place in (False, True):
                label = f"token_logprobs {rows}x{vocabulary} {str(dtype)[6:]}{' in place' if in_place else ''}"
                yield label, lambda r=rows, v=vocabulary, d=dtype, p=in_place: step(r, v, d, p)


def linear_logprobs() -> Iterator[Case]:
    def step(rows: int, hidden_size: int, vocabulary: int, dtype: torch.dtype, options: dict) -> list[Tensor]:
        hidden, weight, bias = (
            normal(rows, hidden_size, dtype=dtype),
            normal(vocabulary, hidden_size),
            normal(vocabulary),
        )
        leaves = [tensor.requires_grad_() for tensor in (hidden, weight.to(dtype), bias)]
        targets = torch.randint(vocabulary, (rows,))
        targets[1::3] = -100
        results = pykern.linear_token_logprobs(
            leaves[0], leaves[1], targets, bias=leaves[2] if options else None, entropy=True, **options
        )
        sum(result.sum() for result in results).backward()
        return [*results, *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    for rows, hidden_size, vocabulary in ((1, 1, 1), (5, 33, 2100), (70, 300, 601)):
        for dtype in (torch.bfloat16, torch.float32):
            for options in ({}, {"softcap": 3.0, "temperature": 0.7}):
                label = f"linear_token_logprobs {rows}x{hidden_size}x{vocabulary} {str(dtype)[6:]} {list(options)}"
                yield (
                    label,
                    lambda n=rows, h=hidden_size, v=vocabulary, d=dtype, o=options: step(n, h, v, d, o),
                )

    def loss_step(hidden_size: int, dtype: torch.dtype) -> list[Tensor]:
        leaves = [normal(300, hidden_size, dtype=dtype), normal(601, hidden_size, dtype=dtype), normal(601)]
        leaves = [tensor.requires_grad_() for tensor in leaves]
        targets = torch.randint(601, (300,))
        targets[1::3] = -100
        loss, metrics = pykern.linear_policy_loss(
            leaves[0], leaves[1], targets, -torch.rand(300), normal(3), bias=leaves[2], softcap=3.0, entropy_coef=0.1,
            cu_seqlens=torch.tensor([0, 100, 150, 300]),
        )  # fmt: skip
        loss.backward()
        return [loss, *metrics.values(), *(leaf.grad for leaf in leaves)]

    for hidden_size in (64, 33):
        for dtype in (torch.bfloat16, torch.float32):
            yield f"linear_policy_loss {hidden_size} {str(dtype)[6:]}", lambda h=hidden_size, d=dtype: loss_step(h, d)


def lowrank() -> Iterator[Case]:
    def train(kind: type, rows: int, columns: int, dtype: torch.dtype) -> list[Tensor]:
        matrix, vector = (torch.nn.Parameter(normal(*sizes, dtype=dtype)) for sizes in ((rows, columns), (columns,)))
        groups = [{"params": [matrix], "rank": 5}, {"params": [vector]}]
        optimizer = kind(groups, lr=1e-2)
        for _ in range(3):
            matrix.grad, vector.grad = normal(rows, columns, dtype=dtype), normal(columns, dtype=dtype)
            optimizer.step()
        return [matrix.detach(), vector.detach()]

    for rows, columns in ((9, 31), (70, 41)):
        for kind in (pykern.GaLoreAdamW, pykern.FiraAdamW):
            for dtype in (torch.float32, torch.bfloat16):
                label = f"{kind.__name__} {rows}x{columns} {str(dtype)[6:]}"
                yield label, lambda k=kind, r=rows, c=columns, d=dtype: train(k, r, c, d)

    rule = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "corrected_eps": True}
    shapes = [(9, 31, 3), (70, 264, 5), (40, 1, 1)]

    def inner_rule(kind: int, storage: str) -> list[Tensor]:
        low = [normal(rank, length) for _, length, rank in shapes]
        stored = {"float32": torch.float32, "bfloat16": torch.bfloat16, "8-bit": torch.uint8}[storage]
        moments = [[torch.zeros_like(matrix, dtype=stored) for matrix in low] for _ in range(2 if kind < 2 else 1)]
        scales = [[torch.zeros(m.shape[0], -(-m.shape[1] // 256)) for m in low] for _ in moments]
        scales = [*scales, []][:2] if storage == "8-bit" else [[], []]
        direction, factor = [torch.empty_like(matrix) for matrix in low], torch.empty(len(low), dtype=torch.float64)
        steps = [torch.zeros(()) for _ in low]
        ops.low_rank_rule(low, *[*moments, []][:2], *scales, steps, direction, factor, None, rule=kind, **rule)
        return [*direction, factor]

    for kind in range(4):
        for storage in ("float32", "bfloat16", "8-bit"):
            yield f"low_rank_rule {kind} {storage}", lambda k=kind, s=storage: inner_rule(k, s)

    def parts(dtype: torch.dtype, rounding: int) -> list[Tensor]:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        param, grad = ([normal(n, length, dtype=dtype) for n, length, _ in shapes] for _ in range(2))
        param[1], grad[1] = (normal(264, 70, dtype=dtype).mT for _ in range(2))
        basis = [torch.linalg.qr(torch.randn(n, r))[0].to(dtype).contiguous() for n, _, r in shapes]
        low, direction = ([torch.empty(r, length, dtype=wide) for _, length, r in shapes] for _ in range(2))
        squares, ratios = ([torch.empty(length, dtype=wide) for _, length, _ in shapes] for _ in range(2))
        first, second = ([torch.zeros_like(matrix) for matrix in low] for _ in range(2))
        steps, norms = (
            [torch.full((), value, dtype=t) for _ in low] for value, t in ((0.0, torch.float32), (-1, wide))
        )
        sums, factor = torch.empty(len(low), 3, dtype=torch.float64), torch.empty(len(low), dtype=torch.float64)
        ops.low_rank_project(grad, basis, None, low, squares, maximize=False)
        ops.low_rank_rule(low, first, second, [], [], steps, direction, factor, None, rule=0, **rule)
        ops.low_rank_ratios(low, direction, squares, [], ratios, sums, per_tensor=False, removed=1.0)
        ops.low_rank_limit(
            low, direction, ratios, sums, norms, None, None, scale=1.0, removed=1.0, per_tensor=False, amplitude=1.0,
            amplitude_first=False, growth=1.01, zero_norm_limits=False, maximize=False,
        )  # fmt: skip
        lost = [torch.zeros_like(weight) for weight in param] if rounding == 2 else []
        ops.low_rank_apply(
            param, basis, direction, grad, ratios, [], lost, steps, [3] * len(param), factor, torch.tensor(0.01), None,
            None, scale=1.0, weight_decay=0.1, decay_after=False, sign_scale=0.0, rounding=rounding, maximize=False,
        )  # fmt: skip
        return [*param, *ratios, sums]

    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        for rounding in (0, 1, 2) if dtype == torch.bfloat16 else (0,):
            yield f"low-rank parts {str(dtype)[6:]} rounding {rounding}", lambda d=dtype, r=rounding: parts(d, r)


def low_rank_products() -> Iterator[Case]:
    """Both sides in one list, and every kernel: widths of the rank, rows that blocks share, roundings, signs."""

    def lists(dtype: torch.dtype, rank: int, n: int) -> dict[str, list[Tensor]]:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        sides = [(n, 24), (n, 31)]
        return {
            "matrix": [normal(n, 24, dtype=dtype), normal(31, n, dtype=dtype).mT],
            "grad": [normal(n, 24, dtype=dtype), normal(31, n, dtype=dtype).mT],
            "basis": [normal(n, rank, dtype=dtype) for _ in sides],
            "rows": [torch.randperm(n)[:rank] for _ in sides],
            "low": [normal(rank, length, dtype=wide) for _, length in sides],
            "line": [normal(length, dtype=wide) for _, length in sides],
        }

    def project(dtype: torch.dtype, rank: int, n: int) -> list[Tensor]:
        given, scale = lists(dtype, rank, n), torch.full((), 2.0)
        low, squares = given["low"], given["line"]
        op = torch.ops.pykern.low_rank_project.default
        op(given["matrix"], given["basis"], scale, low, squares, maximize=True)
        return [*low, *squares]

    def apply(dtype: torch.dtype, rank: int, rounding: int, up: bool, signs: bool) -> list[Tensor]:
        given = lists(dtype, rank, 40)
        weights, low = given["matrix"], given["low"]
        lost = [torch.zeros_like(weight) for weight in weights] if rounding == 2 else []
        torch.ops.pykern.low_rank_apply.default(
            weights, given["basis"] if up else [], low if up else [], given["grad"], given["line"],
            low if signs else [], lost, [torch.ones(()) for _ in weights], [3, 4],
            torch.ones(2, dtype=torch.float64), torch.full((), 0.01), None, torch.zeros(()), scale=0.5,
            weight_decay=0.1, decay_after=False, sign_scale=0.1 if signs else 0.0, rounding=rounding, maximize=False,
        )  # fmt: skip
        return [*weights, *lost]

    def rows(dtype: torch.dtype, rank: int, rounding: int, signs: bool) -> list[Tensor]:
        given = lists(dtype, rank, 80)
        weights, low = given["matrix"], given["low"]
        lost = [torch.zeros_like(weight) for weight in weights] if rounding == 2 else []
        torch.ops.pykern.low_rank_project.default(
            given["grad"], given["rows"], torch.full((), 2.0), low, [], maximize=True
        )
        torch.ops.pykern.low_rank_apply.default(
            weights, given["rows"], low, given["grad"] if signs else [], [], low if signs else [], lost,
            [torch.ones(()) for _ in weights], [3, 4], torch.ones(2, dtype=torch.float64), torch.full((), 0.01), None,
            None, scale=0.5, weight_decay=0.0, decay_after=False, sign_scale=0.1, rounding=rounding, maximize=False,
        )  # fmt: skip
        return [*low, *weights, *lost]

    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        for rank, rounding, signs in ((70, 0, False), (5, 1, True), (5, 2, False)):
            label = f"picked rows r{rank} rounding {rounding}{' signs' if signs else ''} {str(dtype)[6:]}"
            yield label, lambda d=dtype, k=rank, r=rounding, s=signs: rows(d, k, r, s)

    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        for rank, n in ((5, 40), (5, 600), (70, 40), (130, 40), (72, 600), (136, 40), (264, 40)):
            label = f"low_rank_project {n} r{rank} {str(dtype)[6:]}"
            yield label, lambda d=dtype, r=rank, n=n: project(d, r, n)
        for rounding, up, signs in ((0, True, True), (1, True, False), (2, True, False), (0, False, False)):
            label = (
                f"low_rank_apply rounding {rounding}{' up' if up else ''}{' signs' if signs else ''} {str(dtype)[6:]}"
            )
            yield label, lambda d=dtype, r=rounding, u=up, s=signs: apply(d, 5, r, u, s)
    for dtype in (torch.bfloat16, torch.float16):
        for rounding in (0, 1, 2):
            label = f"low_rank_apply r72 rounding {rounding} {str(dtype)[6:]}"
            yield label, lambda d=dtype, r=rounding: apply(d, 72, r, True, False)


def sltrain() -> Iterator[Case]:
    def both(dtype: torch.dtype) -> list[Tensor]:
        layer = pykern.SLTrainLinear(37, 70, 3, 0.2, dtype=dtype)
        layer(normal(5, 37, dtype=dtype)).square().sum().backward()
        return [param.grad for param in layer.parameters()]

    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        yield f"SLTrainLinear {str(dtype)[6:]}", lambda d=dtype: both(d)


def quantized() -> Iterator[Case]:
    def train(rows: int, columns: int, options: dict, layer: bool) -> list[Tensor]:
        module = torch.nn.Linear(columns, rows, bias=False)
        module = pykern.Int8Linear.from_linear(module) if layer else module
        optimizer = pykern.LowRankOptimizer([module.weight], 1e-2, rank=3, state_dtype="8bit", **options)
        for _ in range(2):
            module(normal(4, columns)).square().mean().backward()
            optimizer.step()
        return [module.dequantized() if layer else module.weight.detach()]

    feedback = {"residual": "error_feedback", "feedback_dtype": "4bit"}
    for rows, columns in ((9, 264), (70, 41), (5, 600)):
        for options in ({"projector_format": "int4"}, feedback):
            label = f"{rows}x{columns} {next(iter(options))}"
            yield f"Int8Linear {label}", lambda r=rows, c=columns, o=options: train(r, c, o, True)
            yield f"quantised {label}", lambda r=rows, c=columns, o=options: train(r, c, o, False)


def attention() -> Iterator[Case]:
    def rows(count: int, width: int, dtype: torch.dtype) -> list[Tensor]:
        source = normal(29, width, dtype=dtype).requires_grad_()
        out = pykern.gather_rows(source, torch.randint(29, (count,)))
        out.sum().backward()
        return [out.detach(), source.grad]

    for count, width in ((0, 8), (1, 1), (77, 35), (40, 256)):
        for dtype in (torch.bfloat16, torch.float32):
            yield f"gather_rows {count}x{width} {str(dtype)[6:]}", lambda n=count, w=width, d=dtype: rows(n, w, d)

    def tiles(prefix: int) -> list[Tensor]:
        tree = pykern.PrefixTree.from_groups([7, prefix], [[3, 9, 0], [40, 41]])
        tensors = (tensor.to(torch.get_default_device()) for tensor in (tree.subtree_end, tree.position))
        return list(torch.ops.pykern.prefix_attention_tiles.default(*tensors))

    for prefix in (0, 17, 130, 1000):
        yield f"prefix_attention_tiles {prefix}", lambda p=prefix: tiles(p)


def prefix_attention() -> Iterator[Case]:
    def both(heads: int, key_heads: int, size: int, dtype: torch.dtype, options: dict) -> list[Tensor]:
        tree = pykern.PrefixTree.from_parents([70, 30, 0, 41, 5, 9], [-1, 0, 1, 1, 0, -1])
        padding = torch.arange(tree.num_tokens, tree.num_tokens + 9, dtype=torch.int32)
        tree = pykern.PrefixTree(torch.cat([tree.subtree_end, padding])).to(torch.get_default_device())
        shapes = ((heads, size), (key_heads, size), (key_heads, size))
        q, k, v = (normal(tree.num_tokens, *shape, dtype=dtype).requires_grad_() for shape in shapes)
        sinks = normal(heads).requires_grad_()
        if options:
            options = {**options, "alibi_slopes": torch.rand(heads), "sinks": sinks}
        out, max_logits = pykern.prefix_attention(q, k, v, tree, return_max_logits=True, **options)
        out.float().square().sum().backward()
        return [out.detach(), max_logits, q.grad, k.grad, v.grad, *([sinks.grad] if options else [])]

    everything = {"window": 50, "softcap": 20.0, "scale": -0.2}
    for size in (64, 96, 128, 192, 256):
        for heads, key_heads, options in ((2, 1, {}), (2, 2, everything)):
            label = f"prefix_attention {heads}/{key_heads}x{size}{' all options' if options else ''}"
            yield label, lambda h=heads, k=key_heads, s=size, o=options: both(h, k, s, torch.bfloat16, o)
    yield "prefix_attention float16", lambda: both(4, 2, 40, torch.float16, {})
    yield "prefix_attention order-invariant", lambda: both(4, 2, 64, torch.bfloat16, {"order_invariant": True})


def offload() -> Iterator[Case]:
    def staged(codec: str) -> list[Tensor]:
        saved = [
            normal(5, 33),
            normal(1),
            normal(300, dtype=torch.bfloat16),
            normal(0),
            torch.arange(7),
            normal(9, 130).T,
        ]
        layout = pykern.StagingLayout.of(saved, codec=codec)
        return layout.unpack(layout.pack(saved))

    for codec in ("none", "float8_e4m3", "int8"):
        yield f"staging {codec}", lambda c=codec: staged(c)


def recompute() -> Iterator[Case]:
    def with_gradients(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
        leaves = [tensor.requires_grad_() for tensor in inputs]
        y = function(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y))]

    for rows, columns in ((1, 1), (5, 33), (9, 128), (3, 1100), (2, 6400)):
        for dtype in (torch.float32, torch.bfloat16):
            x, weight, bias = (
                normal(rows, columns, dtype=dtype),
                normal(columns, dtype=dtype),
                normal(columns, dtype=dtype),
            )
            label = f"{rows} x {columns} {dtype}"
            yield f"rms_norm {label}", lambda x=x, w=weight: with_gradients(pykern.rms_norm, x, w)
            yield f"layer_norm {label}", lambda x=x, w=weight, b=bias: with_gradients(pykern.layer_norm, x, w, b)
            for name in ("silu", "gelu", "gelu_tanh"):
                gated = partial(pykern.gated_activation, activation=name)
                yield f"gated {name} {label}", lambda f=gated, x=x: with_gradients(f, x, torch.ones_like(x))
            yield f"gelu {label}", lambda x=x: with_gradients(pykern.gelu, x)
            yield f"dropout {label}", lambda x=x: with_gradients(partial(pykern.dropout, p=0.3, seed=5), x)


FAMILIES = (
    advantages,
    loss,
    selection,
    disco,
    logprobs,
    linear_logprobs,
    lowrank,
    low_rank_products,
    quantized,
    sltrain,
    attention,
    prefix_attention,
    offload,
    recompute,
    rollout,
    returns,
    token_baseline,
    risk,
)


class Calls(TorchDispatchMode):
    """Remembers which of pykern's ops were called."""

    def __init__(self):
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        space, _, name = function.name().partition("::")
        if space == "pykern":
            self.names.add(name)
        return function(*arguments, **(keywords or {}))


def kernels_on(device: str) -> set[str]:
    return set(emulated_ops()) if device == "emulated" else set(pykern._native.cuda_ops)


def run_cases(device: str, calls: Calls, families: tuple[Callable[[], Iterator[Case]], ...]) -> None:
    with on(device) as place, torch.device(place), calls:
        for family in families:
            for label, run in family():
                results = run()
                assert all(result.isfinite().all() for result in results if result.is_floating_point()), label
                print(f"ok {label}", flush=True)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.kernel_cases")
    parser.add_argument("--device", choices=["cuda", "emulated"], default="cuda")
    device = parser.parse_args(arguments).device
    torch.manual_seed(0)
    # Ops with kernels of their own for compute capability 9.0 run on the emulator with both.
    devices = [device, "emulated 8.0"] if device == "emulated" else [device]
    calls = Calls()
    for device in devices:
        run_cases(device, calls, FAMILIES if device == devices[0] else (prefix_attention,))
    missed = sorted(kernels_on(devices[0]) - calls.names)
    if missed:
        print(f"no case calls {', '.join(missed)}", file=sys.stderr)
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
