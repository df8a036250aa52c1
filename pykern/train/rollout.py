"""Samples groups of responses. The shared prefix and each prompt are encoded once, as one prefix tree."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import PrefixTree, prefix_attention
from .data import END
from .model import Transformer


@dataclass
class Rollouts:
    """responses[prompt][response] is a list of tokens, with END if it ended; logprobs lies flat, in that order."""

    responses: list[list[list[int]]]
    logprobs: Tensor


class GroupCache:
    """Keys and values: the shared prefix's once, each prompt's once, and every response's own.

    One new token of response g of prompt p attends to the concatenation of the three; nothing is repeated
    for it. `attend` is what `Transformer.forward` asks for, during `prefill` and afterwards for tokens [P, G].
    """

    def __init__(self, model: Transformer, shared: list[int], prompts: list[list[int]], group: int, longest: int):
        self.model, self.group, self.longest = model, group, longest
        self.device = model.norm.weight.device
        self.lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        self.shared_length = len(shared)
        self.tokens = torch.tensor([*shared, *(token for prompt in prompts for token in prompt)], device=self.device)
        self.tree = PrefixTree.from_parents([len(shared), *map(len, prompts)], [-1] + [0] * len(prompts)).to(
            self.device
        )
        # Packed row of token l of prompt p; beyond the prompt's end any row will do, as it is masked.
        starts = self.shared_length + self.lengths.cumsum(0) - self.lengths
        column = torch.arange(int(self.lengths.max()), device=self.device)
        self.present = column < self.lengths[:, None]
        self.rows = torch.where(self.present, starts[:, None] + column, 0)
        self.last_rows = starts + self.lengths - 1
        self.shared_kv: list[tuple[Tensor, Tensor]] = []
        self.prompt_kv: list[tuple[Tensor, Tensor]] = []
        self.own_kv: list[tuple[Tensor, Tensor]] = []
        self.generated = 0

    def prefill(self) -> Tensor:
        """Encodes prefix and prompts; hidden state of each prompt's last token, [P, width]."""
        return self.model(self.tokens, self.tree.position, self._prefill)[self.last_rows]

    def _prefill(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shape = (len(self.lengths), self.group, self.longest, *k.shape[1:])
        self.shared_kv.append((k[: self.shared_length], v[: self.shared_length]))
        self.prompt_kv.append((k[self.rows], v[self.rows]))
        self.own_kv.append((k.new_zeros(shape), v.new_zeros(shape)))
        return prefix_attention(q, k, v, self.tree)

    def step(self, tokens: Tensor) -> Tensor:
        """Appends one token to every response, [P, G]; the hidden states there, [P, G, width]."""
        positions = self.shared_length + self.lengths[:, None].expand_as(tokens) + self.generated
        self.generated += 1
        return self.model(tokens, positions, self._step)

    def _step(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self.own_kv[layer]
        keys[:, :, self.generated - 1], values[:, :, self.generated - 1] = k, v
        own = slice(0, self.generated)
        q = q.unflatten(2, (k.shape[2], -1)) * q.shape[-1] ** -0.5
        scores = (
            torch.einsum("pghrd,shd->pghrs", q, self.shared_kv[layer][0]),
            torch.einsum("pghrd,plhd->pghrl", q, self.prompt_kv[layer][0]).masked_fill(
                ~self.present[:, None, None, None, :], float("-inf")
            ),
            torch.einsum("pghrd,pgthd->pghrt", q, keys[:, :, own]),
        )
        weights = (
            torch.cat(scores, dim=-1).softmax(dim=-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
        )
        shared, prompt, response = weights.split([part.shape[-1] for part in scores], dim=-1)
        output = (
            torch.einsum("pghrs,shd->pghrd", shared, self.shared_kv[layer][1])
            + torch.einsum("pghrl,plhd->pghrd", prompt, self.prompt_kv[layer][1])
            + torch.einsum("pghrt,pgthd->pghrd", response, values[:, :, own])
        )
        return output.flatten(2, 3)


@torch.no_grad()
def sample(
    model: Transformer,
    shared: list[int],
    prompts: list[list[int]],
    group: int,
    longest: int,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> Rollouts:
    """`group` responses to each prompt, up to `longest` tokens, and the log-probabilities they were drawn with.

    Temperature 0 takes the likeliest token (log-probabilities are then those at temperature 1).
    """
    cache = GroupCache(model, shared, prompts, group, longest)
    hidden = cache.prefill()[:, None].expand(-1, group, -1)
    tokens, logprobs = [], []
    ended = torch.zeros(len(prompts), group, dtype=torch.bool, device=cache.device)
    for _ in range(longest):
        distribution = (model.logits(hidden) / (temperature or 1.0)).log_softmax(dim=-1)
        if temperature == 0:
            chosen = distribution.argmax(dim=-1)
        else:
            chosen = torch.multinomial(distribution.exp().flatten(0, 1), 1, generator=generator).view(
                len(prompts), group
            )
        tokens.append(chosen)
        logprobs.append(distribution.gather(-1, chosen[..., None])[..., 0])
        ended |= chosen == END
        if len(tokens) == longest or bool(ended.all()):
            break
        hidden = cache.step(chosen)

    drawn = torch.stack(tokens, dim=-1)
    is_end = drawn == END
    # A response is everything up to and with its first END.
    kept = is_end.cumsum(-1) - is_end.long() == 0
    counts = kept.sum(-1).tolist()
    responses = [
        [row[:count] for row, count in zip(rows, lengths)] for rows, lengths in zip(drawn.tolist(), counts)
    ]  # fmt: skip
    return Rollouts(responses, torch.stack(logprobs, dim=-1)[kept])
