"""pack: token ids, predictor rows, targets."""

import random

import pytest
import torch

import pykern
from pykern.reference.attention import visibility


def random_batch(seed):
    generator = random.Random(seed)

    def tokens(least):
        return [generator.randrange(3) for _ in range(generator.randrange(least, 6))]

    prompts = [tokens(1) for _ in range(generator.randrange(1, 5))]
    return prompts, [[tokens(0) for _ in range(generator.randrange(4))] for _ in prompts]


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("seed", range(10))
def test_every_target_is_predicted_from_its_own_context(seed, merge):
    prompts, responses = random_batch(seed)
    batch = pykern.pack(prompts, responses, merge=merge)
    visible = visibility(batch.tree.subtree_end)
    bounds = batch.cu_seqlens.tolist()
    flat = [(prompt, response) for prompt, group in enumerate(responses) for response in group]
    assert len(bounds) == len(flat) + 1
    assert batch.group_ids.tolist() == [prompt for prompt, _ in flat]
    for (prompt, response), begin, end in zip(flat, bounds, bounds[1:], strict=False):
        assert batch.targets[begin:end].tolist() == response
        for step, row in enumerate(batch.predictor_rows[begin:end].tolist()):
            assert batch.token_ids[visible[row]].tolist() == prompts[prompt] + response[:step]
    for tensor in (batch.token_ids, batch.predictor_rows, batch.targets, batch.group_ids):
        assert tensor.dtype == torch.int64
    assert batch.cu_seqlens.dtype == torch.int32
    contexts = {tuple(batch.token_ids[visible[row]].tolist()) for row in range(batch.tree.num_tokens)}
    if merge:
        assert len(contexts) == batch.tree.num_tokens
    else:
        assert batch.tree.num_tokens == sum(map(len, prompts)) + sum(len(response) for _, response in flat)


def test_prompt_is_stored_once_and_its_last_row_predicts_every_response():
    batch = pykern.pack([torch.tensor([5, 6, 7])], [[[1, 2], torch.tensor([3]), []]])
    assert batch.token_ids.tolist() == [5, 6, 7, 1, 2, 3]
    assert batch.predictor_rows.tolist() == [2, 3, 2]
    assert batch.targets.tolist() == [1, 2, 3]
    assert batch.cu_seqlens.tolist() == [0, 2, 3, 3]
    assert batch.tree.position.tolist() == [0, 1, 2, 3, 4, 3]


def test_merge_stores_shared_shots_once():
    shots = list(range(50))
    prompts = [shots + [100 + index] for index in range(4)]
    batch = pykern.pack(prompts, [[[1, 2, 3]], [[4]], [], [[5], [5]]], merge=True)
    assert batch.tree.num_tokens == 50 + 4 + 3 + 1 + 1
    assert batch.token_ids[batch.predictor_rows[-2:]].tolist() == [103, 103]


@pytest.mark.parametrize("merge", [False, True])
def test_empty_batches(merge):
    for prompts, responses in ([], []), ([[]], [[]]), ([[]], [[[], []]]), ([[1]], [[]]):
        batch = pykern.pack(prompts, responses, merge=merge)
        assert batch.targets.shape == batch.predictor_rows.shape == (0,)
        assert len(batch.cu_seqlens) == sum(map(len, responses)) + 1
        assert batch.tree.num_tokens == sum(map(len, prompts))


@pytest.mark.parametrize("merge", [False, True])
def test_packed_in_inference_mode(device, merge):
    with torch.inference_mode():
        batch = pykern.pack([[1, 2]], [[[3], [4]]], merge=merge).to(device)
    hidden = torch.ones(4, 3, device=device, requires_grad=True)
    batch.gather(hidden).sum().backward()
    assert hidden.grad[:, 0].tolist() == [0, 2, 0, 0]
    assert not any(t.is_inference() for t in (batch.token_ids, batch.targets, *batch.tree.tensors))


def test_to_moves_every_tensor():
    batch = pykern.pack([[1, 2]], [[[3], [4]]]).to("meta")
    tensors = [batch.token_ids, batch.tree.position, batch.predictor_rows, batch.targets]
    tensors += [batch.cu_seqlens, batch.group_ids]
    assert {tensor.device.type for tensor in tensors} == {"meta"}


@pytest.mark.parametrize(
    ("prompts", "responses", "error", "message"),
    [
        ([[1], []], [[[2]], [[3]]], ValueError, r"prompts\[1\]: expected at least one token, got none"),
        ([[1]], [], ValueError, "responses: expected a list for each of the 1 prompts, got 0"),
        ([[0.5]], [[]], TypeError, r"prompts\[0\]: expected integers"),
        ([[1]], [[[1], [[2]]]], ValueError, r"responses\[0\]\[1\]: expected one dimension"),
    ],
)
def test_refused(prompts, responses, error, message):
    with pytest.raises(error, match=message):
        pykern.pack(prompts, responses)
