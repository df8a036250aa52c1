"""policy_loss where a kernel cuts its work: tiles, parts of long sequences, words of the mask, unaligned tensors."""

import pytest
import torch

import pykern
from tests.policy.loss_cases import TOKENS, arguments, batch, definition, ours
from tests.policy.test_loss import assert_matches


def pack_of(lengths: list[int], dtype=torch.float32, *, masked=False, per_token=False) -> dict:
    """Packed sequences of these lengths."""
    total = sum(lengths)
    rows = batch(1, max(total, 1), dtype=dtype, per_token=True, poisoned=masked)
    tensors = {name: rows[name][0, :total] for name in (*TOKENS, "advantages", "mask")}
    if not masked:
        del tensors["mask"]
    if not per_token:
        tensors["advantages"] = torch.randn(len(lengths)).to(dtype)
    return tensors | {"cu_seqlens": torch.tensor([0, *lengths]).cumsum(0)}


def unaligned(tensors: dict) -> dict:
    """The same values one element behind an aligned address."""
    moved = {}
    for name, tensor in tensors.items():
        space = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:]
        moved[name] = space.view(tensor.shape).copy_(tensor)
    return moved


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("columns", [127, 128, 511, 512, 513, 2049])
@pytest.mark.parametrize("loss", ["grpo", "gspo", "gmpo"])
def test_columns_around_a_tile(loss, columns):
    assert_matches(*arguments(batch(3, columns, dtype=torch.float32), loss=loss, kl="k3"))


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("aggregate", pykern.AGGREGATES)
@pytest.mark.parametrize("loss", ["grpo", "gspo", "vespo", "gmpo"])
def test_packed_lengths_around_tiles_and_words(loss, aggregate, masked):
    tensors = pack_of([0, 1, 511, 0, 513, 3, 1024, 31, 33, 0], masked=masked)
    assert_matches(*arguments(tensors, loss=loss, aggregate=aggregate, horizon=100.0))


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("loss", ["grpo", "gspo", "gmpo"])
@pytest.mark.parametrize("lengths", [[7001], [3, 5190, 700]])
def test_long_sequences_in_parts(lengths, loss, dtype):
    for per_token in (False, True):
        tensors = pack_of(lengths, dtype, masked=True, per_token=per_token)
        positional, named = arguments(tensors, loss=loss, kl="k2", rollout=True, aggregate="seq-mean-token-mean")
        if dtype == torch.float32:
            assert_matches(positional, named)
            continue
        # Nothing is more exact than the definition here, and the CPU's sums run over thousands of tokens in a row.
        for got, want in zip(ours(positional, named), definition(positional, named)):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("aggregate", ["seq-mean-token-mean", "seq-mean-token-sum"])
def test_many_short_sequences(aggregate):
    lengths = [index % 5 for index in range(300)]
    assert_matches(*arguments(pack_of(lengths), aggregate=aggregate))
    assert_matches(*arguments(pack_of(lengths, masked=True), aggregate=aggregate))


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("loss", ["grpo", "gspo", "gmpo"])
def test_unaligned_tensors(loss, dtype):
    tensors = batch(3, 200, dtype=dtype, per_token=True)
    straight = ours(*arguments(tensors, loss=loss, kl="k3", rollout=True))
    moved = ours(*arguments(unaligned(tensors), loss=loss, kl="k3", rollout=True))
    assert torch.equal(straight[0], moved[0]) and torch.equal(straight[2], moved[2])


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("loss", ["grpo", "gspo", "gmpo"])
def test_repeats_match_bit_for_bit(loss):
    positional, named = arguments(pack_of([700, 12, 2000], masked=True), loss=loss, kl="k3")
    first, again = ours(positional, named), ours(positional, named)
    assert torch.equal(first[0], again[0]) and torch.equal(first[2], again[2])
    assert all(torch.equal(first[1][name], again[1][name]) for name in first[1])


@pytest.mark.parametrize("offsets", [[0, 60, 30, 999], [-7, 20, 100], [50, 20, 0]])
@pytest.mark.parametrize("loss", ["grpo", "gspo", "gmpo"])
def test_wrong_offsets_touch_no_other_memory(loss, offsets, device):
    """Only the CPU's code can look at the offsets without waiting; a kernel keeps to its tensors all the same."""
    tensors = pack_of([100, 0]) | {"cu_seqlens": torch.tensor(offsets)}
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    tensors["advantages"] = torch.ones(len(offsets) - 1, device=device)
    positional, named = arguments(tensors, loss=loss, kl="k1")
    try:
        pykern.policy_loss(*positional, **named)
    except RuntimeError as error:
        assert "cu_seqlens: expected" in str(error)
