"""A training step of a small decoder by the PrefixGrouper interface against the same step on repeated prefixes."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pykern.integrations.prefix_grouper import PrefixGrouper
from tests.integrations.grouped import GROUPS, attention, masks, padding_mode
from tests.support import assert_accurate, assert_grads

VOCABULARY, WIDTH, HEADS, KEY_HEADS, SIZE = 50, 32, 4, 2, 8
# Every response is predicted from its prompt's last token, so prompts have one.
BATCHES = {name: GROUPS[name] for name in ("uniform", "ragged", "one suffix", "tiles")} | {
    "zero lengths": [[3, 0, 2, 0], [1, 4, 1], [2, 0]]
}


def rotate(x: Tensor, position_ids: Tensor) -> Tensor:
    """Rotary embedding of [b, heads, seq, size]."""
    angles = position_ids[:, None, :, None] / 100.0 ** torch.linspace(0, 1, x.shape[-1] // 2, dtype=x.dtype)
    even, odd = x.chunk(2, dim=-1)
    return torch.cat([even * angles.cos() - odd * angles.sin(), odd * angles.cos() + even * angles.sin()], dim=-1)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])
        self.q, self.o = nn.Linear(WIDTH, HEADS * SIZE), nn.Linear(HEADS * SIZE, WIDTH)
        self.k, self.v = nn.Linear(WIDTH, KEY_HEADS * SIZE), nn.Linear(WIDTH, KEY_HEADS * SIZE)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor, position_ids: Tensor, attend) -> Tensor:
        y = self.norms[0](x)
        q, k, v = (linear(y).unflatten(-1, (-1, SIZE)).transpose(1, 2) for linear in (self.q, self.k, self.v))
        x = x + self.o(attend(rotate(q, position_ids), rotate(k, position_ids), v).flatten(2))
        return x + self.mlp(self.norms[1](x))


class Decoder(nn.Module):
    def __init__(self, checkpointed: bool = False):
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.checkpointed = checkpointed

    def forward(self, token_ids: Tensor, position_ids: Tensor, attend) -> Tensor:
        x = self.embedding(token_ids)
        for layer in self.layers:
            if self.checkpointed:
                x = checkpoint(layer, x, position_ids, attend, use_reentrant=False)
            else:
                x = layer(x, position_ids, attend)
        return self.head(x)


def logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.log_softmax(dim=-1).gather(-1, targets[..., None])[..., 0]


def finish(model: Decoder, loss: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss.backward()
    assert_grads(dict(model.named_parameters()))
    return [loss.detach(), *(param.grad.clone() for param in model.parameters())]


def make_batch(name):
    prefix_mask, suffix_mask, sizes = masks(BATCHES[name])
    prompts, responses = (torch.randint(VOCABULARY, mask.shape) for mask in (prefix_mask, suffix_mask))
    weights = torch.randn(int(suffix_mask.sum()), dtype=torch.float64)
    return prompts, prefix_mask, responses, suffix_mask, sizes, weights


def attend_alone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention(q[0], k[0], v[0]).transpose(0, 1)[None]


def step_repeated(model, batch):
    """Every response alone, behind a prompt of its own."""
    prompts, prefix_mask, responses, suffix_mask, sizes, weights = batch
    found = []
    for row, sample in enumerate(torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)).tolist()):
        prompt, response = prompts[sample][prefix_mask[sample]], responses[row][suffix_mask[row]]
        tokens = torch.cat([prompt, response])[None]
        logits = model(tokens, torch.arange(tokens.shape[1])[None], attend_alone)[0]
        found.append(logprobs(logits[len(prompt) - 1 : -1], response))
    found = torch.cat(found)
    return [found.detach(), *finish(model, (found * weights.to(found)).sum())]


def step_grouped(model, batch, name, padding):
    """The steps of the package's own tutorial."""
    prompts, prefix_mask, responses, suffix_mask, sizes, weights = batch
    grouper = PrefixGrouper.from_ungrouped_masks(
        prefix_mask, suffix_mask, sizes, padding_mode=padding_mode(padding, BATCHES[name])
    )
    token_ids = grouper.concat_input(prompts, prefix_mask, responses, suffix_mask)
    logits = model(token_ids, grouper.position_ids, lambda q, k, v: grouper.forward(None, q, k, v))
    _, _, suffix_logits, mask = grouper.split_output(logits, include_prefix_last=1)
    targets = grouper.convert_padding(responses, suffix_mask, padding_mode="right")
    found = logprobs(suffix_logits[:, :-1], targets)[mask[:, 1:]]
    return [found.detach(), *finish(model, (found * weights.to(found)).sum())]


@pytest.mark.parametrize("padding", ["right", "left", "gaps"])
@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpointed"])
def test_step(name, padding, checkpointed):
    """Log-probabilities, loss and the gradient of every parameter."""
    model, batch = Decoder(checkpointed).double(), make_batch(name)
    expected = step_repeated(model, batch)
    for got, want in zip(step_grouped(model, batch, name, padding), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", ["ragged", "tiles"])
def test_step_in_float32(name):
    model, batch = Decoder(), make_batch(name)
    baseline = step_repeated(model, batch)
    actual = step_grouped(model, batch, name, "right")
    model.double()
    for got, want, other in zip(actual, step_repeated(model, batch), baseline, strict=True):
        assert_accurate(got, want, other, units=8.0)
