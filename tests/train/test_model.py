"""Packed trees against repeated sequences, and sampling with the shared cache against the whole forward."""

import pytest
import torch

from pykern.train.batch import Groups, pack_groups
from pykern.train.compare import plain_logprobs
from pykern.train.data import BEGIN, END, encode
from pykern.train.model import Shape, Transformer, causal_attention, rotate, rotation, tree_attention
from pykern.train.rollout import sample

SHARED = [BEGIN, *encode("1+1=2\n")]
PROMPTS = [encode("3+4="), encode("10+11="), encode("5+")]


def model(dtype=torch.float64, tie_head=False, key_heads=2) -> Transformer:
    torch.manual_seed(3)
    return Transformer(Shape(2, 32, 4, key_heads, tie_head)).to(dtype)


def batch(dtype=torch.float64) -> Groups:
    responses = [[[55, END], [55, 56, 57, END], [END]], [[50, 49, END]], [[51], [52, 53]]]
    return Groups(SHARED, PROMPTS, responses)


def packed_logprobs(network, groups):
    """By the tree, with PyTorch's own head so that any dtype shows the layout alone."""
    packed = pack_groups(groups, torch.device("cpu"))
    hidden = network(packed.token_ids, packed.tree.position, tree_attention(packed.tree))
    logits = network.head(hidden[packed.predictor_rows])
    return logits.log_softmax(-1).gather(-1, packed.targets[:, None])[:, 0]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_packed_tree_equals_repeated_sequences(dtype, tolerance, key_heads):
    network = model(dtype, key_heads=key_heads)
    plain, _ = plain_logprobs(network, batch(), 1.0)
    torch.testing.assert_close(packed_logprobs(network, batch()), plain, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("tie_head", [False, True])
def test_packed_tree_has_the_gradients_of_repeated_sequences(tie_head):
    gradients = []
    for logprobs in (packed_logprobs, lambda network, groups: plain_logprobs(network, groups, 1.0)[0]):
        network = model(tie_head=tie_head)
        values = logprobs(network, batch())
        (values * torch.linspace(-1, 1, len(values), dtype=torch.float64)).sum().backward()
        gradients.append({name: parameter.grad for name, parameter in network.named_parameters()})
    assert all(gradient is not None for gradient in gradients[0].values())
    for name in gradients[0]:
        torch.testing.assert_close(gradients[0][name], gradients[1][name], rtol=1e-10, atol=1e-12)


def test_the_shared_prefix_and_equal_beginnings_are_packed_once():
    packed = pack_groups(batch(), torch.device("cpu"))
    # "3+4=" with 7, 7 8 9 and the empty one shares its first token of two responses.
    assert packed.tree.num_tokens < len(SHARED) + sum(map(len, PROMPTS)) + sum(len(r) for _, r in batch().flat())
    assert packed.cu_seqlens.tolist() == [0, 2, 6, 7, 10, 11, 13]


def test_rotation_is_by_distance_only():
    q, k = torch.randn(2, 1, 1, 16, dtype=torch.float64)

    def score(i, j):
        turned = [rotate(x, *rotation(torch.tensor([p]), 16)) for x, p in ((q, i), (k, j))]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(score(3, 1), score(1003, 1001))
    assert (score(3, 1) - score(4, 1)).abs() > 1e-6


def test_tied_head_is_the_embedding():
    network = model(tie_head=True)
    assert network.head.weight is network.embedding.weight
    assert len(list(network.parameters())) == len(list(model().parameters())) - 1


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_sampling_with_the_cache_equals_the_whole_forward(temperature):
    network = model()
    rollouts = sample(network, SHARED, PROMPTS, 5, 6, temperature, torch.Generator().manual_seed(1))
    assert [len(group) for group in rollouts.responses] == [5, 5, 5]
    groups = Groups(SHARED, PROMPTS, rollouts.responses)
    with torch.no_grad():
        whole, _ = plain_logprobs(network, groups, temperature)
    torch.testing.assert_close(rollouts.logprobs, whole, rtol=1e-10, atol=1e-10)


def test_greedy_sampling_takes_the_likeliest_token_of_the_whole_forward():
    network = model()
    (response,) = sample(network, SHARED, PROMPTS[:1], 1, 5, 0.0).responses[0]
    sequence = [*SHARED, *PROMPTS[0]]
    for token in response:
        row = torch.tensor([sequence])
        hidden = network(row, torch.arange(len(sequence))[None], causal_attention)
        assert int(network.head(hidden[0, -1]).argmax()) == token
        sequence.append(token)


def test_responses_stop_at_the_end_token():
    network = model()
    with torch.no_grad():
        network.head.weight.zero_()
        network.norm.weight.fill_(1.0)
        network.head.weight[END] = 0.0
    rollouts = sample(network, SHARED, PROMPTS, 40, 300, 1.0, torch.Generator().manual_seed(0))
    lengths = [len(response) for group in rollouts.responses for response in group]
    assert min(lengths) < 300
    for group in rollouts.responses:
        for response in group:
            assert END not in response[:-1]
            assert response[-1] == END or len(response) == 300
    assert len(rollouts.logprobs) == sum(lengths)


def test_sampling_repeats_with_its_generator():
    network = model(torch.float32)
    one, two = (sample(network, SHARED, PROMPTS, 4, 6, 1.0, torch.Generator().manual_seed(5)) for _ in range(2))
    assert one.responses == two.responses and torch.equal(one.logprobs, two.logprobs)


def test_sampled_frequencies_follow_the_distribution():
    network = model(torch.float32)
    rollouts = sample(network, SHARED, PROMPTS[:1], 20_000, 1, 1.0, torch.Generator().manual_seed(2))
    counts = torch.bincount(torch.tensor([r[0] for r in rollouts.responses[0]]), minlength=258) / 20_000
    row = torch.tensor([[*SHARED, *PROMPTS[0]]])
    hidden = network(row, torch.arange(row.shape[1])[None], causal_attention)
    expected = network.head(hidden[0, -1]).softmax(-1)
    assert (counts - expected).abs().max() < 0.01


def test_bfloat16_sampling_and_packing_run():
    network = model(torch.bfloat16)
    rollouts = sample(network, SHARED, PROMPTS, 3, 4, 1.0, torch.Generator().manual_seed(0))
    assert rollouts.logprobs.dtype == torch.float32
    whole = packed_logprobs(network, Groups(SHARED, PROMPTS, rollouts.responses)).float()
    torch.testing.assert_close(rollouts.logprobs, whole, rtol=0.05, atol=0.1)
