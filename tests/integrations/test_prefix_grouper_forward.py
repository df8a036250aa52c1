"""PrefixGrouper.forward: attention against repeated prefixes, what becomes of attn_func, what is not copied or read."""

import warnings

import pytest
import torch
import torch.nn.functional as F

import pykern
from pykern.integrations import prefix_grouper as module
from pykern.integrations.prefix_grouper import PrefixGrouper
from tests.integrations.grouped import GROUPS, PADDINGS, make_inputs, padding_mode, repeated
from tests.support import assert_accurate, assert_grads, compile_whole

RAGGED = GROUPS["ragged"]


def make(name="ragged", padding="right"):
    return PrefixGrouper(GROUPS[name], padding_mode=padding_mode(padding, GROUPS[name]))


def causal(q, k, v, mask, *args, **kwargs):
    """An attention function as users of the package write them."""
    queries, keys = q.shape[2], k.shape[2]
    visible = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries) & mask[:, None, None]
    # Rows of padding see nothing and are thrown away; without this they would be NaN.
    visible = visible | ~visible.any(dim=-1, keepdim=True)
    scale = kwargs.get("scale", kwargs.get("scaling"))
    return F.scaled_dot_product_attention(q, k, v, visible, scale=scale, enable_gqa=True).transpose(1, 2)


def never(*args, **kwargs):
    raise AssertionError("attn_func was called")


def with_gradients(function, inputs, grad):
    leaves = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in inputs]
    out = function(*leaves)
    out.backward(grad)
    assert_grads(dict(zip("qkv", leaves, strict=True)))
    return [out.detach(), *(leaf.grad for leaf in leaves)]


# --- attention ------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_forward_equals_repeated_prefixes(name, padding, dtype):
    check_forward(make(name, padding), GROUPS[name], dtype, torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("padding", ["right", "gaps"])
def test_forward_on_every_device(device, padding, dtype):
    check_forward(make("ragged", padding), RAGGED, dtype, device)


def check_forward(grouper, group_info, dtype, device):
    *inputs, grad = make_inputs(grouper.x_shape, 4, 2, 32, 32, dtype)
    actual = with_gradients(
        lambda q, k, v: grouper.forward(never, q, k, v, scaling=0.2, dropout=0.0),
        [x.to(device) for x in inputs],
        grad.to(device),
    )
    assert actual[0].shape == (*grouper.x_shape, 4, 32) and actual[0].dtype == dtype and actual[0].device == device

    def plain(q, k, v):
        return repeated(group_info, grouper.padding_mask, q, k, v, scale=0.2)

    exact = with_gradients(plain, [x.double() for x in inputs], grad.double())
    baseline = with_gradients(plain, inputs, grad)
    for got, want, other in zip(actual, exact, baseline, strict=True):
        assert_accurate(got, want, other, units=4.0 if dtype == torch.float32 else 1.0)


@pytest.mark.parametrize("padding", ["right", "left", "gaps"])
def test_forward_gradcheck(padding):
    grouper = PrefixGrouper([[3, 2, 0, 1], [1, 2]], padding_mode=padding_mode(padding, [[3, 2, 0, 1], [1, 2]]))
    inputs = [x.requires_grad_() for x in make_inputs(grouper.x_shape, 2, 1, 4, 3, torch.float64)[:3]]
    assert torch.autograd.gradcheck(lambda q, k, v: grouper.forward(None, q, k, v), inputs)


OPTIONS = [
    {"scale": 0.3},
    {"window": 3},
    {"softcap": 1.5},
    {"sinks": torch.tensor([0.5, -1.0])},
    {"alibi_slopes": torch.tensor([0.5, 0.1])},
    {"scale": -0.2, "window": 4, "softcap": 2.0, "sinks": torch.tensor([1.0, 0.0])},
]


@pytest.mark.parametrize("padding", ["right", "left", "gaps"])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "+".join(options))
def test_forward_with_options(options, padding):
    """They count along each sequence, not along the row that shares its prefix."""
    grouper = make("ragged", padding)
    *inputs, grad = make_inputs(grouper.x_shape, 2, 1, 8, 8, torch.float64)
    actual = with_gradients(lambda q, k, v: grouper.forward(None, q, k, v, **options), inputs, grad)
    exact = with_gradients(lambda q, k, v: repeated(RAGGED, grouper.padding_mask, q, k, v, **options), inputs, grad)
    for got, want in zip(actual, exact, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("padding", PADDINGS)
def test_padding_is_not_read(padding):
    grouper = make("ragged", padding)
    *inputs, grad = make_inputs(grouper.x_shape, 4, 2, 16, 16, torch.float32)
    empty = ~grouper.padding_mask

    def run(value):
        filled = [x.transpose(1, 2).masked_fill(empty[..., None, None], value).transpose(1, 2) for x in inputs]
        return with_gradients(
            lambda q, k, v: grouper.forward(None, q, k, v), filled, grad.masked_fill(empty[..., None, None], value)
        )

    clean, poisoned = run(0.0), run(float("nan"))
    for got, want in zip(poisoned, clean, strict=True):
        assert torch.equal(got, want) and got.isfinite().all()
    out, *grads = poisoned
    assert not out[empty].any()
    assert not any(x.transpose(1, 2)[empty].any() for x in grads)


def test_forward_repeats_bit_for_bit():
    grouper = make("tiles", "left")
    *inputs, grad = make_inputs(grouper.x_shape, 4, 2, 32, 32, torch.bfloat16)
    first = with_gradients(lambda q, k, v: grouper.forward(None, q, k, v), inputs, grad)
    for _ in range(5):
        again = with_gradients(lambda q, k, v: grouper.forward(None, q, k, v), inputs, grad)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("padding", ["right", "left", "right mask"])
def test_one_call_without_copies(monkeypatch, padding):
    """The model's projections reach prefix_attention as they are: no prefix is repeated, nothing is moved."""
    grouper = make("ragged", padding)
    q, k, v, _ = make_inputs(grouper.x_shape, 4, 2, 16, 16, torch.float32)
    calls = []

    def spy(*args, **kwargs):
        calls.append(args)
        return pykern.prefix_attention(*args, **kwargs)

    monkeypatch.setattr(module, "prefix_attention", spy)
    grouper.forward(never, q, k, v, scale=None)
    assert len(calls) == 1
    for given, x in zip(calls[0], (q, k, v), strict=False):
        assert given.shape[0] == grouper.padding_mask.numel() and given.data_ptr() == x.data_ptr()
    assert calls[0][3] is grouper.tree


@pytest.mark.parametrize("padding", ["right", "gaps"])
def test_compiles_whole(padding):
    grouper = make("ragged", padding)
    *inputs, grad = make_inputs(grouper.x_shape, 4, 2, 16, 16, torch.float32)

    def attend(q, k, v):
        return grouper.forward(never, q, k, v, scaling=0.25)

    eager, compiled = (with_gradients(f, inputs, grad) for f in (attend, compile_whole(attend)))
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))


def test_autocast():
    grouper = make()
    q, k, v, _ = make_inputs(grouper.x_shape, 4, 2, 16, 16, torch.float32)
    expected = grouper.forward(None, q.bfloat16(), k.bfloat16(), v.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        # As rotary embeddings leave it.
        out = grouper.forward(None, q, k, v.bfloat16())
    assert out.dtype == torch.bfloat16 and torch.equal(out, expected)


def test_made_in_inference_mode_and_trained_with():
    with torch.inference_mode():
        grouper = make("ragged", "gaps")
    *inputs, grad = make_inputs(grouper.x_shape, 2, 2, 8, 8, torch.float32)
    with_gradients(lambda q, k, v: grouper.forward(None, q, k, v), inputs, grad)
    output = torch.randn(*grouper.x_shape, 2, requires_grad=True)
    grouper.split_output(output, 1)[2].sum().backward()
    assert output.grad is not None


# --- attn_func ------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["right", "left", "gaps"])
@pytest.mark.parametrize("name", ["uniform", "ragged", "zero lengths", "no tokens"])
def test_attn_func_gives_what_the_tree_gives(name, padding):
    grouper = make(name, padding)
    *inputs, grad = make_inputs(grouper.x_shape, 4, 2, 8, 8, torch.float64)
    one = with_gradients(lambda q, k, v: grouper.forward(None, q, k, v), inputs, grad)
    with pytest.warns(UserWarning, match="no keyword says what it computes"):
        two = with_gradients(lambda q, k, v: grouper.forward(causal, q, k, v), inputs, grad)
    for got, want in zip(two, one, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


def test_what_attn_func_is_given():
    grouper = make()
    grouper.use_attn_func = True
    q, k, v, _ = make_inputs(grouper.x_shape, 4, 2, 8, 6, torch.float32)
    calls = []

    def attn_func(q, k, v, mask, *args, **kwargs):
        calls.append((q, k, v, mask, args, kwargs))
        return causal(q, k, v, mask)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        grouper.forward(attn_func, q, k, v, "more", dropout=0.0, module=1)
    first, second = calls
    assert [tuple(x.shape) for x in first[:4]] == [(3, 4, 11, 8), (3, 2, 11, 8), (3, 2, 11, 6), (3, 11)]
    assert [tuple(x.shape) for x in second[:4]] == [(6, 4, 7, 8), (6, 2, 18, 8), (6, 2, 18, 6), (6, 18)]
    assert torch.equal(first[3], grouper.prefix_attn_mask) and torch.equal(second[3], grouper.suffix_attn_mask)
    assert torch.equal(second[1][0, :, :11], first[1][0]) and torch.equal(second[1][3, :, :11], first[1][1])
    assert all(call[4:] == (("more",), {"dropout": 0.0, "module": 1}) for call in calls)


SAID = [
    ({"scale": 0.5}, {"scale": 0.5}),
    ({"scaling": 0.5, "dropout": 0.0, "sliding_window": None}, {"scale": 0.5}),
    ({"softmax_scale": None}, {}),
    ({"dropout": 0.0, "sliding_window": 4, "is_causal": True, "use_top_left_mask": False}, {"window": 4}),
    ({"dropout_p": 0.0, "causal": True, "window_size": (3, 0)}, {"window": 4}),
    ({"window_size": (-1, -1), "softcap": 0.0, "alibi_slopes": None, "deterministic": True}, {}),
    ({"window": 2, "softcap": 3.0, "position_ids": torch.zeros(1), "use_cache": False}, {"window": 2, "softcap": 3.0}),
    ({"scaling": 0.5, "s_aux": torch.ones(2), "unheard_of": None}, {"scale": 0.5, "sinks": torch.ones(2)}),
    ({"sinks": torch.ones(2), "alibi_slopes": torch.ones(2)}, {"sinks": torch.ones(2), "alibi_slopes": torch.ones(2)}),
]


@pytest.mark.parametrize(("keywords", "options"), SAID, ids=lambda case: "+".join(case))
def test_keywords_that_prefix_attention_is_told(monkeypatch, keywords, options):
    grouper = make()
    q, k, v, _ = make_inputs(grouper.x_shape, 2, 2, 8, 8, torch.float32)
    told = []

    def spy(q, k, v, tree, **given):
        told.append(given)
        return torch.zeros_like(q)

    monkeypatch.setattr(module, "prefix_attention", spy)
    for attn_func in (never, None):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            grouper.forward(attn_func, q, k, v, **keywords)
    for given in told:
        assert given.keys() == options.keys()
        assert all(torch.equal(torch.as_tensor(given[name]), torch.as_tensor(options[name])) for name in options)
    assert len(told) == 2


BEYOND = [
    ((), {"dropout": 0.1}, "dropout=0.1"),
    ((), {"dropout_p": 0.5, "scale": 1.0}, "dropout_p=0.5"),
    ((), {"is_causal": False, "scaling": 1.0}, "is_causal=False"),
    ((), {"scale": 1.0, "position_bias": torch.zeros(1)}, "the keyword position_bias"),
    ((7, 8), {"scale": 1.0}, "2 further positional arguments"),
]


@pytest.mark.parametrize(("args", "keywords", "what"), BEYOND, ids=lambda case: str(case)[:30])
def test_attn_func_computes_what_prefix_attention_cannot(args, keywords, what):
    grouper = make()
    q, k, v, _ = make_inputs(grouper.x_shape, 4, 2, 8, 8, torch.float32)
    with pytest.warns(UserWarning, match=f"attn_func is called, twice .*, as prefix_attention can't take {what}; for"):
        out = grouper.forward(causal, q, k, v, *args, **keywords)
    scale = keywords.get("scale", keywords.get("scaling"))
    torch.testing.assert_close(out, grouper.forward(None, q, k, v, scale=scale))
    message = f"^forward: prefix_attention can't take {what}; leave it out, or pass an attn_func that can$"
    with pytest.raises(ValueError, match=message):
        grouper.forward(None, q, k, v, *args, **keywords)
    grouper.use_attn_func = False
    with pytest.raises(ValueError, match=message):
        grouper.forward(causal, q, k, v, *args, **keywords)


def test_use_attn_func_settles_it(monkeypatch):
    grouper = make()
    q, k, v, _ = make_inputs(grouper.x_shape, 4, 2, 8, 8, torch.float32)
    expected = grouper.forward(None, q, k, v)
    monkeypatch.setattr(PrefixGrouper, "use_attn_func", False)
    assert torch.equal(grouper.forward(never, q, k, v), expected)
    monkeypatch.setattr(PrefixGrouper, "use_attn_func", True)
    with pytest.raises(AssertionError, match="attn_func was called"):
        grouper.forward(never, q, k, v, scale=1.0)
    with pytest.raises(ValueError, match="^attn_func: expected a function, since use_attn_func is True, got None$"):
        grouper.forward(None, q, k, v)
