"""What one GRPO update reads: groups of responses behind a shared prefix, packed as a prefix tree."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import PackedBatch, pack


@dataclass
class Groups:
    """Token lists of a batch. Response r of prompt p is responses[p][r]; flat tensors run in that order.

    advantages: [responses]; old_logprobs: [response tokens].
    """

    shared: list[int]
    prompts: list[list[int]]
    responses: list[list[list[int]]]
    advantages: Tensor | None = None
    old_logprobs: Tensor | None = None

    @property
    def horizon(self) -> int:
        """Tokens of the longest response."""
        return max(len(response) for _, response in self.flat())

    def flat(self) -> list[tuple[list[int], list[int]]]:
        """(prompt, response) pairs."""
        return [(prompt, response) for prompt, group in zip(self.prompts, self.responses) for response in group]


def pack_groups(groups: Groups, device: torch.device) -> PackedBatch:
    """One row of tokens under a tree of depth three: shared prefix, prompts, responses. What agrees is stored once."""
    shared = torch.tensor(groups.shared)
    prompts = [torch.cat((shared, torch.tensor(prompt))) for prompt in groups.prompts]
    return pack(prompts, groups.responses, merge=True).to(device)


def flat_gradient(model: nn.Module) -> Tensor:
    """All gradients in one float32 vector, in the order of the parameters."""
    return torch.cat([p.grad.float().flatten() for p in model.parameters() if p.requires_grad])
