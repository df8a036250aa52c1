"""The PrefixGrouper interface against the prefix_grouper package, step by step, and under verl's use of it."""

import warnings

import prefix_grouper
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from verl.models.transformers import monkey_patch
from verl.trainer.ppo import prefix_grouper_utils

from pykern.integrations.prefix_grouper import PrefixGrouper
from tests.integrations.grouped import GROUPS, PADDINGS, make_inputs, masks, padding_mode, scattered
from tests.support import assert_accurate, assert_grads

Peer = prefix_grouper.PrefixGrouper

SHARED = [name for name, value in vars(Peer).items() if isinstance(value, property)]


def both(name, padding="right"):
    mode = padding_mode(padding, GROUPS[name])
    return Peer(GROUPS[name], padding_mode=mode), PrefixGrouper(GROUPS[name], padding_mode=mode)


def causal(q, k, v, mask, *args, **keywords):
    """What the package wants of an attention function: causal from the last query on, under a mask of keys."""
    queries, keys = q.shape[2], k.shape[2]
    visible = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries) & mask[:, None, None]
    # Rows of padding see nothing and are thrown away; without this they would be NaN.
    visible = visible | ~visible.any(dim=-1, keepdim=True)
    return F.scaled_dot_product_attention(q, k, v, visible, scale=keywords.get("scaling"), enable_gqa=True).transpose(
        1, 2
    )


def assert_same(actual, expected):
    """Bits, dtypes and shapes, through tuples."""
    if isinstance(expected, Tensor):
        assert actual.dtype == expected.dtype and actual.shape == expected.shape
        assert torch.equal(actual, expected)
    elif isinstance(expected, tuple) and not isinstance(expected, torch.Size):
        assert len(actual) == len(expected)
        for got, want in zip(actual, expected, strict=True):
            assert_same(got, want)
    else:
        assert actual == expected


def results_and_gradients(function, inputs):
    """What `function` returns, and the gradients of its floating results, each weighted in its own way."""
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    results = function(*leaves)
    results = results if isinstance(results, tuple) else (results,)
    generator = torch.Generator().manual_seed(3)
    outputs = [x for x in results if x.requires_grad]
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in outputs]
    if outputs:
        torch.autograd.backward(outputs, weights)
    return tuple(x.detach() for x in results), tuple(x.grad for x in leaves if x.requires_grad)


def test_every_public_name_is_there():
    names = {name for name in dir(Peer) if not name.startswith("_")}
    assert names <= set(dir(PrefixGrouper)) and len(names) > 25


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", GROUPS)
def test_masks_indices_and_shapes(name, padding):
    peer, ours = both(name, padding)
    assert len(SHARED) == 19
    for shared in SHARED:
        assert_same(getattr(ours, shared), getattr(peer, shared))
        assert_same(getattr(ours.group_info, shared), getattr(peer.group_info, shared))
    for got, want in zip(ours.group_info, peer.group_info, strict=True):
        assert list(got) == list(want)
        for attribute in ("prefix_len", "suffix_lens", "num_samples", "total_len"):
            assert getattr(got, attribute) == getattr(want, attribute)
    assert ours.group_info.batch_size == peer.group_info.batch_size
    assert_same(ours.get_ungroup_args("cpu"), peer.get_ungroup_args("cpu"))


@pytest.mark.parametrize("name", GROUPS)
def test_from_ungrouped_masks(name):
    prefix_mask, suffix_mask, sizes = masks(GROUPS[name])
    for group_sizes in (sizes, sizes[0]) if len(set(sizes)) == 1 else (sizes,):
        for prefix, suffix in ((prefix_mask, suffix_mask), (prefix_mask.long(), suffix_mask.float())):
            peer, ours = (kind.from_ungrouped_masks(prefix, suffix, group_sizes) for kind in (Peer, PrefixGrouper))
            for shared in SHARED:
                assert_same(getattr(ours, shared), getattr(peer, shared))


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("tail", [None, (), (5,), (2, 3)], ids=["ids", "scores", "features", "heads"])
def test_concat_input(name, padding, tail):
    prefix_mask, suffix_mask, _ = masks(GROUPS[name])
    if tail is None:
        inputs = [torch.randint(1, 99, mask.shape) for mask in (prefix_mask, suffix_mask)]
    else:
        inputs = [torch.randn(*mask.shape, *tail) for mask in (prefix_mask, suffix_mask)]
    expected, actual = (
        results_and_gradients(lambda a, b, it=it: it.concat_input(a, prefix_mask, b, suffix_mask), inputs)
        for it in both(name, padding)
    )
    assert_same(actual, expected)


@pytest.mark.parametrize("last", [0, 1, 2, 100])
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", GROUPS)
def test_split_output(name, padding, last):
    peer, ours = both(name, padding)
    # Whole numbers: the gradient of a moved prefix end is a sum, which the two may take in another order.
    output = torch.randint(-9, 9, (*ours.x_shape, 4)).double()
    expected, actual = (
        results_and_gradients(lambda x, it=it: it.split_output(x, include_prefix_last=last), [output])
        for it in (peer, ours)
    )
    assert_same(actual[0], expected[0])
    torch.testing.assert_close(actual[1], expected[1], rtol=1e-12, atol=1e-12)
    assert_same(ours.split_output(output.long(), last), peer.split_output(output.long(), last))


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", GROUPS)
def test_ungroup_and_group(name, padding):
    peer, ours = both(name, padding)
    *inputs, _ = make_inputs(ours.x_shape, 4, 2, 6, 3, torch.float32)
    expected, actual = (results_and_gradients(it.ungroup, inputs) for it in (peer, ours))
    assert_same(actual, expected)
    assert all(x.is_contiguous() for x in (*actual[0], *expected[0]))
    parts = [x.transpose(1, 2) for x in (expected[0][0], expected[0][3])]
    assert_same(*(results_and_gradients(it.group, parts) for it in (ours, peer)))
    assert_same(*(it.batch_repeat_cat(expected[0][1], expected[0][4], cat_dim=2) for it in (ours, peer)))


@pytest.mark.parametrize("padding", PADDINGS)
def test_convert_padding(padding):
    lengths = [4, 0, 7, 1]
    mode = padding_mode(padding, [[length] for length in lengths])
    mask = scattered(lengths)
    for x in (torch.randint(9, mask.shape), torch.randn(mask.shape), torch.randn(*mask.shape, 3)):
        expected, actual = (
            results_and_gradients(lambda y, it=it: it.convert_padding(y, mask, mode), [x])
            for it in (Peer, PrefixGrouper)
        )
        assert_same(actual, expected)


ATTENTIONS = {
    "tree": (None, {}),
    "tree, in place of attn_func": (causal, {"scaling": None, "dropout": 0.0}),
    "tree, scale given": (causal, {"scaling": 0.2, "dropout": 0.0}),
    "attn_func": (causal, {}),
}


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", GROUPS)
def test_forward(name, padding, attention):
    attn_func, keywords = ATTENTIONS[attention]
    peer, ours = both(name, padding)
    *inputs, grad = make_inputs(ours.x_shape, 4, 2, 8, 6, torch.float64)

    def run(it, attn_func):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = it.forward(attn_func, *leaves, **keywords)
        out.backward(grad)
        assert_grads(dict(zip("qkv", leaves, strict=True)))
        return [out.detach(), *(leaf.grad for leaf in leaves)]

    with warnings.catch_warnings():
        warnings.filterwarnings("error" if keywords else "ignore", message="PrefixGrouper.forward")
        actual = run(ours, attn_func)
    for got, want in zip(actual, run(peer, causal), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_forward_is_as_accurate(dtype):
    peer, ours = both("tiles", "left")
    *inputs, grad = make_inputs(ours.x_shape, 4, 2, 64, 64, dtype)

    def run(function, inputs, grad):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        out = function(*leaves)
        out.backward(grad)
        return [out.detach(), *(leaf.grad for leaf in leaves)]

    def theirs(q, k, v):
        return peer.forward(causal, q, k, v)

    exact = run(theirs, [x.double() for x in inputs], grad.double())
    baseline = run(theirs, inputs, grad)
    actual = run(lambda q, k, v: ours.forward(None, q, k, v), inputs, grad)
    for got, want, other in zip(actual, exact, baseline, strict=True):
        assert_accurate(got, want, other)


def test_late_init():
    peer, ours = Peer(), PrefixGrouper()
    assert not hasattr(peer, "group_info") and not hasattr(ours, "group_info")
    for it in (peer, ours):
        it.init(GROUPS["ragged"], padding_mode="left")
    assert_same(ours.padding_mask, peer.padding_mask)


# --- verl -----------------------------------------------------------------------------------------


SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
CONFIGS = {
    "Llama": LlamaConfig(**SIZES),
    # Scale of its own, and a window in its first layer alone.
    "Gemma 3": Gemma3TextConfig(
        **SIZES, query_pre_attn_scalar=9, sliding_window=4, layer_types=["sliding_attention", "full_attention"]
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.filterwarnings("ignore:In CPU autocast")
def test_verl_with_one_import_changed(monkeypatch, config, dtype):
    """verl's grouped forward of a micro-batch, on a transformers model, against that model on whole sequences."""
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", monkey_patch._create_prefix_grouper_wrapper(sdpa))
    monkeypatch.setattr(prefix_grouper_utils, "PrefixGrouper", PrefixGrouper)
    model = AutoModelForCausalLM.from_config(CONFIGS[config], attn_implementation="sdpa")

    lengths, sizes = [(5, 4), (5, 7), (5, 1), (9, 3), (9, 6)], [3, 2]
    prompts, responses = torch.zeros(5, 9, dtype=torch.long), torch.zeros(5, 8, dtype=torch.long)
    own = [torch.randint(1, 97, (9,)) for _ in sizes]
    for row, (prompt, response) in enumerate(lengths):
        prompts[row, 9 - prompt :] = own[row > 2][:prompt]
        responses[row, :response] = torch.randint(1, 97, (response,))
    weights = torch.randn(5, 8)
    batch = {
        "prompts": prompts,
        "responses": responses,
        "response_mask": responses.ne(0),
        "uid": ["a", "a", "a", "b", "b"],
        "pad_token_id": 0,
    }

    def finish(log_probs):
        """Log-probabilities, and the gradients of all parameters as one vector."""
        (log_probs * weights * responses.ne(0)).sum().backward()
        assert_grads(dict(model.named_parameters()))
        grads = torch.cat([param.grad.flatten() for param in model.parameters()])
        model.zero_grad()
        return log_probs.detach(), grads

    def whole(dtype):
        rows = []
        for row, (prompt, response) in enumerate(lengths):
            tokens = torch.cat([prompts[row, 9 - prompt :], responses[row, :response]])
            with torch.autocast("cpu", dtype):
                logits = model(tokens[None], use_cache=False).logits[0, prompt - 1 : -1]
            log_probs = (logits.to(torch.promote_types(logits.dtype, torch.float32)) / 1.3).log_softmax(dim=-1)
            rows.append(F.pad(log_probs.gather(-1, tokens[prompt:, None])[:, 0], (0, 8 - response)))
        return finish(torch.stack(rows))

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="PrefixGrouper.forward")
        grouped = finish(
            prefix_grouper_utils.forward_micro_batch_with_prefix_grouper(batch, model, 1.3, False, "cpu", dtype)[1]
        )
    baseline = whole(dtype)
    model.double()
    for got, want, other in zip(grouped, whole(torch.float64), baseline, strict=True):
        assert (got - want).norm() <= 2.0 * (other - want).norm() <= 0.05 * want.norm()
