"""The PrefixGrouper interface: layouts by hand, objects, what is refused. No peer needed."""

import copy
import doctest
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F

from pykern.integrations import prefix_grouper as module
from pykern.integrations.prefix_grouper import GroupInfo, PrefixGrouper
from tests.integrations.grouped import GROUPS, PADDINGS, make_inputs, masks, padding_mode, scattered

RAGGED = GROUPS["ragged"]


def make(name="ragged", padding="right"):
    return PrefixGrouper(GROUPS[name], padding_mode=padding_mode(padding, GROUPS[name]))


def test_example_of_the_module():
    results = doctest.testmod(module)
    assert results.attempted > 5 and results.failed == 0


# --- layouts --------------------------------------------------------------------------------------


def test_what_it_holds():
    grouper = PrefixGrouper([[2, 1, 2], [1, 2]])
    yes, no = True, False
    assert grouper.prefix_lens.tolist() == [2, 1]
    assert grouper.grouped_suffix_lens.tolist() == [3, 2]
    assert grouper.ungrouped_suffix_lens.tolist() == [1, 2, 2]
    assert grouper.num_samples.tolist() == [2, 1]
    assert grouper.total_lens.tolist() == [5, 3]
    assert grouper.padding_mask.tolist() == [[yes] * 5, [yes, yes, yes, no, no]]
    assert grouper.grouped_prefix_mask.tolist() == [[yes, yes, no, no, no], [yes, no, no, no, no]]
    assert grouper.grouped_suffix_mask.tolist() == [[no, no, yes, yes, yes], [no, yes, yes, no, no]]
    assert grouper.ungrouped_prefix_mask.tolist() == [[yes, yes], [no, yes]]
    assert grouper.ungrouped_suffix_mask.tolist() == [[yes, no], [yes, yes], [yes, yes]]
    assert grouper.prefix_attn_mask.tolist() == [[yes, yes], [no, yes]]
    assert grouper.suffix_attn_mask.tolist() == [[yes, yes, yes, no], [yes, yes, yes, yes], [no, yes, yes, yes]]
    assert grouper.grouped_prefix_indices.tolist() == [[0, 0], [0, 1], [1, 0]]
    assert grouper.grouped_suffix_indices.tolist() == [[0, 2], [0, 3], [0, 4], [1, 1], [1, 2]]
    assert grouper.ungrouped_prefix_indices.tolist() == [[0, 0], [0, 1], [1, 1]]
    assert grouper.ungrouped_suffix_indices.tolist() == [[0, 0], [1, 0], [1, 1], [2, 0], [2, 1]]
    assert grouper.position_ids.tolist() == [[0, 1, 2, 2, 3], [0, 1, 2, 0, 0]]
    assert (grouper.x_shape, grouper.prefix_x_shape, grouper.suffix_x_shape) == ((2, 5), (2, 2), (3, 2))
    assert grouper.tree.subtree_end.tolist() == [5, 5, 3, 5, 5, 8, 8, 8, 8, 9]
    for name in ("prefix_lens", "num_samples", "total_lens", "grouped_prefix_indices", "position_ids"):
        assert getattr(grouper, name).dtype == torch.int64


def test_group_info_is_a_sequence_of_lengths():
    info = PrefixGrouper([[2, 1, 2], (1, torch.tensor(2))]).group_info
    assert isinstance(info, GroupInfo) and len(info) == info.batch_size == 2
    assert [list(sample) for sample in info] == [[2, 1, 2], [1, 2]]
    assert info[0].prefix_len == 2 and info[0].suffix_lens == [1, 2]
    assert info[0].num_samples == 2 and info[0].total_len == 5 and info[1][1:] == [2]
    assert repr(info) == "[Info(prefix_len=2, suffix_lens=[1, 2]), Info(prefix_len=1, suffix_lens=[2])]"


def test_left_padding_and_masks_place_the_tokens():
    left = PrefixGrouper([[2, 1, 2], [1, 2]], padding_mode="left")
    assert left.padding_mask[1].tolist() == [False, False, True, True, True]
    assert left.position_ids[1].tolist() == [0, 0, 0, 1, 2]
    mask = torch.tensor([[1, 1, 0, 1, 1, 1], [0, 1, 0, 1, 1, 0]])
    gaps = PrefixGrouper([[2, 1, 2], [1, 2]], padding_mode=mask)
    assert gaps.padding_mask.dtype == torch.bool and torch.equal(gaps.padding_mask, mask.bool())
    assert gaps.grouped_prefix_indices.tolist() == [[0, 0], [0, 1], [1, 1]]
    assert gaps.grouped_suffix_indices.tolist() == [[0, 3], [0, 4], [0, 5], [1, 3], [1, 4]]
    assert gaps.position_ids.tolist() == [[0, 1, 0, 2, 2, 3], [0, 0, 0, 1, 2, 0]]


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", GROUPS)
def test_concat_input_and_split_output(name, padding):
    """Token by token, from masks with tokens anywhere."""
    group_info = GROUPS[name]
    prefix_mask, suffix_mask, sizes = masks(group_info)
    grouper = PrefixGrouper.from_ungrouped_masks(
        prefix_mask.long(), suffix_mask, sizes, padding_mode=padding_mode(padding, group_info)
    )
    assert [list(info) for info in grouper.group_info] == group_info
    prefix = torch.arange(1, 1 + prefix_mask.numel()).view(prefix_mask.shape)
    suffix = torch.arange(1001, 1001 + suffix_mask.numel()).view(suffix_mask.shape)
    grouped = grouper.concat_input(prefix, prefix_mask, suffix, suffix_mask)
    assert grouped.dtype == torch.int64 and grouped.shape == grouper.padding_mask.shape
    begin = 0
    for sample, size in enumerate(sizes):
        own = [prefix[sample][prefix_mask[sample]]]
        own += [suffix[row][suffix_mask[row]] for row in range(begin, begin + size)]
        assert torch.equal(grouped[sample][grouper.padding_mask[sample]], torch.cat(own))
        begin += size
    assert not grouped[~grouper.padding_mask].any()

    features = grouper.concat_input(
        F.one_hot(prefix, 2000).to(torch.bfloat16)[..., None],
        prefix_mask,
        F.one_hot(suffix, 2000).to(torch.bfloat16)[..., None],
        suffix_mask,
    )
    assert features.dtype == torch.bfloat16
    assert torch.equal(features[..., 0].argmax(dim=-1), grouped)

    for output in (grouped, features):
        parts = grouper.split_output(output)
        for part, mask, source, source_mask in zip(
            parts[::2], parts[1::2], (prefix, suffix), (prefix_mask, suffix_mask), strict=True
        ):
            part = part[..., 0].argmax(dim=-1) if part.dim() > 2 else part
            assert part.shape == mask.shape and torch.equal(part[mask], source[source_mask])
            assert not part[~mask].any()


@pytest.mark.parametrize("count", [0, 1, 2, 30])
@pytest.mark.parametrize("name", GROUPS)
def test_split_output_moves_the_end_of_the_prefix(name, count):
    grouper = make(name)
    output = torch.arange(1, 1 + grouper.padding_mask.numel()).view(grouper.x_shape)
    prefix, prefix_mask, suffix, suffix_mask = grouper.split_output(output, include_prefix_last=count)
    longest_prefix, longest_suffix = grouper.prefix_x_shape[1], grouper.suffix_x_shape[1]
    moved = min(count, longest_prefix)
    assert prefix.shape == prefix_mask.shape == (len(GROUPS[name]), longest_prefix - moved)
    assert suffix.shape == suffix_mask.shape == (len(suffix), longest_suffix + moved)
    row = 0
    for sample, (prefix_len, *suffix_lens) in enumerate(GROUPS[name]):
        own = output[sample].tolist()
        kept, given = own[: max(prefix_len - moved, 0)], own[max(prefix_len - moved, 0) : prefix_len]
        assert prefix[sample].tolist() == [0] * (longest_prefix - moved - len(kept)) + kept
        begin = prefix_len
        for length in suffix_lens:
            expected = [0] * (moved - len(given)) + given + own[begin : begin + length]
            assert suffix[row].tolist() == expected + [0] * (longest_suffix + moved - len(expected))
            assert suffix_mask[row].tolist() == [bool(token) for token in suffix[row].tolist()]
            begin, row = begin + length, row + 1


def test_split_output_can_be_written_to():
    """As log-probabilities are made: logits /= temperature."""
    output = torch.randn(3, 16, 4, requires_grad=True)
    prefix, _, suffix, _ = make().split_output(output, include_prefix_last=1)
    suffix = suffix[:, :-1]
    suffix /= 2
    prefix /= 3
    (prefix.sum() + suffix.sum()).backward()
    # Sample 1 has 11 prompt tokens, the last of them for one suffix, and 2 tokens of a suffix, none of them cut off.
    assert output.grad[1, :, 0].tolist() == pytest.approx([1 / 3] * 10 + [1 / 2] * 3 + [0.0] * 3)


@pytest.mark.parametrize("padding", PADDINGS)
def test_convert_padding(padding):
    lengths = [4, 0, 7, 1]
    mode = padding_mode(padding, [[length] for length in lengths])
    mask = scattered(lengths)
    x = torch.randn(*mask.shape, 3)
    result = PrefixGrouper.convert_padding(x, mask, padding_mode=mode)
    placed = (
        mode if isinstance(mode, torch.Tensor) else PrefixGrouper([[n, 0] for n in lengths], None, mode).padding_mask
    )
    assert result.shape == (*placed.shape, 3)
    assert torch.equal(result[placed], x[mask]) and not result[~placed].any()
    ids = torch.arange(mask.numel()).view(mask.shape)
    assert torch.equal(PrefixGrouper.convert_padding(ids, mask.int(), mode)[placed], ids[mask])


def test_ungroup_and_group():
    grouper = make("ragged", "left mask")
    q, k, v, _ = make_inputs(grouper.x_shape, 4, 2, 8, 6, torch.float32)
    parts = grouper.ungroup(q, k, v)
    assert [tuple(part.shape) for part in parts] == [
        (3, 4, 11, 8), (3, 2, 11, 8), (3, 2, 11, 6), (6, 4, 7, 8), (6, 2, 7, 8), (6, 2, 7, 6),
    ]  # fmt: skip
    assert all(part.is_contiguous() for part in parts)
    for x, prefix, suffix in zip((q, k, v), parts[:3], parts[3:], strict=True):
        for part, mask, place in (
            (prefix, grouper.ungrouped_prefix_mask, grouper.grouped_prefix_mask),
            (suffix, grouper.ungrouped_suffix_mask, grouper.grouped_suffix_mask),
        ):
            part = part.transpose(1, 2)
            assert torch.equal(part[mask], x.transpose(1, 2)[place]) and not part[~mask].any()
        whole = grouper.group(prefix.transpose(1, 2), suffix.transpose(1, 2))
        expected = x.transpose(1, 2).masked_fill(~grouper.padding_mask[..., None, None], 0.0)
        assert torch.equal(whole, expected)


@pytest.mark.parametrize("padding", ["right", "gaps"])
def test_gradients_of_the_layouts(padding):
    """Each is a copy, so it is its own derivative; second derivatives too."""
    prefix_mask, suffix_mask, sizes = masks(RAGGED)
    grouper = PrefixGrouper.from_ungrouped_masks(
        prefix_mask, suffix_mask, sizes, padding_mode=padding_mode(padding, RAGGED)
    )
    prefix = torch.randn(*prefix_mask.shape, 2, dtype=torch.float64, requires_grad=True)
    suffix = torch.randn(*suffix_mask.shape, 2, dtype=torch.float64, requires_grad=True)
    x = torch.randn(*grouper.x_shape, 2, dtype=torch.float64, requires_grad=True)
    heads = torch.randn(3, 1, grouper.x_shape[1], 2, dtype=torch.float64, requires_grad=True)

    def join(a, b):
        return grouper.concat_input(a, prefix_mask, b, suffix_mask)

    for function, inputs in (
        (join, (prefix, suffix)),
        (lambda y: grouper.split_output(y, 0)[::2], (x,)),
        (lambda y: grouper.split_output(y, 2)[::2], (x,)),
        (lambda y: grouper.ungroup(y, y, y), (heads,)),
        (lambda y: grouper.convert_padding(y, suffix_mask, "left"), (suffix,)),
    ):
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


def test_gradients_of_moved_prefix_ends_are_summed_in_float32():
    grouper = PrefixGrouper([[4] + [1] * 300])
    output = torch.zeros(1, 304, 3, dtype=torch.bfloat16, requires_grad=True)
    suffix = grouper.split_output(output, include_prefix_last=1)[2]
    suffix.backward(torch.full_like(suffix, 1.0))
    # In bfloat16, a sum of ones ends at 256.
    assert output.grad[0, 3].tolist() == [torch.tensor(300.0).bfloat16().item()] * 3


# --- objects --------------------------------------------------------------------------------------


def test_late_init():
    grouper = PrefixGrouper()
    assert not hasattr(grouper, "group_info")
    for use in (
        lambda: grouper.padding_mask,
        lambda: grouper.forward(None, *[torch.zeros(1, 1, 1, 1)] * 3),
        lambda: grouper.split_output(torch.zeros(1, 1)),
        lambda: grouper.concat_input(*[torch.ones(1, 1)] * 4),
    ):
        with pytest.raises(
            AttributeError, match=r"^\w+: this PrefixGrouper has no group_info yet; call init\(group_info\)"
        ):
            use()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        grouper.init(RAGGED, padding_mode="left")
    assert torch.equal(grouper.padding_mask, PrefixGrouper(RAGGED, None, "left").padding_mask)
    with pytest.warns(UserWarning, match="the group_info it had is replaced"):
        grouper.init([[1, 1]])
    assert grouper.x_shape == (1, 2)
    with pytest.raises(AttributeError, match="^PrefixGrouper has no attribute 'unheard_of'$"):
        grouper.unheard_of  # noqa: B018


@pytest.mark.parametrize("twin", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies(twin):
    assert not hasattr(twin(PrefixGrouper()), "group_info")
    grouper = make("ragged", "gaps")
    grouper.attached_by_a_trainer = 3
    other = twin(grouper)
    q, k, v, _ = make_inputs(grouper.x_shape, 2, 2, 8, 8, torch.float32)
    assert torch.equal(other.forward(None, q, k, v), grouper.forward(None, q, k, v))
    assert other.attached_by_a_trainer == 3


def test_device_is_where_masks_are_made():
    grouper = PrefixGrouper(RAGGED, device="meta")
    assert grouper.padding_mask.is_meta and grouper.suffix_attn_mask.is_meta and grouper.position_ids.is_meta
    with torch.device("meta"):
        assert PrefixGrouper(RAGGED).padding_mask.is_meta
        assert not PrefixGrouper(RAGGED, device="cpu", padding_mode="left").padding_mask.is_meta
    assert not PrefixGrouper(RAGGED, padding_mode=padding_mode("gaps", RAGGED)).tree.subtree_end.is_meta


def test_tensors_may_be_on_another_device(device):
    """Every method computes where its tensors are."""
    prefix_mask, suffix_mask, sizes = masks(RAGGED)
    grouper = PrefixGrouper.from_ungrouped_masks(
        prefix_mask, suffix_mask, sizes, padding_mode=padding_mode("gaps", RAGGED)
    )
    prefix, suffix = (torch.randn(*mask.shape, 4, device=device) for mask in (prefix_mask, suffix_mask))
    grouped = grouper.concat_input(prefix, prefix_mask, suffix, suffix_mask)
    parts = grouper.split_output(grouped, include_prefix_last=1)
    q, k, v, _ = (x.to(device) for x in make_inputs(grouper.x_shape, 2, 2, 16, 16, torch.bfloat16))
    out = grouper.forward(None, q, k, v)
    converted = grouper.convert_padding(suffix, suffix_mask, "left")
    assert {x.device for x in (grouped, parts[0], parts[2], out, converted)} == {device}
    assert grouper.forward(None, q, k, v).device == device


# --- what is refused ------------------------------------------------------------------------------

ONES = torch.ones(2, 3)
REFUSED = [
    (lambda: PrefixGrouper([]), ValueError, "group_info: expected at least one sample, got none"),
    (
        lambda: PrefixGrouper([[1, 2], [5]]),
        ValueError,
        "group_info[1]: expected [prefix length, suffix length, ...] with at least one suffix, got [5]",
    ),
    (lambda: PrefixGrouper([[3, -1]]), ValueError, "group_info[0]: expected lengths of at least 0, got [3, -1]"),
    (
        lambda: PrefixGrouper([[3, 1.5]]),
        TypeError,
        "group_info[0]: expected integers [prefix length, suffix length, ...], got [3, 1.5]",
    ),
    (
        lambda: PrefixGrouper([3, 1]),
        TypeError,
        "group_info[0]: expected integers [prefix length, suffix length, ...], got 3",
    ),
    (
        lambda: PrefixGrouper([[3, 1]], padding_mode="both"),
        ValueError,
        """padding_mode: expected "left", "right" or a mask tensor, got 'both'""",
    ),
    (lambda: PrefixGrouper([[3, 1]], padding_mode=3), TypeError, "padding_mode: expected a tensor, got int"),
    (
        lambda: PrefixGrouper([[3, 1]], padding_mode=torch.ones(4)),
        ValueError,
        "padding_mode: expected two dimensions [rows, tokens], got shape (4,)",
    ),
    (
        lambda: PrefixGrouper([[3, 1]], padding_mode=torch.ones(2, 4)),
        ValueError,
        "padding_mode: expected a mask of 1 rows, got 2",
    ),
    (
        lambda: PrefixGrouper([[3, 1]], padding_mode=torch.ones(1, 5)),
        ValueError,
        "padding_mode: expected rows of [4] tokens, got [5]",
    ),
    (
        lambda: PrefixGrouper.from_ungrouped_masks(torch.ones(3), ONES, 2),
        ValueError,
        "prefix_mask: expected two dimensions [rows, tokens], got shape (3,)",
    ),
    (
        lambda: PrefixGrouper.from_ungrouped_masks(ONES, [[1]], 2),
        TypeError,
        "suffix_mask: expected a tensor, got list",
    ),
    (
        lambda: PrefixGrouper.from_ungrouped_masks(ONES, ONES, 2),
        ValueError,
        "group_sizes: expected a sum of 2, the rows of suffix_mask, got 4",
    ),
    (
        lambda: PrefixGrouper.from_ungrouped_masks(ONES, ONES, [2]),
        ValueError,
        "group_sizes: expected one for each of the 2 prefixes, got 1",
    ),
    (
        lambda: PrefixGrouper.from_ungrouped_masks(ONES, ONES, [2, 0]),
        ValueError,
        "group_sizes: expected at least 1 suffix in each sample, got 0",
    ),
    (
        lambda: PrefixGrouper.from_ungrouped_masks(ONES, ONES, "11"),
        TypeError,
        "group_sizes: expected an integer or a list of them, got '11'",
    ),
    (
        lambda: make().split_output(torch.zeros(3, 7)),
        ValueError,
        "output: expected [3, 16, ...], the shape of the padding mask, got shape (3, 7)",
    ),
    (
        lambda: make().split_output(torch.zeros(3, 16), -1),
        ValueError,
        "include_prefix_last: expected at least 0, got -1",
    ),
    (
        lambda: make().split_output(torch.zeros(3, 16), 1.0),
        TypeError,
        "include_prefix_last: expected an integer, got float",
    ),
    (
        lambda: PrefixGrouper([[3, 3], [2, 3]]).concat_input(ONES, ONES, ONES, ONES),
        ValueError,
        (
            "prefix_mask: expected rows of [3, 2] tokens, as group_info says, got [3, 3]; make the PrefixGrouper by "
            "from_ungrouped_masks(prefix_mask, suffix_mask, group_sizes)"
        ),
    ),
    (
        lambda: PrefixGrouper([[3, 3], [3, 3]]).concat_input(ONES, ONES, torch.ones(2, 4), ONES),
        ValueError,
        "suffix: expected [2, 3, ...], the shape of suffix_mask, got shape (2, 4)",
    ),
    (
        lambda: PrefixGrouper([[3, 3], [3, 3]]).concat_input(ONES, ONES, ONES.long(), ONES),
        TypeError,
        "suffix: expected the prefix's dtype torch.float32, got torch.int64; cast them alike",
    ),
    (
        lambda: PrefixGrouper([[3, 3], [3, 3]]).concat_input(ONES, ONES, torch.ones(2, 3, 4), ONES),
        ValueError,
        "suffix: expected tokens of shape (), as the prefix has, got (4,)",
    ),
    (
        lambda: PrefixGrouper.convert_padding(ONES, torch.ones(2, 4)),
        ValueError,
        "x: expected [2, 4, ...], the shape of x_mask, got shape (2, 3)",
    ),
    (
        lambda: PrefixGrouper.convert_padding(ONES, ONES, "middle"),
        ValueError,
        """padding_mode: expected "left", "right" or a mask tensor, got 'middle'""",
    ),
    (
        lambda: make().forward(None, *[torch.zeros(3, 2, 9, 8)] * 3),
        ValueError,
        "q: expected [3, heads, 16, head size], as the padding mask is [3, 16], got shape (3, 2, 9, 8)",
    ),
    (lambda: make().ungroup(None, None, None), TypeError, "q: expected a tensor, got NoneType"),
    (lambda: make().forward(3, None, None, None), TypeError, "attn_func: expected a function or None, got int"),
    (
        lambda: make().forward(None, *[torch.zeros(3, 2, 16, 8)] * 3, scale=1.0, scaling=2.0),
        TypeError,
        "scaling: expected one keyword for the scale, got two",
    ),
    (
        lambda: make().forward(None, *[torch.zeros(3, 2, 16, 8)] * 3, window_size=4),
        TypeError,
        "window_size: expected (left, right) or None, got int",
    ),
    (
        lambda: make().group(torch.zeros(3, 11, 2, 8), torch.zeros(6, 8, 2, 8)),
        ValueError,
        "o_suffix: expected [6, 7, ...], the shape of the suffixes, got shape (6, 8, 2, 8)",
    ),
    (
        lambda: make().batch_repeat_cat(torch.zeros(2, 1), torch.zeros(6, 1), 1),
        ValueError,
        "prefix: expected 3 rows, one per sample, got 2",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), REFUSED, ids=[message[:50] for _, _, message in REFUSED])
def test_refused(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message
