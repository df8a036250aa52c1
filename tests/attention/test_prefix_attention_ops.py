"""The raw ops and the public function's contract: opcheck, compile, refused inputs."""

import pytest
import torch

import pykern
from tests.attention.trees import TREES, make_inputs
from tests.support import check_op, compile_whole

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck_forward(dtype):
    tree = TREES["short group"]()
    q, k, v, _ = make_inputs(tree, 4, 2, 6, 5, dtype)
    heads_first = q.transpose(0, 1).contiguous().transpose(0, 1)
    for queries in (q, heads_first):
        arguments = (queries, k, v, *tree.tensors, None, None, 0.3, 0, 0.0, False, False)
        check_op(torch.ops.pykern.prefix_attention_forward.default, arguments)


@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck_backward(dtype, with_lse):
    tree = TREES["short group"]()
    q, k, v, grad_out = make_inputs(tree, 4, 2, 6, 5, dtype)
    out, lse = pykern.prefix_attention(q, k, v, tree, return_lse=True)
    grad_lse = torch.ones_like(lse) if with_lse else None
    arguments = (grad_out, grad_lse, q, k, v, out, lse, *tree.tensors, None, None, 0.3, 0, 0.0)
    check_op(torch.ops.pykern.prefix_attention_backward.default, arguments)


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("bare", [False, True])
def test_compiles_whole(bare, return_lse):
    tree = TREES["group"]()
    given = (tree.subtree_end, tree.position) if bare else tree

    def function(q, k, v, tree):
        result = pykern.prefix_attention(q * 2, k, v, tree, return_lse=return_lse)
        return sum(part.sum(dim=-1).cos().sum() for part in result) if return_lse else result.cos().sum()

    leaves = [x.requires_grad_() for x in make_inputs(tree, 4, 2, 16, 16, torch.float32)[:3]]
    want = torch.autograd.grad(function(*leaves, given), leaves)
    compiled = compile_whole(function)
    got = torch.autograd.grad(compiled(*leaves, given), leaves)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_compiles_once_for_changing_lengths():
    def function(q, k, v, subtree_end, position):
        return pykern.prefix_attention(q, k, v, (subtree_end, position)).sum()

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    for name in ("group", "groups", "documents"):
        tree = TREES[name]()
        leaves = [x.requires_grad_() for x in make_inputs(tree, 4, 2, 16, 16, torch.float32)[:3]]
        arguments = (*leaves, tree.subtree_end, tree.position)
        got = torch.autograd.grad(compiled(*arguments), leaves)
        want = torch.autograd.grad(function(*arguments), leaves)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert counter.frame_count == 1


def test_meta_tensors_give_shapes():
    tree = TREES["group"]()
    q, k, v, _ = (x.to("meta") for x in make_inputs(tree, 4, 2, 16, 8, torch.bfloat16))
    out, lse = pykern.prefix_attention(q, k, v, tree.to("meta"), return_lse=True)
    assert out.shape == (tree.num_tokens, 4, 8) and out.dtype == torch.bfloat16
    assert lse.shape == (tree.num_tokens, 4) and lse.dtype == torch.float32


def arguments(**changes):
    tree = pykern.PrefixTree.from_groups([5], [[2, 3]])
    given = {"q": torch.randn(10, 4, 8), "k": torch.randn(10, 2, 8), "v": torch.randn(10, 2, 8), "tree": tree}
    given.update(changes)
    return given


INT64 = torch.zeros(10, dtype=torch.int64)
INT32 = torch.zeros(10, dtype=torch.int32)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": [1.0]}, TypeError, "q: expected a tensor, got list"),
        ({"q": torch.randn(1, 10, 4, 8)}, ValueError, r"q: expected \[tokens, heads, head size\], got shape"),
        ({"q": torch.ones(10, 4, 8).int()}, TypeError, "q: expected float32, bfloat16, float16 or float64"),
        ({"k": torch.randn(10, 2, 8).double()}, TypeError, "k: expected q's dtype torch.float32, got torch.float64"),
        ({"v": torch.randn(10, 2, 8, device="meta")}, ValueError, "v: expected q's device cpu, got meta"),
        ({"k": torch.randn(9, 2, 8)}, ValueError, "k: expected q's 10 tokens, got 9"),
        ({"k": torch.randn(10, 2, 7)}, ValueError, "k: expected q's head size 8, got 7"),
        ({"v": torch.randn(10, 1, 8)}, ValueError, "v: expected k's 2 heads, got 1"),
        ({"v": torch.randn(10, 2, 257)}, ValueError, "v: expected a head size of at most 256, got 257"),
        ({"q": torch.randn(10, 3, 8)}, ValueError, "q: expected a multiple of k's 2 heads, got 3"),
        ({"tree": INT32}, TypeError, "tree: expected a PrefixTree, its tensors or"),
        ({"tree": (INT32,)}, TypeError, "tree: expected a PrefixTree, its tensors or"),
        ({"tree": (INT64, INT32)}, TypeError, r"tree\[0\] \(subtree_end\): expected dtype torch.int32"),
        ({"tree": (INT32, INT64)}, TypeError, r"tree\[1\] \(position\): expected dtype torch.int32"),
        ({"tree": (INT32, INT32[:4])}, ValueError, r"tree\[1\] \(position\): expected shape \(10,\), got \(4,\)"),
        ({"tree": (INT32[:4], INT32[:4])}, ValueError, "tree: expected q's 10 tokens, got 4"),
        ({"tree": (INT32.to("meta"), INT32.to("meta"))}, ValueError, "tree: expected q's device cpu, got meta"),
    ],
)
def test_refused(changes, error, message):
    with pytest.raises(error, match=message) as caught:
        pykern.prefix_attention(**arguments(**changes))
    assert "\n" not in str(caught.value)
